"""`relayout`: the folder that `quantize` would have written in that layout, byte for byte, from any other layout."""

from __future__ import annotations

import itertools
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests import support
from tests import support_run as s

LAYOUTS = {
    "classic": ("inline", "mlx-lm", "mtplx", "universal", "vlm"),
    "dspark": ("inline", "mlx-lm", "vlm"),
    "none": ("inline", "mtplx", "vlm"),
}
MANIFEST = "ds4convert_manifest.json"

Folders = dict[tuple[str, str], Path]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("sources")
    return {kind: s.tiny(home / kind, layers=3, experts=4, head=kind) for kind in LAYOUTS}


@pytest.fixture(scope="module")
def folders(sources: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """Every kind of head in every layout that takes it, in several files of head and backbone."""
    home = tmp_path_factory.mktemp("folders")
    out = {(kind, layout): home / f"{kind}-{layout}" for kind, known in LAYOUTS.items() for layout in known}
    for (kind, layout), path in out.items():
        s.run(sources[kind], path, layout=layout, max_shard_bytes=1_000_000)
    return out


PAIRS = [(kind, a, b) for kind, known in LAYOUTS.items() for a, b in itertools.product(known, known)]


@pytest.mark.parametrize(("kind", "a", "b"), PAIRS)
def test_every_layout_becomes_every_other_as_if_converted_so(
    folders: Folders, kind: str, a: str, b: str, tmp_path: Path
) -> None:
    result = support.run("relayout", folders[kind, a], tmp_path / "out", "--layout", b, "--json")
    assert result.code == 0, result.err
    assert s.contents(tmp_path / "out") == s.contents(folders[kind, b])
    assert set(result.json["files_written"]).isdisjoint(result.json["files_kept"])


@pytest.mark.sampled(1)
@pytest.mark.parametrize("kind", ["classic", "dspark"])
def test_there_and_back_is_the_same_folder(folders: Folders, kind: str, tmp_path: Path) -> None:
    before = folders[kind, "inline"]
    for n, layout in enumerate([*LAYOUTS[kind], "inline"]):
        s.cli("relayout", before, tmp_path / str(n), "--layout", layout, "-q")
        before = tmp_path / str(n)
    assert s.contents(before) == s.contents(folders[kind, "inline"])


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    "options",
    [
        {"recipe": "bf16"},
        {"hashing": False},
        {"keep_mtp": False},
        {"max_shard_bytes": 10**12},
        {"formats": {"backbone": "affine-4-g32", "mtp": "affine-8-g32"}},
        {"formats": {"experts": "nvfp4", "mtp": "mxfp4"}},
    ],
    ids=str,
)
def test_any_options_of_the_conversion_are_carried_over(
    sources: dict[str, Path], options: dict[str, Any], tmp_path: Path
) -> None:
    flags = {
        "recipe": lambda v: ["--recipe", v],
        "hashing": lambda v: ["--no-hash"],
        "keep_mtp": lambda v: ["--drop-mtp"],
        "max_shard_bytes": lambda v: ["--max-shard-size", str(v)],
        "formats": lambda v: [x for k, f in v.items() for x in (f"--{k}", f)],
    }
    words = [w for k, v in options.items() for w in flags[k](v)]
    for layout in ("universal", "vlm"):
        assert support.run("quantize", sources["classic"], tmp_path / layout, "--layout", layout, *words).code == 0
    for a, b in (("universal", "vlm"), ("vlm", "universal")):
        assert support.run("relayout", tmp_path / a, tmp_path / f"from-{a}", "--layout", b).code == 0
        assert s.contents(tmp_path / f"from-{a}") == s.contents(tmp_path / b)


def test_a_config_without_a_number_of_stages_goes_there_and_back(tmp_path: Path) -> None:
    source = s.tiny(tmp_path / "source", layers=3, experts=4, head="dspark")
    support.edit_json(source / "config.json", lambda c: c.pop("num_nextn_predict_layers"))
    for layout in ("inline", "vlm"):
        s.run(source, tmp_path / layout, layout=layout)
    for a, b in (("inline", "vlm"), ("vlm", "inline")):
        s.cli("relayout", tmp_path / a, tmp_path / f"from-{a}", "--layout", b, "-q")
        assert s.contents(tmp_path / f"from-{a}") == s.contents(tmp_path / b)


def test_the_files_of_the_backbone_are_shared_not_copied(folders: Folders, tmp_path: Path) -> None:
    base, out = folders["classic", "inline"], tmp_path / "out"
    facts = json.loads(s.cli("relayout", base, out, "--layout", "mtplx", "--json").stdout)
    assert facts["files_kept"] and all(n.startswith("model-0") for n in facts["files_kept"])
    assert all((out / n).samefile(base / n) for n in facts["files_kept"])
    assert s.failed_checks(out) == []


def test_a_result_is_not_made_twice(folders: Folders, tmp_path: Path) -> None:
    base, out = folders["classic", "vlm"], tmp_path / "out"
    assert support.run("relayout", base, out, "--layout", "inline", "--json").json["already_done"] is False
    assert support.run("relayout", base, out, "--layout", "inline", "--json").json["already_done"] is True


def test_another_layout_replaces_the_first_only_when_told_so(folders: Folders, tmp_path: Path) -> None:
    base, out = folders["classic", "inline"], tmp_path / "out"
    assert support.run("relayout", base, out, "--layout", "universal").code == 0
    support.assert_refused(support.run("relayout", base, out, "--layout", "mtplx"), "not empty", "--overwrite")
    assert support.run("relayout", base, out, "--layout", "mtplx", "--overwrite").code == 0
    assert s.contents(out) == s.contents(folders["classic", "mtplx"])
    assert s.wrong(base) == []


# --- refusals ----------------------------------------------------------------------------------------------------


def _flip(name: str) -> Callable[[Path], None]:
    return lambda folder: s.flip(next(iter(sorted(folder.glob(name)))), -200)


def _no_shard(folder: Path) -> None:
    next(iter(sorted(folder.glob("model-0*.safetensors")))).unlink()


def _unfinished(folder: Path) -> None:
    (folder / MANIFEST).unlink()
    (folder / ".ds4convert").mkdir()
    (folder / ".ds4convert" / "plan.json").write_text("{}")


def _renamed_tensor(folder: Path) -> None:
    old, new = "mtp.0.enorm.weight", "mtp.0.fnorm.weight"
    support.edit_header(support.shard_with(folder, old), lambda h: h.update({new: h.pop(old)}))
    support.edit_json(folder / support.INDEX, lambda i: i["weight_map"].update({new: i["weight_map"].pop(old)}))


def _other_chat_template(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{{ messages }}")


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a bit of the backbone": (_flip("model-0*"), "altered since it was written"),
    "a bit of the head": (_flip("model-mtp*"), "altered since it was written"),
    "a missing shard": (_no_shard, "missing"),
    "an unfinished folder": (_unfinished, "unfinished"),
    "a manifest that was edited": (lambda f: support.edit_json(f / MANIFEST, lambda m: m.update(recipe="x")), MANIFEST),
    "a renamed tensor": (_renamed_tensor, "not expected by the config"),
    "another chat template": (_other_chat_template, "chat_template.jinja: altered"),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json"),
}


@pytest.mark.parametrize("what", DAMAGES)
def test_a_damaged_folder_is_refused_and_no_manifest_written(folders: Folders, what: str, tmp_path: Path) -> None:
    base = s.copied(folders["classic", "inline"], tmp_path / "base")
    damage, message = DAMAGES[what]
    damage(base)
    before = s.contents(base)
    support.assert_refused(support.run("relayout", base, tmp_path / "out", "--layout", "universal"), message)
    assert not (tmp_path / "out" / MANIFEST).exists()
    assert s.contents(base) == before


def test_an_official_checkpoint_is_refused(sources: dict[str, Path], tmp_path: Path) -> None:
    result = support.run("relayout", sources["classic"], tmp_path / "out", "--layout", "vlm")
    support.assert_refused(result, "not a converted folder", "quantize")
    assert not (tmp_path / "out").exists()


def test_a_layout_whose_hosts_load_no_such_head_is_refused(folders: Folders, tmp_path: Path) -> None:
    result = support.run("relayout", folders["dspark", "inline"], tmp_path / "out", "--layout", "universal")
    support.assert_refused(result, "dspark", "inline")


@pytest.mark.parametrize("place", ["base", "base/below", "."])
def test_folders_that_overlap_are_refused(folders: Folders, place: str, tmp_path: Path) -> None:
    base = s.copied(folders["classic", "inline"], tmp_path / "base")
    before = s.contents(tmp_path)
    result = support.run("relayout", base, tmp_path / place, "--layout", "vlm")
    support.assert_refused(result, "may not lie in each other")
    assert s.contents(tmp_path) == before


@pytest.mark.parametrize("words", [[], ["--layout", "nonsense"]])
def test_wrong_usage_is_exit_code_2(folders: Folders, words: list[str], tmp_path: Path) -> None:
    assert support.run("relayout", folders["classic", "inline"], tmp_path / "out", *words).code == 2


def test_a_folder_that_cannot_be_written_is_exit_code_4(folders: Folders, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = support.run("relayout", folders["classic", "inline"], tmp_path / "file" / "out", "--layout", "vlm")
    assert result.code in {3, 4} and "file" in result.err


# --- interruptions -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A head of about 30 MB, so that a run lasts long enough to be killed in its midst."""
    home = tmp_path_factory.mktemp("large")
    source = s.tiny(home / "source", layers=3, experts=40, hidden_size=1024, moe_intermediate_size=512, vocab_size=512)
    s.run(source, home / "mlx", max_shard_bytes=8_000_000)
    s.run(source, home / "wanted", layout="universal", max_shard_bytes=8_000_000)
    return home


def _killed(large: Path, out: Path, count: int, seed: int) -> None:
    dice, moments = random.Random(seed), []
    command = ["relayout", large / "mlx", out, "--layout", "universal", "-q"]
    calls = s.disk_calls(*command)
    shutil.rmtree(out)
    for _ in range(count):
        moments.append(dice.randint(1, calls))
        s.killed_at(moments[-1], *command)  # a run that goes on may have fewer calls, and come to its end
    s.cli(*command)
    assert s.contents(out) == s.contents(large / "wanted"), moments


@pytest.mark.slow
def test_killed_runs_are_resumed_to_the_same_bytes(large: Path, tmp_path: Path) -> None:
    _killed(large, tmp_path / "out", 3, 1)


@pytest.mark.nightly
@pytest.mark.parametrize("seed", range(10))
def test_killed_at_ten_moments_the_result_is_the_same(large: Path, seed: int, tmp_path: Path) -> None:
    _killed(large, tmp_path / "out", 2, seed)


def test_where_links_are_not_possible_files_are_copied(
    folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_link(*args: Any, **kwargs: Any) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("os.link", no_link)
    base, out = folders["classic", "inline"], tmp_path / "out"
    assert support.run("relayout", base, out, "--layout", "vlm").code == 0
    assert s.contents(out) == s.contents(folders["classic", "vlm"])
    assert not any(p.samefile(base / p.name) for p in out.glob("model-0*"))
    shutil.rmtree(out)
