"""A folder's model taken through its stages one at a time: weights are read for a stage and released after it.

Owns the order of the computation and the reading and releasing of weights; knows nothing of figures. Held at a
time: the streams of all prompts, the dense matrices of one layer without its routed experts, and a chunk of experts
(`CHUNK_WEIGHTS`), read by byte range, and only those that a token was routed to. Every matrix is dequantized once
and multiplied densely with all positions, which on a CPU is several times faster than products with packed codes.
The numbers are those of `load_model(dense=True)`, up to the order of sums.

Shapes: N positions of all prompts in a row, L positions of one prompt, M streams (hc_mult), D hidden size,
V vocabulary, K experts per token. Sources: architecture description, sections 2 (backbone), 8 (experts), 9 (head).
"""

# mlx.nn carries no types that mypy can see, so these checks would only repeat that.
# mypy: disable-error-code="attr-defined,name-defined,misc,no-any-return,str-unpack,union-attr"

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from ds4convert.errors import InputError

from .cache import LayerCache
from .config import ModelArgs
from .deepseek_v4 import DeepseekV4Block, Model
from .layers import Step, SwitchMLP, on_cpu, spread, swiglu
from .load import Stored, open_model, stored_parameters
from .weights import sanitize

CHUNK_WEIGHTS = 1 << 26
"""Weights of routed experts held dense at once: 256 MB in float32, two experts of Flash."""

PASS_TOKENS = 512
"""Positions that go through attention at once; a longer prompt takes several passes over the same state."""

OUTPUT_WEIGHTS = 1 << 25
"""Weights of the output matrix held dense at once."""

EXPERT_MATRICES = ("gate_proj", "up_proj", "down_proj")


def dense(module: Any, dtype: mx.Dtype, rows: Any = slice(None), parts: dict[str, mx.array] | None = None) -> mx.array:
    """Dense values in `dtype` of rows of a linear, embedding or expert module; only these rows are dequantized.

    `parts` stands in for the module's own weight, scales and biases, in the module's format.
    """
    found = {key: (parts or module)[key][rows] for key in ("weight", "scales", "biases") if key in (parts or module)}
    if "scales" not in found:
        return found["weight"].astype(dtype)
    wide = {key: x.astype(dtype) if mx.issubdtype(x.dtype, mx.floating) else x for key, x in found.items()}
    packed, scales, biases = wide["weight"], wide["scales"], wide.get("biases")
    return mx.dequantize(packed, scales, biases, module.group_size, module.bits, mode=module.mode).astype(dtype)


def product(x: mx.array, matrix: mx.array) -> mx.array:
    """x [..., in] times a dense matrix [out, in]: [..., out] in the dtype of x.

    On a CPU numpy multiplies, in float32: with many positions its BLAS was 15 times faster than the one in mlx's
    wheel for Linux (mlx 0.32.4, 256 rows, matrix [4096, 4096]).
    """
    if not on_cpu():
        return x @ matrix.T
    rows, weights = (np.asarray(part.astype(mx.float32)) for part in (x.reshape(-1, x.shape[-1]), matrix))
    with np.errstate(all="ignore"):  # what is not finite is found and named after the stage
        found = rows @ weights.T
    return mx.array(found).astype(x.dtype).reshape(*x.shape[:-1], matrix.shape[0])


Observe = Callable[[str, int | None, mx.array], None]
"""Told what goes into a matrix: its path, the expert (None: not of one), rows [..., in]."""


class DenseLinear(nn.Linear):
    """A linear layer without bias that multiplies by `product`."""

    def __init__(self, weight: mx.array, path: str = "", observe: Observe | None = None) -> None:
        nn.Module.__init__(self)
        self.weight = weight
        self._path, self._observe = path, observe

    def __call__(self, x: mx.array) -> mx.array:
        """x [..., in] to [..., out]."""
        if self._observe is not None:
            self._observe(self._path, None, x)
        return product(x, self.weight)


class RoutedExperts:
    """The routed experts of one block, read a chunk at a time; `switch` tells the format, and is not evaluated."""

    def __init__(
        self,
        switch: SwitchMLP,
        stored: dict[str, Stored],
        args: ModelArgs,
        dtype: mx.Dtype,
        path: str = "",
        observe: Observe | None = None,
    ) -> None:
        self._path, self._observe = path, observe
        self._stored, self._args, self._dtype = stored, args, dtype
        self._modules = {name: switch[name] for name in EXPERT_MATRICES}
        weights = len(EXPERT_MATRICES) * args.hidden_size * args.moe_intermediate_size
        self._chunk = max(1, CHUNK_WEIGHTS // weights)

    def __call__(self, x: mx.array, picks: mx.array, weights: mx.array) -> mx.array:
        """x [N, D], experts `picks` [N, K] and their weights [N, K] to the weighted sum, float32 [N, D]."""
        routed = _by_expert(picks)
        output, used = mx.zeros(x.shape, dtype=mx.float32), sorted(routed)
        for start in range(0, len(used), self._chunk):
            chunk = used[start : start + self._chunk]
            gates, ups, downs = (self._matrices(name, chunk) for name in EXPERT_MATRICES)
            for expert, gate, up, down in zip(chunk, gates, ups, downs, strict=True):
                positions, slots = map(mx.array, routed[expert])
                rows = x[positions]
                hidden = swiglu(product(rows, gate), product(rows, up), self._args.swiglu_limit).astype(x.dtype)
                found = product(hidden, down).astype(mx.float32)
                if self._observe is not None:
                    for name, entering in zip(EXPERT_MATRICES, (rows, rows, hidden), strict=True):
                        self._observe(f"{self._path}.{name}", expert, entering)
                output = output.at[positions].add(weights[positions, slots][:, None] * found)
            mx.eval(output)
            del gates, ups, downs, gate, up, down
            mx.clear_cache()
        return output

    def _matrices(self, name: str, experts: list[int]) -> list[mx.array]:
        """Dense matrices [out, in] of some experts, evaluated."""
        prefix = f"model.layers.0.ffn.switch_mlp.{name}"
        read = {
            f"{prefix}.{leaf}": mx.stack([self._read(f"{name}.{leaf}", expert) for expert in experts])
            for leaf in ("weight", "scale", "scales", "biases")
            if f"switch_mlp.{name}.{leaf}" in self._stored or f"experts.{experts[0]}.{name}.{leaf}" in self._stored
        }
        parts = {key.removeprefix(f"{prefix}."): value for key, value in sanitize(read, self._args).weights.items()}
        matrices = list(dense(self._modules[name], self._dtype, parts=parts))
        mx.eval(matrices)
        return matrices

    def _read(self, leaf: str, expert: int) -> mx.array:
        stacked = self._stored.get(f"switch_mlp.{leaf}")
        return stacked.read(expert) if stacked else self._stored[f"experts.{expert}.{leaf}"].read()


def _by_expert(picks: mx.array) -> dict[int, tuple[list[int], list[int]]]:
    """Positions and slots at which each expert in use was picked, from picks [N, K]."""
    routed: dict[int, tuple[list[int], list[int]]] = {}
    rows: list[list[int]] = picks.tolist()  # type: ignore[assignment]
    for position, chosen in enumerate(rows):
        for slot, expert in enumerate(chosen):
            positions, slots = routed.setdefault(expert, ([], []))
            positions.append(position)
            slots.append(slot)
    return routed


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
        stored = stored_parameters(folder)
        self.folder, self.args, self.head, self.dtype = folder, model.args, model.head, dtype
        self.sizes: dict[str, int] = {}
        for name, tensor in stored.items():
            self.sizes[stage_of(name)] = self.sizes.get(stage_of(name), 0) + tensor.size_bytes
        self._embed_tokens, self._output = model.model.embed_tokens, model.lm_head
        del model.model.embed_tokens, model.lm_head
        paths = [f"model.layers.{number}" for number in range(model.args.num_hidden_layers)]
        paths += ["mtp.0"] if self.head.present else []
        blocks = [*model.layers, *(model.mtp if self.head.present else [])]
        self._experts: list[Any] = []
        for path, block in zip(paths, blocks, strict=True):
            tensors = _expert_tensors(stored, path)
            name = f"{path}.ffn.switch_mlp"
            self._experts.append(RoutedExperts(block.ffn.switch_mlp, tensors, model.args, dtype, name, observe))
            del block.ffn.switch_mlp
        self._finish = _densify(model, dtype, observe)
        self._blocks: list[Any] = blocks
        self.streams: list[mx.array] = []
        """Streams [1, L, M, D] of each prompt after the last stage."""
        self.collapsed: list[mx.array] = []
        """What the output matrix reads, [L, D] for each prompt, once the last layer is passed."""
        self.head_streams: list[mx.array] = []
        """As `streams`, of the head: its L - 1 positions t read the backbone's streams at t and token t + 1."""
        self.head_collapsed: list[mx.array] = []

    def embed(self, prompts: list[mx.array]) -> None:
        """Begin with the prompts' token ids, each [1, L]; the embedding is released."""
        self._tokens = prompts
        self._embedded = [dense(self._embed_tokens, self.dtype, tokens) for tokens in prompts]
        mx.eval(self._embedded)
        self.streams = [mx.repeat(x[:, :, None], self.args.hc_mult, axis=2) for x in self._embedded]
        mx.eval(self.streams)
        self._check_finite(self._embedded, "model.embed_tokens", {"model.embed_tokens": self._embed_tokens})
        if not self.head.present:
            self._embedded = []
        self._embed_tokens = None
        mx.clear_cache()

    def pass_layer(self, number: int) -> None:
        """Pass the streams through a layer of the backbone, which is released; after the last, collapse them."""
        self.streams = self._pass(number, f"model.layers.{number}", self.streams, self._tokens)
        if number + 1 == self.args.num_hidden_layers:
            collapse, norm = self._finish
            self.collapsed = [norm(collapse(x))[0] for x in self.streams]
            self._check_finite(self.collapsed, "model.norm", {"model.hc_head": collapse, "model.norm": norm})

    def pass_head(self) -> None:
        """Pass the backbone's streams and the next tokens through the head, which is released."""
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
        block, experts, args = self._blocks[number], self._experts[number], self.args
        lengths = [prompt.shape[1] for prompt in streams]
        halves: list[_Half] = []
        while streams:
            prompt, cache = streams.pop(0), LayerCache(args.sliding_window, args.ratio(number))
            for start in range(0, prompt.shape[1], PASS_TOKENS):
                halves.append(_attend(block, prompt[:, start : start + PASS_TOKENS], cache))
        x = mx.concatenate([half.x for half in halves], axis=1)[0]
        picks, weights = block.ffn.gate(x, mx.concatenate(tokens, axis=1)[0])
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

    def logits(self, x: mx.array) -> mx.array:
        """Logits float32 [n, V] of collapsed positions [n, D], evaluated; the output matrix is made dense in slices."""
        step = max(1, OUTPUT_WEIGHTS // x.shape[1])
        parts = []
        for start in range(0, self.args.vocab_size, step):
            matrix = dense(self._output, self.dtype, slice(start, start + step))
            parts.append(product(x, matrix).astype(mx.float32))
            self._check_finite(parts[-1:], "lm_head", {"lm_head": self._output})
        return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=1)


def _densify(model: Model, dtype: mx.Dtype, observe: Observe | None = None) -> tuple[nn.Module, nn.Module]:
    """Make every matrix dense once it is evaluated; returns the backbone's HyperHead and norm."""
    model.set_compute_dtype(dtype)
    model.dequantize()
    linear = [(path, module) for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    model.update_modules(tree_unflatten([(path, DenseLinear(module.weight, path, observe)) for path, module in linear]))
    return model.model.hc_head, model.model.norm


@dataclass(frozen=True)
class _Half:
    """Positions of a prompt between attention and experts: streams [1, n, M, D], input of the experts x [1, n, D],
    and how their output returns to the streams.
    """

    streams: mx.array
    x: mx.array
    post: mx.array
    comb: mx.array


def _attend(block: DeepseekV4Block, streams: mx.array, cache: LayerCache) -> _Half:
    """First half of `DeepseekV4Block.forward` for the next positions of a prompt, evaluated."""
    step = Step(cache.offset, streams.shape[1])
    x, post, comb = block.attn_hc(streams)
    streams = spread(block.attn(block.attn_norm(x), cache, step), streams, post, comb)
    x, post, comb = block.ffn_hc(streams)
    x = block.ffn_norm(x)
    mx.eval(streams, x, post, comb, *(part for part in cache.state if isinstance(part, mx.array)))
    return _Half(streams, x, post, comb)


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
