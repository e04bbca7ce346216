"""Ranges, fault switches, counters and restarts of the local Hub, seen over plain HTTP and by huggingface_hub."""

from __future__ import annotations

import hashlib
import http.client
import json
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from email.message import Message
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import HfApi, constants, get_session
from huggingface_hub.errors import HfHubHTTPError

from tests.local_hub import LocalHub, downloads

NAME, SHARD = "owner/model", "model.safetensors"
DATA = hashlib.shake_128(b"shard").digest(200_000)


@pytest.fixture
def api(hub: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> HfApi:
    """Return a client of a Hub with one repo of one shard and a config."""
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    given = tmp_path / "given"
    given.mkdir()
    (given / SHARD).write_bytes(DATA)
    (given / "config.json").write_text("{}")
    hub.add_repo(NAME, given)
    return HfApi(endpoint=hub.url, token=hub.token)


def get(hub: LocalHub, name: str = SHARD, **headers: str) -> tuple[int, Message, bytes]:
    """Fetch a file; return status, headers and bytes, also of errors."""
    request = urllib.request.Request(f"{hub.url}/{NAME}/resolve/main/{name}", headers=headers)
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=60) as answer:
            return answer.status, answer.headers, answer.read()
    except urllib.error.HTTPError as e:
        return e.code, e.headers, e.read()


@pytest.mark.parametrize(
    ("asked", "start", "end"),
    [
        ("bytes=10-19", 10, 20),
        ("bytes=199990-", 199_990, 200_000),
        ("bytes=-5", 199_995, 200_000),
        ("bytes=5-999999", 5, 200_000),
    ],
)
def test_a_range_is_answered_with_its_bytes(hub: LocalHub, api: HfApi, asked: str, start: int, end: int) -> None:
    status, headers, data = get(hub, Range=asked)
    assert (status, data) == (206, DATA[start:end])
    assert headers["Content-Range"] == f"bytes {start}-{end - 1}/200000"
    assert hub.counters()["sent"] == {f"{NAME}/{SHARD}": end - start}


def test_ranges_outside_and_of_another_etag(hub: LocalHub, api: HfApi) -> None:
    status, headers, _ = get(hub, Range="bytes=200000-")
    assert (status, headers["Content-Range"]) == (416, "bytes */200000")
    tag = f'"{hashlib.sha256(DATA).hexdigest()}"'
    assert get(hub, **{"Range": "bytes=0-9", "If-Range": tag})[0] == 206
    assert get(hub, **{"Range": "bytes=0-9", "If-Range": '"other"'})[::2] == (200, DATA)


def test_a_large_file_is_redirected_with_the_hubs_headers(hub: LocalHub, api: HfApi) -> None:
    place = http.client.HTTPConnection(hub.url.removeprefix("http://"), timeout=60)
    place.request("HEAD", f"/{NAME}/resolve/main/{SHARD}")
    answer = place.getresponse()
    head = answer.headers
    place.close()
    assert answer.status == 302 and head["X-Linked-Size"] == "200000" and len(head["X-Repo-Commit"]) == 40
    assert head["X-Linked-ETag"] == f'"{hashlib.sha256(DATA).hexdigest()}"' and head["Accept-Ranges"] == "bytes"
    assert len(head["X-Xet-Hash"]) == 64
    assert not head["Location"].startswith(hub.url), "the CDN is another origin"


def test_a_signed_url_is_for_one_file_and_not_for_tokens(hub: LocalHub, api: HfApi) -> None:
    place = get(hub)[1]
    assert place["ETag"]
    connection = http.client.HTTPConnection(hub.url.removeprefix("http://"), timeout=60)
    connection.request("HEAD", f"/{NAME}/resolve/main/{SHARD}")
    location = connection.getresponse().headers["Location"]
    connection.close()
    for url, headers in ((location.replace(SHARD, "config.json"), {}), (location, {"Authorization": "Bearer x"})):
        with pytest.raises(urllib.error.HTTPError, match=r"HTTP Error 40[03]"):
            urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=60)


def test_faults_of_a_files_bytes_do_what_they_say_once(hub: LocalHub, api: HfApi) -> None:
    part = {"Range": "bytes=100-199"}
    hub.faults.add("ignore_range", "*.safetensors")
    assert get(hub, **part)[::2] == (200, DATA)
    hub.faults.add("content_range", SHARD)
    assert get(hub, **part)[1]["Content-Range"] == "bytes 101-200/200000"
    hub.faults.add("wrong", f"{NAME}/*", at=3)
    got = get(hub, **part)[2]
    assert [n for n in range(100) if got[n] != DATA[100 + n]] == [3]
    hub.faults.add("html", SHARD)
    status, headers, body = get(hub)
    assert (status, headers["Content-Type"]) == (200, "text/html") and body.startswith(b"<!DOCTYPE")
    hub.faults.add("expired_download", SHARD)
    assert get(hub)[0] == 403
    hub.faults.add("cut", SHARD, after=1000)
    with pytest.raises(http.client.IncompleteRead) as e:
        get(hub)
    assert e.value.partial == DATA[:1000]
    assert get(hub)[::2] == (200, DATA), "every fault is used up"


def test_slow_bytes_are_slow_and_whole(hub: LocalHub, api: HfApi, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.faults.add("slow", SHARD, bytes_per_second=10_000_000)
    assert get(hub)[2] == DATA
    slept: list[float] = []
    monkeypatch.setattr(downloads, "time", SimpleNamespace(sleep=slept.append))
    exchange: Any = SimpleNamespace(wfile=BytesIO(), sent=0)
    downloads.send_slowly(exchange, BytesIO(DATA), 0, len(DATA), 1000, None)
    assert exchange.wfile.getvalue() == DATA and exchange.sent == len(DATA)
    assert sum(slept) == pytest.approx(len(DATA) / 1000) and max(slept) < 0.1, "a steady drip"


def test_what_is_held_comes_when_the_faults_are_cleared(hub: LocalHub, api: HfApi) -> None:
    hub.faults.add("hold", SHARD, after=1000)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(get, hub)
        assert hub.faults.held(hub.process) and not answer.done()
        assert hub.control("held", {"count": 2, "patience": 0})["held"] == 1
        hub.faults.clear()
        assert answer.result()[2] == DATA
    assert get(hub)[2] == DATA and hub.control("held", {"count": 1, "patience": 0})["held"] == 0


def test_a_status_can_be_meant_for_some_requests(hub: LocalHub, api: HfApi) -> None:
    hub.faults.add("status", "*", times=2, code=429, retry_after=7, on="resolve", skip=1)
    api.model_info(NAME)
    answers = [get(hub, "config.json") for _ in range(4)]
    assert [a[0] for a in answers] == [200, 429, 429, 200] and answers[1][1]["Retry-After"] == "7"
    hub.faults.add("status", "*", times=-1, code=500)
    assert [get(hub, "config.json")[0] for _ in range(3)] == [500] * 3
    hub.faults.clear()
    assert get(hub, "config.json")[0] == 200


def test_the_etag_can_change_between_two_requests(hub: LocalHub, api: HfApi) -> None:
    hub.faults.add("etag", "config.json", skip=1)
    tags = [get(hub, "config.json")[1]["ETag"] for _ in range(3)]
    assert tags[0] == tags[2] != tags[1]


def test_unknown_faults_and_arguments_are_refused(hub: LocalHub) -> None:
    with pytest.raises(ValueError, match="unknown fault 'fire'"):
        hub.faults.add("fire", "*")
    with pytest.raises(ValueError, match="no argument code"):
        hub.faults.add("cut", "*", code=1)


def test_a_cut_download_is_resumed_by_the_client(hub: LocalHub, api: HfApi, tmp_path: Path) -> None:
    size, cut = 25_000_000, 22_000_000
    data = hashlib.shake_128(b"big").digest(size)
    hub.put(NAME, {"big.safetensors": data})
    hub.faults.add("cut", "big.safetensors", after=cut)
    got = api.hf_hub_download(NAME, "big.safetensors", cache_dir=tmp_path / "cache")
    assert Path(got).read_bytes() == data
    rows = [r for r in hub.counters()["log"] if r["kind"] == "file" and r["method"] == "GET"]
    kept = 2 * constants.DOWNLOAD_CHUNK_SIZE  # the client writes whole pieces only
    assert [r["sent"] for r in rows] == [cut, size - kept] and rows[1]["range"] == f"bytes={kept}-"


@pytest.mark.parametrize("kind", ["expired", "cut_upload"])
def test_a_failed_upload_leaves_nothing_and_a_second_one_works(hub: LocalHub, api: HfApi, kind: str) -> None:
    new = hashlib.shake_128(b"new").digest(3_000_000)
    before = hub.files(NAME)
    hub.faults.add(kind, "lfs/*")
    upload = {"path_or_fileobj": new, "path_in_repo": "new.safetensors", "repo_id": NAME}
    if kind == "expired":
        with pytest.raises((HfHubHTTPError, RuntimeError)):
            api.upload_file(**upload)
        assert hub.files(NAME) == before and not list((hub.store.root / "incoming").iterdir())
    api.upload_file(**upload)  # the client itself tries a cut upload again
    assert hub.files(NAME)["new.safetensors"].read_bytes() == new
    assert hub.counters()["requests"]["upload"] == 2


def test_an_upload_of_other_bytes_than_announced_is_refused(hub: LocalHub, api: HfApi) -> None:
    oid = hashlib.sha256(b"good").hexdigest()
    objects = [{"oid": oid, "size": 4}]
    body = {"operation": "upload", "transfers": ["basic"], "objects": objects}
    headers = {"Authorization": f"Bearer {hub.token}"}
    answer = get_session().post(f"{hub.url}/{NAME}.git/info/lfs/objects/batch", json=body, headers=headers)
    href = answer.json()["objects"][0]["actions"]["upload"]["href"]
    assert get_session().put(href, content=b"evil").status_code == 400
    assert get_session().put(href, content=b"goo").status_code == 400
    assert not hub.store.blob(oid).exists()
    assert get_session().put(href, content=b"good").status_code == 200 and hub.store.blob(oid).exists()


def test_a_commit_may_not_name_what_was_not_uploaded_or_leave_the_repo(hub: LocalHub, api: HfApi) -> None:
    def post(key: str, **value: object) -> int:
        lines = f'{{"key": "header", "value": {{"summary": "x"}}}}\n{json_line(key, value)}\n'
        headers = {"Authorization": f"Bearer {hub.token}", "Content-Type": "application/x-ndjson"}
        url = f"{hub.url}/api/models/{NAME}/commit/main"
        return int(get_session().post(url, content=lines.encode(), headers=headers).status_code)

    before = hub.files(NAME)
    assert post("lfsFile", path="a.bin", algo="sha256", oid="0" * 64, size=1) == 400
    assert post("file", path="../a", content="", encoding="base64") == 400
    assert post("deletedFile", path="absent") == 404
    assert hub.files(NAME) == before
    assert post("file", path="a", content="", encoding="base64") == 200


def json_line(key: str, value: dict[str, object]) -> str:
    return json.dumps({"key": key, "value": value})


def test_hostile_names_can_be_planted(hub: LocalHub, api: HfApi) -> None:
    names = ["../evil", "/etc/evil", "a/../../evil", "CON", "nul.safetensors", "a\\b"]
    hub.put(NAME, dict.fromkeys(names, b"x"))
    listed = {r.path for r in api.list_repo_tree(NAME, recursive=True)}
    assert listed == {*names, SHARD, "config.json"}
    siblings = api.model_info(NAME).siblings
    assert siblings and {s.rfilename for s in siblings} == listed


def test_a_restart_keeps_repos_and_address(hub: LocalHub, api: HfApi) -> None:
    before, url = api.model_info(NAME).sha, hub.url
    hub.restart()
    assert hub.url == url and get(hub)[2] == DATA
    assert HfApi(endpoint=hub.url).model_info(NAME).sha == before


def test_a_repo_is_taken_by_hard_link_and_the_server_ends_with_its_owner(
    hub: LocalHub, api: HfApi, tmp_path: Path
) -> None:
    assert hub.files(NAME)[SHARD].samefile(tmp_path / "given" / SHARD)
    assert hub.process.stdin is not None
    hub.process.stdin.close()
    assert hub.process.wait(timeout=60) == 0
