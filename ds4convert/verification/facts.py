"""What a run of `verify` found beside its checks: as values for the page, and under the keys of the contract."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ds4convert.checkpoint.types import JSON
from ds4convert.converted import manifest
from ds4convert.converted.grouping import Group
from ds4convert.converted.records import Manifest
from ds4convert.converted.rounding_losses import LayerLoss
from ds4convert.converted.verify_record import HeadFigures
from ds4convert.errors import InputError

if TYPE_CHECKING:
    from ds4convert.evaluate.decode_runs import Compute, Divergence
    from ds4convert.evaluate.forced import Invariance, SourceDivergence
    from ds4convert.evaluate.layerwise import LayerwiseResult
    from ds4convert.evaluate.reference import Compared
    from ds4convert.evaluate.wiring import Exchange


def record_of(folder: Path) -> Manifest | None:
    """Return the manifest, None where there is none that can be trusted (a check of the files says so)."""
    try:
        return manifest.read(folder)
    except InputError:
        return None


@dataclass(frozen=True, slots=True)
class Bin:
    """Drafts whose estimates lie close together: mean estimate, and the share that was accepted."""

    drafts: int
    estimated: float
    observed: float


@dataclass(frozen=True, slots=True)
class Position:
    """Drafts at one place behind the last committed token; a draft behind a refused one counts as refused."""

    position: int
    drafted: int
    accepted: int
    acceptance: float | None


@dataclass(frozen=True, slots=True)
class PromptFacts:
    """One prompt decoded both ways; speeds are None where no time was measured."""

    prompt: str
    prompt_tokens: int
    new_tokens: int
    drafted: int
    accepted: int
    acceptance: float
    tokens_per_pass: float
    plain_tokens_per_second: float | None
    mtp_tokens_per_second: float | None
    greedy_equal: bool


@dataclass(frozen=True, slots=True)
class TeacherForced:
    """The head against the backbone's choices on the prompts' own tokens."""

    positions: int
    agreement: float
    chance: float
    kl_nats: float


@dataclass(frozen=True, slots=True)
class WiringFacts:
    """Exchanged parts of the head: those found, how many were tried, and whether experts could be judged."""

    judged: bool
    tried: int
    found: tuple[Exchange, ...]


@dataclass(frozen=True, slots=True)
class Milliseconds:
    """Mean times of a plain pass, of one that verifies drafts, of its drafting, and of the rest of the loop."""

    plain_pass: float
    verifying_pass: float
    drafting: float
    rest: float


@dataclass(frozen=True, slots=True)
class Measurement:
    """The figures of a head that was run, under the names of the contract."""

    acceptance: float
    drafted: int
    accepted: int
    tokens_per_pass: float
    plain_tokens_per_second: float
    mtp_tokens_per_second: float
    speedup: float | None
    greedy_equal: bool
    first_divergence: Divergence | None
    block_size: int | None
    draft_depth: int
    calibration: tuple[Bin, ...]
    passes: int
    per_position: tuple[Position, ...]
    per_prompt: tuple[PromptFacts, ...]
    teacher_forced: TeacherForced
    wiring: WiringFacts
    milliseconds: Milliseconds
    confidence: float

    @property
    def acceptance_by_position(self) -> list[float | None]:
        """Return the acceptance of the first draft of each pass, of the second, and so on."""
        return [p.acceptance for p in self.per_position]


FIGURES = (
    "acceptance", "drafted", "accepted", "tokens_per_pass", "plain_tokens_per_second", "mtp_tokens_per_second",
    "speedup", "greedy_equal", "first_divergence", "block_size",
)  # fmt: skip
"""Figures that are null of a head that was not run; the others are left out."""


@dataclass(frozen=True, slots=True)
class HeadFacts:
    """The head: its kind, bytes by stored format, the verdict, and its figures where it was run."""

    present: bool
    kind: str
    formats: Mapping[str, int]
    verdict: str
    measured: Measurement | None = None

    @property
    def format(self) -> str | None:
        """Return the stored formats as one word, most bytes first; None where they are not known."""
        return "+".join(self.formats) or None

    def as_json(self) -> JSON:
        """Return the `mtp` object of the contract."""
        found = dataclasses.asdict(self.measured) if self.measured else {}
        by_position = self.measured.acceptance_by_position if self.measured else []
        return {
            "present": self.present,
            "kind": self.kind,
            "format": self.format,
            **{k: found.get(k) for k in FIGURES},
            "acceptance_by_position": by_position,
            "verdict": self.verdict,
            "formats": dict(self.formats),
            **{k: v for k, v in found.items() if k not in FIGURES},
        }

    def kept(self) -> HeadFigures:
        """Return what is kept beside the folder for its model card."""
        m = self.measured
        if m is None:
            return HeadFigures(self.kind, self.format, verdict=self.verdict)
        shares = tuple(a for a in m.acceptance_by_position if a is not None) if m.block_size else None
        return HeadFigures(
            self.kind, self.format, m.acceptance, m.drafted, m.accepted, m.tokens_per_pass, m.plain_tokens_per_second,
            m.mtp_tokens_per_second, m.speedup, m.greedy_equal, m.draft_depth, verdict=self.verdict,
            block_size=m.block_size, acceptance_by_position=shares,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class PromptTokens:
    """A prompt that was decoded."""

    name: str
    tokens: int
    is_text: bool


@dataclass(frozen=True, slots=True)
class Word:
    """A new token: the text that it adds, and which draft of its pass it was, from 1; 0 where the backbone made it."""

    text: str
    draft: int


@dataclass(frozen=True, slots=True)
class Reply:
    """A prompt and what followed it, without and with the head (None where none ran), token by token.

    `differs_at`: the first new token that is not the same both ways, from 0. Without a tokenizer texts are token ids.
    """

    prompt: str
    text: str
    plain: tuple[str, ...]
    tokens: tuple[Word, ...] | None = None
    differs_at: int | None = None


@dataclass(frozen=True, slots=True)
class DecodeFacts:
    """What was decoded, and how fast without the head."""

    prompts: tuple[PromptTokens, ...]
    max_tokens: int
    new_tokens: int
    plain_tokens_per_second: float
    texts: tuple[Reply, ...] = ()


@dataclass(frozen=True, slots=True)
class Numerics:
    """Prefill against decoding one by one, and the backbone's perplexity of each text."""

    invariance: Invariance
    perplexity: Mapping[str, float]

    def as_json(self) -> JSON:
        """Return the `numerics` object of the contract."""
        return dataclasses.asdict(self.invariance) | {"perplexity": dict(self.perplexity)}


@dataclass(frozen=True, slots=True)
class SourceKL:
    """KL from the source of backbone and head; `parts` is None where the source did not fit into the memory."""

    parts: Mapping[str, SourceDivergence] | None

    def as_json(self) -> JSON | None:
        """Return the `kl` object of the contract."""
        return None if self.parts is None else {k: dataclasses.asdict(d) for k, d in self.parts.items()}


@dataclass
class Facts:
    """All that was found beside the checks, filled in on the way; None is what was not asked for."""

    groups: tuple[Group, ...] | None = None
    losses: tuple[LayerLoss, ...] | None = None
    layerwise: LayerwiseResult | None = None
    drafter: str | None = None
    compute: Compute | None = None
    reference: tuple[Compared, ...] | None = None
    numerics: Numerics | None = None
    kl: SourceKL | None = None
    decode: DecodeFacts | None = None
    mtp: HeadFacts | None = None

    def as_json(self) -> JSON:
        """Return what was asked for under the keys of the command line contract."""
        compute = self.compute
        told: JSON = {
            "groups": None if self.groups is None else [g.as_json("formats") for g in self.groups],
            "losses": None if self.losses is None else [x.as_json() for x in self.losses],
            "layerwise": self.layerwise and self.layerwise.as_json(),
            "drafter": self.drafter,
            "compute": compute and {k: getattr(compute, k) for k in ("dtype", "dense", "needed_bytes")},
            "reference": None if self.reference is None else [dataclasses.asdict(c) for c in self.reference],
            "numerics": self.numerics and self.numerics.as_json(),
            "kl": self.kl and self.kl.as_json(),
            "decode": self.decode and dataclasses.asdict(self.decode),
            "mtp": self.mtp and self.mtp.as_json(),
        }
        return {k: v for k, v in told.items() if getattr(self, k) is not None}
