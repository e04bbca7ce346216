"""What is put on the Hub: a converted folder that passed its checks, its card, and the digests of its files."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path

from ds4convert.checkpoint.provenance import PULL_RECORD
from ds4convert.converted import manifest, verify_record
from ds4convert.converted.manifest import MANIFEST_NAME, VERIFY_NAME
from ds4convert.converted.records import Manifest
from ds4convert.errors import InputError
from ds4convert.files import PARTIAL, Disk, disk_errors
from ds4convert.planning.layouts import layout_for
from ds4convert.publishing import model_card, published_card
from ds4convert.storage import small_files
from ds4convert.storage.belonging import belongs
from ds4convert.storage.digests import feed, git_blob, git_id
from ds4convert.storage.local_files import LocalFiles
from ds4convert.storage.safe_open import read_small, resolve_inside
from ds4convert.verification import structure

LICENCE_FILES = ("LICENSE", "LICENSE.txt", "LICENSE.md")
LICENCES = {
    "MIT License": "mit", "The MIT License": "mit", "Apache License": "apache-2.0", "BSD 3-Clause": "bsd-3-clause",
    "BSD 2-Clause": "bsd-2-clause",
}  # fmt: skip
"""First words of licence texts, with the Hub's names for them."""

Progress = Callable[[int], None]


@dataclass(frozen=True)
class LocalFile:
    """A file to be published: its size, its sha256, and the id that git gives to its content."""

    name: str
    path: Path
    size: int
    sha256: str
    git: str


@dataclass(frozen=True)
class Package:
    """A folder that may be published: its files, its card, and what verification said."""

    folder: Path
    files: tuple[LocalFile, ...]
    card: str
    problems: tuple[str, ...]
    strays: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def size(self) -> int:
        """Return the bytes of all files."""
        return sum(f.size for f in self.files)


@dataclass(frozen=True)
class HubCard:
    """The Hub's README.md: its text or "", whether that is what was last sent from here, and whether it may go."""

    text: str = ""
    known: bool = False
    replace: bool = False


def no_card() -> HubCard:
    """Return the card of a repo that has none."""
    return HubCard()


def prepare(
    folder: Path,
    repo: str,
    force: bool,
    write: bool,
    progress: Progress = lambda n: None,
    there: Callable[[], HubCard] = no_card,
) -> Package:
    """Return the folder as a package, verified; its card is written into it if `write`.

    `there` is asked for the Hub's card once the folder has passed its checks. Raises `InputError` where it is no
    folder, unfinished, or its checks fail, the latter two not with `force`; `OutputError` where the Hub's card was
    edited and may not be replaced.
    """
    checks = structure.structure(folder, progress=progress)
    problems = [f"{c.name}: {c.detail}" for c in checks if not c.ok]
    record = _record(folder)
    listed = [f.name for f in record.files] if record else list(_strays(folder, {model_card.CARD_NAME}))
    problems += small_files.faults(folder, sorted(n for n in listed if _is_file(folder, n)))
    measured = verify_record.read(folder, record) if record else None
    if measured is not None and not measured.ok:
        problems.append(f"verify --mtp: {measured.head.verdict}")
    if problems and not force:
        raise InputError(
            f"{folder}: is not published, as it did not pass: {'; '.join(problems)}. Nothing was sent. See "
            f"`ds4convert verify {folder}`, or add --force, which the model card then tells"
        )
    files = _files(folder, record, measured is not None, trusted=not problems)
    before = (
        read_small(folder, model_card.CARD_NAME).decode("utf-8", "replace")
        if _is_file(folder, model_card.CARD_NAME)
        else ""
    )
    text, notes = before, []
    far = there()
    if before and not model_card.is_ours(before):
        published_card.check_own(before, far.text, far.replace, far.known)
        notes.append(f"{model_card.CARD_NAME} is your own and is sent as it is; remove it to have a card written")
    else:
        told = tuple(c.name for c in checks if c.ok)
        layout = layout_for(record.layout, record.family, {t.role for t in record.tensors}) if record else None
        total = sum(f.size for f in files)
        facts = model_card.Facts(repo, record, layout, told, tuple(problems), measured, licence(folder), total)
        text = published_card.joined(model_card.upper(facts), before, far.text, far.replace, far.known)
    raw = text.encode()
    if write and text != before:
        with disk_errors("writing", folder / model_card.CARD_NAME):
            Disk().write_file(folder / model_card.CARD_NAME, raw)
    files.append(_of_bytes(folder, model_card.CARD_NAME, raw))
    strays = _strays(folder, {f.name for f in files} | {VERIFY_NAME, PULL_RECORD})
    return Package(folder, tuple(files), text, tuple(problems), strays, tuple(notes))


def _record(folder: Path) -> Manifest | None:
    with suppress(InputError):
        return manifest.read(folder)
    return None


def _files(folder: Path, record: Manifest | None, measured: bool, trusted: bool) -> list[LocalFile]:
    """Return the files of the manifest and those of ours; of a folder without one all but hidden and partial ones."""
    if record is None:
        names = [n for n in _strays(folder, {model_card.CARD_NAME}) if not n.endswith(PARTIAL)]
        return [_local(folder, n, None) for n in names]
    digests = {f.name: f.sha256 for f in record.files}
    own = {MANIFEST_NAME, *([VERIFY_NAME] if measured else [])}
    names = [n for n in sorted(digests.keys() | own) if _is_file(folder, n)]
    return [_local(folder, n, digests.get(n) if trusted else None) for n in names]


def _is_file(folder: Path, name: str) -> bool:
    try:
        return resolve_inside(folder, name).is_file()
    except (OSError, InputError):
        return False


def _local(folder: Path, name: str, sha256: str | None) -> LocalFile:
    """Return a file with its digests; those of large files are taken from the manifest, which was just checked."""
    path = resolve_inside(folder, name)
    size = path.stat().st_size
    if sha256 is not None and name.endswith(".safetensors"):
        return LocalFile(name, path, size, sha256, "")
    whole, git = hashlib.sha256(), git_blob(size)
    with closing(LocalFiles.of(folder, [name])) as files:
        feed(files, name, whole, git)
    return LocalFile(name, path, size, whole.hexdigest(), git.hexdigest())


def _of_bytes(folder: Path, name: str, raw: bytes) -> LocalFile:
    return LocalFile(name, folder / name, len(raw), hashlib.sha256(raw).hexdigest(), git_id(raw))


def _strays(folder: Path, names: set[str]) -> tuple[str, ...]:
    """Return the files that are not published, hidden ones aside."""
    found = (p.relative_to(folder) for p in sorted(folder.rglob("*")) if p.is_file())
    return tuple(p.as_posix() for p in found if p.as_posix() not in names and belongs(p.as_posix()))


def licence(folder: Path) -> dict[str, str]:
    """Return the fields of a card's front matter that tell the licence, from the source's licence file; {} without."""
    for name in LICENCE_FILES:
        if _is_file(folder, name):
            start = read_small(folder, name).decode("utf-8", "replace").strip().lstrip("# ")[:400]
            first = start.splitlines()[0].strip() if start else ""
            for words, known in LICENCES.items():
                if first.lower().startswith(words.lower()):
                    return {"license": known}
            return {"license": "other", "license_name": "see-license-file", "license_link": name}
    return {}
