"""The DSpark head of DeepSeek-V4.1: V4's head of V4.1's blocks.

It differs from V4's in what its blocks are made of, in the number of its experts, in what it taps (the streams before a
target layer, an engram's part included) and in the names of its Markov tables. Sources: the DSpark description, section
9, and the reference on V4.1.
"""

# mlx.nn carries no types that mypy can see, so these checks would only repeat that.
# mypy: disable-error-code="attr-defined,name-defined,misc,no-any-return"

from __future__ import annotations

import mlx.nn as nn

from ..deepseek_v4 import dspark as v4
from .attention import PlainQueries
from .config import ModelArgs
from .layers import Block, Collapse


class StageAttention(PlainQueries, v4.BlockAttention):
    """Attention of a stage."""


class DSparkStage(Block):
    """One stage: a block of ratio 0; the first also condenses taps, the last has what makes drafts of streams."""

    def __init__(self, args: ModelArgs, stage: int, stages: int) -> None:
        layer, own = args.num_hidden_layers + stage, args.of_head()
        super().__init__(own, layer)
        self.attn = StageAttention(own, layer)
        if stage == 0:
            taps = len(args.dspark_target_layer_ids) * args.hidden_size
            self.main_proj = nn.Linear(taps, args.hidden_size, bias=False)
            self.main_norm = nn.RMSNorm(args.hidden_size, eps=args.rms_norm_eps)
        if stage == stages - 1:
            self.norm = nn.RMSNorm(args.hidden_size, eps=args.rms_norm_eps)
            self.hc_head = Collapse()
            self.markov_head = v4.MarkovHead(args)
            self.confidence_head = v4.ConfidenceHead(args)
