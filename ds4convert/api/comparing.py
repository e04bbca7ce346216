"""`diff`: two checkpoints, tensor by tensor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ds4convert.api.opening import Place, headers_of, located
from ds4convert.api.reporting import Listener, MessageCallback, ProgressCallback, document
from ds4convert.api.values import check_jobs
from ds4convert.checkpoint import compare
from ds4convert.checkpoint.types import JSON
from ds4convert.converted.open import Comparable, beside, comparable, comparable_of

DIFFERENCES = ("changed", "only_a", "only_b", "config", "files")
"""Keys of the document that are zero, or empty, where the two are equal."""


@dataclass(frozen=True)
class Difference:
    """How two checkpoints differ; `equal` where they do not: the same values, whatever their format and spelling."""

    facts: Mapping[str, Any] = field(repr=False)

    @property
    def equal(self) -> bool:
        """Return whether nothing differs that was compared."""
        return not any(self.facts[k] for k in DIFFERENCES)

    @property
    def tensors(self) -> list[JSON]:
        """Return a row per tensor: name, status, how each side stores it, and the error if there is one."""
        return list(self.facts["tensors"])

    def as_json(self) -> JSON:
        """Return the document of `diff`."""
        return document(dict(self.facts))


def diff(
    a: Place, b: Place, *, jobs: int = 2, progress: ProgressCallback | None = None, say: MessageCallback | None = None
) -> Difference:
    """Compare two checkpoints tensor by tensor, their configs, and the files beside the tensors.

    Of a repo of the Hub only headers are read: names, shapes and formats are compared, values are not. Raises
    `InputError` for what cannot be compared.

    >>> import ds4convert as ds4
    >>> done = ds4.convert("checkpoint", "converted")
    >>> found = ds4.diff("checkpoint", "converted")
    >>> found.equal, found.as_json()["changed"]
    (True, 0)
    """
    check_jobs(jobs)
    (one, far), (two, farther) = _comparable(a), _comparable(b)
    values = not (far or farther)
    x, y = one.beside(two), two.beside(one)
    with Listener(progress, say).counting("comparing", sum(t.size for t in x.tensors.values())) as count:
        headers = compare.compare_headers(x, y, count)
        found = compare.compare_views(x, y, jobs, count) if values else headers
        return Difference(compare.summarise(found, values=values) | beside(one, two))


def _comparable(place: Place) -> tuple[Comparable, bool]:
    """Return a place as `diff` takes it, and whether it is elsewhere."""
    found = located(place)
    remote = headers_of(found)
    if remote is not None:
        return comparable_of(remote), True
    assert isinstance(found, Path)
    return comparable(found), False
