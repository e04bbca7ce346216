"""Equal input and options give equal bytes: whatever the number of workers, and however often the run was killed."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest

from tests import support_run as s

KILLS, FEW = 10, 3
KILL_CONFIG = {"hidden_size": 1024, "moe_intermediate_size": 512, "vocab_size": 2048}
SHARD = "25MB"
ROUNDED = ["--backbone", "affine-4-g64", "--mtp", "mxfp8"]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return s.tiny(tmp_path_factory.mktemp("same") / "source")


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 190 MB in all kinds of tensors, so that a run lasts long enough to be killed in its midst."""
    return s.tiny(tmp_path_factory.mktemp("large") / "source", experts=40, **KILL_CONFIG)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("layout", ["inline", "universal"])
@pytest.mark.parametrize("hashing", [True, False])
def test_the_number_of_workers_does_not_change_a_byte(source: Path, layout: str, hashing: bool, tmp_path: Path) -> None:
    seen = []
    for jobs in (1, 2, 7):
        out = tmp_path / str(jobs)
        s.run(source, out, layout=layout, hashing=hashing, jobs=jobs, max_shard_bytes=1_000_000)
        seen.append(s.contents(out))
    assert len(seen[0]) > 8 and seen[0] == seen[1] == seen[2]


def test_the_place_of_source_and_result_does_not_change_a_byte(source: Path, tmp_path: Path) -> None:
    elsewhere = s.copied(source, tmp_path / "a" / "deep" / "place")
    s.run(source, tmp_path / "one")
    s.run(elsewhere, tmp_path / "two")
    assert s.contents(tmp_path / "one") == s.contents(tmp_path / "two")


@pytest.mark.parametrize("size", [1_000_000, 2_500_000, 10**12])
def test_any_shard_size_holds_the_same_tensors_and_verifies(source: Path, size: int, tmp_path: Path) -> None:
    out, plain = tmp_path / "mlx", tmp_path / "plain"
    s.run(source, out, max_shard_bytes=size)
    s.run(source, plain)
    assert s.wrong(out, source) == []
    ours, others = s.stored(out), s.stored(plain)
    assert set(ours) == set(others)
    assert all(ours[n].raw().tobytes() == others[n].raw().tobytes() for n in ours)
    largest = max(t.size for t in ours.values())
    assert all(p.stat().st_size <= max(size, largest) * 1.1 + 100_000 for p in out.glob("*.safetensors"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "wanted_kills"),
    [
        (["--hash"], KILLS),
        (["--no-hash"], FEW),
        pytest.param(["--hash", *ROUNDED], FEW, marks=pytest.mark.nightly),
        pytest.param(["--no-hash"], KILLS, marks=pytest.mark.nightly),
        pytest.param(["--hash", *ROUNDED], KILLS, marks=pytest.mark.nightly),
        pytest.param(["--no-hash", *ROUNDED], KILLS, marks=pytest.mark.nightly),
    ],
)
def test_a_run_killed_at_random_moments_gives_the_folder_of_an_unbroken_run(
    large: Path, settings: list[str], wanted_kills: int, tmp_path: Path
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    options = [*settings, "--max-shard-size", SHARD]
    calls = s.disk_calls("quantize", large, whole, *options)
    wanted, dice = s.contents(whole), random.Random(3)
    moments: list[int] = []
    kills = in_the_midst = 0
    while kills < wanted_kills:
        assert len(moments) < 10 * wanted_kills, (
            f"hardly any run lasted until it was killed: {moments} of {calls} calls"
        )
        moments.append(dice.randint(1, calls // 3))
        killed = s.killed_at(moments[-1], "quantize", large, out, *options)  # each goes on from the last
        kills += killed
        in_the_midst += killed and any(out.glob("*.partial"))
        if not killed:  # it got to its end before: one more chain of kills, from the beginning
            assert s.contents(out) == wanted, moments
            shutil.rmtree(out)
    done = json.loads(s.cli("quantize", large, out, *options, "--json").stdout)
    assert s.contents(out) == wanted, moments
    assert in_the_midst >= wanted_kills // 2 and done["manifest"] == str(out / "ds4convert_manifest.json")
