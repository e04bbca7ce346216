"""Frozen records that the stages hand to each other. They hold facts, do no I/O and import nothing of ours."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

JSON = dict[str, Any]

DRAFTER = "mtp"
"""The folder below a converted one in which a drafter stands, whatever the family."""


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
class Provenance:
    """A repo of the Hub at one commit; `digests` are the sha256 (or etags) that the Hub lists, by file name."""

    repo: str
    revision: str
    digests: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Finding:
    """One difference between what was expected and what was found; `kind` is missing, extra, shape or dtype.

    `file` is where the tensor was found; of a missing one, the file that holds it although the index does not name it.
    """

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
            held = f" ({self.file} holds it, but the index does not name it)" if self.file else ""
            return f"{self.tensor}: missing; expected {self.expected}{held}"
        if self.kind == "extra":
            return f"{self.tensor}: not expected by the config; found {self.found}{place}"
        return f"{self.tensor}: expected {self.kind} {self.expected}, found {self.found}{place}"


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A source tensor (or file) that is not carried over, and why."""

    tensor: str
    why: str
