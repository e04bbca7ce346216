"""What messages say to do next: near names, options that the command has, what differs from an unfinished run."""

from __future__ import annotations

from pathlib import Path

import pytest

from ds4convert.api import values
from ds4convert.checkpoint.types import LeftOut
from ds4convert.cli import progress
from ds4convert.converted import grouping
from ds4convert.words import macs
from tests.support import ROOT, assert_refused, run, run_process

DEMO = ROOT / "manifests" / "demo"


@pytest.mark.parametrize(
    ("words", "near"),
    [
        (["plan", "--config", "flsh"], "did you mean flash or flash-v41?"),
        (["plan", "--config", "tiny", "--recipe", "q44"], "did you mean q4?"),
        (["plan", "--config", "tiny", "--layout", "universl"], "did you mean universal?"),
        (["plan", "--config", "tiny", "--backbone", "afine-4-g64"], "affine-4-g64"),
        (["inspect", str(DEMO)[:-1]], f"did you mean {DEMO}?"),
        (["verify", str(DEMO)[:-1]], f"did you mean {DEMO}?"),
    ],
)
def test_a_mistyped_name_gets_the_near_ones(words: list[str], near: str) -> None:
    result = run(*words)
    assert result.code in {2, 3} and near in result.err and "download it again" not in result.err


def test_graft_offers_no_option_that_it_lacks(tmp_path: Path) -> None:
    assert run("quantize", DEMO, tmp_path / "mlx", "--drop-mtp", "-q").code == 0
    result = run("graft", tmp_path / "mlx", "--from", tmp_path / "mlx", "--out", tmp_path / "out")
    assert_refused(result, "has no head to graft", "name a checkpoint")
    assert "--from-mlx" not in result.err
    assert "--from-mlx" in run("quantize", tmp_path / "mlx", tmp_path / "again").err


def test_quiet_leaves_errors_and_what_was_asked_for(tmp_path: Path) -> None:
    for words in (["quantize", DEMO, tmp_path / "mlx"], ["verify", tmp_path / "mlx"],
                  ["relayout", tmp_path / "mlx", tmp_path / "b", "--layout", "mtplx"], ["diff", DEMO, tmp_path / "mlx"]):  # fmt: skip
        result = run(*words, "-q")
        assert (result.code, result.out, result.err) == (0, "", ""), words
    (tmp_path / "mlx" / "config.json").write_text("{}")
    failed = run("verify", tmp_path / "mlx", "-q")
    assert failed.code == 1 and "FAIL" in failed.out and "config.json" in failed.out
    told = run("quantize", DEMO, tmp_path / "c", "-v")
    assert "at a time" in told.err and "experts" in told.err


def test_a_log_gets_lines_with_the_time_left() -> None:
    told: list[str] = []
    before, progress.LINE_EVERY_S = progress.LINE_EVERY_S, 0.01
    try:
        with progress.shown(1000, "converting", told.append, lambda done, seconds: 7200.0) as done:
            done(250)
            for _ in range(2000):
                if told:
                    break
                progress.time.sleep(0.005)
    finally:
        progress.LINE_EVERY_S = before
    assert told[0].startswith("converting: 250 B of 1.0 KB (25%)") and told[0].endswith("about 2 h 0 min left")


def test_a_temporary_folder_that_is_gone_is_said_and_does_not_matter() -> None:
    result = run_process("inspect", DEMO, variables={"TMPDIR": "/nonexistent/tmp"})
    assert result.code == 0 and "TMPDIR" in result.err


def test_many_tensors_left_out_for_one_reason_are_one_line() -> None:
    rows = [LeftOut(f"mtp.0.x{n}", "dropped") for n in range(1575)] + [LeftOut("a", "other")]
    assert grouping.by_reason(rows) == [("1,575 tensors (mtp.0.*)", "dropped"), ("a", "other")]


def test_a_mac_has_gib_and_lets_metal_use_a_part() -> None:
    """As reported for 16 GB and 128 GB: github.com/exo-explore/exo/pull/1672, github.com/antirez/ds4/issues/890."""
    assert macs.usable(128 * macs.GIB) == 96 * macs.GIB and round(macs.usable(16 * macs.GIB) / macs.GIB, 2) == 10.67
    assert "107.5 GiB" in macs.said(128 * macs.GIB)
    assert [macs.looks_like(n) for n in (128 * 10**9, 96 << 30, 100 * 10**9)] == [128, 96, None]


@pytest.mark.slow
def test_mac_fits_what_such_a_mac_holds_and_fit_says_when_a_mac_is_meant() -> None:
    assert {values.mac_size(size) for size in ("128GB", "128", "128G", "128GiB", "128 gb")} == {128 << 30}
    made = run("plan", "--config", "flash", "--mac", "128", "--json").json
    assert made["fit"]["target_bytes"] == 96 << 30 and made["fit"]["mac_bytes"] == 128 << 30
    assert made["output_bytes"] < made["fit"]["planned_bytes"] <= 96 << 30
    meant = run("plan", "--config", "flash", "--fit", "128GB", "--json")
    assert "--mac 128GB" in meant.err and meant.json["fit"]["target_bytes"] == 128 * 10**9
    assert "--mac" not in run("plan", "--config", "flash", "--fit", "100GB", "--json").err
    for size in ("96", "96G"):
        refused = run("plan", "--config", "flash", "--fit", size)
        assert refused.code == 2 and all(w in refused.err for w in ("96GB", "96GiB", "--mac 96GB"))
    assert run("plan", "--config", "flash", "--fit", "96GB", "--mac", "128GB").code == 2
