"""Files that change under a run, and finished files that are not what the journal says: nothing wrong looks whole."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ds4convert.checkpoint.source import open_source
from ds4convert.errors import EnvironmentFault, HeaderError, InputError
from ds4convert.execution import run
from ds4convert.files import Disk
from ds4convert.planning import build
from ds4convert.planning.build import make_plan
from ds4convert.planning.layouts import layout_of
from ds4convert.planning.recipes import recipe_of
from ds4convert.storage import local_files
from ds4convert.storage.local_files import LocalFiles, SourceChanged
from tests import support
from tests import support_run as s
from tests.support import nightly

MANIFEST, STATE = "ds4convert_manifest.json", ".ds4convert"
SHARD = 300_000


class Died(BaseException):
    """The end of the process, as far as the disk can tell."""


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = s.tiny(tmp_path_factory.mktemp("changes") / "source", layers=2, experts=2)
    (out / "tokenizer.json").write_text("{}")
    return out


@pytest.fixture
def source(original: Path, tmp_path: Path) -> Path:
    return s.copied(original, tmp_path / "source")


def other_bytes(path: Path) -> None:
    """Give a shard other values under the same header."""
    t = next(t for t in s.stored(path.parent).values() if t.file == path.name and t.dtype in {"I8", "BF16"})
    s.flip(path, t.start, 0)


def in_place(path: Path) -> None:
    before = path.stat().st_mtime_ns
    other_bytes(path)
    os.utime(path, ns=(before + 10**6, before + 10**6))


def longer(path: Path) -> None:
    with path.open("ab") as f:
        f.write(b"x")


def replaced(path: Path) -> None:
    """By a file of the same size and time: what a copy that keeps times leaves."""
    status, new = path.stat(), path.with_name("new")
    shutil.copy(path, new)
    path.unlink()
    new.rename(path)
    other_bytes(path)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def removed(path: Path) -> None:
    path.unlink()


class Meanwhile(Disk):
    """Does something once, when the n-th piece of a file has been written."""

    def __init__(self, n: int, act: Callable[[], None]) -> None:
        super().__init__()
        self.n, self.act = n, act

    def write_at(self, fd: int, data: bytes | bytearray | memoryview, offset: int) -> None:
        super().write_at(fd, data, offset)
        self.n -= 1
        if self.n == 0:
            self.act()


def first_shard(source: Path) -> Path:
    """Return the shard that the first file of the result is made of."""
    made = make_plan(open_source(source), options())
    return source / made.sources[made.steps[0].operands[0][0].file].name


def options(**more: Any) -> build.Options:
    return build.Options(recipe_of("native"), layout_of("inline"), max_shard_bytes=SHARD, **more)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("change", [in_place, longer, replaced, removed], ids=lambda f: f.__name__)
@pytest.mark.parametrize("hashing", [True, False])
@pytest.mark.parametrize("most", [local_files.MOST_OPEN, 1])
def test_a_source_that_changes_during_a_run_stops_it_and_is_named(
    source: Path, tmp_path: Path, change: Any, hashing: bool, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local_files, "MOST_OPEN", most)
    out, shard = tmp_path / "mlx", first_shard(source)
    words = {"hashing": hashing, "max_shard_bytes": SHARD}
    if change is replaced and most == 1:
        pytest.skip("a file that is not open cannot be told from another of its size and time")
    monkeypatch.setattr("ds4convert.execution.file_writer.BATCH_BYTES", 1)
    with pytest.raises((SourceChanged, HeaderError), match=shard.name) as caught:
        s.run(source, out, disk=Meanwhile(4, lambda: change(shard)), jobs=1, **words)
    assert "same command" in str(caught.value) or "missing" in str(caught.value)
    assert not (out / MANIFEST).exists()
    if change is in_place or change is replaced:
        s.run(source, out, **words)
        s.run(source, tmp_path / "unbroken", **words)
        assert s.contents(out) == s.contents(tmp_path / "unbroken")


def test_a_source_that_changed_between_the_plan_and_the_run_is_refused(source: Path, tmp_path: Path) -> None:
    opened = open_source(source)
    made = make_plan(opened, options())
    path = source / made.sources[0].name
    size = path.stat().st_size
    support.edit_header(path, lambda h: h.update(__metadata__={"x": "y"}))
    path.write_bytes(path.read_bytes()[:size].ljust(size, b" "))
    with pytest.raises(HeaderError, match=path.name):
        run.run(opened, made, tmp_path / "mlx")
    assert not (tmp_path / "mlx" / MANIFEST).exists()


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_a_small_file_that_changes_during_a_run_stops_it(source: Path, name: str, tmp_path: Path) -> None:
    act = lambda: (source / name).write_text('{"x": 1}')  # noqa: E731
    with pytest.raises(SourceChanged, match=name):
        s.run(source, tmp_path / "mlx", disk=Meanwhile(4, act), jobs=1)
    assert not (tmp_path / "mlx" / MANIFEST).exists()


def test_a_folder_that_changes_while_another_is_derived_from_it_stops_that(source: Path, tmp_path: Path) -> None:
    """A copied file is read twice, to check it and to copy it; both times it has to be the same one."""
    base, out = tmp_path / "base", tmp_path / "out"
    s.run(source, base)
    kept = next(base.glob("model-0*.safetensors"))
    real = Disk.link_or_copy

    def copied(disk: Disk, one: Path, target: Path) -> None:
        if one.name == kept.name:
            in_place(one)
        real(disk, one, target)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Disk, "link_or_copy", copied)
        result = support.run("relayout", base, out, "--layout", "universal")
    assert result.code == 4 and kept.name in result.err and not (out / MANIFEST).exists()
    result = support.run("relayout", base, out, "--layout", "universal")
    assert result.code == 3 and "altered since it was written" in result.err  # it is damaged, and said so


def test_a_head_shard_that_changes_during_a_graft_stops_it(source: Path, tmp_path: Path) -> None:
    base, out = tmp_path / "base", tmp_path / "out"
    s.run(source, base, keep_mtp=False)
    shard = source / next(t.file for n, t in s.stored(source).items() if n.startswith("mtp."))
    real, done = Disk.write_at, []

    def written(disk: Disk, fd: int, data: Any, offset: int) -> None:
        real(disk, fd, data, offset)
        if offset > 0 and not done:
            done.append(in_place(shard))

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Disk, "write_at", written)
        result = support.run("graft", base, "--from", source, "--out", out)
    assert done and result.code == 4 and shard.name in result.err and not (out / MANIFEST).exists()
    assert support.run("graft", base, "--from", source, "--out", out).code == 0
    s.run(source, tmp_path / "whole")
    assert s.contents(out) == s.contents(tmp_path / "whole")


def test_few_files_stay_open_and_each_is_read_rightly(tmp_path: Path) -> None:
    for n in range(40):
        (tmp_path / str(n)).write_bytes(bytes([n]) * 8)
    files = LocalFiles({str(n): (tmp_path, str(n)) for n in range(40)}, most=3)
    before = len(list(Path("/proc/self/fd").iterdir())) if Path("/proc/self/fd").exists() else 0
    for n in (*range(40), *range(39, -1, -1)):
        with files.fileno(str(n)) as fd, files.fileno(str((n + 1) % 40)) as other:
            assert os.pread(fd, 8, 0) == bytes([n]) * 8 and os.pread(other, 1, 0) == bytes([(n + 1) % 40])
    if before:
        assert len(list(Path("/proc/self/fd").iterdir())) <= before + 3
    files.close()


def test_a_time_that_a_drive_rounds_later_is_no_change(source: Path, tmp_path: Path) -> None:
    """A shard that was just copied to an SMB or FAT drive: the exact time becomes the rounded one while it is read."""
    shard, exact = first_shard(source), 1_700_000_001_123_456_789
    os.utime(shard, ns=(exact, exact))
    rounded = [exact // g * g for g in (100, 1000, 10**6, 10**7, 10**9)] + [1_700_000_002 * 10**9]
    for n, time in enumerate(rounded):
        os.utime(shard, ns=(exact, exact))
        act = lambda time=time: os.utime(shard, ns=(time, time))  # noqa: E731
        s.run(source, tmp_path / str(n), disk=Meanwhile(4, act), jobs=1)
    for time in (exact + 1, exact - 10**6, exact + 3 * 10**9):
        os.utime(shard, ns=(exact, exact))
        act = lambda time=time: os.utime(shard, ns=(time, time))  # noqa: E731
        with pytest.raises(SourceChanged):
            s.run(source, tmp_path / "changed", disk=Meanwhile(4, act), jobs=1)


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE])
def test_a_source_that_cannot_be_read_any_more_is_named(
    source: Path, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A drive that was pulled out, a network that went: the file is named, and what is finished stays."""
    shard, out = first_shard(source), tmp_path / "mlx"
    real, reads = os.preadv, []

    def failing(fd: int, buffers: Any, offset: int) -> int:
        reads.append(fd)
        if len(reads) > 3 and os.fstat(fd).st_ino == shard.stat().st_ino:
            raise OSError(code, os.strerror(code))
        return real(fd, buffers, offset)

    with monkeypatch.context() as patched:
        patched.setattr(os, "preadv", failing)
        result = support.run("quantize", source, out, "--jobs", "1")
    assert result.code == 4 and shard.name in result.err and "same command" in result.err
    assert support.run("quantize", source, out).code == 0
    with monkeypatch.context() as patched:
        patched.setattr(os, "pread", lambda *a: (_ for _ in ()).throw(OSError(code, os.strerror(code))))
        result = support.run("verify", out, "--source", source)
    assert result.code == 4 and ".safetensors" in result.err, result.err


# --- what an earlier run finished ------------------------------------------------------------------------------


class DiesAtTheSmallFiles(Disk):
    """Ends the run when all files of tensors are finished."""

    def write_file(self, path: Path, data: bytes, writer: str = "") -> None:
        if path.parent.name != STATE:
            raise Died
        super().write_file(path, data, writer)


@pytest.fixture(params=[True, False], ids=["hash", "no-hash"])
def words(request: pytest.FixtureRequest) -> dict[str, Any]:
    return {"hashing": request.param, "max_shard_bytes": SHARD}


@pytest.fixture
def finished(original: Path, words: dict[str, Any], tmp_path: Path) -> Path:
    """Return a folder in which all files of tensors are finished, and nothing else."""
    with pytest.raises(Died):
        s.run(original, tmp_path / "mlx", disk=DiesAtTheSmallFiles(), recipe="q4", **words)
    return tmp_path / "mlx"


@pytest.fixture
def wanted(original: Path, words: dict[str, Any], tmp_path: Path) -> dict[str, str]:
    s.run(original, tmp_path / "unbroken", recipe="q4", **words)
    return s.contents(tmp_path / "unbroken")


@pytest.mark.sampled(2)
@pytest.mark.parametrize("at", ["header", "first", "middle", "last"])
def test_a_finished_file_with_a_flipped_bit_is_made_again(
    original: Path, finished: Path, words: dict[str, Any], wanted: dict[str, str], at: str
) -> None:
    if not words["hashing"] and at != "header":
        pytest.skip("digests are what --no-hash gives up")
    for path in finished.glob("*.safetensors"):
        size = path.stat().st_size
        start = min(t.start for t in s.stored(finished).values() if t.file == path.name) if at != "header" else 0
        s.flip(path, {"header": 20, "first": start, "middle": size // 2, "last": size - 1}[at], 3)
    assert s.run(original, finished, recipe="q4", **words).resumed
    assert s.contents(finished) == wanted


def altered(value: Any) -> Any:
    """Return another value of the same type."""
    if isinstance(value, str):
        return value[:-1] + ("0" if value[-1] != "0" else "1")
    return value * 2 + 1 if isinstance(value, float) else value


@pytest.mark.sampled(3)
@pytest.mark.parametrize("what", ["digest", "loss", "sha256", "step"])
@pytest.mark.parametrize("sealed", [False, True])
def test_a_journal_with_other_values_in_it_does_no_harm(
    original: Path, finished: Path, words: dict[str, Any], wanted: dict[str, str], what: str, sealed: bool
) -> None:
    """`sealed`: with a checksum made anew, as a program would that knows how."""
    from ds4convert.execution.journal import _sealed

    if sealed and (what == "loss" or not words["hashing"]):
        pytest.skip("only rounding again could tell")
    path = finished / STATE / "journal.jsonl"
    lines = [json.loads(x) for x in path.read_bytes().splitlines()]
    for line in lines:
        steps = line.get("steps", [])
        for step in steps:
            if what == "digest":
                step[1] = [altered(d) for d in step[1]]
            if what == "loss":
                step[2] = step[2] and [altered(x) for x in step[2]]
        if what == "step" and len(steps) > 1:
            steps[0][0], steps[1][0] = steps[1][0], steps[0][0]
        if what == "sha256" and "sha256" in line:
            line["sha256"] = altered(line["sha256"])
    out = []
    for line in lines:
        check = line.pop("check")
        out.append(_sealed(line) if sealed else json.dumps(line | {"check": check}).encode() + b"\n")
    path.write_bytes(b"".join(out))
    s.run(original, finished, recipe="q4", **words)
    assert s.contents(finished) == wanted


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    "value", nightly(["NaN", "-1.0", '"0.1"', "Infinity", "true"], lambda value: value not in {"NaN", "-1.0"})
)
def test_an_impossible_loss_ends_the_journal(
    original: Path, finished: Path, words: dict[str, Any], wanted: dict[str, str], value: str
) -> None:
    from ds4convert.execution.journal import _sealed

    path = finished / STATE / "journal.jsonl"
    lines = [json.loads(x) for x in path.read_bytes().splitlines()]
    for line in lines:
        line.pop("check")
        for step in line.get("steps", []):
            step[2] = step[2] and [json.loads(value), *step[2][1:]]
    path.write_bytes(b"".join(map(_sealed, lines)))
    s.run(original, finished, recipe="q4", **words)
    assert s.contents(finished) == wanted


def test_a_relayout_that_goes_on_reads_back_what_it_had_finished(source: Path, tmp_path: Path) -> None:
    base, out, plain = tmp_path / "base", tmp_path / "out", tmp_path / "plain"
    s.run(source, base)
    assert support.run("relayout", base, plain, "--layout", "universal").code == 0
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Disk, "link_or_copy", lambda *a: (_ for _ in ()).throw(EnvironmentFault("stopped")))
        assert support.run("relayout", base, out, "--layout", "universal").code == 4
    made = out / "mtp" / "model.safetensors"
    s.flip(made, made.stat().st_size - 1)
    assert support.run("relayout", base, out, "--layout", "universal").code == 0
    assert s.contents(out) == s.contents(plain)


def test_a_base_that_changed_between_two_runs_of_a_relayout_is_not_mixed(source: Path, tmp_path: Path) -> None:
    base, out = tmp_path / "base", tmp_path / "out"
    s.run(source, base)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Disk, "link_or_copy", lambda *a: (_ for _ in ()).throw(EnvironmentFault("stopped")))
        assert support.run("relayout", base, out, "--layout", "universal").code == 4
    head = next(base.glob("model-mtp*.safetensors"))
    in_place(head)
    result = support.run("relayout", base, out, "--layout", "universal")
    assert result.code == 3 and "altered since it was written" in result.err and not (out / MANIFEST).exists()


def test_a_relayout_of_a_base_that_was_made_anew_is_not_already_done(source: Path, tmp_path: Path) -> None:
    """The same plan, other values: the source was trained further, its headers are the same."""
    base, out = tmp_path / "base", tmp_path / "out"
    s.run(source, base)
    words = ("relayout", base, out, "--layout", "universal")
    assert support.run(*words).code == 0 and support.run(*words, "--json").json["already_done"]
    other_bytes(first_shard(source))
    s.run(source, tmp_path / "new")
    shutil.rmtree(base)
    (tmp_path / "new").rename(base)
    support.assert_refused(support.run(*words), "is not empty", "--overwrite")
    assert support.run(*words, "--overwrite").code == 0
    assert support.run("verify", out, "--source", source).code == 0


def test_errors_of_a_changed_source_are_for_the_environment() -> None:
    assert issubclass(SourceChanged, EnvironmentFault) and not issubclass(SourceChanged, InputError)
    assert SourceChanged("x", "y").exit_code == 4
