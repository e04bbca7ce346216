"""Single formulas against direct arithmetic."""

from __future__ import annotations

import math

import mlx.core as mx
import pytest

from ds4convert.inference.deepseek_v4.attention import Indexer
from ds4convert.inference.deepseek_v4.config import ModelArgs
from ds4convert.inference.deepseek_v4.layers import (
    Rope,
    SwitchLinear,
    fused_sinkhorn,
    rope_frequencies,
    rotate,
    sinkhorn,
    swiglu,
)
from tests.inference.golden_data import NAMES, build, max_diff


def test_rotation_turns_interleaved_pairs_of_the_last_columns_and_back() -> None:
    x = mx.random.normal((1, 3, 2, 10))
    table = Rope(4, 100.0).table(5, 3)
    y = rotate(x, table)
    assert max_diff(y[..., :6], x[..., :6]) == 0
    for row in range(3):
        for pair, frequency in enumerate([1.0, 100.0**-0.5]):
            a, b = x[0, row, 1, 6 + 2 * pair].item(), x[0, row, 1, 7 + 2 * pair].item()
            angle = (5 + row) * frequency
            assert y[0, row, 1, 6 + 2 * pair].item() == pytest.approx(
                a * math.cos(angle) - b * math.sin(angle), abs=1e-5
            )
    assert max_diff(rotate(y, table, inverse=True), x) < 1e-6


def test_yarn_keeps_fast_pairs_and_stretches_slow_ones() -> None:
    scaling = {"factor": 16, "original_max_position_embeddings": 65536, "beta_fast": 32, "beta_slow": 1}
    plain, scaled = rope_frequencies(64, 160000.0, None), rope_frequencies(64, 160000.0, scaling)
    assert scaled[0] == plain[0] and scaled[-1] == pytest.approx(plain[-1] / 16)
    assert all(low / 16 <= found <= low for low, found in zip(plain, scaled, strict=True))
    assert rope_frequencies(64, 160000.0, scaling | {"original_max_position_embeddings": 0}) == plain


def test_sinkhorn_ends_with_columns_and_its_fused_form_is_the_same() -> None:
    x = 3 * mx.random.normal((2, 5, 4, 4))
    balanced = sinkhorn(x, 20, 1e-6)
    assert max_diff(balanced.sum(axis=-2), mx.ones((2, 5, 4))) < 1e-5
    assert max_diff(balanced.sum(axis=-1), mx.ones((2, 5, 4))) < 0.2
    try:
        fused = fused_sinkhorn(x, 20, 1e-6)
        mx.eval(fused)
    except RuntimeError:
        pytest.skip("mlx cannot compile here")
    assert max_diff(fused, balanced) < 1e-6


def test_clamp_sides_of_the_expert_activation() -> None:
    gate, up = mx.array([-9.0, 9.0, 1.0]), mx.array([9.0, -9.0, 0.5])
    wanted = [-9 / (1 + math.exp(9)) * 2, 2 / (1 + math.exp(-2)) * -2, 1 / (1 + math.exp(-1)) * 0.5]
    assert swiglu(gate, up, 2.0).tolist() == pytest.approx(wanted, rel=1e-5)
    assert swiglu(gate, up, 0.0)[1].item() == pytest.approx(-81, rel=1e-3)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_experts_grouped_on_the_cpu_equal_the_gathered_product(dtype: mx.Dtype) -> None:
    layer = SwitchLinear(8, 6, 5)
    layer.weight = mx.random.normal((5, 6, 8)).astype(dtype)
    x, picks = mx.random.normal((7, 1, 1, 8)).astype(dtype), mx.random.randint(0, 5, (7, 3))
    grouped = layer._by_expert(x, picks)
    direct = (layer.weight[picks].astype(mx.float32) @ x.astype(mx.float32).swapaxes(-1, -2)).swapaxes(-1, -2)
    assert grouped.shape == (7, 3, 1, 6)
    assert max_diff(grouped, direct) < (1e-5 if dtype == mx.float32 else 0.1)


def test_equal_index_scores_are_chosen_by_position() -> None:
    """Whatever the number of entries seen at once, ties go to the earliest."""
    args = ModelArgs.from_dict(build(NAMES[0]).args.__dict__)
    indexer = Indexer(args)
    queries, weights = mx.ones((1, 2, args.index_n_heads, args.index_head_dim)), mx.ones((1, 2, 1, 8))
    for count in (17, 40, 300):
        entries = -mx.ones((1, count, args.index_head_dim))
        picks = indexer.choose(queries, weights, entries, mx.array([count, 20]))
        assert sorted(picks[0, 0].tolist()) == list(range(args.index_topk))
        assert sorted(picks[0, 1].tolist()) == list(range(args.index_topk))


def test_importing_the_package_loads_no_mlx() -> None:
    import subprocess
    import sys

    code = "import sys, ds4convert.inference as _; sys.exit('mlx' in sys.modules or 'mlx_lm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
