"""The Hub's JSON endpoints: account, repos, info, trees, refs, commits."""

from __future__ import annotations

import base64
import hashlib
import json
from typing import Any
from urllib.parse import parse_qs, quote, urlencode

from tests.local_hub.downloads import moved
from tests.local_hub.exchange import REPO, Exchange, Refused, route
from tests.local_hub.store import LARGE, Commit, Conflict, Entry, Missing, Repo, is_large, is_safe, pointer

API = f"/api/models/{REPO}"
GIT_ATTRIBUTES = "".join(f"*{e} filter=lfs diff=lfs merge=lfs -text\n" for e in LARGE).encode()


@route("GET", "/api/whoami-v2", "whoami")
def whoami(x: Exchange) -> None:
    user = x.user
    if user is None:
        raise Refused(401, "Invalid username or password.")
    token = {"type": "access_token", "accessToken": {"displayName": "local", "role": user["role"]}}
    x.reply({"type": "user", "name": user["name"], "fullname": user["name"], "orgs": [], "auth": token})


@route("POST", "/api/validate-yaml", "validate-yaml")
def validate_yaml(x: Exchange) -> None:
    """Accept every card: YAML is not looked at."""
    x.reply({"errors": [], "warnings": []})


def full_name(x: Exchange, body: dict[str, Any]) -> str:
    if body.get("type", "model") != "model":
        raise Refused(400, "this Hub has models only")
    name = f"{body.get('organization') or x.writer()['name']}/{body.get('name')}"
    if not is_safe(name) or name.count("/") != 1 or "--" in name:
        raise Refused(400, f"not a repo name: {name}")
    return name


@route("POST", "/api/repos/create", "create")
def create(x: Exchange) -> None:
    x.writer()
    body = x.json()
    name, store = full_name(x, body), x.state.store
    url = f"{x.state.hub_url}/{name}"
    try:
        store.create(name, private=body.get("visibility") == "private" or bool(body.get("private")))
    except Conflict as e:
        return x.reply({"error": str(e), "url": url}, {"X-Error-Message": str(e)}, 409)
    with store.lock():
        first = store.entry(".gitattributes", store.add_bytes(GIT_ATTRIBUTES))
        store.commit(name, "main", {".gitattributes": first}, "initial commit")
    return x.reply({"url": url, "name": name})


@route("DELETE", "/api/repos/delete", "delete")
def delete(x: Exchange) -> None:
    x.writer()
    x.state.store.delete(full_name(x, x.json()))
    x.reply({})


@route("PUT", f"{API}/settings", "settings")
def settings(x: Exchange, repo: str) -> None:
    x.writer()
    body = x.json()
    with x.state.store.lock():
        found = x.repo(repo)
        found.private = {"private": True, "public": False}.get(
            body.get("visibility"), body.get("private", found.private)
        )
        found.gated = bool(body.get("gated", found.gated))
        x.state.store.save(found)
    x.reply({"private": found.private, "gated": found.gated})


# Reading


def lfs_of(entry: Entry, key: str) -> dict[str, Any]:
    if not entry.lfs:
        return {}
    pointer_size = len(pointer(entry.sha256, entry.size))
    return {"lfs": {key: entry.sha256, "size": entry.size, "pointerSize": pointer_size}}


@route("GET", f"{API}(?:/revision/(?P<rev>[^/]+))?", "info")
def info(x: Exchange, repo: str, rev: str) -> None:
    if moved(x, repo):
        return
    if (fault := x.fault("listing")) is not None:
        return x.answer(200, {"Content-Type": fault["type"]}, fault["body"].encode())
    found, commit = x.readable(repo, rev or "main")
    rows: list[dict[str, Any]] = [{"rfilename": name} for name in commit.files]
    if x.query.get("blobs", [""])[0].lower() in ("true", "1"):
        for row, entry in zip(rows, commit.files.values(), strict=True):
            row |= {"size": entry.size, "blobId": entry.oid} | lfs_of(entry, "sha256")
    owner = repo.partition("/")[0]
    about = {"_id": hashlib.sha1(repo.encode()).hexdigest()[:24], "id": repo, "modelId": repo, "author": owner}
    state = {"private": found.private, "gated": "auto" if found.gated else False, "disabled": False}
    counts = {"downloads": 0, "likes": 0, "tags": [], "createdAt": "2026-01-01T00:00:00.000Z"}
    if (fault := x.fault("row")) is not None:
        rows[0][fault["key"]] = fault["value"]
    told = fault["sha"] if (fault := x.fault("commit")) is not None else commit.oid
    x.reply(about | state | counts | {"sha": told, "lastModified": commit.date, "siblings": rows})


def file_row(x: Exchange, repo: Repo, commit: Commit, path: str, expand: bool) -> dict[str, Any]:
    entry = commit.files[path]
    row = {"type": "file", "path": path, "size": entry.size, "oid": entry.oid} | lfs_of(entry, "oid")
    return row | (last_change(x, repo, commit, path) if expand else {})


def last_change(x: Exchange, repo: Repo, commit: Commit, path: str) -> dict[str, Any]:
    last = commit
    for older in x.state.store.history(repo, commit):
        if older.files.get(path) != commit.files[path]:
            break
        last = older
    scan = {"status": "safe", "avScan": None, "pickleImportScan": None}
    return {
        "lastCommit": {"id": last.oid, "title": last.title, "date": last.date},
        "securityFileStatus": scan,
    }


def folders(commit: Commit) -> list[str]:
    """Return all folders. Planted names that git would not take make none."""
    found = {"/".join(p.split("/")[:n]) for p in commit.files if is_safe(p) for n in range(1, p.count("/") + 1)}
    return sorted(found)


def folder_row(path: str) -> dict[str, Any]:
    return {"type": "directory", "path": path, "size": 0, "oid": hashlib.sha1(path.encode()).hexdigest()}


def is_set(x: Exchange, key: str) -> bool:
    return x.query.get(key, [""])[0].lower() in ("true", "1")


def within(path: str, folder: str, recursive: bool) -> bool:
    if not is_safe(path):
        return not folder
    if folder and not path.startswith(folder + "/"):
        return False
    return recursive or "/" not in path[len(folder) + 1 if folder else 0 :]


@route("GET", f"{API}/tree/(?P<rev>[^/]+)(?:/(?P<folder>.*))?", "tree")
def tree(x: Exchange, repo: str, rev: str, folder: str) -> None:
    found, commit = x.readable(repo, rev)
    recursive, expand, folder = is_set(x, "recursive"), is_set(x, "expand"), folder.rstrip("/")
    every = folders(commit)
    if folder and folder not in every:
        raise Missing("EntryNotFound", f"{folder} does not exist on {rev}")
    names = [p for p in sorted([*every, *commit.files]) if within(p, folder, recursive)]
    start = int(x.query.get("cursor", ["0"])[0])
    size = min(int(x.query.get("limit", [x.state.page_size])[0]), x.state.page_size)
    page = names[start : start + size]
    rows = [file_row(x, found, commit, p, expand) if p in commit.files else folder_row(p) for p in page]
    headers = {}
    if start + size < len(names):
        again = {k: v[0] for k, v in x.query.items()} | {"cursor": str(start + size)}
        headers["Link"] = f'<{x.state.hub_url}{x.raw_path}?{urlencode(again)}>; rel="next"'
    x.reply(rows, headers)


@route("POST", f"{API}/paths-info/(?P<rev>[^/]+)", "paths-info")
def paths_info(x: Exchange, repo: str, rev: str) -> None:
    found, commit = x.readable(repo, rev)
    if "json" in (x.headers.get("Content-Type") or ""):
        body = x.json()
        paths, expand = body["paths"], bool(body.get("expand"))
    else:
        form = parse_qs(x.body().decode())
        paths, expand = form.get("paths", []), form.get("expand", [""])[0].lower() in ("true", "1")
    every = folders(commit)
    files = [file_row(x, found, commit, p, expand) for p in paths if p in commit.files]
    x.reply(files + [folder_row(p) for p in paths if p in every])


@route("GET", f"{API}/commits/(?P<rev>[^/]+)", "commits")
def commits(x: Exchange, repo: str, rev: str) -> None:
    found, commit = x.readable(repo, rev)
    x.reply(
        [
            {"id": c.oid, "title": c.title, "message": c.description, "date": c.date, "authors": [{"user": "owner"}]}
            for c in x.state.store.history(found, commit)
        ]
    )


# Refs


@route("GET", f"{API}/refs", "refs")
def refs(x: Exchange, repo: str) -> None:
    found = x.repo(repo)
    x.reply(
        {
            "branches": [{"name": n, "ref": f"refs/heads/{n}", "targetCommit": c} for n, c in found.branches.items()],
            "tags": [{"name": n, "ref": f"refs/tags/{n}", "targetCommit": c} for n, c in found.tags.items()],
            "converts": [],
            "pullRequests": [],
        }
    )


@route("POST DELETE", f"{API}/branch/(?P<branch>[^/]+)", "branch")
def branch(x: Exchange, repo: str, branch: str) -> None:
    x.writer()
    start = x.json().get("startingPoint") or "main"
    change_ref(x, repo, "branches", branch, start)


@route("POST DELETE", f"{API}/tag/(?P<rev>[^/]+)", "tag")
def tag(x: Exchange, repo: str, rev: str) -> None:
    x.writer()
    name = x.json().get("tag") or rev
    change_ref(x, repo, "tags", name, rev)


def change_ref(x: Exchange, repo: str, which: str, name: str, start: str) -> None:
    store = x.state.store
    with store.lock():
        found = x.repo(repo)
        table: dict[str, str] = getattr(found, which)
        if x.command == "DELETE":
            if table.pop(name, None) is None:
                raise Missing("RevisionNotFound", f"no such ref: {name}")
        elif name in table:
            raise Conflict(f"Reference already exists: {name}")
        else:
            table[name] = store.commit_of(found, start).oid
        store.save(found)
    x.reply({})


# Writing


@route("POST", f"{API}/preupload/(?P<rev>[^/]+)", "preupload")
def preupload(x: Exchange, repo: str, rev: str) -> None:
    """Say which files are large, and what the branch has under their names. No .gitignore is applied."""
    x.writer()
    _, commit = x.readable(repo, rev)
    rows = []
    for file in x.json()["files"]:
        mode = "lfs" if is_large(file["path"], file["size"]) else "regular"
        row = {"path": file["path"], "uploadMode": mode, "shouldIgnore": False}
        if (entry := commit.files.get(file["path"])) is not None:
            row["oid"] = entry.etag
        rows.append(row)
    x.reply({"files": rows, "commitOid": commit.oid})


@route("POST", f"{API}/commit/(?P<rev>[^/]+)", "commit")
def commit(x: Exchange, repo: str, rev: str) -> None:
    """Make a commit of NDJSON lines. Pull requests are not offered."""
    x.writer()
    x.repo(repo)
    if is_set(x, "create_pr"):
        raise Refused(400, "this Hub has no pull requests")
    try:
        lines = [json.loads(line) for line in x.body().splitlines() if line.strip()]
    except ValueError:
        raise Refused(400, "a line is not JSON") from None
    head = next((r["value"] for r in lines if r["key"] == "header"), None)
    if head is None or not head.get("summary"):
        raise Refused(400, "the commit has no header with a summary")
    if x.fault("hold") is not None:
        x.state.faults.hold()
    store = x.state.store
    with store.lock():
        found, before = x.readable(repo, rev)
        if rev not in found.branches:
            raise Missing("RevisionNotFound", f"not a branch: {rev}")
        files = dict(before.files)
        for line in lines:
            apply(x, files, line["key"], line["value"])
        try:
            made = store.commit(
                repo, rev, files, head["summary"], head.get("description", ""), head.get("parentCommit")
            )
        except Conflict as e:
            raise Refused(412, str(e)) from None
    url = f"{x.state.hub_url}/{quote(repo)}/commit/{made.oid}"
    x.reply({"success": True, "commitOid": made.oid, "commitUrl": url, "hookOutput": ""})


def apply(x: Exchange, files: dict[str, Entry], key: str, value: dict[str, Any]) -> None:
    """Make one line's change to the tree."""
    if key == "header":
        return
    path = value["path"].rstrip("/")
    if not is_safe(path):
        raise Refused(400, f"not a path that git takes: {path!r}")
    change = CHANGES.get(key)
    if change is None:
        raise Refused(400, f"not an operation: {key}")
    change(x, files, path, value)


def put_file(x: Exchange, files: dict[str, Entry], path: str, value: dict[str, Any]) -> None:
    if value.get("encoding") != "base64":
        raise Refused(400, "content has to be base64")
    data = base64.b64decode(value["content"])
    if is_large(path, len(data)):
        raise Refused(400, f"{path} has to be uploaded as a large file")
    files[path] = x.state.store.entry(path, x.state.store.add_bytes(data), large=False)


def put_large(x: Exchange, files: dict[str, Entry], path: str, value: dict[str, Any]) -> None:
    blob = x.state.store.blob(value["oid"])
    if not value["oid"].isalnum() or not blob.exists() or value.get("size", blob.stat().st_size) != blob.stat().st_size:
        raise Refused(400, f"LFS pointer pointed to a file that does not exist: {path}")
    files[path] = x.state.store.entry(path, value["oid"], large=True)


def remove_file(x: Exchange, files: dict[str, Entry], path: str, value: dict[str, Any]) -> None:
    if files.pop(path, None) is None:
        raise Missing("EntryNotFound", f"A file with this name doesn't exist: {path}")


def remove_folder(x: Exchange, files: dict[str, Entry], path: str, value: dict[str, Any]) -> None:
    inside = [p for p in files if p.startswith(path + "/")]
    if not inside:
        raise Missing("EntryNotFound", f"A folder with this name doesn't exist: {path}")
    for p in inside:
        del files[p]


CHANGES = {"file": put_file, "lfsFile": put_large, "deletedFile": remove_file, "deletedFolder": remove_folder}
