"""Does the head's wiring make sense: tests for exchanged parts that need no other checkpoint.

Acceptance barely moves when two of a head's parts are exchanged, so two other traces of training are used.
*Behaviour*: a trained head agrees better with its backbone as it is than with two of its parts exchanged; if it
agrees better exchanged, they are stored exchanged (mean paired difference of KL(backbone || head) over the
prompts, in standard errors). *Shape*: the matrices of one expert grew together, so the norms of their hidden
units correlate, and the router's row for an expert points along its gate matrix; an expert that fits another
one's matrices better than its own has been exchanged with it. A head of random values has neither trace and is
never accused.

Measured on the demo checkpoint: exchanging enorm and hnorm of the healthy head costs 8 standard errors, two
experts' matrices 3.4 to 7.4; norms of gate and up rows correlate by 0.37 to 0.59 within an expert and at most
0.16 across experts.
"""

# mlx.nn carries no types that mypy can see, so these checks would only repeat that.
# mypy: disable-error-code="attr-defined,no-any-return,union-attr"

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from ds4convert.evaluate.forced import Passed, head_logits, kl_nats

if TYPE_CHECKING:
    from ds4convert.inference.deepseek_v4.model import Model


BEHAVIOUR_LIMIT = 3.0
"""Standard errors by which an exchange has to improve agreement before it counts as found."""

SHAPE_LIMIT = 3.5
"""Standard errors by which each of two experts has to fit the other's matrix, where shape alone decides."""

SIGNAL = 3.0
"""Median fit of experts with their own matrices, in standard errors, below which shape tells nothing."""

CANDIDATES = 4
"""Exchanges of experts that shape proposes and behaviour is asked about."""

EXPERT_PARTS = ("gate_proj", "up_proj", "down_proj")
OFFICIAL = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}


@dataclass(frozen=True)
class Exchange:
    """Two parts of the head that look exchanged. In standard errors: how KL to the backbone changes when they are
    put back (`behaviour`, negative is better), and how well each fits the other's place (`shape`; None: not asked).
    """

    what: str
    behaviour: float
    shape: float | None

    def __str__(self) -> str:
        """In words."""
        reasons = []
        if self.behaviour < 0:
            reasons.append(f"agreement with the backbone improves by {-self.behaviour:.1f} standard errors")
        if self.shape is not None:
            reasons.append(f"they fit each other's experts by {self.shape:.1f} standard errors")
        return f"{self.what} look exchanged (put back, {'; '.join(reasons)})"


@dataclass(frozen=True)
class Wiring:
    """The exchanges found, and how many were looked at."""

    found: tuple[Exchange, ...]
    tried: int
    experts_comparable: bool


def check_wiring(model: Model, passes: Sequence[Passed]) -> Wiring:
    """Look for exchanged parts of the head, with the prompts' recorded passes. The model is left as it was.

    Where the experts show no trace of training nothing is tried: with random values either order may agree
    better by luck.
    """
    fits, is_telling = expert_fits(model.mtp[0])
    if not is_telling:
        return Wiring((), 0, False)
    base = _divergences(model, passes)
    found, tried = [], 0
    for what, swap in _whole_exchanges(model.mtp[0]):
        tried += 1
        with swap():
            score = standard_errors(_divergences(model, passes) - base)
        if score <= -BEHAVIOUR_LIMIT:
            found.append(Exchange(what, score, None))
    pairs: dict[tuple[int, int], list[Exchange]] = {}
    for part, a, b, shape in _crosswise(fits)[:CANDIDATES]:
        tried += 1
        with _experts_swapped(model.mtp[0].ffn, part, a, b):
            score = standard_errors(_divergences(model, passes) - base)
        if score <= -BEHAVIOUR_LIMIT or shape >= SHAPE_LIMIT:
            name = "all matrices" if part == "router" else OFFICIAL[part]
            exchange = Exchange(f"{name} of experts {a} and {b}", score, shape)
            pairs.setdefault((a, b), []).append(exchange)
    found += [min(alike, key=lambda exchange: exchange.behaviour) for alike in pairs.values()]
    return Wiring(tuple(found), tried, True)


# ------------------------------------------------------------------ behaviour


def _divergences(model: Model, passes: Sequence[Passed]) -> mx.array:
    """KL(backbone || head) in nats at every position of the prompts."""
    values = mx.concatenate([kl_nats(passed.logits[1:], head_logits(model, passed)) for passed in passes])
    mx.eval(values)
    return values


def standard_errors(differences: mx.array) -> float:
    """Mean by its standard error; 0 where nothing differs or values are not numbers."""
    count = differences.size
    if count < 2 or not bool(mx.isfinite(differences).all().item()):
        return 0.0
    error = mx.sqrt(mx.var(differences, ddof=1) / count).item()
    return float(differences.mean().item()) / float(error) if error else 0.0  # type: ignore[arg-type]


Swap = Callable[[], Any]


def _whole_exchanges(block: Any) -> Iterator[tuple[str, Swap]]:
    """Pairs of whole parts of equal shape that a wrong table of names would exchange."""
    yield "enorm and hnorm", lambda: swapped(block, "enorm", "hnorm")
    yield "e_proj and h_proj", lambda: swapped(block, "e_proj", "h_proj")
    yield "attn_norm and ffn_norm", lambda: swapped(block, "attn_norm", "ffn_norm")
    yield "the hyper-connections of attention and experts", lambda: swapped(block, "attn_hc", "ffn_hc")
    yield "w1 and w3 of all experts", lambda: swapped(block.ffn.switch_mlp, "gate_proj", "up_proj")
    yield "w1 and w3 of the shared expert", lambda: swapped(block.ffn.shared_experts, "gate_proj", "up_proj")


@contextmanager
def swapped(owner: Any, a: str, b: str) -> Iterator[None]:
    """Two modules of `owner` exchanged, and put back at the end."""
    first, second = owner[a], owner[b]
    owner[a], owner[b] = second, first
    try:
        yield
    finally:
        owner[a], owner[b] = first, second


@contextmanager
def _experts_swapped(ffn: Any, part: str, a: int, b: int) -> Iterator[None]:
    """One kind of matrix of two experts exchanged (`router`: all three kinds), and put back at the end."""
    kinds = EXPERT_PARTS if part == "router" else (part,)
    modules = [ffn.switch_mlp[kind] for kind in kinds]
    before = [dict(module) for module in modules]
    count = ffn.gate.weight.shape[0]
    order = list(range(count))
    order[a], order[b] = b, a
    try:
        for module in modules:
            for leaf in ("weight", "scales", "biases"):
                if leaf in module:
                    module[leaf] = module[leaf][mx.array(order)]
        yield
    finally:
        for module, values in zip(modules, before, strict=True):
            module.update(values)


# ------------------------------------------------------------------ shape


def expert_fits(block: Any) -> tuple[dict[str, mx.array], bool]:
    """How each expert's matrix fits the rest of every expert, and whether that tells anything.

    Per kind of matrix [E, E] in standard errors: row e, column f is matrix e against the other two of expert f
    (`router`: the gate matrix of expert e against the router's row f). Telling: the diagonal's median is at
    least `SIGNAL` for gate and up.
    """
    ffn = block.ffn
    norms: dict[str, list[mx.array]] = {part: [] for part in EXPERT_PARTS}
    along, count = [], ffn.gate.weight.shape[0]
    router = ffn.gate.weight.astype(mx.float32)
    router = router / mx.linalg.norm(router, axis=-1, keepdims=True)
    for expert in range(count):
        for part in EXPERT_PARTS:
            matrix = ffn.switch_mlp[part].matrix(expert).astype(mx.float32)
            squares = mx.square(matrix).sum(axis=-2 if part == "down_proj" else -1)
            norms[part].append(mx.log(squares + 1e-20))
            if part == "gate_proj":
                along.append(_along(matrix, router))
        mx.eval(along[-1], [values[-1] for values in norms.values()])
    gate, up, down = (_standardised(mx.stack(norms[part])) for part in EXPERT_PARTS)
    gate_up, gate_down, up_down = (_fit(x, y) for x, y in ((gate, up), (gate, down), (up, down)))
    fits = {
        "gate_proj": (gate_up + gate_down) / 2**0.5,
        "up_proj": (gate_up.T + up_down) / 2**0.5,
        "down_proj": (gate_down.T + up_down.T) / 2**0.5,
        "router": mx.stack(along),
    }
    is_telling = mx.median(mx.diag(gate_up)).item() >= SIGNAL  # type: ignore[operator]
    return fits, bool(is_telling) and count > 2


def _along(matrix: mx.array, directions: mx.array) -> mx.array:
    """Mean projection of a matrix's rows on each direction, in standard errors of a matrix that ignores them."""
    scale = mx.sqrt(mx.square(matrix).mean()) * (matrix.shape[0] ** -0.5)
    return (matrix @ directions.T).mean(axis=0) / mx.maximum(scale, 1e-20)


def _standardised(rows: mx.array) -> mx.array:
    centred = rows - rows.mean(axis=-1, keepdims=True)
    return centred / mx.maximum(mx.sqrt(mx.square(centred).mean(axis=-1, keepdims=True)), 1e-12)


def _fit(x: mx.array, y: mx.array) -> mx.array:
    """Correlations of rows [E, n] with rows [E, n], Fisher-transformed to standard errors, [E, E]."""
    n = x.shape[-1]
    return mx.arctanh(mx.clip(x @ y.T / n, -0.999, 0.999)) * max(1, n - 3) ** 0.5


def _crosswise(fits: dict[str, mx.array]) -> list[tuple[str, int, int, float]]:
    """Pairs of experts that fit better exchanged, best first: (kind, a, b, the weaker of the two cross fits)."""
    out = []
    for part, fit in fits.items():
        rows: list[list[float]] = fit.tolist()  # type: ignore[assignment]
        for a, b in itertools.combinations(range(len(rows)), 2):
            gain = rows[a][b] + rows[b][a] - rows[a][a] - rows[b][b]
            if gain > 0:
                out.append((gain, part, a, b, min(rows[a][b], rows[b][a])))
    return [(part, a, b, weaker) for _, part, a, b, weaker in sorted(out, reverse=True)]
