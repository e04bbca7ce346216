"""What networks, mirrors and caches do to bytes: drips, repeated cuts, damaged and partial caches, killed pulls."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from tests.hub.remote.conftest import NAME, REPO, Call
from tests.local_hub import LocalHub
from tests.support import ROOT, Result, assert_refused, tree

DOWNLOAD = f"from huggingface_hub import snapshot_download; print(snapshot_download('{NAME}'))"
NO_LINKS = "import huggingface_hub.file_download as f\nf.are_symlinks_supported = lambda *a, **k: False\n"
"""huggingface_hub 2.4.0, `are_symlinks_supported`: False on Windows and on drives without links; files lie there as they are."""


def in_client_cache(hub: LocalHub, code: str = DOWNLOAD) -> Path:
    """Have the Hub's own client download the repo; return the folder of its snapshot."""
    ran = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | hub.environment(), check=True, capture_output=True, text=True
    )
    return Path(ran.stdout.strip())


def test_a_drip_is_given_up_and_asked_for_anew(hub: LocalHub, call: Call) -> None:
    hub.faults.add("slow", "*config.json", 1, bytes_per_second=20)
    assert call("inspect", REPO).code == 0
    size = hub.files(NAME)["config.json"].stat().st_size
    sent = [r["sent"] for r in hub.counters()["log"] if r["path"].endswith("/config.json") and r["sent"]]
    assert len(sent) == 2 and sent[0] < size, "the drip was left, and asked again once"
    assert size <= sum(sent) < size + 50, "what came slowly is kept: the second answer begins where the first was left"


def test_a_network_that_cuts_every_connection_still_gets_there(hub: LocalHub, call: Call, tmp_path: Path) -> None:
    folder = tmp_path / "big"
    folder.mkdir()
    head = json.dumps({"a": {"dtype": "U8", "shape": [6_000_000], "data_offsets": [0, 6_000_000]}}).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(head)) + head + bytes(6_000_000))
    (folder / "config.json").write_text("{}")
    hub.add_repo("owner/big", folder)
    hub.faults.add("cut", "*model.safetensors", -1, after=900_000)
    assert call("pull", "owner/big", "out", "--jobs", "1").code == 0


@pytest.mark.sampled(1)
@pytest.mark.parametrize("which", ["config.json", "shard"])
def test_a_damaged_file_in_the_clients_cache_is_fetched(hub: LocalHub, call: Call, which: str) -> None:
    snapshot = in_client_cache(hub)
    path = snapshot / "config.json" if which == "config.json" else sorted(snapshot.glob("*.safetensors"))[-1]
    raw = bytearray(path.read_bytes())
    raw[-5] ^= 1
    path.resolve().write_bytes(raw)
    first = call("quantize", REPO, "out")
    assert first.code == (0 if which == "config.json" else 4), first
    assert call("quantize", REPO, "out").code == 0
    offline = call("quantize", REPO, "other", HF_HUB_OFFLINE="1")
    assert offline.code == (0 if which == "config.json" else 4), "small files that were right are kept by us too"


def test_offline_a_cache_without_links_is_read_too(hub: LocalHub, call: Call) -> None:
    snapshot = in_client_cache(hub, NO_LINKS + DOWNLOAD)
    assert not any(p.is_symlink() for p in snapshot.iterdir())
    assert call("inspect", REPO, HF_HUB_OFFLINE="1").code == 0
    assert call("quantize", REPO, "out", HF_HUB_OFFLINE="1").code == 0


@pytest.mark.parametrize("names", [("config.json",), ("config.json", "model.safetensors.index.json")])
def test_offline_a_partial_cache_is_named(hub: LocalHub, call: Call, names: tuple[str, ...]) -> None:
    in_client_cache(hub, f"from huggingface_hub import hf_hub_download as d\nfor n in {names}: d('{NAME}', n)")
    assert_refused(call("inspect", REPO, HF_HUB_OFFLINE="1"), "cache", "HF_HUB_OFFLINE", code=4)


def test_a_folder_of_the_owners_name_hides_no_repo(call: Call, tmp_path: Path) -> None:
    (tmp_path / "owner").mkdir()
    assert call("inspect", "owner/model").code == 0


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", ["git~1/hooks/x", ".git./config", ".ds4convert./x", "a/DS4CON~1/x", ".GIT /x"])
def test_names_that_some_systems_take_for_others_are_refused(hub: LocalHub, call: Call, name: str) -> None:
    hub.put(NAME, {name: b"x"})
    assert_refused(call("pull", REPO, "out", "--only", "meta"), "not a safe file name")


def test_a_mirror_with_an_etag_of_its_own_is_believed_by_size(hub: LocalHub, call: Call) -> None:
    hub.faults.add("drop", "*", -1, name="X-Linked-ETag")
    assert call("inspect", REPO).code == 0


@pytest.mark.sampled(1)
@pytest.mark.parametrize("place", ["header", "data"])
def test_a_head_that_is_a_whole_shard_is_checked_by_its_digest(
    hub: LocalHub, call: Call, tmp_path: Path, place: str
) -> None:
    assert call("inspect", REPO).code == 0  # the header is known now, and not asked for again
    shard = next(n for n, p in sorted(hub.files(NAME).items()) if n.endswith(".safetensors") and b"mtp.0" in _head(p))
    at = 20 if place == "header" else hub.files(NAME)[shard].stat().st_size - 9
    hub.faults.add("wrong", f"{NAME}/{shard}", 1, at=at)
    wrong = call("pull", REPO, "out", "--only", "mtp")
    assert_refused(wrong, shard, code=4)
    assert call("pull", REPO, "out", "--only", "mtp").code == 0
    assert not (tmp_path / "out" / ".ds4convert").exists()


def _head(path: Path) -> bytes:
    with path.open("rb") as f:
        return f.read(int.from_bytes(f.read(8), "little"))


STOPPING = """
import os, sys
import ds4convert.files as f
done, stop = [0], int(sys.argv[1])
def wrap(name):
    real = getattr(f.Disk, name)
    def call(self, *a, **k):
        done[0] += 1
        if done[0] == stop: os._exit(137)
        return real(self, *a, **k)
    setattr(f.Disk, name, call)
for x in [x for x in vars(f.Disk) if not x.startswith('_') and callable(getattr(f.Disk, x))]: wrap(x)
from ds4convert.__main__ import main
sys.argv = ['ds4convert', 'pull', 'hf://owner/model', sys.argv[2], '--only', 'mtp', '--jobs', '1', '-q']
try: main()
finally: print(done[0])
"""


@pytest.mark.nightly
def test_a_pull_of_the_head_killed_at_any_last_call_is_finished_by_the_same_command(
    hub: LocalHub, call: Call, tmp_path: Path
) -> None:
    environment = os.environ | hub.environment() | {"PYTHONPATH": str(ROOT)}

    def run(stop: int, dest: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", STOPPING, str(stop), dest]
        return subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)

    assert call("inspect", REPO).code == 0
    calls = int(run(0, "whole").stdout.split()[-1])
    for stop in range(calls, calls - 9, -1):
        name = f"killed-{stop}"
        assert run(stop, name).returncode == 137, f"call {stop} of {calls}"
        again: Result = call("pull", REPO, name, "--only", "mtp")
        assert again.code == 0 and tree(tmp_path / name) == tree(tmp_path / "whole"), f"call {stop} of {calls}: {again}"
