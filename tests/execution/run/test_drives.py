"""Drives that lack calls: SMB, NFS, exFAT, FAT32, WebDAV, FUSE. The calls fail here as they are reported to fail there.

Sources: F_FULLFSYNC: golang/go #64215 and vim/vim #4016 (SMB: ENOTSUP 45), restic/restic #4016 and realm/realm-core
#5806 (exFAT: ENOTTY 25), libuv/libuv #2135 (Apple's sources: ENOTSUP, EINVAL, ENOTTY). Folders: syncthing #4432, borg
#1287, rocksdb #2929 (CIFS: EINVAL), restic #3752. flock: hf-mount #106 (NFS with nolocks on macOS: ENOTSUP),
sysdiagnose #92 (SMB: 45), filelock #77, metagenomics-tk #177 (EBADF). Links: s3fs-fuse #1633 (exFAT on macOS: 45),
dupe-krill #14; Linux answers EPERM on exFAT (link(2)).
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import stat
import subprocess
import sys
import threading
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ds4convert import files
from ds4convert.errors import EnvironmentFault
from ds4convert.execution import locking
from ds4convert.files import Disk
from ds4convert.storage import drives, limits
from ds4convert.storage.belonging import belongs
from ds4convert.storage.safe_open import names_in, safetensors_in
from tests import support
from tests import support_run as s

FULLFSYNC = 51


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = s.tiny(tmp_path_factory.mktemp("drives") / "source", layers=1, experts=2)
    (out / "tokenizer.json").write_text("{}")
    return out


@pytest.fixture(scope="module")
def wanted(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    out = tmp_path_factory.mktemp("wanted") / "mlx"
    s.run(source, out)
    return s.contents(out)


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is said of the drive, in this test."""
    out: list[str] = []
    monkeypatch.setattr(drives, "_said", set())
    monkeypatch.setattr(drives._LOG, "warning", lambda text, *words: out.append(text % words))
    return out


def failing(code: int, real: Callable[..., Any], when: Callable[..., bool]) -> Callable[..., Any]:
    """Return a call that fails with `code` where `when` of its arguments holds."""

    def call(*args: Any, **kwargs: Any) -> Any:
        if when(*args):
            raise OSError(code, "Operation not supported")
        return real(*args, **kwargs)

    return call


def always(*args: Any) -> bool:
    return True


def is_folder(fd: int) -> bool:
    return stat.S_ISDIR(os.fstat(fd).st_mode)


# --- syncing ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [45, 25, 22, 19, 102, 95])
def test_where_a_mac_cannot_sync_fully_it_syncs(
    source: Path, wanted: dict[str, str], code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    real = os.fsync
    monkeypatch.setattr(files, "sys", types.SimpleNamespace(platform="darwin"))
    monkeypatch.setattr(fcntl, "F_FULLFSYNC", FULLFSYNC, raising=False)
    monkeypatch.setattr(fcntl, "fcntl", failing(code, fcntl.fcntl, lambda fd, what, *a: what == FULLFSYNC))
    monkeypatch.setattr(os, "fsync", lambda fd: (synced.append(fd), real(fd))[1])
    s.run(source, tmp_path / "mlx")
    assert s.contents(tmp_path / "mlx") == wanted
    assert len(synced) > len(wanted)


def test_a_full_sync_that_the_disk_fails_at_is_no_missing_call(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "sys", types.SimpleNamespace(platform="darwin"))
    monkeypatch.setattr(fcntl, "F_FULLFSYNC", FULLFSYNC, raising=False)
    monkeypatch.setattr(fcntl, "fcntl", failing(errno.EIO, fcntl.fcntl, lambda fd, what, *a: what == FULLFSYNC))
    with pytest.raises(EnvironmentFault, match="check its cable"):
        s.run(source, tmp_path / "mlx")


@pytest.mark.parametrize("code", [22, 95, 25, 45, 9, 2])
def test_a_folder_that_cannot_be_synced_is_told_of_once(
    source: Path, wanted: dict[str, str], code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: list[str]
) -> None:
    monkeypatch.setattr(os, "fsync", failing(code, os.fsync, is_folder))
    s.run(source, tmp_path / "mlx", layout="inline")
    assert s.contents(tmp_path / "mlx") == wanted
    assert [t for t in told if "cannot sync folders" in t] == told and len(told) == 1


def test_a_folder_whose_sync_fails_otherwise_stops_the_run(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows Subsystem for Linux answers EIO: that may be a dying disk as well (microsoft/WSL #2557)."""
    monkeypatch.setattr(os, "fsync", failing(errno.EIO, os.fsync, is_folder))
    with pytest.raises(EnvironmentFault):
        s.run(source, tmp_path / "mlx")


@pytest.mark.parametrize("code", [22, 95, 38])
def test_data_that_cannot_be_synced_is_told_of_once(
    source: Path, wanted: dict[str, str], code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: list[str]
) -> None:
    monkeypatch.setattr(os, "fdatasync", failing(code, os.fdatasync, always))
    s.run(source, tmp_path / "mlx")
    assert s.contents(tmp_path / "mlx") == wanted and len(told) == 1 and "power cut" in told[0]


# --- links, renames, sizes, copies -----------------------------------------------------------------------------


@pytest.mark.sampled(3)
@pytest.mark.parametrize("code", [45, 102, 95, 38, 1, 13, 18, 31, 22])
def test_where_a_file_can_have_no_second_name_it_is_copied(
    source: Path, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, plain = tmp_path / "base", tmp_path / "plain"
    s.run(source, base)
    s.run(source, plain, layout="universal")
    monkeypatch.setattr(os, "link", failing(code, os.link, always))
    assert support.run("relayout", base, tmp_path / "out", "--layout", "universal").code == 0
    assert s.contents(tmp_path / "out") == s.contents(plain)


@pytest.mark.parametrize("code", [45, 17, 95])
def test_where_nothing_is_renamed_over_a_file_the_old_one_goes_first(
    source: Path, wanted: dict[str, str], code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "rename", failing(code, os.rename, lambda a, b, *more: Path(b).exists()))
    s.run(source, tmp_path / "mlx", layout="mtplx")
    s.run(source, tmp_path / "mlx", overwrite=True)
    assert s.contents(tmp_path / "mlx") == wanted


def test_where_nothing_is_renamed_files_are_copied(
    source: Path, wanted: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "rename", failing(95, os.rename, always))
    s.run(source, tmp_path / "mlx")
    assert s.contents(tmp_path / "mlx") == wanted


def test_a_drive_that_does_not_make_files_longer_is_written_to_at_their_end(
    source: Path, wanted: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "sys", types.SimpleNamespace(platform="darwin"))
    monkeypatch.setattr(files, "_full_sync", lambda fd: False)
    monkeypatch.setattr(os, "ftruncate", failing(22, os.ftruncate, lambda fd, size: size > 0))
    s.run(source, tmp_path / "mlx")
    assert s.contents(tmp_path / "mlx") == wanted


@pytest.mark.parametrize("code", [45, 95, 38, 22, 18, 9, None])
def test_where_the_kernel_does_not_copy_a_buffer_does(
    source: Path, code: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """None: a kernel that answers 0 bytes, as some do for files of other file systems."""
    s.run(source, tmp_path / "plain", hashing=False)
    call = (lambda *a: 0) if code is None else failing(code, os.copy_file_range, always)
    monkeypatch.setattr(os, "copy_file_range", call)
    monkeypatch.setattr(files, "PAGE", 1)  # every copy may go through the kernel
    s.run(source, tmp_path / "mlx", hashing=False)
    assert s.contents(tmp_path / "mlx") == s.contents(tmp_path / "plain")


@pytest.mark.parametrize(
    ("code", "advice"),
    [
        (errno.EFBIG, "--max-shard-size"), (errno.EROFS, "read-only"), (errno.ESTALE, "mount the drive again"),
        (errno.EIO, "cable"), (errno.ENOSPC, "the disk is full"), (errno.EDQUOT, "the disk is full"), (69, "the disk is full"),
        (errno.EACCES, "permissions"), (errno.EMFILE, "ulimit -n"),
    ],
)  # fmt: skip
def test_what_fails_in_the_midst_is_exit_code_4_with_what_to_do(
    source: Path, wanted: dict[str, str], code: int, advice: str, tmp_path: Path
) -> None:
    out = tmp_path / "mlx"
    disk = s.FailingDisk(30, lambda: OSError(code, os.strerror(code)))
    with pytest.raises(EnvironmentFault, match=advice) as caught:
        s.run(source, out, disk=disk)
    assert "same command" in str(caught.value)
    s.run(source, out)
    assert s.contents(out) == wanted


def test_a_file_system_that_takes_no_file_of_that_size_says_so_before_anything_is_written_there(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FAT32: the size is set first, and refused first."""
    monkeypatch.setattr(files, "sys", types.SimpleNamespace(platform="darwin"))
    monkeypatch.setattr(files, "_full_sync", lambda fd: False)
    monkeypatch.setattr(os, "ftruncate", failing(errno.EFBIG, os.ftruncate, lambda fd, size: size > 100_000))
    result = support.run("quantize", source, tmp_path / "mlx")
    assert result.code == 4 and "FAT32" in result.err and "3.9GB" in result.err


def test_a_drive_that_tells_no_size_counts_as_large_enough(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reported of network drives: all figures of statvfs are 0 (engeldlgado/toshllm #92)."""
    monkeypatch.setattr(os, "statvfs", lambda path: types.SimpleNamespace(f_blocks=0, f_bavail=0, f_frsize=0))
    s.run(source, tmp_path / "mlx")
    assert s.wrong(tmp_path / "mlx") == []


def test_an_open_file_that_a_network_drive_keeps_under_another_name_is_no_error(tmp_path: Path) -> None:
    """NFS renames a removed file that is still open to .nfs...; its folder cannot be removed until it is closed."""
    state = tmp_path / ".ds4convert"
    state.mkdir()
    (state / "journal.jsonl").write_text("x")
    real = Path.unlink

    def silly(path: Path, missing_ok: bool = False) -> None:
        if path.name == "journal.jsonl":
            path.rename(path.with_name(".nfs0001"))
        else:
            real(path, missing_ok)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Path, "unlink", silly)
        Disk().remove(state)
    assert [p.name for p in state.iterdir()] == [".nfs0001"]
    (state / "other").mkdir()
    Disk().remove(state)
    assert not state.exists()


# --- locks -----------------------------------------------------------------------------------------------------


@pytest.fixture(params=[45, 95, 38, 37, 22, 9])
def no_flock(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fcntl, "flock", failing(request.param, fcntl.flock, always))


def test_a_drive_without_locks_is_written_to_with_a_warning(
    source: Path, wanted: dict[str, str], no_flock: None, tmp_path: Path, told: list[str]
) -> None:
    s.run(source, tmp_path / "mlx")
    assert s.contents(tmp_path / "mlx") == wanted
    assert len(told) == 1 and "cannot lock" in told[0]


def test_two_runs_exclude_each_other_without_locks_too(no_flock: None, tmp_path: Path, told: list[str]) -> None:
    first = locking.Lock(tmp_path)
    with pytest.raises(EnvironmentFault, match="another ds4convert is writing"):
        locking.Lock(tmp_path)
    first.release()
    locking.Lock(tmp_path).release()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["lock"]


def test_of_many_at_once_one_gets_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: list[str]) -> None:
    monkeypatch.setattr(fcntl, "flock", failing(45, fcntl.flock, always))
    start, got, refused = threading.Barrier(8), [], []

    def take() -> None:
        start.wait()
        try:
            got.append(locking.Lock(tmp_path))
        except EnvironmentFault as e:
            refused.append(e)

    threads = [threading.Thread(target=take) for _ in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(got) == 1 and len(refused) == 7
    got[0].release()


def ended_process() -> int:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child.pid


@pytest.mark.parametrize(
    "kind", ["ended", "number given again", "never written", "nonsense", "no digits", "too many digits"]
)
def test_the_file_of_a_process_that_has_ended_does_not_count(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: list[str]
) -> None:
    monkeypatch.setattr(fcntl, "flock", failing(45, fcntl.flock, always))
    monkeypatch.setattr(locking.time, "sleep", lambda seconds: None)
    host = socket.gethostname()
    text = {
        "ended": f"{ended_process()} 12345 {host}\n",
        "number given again": f"{os.getppid()} 1 {host}\n",
        "never written": "",
        "nonsense": f"-1 x {host}\n",
        "no digits": f"\N{SUPERSCRIPT TWO} 1 {host}\n",
        "too many digits": f"{'9' * 5000} 1 {host}\n",
    }[kind]
    (tmp_path / "holder").write_text(text)
    lock = locking.Lock(tmp_path)
    assert (tmp_path / "holder").read_text().startswith(f"{os.getpid()} ")
    lock.release()
    assert not (tmp_path / "holder").exists()


@pytest.mark.parametrize("who", ["a living process", "another machine"])
def test_the_file_of_one_that_may_be_alive_counts_and_the_message_names_it(
    who: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fcntl, "flock", failing(45, fcntl.flock, always))
    pid, host = os.getppid(), socket.gethostname()
    text = f"{pid} {locking._started(pid)} {host}\n" if who == "a living process" else "77 5 other-mac.local\n"
    (tmp_path / "holder").write_text(text)
    with pytest.raises(EnvironmentFault) as caught:
        locking.Lock(tmp_path)
    assert f"delete {tmp_path / 'holder'}" in str(caught.value) and text.split()[0] in str(caught.value)
    assert (tmp_path / "holder").read_text() == text


def test_a_lock_that_fails_otherwise_is_not_told_as_another_run(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fcntl, "flock", failing(errno.EIO, fcntl.flock, always))
    with pytest.raises(EnvironmentFault) as caught:
        s.run(source, tmp_path / "mlx")
    assert "another ds4convert" not in str(caught.value)


# --- names -----------------------------------------------------------------------------------------------------

APPLE_DOUBLE = b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X        " + bytes(4064)
"""What macOS writes beside each file on exFAT and SMB; as a safetensors header its length is 2,199,142,139,136."""


def litter(folder: Path) -> Path:
    """Leave beside each file what macOS leaves."""
    for path in [*folder.rglob("*")]:
        path.with_name(f"._{path.name}").write_bytes(APPLE_DOUBLE)
    (folder / ".DS_Store").write_bytes(b"x")
    (folder / ".Spotlight-V100").mkdir()
    (folder / ".Spotlight-V100" / "model.safetensors").write_bytes(b"x")
    return folder


def test_the_rule_of_names(tmp_path: Path) -> None:
    assert belongs("model.safetensors") and belongs("mtp/config.json") and belongs("a.b")
    assert not any(map(belongs, ("._model.safetensors", ".DS_Store", "mtp/._config.json", ".git/config", ".")))
    (tmp_path / "x").mkdir()
    for name in ("b.safetensors", "a.safetensors", "._a.safetensors", ".DS_Store", "c.txt"):
        (tmp_path / "x" / name).write_bytes(b"")
    assert names_in(tmp_path / "x") == ["a.safetensors", "b.safetensors", "c.txt"]
    assert safetensors_in(tmp_path / "x") == ["a.safetensors", "b.safetensors"]
    assert names_in(tmp_path / "nowhere") == []


def test_what_macos_leaves_is_no_part_of_a_source_or_a_result(source: Path, tmp_path: Path) -> None:
    clean, other = s.copied(source, tmp_path / "clean"), s.copied(source, tmp_path / "other")
    (other / support.INDEX).unlink()  # all safetensors files of the folder are its shards
    (clean / support.INDEX).unlink()
    litter(other)
    for layout in ("inline", "universal"):
        plain, out = tmp_path / f"plain-{layout}", tmp_path / layout
        assert support.run("quantize", clean, plain, "--layout", layout).code == 0
        assert support.run("quantize", other, out, "--layout", layout).code == 0
        assert s.contents(out) == s.contents(plain)
        litter(out)
        assert support.run("verify", out, "--source", other).code == 0
        assert support.run("relayout", out, tmp_path / f"again-{layout}", "--layout", "mtplx").code == 0
        assert support.run("diff", plain, out).code == 0
    bare, theirs = tmp_path / "bare", tmp_path / "theirs"
    assert support.run("quantize", other, bare, "--drop-mtp").code == 0
    s.copied(bare, theirs)
    for name in ("ds4convert_manifest.json", support.INDEX):
        (theirs / name).unlink()
    for n, folder in enumerate((litter(bare), litter(theirs))):
        assert support.run("graft", folder, "--from", other, "--out", tmp_path / f"graft-{n}").code == 0
        assert support.run("graft", folder, "--from", other, "--in-place").code == 0
        assert support.run("graft", "--remove", folder).code == 0
    assert support.run("quantize", tmp_path / "inline", tmp_path / "q", "--from-mlx", "--recipe", "q4").code == 0
    assert support.run("quantize", other, tmp_path / "inline", "--recipe", "bf16", "--overwrite").code == 0
    assert s.wrong(tmp_path / "inline", other) == []


# --- open files ------------------------------------------------------------------------------------------------

FEW = """
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100))
from ds4convert.__main__ import main
sys.argv[0] = "ds4convert"
main()
"""


def test_more_shards_than_files_may_be_open(source: Path, tmp_path: Path) -> None:
    """macOS gives a program 256 open files; here it is 100, for a source and a result of more shards than that."""
    many = tmp_path / "many"
    tensors = support.read_folder(source)
    support.write_folder(many, tensors, s.config_of() | {"num_hidden_layers": 1, "n_routed_experts": 2}, 120)
    for name in ("config.json", "tokenizer.json"):
        (many / name).write_bytes((source / name).read_bytes())
    out = tmp_path / "mlx"
    for words in (
        ["quantize", many, out, "--max-shard-size", "1MB"],
        ["verify", out, "--source", many],
        ["relayout", out, tmp_path / "other", "--layout", "universal"],
        ["diff", out, many],
    ):
        command = [sys.executable, "-c", FEW, *map(str, words)]
        done = subprocess.run(command, capture_output=True, text=True, env=s.environment(), check=False)
        assert done.returncode == 0, (words, done.stderr)
    assert len(list(many.glob("*.safetensors"))) > 100


def test_the_limit_of_open_files_is_raised_as_far_as_it_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    state = {"now": (256, 1000)}
    monkeypatch.setattr(limits.resource, "getrlimit", lambda what: state["now"])
    monkeypatch.setattr(limits.resource, "setrlimit", lambda what, pair: state.update(now=pair))
    assert limits.raise_open_files() == 1000
    state["now"] = (256, limits.resource.RLIM_INFINITY)
    assert limits.raise_open_files() == limits.WANTED
    state["now"] = (20_000, 30_000)
    assert limits.raise_open_files() == 20_000
