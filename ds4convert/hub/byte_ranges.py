"""Read byte ranges of a file on the Hub, each answer checked, tried again where that may help."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ds4convert.errors import EnvironmentFault
from ds4convert.hub import cache
from ds4convert.hub.errors import AGAIN
from ds4convert.hub.http import Again, Told, get, pieces
from ds4convert.hub.records import RemoteFile, Repo
from ds4convert.hub.repo import NO_HUB
from ds4convert.storage.patience import Patience
from ds4convert.words.terminal import show

PROGRESS_BYTES = 64 << 10
"""What a request has to bring for its failure to count as the first one again."""


def read_range(repo: Repo, file: RemoteFile, start: int, size: int) -> Iterator[bytes]:
    """Yield the bytes `start .. start + size` of a file in pieces; a cut connection goes on where it broke off.

    A file that lies whole in the Hub client's cache is read there. Raises `EnvironmentFault` after several tries in a
    row without progress, and at once where the file is no longer the one that was listed.
    """
    if (path := cache.whole_in_cache(repo.name, repo.commit, file.name, file.size, file.etag)) is not None:
        yield from cache.read_local(path, start, size)
        return
    if not size:
        return
    done, patience = 0, Patience()
    while done < size:
        before = done
        try:
            for piece in _request(repo, file, start + done, size - done):
                yield piece
                done += len(piece)
            if done < size:
                raise Again("the connection was cut")
        except Again as e:
            if done - before >= min(PROGRESS_BYTES, size - before):
                patience.progress()
            if not patience.again(e.wait_s):
                raise EnvironmentFault(f"{repo.name}: {file.name}: {e}, {patience.failed} times. {AGAIN}") from None


def _request(repo: Repo, file: RemoteFile, start: int, size: int) -> Iterator[bytes]:
    from huggingface_hub import hf_hub_url

    url = hf_hub_url(repo.name, file.name, revision=repo.commit, endpoint=repo.endpoint)
    wanted = {"range": f"bytes={start}-{start + size - 1}", "accept-encoding": "identity"}
    with get(url, f"{repo.name}: {file.name}", repo.token, wanted) as (answer, told):
        _check_answer(repo, file, answer, told, start, size)
        left = size
        for piece in pieces(answer):
            if len(piece) > left:
                raise Again("the Hub sent more than was asked for")
            left -= len(piece)
            yield piece


def _check_answer(repo: Repo, file: RemoteFile, answer: Any, told: Told, start: int, size: int) -> None:
    """Raise unless an answer is the range asked for, of the file listed.

    Mirrors drop some of the Hub's headers. Without an ETag the commit in the address, the file's size in
    Content-Range and (for whole files) the listed digest have to do.
    """
    where = f"{repo.name}: {file.name}"
    # A plain ETag of another form than the listed digest is the mirror's own, and tells nothing.
    etag = told.linked or (told.etag if len(told.etag) == len(file.etag) else "")
    if etag and etag != file.etag:
        raise EnvironmentFault(
            f"{where}: the Hub serves another file than it listed (etag {show(etag)}, expected "
            f"{file.etag}); it is being changed. Nothing of it was used",
            hint="Run the command again, or name a revision",
        )
    if told.commit and told.commit != repo.commit:
        raise EnvironmentFault(
            f"{where}: the Hub serves commit {show(told.commit)}, {repo.commit} was asked for. Nothing of it was "
            f"used. {NO_HUB}"
        )
    found, expected = answer.headers.get("content-range"), f"bytes {start}-{start + size - 1}/{file.size}"
    if answer.status_code == 200 and start == 0 and size == file.size:
        length = answer.headers.get("content-length", str(size))
        if length != str(size):  # a page of some proxy, say
            raise Again(f"the Hub announced {show(length)} bytes, expected {size}")
        return  # the whole file was asked for, and it is what came; its length is counted as it comes
    if answer.status_code != 206:
        raise Again(f"the Hub ignored the byte range (HTTP {answer.status_code})")
    if found is None:
        raise EnvironmentFault(
            f"{where}: the answer lacks the header Content-Range, so which bytes came cannot be known. {NO_HUB}"
        )
    if found.replace("/*", f"/{file.size}") != expected:
        raise Again(f"the Hub sent {show(found)}, expected {expected}")


def read_bytes(repo: Repo, file: RemoteFile, start: int, size: int) -> bytes:
    """Return a range that fits in memory."""
    return b"".join(read_range(repo, file, start, size))
