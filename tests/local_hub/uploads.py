"""Large files by git LFS: batch, basic and multipart transfer to signed URLs, completion, verification."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.local_hub.exchange import CHUNK, REPO, Exchange, Refused, route

OID = "(?P<oid>[0-9a-f]{64})"


@route("POST", rf"/{REPO}\.git/info/lfs/objects/batch", "batch")
def batch(x: Exchange, repo: str) -> None:
    x.writer()
    x.repo(repo)
    body = x.json()
    if body.get("operation") != "upload" or body.get("hash_algo", "sha256") != "sha256":
        raise Refused(422, "only uploads by sha256")
    multipart = "multipart" in body.get("transfers", [])
    rows = [action(x, repo, o, multipart) for o in body["objects"]]
    x.reply({"transfer": "multipart" if multipart else "basic", "objects": rows})


def action(x: Exchange, repo: str, asked: dict[str, Any], multipart: bool) -> dict[str, Any]:
    """Say how one object is uploaded: not at all where it is here already, in parts where it is big."""
    oid, size = str(asked["oid"]), int(asked["size"])
    row: dict[str, Any] = {"oid": oid, "size": size}
    if len(oid) != 64 or not oid.isalnum():
        return row | {"error": {"code": 422, "message": "not a sha256"}}
    if x.state.store.blob(oid).exists():
        return row
    verify = {"href": f"{x.state.hub_url}/{repo}.git/info/lfs/verify"}
    if not multipart or size <= x.state.part_size:
        href = x.state.cdn_url + x.state.sign(f"/upload/{oid}/{size}")
        return row | {"actions": {"upload": {"href": href}, "verify": verify}}
    count = -(-size // x.state.part_size)
    header = {str(n): x.state.cdn_url + x.state.sign(f"/part/{oid}/{n}") for n in range(1, count + 1)}
    header["chunk_size"] = str(x.state.part_size)
    href = x.state.hub_url + x.state.sign(f"/complete/{oid}/{size}")
    return row | {"actions": {"upload": {"href": href, "header": header}, "verify": verify}}


def check_url(x: Exchange) -> None:
    x.check_signature()
    if x.fault("expired") is not None:
        raise Refused(403, "Request has expired")


def receive(x: Exchange, path: Path) -> tuple[str, int]:
    """Write the body to `path`; return its sha256 and size. A connection that ends early leaves nothing."""
    digest, size, cut, hold = hashlib.sha256(), 0, x.fault("cut_upload"), x.fault("hold")
    try:
        with path.open("wb") as file:
            for piece in x.chunks():
                digest.update(piece)
                size += len(piece)
                file.write(piece)
                if hold is not None and size >= hold["after"]:
                    x.state.faults.hold()
                    hold = None
                if cut is not None and size >= cut["after"]:
                    x.hang_up()
                    raise ConnectionResetError("fault")
    except ConnectionError:
        path.unlink()
        raise
    return digest.hexdigest(), size


@route("PUT", f"/upload/{OID}/(?P<size>[0-9]+)", "upload")
def upload(x: Exchange, oid: str, size: str) -> None:
    x.subject = f"lfs/{oid}"
    check_url(x)
    path = x.state.store.incoming()
    found = receive(x, path)
    if found != (oid, int(size)):
        path.unlink()
        raise Refused(400, f"BadDigest: received {found[1]} bytes of sha256 {found[0]}")
    x.state.store.keep(path, oid)
    x.answer(200, {"ETag": f'"{oid}"'})


def parts(x: Exchange, oid: str) -> Path:
    return x.state.store.root / "incoming" / f"parts-{oid}"


@route("PUT", f"/part/{OID}/(?P<number>[0-9]+)", "part")
def part(x: Exchange, oid: str, number: str) -> None:
    x.subject = f"lfs/{oid}"
    check_url(x)
    path, folder = x.state.store.incoming(), parts(x, oid)
    tag, _ = receive(x, path)
    folder.mkdir(exist_ok=True)
    path.replace(folder / f"{number}-{tag}")
    x.answer(200, {"ETag": f'"{tag}"'})


def joined(files: list[Path]) -> Iterator[bytes]:
    for path in files:
        with path.open("rb") as file:
            while piece := file.read(CHUNK):
                yield piece


@route("POST", f"/complete/{OID}/(?P<size>[0-9]+)", "complete")
def complete(x: Exchange, oid: str, size: str) -> None:
    """Join the parts that the client lists by number and etag; they have to make the object that was announced."""
    x.subject = f"lfs/{oid}"
    check_url(x)
    body = x.json()
    if x.state.store.blob(oid).exists():  # a completion sent again
        return x.reply({})
    listed = sorted((int(p["partNumber"]), str(p["etag"]).strip('"')) for p in body.get("parts", []))
    files = [parts(x, oid) / f"{n}-{tag}" for n, tag in listed]
    numbers = [n for n, _ in listed]
    if body.get("oid") != oid or numbers != list(range(1, len(files) + 1)) or not all(f.is_file() for f in files):
        raise Refused(400, "InvalidPart: a part is missing or differs")
    digest, path = hashlib.sha256(), x.state.store.incoming()
    with path.open("wb") as out:
        for piece in joined(files):
            digest.update(piece)
            out.write(piece)
    if digest.hexdigest() != oid or path.stat().st_size != int(size):
        path.unlink()
        raise Refused(422, f"the parts make sha256 {digest.hexdigest()}, not {oid}")
    x.state.store.keep(path, oid)
    shutil.rmtree(parts(x, oid))
    return x.reply({})


@route("POST", rf"/{REPO}\.git/info/lfs/verify", "verify")
def verify(x: Exchange, repo: str) -> None:
    x.writer()
    x.repo(repo)
    body = x.json()
    blob = x.state.store.blob(str(body["oid"]))
    if not str(body["oid"]).isalnum() or not blob.exists():
        raise Refused(404, "the object has not been uploaded")
    if blob.stat().st_size != body["size"]:
        raise Refused(422, f"the object has {blob.stat().st_size} bytes, not {body['size']}")
    x.reply({})
