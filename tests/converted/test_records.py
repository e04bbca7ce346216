"""Manifests and records as values: read back to the same bytes, and whatever is wrong in one is named by its path."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from ds4convert.converted import manifest, verify_record
from ds4convert.converted.records import Manifest
from ds4convert.converted.verify_record import HeadFigures, VerifyRecord
from ds4convert.errors import InputError
from ds4convert.planning.types import RoundingError, Tool
from ds4convert.storage import strict_json
from ds4convert.storage.untrusted.fields import Fields
from tests import support_run as s
from tests.converted.manifests import MANIFEST, TENSOR, count, figure, manifests, text
from tests.converted.manifests import manifest as made_of


def read(raw: bytes) -> Manifest:
    return Manifest.read(Fields.of(json.loads(raw), manifest.MANIFEST_NAME))


@settings(deadline=None, max_examples=150)
@given(manifests)
def test_a_manifest_is_read_back_as_the_same_value_and_written_to_the_same_bytes(made: Manifest) -> None:
    raw = made.as_bytes()
    again = read(raw)
    assert replace(again, digest="") == made and again.as_bytes() == raw
    assert again.digest == json.loads(raw)["digest"]


Step = str | int
WRONG = (None, True, 1.5, -1, "x", [], {}, [1.5], {"a": 1.5})


def places(value: Any, path: tuple[Step, ...] = ()) -> Iterator[tuple[Step, ...]]:
    """Yield the path of every value in a document, but for the document."""
    if path:
        yield path
    if isinstance(value, dict):
        for k, v in value.items():
            yield from places(v, (*path, k))
    if isinstance(value, list):
        for n, v in enumerate(value):
            yield from places(v, (*path, n))


def spelled(path: tuple[Step, ...]) -> str:
    return "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in path).removeprefix(".")


def changed(table: Any, path: tuple[Step, ...], value: Any) -> Any:
    out = copy.deepcopy(table)
    at = out
    for p in path[:-1]:
        at = at[p]
    at[path[-1]] = value
    return out


@pytest.fixture(scope="module")
def rounded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return the manifest of a conversion that rounds, cut to a few records."""
    out = tmp_path_factory.mktemp("records") / "mlx"
    s.cli("quantize", s.ROOT / "manifests" / "demo", out, "--recipe", "q4", "--drop-mtp", "--no-hash")
    table: dict[str, Any] = json.loads((out / manifest.MANIFEST_NAME).read_text())
    lossy, plain = ([t for t in table["tensors"] if ("error" in t) == has][:1] for has in (True, False))
    return table | {"tensors": lossy + plain, "left_out": table["left_out"][:2]}


def is_healthy(path: tuple[Step, ...], old: object, value: object) -> bool:
    """Return whether a manifest may have `value` in the place of `old`."""
    name = path[-1]
    if name in {"xxh3_128", "sha256"}:
        return value is None or isinstance(value, str)
    if name == "layer":
        return value is None
    if path[-2:-1] == ("params",):
        return isinstance(value, str) or type(value) is int
    if name in {"relative_square", "max_abs", "bits_per_weight"}:
        return type(value) in {int, float}
    return type(value) is type(old) and value != -1 and name not in {"params", "formats", "sources", "shape"}


@settings(deadline=None, max_examples=400)
@given(data=st.data())
def test_any_field_that_is_not_what_it_has_to_be_is_named_by_its_path(
    rounded: dict[str, Any], data: st.DataObject
) -> None:
    table = {k: v for k, v in rounded.items() if k != "manifest_version"}
    path = data.draw(st.sampled_from(sorted(places(table), key=spelled)))
    at: Any = table
    for p in path:
        at = at[p]
    value = data.draw(st.sampled_from([w for w in WRONG if not is_healthy(path, at, w)]))
    assume(not (type(value) is type(at) and isinstance(value, list | dict)))  # its own entries are drawn, too
    with pytest.raises(InputError) as e:
        Manifest.read(Fields.of(changed(table, path, value), "m.json"))
    assert str(e.value).startswith(f"m.json: {spelled(path)}: expected ")
    assert str(e.value).endswith(f", found {json.dumps(value)}")


@settings(deadline=None, max_examples=200)
@given(data=st.data())
def test_any_field_that_is_missing_is_named_by_its_path(rounded: dict[str, Any], data: st.DataObject) -> None:
    table = {k: v for k, v in rounded.items() if k != "manifest_version"}
    path = data.draw(st.sampled_from(sorted(places(table), key=spelled)))
    assume(isinstance(path[-1], str))
    out = copy.deepcopy(table)
    at = out
    for p in path[:-1]:
        at = at[p]
    del at[path[-1]]
    may_lack = {"transform", "params", "error", "header_sha256", "config_sha256", "repo", "revision", "sha256"}
    assume(path[-1] not in may_lack and path[-2:-1] not in {("params",), ("formats",)})
    assume(path[-1] != "bytes" or path[0] != "files")  # a file that was copied as it is tells none
    with pytest.raises(InputError, match="found nothing") as e:
        Manifest.read(Fields.of(out, "m.json"))
    assert str(e.value).startswith(f"m.json: {spelled(path)}: expected ")


def test_the_message_names_path_expectation_finding_and_what_to_do(tmp_path: Path) -> None:
    table = json.loads(made_of({}, {}, {}).as_bytes())
    table["tensors"][2]["bytes"] = "x"
    (tmp_path / manifest.MANIFEST_NAME).write_bytes(strict_json.pretty(table))
    with pytest.raises(InputError) as e:
        manifest.read(tmp_path)
    wanted = 'ds4convert_manifest.json: tensors[2].bytes: expected an integer >= 0, found "x"; convert again'
    assert str(e.value) == wanted


def test_a_value_that_is_only_another_one_is_told_by_the_digest(tmp_path: Path) -> None:
    table = json.loads(MANIFEST.as_bytes())
    table["tensors"][0]["bytes"] += 1
    (tmp_path / manifest.MANIFEST_NAME).write_bytes(strict_json.pretty(table))
    with pytest.raises(InputError, match="altered since it was written"):
        manifest.read(tmp_path)


def test_what_a_later_version_adds_is_read_over(tmp_path: Path) -> None:
    table = json.loads(MANIFEST.as_bytes()) | {"later": [1]}
    del table["digest"]
    raw = strict_json.pretty(table | {"digest": strict_json.digest(table)})
    (tmp_path / manifest.MANIFEST_NAME).write_bytes(raw)
    found = manifest.read(tmp_path)
    assert found is not None and replace(found, digest="") == MANIFEST and found.digest == strict_json.digest(table)


@pytest.mark.parametrize("value", [[], "x", 3, None])
def test_a_manifest_that_is_no_object_is_refused(tmp_path: Path, value: object) -> None:
    (tmp_path / manifest.MANIFEST_NAME).write_bytes(strict_json.pretty(value))
    with pytest.raises(InputError, match="not a manifest that this version"):
        manifest.read(tmp_path)


def test_tensors_are_grouped_by_role_with_the_head_last_and_formats_by_bytes() -> None:
    lost = RoundingError(0.25, 2.0, 4.5)
    found = made_of(
        {"part": "mtp", "role": "mtp_experts", "format": "mxfp4", "size": 10},
        {"role": "experts", "format": "native", "size": 4},
        {"role": "experts", "format": "affine-4-g64", "size": 9, "name": "e.weight", "layer": 0, "error": lost},
    )
    backbone, head = found.groups()
    assert (backbone.name, backbone.tensors, backbone.size) == ("experts", 2, 13)
    assert backbone.formats == {"native": 4, "affine-4-g64": 9} and head.name == "mtp.experts"
    assert found.head_formats() == {"mxfp4": 10}
    (loss,) = found.losses()
    assert (loss.group, loss.layer, loss.formats) == ("experts", 0, ("affine-4-g64",))
    assert loss.relative_square == 0.25 and loss.max_abs == 2.0 and loss.bits_per_weight == 4.5
    assert replace(found, tensors=(TENSOR,)).losses() == ()


figures = st.builds(
    HeadFigures,
    **{f.name: st.none() | (st.booleans() if f.name == "greedy_equal" else count if f.name in {"drafted", "accepted",
       "draft_depth", "block_size"} else st.lists(figure).map(tuple) if f.name == "acceptance_by_position" else text if f.name in {"kind", "format"} else figure)
       for f in fields(HeadFigures) if f.name != "verdict"},
    verdict=text,
)  # fmt: skip


@settings(deadline=None)
@given(figures, st.booleans(), st.lists(text, max_size=3).map(tuple))
def test_a_record_of_verify_is_read_back_as_it_was_written(
    head: HeadFigures, ok: bool, checks: tuple[str, ...]
) -> None:
    made = VerifyRecord(Tool("ds4convert", "1"), "d", "cpu", ok, checks, head)
    assert VerifyRecord.read(Fields.of(json.loads(strict_json.pretty(made.as_json())), "v.json")) == made


@pytest.mark.parametrize("field", [f.name for f in fields(HeadFigures)])
def test_a_record_of_verify_with_a_wrong_field_does_not_count(tmp_path: Path, field: str) -> None:
    record = replace(MANIFEST, digest="d")
    made = VerifyRecord(Tool("ds4convert", "1"), "d", "cpu", True, (), HeadFigures("classic", "mxfp4", verdict="works"))
    path = tmp_path / manifest.VERIFY_NAME
    path.write_bytes(strict_json.pretty(made.as_json()))
    assert verify_record.read(tmp_path, record) == made
    assert verify_record.read(tmp_path, replace(record, digest="other")) is None
    path.write_bytes(strict_json.pretty(changed(made.as_json(), ("mtp", field), {})))
    assert verify_record.read(tmp_path, record) is None
