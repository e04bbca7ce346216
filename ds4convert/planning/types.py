"""What a plan is made of: steps, output files, what is left out. Frozen values without behaviour."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ds4convert.checkpoint.types import JSON, LeftOut, Provenance
from ds4convert.storage.records import ByteRange, SourceFile


@dataclass(frozen=True, slots=True)
class Output:
    """One tensor to be written: where, as what. `offset` is absolute in file number `file` of the plan."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: int
    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class Step:
    """The making of one or more output tensors from source byte ranges.

    `operands` are the inputs of `transform` by position (a weight, its block scales, ...); each is a tuple of
    byte ranges to be read one after the other. `sources` are the tensors that each operand comes from, all of one
    shape, `source_shapes` (of one expert's slice where a fused tensor holds them all). `params` are the numbers and
    names that the transform needs. `weights` is the number of logical weights, counted once per module. The first
    output lies before the others in its file.
    """

    outputs: tuple[Output, ...]
    transform: str
    operands: tuple[tuple[ByteRange, ...], ...]
    params: Mapping[str, int | str]
    sources: tuple[tuple[str, ...], ...]
    source_shapes: tuple[tuple[int, ...], ...]
    source_dtype: str
    format: str
    part: str
    role: str
    layer: int | None
    weights: int


@dataclass(frozen=True, slots=True)
class Loss:
    """What rounding cost a step so far: sums over its weights, of squared errors and of squared values; worst error."""

    squared: float
    norm: float
    max_abs: float

    def __add__(self, other: Loss) -> Loss:
        worst = max(self.max_abs, other.max_abs)
        return Loss(self.squared + other.squared, self.norm + other.norm, worst)

    @property
    def relative_square(self) -> float:
        """Return the squared error over the squared values, 0 where nothing was lost."""
        return self.squared / self.norm if self.norm else 0.0


@dataclass(frozen=True, slots=True)
class RoundingError:
    """What rounding cost a tensor, as a manifest tells it: to six digits, beside the bits that a weight takes."""

    relative_square: float
    max_abs: float
    bits_per_weight: float

    def as_json(self) -> JSON:
        """Return the error as manifests have it."""
        return {
            "relative_square": self.relative_square,
            "max_abs": self.max_abs,
            "bits_per_weight": self.bits_per_weight,
        }


@dataclass(frozen=True, slots=True)
class Tool:
    """The program that wrote a folder."""

    name: str
    version: str

    def as_json(self) -> JSON:
        """Return the program as manifests have it."""
        return {"name": self.name, "version": self.version}


@dataclass(frozen=True, slots=True)
class SourceRecord:
    """One file that tensors came from, as a manifest tells it; `sha256` is known where the Hub listed it."""

    name: str
    size: int
    header_sha256: str
    sha256: str | None = None

    def as_json(self) -> JSON:
        """Return the file as manifests have it."""
        told: JSON = {"name": self.name, "bytes": self.size, "header_sha256": self.header_sha256}
        return told if self.sha256 is None else told | {"sha256": self.sha256}


@dataclass(frozen=True, slots=True)
class Place:
    """Where tensors came from: files, and their repo at one commit where that is known."""

    files: tuple[SourceRecord, ...]
    repo: str | None = None
    revision: str | None = None

    def as_json(self) -> JSON:
        """Return the place as manifests have it."""
        known = {"repo": self.repo, "revision": self.revision}
        return {k: v for k, v in known.items() if v is not None} | {"files": [f.as_json() for f in self.files]}


@dataclass(frozen=True, slots=True)
class Link:
    """One conversion of a chain. Of one that no manifest tells of, only `recipe` (unknown) and `formats` are known."""

    recipe: str
    formats: Mapping[str, str]
    tool: Tool | None = None
    layout: str | None = None
    digest: str | None = None
    source: Place | None = None
    errors: Mapping[str, RoundingError] | None = None

    def as_json(self) -> JSON:
        """Return the link as manifests have it."""
        known = {"layout": self.layout, "digest": self.digest, "source": self.source and self.source.as_json()}
        return {
            "tool": self.tool and self.tool.as_json(),
            "recipe": self.recipe,
            "formats": dict(self.formats),
            **{k: v for k, v in known.items() if v is not None},
            "errors": None if self.errors is None else {k: e.as_json() for k, e in self.errors.items()},
        }


@dataclass(frozen=True, slots=True)
class Done:
    """A finished step: xxh3-128 (hex) of each output, None where hashing is off; its loss where it is lossy."""

    digests: tuple[str | None, ...]
    loss: Loss | None = None


@dataclass(frozen=True, slots=True)
class OutputFile:
    """One safetensors file to be written: `header` is its exact first bytes, `size` its full length."""

    name: str
    size: int
    header: bytes


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything that a conversion will write, before anything is written.

    `texts` are the small files (config, index) by relative name with their exact bytes; `copies` are files taken
    over unchanged from the source folder, by relative name with their sha256. `id` is the sha256 of the canonical
    JSON of all this, so equal inputs and options give equal ids on every machine. `chain` has the conversions that the
    source has behind it, the first one first: none for an official checkpoint. `origin` tells where the source came
    from, `config_sha256` which config.json the source had; neither is part of the id.
    """

    id: str
    family: str
    head_kind: str
    layout: str
    recipe: str
    formats: Mapping[str, str]
    hashing: bool
    sources: tuple[SourceFile, ...]
    files: tuple[OutputFile, ...]
    steps: tuple[Step, ...]
    texts: Mapping[str, bytes]
    copies: Mapping[str, str]
    left_out: tuple[LeftOut, ...]
    files_left_out: tuple[LeftOut, ...]
    quantization: Mapping[str, Any] = field(default_factory=dict)
    chain: tuple[Link, ...] = ()
    origin: Provenance | None = None
    config_sha256: str = ""
