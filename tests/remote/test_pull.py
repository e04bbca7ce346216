"""`pull` and `hf://` sources against a hub on loopback: what is fetched, what is refused, what is gone on with."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import support
from tests.remote.small_hub import COMMIT, SmallHub, serve
from tests.support import ROOT, Result, assert_refused, read_folder, run, run_process, tree

REPO = "hf://owner/model"


@pytest.fixture
def hub(mini_source: Path) -> Iterator[SmallHub]:
    """Return a hub with the small checkpoint."""
    made = SmallHub({p.name: p for p in sorted(mini_source.iterdir()) if p.is_file()})
    server = serve(made)
    yield made
    server.shutdown()
    server.server_close()


def variables(hub: SmallHub, tmp_path: Path, **more: str) -> dict[str, str]:
    return {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": ""} | more


def call(hub: SmallHub, tmp_path: Path, *arguments: object, **more: str) -> Result:
    return run_process(*arguments, variables=variables(hub, tmp_path, **more), cwd=tmp_path)


def head_of(source: Path) -> dict[str, support.Tensor]:
    return {n: t for n, t in read_folder(source).items() if n.startswith("mtp.")}


def test_inspect_and_plan_of_a_repo_say_what_they_say_of_its_folder(
    hub: SmallHub, mini_source: Path, tmp_path: Path
) -> None:
    shards = len(list(mini_source.glob("*.safetensors")))
    remote = call(hub, tmp_path, "inspect", REPO, "--json")
    assert remote.json == run("inspect", mini_source, "--json").json
    assert hub.requests <= shards + 4
    before = hub.requests
    assert call(hub, tmp_path, "inspect", REPO, "--json").json == remote.json
    assert hub.requests == before + 1, f"headers are cached: {hub.paths}"
    far, near = call(hub, tmp_path, "plan", REPO, "--json").json, run("plan", mini_source, "--json").json
    assert {k: far[k] for k in ("output_bytes", "output_tensors", "groups", "left_out")} == {
        k: near[k] for k in ("output_bytes", "output_tensors", "groups", "left_out")
    }


def test_the_head_alone_is_a_checkpoint_with_a_record_of_its_bytes(
    hub: SmallHub, mini_source: Path, tmp_path: Path
) -> None:
    result = call(hub, tmp_path, "pull", REPO, "--only", "mtp", "--json")
    assert result.code == 0, result
    out, head = tmp_path / "model", head_of(mini_source)
    assert read_folder(out) == head
    size = sum(len(t.data) for t in head.values())
    assert result.json["bytes_received"] == size and result.json["revision"] == COMMIT
    record = json.loads((out / "ds4convert_pull.json").read_text())
    assert sum(r["bytes"] for f in record["files"] for r in f["ranges"]) == size
    for f in record["files"]:
        raw = (mini_source / f["source"]).read_bytes()
        data = b"".join(raw[r["start"] : r["start"] + r["bytes"]] for r in f["ranges"])
        assert (out / f["name"]).read_bytes()[f["header_bytes"] :] == data
    before = tree(out)
    again = call(hub, tmp_path, "pull", REPO, "--only", "mtp", "--json")
    assert again.json["bytes_received"] == 0 and tree(out) == before


def test_a_head_that_was_pulled_alone_grafts_to_what_a_conversion_with_the_head_writes(
    hub: SmallHub, mini_source: Path, tmp_path: Path
) -> None:
    assert call(hub, tmp_path, "pull", REPO, "head", "--only", "mtp").code == 0
    assert run("quantize", mini_source, tmp_path / "bare", "--drop-mtp").code == 0
    result = run("graft", tmp_path / "bare", "--from", tmp_path / "head", "--out", tmp_path / "whole")
    assert result.code == 0, result
    assert run("diff", mini_source, tmp_path / "whole").code == 0
    assert run("verify", tmp_path / "whole").code == 0


def test_head_and_backbone_together_are_the_whole(hub: SmallHub, mini_source: Path, tmp_path: Path) -> None:
    assert call(hub, tmp_path, "pull", REPO, "h", "--only", "mtp").code == 0
    assert call(hub, tmp_path, "pull", REPO, "b", "--only", "backbone").code == 0
    head, backbone = read_folder(tmp_path / "h"), read_folder(tmp_path / "b")
    assert not head.keys() & backbone.keys() and head | backbone == read_folder(mini_source)


def test_whole_repos_and_small_files_are_the_repos_bytes(hub: SmallHub, mini_source: Path, tmp_path: Path) -> None:
    for only, out in (("all", "a"), ("meta", "m")):
        result = call(hub, tmp_path, "pull", "owner/model", out, "--only", only, "--json")
        assert result.code == 0, result
        wanted = {n: d for n, d in tree(mini_source).items() if only == "all" or not n.endswith(".safetensors")}
        assert {n: d for n, d in tree(tmp_path / out).items() if not n.startswith(".cache")} == wanted


@pytest.mark.parametrize("faults", [["503"], ["429", "500"], ["cut"], ["cut", "cut"], ["whole"], ["shifted"], ["html"]])
def test_a_passing_fault_is_tried_again(hub: SmallHub, mini_source: Path, tmp_path: Path, faults: list[str]) -> None:
    hub.faults = list(faults)
    html = faults == ["html"]
    result = call(hub, tmp_path, "pull", REPO, "head", "--only", "mtp", "--jobs", "1")
    assert result.code == 0, result
    assert read_folder(tmp_path / "head") == head_of(mini_source) and (html or not hub.faults)


def test_a_changed_etag_stops_the_run_and_the_same_command_goes_on(
    hub: SmallHub, mini_source: Path, tmp_path: Path
) -> None:
    assert call(hub, tmp_path, "inspect", REPO).code == 0
    hub.faults = ["etag"]
    result = call(hub, tmp_path, "pull", REPO, "head", "--only", "mtp", "--jobs", "1")
    assert_refused(result, "etag", code=4)
    assert not (tmp_path / "head" / "ds4convert_pull.json").exists()
    assert call(hub, tmp_path, "pull", REPO, "head", "--only", "mtp").code == 0
    assert read_folder(tmp_path / "head") == head_of(mini_source)


@pytest.mark.parametrize("name", ["../x", "/etc/x", "a/../../x", "a\\b", "NUL", "com1.txt", "a//b", ".ds4convert/x"])
def test_a_repo_with_an_unsafe_name_is_refused(hub: SmallHub, tmp_path: Path, name: str) -> None:
    hub.names = [name]
    for command in (["pull", REPO, "out"], ["pull", REPO, "out", "--only", "mtp"], ["inspect", REPO]):
        assert_refused(call(hub, tmp_path, *command), "refused", code=3)
    assert not (tmp_path / "out").exists() and not (tmp_path / "x").exists()


def test_a_shard_that_is_a_page_or_announces_a_huge_header_is_refused(hub: SmallHub, tmp_path: Path) -> None:
    name = next(n for n in hub.files if n.endswith(".safetensors"))
    for n, raw in enumerate([b"<!doctype html><html></html>", (10**10).to_bytes(8, "little") + b"{" * 100]):
        (tmp_path / f"bad{n}").write_bytes(raw)
        hub.files[name] = tmp_path / f"bad{n}"
        hub.sent = 0
        assert_refused(call(hub, tmp_path, "inspect", REPO), name, "header", code=3)
        assert hub.sent < 2_000_000


def test_offline_unknown_and_unreachable_repos_have_messages_of_their_own(hub: SmallHub, tmp_path: Path) -> None:
    assert_refused(call(hub, tmp_path, "inspect", REPO, HF_HUB_OFFLINE="1"), "offline mode", code=4)
    assert_refused(call(hub, tmp_path, "inspect", "hf://owner/other"), "no such repo", code=4)
    gone = call(hub, tmp_path, "inspect", REPO, HF_ENDPOINT="http://127.0.0.1:9")
    assert_refused(gone, "cannot be reached", code=4)


def test_other_folders_are_left_alone(hub: SmallHub, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    assert_refused(call(hub, tmp_path, "pull", REPO, "out", "--only", "mtp"), "is not empty", code=3)
    assert tree(tmp_path / "out").keys() == {"mine"}


def test_a_killed_pull_goes_on_to_the_same_bytes(hub: SmallHub, mini_source: Path, tmp_path: Path) -> None:
    env = os.environ | {"PYTHONPATH": str(ROOT)} | variables(hub, tmp_path)
    command = [sys.executable, "-m", "ds4convert", "pull", REPO, "head", "--only", "mtp", "--jobs", "1"]
    for delay in (0.0, 0.02, 0.1):
        process = subprocess.Popen(command, env=env, cwd=tmp_path, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 30
        while not (tmp_path / "head").exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert call(hub, tmp_path, "pull", REPO, "head", "--only", "mtp").code == 0
    assert read_folder(tmp_path / "head") == head_of(mini_source)
    assert not (tmp_path / "head" / ".ds4convert").exists()
