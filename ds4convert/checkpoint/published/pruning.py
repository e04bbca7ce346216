"""Experts that were pruned: how many each block still has, by its tensors, and what to do where that is no one number.

A config has one number for all blocks, here and in every MLX host, and experts are numbered from 0. Where each layer
holds as many, in this order, with as many rows in its router, that is the number, if the config states a larger one.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping

from ds4convert.checkpoint.advice import offers
from ds4convert.checkpoint.config import ModelConfig
from ds4convert.checkpoint.families.rows import EXPERT, NUMBER
from ds4convert.checkpoint.family import Family
from ds4convert.checkpoint.types import TensorInfo

SHOWN_BLOCKS = 3


def as_left(config: ModelConfig, found: Mapping[str, TensorInfo]) -> ModelConfig:
    """Return the config with the number of experts that the tensors `found` show to be left in each layer.

    It is as it was where they show none, or not one for all; the differences are told then (`advice`). Of a head that
    lies alone, its own blocks tell.
    """
    family, wanted = config.family, config.dims[config.family.experts]
    prefixes = [family.prefix.block.replace(NUMBER, str(n)) for n in range(config.layers)]
    rows = {_rows(found, prefix, family) for prefix in prefixes}
    if rows == {0} and family.experts not in config.head_dims:
        stages = (family.prefix.head.replace(NUMBER, str(n)) for n in itertools.count())
        prefixes = list(itertools.takewhile(lambda prefix: _rows(found, prefix, family), stages))
        rows = {_rows(found, prefix, family) for prefix in prefixes}
    left = rows.pop() if len(rows) == 1 else 0
    if not config.dims[family.active] <= left < wanted:
        return config
    blocks = _expert_numbers(family, found)
    if any(blocks.get(prefix) != set(range(left)) for prefix in prefixes):
        return config
    return config.with_experts(left)


def told(config: ModelConfig) -> str:
    """Return a note on a number of experts that is not the config's own; "" where it is."""
    if not config.pruned_from:
        return ""
    family = config.family
    left = config.dims[family.experts]
    return (
        f"config.json: {family.dims[family.experts]} is {config.pruned_from}, but each layer holds {left} experts and "
        f"its router has as many rows: the others were pruned, and {left} is taken"
    )


def advice(config: ModelConfig, found: Mapping[str, TensorInfo]) -> str | None:
    """Return what to do where blocks have other experts than the config says: they were pruned."""
    family = config.family
    blocks = _expert_numbers(family, found)
    symbol = family.experts
    wanted, key = config.dims[symbol], family.dims[symbol]
    if config.head_dims.get(symbol, wanted) != wanted:  # the head has a number of its own, and a key for it
        blocks = {b: numbers for b, numbers in blocks.items() if not family.is_of_head(b)}
    if not blocks or all(b == set(range(wanted)) for b in blocks.values()) or wanted > MOST_EXPERTS:
        return None
    if not all(_rows(found, block, family) == len(numbers) for block, numbers in blocks.items()):
        return None  # the router knows of more: tensors are missing
    counts = {block: len(numbers) for block, numbers in blocks.items()}
    if len(set(counts.values())) > 1:
        some = {n: block for block, n in counts.items()}
        drop = " (for a head alone: --drop-mtp)" if offers("--drop-mtp") else ""
        shown = ", ".join(f"{block[:-1]} has {n}" for n, block in list(some.items())[:SHOWN_BLOCKS])
        return (
            f"experts were pruned to different numbers ({shown}), but {key} is one number for all blocks, "
            f"here and in every MLX host; take a checkpoint with as many experts in each{drop}"
        )
    number = next(iter(counts.values()))
    if any(b != set(range(number)) for b in blocks.values()):
        return (
            f"experts were pruned and the {number} that are left keep their old numbers; renumber them from 0 to "
            f"{number - 1} with the program that pruned them"
        )
    if number < (active := config.dims[family.active]):
        return (
            f"experts were pruned: each block holds {number}, fewer than the {active} that every token goes through "
            f"({family.dims[family.active]}); take a checkpoint that has as many"
        )
    return (
        f"each block holds {number} experts and its router has as many rows, but config.json's {key} is {wanted}; set "
        f"it to {number}"
    )


MOST_EXPERTS = 100_000


def _is_number(text: str) -> bool:
    """Return whether a part of a name is the number of an expert: Python converts no text of thousands of digits."""
    return text.isascii() and text.isdigit() and len(text) <= len(str(MOST_EXPERTS))


def _expert_numbers(family: Family, found: Mapping[str, TensorInfo]) -> dict[str, set[int]]:
    """Return the numbers of the experts that each block holds, by its prefix."""
    out: dict[str, set[int]] = {}
    if not family.expert_rows:
        return out
    stem, _, rest = f"{family.expert_rows[0].name}.weight".partition(EXPERT)
    fused = next((f.name for f in family.fused if family.expert_rows[0].name.rpartition(".")[2] in f.parts), None)
    for name, info in found.items():
        if not (block := family.block_of(name)):
            continue
        prefix, tail = name[: block.start("tail")], block["tail"]
        number = tail.removeprefix(stem).removesuffix(rest)
        if tail == fused and info.shape:
            out[prefix] = set(range(info.shape[0]))
        elif _is_number(number) and tail == f"{stem}{number}{rest}":
            out.setdefault(prefix, set()).add(int(number))
    return out


def _rows(found: Mapping[str, TensorInfo], block: str, family: Family) -> int:
    """Return the rows of the router of a block, by its prefix; 0 without one."""
    infos = (found.get(block + name) for name in _routers(family))
    return next((i.shape[0] for i in infos if i is not None and i.shape), 0)


def _routers(family: Family) -> list[str]:
    """Return the names of matrices with a row for each expert, without the prefix of a block."""
    rows = (r for r in family.block if r.role == "router" and len(r.shape) == 2)
    return [r.name for r in rows if r.shape[0] == family.experts]
