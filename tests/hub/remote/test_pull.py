"""`pull` and `hf://` sources against a local Hub: what is fetched, what is refused, what is gone on with."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from tests import support
from tests.hub.remote.conftest import NAME, REPO, Call
from tests.hub.stopped import killed
from tests.local_hub import LocalHub
from tests.support import assert_refused, read_folder, run, tree

SHARDS = "*.safetensors"


def head_of(source: Path) -> dict[str, support.Tensor]:
    return {n: t for n, t in read_folder(source).items() if n.startswith("mtp.")}


def files_of(folder: Path) -> dict[str, str]:
    return {n: d for n, d in tree(folder).items() if not n.startswith(".cache") and n != "ds4convert_pull.json"}


def a_shard(hub: LocalHub) -> str:
    return next(n for n in hub.files(NAME) if n.endswith(".safetensors"))


def fetched(hub: LocalHub) -> dict[str, int]:
    """Return the bytes that were sent of each shard."""
    return {path: n for path, n in hub.counters()["sent"].items() if path.endswith(".safetensors")}


def test_inspect_and_plan_of_a_repo_say_what_they_say_of_its_folder(
    hub: LocalHub, call: Call, mini_source: Path
) -> None:
    shards = len(list(mini_source.glob(SHARDS)))
    remote = call("inspect", REPO, "--json")
    assert remote.json == run("inspect", mini_source, "--json").json
    log = hub.counters()["log"]
    assert len([r for r in log if r["path"].endswith(".safetensors") and r["kind"] == "file"]) == shards
    hub.reset_counters()
    assert call("inspect", REPO, "--json").json == remote.json
    assert sum(fetched(hub).values()) == 0, "headers are cached"
    far, near = call("plan", REPO, "--json").json, run("plan", mini_source, "--json").json
    assert {k: far[k] for k in ("output_bytes", "output_tensors", "groups", "left_out")} == {
        k: near[k] for k in ("output_bytes", "output_tensors", "groups", "left_out")
    }


def test_the_head_alone_is_a_checkpoint_with_a_record_of_its_bytes(
    call: Call, commit: str, mini_source: Path, tmp_path: Path
) -> None:
    result = call("pull", REPO, "--only", "mtp", "--json")
    assert result.code == 0, result
    out, head = tmp_path / "model-mtp", head_of(mini_source)
    assert read_folder(out) == head
    assert result.json["revision"] == commit
    record = json.loads((out / "ds4convert_pull.json").read_text())
    size = sum(r["bytes"] for f in record["files"] for r in f["ranges"])
    assert result.json["bytes_received"] == size >= sum(len(t.data) for t in head.values())
    for f in record["files"]:
        raw = (mini_source / f["source"]).read_bytes()
        data = b"".join(raw[r["start"] : r["start"] + r["bytes"]] for r in f["ranges"])
        assert (out / f["name"]).read_bytes()[f["header_bytes"] :] == data
    before = tree(out)
    again = call("pull", REPO, "--only", "mtp", "--json")
    assert again.json["bytes_received"] == 0 and tree(out) == before


def test_a_head_that_was_pulled_alone_grafts_to_what_a_conversion_with_the_head_writes(
    call: Call, commit: str, mini_source: Path, tmp_path: Path
) -> None:
    assert call("pull", REPO, "head", "--only", "mtp").code == 0
    assert run("quantize", mini_source, tmp_path / "bare", "--drop-mtp").code == 0
    result = run("graft", tmp_path / "bare", "--from", tmp_path / "head", "--out", tmp_path / "whole")
    assert result.code == 0, result
    assert run("diff", mini_source, tmp_path / "whole").code == 0
    assert run("verify", tmp_path / "whole").code == 0
    # With a source that is known to be the same repo, the result is that of a full conversion, file for file.
    assert call("pull", REPO, "all").code == 0
    assert run("quantize", tmp_path / "all", tmp_path / "full").code == 0
    assert run("quantize", tmp_path / "all", tmp_path / "bare2", "--drop-mtp").code == 0
    assert run("graft", tmp_path / "bare2", "--from", tmp_path / "head", "--out", tmp_path / "whole2").code == 0
    assert tree(tmp_path / "whole2") == tree(tmp_path / "full")
    source = json.loads((tmp_path / "full" / "ds4convert_manifest.json").read_text())["source"]
    assert (source["repo"], source["revision"]) == (NAME, commit)
    listed = {f["name"]: f["sha256"] for f in source["files"]}
    assert listed == {n: d for n, d in tree(mini_source).items() if n.endswith(".safetensors")}


def test_a_folder_of_the_clients_own_cache_knows_its_repo_and_a_changed_one_does_not(
    hub: LocalHub, call: Call, commit: str, tmp_path: Path
) -> None:
    script = "import huggingface_hub as h; print(h.snapshot_download('owner/model'))"
    env = os.environ | hub.environment()
    place = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=True).stdout
    assert run("quantize", place.strip(), tmp_path / "a").code == 0
    source = json.loads((tmp_path / "a" / "ds4convert_manifest.json").read_text())["source"]
    assert (source["repo"], source["revision"]) == (NAME, commit) and all(
        len(f["sha256"]) == 64 for f in source["files"]
    )
    assert call("pull", REPO, "all").code == 0
    record = tmp_path / "all" / "ds4convert_pull.json"
    table = json.loads(record.read_text())
    table["files"][-1]["bytes"] = table["files"][1]["bytes"] = 7
    for n, text in enumerate((json.dumps(table), "[", "[]", json.dumps(table | {"repo": "../x"}))):
        record.write_text(text)
        assert run("quantize", tmp_path / "all", tmp_path / f"b{n}").code == 0
        assert "repo" not in json.loads((tmp_path / f"b{n}" / "ds4convert_manifest.json").read_text())["source"]


def test_head_and_backbone_together_are_the_whole(call: Call, mini_source: Path, tmp_path: Path) -> None:
    assert call("pull", REPO, "h", "--only", "mtp").code == 0
    assert call("pull", REPO, "b", "--only", "backbone").code == 0
    head, backbone = read_folder(tmp_path / "h"), read_folder(tmp_path / "b")
    assert not head.keys() & backbone.keys() and head | backbone == read_folder(mini_source)


def plant(hub: LocalHub, faults: tuple[str, ...]) -> None:
    """Make the next answers for shards and for config.json bad, in ways that pass."""
    for glob in (SHARDS, "config.json"):
        if "busy" in faults:
            for code in (503, 429, 500):
                hub.faults.add("status", f"{NAME}/{glob}", code=code, retry_after=0)
        for kind, more in (("cut", {"times": 2, "after": 100}), ("slow", {"bytes_per_second": 400_000})):
            if kind in faults:
                hub.faults.add(kind, glob, **more)
        for kind in {"ignore_range", "content_range", "expired_download"} & set(faults):
            hub.faults.add(kind, glob)


def wanted_of(only: str, source: Path, folder: Path) -> bool:
    """Return whether a pulled folder holds exactly what it should."""
    if only in ("all", "meta"):
        return files_of(folder) == {
            n: d for n, d in tree(source).items() if only == "all" or not n.endswith(SHARDS[1:])
        }
    of_head = {n: t for n, t in read_folder(source).items() if n.startswith("mtp.") == (only == "mtp")}
    return read_folder(folder) == of_head


PASSING = {"a bad line": ("busy", "cut", "slow"), "a bad answer": ("ignore_range", "content_range", "expired_download")}
ALWAYS = {("a bad line", "all"), ("a bad line", "mtp"), ("a bad answer", "mtp"), ("a bad answer", "meta")}


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("faults", "only"),
    support.combined(PASSING, ["all", "mtp", "backbone", "meta"], is_repetition=lambda *case: case not in ALWAYS),
)
def test_faults_that_pass_end_in_the_right_bytes(
    hub: LocalHub, call: Call, mini_source: Path, tmp_path: Path, faults: str, only: str
) -> None:
    plant(hub, PASSING[faults])
    for _ in range(3):
        result = call("pull", REPO, "out", "--only", only, "--jobs", "1")
        if result.code == 0:
            break
        assert_refused(result, "again", code=4)  # what the client does not try again by itself: said, and resumable
    assert result.code == 0, result
    assert wanted_of(only, mini_source, tmp_path / "out")


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("only", "fault", "glob"),
    [
        ("all", "wrong", SHARDS), pytest.param("all", "html", SHARDS, marks=pytest.mark.nightly), ("meta", "wrong", "config.json"),
        ("mtp", "wrong", "config.json"), ("mtp", "html", SHARDS), ("mtp", "etag", SHARDS),
        pytest.param("backbone", "etag", "*", marks=pytest.mark.nightly),
    ],
)  # fmt: skip
def test_wrong_bytes_are_never_taken(
    hub: LocalHub, call: Call, mini_source: Path, tmp_path: Path, only: str, fault: str, glob: str
) -> None:
    assert call("inspect", REPO).code == 0  # headers come from the cache from now on
    hub.faults.add(fault, glob, times=-1)
    assert_refused(call("pull", REPO, "out", "--only", only, "--jobs", "2"), code=4)
    assert not (tmp_path / "out" / "ds4convert_pull.json").exists()
    hub.faults.clear()
    again = call("pull", REPO, "out", "--only", only)
    assert again.code == 0 and wanted_of(only, mini_source, tmp_path / "out"), again


def test_a_byte_that_came_wrong_once_is_fetched_again(
    hub: LocalHub, call: Call, mini_source: Path, tmp_path: Path
) -> None:
    hub.faults.add("wrong", SHARDS, times=3, at=2000)
    assert call("pull", REPO, "out").code == 0 and wanted_of("all", mini_source, tmp_path / "out")


UNSAFE = ["../x", "/etc/x", "a/../../x", "a\\b", "NUL", "com1.txt", "a//b", ".ds4convert/x"]


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", support.nightly(UNSAFE, lambda n: n in ("/etc/x", "a\\b", "com1.txt", "a//b")))
def test_a_repo_with_an_unsafe_name_is_refused(hub: LocalHub, call: Call, tmp_path: Path, name: str) -> None:
    hub.put(NAME, {name: b"x"})
    for command in (["pull", REPO, "out"], ["inspect", REPO]):
        assert_refused(call(*command), "refused", code=3)
    assert not (tmp_path / "out").exists() and not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("raw", "told"),
    [(b"<!doctype html><html></html>", "web page"), ((10**10).to_bytes(8, "little") + b"{" * 100, "header")],
)
def test_a_shard_that_is_a_page_or_announces_a_huge_header_is_refused(
    hub: LocalHub, call: Call, raw: bytes, told: str
) -> None:
    name = a_shard(hub)
    hub.put(NAME, {name: raw})
    assert_refused(call("inspect", REPO), name, told, code=3)
    assert hub.counters()["bytes_sent"] < 2_000_000


def test_offline_unknown_and_unreachable_repos_have_messages_of_their_own(call: Call) -> None:
    assert_refused(call("inspect", REPO, HF_HUB_OFFLINE="1"), "offline mode", code=4)
    assert_refused(call("inspect", "hf://owner/other"), "no such repo", code=4)
    gone = call("inspect", REPO, HF_ENDPOINT="http://127.0.0.1:9")
    assert_refused(gone, "cannot be reached", "HF_ENDPOINT", code=4)


def test_private_and_gated_repos_say_what_is_missing(hub: LocalHub, call: Call, mini_source: Path) -> None:
    hub.add_repo("owner/private", mini_source, private=True)
    hub.add_repo("owner/gated", mini_source, gated=True)
    for repo, word in (("owner/private", "token"), ("owner/gated", "access")):
        for command in (("inspect", f"hf://{repo}"), ("pull", f"hf://{repo}", "out", "--only", "mtp")):
            refused = call(*command, HF_TOKEN="")
            assert_refused(refused, word, code=4)
        assert hub.token not in refused.err
    assert call("inspect", "hf://owner/private").code == 0


def test_other_folders_are_left_alone(call: Call, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    assert_refused(call("pull", REPO, "out", "--only", "mtp"), "is not empty", code=3)
    assert tree(tmp_path / "out").keys() == {"mine"}


@pytest.mark.sampled(1)
@pytest.mark.parametrize("only", ["mtp", "all"])
def test_a_killed_pull_goes_on_to_the_same_bytes(
    hub: LocalHub, call: Call, mini_source: Path, tmp_path: Path, only: str, request: pytest.FixtureRequest
) -> None:
    assert call("inspect", REPO).code == 0  # headers come from the cache from now on: what is held is a part of a shard
    dice, kills, wanted = random.Random(only), 0, 10 if request.config.getoption("--nightly") else 2
    while kills < wanted:
        # The head is one request; of a whole repo one shard more comes through each time.
        hub.faults.add("hold", SHARDS, skip=1 if only == "all" else 0, after=dice.randrange(1, 15_000))
        if not killed(hub, tmp_path, "pull", REPO, "out", "--only", only, "--jobs", "1"):
            break
        kills += 1
    assert kills >= 2
    assert call("pull", REPO, "out", "--only", only).code == 0
    assert wanted_of(only, mini_source, tmp_path / "out")
    assert not (tmp_path / "out" / ".ds4convert").exists()


@pytest.mark.parametrize("only", ["all", "meta", "mtp", "backbone"])
def test_a_dry_run_lists_what_a_run_then_fetches_and_writes_nothing(call: Call, tmp_path: Path, only: str) -> None:
    dry = call("pull", REPO, tmp_path / "out", "--only", only, "--dry-run", "--json")
    assert dry.code == 0 and not (tmp_path / "out").exists() and dry.json["bytes_received"] == 0
    assert "Nothing was written." in call("pull", REPO, tmp_path / "out", "--only", only, "--dry-run").out
    assert call("pull", REPO, tmp_path / "out", "--only", only).code == 0
    made = {"ds4convert_pull.json"} | ({"model.safetensors.index.json"} if only in {"mtp", "backbone"} else set())
    sizes = {n: (tmp_path / "out" / n).stat().st_size for n in tree(tmp_path / "out")}
    assert {f["name"]: f["bytes"] for f in dry.json["sizes"]} == {n: s for n, s in sizes.items() if n not in made}
