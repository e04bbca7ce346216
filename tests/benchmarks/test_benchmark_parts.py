"""The parts of the benchmarks that figures rest on: what is counted, what is compared, and what is called good."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ds4convert.formats.codecs import CODECS
from tests.tools.loaded import load

mtp, serve, held_out = (load(f"benchmarks/{n}.py") for n in ("mtp_speed", "serve_load", "held_out"))
copy, rounding, rearrange, convert = (
    load(f"benchmarks/{n}.py") for n in ("copy_paths", "rounding", "rearrange", "convert_speed")
)


def test_the_fastest_round_of_each_step_counts_and_the_first_is_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    now, costs = [0.0], {"a": [0.001, 5.0, 3.0, 4.0], "b": [0.001, 2.0, 7.0, 1.0]}
    monkeypatch.setattr(mtp, "clock", lambda: now[0])
    done: list[str] = []

    def step(name: str) -> Any:
        def run() -> None:
            now[0] += costs[name][done.count(name)]
            done.append(name)

        return run

    assert mtp.fastest({"a": step("a"), "b": step("b")}, 3) == {"a": pytest.approx(3.0), "b": pytest.approx(1.0)}
    assert done == ["a", "b"] * 4, "in turn, so that all meet the same moments"


def test_a_prompt_of_ids_is_within_the_vocabulary_and_spread_over_it() -> None:
    ids = mtp.ids_of({"vocab_size": 1000}, 300)
    assert len(ids) == 300 and all(0 <= i < 1000 for i in ids) and len(set(ids)) == 300


def test_requests_are_counted_by_status_and_what_was_there_before_is_not() -> None:
    name = 'requests_total{{path="/v1/{}",status="{}"}}'
    before = {name.format("completions", 200): 3.0}
    after = {
        name.format("completions", 200): 10.0, name.format("chat/completions", 200): 2.0,
        name.format("completions", 499): 4.0, name.format("models", 200): 50.0, "tokens_total": 9.0,
    }  # fmt: skip
    assert serve.Load._counted(before, after, 200) == 9.0 and serve.Load._counted(before, after, 499) == 4.0


def facts(**more: Any) -> dict[str, Any]:
    return {"errors": 0, "all_counted": True, "growth": 0.05, "seen": {"whole": 9, "left": 3}} | more


def test_a_load_is_good_without_errors_with_all_counted_and_with_memory_that_does_not_grow() -> None:
    assert serve.is_good(facts())
    assert serve.is_good(facts(growth=None)), "not known on a Mac"
    for wrong in ({"errors": 1}, {"all_counted": False}, {"growth": 0.2}):
        assert not serve.is_good(facts(**wrong)), wrong


def test_a_mean_over_chapters_has_the_standard_error_of_the_mean() -> None:
    found = held_out.mean([1.0, 2.0, 3.0, 4.0])
    assert found.mean == 2.5
    assert found.error == pytest.approx((5 / 3) ** 0.5 / 2), "a sample's variance is 5 / 3, of four chapters"
    assert found.said(2) == "2.50 +- 0.65"


def test_a_ratio_on_the_same_chapters_has_no_error_of_what_both_share() -> None:
    same = held_out.ratio([0.5, 1.0, 4.0], [1.0, 2.0, 8.0])
    assert (same.mean, same.error) == (0.5, 0.0), "chapters differ, the ratio does not"
    other = held_out.ratio([1.0, 3.0], [2.0, 2.0])
    assert other.mean == 1.0 and other.error == pytest.approx(0.5), "1 +- 1 by chapter, over a mean of 2, of two"


@pytest.mark.parametrize("way", copy.WAYS, ids=lambda way: way[0])
def test_every_way_to_copy_moves_the_bytes_from_place_to_place(
    tmp_path: Path, way: tuple[str, str, int, int, int]
) -> None:
    _, kind, piece, start, offset = way
    size = 2 * copy.BUFFER if kind == "buffer" else piece
    data = np.random.default_rng(0).integers(0, 256, start + size, dtype=np.uint8).tobytes()
    (tmp_path / "a").write_bytes(data)
    (tmp_path / "b").write_bytes(bytes(offset))
    a, b = os.open(tmp_path / "a", os.O_RDONLY), os.open(tmp_path / "b", os.O_RDWR)
    copy.moved(kind, a, b, piece, start, offset, size)
    os.close(a)
    os.close(b)
    assert (tmp_path / "b").read_bytes() == bytes(offset) + data[start:]


def test_ours_and_mlx_of_a_matrix_are_compared_group_by_group_and_ours_is_never_worse() -> None:
    rng = np.random.default_rng(0)
    codec = CODECS["affine-3-g64"]
    for matrix in (rounding.Matrix(rounding.normal(rng, 4)), rounding.through_fp4(rng, 4)):
        mine, theirs = (rounding.group_errors(matrix, codec, f(matrix, codec)) for f in (rounding.ours, rounding.mlx))
        assert mine.shape == theirs.shape and (mine <= theirs * (1 + 1e-6)).all() and mine.sum() < theirs.sum()
        values = rounding.ours(matrix, codec).astype(np.float64)
        source = np.asarray(matrix.values, np.float64)
        assert mine.sum() == pytest.approx(((values - source) ** 2).sum(), rel=1e-6)


def test_a_row_of_the_table_has_time_bytes_files_kept_and_memory(capsys: pytest.CaptureFixture[str]) -> None:
    rearrange.show("graft", ({"bytes_written": 1_500_000_000, "files_kept": ["a", "b"]}, 2.25, 170))
    rearrange.show("quantize", ({"output_bytes": 3 * 10**9}, 10.0, 99))
    assert capsys.readouterr().out == (
        "| graft | 2.2 s | 1.50 GB | 2 | 170 MB |\n| quantize | 10.0 s | 3.00 GB | 0 | 99 MB |\n"
    )


def test_the_bytes_of_a_folder_are_those_of_its_files(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b").write_bytes(bytes(5))
    (tmp_path / "c").write_bytes(bytes(7))
    assert convert.folder_bytes(tmp_path) == 12
