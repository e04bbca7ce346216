"""A new kind of source is one module and one row: from there on every command reads it, and remembers nothing of it."""

from __future__ import annotations

import sys
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import ClassVar

import pytest

import ds4convert as ds4
from ds4convert.checkpoint.folder import CONFIG_NAME, INDEX_NAME, Checkpoint, read_checkpoint
from ds4convert.errors import Ds4Error, InputError, UsageError
from ds4convert.hub import kinds
from ds4convert.hub.records import ListedFiles, RemoteFile
from tests.support import tree

MODULE = "archives_for_this_test"


@dataclass(frozen=True)
class Archive:
    """A zip archive as it was listed."""

    name: str
    files: tuple[RemoteFile, ...]
    kind: ClassVar[str] = "archive"

    def shards(self) -> list[RemoteFile]:
        """Return its safetensors files."""
        return [f for f in self.files if f.name.endswith(".safetensors")]


class ArchiveFiles(ListedFiles):
    """Members of an archive, read by range."""

    def __init__(self, archive: Archive) -> None:
        super().__init__(archive.shards())
        self._archive = archive

    def _missing(self, name: str) -> Ds4Error:
        return InputError(f"{self._archive.name}: {name}: no such member")

    def _at_hand(self, file: RemoteFile, end: int) -> None:
        return None

    def _fetched(self, file: RemoteFile, start: int, n: int) -> Iterator[bytes]:
        with zipfile.ZipFile(self._archive.name.removeprefix("zip://")) as archive, archive.open(file.name) as member:
            member.seek(start)
            yield member.read(n)


class ArchiveDoor:
    """How archives are opened; small files are unpacked beside them."""

    def listed(self, text: str) -> Archive:
        """Return the archive of an address."""
        with zipfile.ZipFile(text.removeprefix("zip://")) as archive:
            members = archive.infolist()
            return Archive(text, tuple(RemoteFile(m.filename, m.file_size, f"{m.CRC:08x}", None) for m in members))

    def headers(self, listing: Archive) -> Checkpoint:
        """Return what the archive holds, by its headers."""
        path = Path(listing.name.removeprefix("zip://"))
        small = path.with_suffix(".small")
        with zipfile.ZipFile(path) as archive:
            archive.extractall(
                small, [f.name for f in listing.files if f.name not in {s.name for s in listing.shards()}]
            )
        assert (small / CONFIG_NAME).is_file() and (small / INDEX_NAME).is_file()
        return read_checkpoint(small, ArchiveFiles(listing), [f.name for f in listing.shards()])

    def provenance(self, listing: Archive) -> None:
        """Return nothing: a folder with the same files is as good."""


@pytest.fixture
def archive(mini_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return the address of an archive that holds the small checkpoint, with its kind registered."""
    with zipfile.ZipFile(tmp_path / "model.zip", "w") as made:
        for file in sorted(mini_source.iterdir()):
            made.write(file, file.name)
    module = ModuleType(MODULE)
    module.DOOR = ArchiveDoor()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, MODULE, module)
    kind = kinds.Kind(
        ("zip",), "zip://FILE", lambda text: text.startswith("zip://"), MODULE, "unpack {name} into a folder first"
    )
    monkeypatch.setitem(kinds.KINDS, Archive.kind, kind)
    return f"zip://{tmp_path / 'model.zip'}"


def test_every_function_reads_a_kind_that_was_added_by_one_row(archive: str, mini_source: Path, tmp_path: Path) -> None:
    assert ds4.inspect(archive).as_json()["groups"] == ds4.inspect(mini_source).as_json()["groups"]
    assert ds4.open(archive).head_kind == ds4.open(mini_source).head_kind != "none"
    assert ds4.plan(archive).id == ds4.plan(mini_source).id
    found = ds4.diff(archive, mini_source).as_json()
    assert found["same"] > 0 and not any(found[key] for key in ("changed", "other_format", "only_a", "only_b"))
    ds4.convert(mini_source, tmp_path / "here", jobs=1)
    ds4.convert(archive, tmp_path / "there", jobs=1)
    assert tree(tmp_path / "there") == tree(tmp_path / "here"), "the same result, its manifest included"
    assert ds4.verify(tmp_path / "there", source=archive).ok


def test_its_own_words_say_how_the_files_come_here(archive: str) -> None:
    with pytest.raises(UsageError, match=r"needs a folder here; unpack zip://.* into a folder first"):
        ds4.relayout(archive, "out", "mtplx")


def test_an_address_of_no_kind_names_those_that_there_are(archive: str) -> None:
    with pytest.raises(UsageError, match=r"ftp:// is no store that is known here; .*hf://owner/name.*zip://FILE"):
        ds4.open("ftp://host/folder")


def test_no_two_kinds_share_a_scheme() -> None:
    schemes = [s for kind in kinds.KINDS.values() for s in kind.schemes]
    assert len(schemes) == len(set(schemes))
    for kind in kinds.KINDS.values():
        assert kinds.kind_of(kind.example.split(",")[0]) is kind, kind.example
