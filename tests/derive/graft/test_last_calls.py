"""A change in place that dies at any call of its end: the same command again ends it, with exit code 0 and no remains."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from ds4convert.checkpoint.source import open_source
from ds4convert.derive import graft, in_place
from ds4convert.inference.single_file import single_file_source
from tests import support
from tests import support_run as s

STATE = ".ds4convert"
CALLS = ("rename", "replace", "link", "unlink", "rmdir", "mkdir", "fsync", "fdatasync", "write", "pwrite", "ftruncate")
"""Every call of the system by which a folder changes, and those that make it last."""


class Died(BaseException):
    """The end of the process: no `except Exception` may swallow it."""


@contextmanager
def dying(monkeypatch: pytest.MonkeyPatch, at: int, after: bool) -> Iterator[list[str]]:
    """Let the process die before (or after) its call number `at`; nothing that comes later reaches the disk."""
    made: list[str] = []

    def watched(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            made.append(name)
            if len(made) > at or (len(made) == at and not after):
                raise Died
            out = real(*args, **kwargs)
            if len(made) == at:
                raise Died
            return out

        return call

    with monkeypatch.context() as patched:
        for name in CALLS:
            patched.setattr(os, name, watched(name, getattr(os, name)))
        yield made


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return s.tiny(tmp_path_factory.mktemp("source") / "source", layers=1, experts=2)


@pytest.fixture(scope="module", params=["ours", "theirs"])
def base(source: Path, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A conversion without a head: ours, or as another program leaves it (its small files are kept for the way back)."""
    out = tmp_path_factory.mktemp("base") / "mlx"
    s.run(source, out, keep_mtp=False)
    if request.param == "theirs":
        (out / "ds4convert_manifest.json").unlink()
        (out / support.INDEX).unlink()
    return out


def put_in(folder: Path, source: Path) -> None:
    """Graft in this process, as the command does it."""
    if in_place.recover(folder) is None:
        in_place.graft(graft.plan(folder, open_source(source), graft.Request(), b""), 1)


def take_out(folder: Path) -> None:
    if in_place.recover(folder) is None:
        in_place.remove(folder, single_file_source().encode())


@pytest.mark.sampled(2)
@pytest.mark.parametrize("change", ["graft", "remove"])
def test_it_may_die_at_any_call_from_the_commit_on(
    base: Path, source: Path, change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["--from", source, "--in-place"] if change == "graft" else ["--remove"]
    start, folder = s.copied(base, tmp_path / "start"), tmp_path / "mlx"
    if change == "remove":
        put_in(start, source)
    run = (lambda: put_in(folder, source)) if change == "graft" else (lambda: take_out(folder))
    s.copied(start, folder)
    run()
    wanted = s.contents(folder)

    # Every point needs the same beginning: the moment at which the commit has been written, and nothing moved.
    s.copied(start, folder)
    with monkeypatch.context() as patched:
        patched.setattr(in_place, "_commit", lambda folder, disk: (_ for _ in ()).throw(Died))
        with pytest.raises(Died):
            run()
    committed = s.copied(folder, tmp_path / "committed")

    for after in (False, True):
        n = 0
        while True:
            n += 1
            s.copied(committed, folder)
            with dying(monkeypatch, n, after) as made:
                try:
                    run()
                    died = False
                except Died:
                    died = True
            where = f"call {n} ({made[-1]}), {'after' if after else 'before'}"
            if not died:
                break
            again = support.run("graft", folder, *command)
            assert again.code == 0, f"{where}: {again.err}"
            assert s.contents(folder) == wanted, where
        assert n > 15, "the end of a change has more calls than that"


@pytest.mark.sampled(2)
@pytest.mark.parametrize("left", [[], ["lock"], ["lock", "holder"]])
def test_an_empty_state_folder_is_no_hindrance_and_goes(
    base: Path, source: Path, left: list[str], tmp_path: Path
) -> None:
    folder = s.copied(base, tmp_path / "mlx")
    before = s.contents(folder)
    for words in (["--remove"], ["--from", source, "--in-place"], ["--from", source, "--in-place"], ["--remove"]):
        (folder / STATE).mkdir()
        for name in left:
            (folder / STATE / name).write_bytes(b"")
        assert support.run("graft", folder, *words).code == 0, words
        assert not (folder / STATE).exists(), words
    assert s.contents(folder) == before


def test_killed_in_its_last_moments_it_is_finished_by_the_same_command(tmp_path: Path) -> None:
    """Real processes, killed when the new manifest is there: between that and their end."""
    source = s.tiny(tmp_path / "source", layers=1, experts=2)
    s.run(source, tmp_path / "base", keep_mtp=False)
    s.run(source, tmp_path / "whole")
    folder, manifest = tmp_path / "mlx", tmp_path / "mlx" / "ds4convert_manifest.json"
    for words, start, wanted in (
        (["--from", source, "--in-place"], "base", "whole"),
        (["--remove"], "whole", "base"),
    ):
        s.copied(tmp_path / start, folder)
        old = manifest.read_bytes()
        child = s.start("graft", folder, *words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while child.poll() is None and (not manifest.exists() or manifest.read_bytes() == old):
            time.sleep(0.0005)
        child.send_signal(signal.SIGKILL)
        child.wait()
        s.cli("graft", folder, *words)
        assert s.contents(folder) == s.contents(tmp_path / wanted)
        shutil.rmtree(folder)
