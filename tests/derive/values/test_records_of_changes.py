"""What a change in place writes down, read again from a folder that strangers may have touched: names, order, links."""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ds4convert.derive import derivation, in_place, plan_builder
from ds4convert.derive.in_place import Commit, Undo
from ds4convert.errors import InputError, OutputError
from ds4convert.planning import build
from ds4convert.storage.records import ByteRange
from ds4convert.storage.untrusted.fields import Fields

HOSTILE = [
    "",
    "/",
    "/etc/passwd",
    "..",
    "../x",
    "a/../../x",
    "mtp/../../x",
    ".ds4convert",
    ".ds4convert/plan.json",
    "//x",
    ".",
]


@pytest.mark.parametrize("name", HOSTILE)
def test_a_name_that_leads_out_of_the_folder_or_into_its_state_is_refused(name: str) -> None:
    with pytest.raises(InputError) as found:
        in_place._names(["config.json", name], "commit.json")
    assert str(found.value) == f"commit.json: {name!r} is no name of a file in the folder"


def test_names_inside_the_folder_are_taken_in_their_order() -> None:
    names = ["mtp/config.json", "model-1.safetensors", ".ds4convert_undo/undo.json", "a..b", "...x"]
    assert in_place._names(names, "w") == names


def test_files_are_moved_in_tensors_first_config_last_and_the_manifest_not_at_all() -> None:
    wanted = [
        "a.safetensors", "mtp/model.safetensors", "chat_template.jinja", "mtp/config.json", "tokenizer.json",
        "model.safetensors.index.json", "config.json",
    ]  # fmt: skip
    shuffled = [*wanted, "ds4convert_manifest.json"]
    for seed in range(5):
        random.Random(seed).shuffle(shuffled)
        assert in_place._in_order(shuffled) == wanted


def test_a_link_on_the_way_to_a_file_is_not_followed(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "mtp").symlink_to(tmp_path)
    assert in_place._inside(folder, "config.json") == folder / "config.json"
    assert in_place._inside(folder, "new/config.json") == folder / "new" / "config.json"
    with pytest.raises(OutputError) as found:
        in_place._inside(folder, "mtp/config.json")
    assert str(found.value) == f"{folder / 'mtp'}: is a link, expected a folder; remove it"


def fields(table: Any) -> Fields:
    return Fields.of(table, "undo.json", "do this")


def test_records_are_read_as_they_are_written() -> None:
    assert Undo.read(fields({"restore": ["a"], "remove": [], "sha256": {"a": "x"}})) == Undo(("a",), (), {"a": "x"})
    assert Commit.read(fields({"kind": "graft", "place": ["a"], "remove": ["b"]})) == Commit("graft", ("a",), ("b",))


@pytest.mark.parametrize(
    ("table", "named"),
    [
        ({"restore": "a", "remove": [], "sha256": {}}, "restore"),
        ({"restore": [3], "remove": [], "sha256": {}}, "restore"),
        ({"restore": [], "sha256": {}}, "remove"),
        ({"restore": [], "remove": [], "sha256": {"a": 3}}, "sha256"),
        ({"restore": [], "remove": [], "sha256": []}, "sha256"),
    ],
)
def test_a_field_of_another_kind_is_named_with_its_file_and_what_to_do(table: dict[str, Any], named: str) -> None:
    with pytest.raises(InputError) as found:
        Undo.read(fields(table))
    assert "undo.json" in str(found.value) and named in str(found.value) and "do this" in str(found.value)


@pytest.mark.parametrize("kind", ["link", "none", "strange"])
def test_what_is_no_state_of_a_change_is_left_alone(tmp_path: Path, kind: str) -> None:
    state = tmp_path / ".ds4convert"
    if kind == "link":
        (tmp_path / "elsewhere").mkdir()
        state.symlink_to(tmp_path / "elsewhere")
    elif kind == "strange":
        state.mkdir()
        (state / "plan.json").touch()
    assert in_place.recover(tmp_path) is None
    assert state.exists() == (kind != "none")


# --- sizes of shards ---


def modules(files: list[tuple[int, int]]) -> Any:
    """Return stored modules of one part each, by (file, bytes)."""
    return [SimpleNamespace(parts=[SimpleNamespace(at=(ByteRange(f, 0, n),))]) for f, n in files]


def split(sizes: list[int], limit: int) -> list[int]:
    """The plain rule: a module goes to the next file where it does not fit beside what is there."""
    out, used = [], 0
    for size in sizes:
        if out and used + size <= limit:
            out[-1] += 1
            used += size
        else:
            out.append(1)
            used = size
    return out


@given(st.lists(st.integers(1, 9), min_size=1, max_size=12), st.integers(9, 30))
def test_a_shard_size_is_found_that_divides_a_folder_as_it_is_divided(sizes: list[int], limit: int) -> None:
    counts = split(sizes, limit)
    files = [n for n, count in enumerate(counts) for _ in range(count)]
    found = plan_builder.limit_of(modules(list(zip(files, sizes, strict=True))))
    if len(counts) == 1:
        assert found == build.DEFAULT_SHARD_BYTES, "one file has room for what becomes larger"
    else:
        assert split(sizes, found) == counts


def test_where_no_size_gives_the_files_as_they_are_the_usual_one_is_taken() -> None:
    assert plan_builder.limit_of(modules([(0, 5), (0, 5), (1, 1), (2, 9)])) == build.DEFAULT_SHARD_BYTES
    assert plan_builder.limit_of([]) == build.DEFAULT_SHARD_BYTES
    huge = build.DEFAULT_SHARD_BYTES + 7
    assert plan_builder.limit_of(modules([(0, huge)])) == huge


def test_a_disk_is_that_of_the_nearest_folder_that_is_there(tmp_path: Path) -> None:
    assert derivation._same_disk(tmp_path, tmp_path / "a" / "b" / "c")
