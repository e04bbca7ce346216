"""A folder's model taken through its stages one at a time: weights are read for a stage and released after it.

Owns the order of the computation and the reading and releasing of weights; knows nothing of figures. Held at a
time: the streams of all prompts, the dense matrices of one layer without its routed experts, and a chunk of experts
(`stages.matrices`), read by byte range, and only those that a token was routed to. Every matrix is dequantized once
and multiplied densely with all positions, which on a CPU is several times faster than products with packed codes.
The numbers are those of `load_model(dense=True)`, up to the order of sums.

Shapes: N positions of all prompts in a row, L positions of one prompt, M streams (hc_mult), D hidden size,
V vocabulary, K experts per token. Sources: architecture description, sections 2 (backbone), 8 (experts), 9 (head).
"""

# mlx.nn carries no types that mypy can see, so these checks would only repeat that.
# mypy: disable-error-code="attr-defined,name-defined,misc,no-any-return,str-unpack,union-attr"

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from ds4convert.errors import InputError
from ds4convert.evaluate.stages import attending
from ds4convert.evaluate.stages.matrices import (
    EXPERT_MATRICES,
    Change,
    DenseLinear,
    Observe,
    RoutedExperts,
    check_tries,
    dense,
    product,
)
from ds4convert.inference.deepseek_v4.attention import Attention
from ds4convert.inference.deepseek_v4.block import DeepseekV4Block
from ds4convert.inference.deepseek_v4.cache import LayerCache
from ds4convert.inference.deepseek_v4.dspark import SharedContext, SharedStep, tap, tapped_states
from ds4convert.inference.deepseek_v4.layers import Step, spread
from ds4convert.inference.deepseek_v4.model import Model
from ds4convert.inference.deepseek_v41.attention import Handed, Pass
from ds4convert.inference.deepseek_v41.layers import Block, Mixed, begun
from ds4convert.inference.load import Stored, held_parameters, open_model

PASS_TOKENS = 512
"""Positions that go through attention at once; a longer prompt takes several passes over the same state."""

OUTPUT_WEIGHTS = 1 << 25
"""Weights of the output matrix held dense at once."""


def stage_of(name: str) -> str:
    """The stage that uses a tensor, by this model's spelling of its name."""
    parts = name.split(".")
    if parts[0] == "mtp":
        return "head"
    if parts[:2] == ["model", "layers"]:
        return f"layer {parts[2]}"
    return "embedding" if parts[:2] == ["model", "embed_tokens"] else "output"


def _expert_tensors(stored: dict[str, Stored], block: str) -> dict[str, Stored]:
    """Tensors of a block's routed experts by `experts.E.matrix.leaf` or `switch_mlp.matrix.leaf`."""
    prefix, found = f"{block}.ffn.", {}
    for name, tensor in stored.items():
        tail = name.removeprefix(prefix)
        kind, _, rest = tail.partition(".")
        if tail != name and kind in ("experts", "switch_mlp"):
            found[tail if rest.split(".")[0].isdigit() else f"switch_mlp.{rest}"] = tensor
    return found


class Walk:
    """One folder on its way through the stages: the streams of all prompts, and weights that are not yet read.

    Call `embed`, `pass_layer` for each number in order, `pass_head` where `head` is present, then `logits` at will.
    """

    def __init__(
        self, folder: Path, dtype: mx.Dtype, require_manifest: bool = False, observe: Observe | None = None
    ) -> None:
        model, _ = open_model(folder, require_manifest=require_manifest)
        stored = held_parameters(folder)
        self.folder, self.args, self.head, self.dtype = folder, model.args, model.head, dtype
        self.sizes: dict[str, int] = {}
        for name, tensor in stored.items():
            self.sizes[stage_of(name)] = self.sizes.get(stage_of(name), 0) + tensor.size_bytes
        self._embed_tokens, self._output = model.model.embed_tokens, model.lm_head
        del model.model.embed_tokens, model.lm_head
        paths = [f"model.layers.{number}" for number in range(model.args.num_hidden_layers)]
        paths += [f"mtp.{stage}" for stage in range(self.head.stages)] if self.head.present else []
        blocks = [*model.layers, *(model.mtp if self.head.present else [])]
        self._experts: list[Any] = []
        self.experts: dict[str, int] = {}
        """How many experts there are, by the path of a matrix of all of them."""
        for path, block in zip(paths, blocks, strict=True):
            tensors = _expert_tensors(stored, path)
            name = f"{path}.ffn.switch_mlp"
            self._experts.append(RoutedExperts(block.ffn.switch_mlp, tensors, model.args, dtype, name, observe))
            count = block.ffn.gate.weight.shape[0]
            self.experts |= {f"{name}.{matrix}": count for matrix in EXPERT_MATRICES}
            del block.ffn.switch_mlp
        self._caches, self._handing = model.make_cache(), any(isinstance(block, Block) for block in blocks)
        self._mixes: list[mx.array] = []  # of a family whose layers say how the next one reads: of each of `streams`
        self._handed: dict[tuple[int, int], Handed] = {}  # what they hand on beside, by prompt and first position
        self._tapped: dict[int, list[mx.array]] = {}
        if model.is_dspark:
            self._tapped = {place: [] for place in tapped_states(model.args.dspark_target_layer_ids)}
        self._finish = _densify(model, dtype, observe)
        self._blocks: list[Any] = blocks
        self.streams: list[mx.array] = []
        """Streams [1, L, M, D] of each prompt after the last stage."""
        self.collapsed: list[mx.array] = []
        """What the output matrix reads, [L, D] for each prompt, once the last layer is passed."""
        self.head_streams: list[mx.array] = []
        """As `streams`, of the head, L - 1 positions: of a classic head t reads the backbone's streams at t and token
        t + 1; of a DSpark head it is the first slot of the block at t + 1."""
        self.head_collapsed: list[mx.array] = []
        """What the output matrix reads for the head's drafts; of a DSpark head the Markov rows stand behind, D + r."""

    def embed(self, prompts: list[mx.array]) -> None:
        """Begin with the prompts' token ids, each [1, L]; the embedding is released."""
        self._tokens = prompts
        self._embedded = [dense(self._embed_tokens, self.dtype, tokens) for tokens in prompts]
        mx.eval(self._embedded)
        self.streams = [mx.repeat(x[:, :, None], self.args.hc_mult, axis=2) for x in self._embedded]
        self._mixes = [begun(x).mix for x in self.streams] if self._handing else []
        mx.eval(self.streams, self._mixes)
        self._check_finite(self._embedded, "model.embed_tokens", {"model.embed_tokens": self._embed_tokens})
        if self._tapped:
            self._noise = dense(self._embed_tokens, self.dtype, mx.array([self.args.dspark_noise_token_id]))
            mx.eval(self._noise)
        self._keep_taps(0)
        if not self.head.present:
            self._embedded = []
        self._embed_tokens = None
        mx.clear_cache()

    def pass_layer(self, number: int) -> None:
        """Pass the streams through a layer of the backbone, which is released; after the last, collapse them."""
        self.streams = self._pass(number, f"model.layers.{number}", self.streams, self._tokens)
        if not self._handing:
            self._keep_taps(number + 1)
        if number + 1 == self.args.num_hidden_layers:
            self._handed = {}
            collapse, norm = self._finish
            self.collapsed = [norm(collapse(x))[0] for x in self._read(self.streams)]
            self._check_finite(self.collapsed, "model.norm", {"model.hc_head": collapse, "model.norm": norm})

    def _read(self, streams: list[mx.array]) -> list[Any]:
        """Streams as what collapses them takes them."""
        return [Mixed(*pair) for pair in zip(streams, self._mixes, strict=True)] if self._handing else streams

    def refuse_trials(self) -> None:
        """Raise InputError where single matrices cannot be tried."""
        check_tries(self.args, self.folder)

    def trial_embedding(self, prompts: list[mx.array], change: Change) -> list[mx.array]:
        """Streams of prompts after a changed embedding; to be called before `embed`."""
        self.refuse_trials()
        rows = [change(dense(self._embed_tokens, self.dtype, tokens)[0])[None] for tokens in prompts]
        return [mx.repeat(x[:, :, None], self.args.hc_mult, axis=2) for x in rows]

    def trial(self, number: int, path: str, change: Change, streams: list[mx.array]) -> list[mx.array]:
        """Streams after a layer with one of its matrices changed (or those of all experts); the layer stays."""
        self.refuse_trials()
        block, experts = self._blocks[number], self._experts[number]
        *outer, last = path.removeprefix(f"model.layers.{number}.").split(".")
        if outer[-1:] == ["switch_mlp"]:
            experts.change = (last, change)
        else:
            module = block
            for name in (*outer, last):
                module = module[name]
            kept, module.weight = module.weight, change(module.weight)
        found = self._pass(number, f"model.layers.{number}", list(streams), self._tokens[: len(streams)])
        self._blocks[number], self._experts[number], experts.change = block, experts, None
        if outer[-1:] != ["switch_mlp"]:
            module.weight = kept
        return found

    def follow(self, streams: list[mx.array], tokens: list[mx.array]) -> None:
        """Take further streams along; `tokens` are those of all."""
        self.streams, self._tokens = [*self.streams, *streams], tokens

    def finish(self, streams: list[mx.array]) -> list[mx.array]:
        """What the output matrix reads of streams after the last layer, [L, D] for each."""
        return [self._finish[1](self._finish[0](x))[0] for x in streams]

    def state(self) -> list[mx.array]:
        """All that the stages to come need of those passed: streams of all prompts, then what the head taps."""
        self.refuse_trials()
        return [*self.streams, *(x for place in sorted(self._tapped) for x in self._tapped[place])]

    def resume(self, number: int, state: list[mx.array]) -> None:
        """Go on before a layer from what `state` gave there, after `embed`; the layers before it are released."""
        count = len(self._tokens)
        self.streams, rest = state[:count], state[count:]
        for place in sorted(self._tapped):
            if place <= number and len(rest) >= count:
                self._tapped[place], rest = rest[:count], rest[count:]
        for passed in range(number):
            self._blocks[passed] = self._experts[passed] = None

    def _keep_taps(self, passed: int) -> None:
        """Note what a DSpark head reads of the streams after `passed` layers."""
        if passed in self._tapped:
            self._tapped[passed] = [tap(x) for x in self.streams]
            mx.eval(self._tapped[passed])

    def _pass_stages(self) -> None:
        """Pass a block for every position but the first through the stages of a DSpark head, each released after it."""
        args, first, slots = self.args, self.args.num_hidden_layers, self.args.dspark_block_size
        places = tapped_states(args.dspark_target_layer_ids)
        taps = [mx.concatenate(list(parts), axis=-1) for parts in zip(*(self._tapped[p] for p in places), strict=True)]
        entry, last = self._blocks[first], self._blocks[first + self.head.stages - 1]
        condensed = [entry.main_norm(entry.main_proj(x)) for x in taps]
        mx.eval(condensed)
        del entry
        self._tapped, streams = {}, []
        for x in self._embedded:
            noise = mx.broadcast_to(self._noise, (x.shape[1] - 1, slots - 1, args.hidden_size))
            filled = mx.concatenate([x[0, 1:, None], noise], axis=1)
            streams.append(mx.repeat(filled[:, :, None], args.hc_mult, axis=2))
        self._mixes = [begun(x).mix for x in streams] if self._handing else []
        mx.eval(streams, self._mixes)
        self._embedded = []
        for stage in range(self.head.stages):
            streams = self._pass_blocks(first + stage, f"mtp.{stage}", streams, condensed)
        self.head_streams = [x[None, :, 0] for x in streams]
        self._mixes = [x[None, :, 0] for x in self._mixes]
        self.head_collapsed = []
        for x, tokens in zip(self._read(self.head_streams), self._tokens, strict=True):
            rows = last.markov_head.rows(tokens[0, 1:])
            self.head_collapsed.append(
                mx.concatenate([last.norm(last.hc_head(x))[0].astype(mx.float32), rows], axis=-1)
            )
        self._bias = last.markov_head
        self._check_finite(self.head_collapsed, f"mtp.{self.head.stages - 1}.norm", {"mtp": last})

    def _pass_blocks(
        self, number: int, path: str, streams: list[mx.array], condensed: list[mx.array]
    ) -> list[mx.array]:
        """Streams [n, slots, M, D] of each prompt's blocks after one stage."""
        block, halves, mixes = self._blocks[number], [], []
        shapes = [x.shape for x in streams]
        size = max(1, PASS_TOKENS // self.args.dspark_block_size)
        for index, (x, tapped) in enumerate(zip(streams, condensed, strict=True)):
            keys = block.attn.keys(tapped, Step(0, tapped.shape[1]))
            for start in range(0, x.shape[0], size):
                part = x[start : start + size]
                anchors = mx.arange(1 + start, 1 + start + part.shape[0])
                mix = self._mixes[index][start : start + size] if self._handing else None
                where = SharedContext(keys, anchors), SharedStep(anchors, part.shape[1])
                half = _attend(block, part, *where) if mix is None else _enter(block, Mixed(part, mix), *where)
                mixes.append(half.mix)
                halves.append(half.in_a_row())
        tokens = mx.zeros((sum(half.x.shape[1] for half in halves),), dtype=mx.int32)
        joined = self._through_experts(number, path, halves, tokens, [shape[0] * shape[1] for shape in shapes])
        if self._handing:
            rows = mx.concatenate([mix for mix in mixes if mix is not None])
            ends = [sum(shape[0] for shape in shapes[: n + 1]) for n in range(len(shapes))]
            self._mixes = list(mx.split(rows, ends[:-1]))
        return [x.reshape(shape) for x, shape in zip(joined, shapes, strict=True)]

    def pass_head(self) -> None:
        """Pass the backbone's streams and the next tokens through the head, which is released."""
        if self.head.kind == "dspark":
            self._pass_stages()
            return
        number = self.args.num_hidden_layers
        block = self._blocks[number]
        entered = [
            block.e_proj(block.enorm(x[:, 1:]))[:, :, None] + block.h_proj(block.hnorm(streams[:, :-1]))
            for x, streams in zip(self._embedded, self.streams, strict=True)
        ]
        mx.eval(entered)
        self._embedded = []
        self.head_streams = self._pass(number, "mtp.0", entered, [tokens[:, 1:] for tokens in self._tokens])
        self.head_collapsed = [block.norm(block.hc_head(x))[0] for x in self.head_streams]
        self._check_finite(self.head_collapsed, "mtp.0.norm", {"mtp.0": block})

    def _pass(self, number: int, path: str, streams: list[mx.array], tokens: list[mx.array]) -> list[mx.array]:
        """Streams of all prompts after one block: attention by prompt, experts for all of them together.

        The list `streams` is emptied on the way, so that old and new streams are not both held.
        """
        block, args = self._blocks[number], self.args
        lengths = [prompt.shape[1] for prompt in streams]
        halves: list[_Half] = []
        if self._handing:
            halves = self._hand_on(number, streams, tokens)
        while streams:
            prompt, cache = streams.pop(0), LayerCache(args.sliding_window, args.ratio(number))
            for start in range(0, prompt.shape[1], PASS_TOKENS):
                part = prompt[:, start : start + PASS_TOKENS]
                halves.append(_attend(block, part, cache, Step(cache.offset, part.shape[1])))
        return self._through_experts(number, path, halves, mx.concatenate(tokens, axis=1)[0], lengths)

    def _hand_on(self, number: int, streams: list[mx.array], tokens: list[mx.array]) -> list[_Half]:
        """Every prompt's positions before a layer's experts, where layers hand on; `streams` is emptied on the way."""
        block, halves, mixes, tapped = self._blocks[number], [], [], []
        for index, text in enumerate(tokens):
            prompt, cache = streams.pop(0), type(self._caches[number]).from_state(self._caches[number].state)
            own: list[_Half] = []
            for start in range(0, prompt.shape[1], PASS_TOKENS):
                part = slice(start, start + PASS_TOKENS)
                state = Mixed(prompt[:, part], self._mixes[index][:, part])
                step = Pass(start, state.streams.shape[1])
                step.handed = self._handed.setdefault((index, start), step.handed)
                state = block.enrich(state, text[:, part], cache, step)
                if number + 1 in self._tapped:
                    tapped.append(tap(state.streams))
                own.append(_enter(block, state, cache, step))
            mixes.append(mx.concatenate([half.mix for half in own if half.mix is not None], axis=1))
            halves += own
        self._mixes = mixes
        if number + 1 in self._tapped:
            self._tapped[number + 1] = _joined(tapped, [x.shape[1] for x in tokens])
        return halves

    def _through_experts(
        self, number: int, path: str, halves: list[_Half], tokens: mx.array, lengths: list[int]
    ) -> list[mx.array]:
        """Streams after the second half of a block, for all positions together; `tokens` [n] serve hash routing."""
        block, experts = self._blocks[number], self._experts[number]
        x = mx.concatenate([half.x for half in halves], axis=1)[0]
        picks, weights = block.ffn.gate(x, tokens)
        routed, start, parts = experts(x, picks, weights), 0, []
        while halves:
            half = halves.pop(0)
            output = block.ffn.shared_experts(half.x).astype(mx.float32) + routed[start : start + half.x.shape[1]]
            parts.append(spread(output.astype(self.dtype), half.streams, half.post, half.comb))
            mx.eval(parts[-1])
            start += half.x.shape[1]
        self._check_finite(parts, path, {path: block})
        self._blocks[number] = self._experts[number] = None
        mx.clear_cache()
        return _joined(parts, lengths)

    def _check_finite(self, values: list[mx.array], stage: str, modules: dict[str, Any]) -> None:
        """Raise InputError naming the stage whose values are not finite, and which tensors of its modules are not."""
        if all(mx.isfinite(value).all().item() for value in values):
            return
        flat: list[tuple[str, Any]] = [
            (f"{path}.{name}", x) for path, m in modules.items() for name, x in tree_flatten(m.parameters())
        ]
        bad = [name for name, x in flat if mx.issubdtype(x.dtype, mx.floating) and not mx.isfinite(x).all().item()]
        found = ", ".join(bad[:5]) or "none of its dense tensors is to blame: look at scales and routed experts"
        raise InputError(f"{self.folder}: values are not finite after {stage}: {found}")

    def logits(self, x: mx.array, change: Change | None = None) -> mx.array:
        """Logits float32 [n, V] of collapsed positions [n, D], evaluated; the output matrix is made dense in slices.

        Of a DSpark head [n, D + r]: its Markov bias is added.
        """
        if x.shape[1] > self.args.hidden_size:
            width = self.args.hidden_size
            biased = self.logits(x[:, :width].astype(self.dtype)) + self._bias.bias(x[:, width:])
            mx.eval(biased)
            return biased
        step = max(1, OUTPUT_WEIGHTS // x.shape[1])
        parts = []
        for start in range(0, self.args.vocab_size, step):
            matrix = dense(self._output, self.dtype, slice(start, start + step))
            matrix = change(matrix) if change else matrix
            parts.append(product(x, matrix).astype(mx.float32))
            self._check_finite(parts[-1:], "lm_head", {"lm_head": self._output})
        return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=1)


def _densify(model: Model, dtype: mx.Dtype, observe: Observe | None = None) -> tuple[nn.Module, nn.Module]:
    """Make every matrix dense once it is evaluated; returns the backbone's HyperHead and norm."""
    model.set_compute_dtype(dtype)
    model.dequantize()
    linear = [(path, module) for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    model.update_modules(tree_unflatten([(path, DenseLinear(module.weight, path, observe)) for path, module in linear]))
    for path, module in model.named_modules():
        if isinstance(module, Attention):
            attending.settle(module, dtype)
            if observe is not None:
                _observe_groups(module, f"{path}.wo_a", observe)
    return model.model.hc_head, model.model.norm


def _observe_groups(attention: Attention, path: str, observe: Observe) -> None:
    """Tell what goes into wo_a: its rows are multiplied in groups, so the module itself is never called."""
    project = attention._project

    def observed(output: mx.array) -> mx.array:
        observe(path, None, output.reshape(-1, attention.wo_a.weight.shape[-1]))
        return project(output)

    attention._project = observed  # type: ignore[method-assign]


@dataclass(frozen=True)
class _Half:
    """Positions of a prompt between attention and experts: streams [1, n, M, D], input of the experts x [1, n, D],
    and how their output returns to the streams; `mix` where the layer says how the next one reads them.
    """

    streams: mx.array
    x: mx.array
    post: mx.array
    comb: mx.array
    mix: mx.array | None = None

    def in_a_row(self) -> _Half:
        """The same of blocks [n, slots, ...], as positions of one line [1, n * slots, ...]."""
        return _Half(*(x.reshape(1, -1, *x.shape[2:]) for x in (self.streams, self.x, self.post, self.comb)))


def _attend(block: DeepseekV4Block, streams: mx.array, cache: Any, step: Step) -> _Half:
    """First half of `DeepseekV4Block.forward` for the next positions of a prompt (or some blocks of one), evaluated."""
    x, post, comb = block.attn_hc(streams)
    streams = spread(block.attn(block.attn_norm(x), cache, step), streams, post, comb)
    x, post, comb = block.ffn_hc(streams)
    x = block.ffn_norm(x)
    state = cache.state if isinstance(cache, LayerCache) else []
    mx.eval(streams, x, post, comb, *(part for part in state if isinstance(part, mx.array)))
    return _Half(streams, x, post, comb)


def _enter(block: Block, state: Mixed, cache: Any, step: Step) -> _Half:
    """As `_attend`, of a layer that hands on."""
    half = _Half(*block.enter(state, cache, step))
    kept = cache.state if isinstance(cache, LayerCache) else []
    mx.eval(half.streams, half.x, half.post, half.comb, half.mix, *(x for x in kept if isinstance(x, mx.array)))
    return half


def _joined(parts: list[mx.array], lengths: list[int]) -> list[mx.array]:
    """Parts [1, n, M, D] in a row, joined to one array for each of `lengths`."""
    joined, waiting = [], list(parts)
    for length in lengths:
        mine = [waiting.pop(0)]
        while sum(part.shape[1] for part in mine) < length:
            mine.append(waiting.pop(0))
        joined.append(mine[0] if len(mine) == 1 else mx.concatenate(mine, axis=1))
    mx.eval(joined)
    return joined
