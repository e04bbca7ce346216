"""A model over two processes, as mlx.launch starts them: the same logits, text and acceptance as one, or a clear end.

What mlx.launch gives each process of its ring backend are the environment variables MLX_RANK and MLX_HOSTFILE, a file with
the addresses of all (mlx/_distributed_utils/launch.py of mlx 0.32). Here they are given directly, so that processes can be
given different things; one test goes through mlx.launch itself.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import ds4convert as ds4
from ds4convert.demo import embedded
from tests import support_run as s

pytest.importorskip("mlx.core")

DEMO = s.ROOT / "manifests" / "demo"
HEADS = (embedded.CLASSIC, embedded.DSPARK)
IDS = "260,343,336,288,260,431,270"

LOGITS = """
import sys
from pathlib import Path
import mlx.core as mx
from mlx.utils import tree_flatten
from ds4convert.inference.load import load_model
from ds4convert.inference.several.ranks import team

ranks = team()
out = Path(sys.argv[1])
for folder in map(Path, sys.argv[2:]):
    for dense in (False, True):
        model, _ = load_model(folder, dtype="float32", dense=dense, ranks=ranks)
        found = {str(n): model(mx.array([[(i * 37 + 5) % 200 + 2 for i in range(n)]])) for n in (1, 70)}
        held = [v.nbytes for k, v in tree_flatten(model.parameters()) if k.startswith("model.") and "switch_mlp" in k]
        found["held"] = mx.array(sum(held))
        mx.savez(str(out / f"{folder.name}-{dense}-{ranks.rank if ranks else 'alone'}.npz"), **found)
"""


def environments(folder: Path, size: int = 2) -> list[dict[str, str]]:
    """Return what mlx.launch has in the environment of each process of a ring on loopback."""
    sockets = [socket.socket() for _ in range(size)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    hosts = [[f"127.0.0.1:{one.getsockname()[1]}"] for one in sockets]
    for one in sockets:
        one.close()
    path = folder / "hosts.json"
    path.write_text(json.dumps(hosts))
    return [s.environment() | {"MLX_RANK": str(n), "MLX_HOSTFILE": str(path)} for n in range(size)]


def together(folder: Path, *commands: list[str | Path]) -> list[subprocess.CompletedProcess[str]]:
    """Run one command line in each rank; return how each ended."""
    children = [
        s.start(*words, env=env) for words, env in zip(commands, environments(folder, len(commands)), strict=True)
    ]
    ended = []
    for child in children:
        out, err = child.communicate(timeout=600)
        ended.append(subprocess.CompletedProcess(child.args, child.returncode, out, err))
    return ended


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return a converted folder of each kind of head, the experts of the backbone quantized."""
    out = tmp_path_factory.mktemp("ranks")
    for kind in HEADS:
        source = out / f"{kind}-source"
        source.mkdir()
        for name, raw in embedded.files(kind):
            (source / name).write_bytes(raw)
        ds4.convert(source, out / kind, recipe="q4")
    return {kind: out / kind for kind in HEADS}


def test_logits_are_those_of_one_process_and_each_rank_holds_its_share(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    import mlx.core as mx

    words = [sys.executable, "-c", LOGITS, str(tmp_path), *map(str, folders.values())]
    subprocess.run(words, env=s.environment(), check=True, timeout=600)
    children = [subprocess.Popen(words, env=env) for env in environments(tmp_path)]
    assert [child.wait(600) for child in children] == [0, 0]
    for name in (f"{folder.name}-{dense}" for folder in folders.values() for dense in (False, True)):
        alone, *ranks = (mx.load(str(tmp_path / f"{name}-{who}.npz")) for who in ("alone", 0, 1))
        for found in ranks:
            for n in ("1", "70"):
                assert mx.abs(found[n] - alone[n]).max().item() <= 1e-5
            assert found["held"].item() == alone["held"].item() / 2


@pytest.mark.parametrize("kind", ["classic", pytest.param("dspark", marks=pytest.mark.nightly)])
def test_text_and_acceptance_are_those_of_one_process_and_the_first_rank_alone_prints(
    folders: dict[str, Path], kind: str, tmp_path: Path
) -> None:
    words = ["generate", folders[kind], "--prompt-ids", IDS, "--max-tokens", "10", "--dtype", "float32", "--json"]
    alone = json.loads(s.cli(*words).stdout)
    first, second = together(tmp_path, words, words)
    found = json.loads(first.stdout)
    same = ("tokens", "drafted", "accepted", "passes", "mtp_active", "head_kind")
    assert [found[k] for k in same] == [alone[k] for k in same] and alone["accepted"] > 0
    assert (first.returncode, second.returncode) == (0, 0) and second.stdout == second.stderr == ""


def test_sampled_text_is_one_text_though_no_seed_is_said(folders: dict[str, Path], tmp_path: Path) -> None:
    words = ["generate", folders["classic"], "--prompt-ids", IDS, "--max-tokens", "6", "--temp", "1.2", "--json"]
    first, second = together(tmp_path, words, words)
    assert (first.returncode, second.returncode) == (0, 0), first.stderr  # else they were told apart at the end
    assert len(json.loads(first.stdout)["tokens"]) == 6


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["classic", pytest.param("dspark", marks=pytest.mark.nightly)])
def test_verify_by_mlx_launch_proves_the_head_as_one_process_does(
    folders: dict[str, Path], kind: str, tmp_path: Path
) -> None:
    launch = shutil.which("mlx.launch", path=str(Path(sys.executable).parent))
    if launch is None:
        pytest.skip("mlx.launch, which comes with mlx, is not beside this Python")
    (tmp_path / "prompts.txt").write_text(f"{IDS}\n")
    words = ["verify", folders[kind], "--mtp", "--prompts", tmp_path / "prompts.txt", "--max-tokens", "8", "--json"]
    alone = json.loads(s.cli(*words).stdout)
    program = tmp_path / "ds4convert"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m ds4convert "$@"\n')
    program.chmod(0o755)
    port = environments(tmp_path)  # two free ports in a row are likely where one is
    start = json.loads(Path(port[0]["MLX_HOSTFILE"]).read_text())[0][0].partition(":")[2]
    done = subprocess.run(
        [launch, "-n", "2", "--backend", "ring", "-p", start, "--", str(program), *map(str, words)],
        env=s.environment(), stdin=subprocess.PIPE, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    found = json.loads(done.stdout)
    same = ("present", "kind", "acceptance", "drafted", "accepted", "tokens_per_pass", "greedy_equal")
    assert [found["mtp"][k] for k in same] == [alone["mtp"][k] for k in same]
    assert [(c["name"], c["ok"]) for c in found["checks"]] == [(c["name"], c["ok"]) for c in alone["checks"]]
    assert found["ok"] == alone["ok"]  # mlx.launch itself ends with 0, whatever its processes end with


@pytest.mark.parametrize(
    "name", ["tiny-a", *(pytest.param(n, marks=pytest.mark.nightly) for n in ("dspark-a", "tiny-v41-a"))]
)
def test_a_recording_of_the_official_code_is_met_by_two_ranks(name: str, tmp_path: Path) -> None:
    ds4.convert(s.GOLDEN / name / "checkpoint", tmp_path / "mlx")
    words: list[str | Path] = [
        "verify", tmp_path / "mlx", "--reference", s.GOLDEN / name / "golden.safetensors", "--json"
    ]  # fmt: skip
    first, second = together(tmp_path, words, words)
    found = json.loads(first.stdout)
    assert first.returncode == second.returncode == 0, found
    assert found["reference"] and all(c["ok"] for c in found["reference"])


def differing(folders: dict[str, Path], tmp_path: Path) -> dict[str, tuple[list[Any], list[Any], int, str]]:
    """Return what two ranks may be given that is not the same: both command lines, the exit code, and what is told."""
    base = ["--prompt-ids", IDS, "--max-tokens", "4"]
    one = ["generate", folders["classic"], *base]
    copy = s.copied(folders["classic"], tmp_path / "copy")
    settings = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(settings | {"rms_norm_eps": 1e-5}))
    return {
        "another folder": (one, ["generate", copy, *base], 4, "folder (digest) is "),
        "another option": (one, [*one, "--no-mtp"], 4, "options is "),
        "no folder": (one, ["generate", tmp_path / "none", *base], 3, "rank 1: "),
        "no folder on the first": (["generate", tmp_path / "none", *base], one, 3, "no such file or folder"),
    }


@pytest.mark.parametrize(
    "case",
    ["another folder", "no folder", *(pytest.param(c, marks=pytest.mark.nightly) for c in ("another option", "no folder on the first"))],
)  # fmt: skip
def test_ranks_that_differ_stop_and_the_first_tells_in_what(
    folders: dict[str, Path], case: str, tmp_path: Path
) -> None:
    one, other, code, told = differing(folders, tmp_path)[case]
    first, second = together(tmp_path, one, other)
    assert (first.returncode, second.returncode) == (code, code), (first.stderr, second.stderr)
    assert told in first.stderr and len(first.stderr.strip().splitlines()) == 1 and not first.stdout
    assert second.stdout == "" and "Traceback" not in second.stderr


def test_a_damaged_copy_on_another_machine_is_a_check_that_fails(folders: dict[str, Path], tmp_path: Path) -> None:
    copy = s.copied(folders["classic"], tmp_path / "copy")
    shard = sorted(copy.glob("*.safetensors"))[0]
    s.flip(shard, shard.stat().st_size - 3)
    first, second = together(tmp_path, ["verify", folders["classic"], "--json"], ["verify", copy, "--json"])
    wrong = [c["name"] for c in json.loads(first.stdout)["checks"] if not c["ok"]]
    assert first.returncode == second.returncode == 1 and "digests (rank 1)" in wrong and second.stdout == ""


def test_what_one_machine_does_by_itself_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    words: list[str | Path] = ["verify", folders["classic"], "--source", DEMO]
    first, second = together(tmp_path, words, words)
    assert first.returncode == second.returncode == 2 and "are for one machine" in first.stderr
    assert os.environ.get("MLX_RANK") is None
