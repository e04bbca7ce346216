"""One command of each kind against every way in which the Hub and its mirrors are known to answer.

Sources: huggingface_hub 2.4.0 (`get_hf_file_metadata`, `_get_metadata_or_catch_error`), logs quoted in public issues
(raullenchai/Rapid-MLX 1122, huggingface/swift-transformers 209, huggingface/hf-hub 163 and 176, padeoe/hf-mirror-site 31).
The local Hub answers as the Hub does without any switch: regular files by a relative 307 without X-Linked-ETag.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.hub.remote.conftest import NAME, REPO, Call
from tests.hub.stopped import PATIENCE, let_go, started
from tests.local_hub import LocalHub
from tests.support import Result, assert_refused, tree

Switch = tuple[str, dict[str, Any]]
EVERY: dict[str, list[Switch]] = {
    "as the Hub": [],
    "linked etag": [("linked_etag", {})],
    "weak etag": [("weak_etag", {})],
    "at once": [("direct", {})],
    "renamed": [("renamed", {"to": NAME, "code": 307})],
    "renamed 301": [("renamed", {"to": NAME, "code": 301})],
    "elsewhere": [("elsewhere", {})],
    "busy": [("status", {"code": 503, "on": "resolve"})],
    **{
        f"without {name}": [("drop", {"name": name})]
        for name in ("X-Linked-ETag", "X-Linked-Size", "X-Repo-Commit", "X-Xet-Hash", "ETag", "Accept-Ranges")
    },
    "bare": [("drop", {"name": n}) for n in ("X-Linked-ETag", "X-Linked-Size", "X-Repo-Commit", "ETag")],
}
"""What the Hub is told to do, for as long as the test runs."""

ALWAYS = {"as the Hub", "elsewhere", "bare"}
"""Run on every change; the others nightly, as they differ in what one request sees."""

VARIANTS = [pytest.param(k, marks=() if k in ALWAYS else pytest.mark.nightly, id=k) for k in EVERY]


@pytest.fixture
def source(request: pytest.FixtureRequest, hub: LocalHub, commit: str) -> str:
    """Return the name of the repo, with the Hub switched to a variant."""
    name = REPO
    for kind, arguments in EVERY[request.param]:
        times = 3 if kind == "status" else -1
        glob = "*"
        if kind == "renamed":
            name, glob = "hf://old-owner/old-model", "*old-owner/old-model*"
        if kind == "elsewhere":
            glob = f"{NAME}/*"
        hub.faults.add(kind, glob, times, **arguments)
    return name


def environment(variant: str, hub: LocalHub) -> dict[str, str]:
    """Return what a client needs beside the fixture's: where a mirror stands, that is another address than the Hub's."""
    return {"HF_ENDPOINT": hub.mirror_url} if variant == "elsewhere" else {}


@pytest.mark.parametrize("source", VARIANTS, indirect=True)
def test_every_command_works_however_the_hub_answers(
    source: str, hub: LocalHub, call: Call, mini_source: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    more = environment(request.node.callspec.params["source"], hub)

    def good(*words: object) -> Result:
        result = call(*words, **more)
        assert result.code == 0, result
        return result

    assert (
        call("inspect", str(mini_source), "--json").json["tensors"] == good("inspect", source, "--json").json["tensors"]
    )
    good("plan", source)
    good("quantize", source, "far")
    assert call("quantize", mini_source, "near").code == 0
    near, far = tree(tmp_path / "near"), tree(tmp_path / "far")
    assert {k: v for k, v in far.items() if "manifest" not in k} == {
        k: v for k, v in near.items() if "manifest" not in k
    }
    good("verify", "far", "--source", source)
    good("diff", source, "far")
    for only in ("all", "mtp", "backbone", "meta"):
        good("pull", source, only, "--only", only)
    for path in mini_source.iterdir():
        assert (tmp_path / "all" / path.name).read_bytes() == path.read_bytes()
    assert call("quantize", mini_source, "bare", "--drop-mtp").code == 0
    good("graft", "bare", "--from", source, "--out", "whole")
    assert call("graft", "bare", "--from", tmp_path / "mtp", "--out", "whole2").code == 0
    assert not list(tmp_path.rglob(".ds4convert")), "nothing of a run is left"
    # A mirror takes no uploads: what is published goes to the Hub itself.
    assert call("publish", "far", "owner/out").code == 0 and good("inspect", "hf://owner/out").code == 0


@pytest.mark.sampled(3)
@pytest.mark.parametrize("kind", ["inspect", "pull"])
@pytest.mark.parametrize(
    ("on", "code"), [("resolve", 404), ("resolve", 403), ("resolve", 302), ("info", 200), ("info", 404)]
)
def test_bodies_without_end_are_read_up_to_a_bound(hub: LocalHub, call: Call, kind: str, on: str, code: int) -> None:
    hub.faults.add("endless", "*", -1, code=code, on=on)
    result = call(*((kind, REPO) if kind == "inspect" else (kind, REPO, "dest")))
    assert_refused(result, NAME, code=4)
    assert hub.counters()["bytes_sent"] < 120 << 20


@pytest.mark.sampled(3)
@pytest.mark.parametrize("sha", ["/tmp/x", "../../up", "A" * 40, "a" * 39, "a" * 41, "", None, 7, ["a"]])
def test_a_commit_that_is_none_refuses_the_repo(hub: LocalHub, call: Call, tmp_path: Path, sha: object) -> None:
    before = tree(tmp_path)
    hub.faults.add("commit", "*", -1, sha=sha)
    assert_refused(call("inspect", REPO), "commit", "40 hex digits", code=4)
    assert_refused(call("pull", REPO, "dest"), "commit", code=4)
    assert not (tmp_path / "dest").exists() and set(tree(tmp_path)) - set(before) <= {"hf_home"}


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    ("key", "value"),
    [("blobId", "x" * 40), ("blobId", "../up"), ("size", "12"), ("size", -1), ("size", 1 << 60), ("size", True),
     ("lfs", {"sha256": "ab"}), ("rfilename", 3), ("blobId", None)],
)  # fmt: skip
def test_a_listing_of_other_types_is_refused_in_words(hub: LocalHub, call: Call, key: str, value: object) -> None:
    hub.faults.add("row", "*", -1, key=key, value=value)
    result = call("inspect", REPO)
    assert_refused(result, NAME, code=4)
    assert "HF_ENDPOINT" in result.err


@pytest.mark.sampled(2)
@pytest.mark.parametrize("body", ["<html>sign in</html>", "[]", "{}", '{"sha": ' + "[" * 100_000, "\xff\xfe", ""])
def test_a_listing_that_is_something_else_is_told_as_such(hub: LocalHub, call: Call, body: str) -> None:
    hub.faults.add("listing", "*", -1, body=body)
    assert_refused(call("inspect", REPO), NAME, "HF_ENDPOINT", code=4)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", [".git/config", "a/.GIT/hooks/x", ".gitmodules", ".DS4convert/x", "b/.ds4CONVERT/y"])
def test_names_that_programs_obey_are_refused(hub: LocalHub, call: Call, name: str) -> None:
    hub.put(NAME, {name: b"x"})
    assert_refused(call("pull", REPO, "dest"), "not a safe file name")


def test_a_rate_limit_is_waited_for_as_the_hub_asks(hub: LocalHub, call: Call) -> None:
    hub.faults.add("limit", "*config.json", -1, seconds=2, on="resolve")
    assert call("inspect", REPO).code == 0
    answers = [
        r["status"] for r in hub.counters()["log"] if r["path"].endswith("/config.json") and r["kind"] == "resolve"
    ]
    assert answers == [429, 307], "who asks before its time is up is refused again, and that is counted"


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    "form",
    ["owner/model", "{url}/owner/model", "{url}/owner/model/tree/main", "{url}/owner/model/blob/main/config.json"],
)
def test_a_repo_may_be_named_as_people_name_it(hub: LocalHub, call: Call, form: str, tmp_path: Path) -> None:
    name = form.format(url=hub.url)
    assert call("inspect", name, "--json").json["tensors"] == call("inspect", REPO, "--json").json["tensors"]
    assert call("pull", name, "dest", "--only", "meta").code == 0


def test_a_local_folder_goes_before_a_repo_of_that_name(call: Call, mini_source: Path, tmp_path: Path) -> None:
    (tmp_path / "owner").mkdir()
    (tmp_path / "owner" / "model").symlink_to(mini_source)
    assert call("inspect", "owner/model", HF_ENDPOINT="http://127.0.0.1:9").code == 0


def test_small_files_in_our_cache_are_trusted_by_digest(hub: LocalHub, call: Call) -> None:
    assert call("inspect", REPO).code == 0
    kept = next((hub.root / "hf_home" / "ds4convert").rglob("config.json"))
    raw = kept.read_bytes()
    kept.write_bytes(raw.replace(b"1", b"2", 1))
    assert call("inspect", REPO).code == 0 and kept.read_bytes() == raw


def test_what_lies_in_the_hub_clients_cache_is_read_there(hub: LocalHub, call: Call, tmp_path: Path) -> None:
    code = f"from huggingface_hub import snapshot_download; snapshot_download('{NAME}')"
    subprocess.run([sys.executable, "-c", code], env=os.environ | hub.environment(), check=True, capture_output=True)
    hub.reset_counters()
    assert call("quantize", REPO, "out").code == 0
    counted = hub.counters()["requests"]
    assert not counted.get("file") and not counted.get("resolve-cache"), "only the listing was asked for"
    hub.kill()
    assert call("quantize", REPO, "offline", HF_HUB_OFFLINE="1").code == 0
    assert call("inspect", REPO, HF_HUB_OFFLINE="1").code == 0
    assert tree(tmp_path / "out") == tree(tmp_path / "offline")
    hub.restart()


def test_a_lost_connection_is_not_told_as_a_missing_file(hub: LocalHub, call: Call) -> None:
    hub.faults.add("cut", "*", -1, after=0)
    result = call("pull", REPO, "dest")
    assert result.code == 4 and "is not there" not in result.err, result


def interrupted(hub: LocalHub, folder: Path, signals: int) -> tuple[int, str]:
    """Start a whole pull, press Ctrl-C while a shard comes; return exit code and standard error."""
    process = started(hub, folder, "pull", REPO, "dest")
    assert hub.faults.held(process) and list((folder / "dest").glob("*.partial"))
    process.send_signal(signal.SIGINT)
    assert process.stderr is not None
    told = process.stderr.readline() if signals > 1 else ""  # the first one has been heard
    if signals > 1:
        process.send_signal(signal.SIGINT)
    _, rest = process.communicate(timeout=PATIENCE)  # nothing comes any more: waiting for it would take for ever
    return process.returncode, told + rest


@pytest.mark.parametrize("signals", [1, 2])
def test_ctrl_c_in_a_whole_pull_ends_it_soon_and_the_next_run_goes_on(
    hub: LocalHub, call: Call, tmp_path: Path, mini_source: Path, signals: int
) -> None:
    hub.faults.add("hold", "*.safetensors", -1, skip=1, after=2_000)
    code, err = interrupted(hub, tmp_path, signals)
    # -2: the second one came while Python was ending; a shell tells that as 130 too.
    assert code in ({130} if signals == 1 else {130, -2}) and "Traceback" not in err, (code, err)
    let_go(hub)
    names = [p.name for p in (tmp_path / "dest").iterdir() if p.is_file() and not p.name.endswith(".partial")]
    hub.reset_counters()
    assert call("pull", REPO, "dest").code == 0
    sent = hub.counters()["sent"]
    assert not [n for n in names if f"{NAME}/{n}" in sent], "what was whole is not sent again"
    for path in mini_source.iterdir():
        assert (tmp_path / "dest" / path.name).read_bytes() == path.read_bytes()
    assert not (tmp_path / "dest" / ".ds4convert").exists()


def test_a_pull_killed_before_its_last_call_is_finished_by_the_same_command(
    call: Call, tmp_path: Path, commit: str
) -> None:
    assert call("pull", REPO, "dest", "--only", "mtp").code == 0
    whole = tree(tmp_path / "dest")
    state = tmp_path / "dest" / ".ds4convert"
    state.mkdir()
    (state / "lock").write_bytes(b"")
    assert call("pull", REPO, "dest", "--only", "mtp").code == 0
    assert tree(tmp_path / "dest") == whole
