"""`--overwrite` removes a conversion of ours and nothing else: whatever else an output folder may be stays, byte for byte.

Arguments get swapped, and a folder that cannot be written to today is one that took years to fill.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ds4convert.errors import OutputError
from ds4convert.execution import run
from ds4convert.storage import strict_json
from tests import support
from tests import support_run as s

MANIFEST, STATE = "ds4convert_manifest.json", ".ds4convert"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = s.tiny(tmp_path_factory.mktemp("foreign") / "source", layers=1, experts=2)
    (out / "tokenizer.json").write_text("{}")
    return out


@pytest.fixture(scope="module")
def converted(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("converted") / "mlx"
    s.run(source, out, keep_mtp=False)
    return out


@pytest.fixture(scope="module")
def whole(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "mlx"
    s.run(source, out)
    return out


def files(out: Path, **contents: str | bytes) -> Path:
    """Write files; `__` in a name is a slash, and `_dot_` a dot."""
    for name, data in contents.items():
        path = out / name.replace("__", "/").replace("_dot_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data.encode() if isinstance(data, str) else data)
    return out


def official(out: Path, source: Path, converted: Path) -> None:
    """Another official checkpoint: the names of its files are those that a conversion writes."""
    shutil.copytree(source, out)
    files(out, LICENSE="MIT", mtp__keep_dot_txt="mine")


def photos(out: Path, source: Path, converted: Path) -> None:
    files(out, IMG_0001_dot_jpg=b"\xff\xd8", **{"2019__IMG_0002_dot_jpg": b"\xff\xd8"})


def repository(out: Path, source: Path, converted: Path) -> None:
    files(out, _dot_git__config="[core]", LICENSE="GPL", config_dot_json="{}", src__main_dot_py="pass")


def home(out: Path, source: Path, converted: Path) -> None:
    files(out, _dot_ssh__id="key", _dot_bashrc="", Documents__thesis_dot_txt="years of work", LICENSE="")


def other_program(out: Path, source: Path, converted: Path) -> None:
    """As mlx-lm writes it: an index, shards, no manifest."""
    shutil.copytree(converted, out)
    (out / MANIFEST).unlink()


def copied_manifest(out: Path, source: Path, converted: Path) -> None:
    """Other shards beside our manifest: programs copy every JSON file that they find."""
    official(out, source, converted)
    shutil.copy(converted / MANIFEST, out)
    for path in sorted(out.glob("model-*.safetensors")):
        path.rename(out / path.name.replace("-of-00003", "-of-00001"))


def forged(*names: str) -> Callable[[Path, Path, Path], None]:
    def make(out: Path, source: Path, converted: Path) -> None:
        files(out, thesis_dot_txt="years of work", config_dot_json="{}")
        files(out.parent, precious="mine")
        table = json.loads((converted / MANIFEST).read_text())
        table.pop("digest")
        table["files"] += [{"name": n, "sha256": None} for n in names]
        table |= {"digest": strict_json.digest(table)}
        (out / MANIFEST).write_bytes(strict_json.pretty(table))

    return make


def forged_state(out: Path, source: Path, converted: Path) -> None:
    """A plan in the state folder that calls a stranger's files ours."""
    official(out, source, converted)
    names = {p.name: [1, "0" * 64, None] for p in out.glob("*.safetensors")} | {"../precious": [None, None, None]}
    (out / STATE).mkdir()
    (out / STATE / "plan.json").write_text(json.dumps({"plan": "x", "names": names}))


def old_state(out: Path, source: Path, converted: Path) -> None:
    """A state folder that names no files, and one whose plan is no JSON."""
    official(out, source, converted)
    (out / STATE).mkdir()
    (out / STATE / "plan.json").write_text('{"plan": "x"')


def unfinished_pull(out: Path, source: Path, converted: Path) -> None:
    official(out, source, converted)
    files(out, _dot_ds4convert__pull_dot_json="{}")


def added_shard(out: Path, source: Path, converted: Path) -> None:
    """A conversion of ours, and a file in it that every host would load: it is not ours, and may not stay."""
    shutil.copytree(converted, out)
    files(out, **{"model-extra_dot_safetensors": b"mine"})


def other_case(out: Path, source: Path, converted: Path) -> None:
    """On APFS and exFAT this is the file that a conversion writes."""
    shutil.copytree(converted, out)
    files(out, **{"Chat_Template_dot_Jinja": "mine"})


def replaced_shard(out: Path, source: Path, converted: Path) -> None:
    shutil.copytree(converted, out)
    path = next(out.glob("model-*.safetensors"))
    support.write_file(path, {"mine": support.Tensor("U8", (4,), b"mine")})


def edited_config(out: Path, source: Path, converted: Path) -> None:
    shutil.copytree(converted, out)
    support.edit_json(out / "config.json", lambda c: c.update(rope_theta=1))


def linked_shard(out: Path, source: Path, converted: Path) -> None:
    shutil.copytree(converted, out)
    path = next(out.glob("model-*.safetensors"))
    path.rename(out.parent / "elsewhere")
    path.symlink_to(out.parent / "elsewhere")


def linked_state(out: Path, source: Path, converted: Path) -> None:
    shutil.copytree(converted, out)
    files(out.parent / "other", plan_dot_json="{}")
    (out / STATE).symlink_to(out.parent / "other")


def altered_manifest(out: Path, source: Path, converted: Path) -> None:
    shutil.copytree(converted, out)
    s.flip(out / MANIFEST, 300)


FOREIGN = {
    f.__name__: f
    for f in (official, photos, repository, home, other_program, copied_manifest, forged_state, old_state,
              unfinished_pull, added_shard, other_case, replaced_shard, edited_config, linked_shard, linked_state, altered_manifest)
} | {
    "forged: above": forged("../precious"),
    "forged: others": forged("thesis.txt"),
    "forged: hidden": forged(".ssh/id", "mtp/../../precious"),
}  # fmt: skip


def commands(source: Path, converted: Path, whole: Path) -> dict[str, list[Any]]:
    return {
        "quantize": ["quantize", source],
        "graft": ["graft", converted, "--from", source, "--out"],
        "relayout": ["relayout", whole, "--layout", "mtplx"],
        "from-mlx": ["quantize", whole, "--from-mlx", "--recipe", "q4"],
    }


@pytest.mark.sampled(3)
@pytest.mark.parametrize("kind", FOREIGN)
def test_what_ds4convert_did_not_write_is_refused_and_stays(
    source: Path, converted: Path, whole: Path, kind: str, tmp_path: Path
) -> None:
    out = tmp_path / "place" / "out"
    FOREIGN[kind](out, source, converted)
    before = s.contents(tmp_path)
    for name, words in commands(source, converted, whole).items():
        for more in ([], ["--overwrite"]):
            result = support.run(*words, out, *more)
            assert result.code == 3, (name, more, result.err)
            if more:
                assert "ds4convert did not write" in result.err or "is a link" in result.err, (name, result.err)
            else:
                assert "--overwrite" not in result.err, (name, result.err)
            assert s.contents(tmp_path) == before, (name, more)


@pytest.mark.parametrize("more", [[], ["--overwrite"]])
def test_swapped_and_overlapping_arguments_change_nothing(
    source: Path, converted: Path, more: list[str], tmp_path: Path
) -> None:
    home_ = tmp_path / "home"
    ours, theirs = s.copied(converted, home_ / "mlx"), s.copied(source, home_ / "official")
    before = s.contents(tmp_path)
    for words in (
        ["quantize", ours, theirs],  # the two the wrong way round
        ["quantize", theirs, theirs],
        ["quantize", theirs, home_],
        ["quantize", theirs, theirs / "out"],
        ["quantize", theirs, home_ / "mlx" / ".." / "official"],
        ["graft", ours, "--from", theirs, "--out", theirs],
        ["graft", ours, "--from", theirs, "--out", home_],
        ["graft", theirs, "--from", ours, "--out", tmp_path / "new"],
        ["relayout", ours, "--layout", "mlx-lm", theirs],
        ["relayout", ours, "--layout", "mlx-lm", ours],
        ["relayout", theirs, "--layout", "mlx-lm", ours],
    ):
        result = support.run(*words, *more)
        assert result.code == 3, (words, result.err)
        assert s.contents(tmp_path) == before, words


def test_a_folder_under_another_name_of_the_source_is_the_source(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """APFS and exFAT take `Source` and `source` for one folder; realpath does not say so."""
    (tmp_path / "source").mkdir()
    (tmp_path / "Source").mkdir()
    real, one = Path.stat, (tmp_path / "source").stat()
    monkeypatch.setattr(Path, "stat", lambda p, **k: one if p.name == "Source" else real(p, **k))
    for out in ("Source", "Source/out"):
        with pytest.raises(OutputError, match="lie in each other"):
            run.check_places(tmp_path / "source", tmp_path / out)
    run.check_places(tmp_path / "source", tmp_path / "elsewhere")


def test_a_conversion_of_ours_is_replaced_and_the_users_files_beside_it_stay(
    source: Path, converted: Path, whole: Path, tmp_path: Path
) -> None:
    kept = {"README.md": "mine", "notes.txt": "mine", ".hidden": "mine", "adapters.safetensors": "mine", "8bit/x": "y"}
    for name, words in commands(source, converted, whole).items():
        out, plain = tmp_path / name, tmp_path / f"{name}-plain"
        assert support.run("quantize", source, out, "--layout", "universal", "--max-shard-size", "1MB").code == 0
        for file, text in kept.items():
            (out / file).parent.mkdir(exist_ok=True)
            (out / file).write_text(text)
        refused = support.run(*words, out)
        assert refused.code == 3 and "--overwrite" in refused.err
        assert support.run(*words, out, "--overwrite").code == 0
        assert support.run(*words, plain).code == 0
        found = s.contents(out)
        for file, text in kept.items():
            assert (out / file).read_text() == text
            found.pop(file)
        found.pop("8bit/")
        assert found == s.contents(plain), name


class Died(BaseException):
    pass


def test_an_unfinished_run_of_other_settings_is_replaced_by_what_its_plan_names(source: Path, tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    s.run(source, plain)
    counter = s.FailingDisk(1 << 60, Died)
    s.run(source, tmp_path / "count", disk=counter, layout="universal", max_shard_bytes=500_000, jobs=1)
    for n in s.sampled(counter.calls, 12):
        out = tmp_path / str(n)
        with pytest.raises(Died):
            s.run(source, out, disk=s.FailingDisk(n, Died), layout="universal", max_shard_bytes=500_000, jobs=1)
        if not out.exists():
            continue
        (out / "notes.txt").write_text("mine")
        begun = (out / STATE / "plan.json").exists() or (out / MANIFEST).exists()
        if not begun:
            before = s.contents(out)
            with pytest.raises(OutputError):
                s.run(source, out, overwrite=True)
            assert s.contents(out) == before, n
            continue
        s.run(source, out, overwrite=True)
        found = s.contents(out)
        assert found.pop("notes.txt") and found == s.contents(plain), n


def test_a_clearing_that_dies_at_any_call_is_finished_by_the_same_command(source: Path, tmp_path: Path) -> None:
    plain, start = tmp_path / "plain", tmp_path / "start"
    s.run(source, plain)
    s.run(source, start, layout="universal", max_shard_bytes=500_000)
    (start / "notes.txt").write_text("mine")
    for n in range(1, 60):
        out = s.copied(start, tmp_path / "out")
        with pytest.raises(Died):
            s.run(source, out, disk=s.FailingDisk(n, Died), overwrite=True, jobs=1)
        s.run(source, out, overwrite=True)
        found = s.contents(out)
        assert found.pop("notes.txt") and found == s.contents(plain), n


def test_the_other_commands_that_write_files_replace_none(source: Path, tmp_path: Path) -> None:
    full = files(tmp_path / "full", thesis_dot_txt="years of work")
    page = files(tmp_path / "page", report_dot_html="mine")
    before = s.contents(tmp_path)
    for words in (
        ["synth", full, "--config", "tiny"],
        ["synth", source, "--config", "tiny"],
        ["demo", full],
        ["demo", page],
        ["calibrate", source, full / "thesis.txt", full / "thesis.txt"],
        ["calibrate", source, full / "thesis.txt", source / "config.json"],
        ["verify", source, "--report", source / "config.json", "--level", "decode"],
        ["verify", source, "--report", full, "--level", "decode"],
    ):
        assert support.run(*words).code == 3, words
        assert s.contents(tmp_path) == before, words


def test_what_macos_leaves_in_an_empty_folder_does_not_make_it_full(source: Path, tmp_path: Path) -> None:
    out = files(tmp_path / "out", _dot_DS_Store="x", _dot_Spotlight_V100__store="x")
    assert support.run("quantize", source, out).code == 0
    assert (out / ".DS_Store").read_text() == "x"
