"""Requests to an object store, through the library obstore: listing a folder, and reading ranges of an object.

Every read names the ETag that was listed (`If-Match`), so that the store itself refuses an object that has changed
since (HTTP 412). obstore tries again where a store asks for patience (503 SlowDown, and other answers 5xx). The ETag
tells versions apart and nothing more: of an upload in parts it is no digest of the bytes.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, ClassVar

from ds4convert.errors import EnvironmentFault, HeaderError, InputError
from ds4convert.hub.objects.address import Address
from ds4convert.hub.records import RemoteFile, check_name
from ds4convert.storage.belonging import belongs
from ds4convert.storage.local_files import SourceChanged
from ds4convert.storage.patience import Patience
from ds4convert.words.terminal import show

RIGHTS = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (AWS_SESSION_TOKEN, AWS_REGION, AWS_ENDPOINT_URL where needed), "
    "or AWS_SKIP_SIGNATURE=true for a public bucket",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS, the path of a key file",
    "az": "AZURE_STORAGE_ACCOUNT_NAME with AZURE_STORAGE_ACCOUNT_KEY or AZURE_STORAGE_SAS_TOKEN",
}
"""Where each kind of store finds the user's rights: in the environment (the variables that obstore reads)."""

AGAIN = "Run the same command again: what is finished stays"
RETRIES, RETRY_S = 6, 90
MOST_FILES = 10_000
"""Objects of one folder that are listed at most: a checkpoint has hundreds."""


@dataclass(frozen=True)
class ObjectFolder:
    """A folder of an object store as it was listed: its files, each with its ETag; `store` is obstore's."""

    kind: ClassVar[str] = "store"

    address: Address
    files: tuple[RemoteFile, ...]
    store: Any

    @property
    def name(self) -> str:
        """Return the address."""
        return str(self.address)

    def shards(self) -> list[RemoteFile]:
        """Return the safetensors files of the folder."""
        return [f for f in self.files if f.name.endswith(".safetensors") and belongs(f.name)]


def opened(address: Address, timeout_s: int | None = None) -> Any:
    """Return obstore's store of a folder, with its time for one request where that is not obstore's own.

    Raises `EnvironmentFault` without the library.
    """
    try:
        from obstore import store
    except ImportError:
        raise EnvironmentFault(
            f"{address}: object stores need the library obstore: install ds4convert with its extra, "
            "pip install 'ds4convert[objects]'"
        ) from None
    client: Any = {} if timeout_s is None else {"timeout": timedelta(seconds=timeout_s)}
    plain = any(os.environ.get(k, "").startswith("http://") for k in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"))
    more: dict[str, Any] = {
        "prefix": address.folder or None,
        "retry_config": {"max_retries": RETRIES, "retry_timeout": timedelta(seconds=RETRY_S)},
    }
    with told_as_ours(str(address), address):
        if address.scheme == "s3":
            return store.S3Store(
                address.bucket, client_options=client | ({"allow_http": True} if plain else {}), **more
            )
        kind = store.GCSStore if address.scheme == "gs" else store.AzureStore
        return kind(address.bucket, client_options=client, **more)


def listed(address: Address) -> ObjectFolder:
    """Return a folder of a store with its files. Raises `InputError` where it holds none."""
    store = opened(address)
    import obstore

    with told_as_ours(str(address), address):
        found = obstore.list_with_delimiter(store)["objects"]
    if len(found) > MOST_FILES:
        raise InputError(f"{address}: holds {len(found):,} files, expected at most {MOST_FILES:,}; name a checkpoint's")
    files = []
    for meta in found:
        name = str(meta["path"]).rpartition("/")[2]
        check_name(name, str(address))
        if not (etag := meta["e_tag"]):
            raise EnvironmentFault(f"{address}: {show(name)}: the store tells no ETag, so a change would go unseen")
        files.append(RemoteFile(name, int(meta["size"]), etag, None))
    if not files:
        raise InputError(f"{address}: holds no files; is the address right? A folder is named without its files")
    return ObjectFolder(address, tuple(sorted(files, key=lambda f: f.name)), store)


def read_range(folder: ObjectFolder, file: RemoteFile, start: int, size: int) -> Iterator[bytes]:
    """Yield the bytes `start .. start + size` of an object in pieces; a cut connection goes on where it broke off.

    Raises `SourceChanged` where the object is not the one that was listed.
    """
    import obstore
    from obstore.exceptions import GenericError

    done, patience = 0, Patience()
    while done < size:
        try:
            with told_as_ours(f"{folder.name}: {file.name}", folder.address, (file, GenericError)):
                options: Any = {"if_match": file.etag, "range": (start + done, start + size)}
                answer = obstore.get(folder.store, file.name, options=options)
                if answer.meta["size"] != file.size:
                    raise SourceChanged(file.name, f"{answer.meta['size']} bytes, {file.size} before")
                for piece in answer.stream(min_chunk_size=1 << 20):
                    data = bytes(piece)[: size - done]
                    done += len(data)
                    patience.progress()
                    yield data
            if done < size:
                raise GenericError("the connection was cut")
        except GenericError as e:
            if not patience.again():
                raise EnvironmentFault(f"{folder.name}: {file.name}: {first_line(e)}. {AGAIN}") from None


@contextmanager
def told_as_ours(
    where: str, address: Address, reading: tuple[RemoteFile, type[Exception]] | None = None, done: str = "read"
) -> Iterator[None]:
    """Turn obstore's errors into ours. Where a file is read, one that a further try may mend is left as it is.

    `done` is what is done there, for an error to say.
    """
    from obstore import exceptions as theirs

    try:
        yield
    except (theirs.PermissionDeniedError, theirs.UnauthenticatedError) as e:
        raise _refused(where, address, e, done) from None
    except theirs.PreconditionError:
        assert reading is not None
        raise SourceChanged(reading[0].name, f"its ETag is no longer {show(reading[0].etag)}") from None
    except (theirs.NotFoundError, FileNotFoundError) as e:
        if reading is not None:
            raise HeaderError(f"{where}: is no longer there; it is being changed. {AGAIN}") from None
        raise _missing(where, e) from None
    except theirs.GenericError as e:
        if reading is not None:
            raise
        status = _STATUS.search(str(e))  # of a listing that fails, the kind of error tells nothing
        if status is not None and status[1] in {"401", "403"}:
            raise _refused(where, address, e, done) from None
        if status is not None and status[1] == "404":
            raise _missing(where, e) from None
        raise EnvironmentFault(
            f"{where}: the store cannot be reached ({first_line(e)}). Address and rights are taken from the "
            f"environment: {RIGHTS[address.scheme]}"
        ) from None
    except theirs.BaseError as e:
        raise EnvironmentFault(f"{where}: {first_line(e)}. {AGAIN}") from None


_STATUS = re.compile(r"status code: (\d{3})\b")


def _refused(where: str, address: Address, e: BaseException, done: str) -> EnvironmentFault:
    return EnvironmentFault(
        f"{where}: the store refuses to let this be {done} ({first_line(e)}). Rights are taken from the environment: "
        f"{RIGHTS[address.scheme]}"
    )


def _missing(where: str, e: BaseException) -> InputError:
    return InputError(f"{where}: there is no such bucket or folder ({first_line(e)})")


def first_line(e: BaseException) -> str:
    """Return what obstore says, without the store's XML and the lines for its developers."""
    first = (str(e).strip().splitlines() or [type(e).__name__])[0]
    return show(first.partition("<?xml")[0].rstrip(": "), 300)
