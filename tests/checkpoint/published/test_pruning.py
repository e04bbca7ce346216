"""How many experts are left, told by names and shapes alone: for any numbers per block, and any that the config states."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from ds4convert.checkpoint.config import check_config
from ds4convert.checkpoint.inventory import compare, expected, recognise
from ds4convert.checkpoint.names import Named
from ds4convert.checkpoint.published import pruning
from ds4convert.checkpoint.types import TensorInfo
from tests.support import mini_config

MOST, ACTIVE = 5, 2
FULL = check_config(mini_config(n_routed_experts=MOST, num_experts_per_tok=ACTIVE))
TENSORS = {s.name: TensorInfo(s.name, s.dtypes[0], s.shape, 0, 0, 0) for s in expected(FULL).tensors()}
BLOCKS = [f"layers.{n}" for n in range(FULL.layers)] + ["mtp.0"]


def left_with(counts: Mapping[str, int]) -> dict[str, TensorInfo]:
    """The tensors of a checkpoint whose blocks were pruned to these numbers of experts."""
    found = {}
    for name, info in TENSORS.items():
        block = ".".join(name.split(".")[:2])
        expert = name.partition(".ffn.experts.")[2].partition(".")[0]
        if block in counts and expert and int(expert) >= counts[block]:
            continue
        if name.endswith(("ffn.gate.weight", "ffn.gate.bias")):
            info = replace(info, shape=(counts[block], *info.shape[1:]))
        found[name] = info
    return found


@given(st.lists(st.integers(1, MOST), min_size=len(BLOCKS), max_size=len(BLOCKS)), st.booleans())
def test_one_number_for_all_layers_is_taken_and_no_other(numbers: list[int], alike: bool) -> None:
    counts = dict(zip(BLOCKS, [numbers[0]] * len(BLOCKS) if alike else numbers, strict=True))
    of_layers = {counts[b] for b in BLOCKS[:-1]}
    found = left_with(counts)
    made = pruning.as_left(FULL, found)
    number = of_layers.pop() if len(of_layers) == 1 else MOST
    if ACTIVE <= number < MOST:
        assert made.dims["E"] == made.flat["n_routed_experts"] == number and made.pruned_from == MOST
        assert f"is {MOST}, but each layer holds {number} experts" in pruning.told(made)
    else:
        assert made is FULL and pruning.told(made) == ""
    findings = compare(recognise(FULL, found), Named(found, ()), ("f",))
    assert bool(findings) == (len(set(counts.values())) > 1 or number < ACTIVE)
    if findings:
        told = pruning.advice(made, found)
        assert told is not None and told.startswith(
            "experts were pruned to different" if len(set(counts.values())) > 1 else "experts were pruned: each block"
        )


@given(st.integers(1, MOST))
def test_of_a_head_that_lies_alone_its_own_blocks_tell(number: int) -> None:
    found = {n: t for n, t in left_with(dict.fromkeys(BLOCKS, number)).items() if n.startswith("mtp.")}
    assert pruning.as_left(FULL, found).dims["E"] == (number if number >= ACTIVE else MOST)


@given(st.sets(st.integers(0, MOST - 1), min_size=ACTIVE, max_size=MOST - 1))
def test_experts_that_keep_their_numbers_are_counted_only_if_these_go_from_0(kept: set[int]) -> None:
    found = left_with(dict.fromkeys(BLOCKS, len(kept)))
    renamed = {}
    for name, info in found.items():
        before, mark, rest = name.partition(".ffn.experts.")
        expert, dot, tail = rest.partition(".")
        own = f"{before}{mark}{sorted(kept)[int(expert)]}{dot}{tail}" if mark else name
        renamed[own] = replace(info, name=own)
    made = pruning.as_left(FULL, renamed)
    assert made.dims["E"] == (len(kept) if kept == set(range(len(kept))) else MOST)
    if made is FULL:
        assert "keep their old numbers" in (pruning.advice(FULL, renamed) or "")


def test_a_missing_shard_is_no_pruning() -> None:
    """Experts that are gone while the router knows of them, and a layer that is gone altogether."""
    found = {n: t for n, t in TENSORS.items() if ".experts.4." not in n}
    assert pruning.as_left(FULL, found) is FULL and pruning.advice(FULL, found) is None
    pruned = left_with(dict.fromkeys(BLOCKS, 3))
    rest = {n: t for n, t in pruned.items() if not n.startswith("layers.2.")}
    assert pruning.as_left(FULL, rest) is FULL
