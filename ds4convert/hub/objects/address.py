"""What names a folder of an object store: `s3://BUCKET/FOLDER`, `gs://BUCKET/FOLDER`, `az://CONTAINER/FOLDER`."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ds4convert.errors import UsageError
from ds4convert.words.terminal import show

SCHEMES = ("s3", "gs", "az")
EXPECTED = "expected s3://BUCKET/FOLDER, gs://BUCKET/FOLDER or az://CONTAINER/FOLDER"
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,221}")


@dataclass(frozen=True)
class Address:
    """A folder of a bucket; `folder` is empty for the bucket's top."""

    scheme: str
    bucket: str
    folder: str

    def __str__(self) -> str:
        return f"{self.scheme}://{self.bucket}{'/' if self.folder else ''}{self.folder}"


def is_address(src: str) -> bool:
    """Return whether `src` names a folder of an object store, well or badly."""
    found = _SCHEME.match(src)
    return found is not None and found[1].lower() in SCHEMES


def parse(src: str) -> Address:
    """Return the folder that an address names. Raises `UsageError`."""
    scheme, _, rest = src.partition("://")
    bucket, _, folder = rest.partition("/")
    parts = [p for p in folder.split("/") if p]
    if not _BUCKET.fullmatch(bucket):
        raise UsageError(f"{show(src)}: names no bucket; {EXPECTED}")
    if not folder.isprintable() or any(p in {".", ".."} for p in parts) or any(c in folder for c in "?#\\"):
        raise UsageError(f"{show(src)}: the folder has parts that no object's name has here; {EXPECTED}")
    return Address(scheme.lower(), bucket, "/".join(parts))


def place_of_result(out: str) -> Address | None:
    """Return the folder of a store that `out` names, None for a folder here. Raises `UsageError` for what is neither.

    What looks like an address and names no such folder is never taken for a path.
    """
    if is_address(out):
        return parse(out)
    found = _SCHEME.match(out)
    if found is None:
        return None
    hint = " (`ds4convert publish` sends a finished folder to the Hub)" if found[1].lower() == "hf" else ""
    raise UsageError(
        f"{show(out)}: a result is written to a folder of this machine or of an object store{hint}; {EXPECTED}"
    )
