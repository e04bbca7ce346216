"""What drives answer: which errors mean "this drive does not know the call", and what each failure says to do next."""

from __future__ import annotations

import errno
import logging

import pytest

from ds4convert.storage import drives
from ds4convert.storage.limits import MLX_LM_WANTS, forgive_refusals, raise_open_files


def failed(number: int) -> OSError:
    return OSError(number, "x")


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTTY, errno.ENODEV, 38, 95, 37, 45, 102, 78, 77])
def test_calls_that_a_drive_does_not_know_are_told_on_both_systems(number: int) -> None:
    """Numbers 38, 95, 37: Linux, include/uapi/asm-generic/errno.h; 45, 102, 78, 77: macOS, sys/errno.h."""
    assert drives.unsupported(failed(number))


@pytest.mark.parametrize("name", ["EIO", "ENOSPC", "ENOENT", "EACCES", "EPERM", "EROFS", "EBADF", "ESTALE", "EXDEV"])
def test_failures_of_a_drive_are_not_taken_for_calls_that_it_does_not_know(name: str) -> None:
    assert not drives.unsupported(failed(getattr(errno, name)))


def test_each_way_round_has_its_own_further_answers_and_none_hides_a_full_disk() -> None:
    ways = {
        "link": (drives.NO_LINK, {"EXDEV", "EPERM", "EACCES", "EMLINK"}),
        "sync": (drives.NO_FOLDER_SYNC, {"EBADF", "EACCES", "EPERM", "EISDIR", "ENOENT"}),
        "copy": (drives.NO_KERNEL_COPY, {"EXDEV", "EPERM", "ETXTBSY", "EBADF"}),
    }
    for known, more in ways.values():
        assert known - drives.UNSUPPORTED == {getattr(errno, n) for n in more} - drives.UNSUPPORTED
        assert not known & (drives.FULL | drives.STALE | {errno.EIO, errno.EROFS})


ADVICE = {
    errno.EFBIG: "this disk takes no file of that size (FAT32 ends at 4 GB): choose a smaller --max-shard-size, such as 3.9GB, or a disk with another file system",
    errno.EROFS: "this disk is read-only: choose a folder on another disk",
    errno.EACCES: "this user may not write there: choose another folder, or mend its permissions",
    errno.EPERM: "this user may not write there: choose another folder, or mend its permissions",
    errno.ESTALE: "the network drive has lost this file: mount the drive again, then run the same command",
    70: "the network drive has lost this file: mount the drive again, then run the same command",
    errno.EIO: "the disk itself failed: check its cable and its health, then run the same command again",
    errno.EMFILE: "too many files are open: raise the limit with `ulimit -n 4096`, then run the same command",
    errno.ENFILE: "too many files are open: raise the limit with `ulimit -n 4096`, then run the same command",
    errno.ENAMETOOLONG: "the name is too long for this disk: choose a shorter one",
    errno.ENOENT: "", errno.EINTR: "", errno.ENOSPC: "",
}  # fmt: skip


@pytest.mark.parametrize("number", ADVICE)
def test_what_to_do_about_a_failure_of_the_disk(number: int) -> None:
    assert drives.advice(failed(number)) == ADVICE[number]


@pytest.mark.parametrize(("number", "full"), [(errno.ENOSPC, True), (69, True), (122, True), (errno.EFBIG, False)])
def test_a_quota_counts_as_a_full_disk(number: int, full: bool) -> None:
    assert (number in drives.FULL) == full


def test_what_is_to_be_known_of_a_drive_is_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(drives, "_said", set())
    with caplog.at_level(logging.WARNING, "ds4convert"):
        for text in ("first", "second", "first"):
            drives.note(text)
    assert [r.getMessage() for r in caplog.records] == ["Warning: first", "Warning: second"]


class Limits:
    """`resource` as a system with these limits of open files has it; `most` is what it grants."""

    RLIMIT_NOFILE, RLIM_INFINITY = 7, -1

    def __init__(self, soft: int, hard: int, most: int | None = None) -> None:
        self.now, self.most = (soft, hard), most
        self.asked: list[tuple[int, int]] = []

    def getrlimit(self, kind: int) -> tuple[int, int]:
        assert kind == self.RLIMIT_NOFILE
        return self.now

    def setrlimit(self, kind: int, limits: tuple[int, int]) -> None:
        self.asked.append(limits)
        if kind != self.RLIMIT_NOFILE or (self.most is not None and limits[0] > self.most):
            raise ValueError("not allowed")
        self.now = limits


def on(monkeypatch: pytest.MonkeyPatch, limits: Limits) -> Limits:
    monkeypatch.setattr("ds4convert.storage.limits.resource", limits)
    return limits


@pytest.mark.parametrize(
    ("soft", "hard", "most", "now", "asked"),
    [
        (256, -1, None, 8192, [(8192, -1)]),
        (256, 4096, None, 4096, [(4096, 4096)]),
        (256, 100_000, None, 8192, [(8192, 100_000)]),
        (8192, 100_000, None, 8192, []),
        (10_000, 100_000, None, 10_000, []),
        (-1, -1, None, -1, []),
        (4096, 4096, None, 4096, []),
        (256, -1, 1000, 256, [(8192, -1)]),
    ],
)
def test_the_limit_of_open_files_is_raised_as_far_as_is_allowed_and_never_lowered(
    soft: int, hard: int, most: int | None, now: int, asked: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = on(monkeypatch, Limits(soft, hard, most))
    assert raise_open_files() == now and limits.asked == asked


@pytest.mark.parametrize(("hard", "forgives"), [(1024, True), (4095, True), (4096, False), (-1, False)])
def test_a_library_may_ask_for_more_files_than_are_allowed_where_it_would_fail(
    hard: int, forgives: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """mlx_lm.utils asks for (2048, 4096) while it is imported."""
    limits = on(monkeypatch, Limits(256, hard, most=0))
    real = limits.setrlimit
    forgive_refusals()
    assert (limits.setrlimit != real) == forgives
    if forgives:
        limits.setrlimit(limits.RLIMIT_NOFILE, (2048, MLX_LM_WANTS))
        with pytest.raises(ValueError, match="not allowed"):
            limits.setrlimit(limits.RLIMIT_NOFILE + 1, (1, 1))
        assert limits.asked == [(2048, 4096), (1, 1)], "the request is made all the same"
