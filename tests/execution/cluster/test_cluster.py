"""`quantize --cluster`: parts on several machines of a real Ray cluster, whatever dies; then the folder of a single run.

The machines are Ray nodes on this one (`nodes.py`). What Ray does when something dies is not taken from its pages but
seen here: it ends a driver whose head is gone, which must not reach our user.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests import support_run as s
from tests.execution.cluster import running
from tests.execution.cluster.running import Cluster, begun, ended, until

pytestmark = [
    pytest.mark.skipif(find_spec("ray") is None, reason="the extra `ray` is not installed"),
    pytest.mark.skipif(sys.platform != "linux", reason="the machines are told apart by Linux's /proc"),
    pytest.mark.slow,
]

WORDS = ("--recipe", "q2", "--max-shard-size", "8MB")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of 50 MB: a second of work for each of its files, so that there is time to kill who writes it."""
    folder = tmp_path_factory.mktemp("cluster") / "source"
    return s.tiny(folder, layers=3, experts=64, moe_intermediate_size=512)


@pytest.fixture(scope="module")
def whole(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    out = tmp_path_factory.mktemp("whole") / "out"
    s.cli("quantize", source, out, *WORDS, "-q")
    return s.contents(out)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with running.cluster(tmp_path_factory.mktemp("ray"), {}, {}) as found:
        yield found


@pytest.fixture
def own(tmp_path: Path) -> Iterator[Callable[..., Cluster]]:
    """Return what starts a cluster for one test alone."""
    held = []

    def start(*machines: dict[str, str]) -> Cluster:
        held.append(running.cluster(tmp_path, *machines))
        return held[-1].__enter__()

    yield start
    for one in held:
        one.__exit__(None, None, None)


def quantize(source: Path, out: Path, at: Cluster, *more: str, **settings: str) -> s.subprocess.Popen[str]:
    words = ("quantize", source, out, *WORDS, "--cluster", at.address, *more)
    return s.start(*words, env=s.environment() | settings)


def test_a_killed_worker_and_a_killed_machine_cost_the_user_nothing(
    source: Path, whole: dict[str, str], two: Cluster, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    run = quantize(source, out, two)
    until(lambda: begun(out) and two.writing(), run, "a part was begun")
    os.kill(two.writing()[0], signal.SIGKILL)
    machine = two.add()  # so that there are two again for the next test
    until(lambda: two.writing(2) and len(list(out.glob("*.safetensors"))) >= 2, run, "the second machine wrote")
    two.order(kill=2)
    told = ended(run, 0)
    assert s.contents(out) == whole
    assert "cluster: 2 machines with 2 cores" in told and "begun again" in told
    assert not two.rounding() and machine == 3


@pytest.mark.nightly
def test_a_nan_in_a_scale_ends_the_run_as_it_does_without_a_cluster(source: Path, two: Cluster, tmp_path: Path) -> None:
    bad = s.copied(source, tmp_path / "bad")
    put_nan(bad)
    alone = s.cli("quantize", bad, tmp_path / "alone", *WORDS, exit_code=3)
    told = ended(quantize(bad, tmp_path / "out", two), 3)
    assert "NaN in E8M0" in told
    assert told.strip().splitlines()[-1] == alone.stderr.strip().splitlines()[-1]
    assert not (tmp_path / "out" / "ds4convert_manifest.json").exists()
    until(lambda: not two.writing() and not two.rounding(), what="the others ended")


def put_nan(folder: Path) -> None:
    """Put a NaN into the scale of one expert in the middle of the model."""
    name = "layers.1.ffn.experts.7.w2.scale"
    where = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"][name]
    path = folder / where
    data = bytearray(path.read_bytes())
    begin = 8 + int.from_bytes(data[:8], "little")
    data[begin + json.loads(data[8:begin])[name]["data_offsets"][0] + 3] = 0xFF
    path.write_bytes(data)


@pytest.mark.nightly
def test_ctrl_c_ends_all_within_ten_seconds_and_an_ordinary_run_goes_on(
    source: Path, whole: dict[str, str], two: Cluster, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    run = quantize(source, out, two)
    until(lambda: begun(out) and two.writing(), run, "a part was begun")
    start = time.monotonic()
    running.interrupt(run)
    told = ended(run, 130)
    assert time.monotonic() - start < 10
    assert "Interrupted. What is finished is safe" in told
    until(lambda: not two.writing() and not two.rounding(), what="the workers ended")
    s.cli("quantize", source, out, *WORDS, "-q")
    assert s.contents(out) == whole


@pytest.mark.nightly
def test_a_run_that_is_killed_leaves_nobody_writing_and_the_next_goes_on(
    source: Path, whole: dict[str, str], two: Cluster, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    run = quantize(source, out, two)
    until(lambda: begun(out) and list(out.glob("*.safetensors")), run, "a part was finished")
    run.kill()
    run.communicate()
    until(lambda: not two.writing() and not two.rounding(), what="the workers ended")
    before = {p.name: p.stat().st_ino for p in out.glob("*.safetensors")}
    done = s.cli("quantize", source, out, *WORDS, "--cluster", two.address, "--json")
    assert json.loads(done.stdout)["resumed"] and s.contents(out) == whole
    assert before.items() <= {p.name: p.stat().st_ino for p in out.glob("*.safetensors")}.items()


@pytest.mark.nightly
def test_a_lost_head_is_told_in_our_words_and_an_ordinary_run_ends_the_conversion(
    source: Path, whole: dict[str, str], own: Callable[..., Cluster], tmp_path: Path
) -> None:
    """Ray ends a driver that cannot reach its head, after a minute; here, by Ray's own setting, after 5 s."""
    found, out = own({}, {}), tmp_path / "out"
    run = quantize(source, out, found, RAY_gcs_rpc_server_reconnect_timeout_s="5")
    until(lambda: begun(out), run, "a part was begun")
    found.order(kill_head=True)
    told = ended(run, 4)
    assert "the connection to the cluster was lost" in told and "What is finished is safe" in told
    assert len(told.strip().splitlines()) <= 3
    found.close()
    s.cli("quantize", source, out, *WORDS, "-q")
    assert s.contents(out) == whole


@pytest.mark.nightly
def test_machines_of_another_kind_are_refused_by_name_and_the_others_do_the_work(
    source: Path, whole: dict[str, str], own: Callable[..., Cluster], tmp_path: Path
) -> None:
    other, changed = running.other_arithmetic(tmp_path / "a"), running.changed_package(tmp_path / "b")
    found, out = own(other, changed), tmp_path / "out"
    told = ended(quantize(source, out, found), 4)  # this run's folder has the whole package, which they must not take
    assert told.count("takes no part") == 2
    assert (
        "rounds to other bytes: bf16 to" in told
        and "fp4 to affine-2" in told
        and "has other code than the run's" in told
    )
    assert "no machine there can take part" in told and not out.exists()
    found.add()
    told = ended(quantize(source, out, found), 0)
    assert told.count("takes no part") == 2 and "cluster: 1 machine with 1 core" in told
    assert s.contents(out) == whole


def test_what_takes_no_cluster_is_refused_before_one_is_looked_for(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for words, code, told in (
        (["--cluster", "ray://head:10001"], 2, "expected HOST:PORT of the head"),
        (["--cluster", "head"], 2, "expected HOST:PORT of the head"),
        (["--cluster", "auto", "--part", "1/2"], 2, "--part and --cluster contradict each other"),
        (["--cluster", "127.0.0.1:1"], 4, "nothing answers there"),
    ):
        assert told in s.cli("quantize", source, out, *WORDS, *words, exit_code=code).stderr
    assert not out.exists()
