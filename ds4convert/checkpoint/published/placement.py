"""Which file a tensor is in: the index decides, where there is one.

Owns what an index and the files there say of each other: files that are missing, copies that another file supersedes,
tensors and a head that the index does not know of. Pure: names and headers in, names and headers out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from ds4convert.checkpoint.family import head_stems, mlx_marks
from ds4convert.checkpoint.types import Header, LeftOut, TensorInfo
from ds4convert.errors import HeaderError
from ds4convert.words.terminal import show

MAX_NAME = 255
"""Bytes of a file name; one that is longer is told as such where it is opened."""


def reachable(index: dict[str, str], there: Sequence[str], head_alone: bool = False) -> dict[str, str]:
    """Return the index; with `head_alone`, of the head's files alone where others are not among those `there`.

    Raises `HeaderError` for missing files, telling a stale index and a head that was fetched alone from a lost shard.
    """
    files = set(index.values())
    missing = sorted(files - set(there))
    if not missing:
        return index
    heads = head_stems()
    head = {n: f for n, f in index.items() if n.startswith(heads)}
    whole_head = bool(head) and not set(head.values()) & set(missing)
    if head_alone and whole_head:
        return head
    others = sorted(set(there) - files)
    if len(missing) == len(files) and others and len(missing[0]) <= MAX_NAME:
        raise HeaderError(
            f"model.safetensors.index.json: is stale: of the {len(files)} files that it names none is here (such as "
            f"{show(missing[0])}), but {show(others[0])} is. If that holds the whole model, delete the index"
        )
    if whole_head and set(missing) == files - set(head.values()) and len(missing[0]) <= MAX_NAME:
        raise HeaderError(
            f"{missing[0]}: the file is missing ({len(missing)} of the {len(files)} in the "
            "index); the head's are here, and `ds4convert graft MLX_DIR --from` this folder "
            "takes the head alone",
            hint="Download the others for a conversion",
        )
    return index  # reading tells of the first file that is missing, in the words of all commands


def may_lack_a_head(index: Mapping[str, str]) -> bool:
    """Return whether an index is of a source and names no tensor of a head."""
    heads, (stacked, _) = head_stems(), mlx_marks()
    return not any(n.startswith(heads) or any(s in n for s in stacked) for n in index)


def is_head_alone(header: Header) -> bool:
    """Return whether all tensors of a file are of a head under its official prefix."""
    heads = head_stems()
    return bool(header.tensors) and all(t.name.startswith(heads) for t in header.tensors)


UNINDEXED = "not in the index, which says what this checkpoint holds"


@dataclass(frozen=True)
class Settled:
    """Headers with each tensor once; copies that another file supersedes; tensors that the index does not name."""

    headers: tuple[Header, ...]
    superseded: tuple[LeftOut, ...] = ()
    unindexed: tuple[TensorInfo, ...] = ()


def settle(
    headers: tuple[Header, ...], names: tuple[str, ...], index: Mapping[str, str] | None, is_source: bool,
    head_alone: bool = False,
) -> Settled:  # fmt: skip
    """Return the headers with each tensor once, in the file that the index says, and what was left out of them.

    An overlay takes a tensor out of a checkpoint by leaving it out of the index: loaders read what the index names.
    With `head_alone` the index may be the head's part of one, so what else lies in its files tells nothing.

    Raises `HeaderError` where a tensor is not where the index says, or (without an index, or in a converted folder) is
    in two files; in a converted folder, also where it is not in the index, as MLX hosts read whole files.
    """
    if index is None or not is_source:
        _check_once(headers, names)
    if index is None:
        return Settled(headers)
    places = {names.index(f): f for f in set(index.values())}
    kept: list[Header] = []
    superseded: list[LeftOut] = []
    unindexed: list[TensorInfo] = []
    seen: set[str] = set()
    stacked, _ = mlx_marks()
    reads_files = not is_source or any(part in n for n in index for part in stacked)
    for header in headers:
        copies = [t for t in header.tensors if t.name in index and index[t.name] != places.get(t.file)]
        superseded += [_superseded(t, names, index) for t in copies]
        outside = [t for t in header.tensors if t.name not in index]
        if outside and reads_files and not head_alone:
            _refuse(outside, names)
        unindexed += [] if head_alone else outside
        gone = {t.name for t in (*copies, *outside)}
        left = tuple(t for t in header.tensors if t.name not in gone) if gone else header.tensors
        seen.update(t.name for t in left)
        kept.append(replace(header, tensors=left) if len(left) != len(header.tensors) else header)
    _check_index(names, index, seen, {x.tensor for x in superseded})
    return Settled(tuple(kept), tuple(superseded), tuple(unindexed))


def left_out(settled: Settled, names: Sequence[str]) -> tuple[LeftOut, ...]:
    """Return what is told of the tensors that were left out, by file and name."""
    outside = (LeftOut(f"{names[t.file]}: {show(t.name)}", UNINDEXED) for t in settled.unindexed)
    return (*settled.superseded, *outside)


def _superseded(tensor: TensorInfo, names: tuple[str, ...], index: Mapping[str, str]) -> LeftOut:
    file = names[tensor.file]
    return LeftOut(f"{file}: {show(tensor.name)}", f"superseded: the index takes it from {show(index[tensor.name])}")


def _check_once(headers: Sequence[Header], names: tuple[str, ...]) -> None:
    seen: dict[str, int] = {}
    for tensor in (t for h in headers for t in h.tensors):
        if tensor.name in seen:
            first, second = names[seen[tensor.name]], names[tensor.file]
            raise HeaderError(f"{second}: {show(tensor.name)}: is in {first} as well; expected in one file only")
        seen[tensor.name] = tensor.file


def _refuse(outside: Sequence[TensorInfo], names: tuple[str, ...]) -> None:
    first = outside[0]
    raise HeaderError(
        f"{names[first.file]}: {show(first.name)}: is not in the index ({len(outside)} such "
        "tensors), but MLX hosts read all tensors of a file",
        hint="convert the source again",
    )


def _check_index(names: tuple[str, ...], index: Mapping[str, str], seen: set[str], superseded: set[str]) -> None:
    for name, file in index.items():
        if name not in seen:
            other = next((n for n in names if f"{n}: {show(name)}" in superseded), None)
            where = f" ({other} has it)" if other else ""
            raise HeaderError(
                f"{file}: {show(name)}: the index places it in {file}, but the header has no such tensor{where}"
            )
