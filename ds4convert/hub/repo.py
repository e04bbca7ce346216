"""A checkpoint on the Hugging Face Hub: its files at one commit, its small files, byte ranges of the others.

Listing and whole files are left to huggingface_hub. Ranges are own requests with its session, headers and endpoint;
each answer has to be exactly the range asked for, of the file that the listing describes. Names of a repo are
untrusted: one that could leave a folder, or that some system takes for a device, refuses the repo.
"""

from __future__ import annotations

import re
import unicodedata
from typing import Any
from urllib.parse import quote

from ds4convert.checkpoint.folder import MAX_FILES
from ds4convert.checkpoint.types import JSON
from ds4convert.errors import EnvironmentFault, InputError
from ds4convert.hub import cache
from ds4convert.hub.errors import AGAIN, CHECK
from ds4convert.hub.http import Again, bounded, get
from ds4convert.hub.names import split_name
from ds4convert.hub.records import RemoteFile, Repo, check_name
from ds4convert.storage import strict_json
from ds4convert.storage.patience import Patience
from ds4convert.words.terminal import show

MAX_LISTING_BYTES = 32 << 20

NO_HUB = (
    "Is HF_ENDPOINT (or --endpoint) the Hub? Some mirrors leave out what is needed here: unset it, or download the "
    "repo with the mirror's own tool and name the folder"
)
COMMIT = re.compile(r"[0-9a-f]{40}")
SHA256 = re.compile(r"[0-9a-f]{64}")
DIGEST = re.compile(r"[0-9a-f]{40}([0-9a-f]{24})?")


def open_repo(src: str, revision: str | None = None, endpoint: str | None = None, token: str | None = None) -> Repo:
    """Return the files of a repo at the commit that its revision (default: main) names now: one request.

    In offline mode (HF_HUB_OFFLINE) it is what lies in the Hub client's own cache.
    """
    from huggingface_hub import constants

    name, revision = split_name(src, revision, endpoint)
    if constants.is_offline_mode():
        return cache.repo_in_cache(name, revision or "main")
    base = (endpoint or constants.ENDPOINT).rstrip("/")
    url = f"{base}/api/models/{name}/revision/{quote(revision or 'main', safe='')}?blobs=true"
    return _listed(name, _listing(url, name, token), endpoint, token)


def _listing(url: str, name: str, token: str | None) -> JSON:
    patience = Patience()
    while True:
        try:
            with get(url, name, token, {"accept": "application/json"}) as (answer, _):
                raw = bounded_text(answer, name)
            break
        except Again as e:
            if not patience.again(e.wait_s):
                raise EnvironmentFault(f"{name}: {e}, {patience.failed} times. {CHECK} {AGAIN}") from None
    try:
        found = strict_json.loads(raw, f"{name}: the Hub's listing", is_file=False)
    except InputError as e:
        raise EnvironmentFault(f"{e}. {NO_HUB}") from None
    if not isinstance(found, dict):
        raise EnvironmentFault(f"{name}: the Hub's listing is no JSON object. {NO_HUB}")
    return found


def _listed(name: str, listing: JSON, endpoint: str | None, token: str | None) -> Repo:
    """Return a repo as a listing tells of it. Each value is checked: a folder is named after the commit."""
    commit, rows = listing.get("sha"), listing.get("siblings")
    if not isinstance(commit, str) or not COMMIT.fullmatch(commit):
        raise EnvironmentFault(
            f"{name}: the Hub tells the commit {show(str(commit))}, expected 40 hex digits. {NO_HUB}"
        )
    if not isinstance(rows, list):
        raise EnvironmentFault(f"{name}: the Hub's listing has no files (`siblings`). {NO_HUB}")
    if len(rows) > MAX_FILES:
        raise InputError(f"{name}: {len(rows)} files, expected at most {MAX_FILES}; refused")
    files = [_file_of(name, row) for row in rows]
    if len({unicodedata.normalize("NFC", f.name).casefold() for f in files}) != len(files):
        raise InputError(f"{name}: holds two names that some systems take for one; refused")
    _check_folders(name, files)
    return Repo(name, commit, tuple(files), endpoint, token)


def _check_folders(name: str, files: list[RemoteFile]) -> None:
    """Raise `InputError` where a file has the name of a folder that another lies in, as no git repo can."""
    folders = {
        "/".join(parts[:n]).casefold() for f in files if (parts := f.name.split("/")) for n in range(1, len(parts))
    }
    if both := next((f.name for f in files if f.name.casefold() in folders), None):
        raise InputError(
            f"{name}: {show(both)} is a file and a folder in the Hub's listing; refused. Nothing was written"
        )


def _file_of(name: str, row: object) -> RemoteFile:
    table = row if isinstance(row, dict) else {}
    file, size, lfs = table.get("rfilename"), table.get("size"), table.get("lfs")
    if not isinstance(file, str):
        raise EnvironmentFault(f"{name}: the Hub's listing has a row without `rfilename`. {NO_HUB}")
    check_name(file, name)
    sha256 = lfs.get("sha256") if isinstance(lfs, dict) else None
    etag = sha256 if sha256 is not None else table.get("blobId")
    if not isinstance(size, int) or isinstance(size, bool) or not 0 <= size < 1 << 50 or etag is None:
        raise EnvironmentFault(f"{name}: the Hub does not tell size and digest of {show(file)}. {NO_HUB}")
    if not isinstance(etag, str) or not (SHA256 if sha256 is not None else DIGEST).fullmatch(etag):
        raise EnvironmentFault(
            f"{name}: {show(file)}: the Hub lists {show(str(etag))} as its digest, expected 40 or 64 hex "
            f"digits. {NO_HUB}"
        )
    return RemoteFile(file, size, etag, sha256)


def bounded_text(answer: Any, name: str) -> bytes:
    """Return the body of a listing, which is bounded."""
    try:
        return bounded(answer, MAX_LISTING_BYTES)
    except EnvironmentFault as e:
        raise EnvironmentFault(f"{name}: {e}") from None
