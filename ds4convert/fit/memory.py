"""What a model holds in memory beside its weights, by its family's file; and which weights stay on the disk.

A family without `[state]` is left to the forward pass, which knows its own caches.
"""

from __future__ import annotations

from ds4convert.checkpoint.config import ModelConfig
from ds4convert.checkpoint.families.expansion import Block, holds
from ds4convert.checkpoint.family import evaluate
from ds4convert.checkpoint.inventory import BACKBONE, HEAD, Inventory, Module


def state_bytes(inventory: Inventory, context: int) -> int:
    """Return the bytes of decode state of all blocks after `context` tokens."""
    config = inventory.config
    blocks = [Block(BACKBONE, n, config.ratios[n]) for n in range(config.layers)]
    blocks += [Block(HEAD, n) for n in range(inventory.stages)]
    return sum(_of(config, block, context) for block in blocks)


def _of(config: ModelConfig, block: Block, context: int) -> int:
    total = 0
    for row in config.family.state:
        if holds(config, row.when, block):
            entries = context // max(block.ratio, 1) if row.per_entry else 0
            total += evaluate(row.bytes, config.dims) if row.bytes else 0
            total += entries * evaluate(row.per_entry, config.dims) if row.per_entry else 0
    return total


def working_bytes(config: ModelConfig) -> int:
    """Return what a step of a prompt holds at its busiest, beside weights and state."""
    return evaluate(config.family.working, config.dims)


def is_mapped(inventory: Inventory, module: Module) -> bool:
    """Return whether hosts read single rows of a module from its file, and never hold it whole."""
    return module.role in inventory.config.family.mapped_roles
