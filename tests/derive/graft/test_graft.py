"""`graft`: the folder that a conversion with the head kept would have written, and the way back."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ds4convert.checkpoint.source import open_source
from ds4convert.derive import graft
from ds4convert.derive import in_place as inplace
from ds4convert.inference.single_file import single_file_source
from ds4convert.storage import strict_json
from tests import support
from tests import support_run as s

LAYOUTS = {"classic": ("inline", "mlx-lm", "mtplx", "universal", "vlm"), "dspark": ("inline", "mlx-lm", "vlm")}
MANIFEST, STATE, UNDO = "ds4convert_manifest.json", ".ds4convert", ".ds4convert_undo"
SHARD = ("--max-shard-size", "1MB")


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("sources")
    out = {kind: s.tiny(home / kind, layers=3, experts=4, head=kind) for kind in (*LAYOUTS, "none")}
    return out | {"mtp": head_alone(out["classic"], home / "mtp")}


def head_alone(source: Path, out: Path) -> Path:
    """Return a folder as `pull --only mtp` writes one: the head's tensors, the whole config."""
    head = {n: t for n, t in support.read_folder(source).items() if n.startswith("mtp.")}
    return support.write_folder(out, head, json.loads((source / "config.json").read_text()), 1)


@pytest.fixture(scope="module")
def base(sources: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A conversion of the classic source without its head. Read only."""
    out = tmp_path_factory.mktemp("base") / "mlx"
    s.run(sources["classic"], out, keep_mtp=False, max_shard_bytes=1_000_000)
    return out


@pytest.fixture(scope="module")
def whole(sources: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The conversion with the head kept. Read only."""
    out = tmp_path_factory.mktemp("whole") / "mlx"
    s.run(sources["classic"], out, max_shard_bytes=1_000_000)
    return out


def foreign(base: Path, out: Path) -> Path:
    """Return a folder as another program writes it: no manifest, no index, a config in its own words, a model card."""
    shutil.copytree(base, out)
    (out / MANIFEST).unlink()
    (out / support.INDEX).unlink()
    config = json.loads((out / "config.json").read_text())
    config |= {"transformers_version": "9.9", "eos_token_id": 1}
    del config["num_nextn_predict_layers"]
    (out / "config.json").write_text(json.dumps(dict(sorted(config.items())), indent=4))
    (out / "README.md").write_text("# a card\n")
    return out


# --- the result ----------------------------------------------------------------------------------------------------


@pytest.mark.sampled(2)
@pytest.mark.parametrize(("kind", "layout"), [(k, y) for k, known in LAYOUTS.items() for y in known])
def test_a_graft_is_the_full_conversion_file_for_file(
    sources: dict[str, Path], kind: str, layout: str, tmp_path: Path
) -> None:
    source = sources[kind]
    s.run(source, tmp_path / "base", layout=layout, keep_mtp=False, max_shard_bytes=1_000_000)
    s.run(source, tmp_path / "whole", layout=layout, max_shard_bytes=1_000_000)
    before, wanted = s.contents(tmp_path / "base"), s.contents(tmp_path / "whole")
    done = support.run("graft", tmp_path / "base", "--from", source, "--out", tmp_path / "out", *SHARD, "--json")
    assert done.code == 0, done.err
    assert s.contents(tmp_path / "out") == wanted and s.contents(tmp_path / "base") == before
    assert support.run("graft", tmp_path / "base", "--from", source, "--in-place", *SHARD).code == 0
    assert s.contents(tmp_path / "base") == wanted
    assert support.run("graft", "--remove", tmp_path / "base").code == 0
    assert s.contents(tmp_path / "base") == before


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("words", "head"),
    [
        (["--recipe", "bf16"], []),
        (["--no-hash"], []),
        (["--backbone", "affine-4-g32"], []),
        (["--backbone", "affine-4-g32"], ["--mtp", "affine-8-g32"]),
        (["--experts", "nvfp4"], ["--mtp", "bf16"]),
        ([], ["--mtp", "affine-6-g32", "--layout", "universal"]),
    ],
    ids=str,
)
def test_it_has_the_options_of_the_folder_and_its_own(
    sources: dict[str, Path], words: list[str], head: list[str], tmp_path: Path
) -> None:
    source = sources["classic"]
    assert support.run("quantize", source, tmp_path / "base", "--drop-mtp", *words).code == 0
    assert support.run("quantize", source, tmp_path / "whole", *words, *head).code == 0
    before, wanted = s.contents(tmp_path / "base"), s.contents(tmp_path / "whole")
    assert support.run("graft", tmp_path / "base", "--from", source, "--out", tmp_path / "out", *head).code == 0
    assert s.contents(tmp_path / "out") == wanted
    assert support.run("graft", tmp_path / "base", "--from", source, "--in-place", *head).code == 0
    grafted = {n: h for n, h in s.contents(tmp_path / "base").items() if not n.startswith(UNDO)}
    assert grafted == wanted
    assert support.run("graft", "--remove", tmp_path / "base").code == 0
    assert s.contents(tmp_path / "base") == before


def test_the_files_of_the_backbone_are_shared_and_verify_agrees(
    base: Path, sources: dict[str, Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    facts = json.loads(s.cli("graft", base, "--from", sources["classic"], "--out", out, "--json").stdout)
    assert facts["files_kept"] and all((out / n).samefile(base / n) for n in facts["files_kept"])
    assert facts["head"] == "classic" and "values of" in facts["checked"] and facts["warnings"] == []
    assert s.failed_checks(out, "--source", sources["classic"]) == []


def test_a_head_pulled_alone_gives_the_same_tensors_and_config(
    base: Path, whole: Path, sources: dict[str, Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    done = support.run("graft", base, "--from", sources["mtp"], "--out", out, *SHARD, "--json")
    assert done.code == 0 and "no backbone whose values could be compared" in done.json["checked"]
    ours, wanted = s.contents(out), s.contents(whole)
    assert set(ours) == set(wanted)
    assert [n for n in wanted if ours[n] != wanted[n]] == [MANIFEST]  # it names the pulled file as a source as well
    assert s.wrong(out) == []


def test_a_folder_of_another_program_gets_a_head_a_manifest_and_its_old_self_back(
    base: Path, whole: Path, sources: dict[str, Path], tmp_path: Path
) -> None:
    theirs = foreign(base, tmp_path / "theirs")
    before = s.contents(theirs)
    s.cli("graft", theirs, "--from", sources["classic"], "--out", tmp_path / "out", *SHARD)
    s.cli("graft", theirs, "--from", sources["classic"], "--in-place", *SHARD)
    for folder in (tmp_path / "out", theirs):
        assert s.wrong(folder) == []
        wanted = s.stored(whole)
        found = s.stored(folder)
        assert {n: t.raw().tobytes() for n, t in found.items()} == {n: t.raw().tobytes() for n, t in wanted.items()}
        record = json.loads((folder / MANIFEST).read_text())
        known = {r["name"]: r["xxh3_128"] for r in json.loads((whole / MANIFEST).read_text())["tensors"]}
        assert {r["name"]: r["xxh3_128"] for r in record["tensors"]} == known
        config = json.loads((folder / "config.json").read_text())
        assert config["transformers_version"] == "9.9" and config["num_nextn_predict_layers"] == 1
    s.cli("graft", "--remove", theirs)
    assert s.contents(theirs) == before


@pytest.mark.nightly
def test_another_layout_in_place_is_undone_too(base: Path, sources: dict[str, Path], tmp_path: Path) -> None:
    folder = s.copied(base, tmp_path / "mlx")
    for layout in ("universal", "mlx-lm", "vlm"):
        s.cli("graft", folder, "--from", sources["classic"], "--in-place", "--layout", layout)
        assert s.failed_checks(folder, "--source", sources["classic"]) == []
        s.cli("graft", "--remove", folder)
        assert s.contents(folder) == s.contents(base)


# --- refusals ------------------------------------------------------------------------------------------------------


def assert_untouched(folder: Path, before: dict[str, str], result: support.Result, *parts: str, code: int = 3) -> None:
    support.assert_refused(result, *parts, code=code)
    assert s.contents(folder) == before


@pytest.mark.parametrize("where", ["--in-place", "--out"])
def test_what_does_not_fit_is_refused_and_nothing_written(
    base: Path, whole: Path, sources: dict[str, Path], where: str, tmp_path: Path
) -> None:
    target = ["--in-place"] if where == "--in-place" else ["--out", tmp_path / "out"]
    narrow = s.tiny(tmp_path / "narrow", layers=3, experts=8)
    deep = s.tiny(tmp_path / "deep", layers=5, experts=4)
    torn = s.copied(sources["mtp"], tmp_path / "torn")
    support.edit_header(torn / "model-00001-of-00001.safetensors", lambda h: h.update(x=h.pop("mtp.0.hnorm.weight")))
    (torn / support.INDEX).unlink()
    cases: list[tuple[Path, Path, tuple[str, ...]]] = [
        (whole, sources["mtp"], ("has a classic head already", "--remove")),
        (base, sources["none"], ("no tensor under mtp.*",)),
        (base, narrow, ("n_routed_experts 4 here, 8 there",)),
        (base, deep, ("num_hidden_layers 3 here, 5 there",)),
        (base, torn, ("mtp.0.hnorm.weight: missing", "not whole")),
        (base, base, ("",)),
        (base, tmp_path / "nowhere", ("no such file or folder",)),
        (sources["classic"], sources["mtp"], ("not a converted folder",)),
    ]
    for folder, source, parts in cases:
        before = s.contents(folder)
        assert_untouched(folder, before, support.run("graft", folder, "--from", source, *target), *parts)
        assert not (tmp_path / "out").exists()


def test_a_head_that_the_layout_does_not_take_is_refused(sources: dict[str, Path], tmp_path: Path) -> None:
    s.run(sources["dspark"], tmp_path / "mlx", keep_mtp=False)
    before = s.contents(tmp_path / "mlx")
    words = ("graft", tmp_path / "mlx", "--from", sources["dspark"], "--in-place", "--layout", "mtplx")
    assert_untouched(tmp_path / "mlx", before, support.run(*words), "dspark", "inline")


def test_a_head_of_the_other_kind_is_refused(sources: dict[str, Path], tmp_path: Path) -> None:
    s.run(sources["dspark"], tmp_path / "mlx", keep_mtp=False)
    before = s.contents(tmp_path / "mlx")
    result = support.run("graft", tmp_path / "mlx", "--from", sources["classic"], "--in-place", "--force")
    assert_untouched(tmp_path / "mlx", before, result, "DSpark", "classic")


def retrained(source: Path, out: Path) -> Path:
    """Return a copy of a source whose last router has other values: a model of the same shape, trained otherwise."""
    shutil.copytree(source, out)
    tensor = s.stored(out)["layers.2.ffn.gate.weight"]
    s.flip(out / tensor.file, tensor.start + 1, 4)
    return out


def test_a_head_of_another_training_run_needs_force(base: Path, sources: dict[str, Path], tmp_path: Path) -> None:
    other = retrained(sources["classic"], tmp_path / "other")
    folder = s.copied(base, tmp_path / "mlx")
    words = ("graft", folder, "--from", other, "--in-place")
    assert_untouched(folder, s.contents(base), support.run(*words), "model.layers.2.ffn.gate.weight", "--force")
    forced = support.run(*words, "--force", "--json")
    assert forced.code == 0 and "another training run" in forced.json["warnings"][0]
    assert s.wrong(folder) == []


@pytest.mark.parametrize(
    "words",
    [
        [], ["--from", "SRC"], ["--from", "SRC", "--in-place", "--out", "x"], ["--out", "x"], ["--remove", "--out", "x"],
        ["--from", "SRC", "--in-place", "--mtp", "q17"], ["--from", "SRC", "--in-place", "--layout", "x"],
        ["--remove", "--from", "SRC"], ["--from", "SRC", "--out", "x", "--max-shard-size", "10"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_wrong_usage_is_exit_code_2(base: Path, sources: dict[str, Path], words: list[str]) -> None:
    before = s.contents(base)
    result = support.run("graft", base, *[str(sources["classic"]) if w == "SRC" else w for w in words])
    assert result.code == 2 and s.contents(base) == before


def test_folders_that_overlap_are_refused(base: Path, sources: dict[str, Path], tmp_path: Path) -> None:
    source = s.copied(sources["classic"], tmp_path / "source")
    folder = s.copied(base, tmp_path / "mlx")
    for out in (source / "out", source, folder, folder / "out", tmp_path):
        before = s.contents(tmp_path)
        assert_untouched(tmp_path, before, support.run("graft", folder, "--from", source, "--out", out), "lie in each")


def test_there_is_no_head_to_remove(base: Path, tmp_path: Path) -> None:
    """No error: a run that was killed when it had just removed the head leaves this very folder, and is run again."""
    folder = s.copied(base, tmp_path / "mlx")
    result = support.run("graft", "--remove", folder)
    assert result.code == 0 and "has no head" in result.out
    assert s.contents(folder) == s.contents(base)


@pytest.mark.parametrize("kind", ["ours", "theirs"])
def test_the_same_graft_again_finds_its_head_there(
    base: Path, sources: dict[str, Path], kind: str, tmp_path: Path
) -> None:
    folder = s.copied(base, tmp_path / "mlx") if kind == "ours" else foreign(base, tmp_path / "mlx")
    words = ("graft", folder, "--from", sources["classic"], "--in-place")
    assert support.run(*words).code == 0
    done = s.contents(folder)
    again = support.run(*words, "--json")
    assert again.code == 0 and again.json["already_done"] and s.contents(folder) == done
    for other in (["--layout", "universal"], ["--mtp", "affine-8-g64"]):
        assert_untouched(folder, done, support.run(*words, *other), "head already")


def test_a_head_that_another_program_stored_is_not_removed(whole: Path, tmp_path: Path) -> None:
    folder = s.copied(whole, tmp_path / "mlx")
    (folder / MANIFEST).unlink()
    before = s.contents(folder)
    assert_untouched(folder, before, support.run("graft", "--remove", folder), "not written by ds4convert")


@pytest.mark.parametrize("name", ["../victim", "/etc/victim", ".ds4convert/lock", ""])
@pytest.mark.parametrize("key", ["place", "remove"])
def test_a_forged_commit_moves_and_removes_nothing_outside(base: Path, key: str, name: str, tmp_path: Path) -> None:
    folder = s.copied(base, tmp_path / "mlx")
    (tmp_path / "victim").write_text("mine")
    (folder / STATE / "new").mkdir(parents=True)
    table = {"kind": "graft", "place": [], "remove": []} | {key: [name]}
    (folder / STATE / "commit.json").write_text(json.dumps(table))
    support.assert_refused(support.run("graft", "--remove", folder), "no name of a file in the folder")
    assert (tmp_path / "victim").read_text() == "mine"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"place": 3}, "place: expected a list, found 3"),
        ({"remove": ["x", None]}, "remove[1]: expected a text, found null"),
    ],
)
def test_a_damaged_commit_is_refused_by_its_field(base: Path, change: dict, words: str, tmp_path: Path) -> None:  # type: ignore[type-arg]
    folder = s.copied(base, tmp_path / "mlx")
    (folder / STATE / "new").mkdir(parents=True)
    table = {"kind": "graft", "place": [], "remove": []} | change
    (folder / STATE / "commit.json").write_text(json.dumps(table))
    support.assert_refused(support.run("graft", "--remove", folder), words)


@pytest.mark.parametrize("link", [STATE, UNDO, "mtp"])
def test_links_in_the_folder_lead_nothing_out_of_it(
    base: Path, sources: dict[str, Path], link: str, tmp_path: Path
) -> None:
    folder = foreign(base, tmp_path / "mlx")
    outside = tmp_path / "outside"
    outside.mkdir()
    (folder / link).symlink_to(outside)
    words = ("graft", folder, "--from", sources["classic"], "--in-place", "--layout", "universal", "-q")
    support.assert_refused(support.run(*words), "is a link")
    assert not [*outside.iterdir()]


def forged(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the manifest, and its digest, as one would who knows how."""
    table = json.loads((folder / MANIFEST).read_text())
    del table["digest"]
    change(table)
    (folder / MANIFEST).write_bytes(strict_json.pretty(table | {"digest": strict_json.digest(table)}))


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m["files"].append({"name": "../mlx/notes.txt", "sha256": "0"}),
        lambda m: m["files"].append({"name": "/etc/passwd", "sha256": "0", "bytes": 1}),
        lambda m: m["files"].append({"name": "README.md", "sha256": 5}),
        lambda m: m["tensors"][0].update(transform=["copy"]),
        lambda m: m["tensors"][0].update(params={"rows": []}),
        lambda m: m["tensors"][0].update(xxh3_128=7),
        lambda m: m["tensors"][0].update(source_dtype=None),
        lambda m: m["tensors"][0].update(error={"relative_square": "much"}),
        lambda m: m["left_out"].append({"tensor": "x", "why": 1}),
        lambda m: m.update(files_left_out="none"),
        lambda m: m["source"]["files"][0].update(bytes="many"),
    ],
)
@pytest.mark.parametrize("command", ["relayout", "graft"])
def test_a_forged_manifest_is_refused_and_writes_nothing_elsewhere(
    base: Path, sources: dict[str, Path], change: Callable[[dict[str, Any]], Any], command: str, tmp_path: Path
) -> None:
    folder = s.copied(base, tmp_path / "mlx")
    (folder / "notes.txt").write_text("mine")
    forged(folder, change)
    before = s.contents(tmp_path)
    rest = {"relayout": ["--layout", "vlm"], "graft": ["--from", sources["classic"], "--out"]}[command]
    words = [folder, *rest, tmp_path / "out"] if command == "graft" else [folder, tmp_path / "out", *rest]
    assert_untouched(tmp_path, before, support.run(command, *words, "-q"), MANIFEST)


def test_an_altered_undo_record_is_refused(base: Path, sources: dict[str, Path], tmp_path: Path) -> None:
    folder = foreign(base, tmp_path / "mlx")
    s.cli("graft", folder, "--from", sources["classic"], "--in-place")
    s.flip(folder / UNDO / "files" / "config.json", 3)
    before = s.contents(folder)
    assert_untouched(folder, before, support.run("graft", "--remove", folder), "config.json: altered")


# --- interruptions -------------------------------------------------------------------------------------------------


class Died(BaseException):
    """The end of the process, as far as the disk can tell."""


def in_place(folder: Path, source: Path, disk: Any = None) -> None:
    """Graft in this process, as the command does it."""
    if inplace.recover(folder, disk) == inplace.GRAFTED:
        return
    planned = graft.plan(folder, open_source(source), graft.Request(), b"")
    inplace.graft(planned, 1, disk=disk)


def remove(folder: Path, disk: Any = None) -> None:
    if inplace.recover(folder, disk) != inplace.REMOVED:
        inplace.remove(folder, single_file_source().encode(), disk)


def without_state(folder: Path) -> dict[str, str]:
    return {n: h for n, h in s.contents(folder).items() if not n.startswith(STATE + "/")}


@pytest.mark.parametrize("kind", ["ours", "theirs"])
@pytest.mark.parametrize(
    "most", [pytest.param(12, id="some"), pytest.param(10**6, id="all", marks=pytest.mark.nightly)]
)
def test_wherever_it_ends_the_folder_is_the_old_one_or_unfinished_and_goes_on(
    base: Path, sources: dict[str, Path], kind: str, most: int, tmp_path: Path
) -> None:
    source = sources["mtp"]
    start = base if kind == "ours" else foreign(base, tmp_path / "start")
    old = s.contents(start)
    counted = s.FailingDisk(10**9, Died)
    done = s.copied(start, tmp_path / "done")
    in_place(done, source, counted)
    new = s.contents(done)
    back = s.FailingDisk(10**9, Died)
    remove(done, back)
    assert s.contents(done) == old
    folder = tmp_path / "mlx"
    for n in s.sampled(counted.calls, most):
        s.copied(start, folder)
        with pytest.raises(Died):
            in_place(folder, source, s.FailingDisk(n, Died))
        assert without_state(folder) in (old, new) or "finished" in s.wrong(folder), n
        if without_state(folder) == old and (folder / STATE).exists() and n % 2:
            remove_or_nothing(folder, old)
        in_place(folder, source) if without_state(folder) != new else None
        assert without_state(folder) == new, n
    for n in s.sampled(back.calls, most):
        s.copied(folder, done)
        shutil.rmtree(done / STATE, ignore_errors=True)
        with pytest.raises(Died):
            remove(done, s.FailingDisk(n, Died))
        assert without_state(done) in (old, new) or "finished" in s.wrong(done), n
        if without_state(done) != old:
            remove(done)
        assert without_state(done) == old, n


def remove_or_nothing(folder: Path, old: dict[str, str]) -> None:
    """Call off what was begun: the folder has to be the old one, without anything left."""
    result = support.run("graft", "--remove", folder)
    if result.code == 0:
        assert s.contents(folder) == old


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A head of about 30 MB, so that a run lasts long enough to be killed in its midst."""
    home = tmp_path_factory.mktemp("large")
    source = s.tiny(home / "source", layers=3, experts=40, hidden_size=1024, moe_intermediate_size=512, vocab_size=512)
    s.run(source, home / "mlx", keep_mtp=False)
    s.run(source, home / "wanted")
    return home


def killed(command: list[str | Path], start: Callable[[], object], seed: int, count: int) -> list[int]:
    """Run a command that is killed `count` times, each time at some call to the disk, then to its end."""
    dice, moments = random.Random(seed), []
    start()
    calls = s.disk_calls(*command)
    start()
    for _ in range(count):
        moments.append(dice.randint(1, calls))
        s.killed_at(moments[-1], *command)
    s.cli(*command)
    return moments


@pytest.mark.parametrize(
    ("seed", "count"), [pytest.param(0, 2, marks=pytest.mark.slow), *(pytest.param(n, 2, marks=pytest.mark.nightly) for n in range(1, 10))]
)  # fmt: skip
def test_killed_runs_are_resumed_to_the_same_bytes(large: Path, seed: int, count: int, tmp_path: Path) -> None:
    out, folder = tmp_path / "out", tmp_path / "mlx"
    command = ["graft", large / "mlx", "--from", large / "source", "--out", out, "-q"]
    moments = killed(command, lambda: shutil.rmtree(out, ignore_errors=True), seed, count)
    assert s.contents(out) == s.contents(large / "wanted"), moments
    command = ["graft", folder, "--from", large / "source", "--in-place", "-q"]
    moments = killed(command, lambda: s.copied(large / "mlx", folder), seed, count)
    assert s.contents(folder) == s.contents(large / "wanted"), moments
    moments = killed(["graft", "--remove", folder, "-q"], lambda: s.copied(large / "wanted", folder), seed, count)
    assert s.contents(folder) == s.contents(large / "mlx"), moments


def test_a_full_disk_is_exit_code_4_and_leaves_the_folder_as_it_was(
    base: Path, sources: dict[str, Path], tmp_path: Path
) -> None:
    from ds4convert.errors import EnvironmentFault

    folder = s.copied(base, tmp_path / "mlx")
    full = s.FailingDisk(12, lambda: OSError(28, "No space left on device"))
    with pytest.raises(EnvironmentFault, match="disk is full"):
        in_place(folder, sources["classic"], full)
    assert without_state(folder) == s.contents(base)
    in_place(folder, sources["classic"])
    assert s.wrong(folder) == []
