"""`quantize hf://`: the same folder as from a pulled repo, through a window, whatever the Hub does meanwhile."""

from __future__ import annotations

import json
import random
import signal
from pathlib import Path

import pytest

from ds4convert.execution import run
from ds4convert.hub import remote_checkpoint, repo
from ds4convert.hub.byte_ranges import read_range
from ds4convert.hub.doors import open_official
from ds4convert.planning import build
from ds4convert.planning.build import make_plan
from ds4convert.planning.layouts import layout_of
from ds4convert.planning.recipes import recipe_of
from tests import support, support_run
from tests.hub.remote.conftest import NAME, REPO, Call
from tests.hub.remote.test_pull import SHARDS, fetched
from tests.hub.stopped import PATIENCE, killed, let_go, started
from tests.local_hub import LocalHub
from tests.support import Result, assert_refused, read_folder, tree


@pytest.fixture
def wanted(call: Call, commit: str, tmp_path: Path) -> dict[str, str]:
    """Return what the conversion of the pulled repo is."""
    assert call("pull", REPO, "pulled").code == 0
    assert call("quantize", tmp_path / "pulled", tmp_path / "wanted").code == 0
    return tree(tmp_path / "wanted")


def streamed(call: Call, *more: object) -> Result:
    return call("quantize", REPO, "out", "--window", "1MB", *more)


def test_the_result_is_that_of_the_pulled_repo_and_each_byte_comes_once(
    hub: LocalHub, call: Call, wanted: dict[str, str], mini_source: Path, tmp_path: Path
) -> None:
    hub.reset_counters()
    result = call("quantize", REPO, "out", "--json")
    assert result.code == 0, result
    assert tree(tmp_path / "out") == wanted
    whole = sum(p.stat().st_size for p in mini_source.glob(SHARDS))
    assert sum(fetched(hub).values()) < 2 * whole, "headers are read with up to 224 kB of what follows"
    hub.reset_counters()
    again = call("quantize", REPO, "out", "--json")
    assert again.json["already_done"] is True and sum(fetched(hub).values()) == 0


OPTIONS = [[], ["--no-hash"], ["--drop-mtp"], ["--backbone", "affine-4-g32", "--jobs", "3"]]


@pytest.mark.sampled(1)
@pytest.mark.parametrize("words", support.nightly(OPTIONS, lambda words: words in (["--no-hash"], ["--drop-mtp"])))
def test_options_give_what_they_give_locally(
    call: Call, commit: str, mini_source: Path, tmp_path: Path, words: list[str]
) -> None:
    assert call("pull", REPO, "pulled").code == 0
    assert call("quantize", "pulled", "here", *words).code == 0
    assert streamed(call, *words).code == 0
    assert tree(tmp_path / "out") == tree(tmp_path / "here")


def windowed(hub: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int) -> list[int]:
    """Convert with a small window; return the most bytes that its folder held, sampled at each fetch."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))
    source = open_official(repo.open_repo(NAME, endpoint=hub.url, token=hub.token))
    made = make_plan(source, build.Options(recipe_of("native"), layout_of("inline")))
    held: list[int] = []
    plain = read_range

    def watched(*args: object) -> object:
        window = tmp_path / "out" / ".ds4convert" / "window"
        held.append(sum(p.stat().st_size for p in window.iterdir() if p.exists()) if window.is_dir() else 0)
        return plain(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(remote_checkpoint, "read_range", watched)
    run.run(source, made, tmp_path / "out", run.Way(window_bytes=limit))
    return held


def test_the_window_is_never_exceeded_and_gone_at_the_end(
    hub: LocalHub, wanted: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = 1 << 20
    held = windowed(hub, tmp_path, monkeypatch, limit)
    assert held and max(held) <= limit
    assert tree(tmp_path / "out") == wanted and not (tmp_path / "out" / ".ds4convert").exists()


@pytest.mark.sampled(1)
@pytest.mark.parametrize(
    "faults",
    [
        [("status", {"code": 503}), ("status", {"code": 429, "retry_after": 0}), ("cut", {"after": 1000, "times": 3})],
        [("ignore_range", {}), ("content_range", {}), ("expired_download", {}), ("html", {}), ("slow", {})],
    ],
    ids=["busy and cut", "wrong answers"],
)
def test_faults_that_pass_end_in_the_right_folder(
    hub: LocalHub, call: Call, wanted: dict[str, str], tmp_path: Path, faults: list[tuple[str, dict[str, int]]]
) -> None:
    for kind, more in faults:
        hub.faults.add(kind, f"{NAME}/{SHARDS}" if kind == "status" else SHARDS, **more)  # type: ignore[arg-type]
    assert streamed(call).code == 0
    assert tree(tmp_path / "out") == wanted


def shard_of(source: Path, tensor: str) -> str:
    """Return the name of the shard that holds a tensor."""
    return str(json.loads((source / support.INDEX).read_text())["weight_map"][tensor])


def test_a_wrong_byte_is_found_by_the_shards_digest_and_what_was_made_of_it_is_made_again(
    hub: LocalHub, call: Call, wanted: dict[str, str], mini_source: Path, tmp_path: Path
) -> None:
    assert call("inspect", REPO).code == 0  # headers come from the cache from now on
    hub.faults.add("wrong", shard_of(mini_source, "mtp.0.ffn.experts.0.w1.weight"), at=7)
    assert_refused(streamed(call), "sha256", "again", code=4)
    assert not (tmp_path / "out" / "ds4convert_manifest.json").exists()
    assert streamed(call).code == 0 and tree(tmp_path / "out") == wanted


def test_a_page_in_place_of_a_shard_that_is_asked_for_whole_is_asked_for_again(
    hub: LocalHub, call: Call, mini_source: Path
) -> None:
    smallest = min(mini_source.glob(SHARDS), key=lambda p: p.stat().st_size)
    hub.faults.add("html", smallest.name)
    assert call("inspect", REPO).code == 0


def test_a_wrong_byte_that_makes_a_value_impossible_is_no_fault_of_the_input(
    hub: LocalHub, call: Call, wanted: dict[str, str], mini_source: Path, tmp_path: Path
) -> None:
    name = shard_of(mini_source, "layers.0.ffn.gate.tid2eid")
    at = support.header_of(mini_source / name)["layers.0.ffn.gate.tid2eid"]["data_offsets"][0]
    assert call("inspect", REPO).code == 0
    hub.faults.add("wrong", name, at=at + 7)  # of the first piece, which begins where the header ends
    assert_refused(call("quantize", REPO, "out"), "again", code=4)  # by its value or by the shard's digest
    assert streamed(call).code == 0 and tree(tmp_path / "out") == wanted


def test_a_changed_etag_stops_the_run_and_leaves_it_resumable(
    hub: LocalHub, call: Call, wanted: dict[str, str], tmp_path: Path
) -> None:
    assert call("inspect", REPO).code == 0
    hub.faults.add("etag", SHARDS, skip=3, on="resolve")
    assert_refused(streamed(call), "etag", code=4)
    assert streamed(call).code == 0 and tree(tmp_path / "out") == wanted


def test_a_killed_run_goes_on_to_the_same_folder(
    hub: LocalHub, call: Call, wanted: dict[str, str], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    dice, kills, wanted_kills = random.Random(2), 0, 10 if request.config.getoption("--nightly") else 2
    while kills < wanted_kills:
        hub.faults.add("hold", SHARDS, skip=dice.randrange(8, 16), on="file", after=dice.randrange(1000))
        if not killed(hub, tmp_path, "quantize", REPO, "out", "--window", "1MB"):
            break
        kills += 1
    assert kills >= 2
    assert streamed(call).code == 0 and tree(tmp_path / "out") == wanted


def test_offline_private_and_unknown_repos_have_their_own_messages(
    hub: LocalHub, call: Call, mini_source: Path, tmp_path: Path
) -> None:
    hub.add_repo("owner/private", mini_source, private=True)
    assert_refused(call("quantize", REPO, "out", HF_HUB_OFFLINE="1"), "offline mode", code=4)
    assert_refused(call("quantize", "hf://owner/private", "out", HF_TOKEN=""), "token", code=4)
    assert_refused(call("quantize", "hf://owner/none", "out"), "no such repo", code=4)
    assert_refused(call("quantize", REPO, "out", "--window", "0"), "--window", "1,000,000", code=2)
    assert not (tmp_path / "out").exists()


def test_ctrl_c_ends_at_once_and_the_same_command_goes_on(
    hub: LocalHub, call: Call, wanted: dict[str, str], tmp_path: Path
) -> None:
    hub.faults.add("hold", SHARDS, times=-1, skip=8, on="file", after=1000)
    process = started(hub, tmp_path, "quantize", REPO, "out", "--window", "1MB")
    assert hub.faults.held(process)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=PATIENCE)  # nothing comes any more: waiting for it would take for ever
    assert process.returncode == 130 and "Traceback" not in told and "goes on from there" in told, told
    let_go(hub)
    assert streamed(call).code == 0 and tree(tmp_path / "out") == wanted


def test_a_head_on_the_hub_grafts_to_the_full_conversion_and_little_else_is_fetched(
    hub: LocalHub, call: Call, wanted: dict[str, str], mini_source: Path, tmp_path: Path
) -> None:
    assert call("quantize", "pulled", "bare", "--drop-mtp").code == 0
    assert call("inspect", REPO).code == 0
    hub.reset_counters()
    result = call("graft", "bare", "--from", REPO, "--out", "whole", "--json")
    assert result.code == 0, result
    assert tree(tmp_path / "whole") == wanted and "norms" in result.json["checked"]
    head = sum(len(t.data) for n, t in read_folder(mini_source).items() if n.startswith("mtp."))
    small = sum(len(t.data) for n, t in read_folder(mini_source).items() if "norm" in n or "ffn.gate" in n)
    assert head <= sum(fetched(hub).values()) <= 1.01 * head + small
    assert call("graft", "bare", "--from", REPO, "--in-place").code == 0
    assert tree(tmp_path / "bare") == wanted


def test_a_graft_meets_faults_as_a_conversion_does(
    hub: LocalHub, call: Call, wanted: dict[str, str], tmp_path: Path
) -> None:
    assert call("quantize", "pulled", "bare", "--drop-mtp").code == 0 and call("inspect", REPO).code == 0
    for kind in ("cut", "html", "ignore_range", "content_range", "expired_download"):
        hub.faults.add(kind, SHARDS)
    hub.faults.add("etag", SHARDS, skip=5, on="resolve")
    assert_refused(call("graft", "bare", "--from", REPO, "--out", "whole"), "etag", code=4)
    assert not (tmp_path / "whole" / "ds4convert_manifest.json").exists()
    assert call("graft", "bare", "--from", REPO, "--out", "whole").code == 0
    assert tree(tmp_path / "whole") == wanted


def test_diff_reads_headers_and_verify_compares_values_with_the_hub(
    hub: LocalHub, call: Call, wanted: dict[str, str], mini_source: Path, tmp_path: Path
) -> None:
    other = support.copy_folder(mini_source, tmp_path / "other")
    shard = next(other.glob(SHARDS))
    raw = bytearray(shard.read_bytes())
    raw[-1] ^= 1
    shard.write_bytes(raw)
    hub.add_repo("owner/other", other)
    same = call("diff", REPO, "hf://owner/other", "--json")
    assert (same.code, same.json["changed"], same.json["values_compared"]) == (0, 0, False)
    assert call("diff", REPO, "wanted").code == 0
    assert call("diff", "pulled", "other").code == 1, "values do differ"
    assert call("verify", "wanted", "--source", REPO).code == 0
    assert call("verify", "wanted", "--source", "hf://owner/other").code == 1
    assert_refused(call("verify", "wanted", "--source", REPO, "--layerwise"), "pull", code=2)


def test_fit_measures_a_repo_by_samples(hub: LocalHub, call: Call, tmp_path: Path) -> None:
    source = support_run.tiny(tmp_path / "tiny")
    hub.add_repo("owner/tiny", source)
    words = ["--fit", "1GB", "--context", "64", "--json"]
    far, near = call("plan", "hf://owner/tiny", *words), call("plan", source, *words)
    assert near.code == 0 and far.json["fit"] == near.json["fit"]
