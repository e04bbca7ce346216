"""A package put on the Hub: uploaded, and compared with what the Hub then has.

Files that the Hub has already are not sent again, and large files that were sent before an interruption are kept there
until the commit that names them: one commit, at the end, so that nobody sees half of a checkpoint. All rounds start
from what the Hub lists, so the same command goes on wherever an earlier one stopped.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ds4convert.checkpoint import headers
from ds4convert.checkpoint.folder import INDEX_NAME
from ds4convert.checkpoint.types import DRAFTER
from ds4convert.converted import manifest
from ds4convert.converted.manifest import MANIFEST_NAME
from ds4convert.errors import InputError, OutputError
from ds4convert.files import Disk
from ds4convert.hub.errors import hub_errors, is_passing
from ds4convert.publishing.model_card import CARD_NAME
from ds4convert.publishing.package import LocalFile, Package
from ds4convert.storage import strict_json
from ds4convert.storage.patience import Patience
from ds4convert.storage.safe_open import MAX_SMALL_BYTES, read_own
from ds4convert.words.terminal import show

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi


MAX_CARD_BYTES = 2_000_000
DRAFTER_FOLDERS = (f"{DRAFTER}/",)
"""Folders below that may have an index of their own: those of drafters."""

ROUNDS = 5
COMMIT_MESSAGE = "Upload by ds4convert publish"

T = TypeVar("T")
Progress = Callable[[int], None]
Say = Callable[[str], None]


@dataclass(frozen=True)
class Target:
    """Where to: the repo, the branch, and how to talk to the Hub."""

    repo: str
    branch: str = "main"
    private: bool = False
    endpoint: str | None = None
    token: str | None = None

    def api(self) -> HfApi:
        """Return the Hub's client."""
        from huggingface_hub import HfApi

        return HfApi(endpoint=self.endpoint, token=self.token)


@dataclass(frozen=True)
class There:
    """What the Hub has at a commit ("" without a repo): files by name, and whether the repo is private (None: unknown).

    `card` is the text of its README.md, `named` the shards that its own manifest or index names.
    """

    commit: str = ""
    files: Mapping[str, tuple[int, str]] = field(default_factory=dict)
    private: bool | None = None
    card: str = ""
    named: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Changes:
    """What a commit does to the files of the Hub, by name, each list sorted.

    `kept` are files of the Hub that stay as they are; `others` those of them that hold weights, but are not of this
    folder, nor of what it replaces.
    """

    added: tuple[str, ...] = ()
    replaced: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()
    others: tuple[str, ...] = ()


@dataclass
class Sent:
    """What a run did: the commit that the branch is at, the bytes that were sent, and what became of the files."""

    commit: str = ""
    bytes: int = 0
    changes: Changes = field(default_factory=Changes)


def changes(package: Package, there: There, delete_others: bool) -> Changes:
    """Return what publishing the package does to the files that are there.

    Removed are the shards that the Hub's own manifest or index names: what this folder replaces. A host would load them
    with the new ones. Other weights, of adapters or of another precision in a folder below, stay unless
    `delete_others`.
    """
    ours = {f.name for f in package.files}
    same = {f.name for f in package.files if _same(f, there.files.get(f.name))}
    weights = {n for n in there.files.keys() - ours if n.endswith(".safetensors")}
    removed = weights if delete_others else weights & there.named
    return Changes(
        added=tuple(sorted(ours - there.files.keys())),
        replaced=tuple(sorted((ours & there.files.keys()) - same)),
        removed=tuple(sorted(removed)),
        kept=tuple(sorted(there.files.keys() - removed - (ours - same))),
        others=tuple(sorted(weights - removed)),
    )


def look(target: Target, say: Say = lambda text: None) -> There:
    """Return what the branch holds now; of a branch that is not there what it would begin with. Changes nothing."""
    return _patiently(target, lambda: _look(target), say)


def _look(target: Target) -> There:
    from huggingface_hub import errors

    api = target.api()
    try:
        try:
            info = api.model_info(target.repo, revision=target.branch)
        except errors.RevisionNotFoundError:
            info = api.model_info(target.repo)
    except errors.RepositoryNotFoundError:
        return There()
    commit = info.sha or ""
    tree = remote_tree(target, commit)
    card = _text(target, CARD_NAME, commit, MAX_CARD_BYTES).decode("utf-8", "replace") if CARD_NAME in tree else ""
    named = _named(target, commit, tree) if any(n.endswith(".safetensors") for n in tree) else frozenset()
    return There(commit, tree, info.private, card, named)


def _named(target: Target, commit: str, tree: Mapping[str, tuple[int, str]]) -> frozenset[str]:
    """Return the shards that the Hub's own manifest and index files name, of those that are there."""
    found: set[str] = set()
    for folder in ("", *DRAFTER_FOLDERS):
        name = folder + INDEX_NAME
        if name in tree:
            with suppress(InputError):  # one that cannot be read names nothing
                raw = _text(target, name, commit, MAX_SMALL_BYTES)
                found |= {folder + f for f in headers.parse_index(raw, name).values()}
    if MANIFEST_NAME in tree:
        with suppress(InputError):
            table = strict_json.loads(_text(target, MANIFEST_NAME, commit, manifest.MAX_BYTES), MANIFEST_NAME)
            rows = table.get("files") if isinstance(table, dict) else None
            names = [r.get("name") for r in rows if isinstance(r, dict)] if isinstance(rows, list) else []
            found |= {n for n in names if isinstance(n, str)}
    return frozenset(n for n in found & tree.keys() if n.endswith(".safetensors"))


def _text(target: Target, name: str, commit: str, limit: int) -> bytes:
    """Return the bytes of a file of the repo. Raises `InputError` where there are more than `limit`."""
    from huggingface_hub import constants, get_session, hf_hub_url
    from huggingface_hub.utils import (  # type: ignore[attr-defined,unused-ignore]
        build_hf_headers,
        hf_raise_for_status,
    )

    url = hf_hub_url(target.repo, name, revision=commit, endpoint=target.endpoint)
    wait, head = constants.HF_HUB_DOWNLOAD_TIMEOUT, build_hf_headers(token=target.token)
    raw = bytearray()
    with get_session().stream("GET", url, headers=head, timeout=wait, follow_redirects=True) as answer:
        hf_raise_for_status(answer)
        for piece in answer.iter_bytes(1 << 20):
            raw += piece
            if len(raw) > limit:
                raise InputError(f"{target.repo}: {show(name)}: more than {limit:,} bytes on the Hub")
    return bytes(raw)


def upload(
    package: Package,
    target: Target,
    jobs: int,
    say: Say,
    progress: Progress,
    delete_others: bool = False,
    card: str | None = None,
) -> Sent:
    """Bring the Hub's branch to hold the files. Raises `EnvironmentFault`; the same call goes on from there.

    `card` is the text of the Hub's card that the package's was made for, if that is known: another one that comes
    meanwhile is not replaced.
    """
    from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined,unused-ignore]

    disable_progress_bars()
    sent, done = Sent(), _Done(target)

    def once() -> None:
        _create(target)
        there = _look(target)
        if target.private and there.private is False:
            raise OutputError(
                f"{target.repo}: is there already, and public",
                hint="make it private on its page first, or leave out --private. Nothing was sent",
            )
        if card is not None and there.card not in {card, package.card}:
            raise OutputError(
                f"{target.repo}: {CARD_NAME} was edited on the Hub just now", hint="run the same command again"
            )
        sent.changes = changes(package, there, delete_others)
        _bring(package, target, jobs, there, sent, done, progress)

    _patiently(target, once, say)
    Published(target).write(package.card)
    return sent


def _patiently(target: Target, work: Callable[[], T], say: Say) -> T:
    """Return what `work` returns; failures that may pass are met with another try, a few times."""
    patience = Patience(ROUNDS, first_s=0.15)
    while True:
        try:
            return work()
        except Exception as e:
            asked = is_passing(e)
            wait = None if asked is None else patience.wait(asked)
            if wait is None:
                with hub_errors(target.repo):
                    raise
            say(f"{target.repo}: the Hub failed for now ({type(e).__name__}); going on in {wait:.0f} s")
            time.sleep(wait)


def _create(target: Target) -> None:
    api = target.api()
    api.create_repo(target.repo, private=target.private or None, exist_ok=True)
    if target.branch != "main":
        api.create_branch(target.repo, branch=target.branch, exist_ok=True)


def remote_tree(target: Target, revision: str) -> dict[str, tuple[int, str]]:
    """Return name -> (size, sha256 of large files or git's id of the others) of all files at a revision."""
    from huggingface_hub.hf_api import RepoFile

    rows = target.api().list_repo_tree(target.repo, recursive=True, revision=revision)
    files = [r for r in rows if isinstance(r, RepoFile)]
    return {f.path: (f.size, f.lfs.sha256 if f.lfs else f.blob_id) for f in files}


def _same(file: LocalFile, remote: tuple[int, str] | None) -> bool:
    return remote is not None and remote[0] == file.size and remote[1] in {file.sha256, file.git or file.sha256}


def _bring(
    package: Package, target: Target, jobs: int, there: There, sent: Sent, done: _Done, progress: Progress
) -> None:
    """One round: send what is missing, commit."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    api, head, stale = target.api(), there.commit, sent.changes.removed
    missing = [f for f in package.files if not _same(f, there.files.get(f.name))]
    progress(package.size - sum(f.size for f in missing))
    if not missing and not stale:
        sent.commit = head
        return

    def send(file: LocalFile) -> CommitOperationAdd:
        add = CommitOperationAdd(path_in_repo=file.name, path_or_fileobj=str(file.path))
        if add.upload_info.sha256.hex() != file.sha256:
            raise OutputError(
                f"{file.path}: was changed while it was being published", hint="verify the folder and repeat"
            )
        api.preupload_lfs_files(target.repo, [add], revision=target.branch, num_threads=1, free_memory=False)
        if done.add(file.sha256):
            sent.bytes += file.size
        progress(file.size)
        return add

    with ThreadPoolExecutor(jobs) as pool:
        operations: list[CommitOperationAdd | CommitOperationDelete] = list(pool.map(send, missing))
    operations += [CommitOperationDelete(path_in_repo=n) for n in stale]
    made = api.create_commit(
        target.repo, operations, commit_message=COMMIT_MESSAGE, revision=target.branch, parent_commit=head
    )
    sent.commit = made.oid
    done.clear()


def _place(target: Target, what: str) -> Path:
    """Return where a fact about a repo is kept, in the client's own folder."""
    from huggingface_hub import constants

    name = hashlib.sha256(f"{target.endpoint or constants.ENDPOINT}\n{target.repo}".encode()).hexdigest()[:32]
    return Path(constants.HF_HOME) / "ds4convert" / what / name


class _Done:
    """The digests of files that were sent to a repo since its last commit, so that `bytes_sent` counts no file twice.

    Kept in the client's own folder; losing it costs nothing but that count.
    """

    def __init__(self, target: Target) -> None:
        self.path = _place(target, "sent")
        self._names: set[str] = set()
        self._lock = threading.Lock()
        with suppress(ValueError, TypeError):
            self._names = set(strict_json.plain(read_own(self.path.parent, self.path.name)))

    def add(self, digest: str) -> bool:
        """Remember one; return whether it is new."""
        with self._lock, suppress(OSError):
            if digest in self._names:
                return False
            self._names.add(digest)
            disk = Disk()
            disk.make_folder(self.path.parent)
            disk.write_file(self.path, json.dumps(sorted(self._names)).encode())
        return True

    def clear(self) -> None:
        """Forget all: the commit has them."""
        self._names.clear()
        with suppress(OSError):
            Disk().remove(self.path)


class Published:
    """The digest of the card that was last sent to a repo from this machine, in the client's own folder.

    Losing it costs nothing but that a card without digests of its own counts as another's.
    """

    def __init__(self, target: Target) -> None:
        self.path = _place(target, "cards")

    def write(self, text: str) -> None:
        """Remember what was sent."""
        with suppress(OSError):
            disk = Disk()
            disk.make_folder(self.path.parent)
            disk.write_file(self.path, hashlib.sha256(text.encode()).hexdigest().encode())

    def was(self, text: str) -> bool:
        """Return whether `text` is what was last sent."""
        with suppress(OSError, ValueError):
            return self.path.read_text() == hashlib.sha256(text.encode()).hexdigest()
        return False


def compare(
    package: Package,
    target: Target,
    commit: str,
    say: Say = lambda text: None,
    others: Sequence[str] = (),
) -> list[str]:
    """Return what differs between the package and the Hub's files at a commit: by name, size and digest.

    `others` are files of the Hub that are known not to be of this folder, and stay.
    """
    tree = _patiently(target, lambda: remote_tree(target, commit), say)
    return list(_differences(package.files, {n: f for n, f in tree.items() if n not in set(others)}))


def _differences(files: Sequence[LocalFile], tree: Mapping[str, tuple[int, str]]) -> Iterable[str]:
    for file in files:
        found = tree.get(file.name)
        if found is None:
            yield f"{file.name}: not on the Hub"
        elif found[0] != file.size:
            yield f"{file.name}: {found[0]} bytes on the Hub, expected {file.size}"
        elif not _same(file, found):
            yield f"{file.name}: the Hub has {show(found[1])}, expected {file.sha256}"
    names = {f.name for f in files}
    for name in sorted(tree.keys() - names):
        if name.endswith(".safetensors"):
            yield f"{show(name)}: on the Hub, but not of this folder; hosts would load it"


def facts(package: Package, target: Target, sent: Sent, differences: list[str]) -> dict[str, Any]:
    """Return what the command reports."""
    return {
        "repo": target.repo,
        "revision": sent.commit,
        "files": len(package.files),
        "bytes": package.size,
        "bytes_sent": sent.bytes,
        "verified": not differences and not package.problems,
        "differences": differences,
        "problems": list(package.problems),
        "added": list(sent.changes.added),
        "replaced": list(sent.changes.replaced),
        "removed": list(sent.changes.removed),
        "kept": list(sent.changes.kept),
        "others": list(sent.changes.others),
        "not_published": list(package.strays),
    }
