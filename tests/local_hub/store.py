"""What the local Hub keeps, in one folder: blobs by sha256, commits and repos as JSON. Nothing else is remembered.

    blobs/ab/abcd...      content, named by its sha256 (a hard link to the caller's file where one was given)
    repos/OWNER--NAME/    repo.json (settings, branches, tags) and commits/OID.json (parent, title, files)
    incoming/             uploads under way

Every change is a rename under a lock, so the server may be killed at any time.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

LARGE = (".safetensors", ".bin", ".gguf", ".npz", ".npy", ".pt", ".pth", ".model", ".zip", ".tar", ".gz")
LARGE_BYTES = 10 << 20
"""Files with such an ending or of this size are large files (LFS); the others are ordinary git blobs."""


@dataclass(frozen=True)
class Entry:
    """One file: `oid` is git's id of the blob, or of the pointer where it is a large file."""

    sha256: str
    size: int
    oid: str
    lfs: bool

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.oid


@dataclass(frozen=True)
class Commit:
    oid: str
    parent: str | None
    title: str
    description: str
    number: int
    files: dict[str, Entry]

    @property
    def date(self) -> str:
        """Return a made-up date that rises by a second with every commit."""
        return f"2026-01-01T{self.number // 3600 % 24:02}:{self.number // 60 % 60:02}:{self.number % 60:02}.000Z"


@dataclass
class Repo:
    name: str
    private: bool = False
    gated: bool = False
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)


class Missing(Exception):
    """No such repo, revision or file: `code` is what the Hub puts into X-Error-Code."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class Conflict(Exception):
    """The branch is not at the commit that the change was made for, or the repo exists already."""


def git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def pointer(sha256: str, size: int) -> bytes:
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()


def is_large(path: str, size: int) -> bool:
    return size > 0 and (path.endswith(LARGE) or size >= LARGE_BYTES)


def is_safe(path: str) -> bool:
    """Say whether git would take `path`: relative, without empty parts, dots or control characters."""
    parts = path.split("/")
    return all(p not in ("", ".", "..", ".git") for p in parts) and path.isprintable() and "\\" not in path


class Store:
    def __init__(self, root: Path) -> None:
        self.root = root
        for folder in ("blobs", "repos", "incoming"):
            (root / folder).mkdir(parents=True, exist_ok=True)

    @contextmanager
    def lock(self) -> Iterator[None]:
        with (self.root / "lock").open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    # Blobs

    def blob(self, sha256: str) -> Path:
        return self.root / "blobs" / sha256[:2] / sha256

    def incoming(self) -> Path:
        return self.root / "incoming" / uuid.uuid4().hex

    def keep(self, temporary: Path, sha256: str) -> None:
        """Move a complete file, whose sha256 has been checked, to its place."""
        target = self.blob(sha256)
        target.parent.mkdir(exist_ok=True)
        temporary.replace(target)

    def add_bytes(self, data: bytes) -> str:
        sha256, temporary = hashlib.sha256(data).hexdigest(), self.incoming()
        temporary.write_bytes(data)
        self.keep(temporary, sha256)
        return sha256

    def add_file(self, path: Path) -> str:
        """Take a file by hard link (symbolic link on another file system); it must not be changed in place after."""
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        temporary = self.incoming()
        try:
            os.link(path.resolve(), temporary)
        except OSError:
            temporary.symlink_to(path.resolve())
        self.keep(temporary, sha256)
        return sha256

    def entry(self, path: str, sha256: str, large: bool | None = None) -> Entry:
        blob = self.blob(sha256)
        size = blob.stat().st_size
        lfs = is_large(path, size) if large is None else large
        return Entry(sha256, size, git_oid(pointer(sha256, size) if lfs else blob.read_bytes()), lfs)

    # Repos

    def folder(self, name: str) -> Path:
        return self.root / "repos" / name.replace("/", "--")

    def _write(self, path: Path, value: Any) -> None:
        temporary = self.incoming()
        temporary.write_text(json.dumps(value))
        temporary.replace(path)

    def save(self, repo: Repo) -> None:
        self._write(self.folder(repo.name) / "repo.json", asdict(repo))

    def repo(self, name: str) -> Repo:
        try:
            return Repo(**json.loads((self.folder(name) / "repo.json").read_text()))
        except FileNotFoundError:
            raise Missing("RepoNotFound", f"Repository {name} not found") from None

    def create(self, name: str, private: bool = False, gated: bool = False) -> Repo:
        with self.lock():
            if (self.folder(name) / "repo.json").exists():
                raise Conflict("You already created this model repo")
            (self.folder(name) / "commits").mkdir(parents=True, exist_ok=True)
            repo = Repo(name, private, gated)
            self.save(repo)
            return repo

    def delete(self, name: str) -> None:
        with self.lock():
            self.repo(name)
            shutil.rmtree(self.folder(name))

    # Commits

    def commit_of(self, repo: Repo, revision: str) -> Commit:
        """Return the commit of a branch, a tag or a full commit id."""
        oid = repo.branches.get(revision) or repo.tags.get(revision) or revision
        path = self.folder(repo.name) / "commits" / f"{oid}.json"
        if not oid.isalnum() or not path.exists():
            raise Missing("RevisionNotFound", f"Invalid rev id: {revision}")
        value = json.loads(path.read_text())
        return Commit(**{**value, "files": {k: Entry(**v) for k, v in value["files"].items()}})

    def history(self, repo: Repo, commit: Commit) -> Iterator[Commit]:
        """Yield the commit and those before it, newest first."""
        yield commit
        while commit.parent:
            commit = self.commit_of(repo, commit.parent)
            yield commit

    def commit(
        self,
        name: str,
        branch: str,
        files: dict[str, Entry],
        title: str,
        description: str = "",
        parent: str | None = None,
    ) -> Commit:
        """Put `files`, the whole new tree, on a branch. Call it under the lock."""
        repo = self.repo(name)
        head = repo.branches.get(branch)
        if parent is not None and parent != head:
            raise Conflict("A commit has happened since. Please refresh and try again.")
        number = self.commit_of(repo, head).number + 1 if head else 0
        body = {"parent": head, "title": title, "description": description, "number": number}
        body["files"] = {k: asdict(v) for k, v in sorted(files.items())}
        oid = hashlib.sha1(json.dumps([name, body]).encode()).hexdigest()
        self._write(self.folder(name) / "commits" / f"{oid}.json", {"oid": oid} | body)
        repo.branches[branch] = oid
        self.save(repo)
        return self.commit_of(repo, oid)
