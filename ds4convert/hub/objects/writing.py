"""Putting objects into a store, each only where there is none of that name: nothing there is ever replaced.

S3 takes `If-None-Match: *` with PutObject and answers 412 PreconditionFailed where an object has the name, and 409
ConditionalRequestConflict where another request for the name came between, after which the upload is to be tried again
(https://docs.aws.amazon.com/AmazonS3/latest/userguide/conditional-writes.html). obstore says AlreadyExists of both, so
a look at the name tells them apart: where nothing is there, the put is tried again.

A create-only request holds the whole object; no upload in parts can be made so with obstore. The bytes are mapped, not
read into memory. obstore signs an S3 request with the sha256 of its bytes, so S3 refuses bytes that were altered on
the way.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, wait
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ds4convert.errors import EnvironmentFault, InputError
from ds4convert.hub.objects.address import Address
from ds4convert.hub.objects.store import AGAIN, MOST_FILES, first_line, opened, told_as_ours
from ds4convert.storage.patience import Patience
from ds4convert.storage.safe_open import open_file

T = TypeVar("T")

MOST_BYTES = {"s3": 5 << 30, "gs": 5 << 40, "az": 5000 << 20}
"""The largest object of one request: S3 PutObject 5 GiB
(https://docs.aws.amazon.com/AmazonS3/latest/userguide/upload-objects.html), Google's 5 TiB, Azure's Put Blob 5,000
MiB."""

SLOWEST_BYTES = 250_000
"""Bytes of a second that an uplink carries at least: a request of more time is given up, and tried again."""

LOOK_S = 0.2
_MD5 = re.compile(r'"?([0-9a-f]{32})"?')


@dataclass(frozen=True)
class Stored:
    """An object as the store tells of it."""

    size: int
    etag: str


class Writer:
    """A folder of a store that objects are put into. As plain data it is its address."""

    def __init__(self, address: Address) -> None:
        self.address = address
        self._stores: dict[int, Any] = {}

    def __reduce__(self) -> tuple[type[Writer], tuple[Address]]:
        """Return how another process makes it."""
        return type(self), (self.address,)

    def _store(self, size: int = 0) -> Any:
        """Return obstore's store with the time that so many bytes take at most."""
        seconds = 60 + size // SLOWEST_BYTES
        if seconds not in self._stores:
            self._stores[seconds] = opened(self.address, seconds)
        return self._stores[seconds]

    def _told(self, name: str, done: str) -> Any:
        where = f"{self.address}: {name}" if name else str(self.address)
        return _environment(told_as_ours(where, self.address, done=done))

    def listed(self) -> dict[str, Stored]:
        """Return all objects of the folder and below it, by name. Raises `EnvironmentFault` without a bucket."""
        store = self._store()  # first of all, as it says what to install where obstore is missing
        import obstore

        out: dict[str, Stored] = {}
        with self._told("", "read"):
            for batch in obstore.list(store):
                out |= {str(m["path"]): Stored(int(m["size"]), m["e_tag"] or "") for m in batch}
                if len(out) > MOST_FILES:
                    break
        return out

    def look(self, name: str) -> Stored | None:
        """Return what lies under a name, None where there is nothing."""
        import obstore
        from obstore.exceptions import NotFoundError

        with self._told(name, "read"):
            try:
                meta = obstore.head(self._store(), name)
            except (NotFoundError, FileNotFoundError):
                return None
        return Stored(int(meta["size"]), meta["e_tag"] or "")

    def read(self, name: str, most: int) -> bytes | None:
        """Return the bytes of a small object, None where there is none or it has more than `most`."""
        import obstore

        found = self.look(name)
        if found is None or found.size > most:
            return None
        with self._told(name, "read"):
            return bytes(obstore.get(self._store(), name).bytes())

    def put_new(self, name: str, data: bytes | mmap.mmap) -> bool:
        """Put an object where there is none of that name; return False, and leave it, where there is one."""
        import obstore
        from obstore.exceptions import AlreadyExistsError, GenericError

        patience = Patience()
        told: Exception
        while True:
            try:
                obstore.put(self._store(len(data)), name, data, mode="create")
            except AlreadyExistsError as e:
                if self.look(name) is not None:
                    return False
                told = e  # 409: somebody else's request came between, and left nothing
            except GenericError as e:
                told = e
            except Exception:
                with self._told(name, "written"):
                    raise
            else:
                return True
            if not patience.again():
                raise EnvironmentFault(f"{self.address}: {name}: cannot be written ({first_line(told)}). {AGAIN}")

    def delete(self, names: list[str]) -> None:
        """Remove objects of ours."""
        import obstore

        with self._told(names[0] if names else "", "removed"):
            obstore.delete(self._store(), names)

    def is_same(self, name: str, there: Stored, data: bytes | mmap.mmap) -> bool:
        """Return whether an object has these bytes: by its ETag where that is their MD5, else it is read back."""
        if there.size != len(data):
            return False
        return is_md5(there.etag, data) or self._reads_back(name, there, data)

    def _reads_back(self, name: str, there: Stored, data: bytes | mmap.mmap) -> bool:
        import obstore
        from obstore.exceptions import GenericError

        at, patience = 0, Patience()
        while at < there.size:
            try:
                with self._told(name, "read"):
                    options: Any = {"if_match": there.etag, "range": (at, there.size)}
                    for piece in obstore.get(self._store(there.size), name, options=options).stream(1 << 20):
                        got = bytes(piece)
                        if data[at : at + len(got)] != got:
                            return False
                        at += len(got)
                        patience.progress()
            except (GenericError, EnvironmentFault):
                if not patience.again():
                    raise
        return True


@contextmanager
def _environment(told: Any) -> Iterator[None]:
    """Have a bucket that is missing be a fault of the environment: nothing is wrong with the source."""
    try:
        with told:
            yield
    except InputError as e:
        raise EnvironmentFault(f"{e}; a bucket is not made here: make it, or correct its name") from None


def is_md5(etag: str, data: bytes | mmap.mmap) -> bool:
    """Return whether an ETag is the MD5 of these bytes, as S3 has it of objects put in one request and encrypted with
    S3's own keys or none (https://docs.aws.amazon.com/AmazonS3/latest/API/API_Object.html). It is no secret's guard.
    """
    found = _MD5.fullmatch(etag)
    return found is not None and hashlib.md5(data, usedforsecurity=False).hexdigest() == found[1]


@contextmanager
def mapped(path: Path) -> Iterator[bytes | mmap.mmap]:
    """Yield the bytes of a file, which the system reads as they are used."""
    fd = open_file(path, path.name)
    with os.fdopen(fd, "rb") as f:
        if not os.fstat(fd).st_size:
            yield b""
            return
        with closing(mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)) as data:
            yield data


def while_looking(work: Callable[[], T], look: Callable[[], None]) -> T:
    """Return what `work` returns, done on a thread that is left behind where `look`, called now and then, raises."""
    found: Future[T] = Future()

    def run() -> None:
        try:
            found.set_result(work())
        except BaseException as e:
            found.set_exception(e)

    threading.Thread(target=run, daemon=True).start()
    while not wait([found], timeout=LOOK_S).done:
        look()
    return found.result()


def too_large(sizes: Mapping[str, int], scheme: str) -> str | None:
    """Return the name of a file that one request cannot hold, None where there is none."""
    with suppress(ValueError):
        return max((n for n, size in sizes.items() if size > MOST_BYTES[scheme]), key=sizes.__getitem__)
    return None
