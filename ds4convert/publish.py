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
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ds4convert.errors import OutputError
from ds4convert.files import Disk
from ds4convert.hub_errors import hub_errors, is_passing
from ds4convert.publication import LocalFile, Package
from ds4convert.strictjson import show

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

ROUNDS = 5
LONGEST_WAIT_S = 20.0
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


@dataclass
class Sent:
    """What a run did: the commit that the branch is at, and the bytes that were sent."""

    commit: str = ""
    bytes: int = 0
    removed: list[str] = field(default_factory=list)


def upload(package: Package, target: Target, jobs: int, say: Say, progress: Progress) -> Sent:
    """Bring the Hub's branch to hold the files. Raises `EnvironmentFault`; the same call goes on from there."""
    from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined,unused-ignore]

    disable_progress_bars()
    sent, done = Sent(), _Done(target)

    def once() -> None:
        _create(target)
        _bring(package, target, jobs, sent, done, progress)

    _patiently(target, once, say)
    return sent


def _patiently(target: Target, work: Callable[[], T], say: Say) -> T:
    """Return what `work` returns; failures that may pass are met with another try, a few times."""
    for round_ in range(ROUNDS):
        try:
            return work()
        except Exception as e:
            wait = is_passing(e)
            if wait is None or round_ == ROUNDS - 1:
                with hub_errors(target.repo):
                    raise
            say(f"{target.repo}: the Hub failed for now ({type(e).__name__}); going on")
            time.sleep(min(LONGEST_WAIT_S, max(wait, 0.3 * 2**round_)))
    raise AssertionError("unreachable")


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


def _bring(package: Package, target: Target, jobs: int, sent: Sent, done: _Done, progress: Progress) -> None:
    """One round: list, send what is missing, commit."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    api = target.api()
    info = api.model_info(target.repo, revision=target.branch)
    if target.private and info.private is False:
        raise OutputError(
            f"{target.repo}: is there already, and public; make it private on its page first, or leave out --private. "
            "Nothing was sent"
        )
    head = info.sha or ""
    tree = remote_tree(target, head)
    missing = [f for f in package.files if not _same(f, tree.get(f.name))]
    # A shard that is left from another conversion would be loaded with the new ones.
    stale = sorted(n for n in tree.keys() - {f.name for f in package.files} if n.endswith(".safetensors"))
    progress(package.size - sum(f.size for f in missing))
    if not missing and not stale:
        sent.commit = head
        return

    def send(file: LocalFile) -> CommitOperationAdd:
        add = CommitOperationAdd(path_in_repo=file.name, path_or_fileobj=str(file.path))
        if add.upload_info.sha256.hex() != file.sha256:
            raise OutputError(f"{file.path}: was changed while it was being published; verify the folder and repeat")
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
    sent.commit, sent.removed = made.oid, stale
    done.clear()


class _Done:
    """The digests of files that were sent to a repo since its last commit, so that `bytes_sent` counts no file twice.

    Kept in the client's own folder; losing it costs nothing but that count.
    """

    def __init__(self, target: Target) -> None:
        from huggingface_hub import constants

        place = hashlib.sha256(f"{target.endpoint or constants.ENDPOINT}\n{target.repo}".encode()).hexdigest()[:32]
        self.path = Path(constants.HF_HOME) / "ds4convert" / "sent" / place
        self._names: set[str] = set()
        self._lock = threading.Lock()
        with suppress(OSError, ValueError):
            self._names = set(json.loads(self.path.read_text()))

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


def compare(package: Package, target: Target, commit: str, say: Say = lambda text: None) -> list[str]:
    """Return what differs between the package and the Hub's files at a commit: by name, size and digest."""
    tree = _patiently(target, lambda: remote_tree(target, commit), say)
    return list(_differences(package.files, tree))


def _differences(files: Iterable[LocalFile], tree: Mapping[str, tuple[int, str]]) -> Iterable[str]:
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
        "removed": sent.removed,
        "not_published": list(package.strays),
    }
