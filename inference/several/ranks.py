"""The processes that mlx.launch started: which one this is, and what all have to agree in before they compute together.

A rank that goes another way than the others leaves them waiting for ever, or computes something else without a word. So
whatever may differ between machines (versions, the folder, options, an error) is exchanged first, and where it does
differ all ranks stop, and the first one tells. The exchange is a collective of mlx, so it goes over whatever mlx.launch
set up: sockets (ring), Thunderbolt (JACCL), MPI.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ds4convert.errors import Ds4Error, EnvironmentFault, InputError
from ds4convert.inference.tensor_files import headers_of
from ds4convert.storage.safe_open import read_small
from ds4convert.words import launched
from ds4convert.words.terminal import show

if TYPE_CHECKING:
    import mlx.core as mx

MANIFEST = "ds4convert_manifest.json"
BACKENDS = {"MLX_JACCL_COORDINATOR": "jaccl", "MLX_HOSTFILE": "ring", "NCCL_HOST_IP": "nccl"}
"""What mlx.launch sets for a backend, and its name; of the others mlx takes the first that works (MPI)."""


class Team:
    """The ranks. `first` tells whether this is the one that prints and writes."""

    def __init__(self, group: mx.distributed.Group) -> None:
        self.group, self.rank, self.size = group, group.rank(), group.size()

    @property
    def first(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    def exchanged(self, mine: Mapping[str, Any]) -> list[dict[str, Any]]:
        """What every rank has under these keys, in the order of ranks: a collective of all."""
        import mlx.core as mx

        raw = json.dumps(dict(mine)).encode()
        sizes = mx.distributed.all_gather(mx.array([len(raw)]), group=self.group)
        lengths: list[int] = sizes.tolist()  # type: ignore[assignment]
        padded = raw.ljust(max(lengths))
        rows = mx.distributed.all_gather(mx.array(list(padded), dtype=mx.uint8)[None], group=self.group)
        return [json.loads(bytes(row[:n])) for row, n in zip(rows.tolist(), lengths, strict=True)]  # type: ignore


def team() -> Team | None:
    """The ranks that this process was started with; None where it runs by itself.

    Raises `EnvironmentFault` where a launcher told a number and the others cannot be reached.
    """
    if launched.rank() is None:
        return None
    import mlx.core as mx

    backend = next((name for variable, name in BACKENDS.items() if os.environ.get(variable)), "any")
    try:
        group = mx.distributed.init(strict=True, backend=backend)
    except RuntimeError as error:
        raise EnvironmentFault(
            f"this process was launched as one of several and cannot reach the others: {show(str(error), 400)}",
            hint="start all of them with mlx.launch, with a backend that this mlx has",
        ) from None
    return Team(group) if group.size() > 1 else None


class Agreement:
    """What this rank puts in (`mine`, by name), and, once all have, what each did (`all`, in the order of ranks)."""

    def __init__(self, ranks: Team | None) -> None:
        self.ranks = ranks
        self.mine: dict[str, str] = {}
        self.each: dict[str, Any] = {}
        self.all: list[dict[str, Any]] = []

    def told(self, name: str) -> list[Any]:
        """What each rank put into `each` under a name."""
        return [found[name] for found in self.all] if self.all else [self.each[name]]


@contextmanager
def together(ranks: Team | None) -> Iterator[Agreement]:
    """Come to one end with all ranks: all have the same in `mine`, and none an error, or all of them raise one.

    `each` may differ. An error of this rank is raised here; of another, `EnvironmentFault` that names the rank.
    """
    found, error = Agreement(ranks), None
    try:
        yield found
    except Ds4Error as e:
        if ranks is None:
            raise
        error = e
    if ranks is None:
        return
    told = None if error is None else [error.exit_code, str(error)]
    found.all = ranks.exchanged({"error": told, "mine": found.mine, "each": found.each})
    others = [(n, x["error"]) for n, x in enumerate(found.all) if x["error"] is not None]
    if error is not None:
        error.is_told = True  # by the first rank
        raise error
    if others:
        raise _RankFault(f"rank {others[0][0]}: {others[0][1][1]}", others[0][1][0])
    differences = _differences([x["mine"] for x in found.all])
    found.all = [x["each"] for x in found.all]
    if differences:
        raise _RankFault(
            f"the {ranks.size} ranks cannot compute together: {'; '.join(differences)}. Have the same versions, folder "
            "and options on every machine"
        )


class _RankFault(EnvironmentFault):
    """An error that all ranks have; of another rank with the exit code that it has there."""

    def __init__(self, message: str, code: int = EnvironmentFault.exit_code) -> None:
        super().__init__(message)
        self.exit_code, self.is_told = code, True


def _differences(all_of: list[dict[str, str]]) -> list[str]:
    """What ranks differ in from the first, in words."""
    first = all_of[0]
    return [
        f"{name} is {show(first.get(name, 'nothing'), 200)} on rank 0 and {show(other.get(name, 'nothing'), 200)} on "
        f"rank {n}"
        for n, other in enumerate(all_of)
        for name in sorted(first.keys() | other.keys())
        if first.get(name) != other.get(name)
    ]


def alike(folder: Path, drafter: Path | None = None) -> dict[str, str]:
    """What ranks have to have alike before they run the model of a folder: versions, device, and the folder itself.

    The folder is known by its manifest, which has the digests of all files, and config.json; one of another program by
    the headers of its tensors.
    """
    import mlx.core as mx

    device = mx.device_info() if hasattr(mx, "device_info") and mx.default_device() != mx.cpu else {}
    own = {"folder (digest)": _digest(folder)} | ({} if drafter is None else {"drafter (digest)": _digest(drafter)})
    return own | {
        "version of ds4convert": _version("ds4convert"),
        "version of mlx": _version("mlx"),
        "device": str(device.get("device_name", mx.default_device().type)),
    }


def _digest(folder: Path) -> str:
    found = hashlib.sha256()
    for name in (MANIFEST, "config.json", "tokenizer.json"):
        with suppress(InputError):
            found.update(name.encode() + read_small(folder, name))
    for file, tensors in headers_of(folder):
        found.update(repr((file.name, [(t.name, t.dtype, t.shape) for t in tensors])).encode())
    return found.hexdigest()[:16]


def _version(package: str) -> str:
    with suppress(metadata.PackageNotFoundError):
        return metadata.version(package)
    return "0+source"
