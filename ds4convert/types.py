"""Frozen records that the stages hand to each other. They hold facts, do no I/O and import nothing of ours."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

JSON = dict[str, Any]


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor as a header states it.

    `file` is the index of its file in the checkpoint's list of files, `start` the absolute byte offset of its
    first byte in that file, `size` its length in bytes.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: int
    start: int
    size: int


@dataclass(frozen=True, slots=True)
class Header:
    """A validated safetensors header: tensors in the order of their bytes, which they tile without a gap."""

    tensors: tuple[TensorInfo, ...]
    metadata: Mapping[str, str]
    data_start: int


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One source file: its name relative to the checkpoint folder, size in bytes, sha256 of its header."""

    name: str
    size: int
    header_sha256: str


@dataclass(frozen=True, slots=True)
class Origin:
    """A repo of the Hub at one commit; `digests` are the sha256 (or etags) that the Hub lists, by file name."""

    repo: str
    revision: str
    digests: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class ByteRange:
    """`size` bytes from absolute `offset` of source file number `file`."""

    file: int
    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class Finding:
    """One difference between what was expected and what was found; `kind` is missing, extra, shape or dtype."""

    kind: str
    tensor: str
    expected: str
    found: str
    file: str = ""

    def as_json(self) -> JSON:
        """Return the finding under the keys of the command line contract."""
        out = {"kind": self.kind, "tensor": self.tensor, "expected": self.expected, "found": self.found}
        return out | ({"file": self.file} if self.file else {})

    def __str__(self) -> str:
        place = f" ({self.file})" if self.file else ""
        if self.kind == "missing":
            return f"{self.tensor}: missing; expected {self.expected}"
        if self.kind == "extra":
            return f"{self.tensor}: not expected by the config; found {self.found}{place}"
        return f"{self.tensor}: expected {self.kind} {self.expected}, found {self.found}{place}"


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
class LeftOut:
    """A source tensor (or file) that is not carried over, and why."""

    tensor: str
    why: str


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything that a conversion will write, before anything is written.

    `texts` are the small files (config, index) by relative name with their exact bytes; `copies` are files taken
    over unchanged from the source folder, by relative name with their sha256. `id` is the sha256 of the canonical
    JSON of all this, so equal inputs and options give equal ids on every machine. `chain` has the conversions that the
    source has behind it, the first one first: none for an official checkpoint. `origin` tells where the source came
    from, where that is known; it is not part of the id.
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
    chain: tuple[JSON, ...] = ()
    origin: Origin | None = None
