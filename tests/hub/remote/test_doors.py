"""One door for every checkpoint: what was opened has tensors, inventory, bytes and provenance, wherever it lies."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from ds4convert.checkpoint import compare
from ds4convert.checkpoint.source import Source
from ds4convert.checkpoint.types import Provenance
from ds4convert.converted.modules import ConvertedModel
from ds4convert.converted.open import OpenCheckpoint, PlainFiles
from ds4convert.errors import ConfigError, InputError
from ds4convert.hub import repo
from ds4convert.hub.doors import open_checkpoint, open_official
from tests import support_run
from tests.hub.remote.conftest import NAME
from tests.local_hub import LocalHub


@pytest.fixture(scope="module")
def converted(mini_source: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Return a lossless conversion of the small checkpoint, with a drafter folder below it."""
    out = tmp_path_factory.mktemp("converted") / "mlx"
    support_run.run(mini_source, out, layout="universal")
    yield out


def values_differ(a: OpenCheckpoint, b: OpenCheckpoint) -> list[str]:
    """Return the keys of the tensors of `a` whose values in `b` are others."""
    return [key for key, x, _, d in compare.compare_views(a.view, b.view) if x is not None and d.status != "same"]


def test_an_official_checkpoint_and_what_was_made_of_it_hold_the_same_tensors(
    mini_source: Path, converted: Path
) -> None:
    first, second = open_checkpoint(mini_source), open_checkpoint(converted)
    assert isinstance(first, Source) and isinstance(second, ConvertedModel)
    assert first.tensors.keys() == second.tensors.keys() and not values_differ(first, second)
    assert first.inventory.head_kind == second.inventory.head_kind != "none"
    assert [m.name for m in first.inventory.modules] == [m.name for m in second.inventory.modules]
    assert first.provenance is None and second.provenance is None


def test_the_bytes_of_what_was_opened_are_those_of_its_files(mini_source: Path, converted: Path) -> None:
    for folder in (mini_source, converted):
        found = open_checkpoint(folder)
        for name in found.view.names:
            data = (folder / name).read_bytes()
            assert found.bytes.size(name) == len(data) and found.bytes.read(name, 0, len(data)) == data
        found.bytes.close()
    assert any(n.startswith("mtp/") for n in found.view.names), "the drafter folder's files are among them"


def test_a_drafter_folder_is_a_converted_head_alone(converted: Path) -> None:
    found = open_checkpoint(converted / "mtp")
    assert isinstance(found, ConvertedModel) and found.is_head and not found.folder.findings
    assert found.tensors and {t.part for t in found.tensors.values()} == {"mtp"}
    assert {m.part for m in found.inventory.modules} == {"mtp"}


def test_files_without_a_config_are_told_apart_and_no_source(mini_source: Path, tmp_path: Path) -> None:
    shard = next(mini_source.glob("*.safetensors"))
    shutil.copy(shard, tmp_path)
    for place in (shard, tmp_path):
        found = open_checkpoint(place)
        assert isinstance(found, PlainFiles) and found.inventory is None and found.tensors
        assert {t.key for t in found.tensors.values()} == {t.name for t in found.checkpoint.tensors()}
    with pytest.raises(ConfigError, match=r"config\.json"):
        open_official(tmp_path)


def test_a_converted_folder_is_opened_and_refused_as_a_source(converted: Path) -> None:
    with pytest.raises(InputError, match="is a converted folder"):
        open_official(converted)


def test_a_converted_folder_that_lacks_a_tensor_is_opened_and_says_so(converted: Path, tmp_path: Path) -> None:
    copy = support_run.copied(converted, tmp_path / "mlx")
    index = copy / "model.safetensors.index.json"
    (copy / "config.json").write_text(
        json.dumps(json.loads((copy / "config.json").read_text()) | {"num_hash_layers": 0})
    )
    assert index.exists()
    found = open_checkpoint(copy)
    assert isinstance(found, ConvertedModel) and found.folder.findings


def test_a_repo_is_opened_as_the_folder_is_and_read_by_range(
    hub: LocalHub, mini_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))
    commit = hub.add_repo(NAME, mini_source)
    listed = repo.open_repo(NAME, endpoint=hub.url, token=hub.token)
    far, here = open_checkpoint(listed), open_checkpoint(mini_source)
    assert isinstance(far, Source) and isinstance(here, Source)
    assert not far.checkpoint.is_here and here.checkpoint.is_here
    assert far.inventory == here.inventory and far.checkpoint.files == here.checkpoint.files
    digests = {f.name: hashlib.sha256((mini_source / f.name).read_bytes()).hexdigest() for f in here.checkpoint.files}
    assert far.provenance == Provenance(NAME, commit, digests)
    assert {n: far.bytes.digest(n) for n in digests} == digests
    hub.reset_counters()
    some = next(k for k, t in far.tensors.items() if t.role == "norm")
    reader, there = far.view.reader(), here.view.reader()
    for at in far.tensors[some].weight_at:
        assert reader.get(at, 0, at.size) == there.get(at, 0, at.size)
        assert reader.get(at, 1, 2) == there.get(at, 1, 2)
    sent = sum(n for name, n in hub.counters()["sent"].items() if "safetensors" in name)
    assert 0 < sent <= 2 * sum(at.size for at in far.tensors[some].weight_at), "a tensor alone is fetched, and once"
    there.close()
    assert open_official(listed).inventory == here.inventory
