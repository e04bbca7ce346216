"""Checkpoints as logical tensors: the same weight under one key, however a folder spells, stacks and packs it.

Owns the reading back of source and converted folders for `verify`, `diff` and `inspect`. Keys are MLX paths, with
the head under `mtp.N.`, whatever its family calls it. Values are decoded with the tables of `formats`, not with the
transforms that wrote them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from pathlib import Path

from ds4convert.checkpoint.config import ModelConfig, check_config, parse_config, with_head_keys
from ds4convert.checkpoint.family import Family, HeadKind, families
from ds4convert.checkpoint.folder import CONFIG_NAME, Checkpoint, need_config, read_checkpoint
from ds4convert.checkpoint.inventory import BACKBONE, HEAD, Inventory, Module, Storage, expand, key_of
from ds4convert.checkpoint.tensors import LogicalTensor, TensorView, _geometry, _plain
from ds4convert.checkpoint.types import DRAFTER, JSON, Finding, TensorInfo
from ds4convert.converted import matching
from ds4convert.errors import InputError
from ds4convert.planning.host_block import table_in
from ds4convert.planning.layouts import STAGE, HeadPlace, Spelling, all_places, spellings_of
from ds4convert.storage import strict_json
from ds4convert.storage.byte_source import ByteSource
from ds4convert.storage.local_files import LocalFiles, joined
from ds4convert.storage.records import ByteRange

# --- converted folders ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MlxFolder:
    """A converted folder: its config, its tensors (those of a drafter folder too), and the head found in it."""

    path: Path
    config: ModelConfig
    table: JSON
    checkpoint: Checkpoint
    drafter: Checkpoint | None
    head_kind: str
    place: HeadPlace | None
    view: TensorView
    findings: tuple[Finding, ...]
    spelling: Spelling = field(default_factory=Spelling)


def read_mlx(
    path: Path, checkpoint: Checkpoint | None = None, drafter: Checkpoint | None = None, theirs: bool = False
) -> MlxFolder:
    """Return the converted folder at `path`, every tensor matched with what its config implies.

    `checkpoint` and `drafter` are its headers where they have been read already. `theirs`: another program wrote it, so
    BF16 may stand where F32 is expected, and its table may list less than all.

    Differences are in `findings`. Raises `InputError` where headers, index or config cannot be read.
    """
    checkpoint = checkpoint or read_checkpoint(path)
    config = parse_config(need_config(checkpoint), CONFIG_NAME, is_mlx=True)
    if drafter is None and (path / DRAFTER / CONFIG_NAME).is_file():
        drafter = read_checkpoint(path / DRAFTER)
    config = with_head_keys(config, drafter_config(drafter).get("text_config"), f"{DRAFTER}/{CONFIG_NAME}")
    table = config.raw.get("quantization") or table_in(config.family, config.raw) or {}
    if not isinstance(table, dict):
        raise InputError(f"{CONFIG_NAME}: quantization is not a table")
    return _match(path, config, table, checkpoint, drafter, theirs)


def is_drafter(checkpoint: Checkpoint) -> bool:
    """Return whether a folder is a head alone, as mlx-vlm's drafters are: its config is wrapped, its names are bare."""
    if checkpoint.config is None:
        return False
    try:
        found = strict_json.loads(checkpoint.config, CONFIG_NAME)
    except InputError:
        return False  # whoever reads it says what is wrong with it
    if not isinstance(found, dict):
        return False
    places = (p for f in families().values() for p in all_places(f) if p.config)
    kinds = [p.config.get("model_type") for p in places]
    return isinstance(found.get("text_config"), dict) and found.get("model_type") in kinds


def read_drafter(drafter: Checkpoint, theirs: bool = True) -> MlxFolder:
    """Return a drafter folder, read as a head alone: no backbone is expected. Its config has that of its model."""
    text = drafter_config(drafter).get("text_config")
    if not isinstance(text, dict) or "model_type" not in text:
        raise InputError(f"{CONFIG_NAME}: a drafter's has the model's own under text_config; here it has none")
    only = replace(drafter, files=(), headers=())
    return _match(drafter.path, check_config(text, CONFIG_NAME, is_mlx=True), {}, only, drafter, theirs, HEAD)


def _match(
    path: Path, config: ModelConfig, table: JSON, checkpoint: Checkpoint, drafter: Checkpoint | None,
    theirs: bool = False, part: str = "",
) -> MlxFolder:  # fmt: skip
    """Return a folder with its tensors matched; `part`: of this part alone."""
    own = {t.name: t for t in checkpoint.tensors()}
    below = {t.name: t for t in drafter.tensors()} if drafter else {}
    names = [*checkpoint.file_names, *(f"{DRAFTER}/{n}" for n in (drafter.file_names if drafter else ()))]
    tables = {"": table, DRAFTER: _drafter_table(drafter)}
    kind, stages, place = _find_head(config, own, below)
    inventory = expand(config, kind, stages, _DENSE)
    spelling = _find_spelling(inventory, own)
    pools = matching.Pools({"": own, DRAFTER: below}, tables, len(checkpoint.files), names, theirs, spelling)
    out: dict[str, LogicalTensor] = {}
    findings: list[Finding] = []
    taken: set[tuple[str, str]] = set()
    for module in inventory.modules:
        if part in ("", module.part):
            folder, at = pools.place(module, place)
            found, unlike = _mlx_logical(_lenient(module) if theirs else module, at, pools.base(folder), names)
            findings += unlike
            taken |= {(folder, n) for n in (at.path, *(f"{at.path}.{s}" for s in matching.SUFFIXES))}
            if found:
                out[found.key] = found
    findings += pools.rest(taken | _other_places(inventory, place))
    view = TensorView("mlx", out, tuple(names), _bytes(path, checkpoint, drafter))
    return MlxFolder(path, config, table, checkpoint, drafter, kind, place, view, tuple(findings), spelling)


def _bytes(path: Path, checkpoint: Checkpoint, drafter: Checkpoint | None) -> ByteSource:
    """Return what reads a folder's files and those of its drafter folder, below it or elsewhere, as `mtp/NAME`."""
    if drafter is None:
        return checkpoint.bytes
    own, below = {n: n for n in checkpoint.file_names}, {f"{DRAFTER}/{n}": n for n in drafter.file_names}
    if drafter.path == path / DRAFTER:  # no link may lead out of the folder itself
        return joined((checkpoint.bytes, own), (LocalFiles.of(path, below), {n: n for n in below}))
    return joined((checkpoint.bytes, own), (drafter.bytes, below))


def _lenient(module: Module) -> Module:
    return replace(module, store="F32 or BF16") if module.store == "F32" else module


_DENSE = {BACKBONE: Storage("bf16", "bf16"), HEAD: Storage("bf16", "bf16")}


def drafter_config(drafter: Checkpoint | None) -> JSON:
    """Return the config of a drafter folder, {} where it has none."""
    if drafter is None or drafter.config is None:
        return {}
    table = strict_json.loads(drafter.config, f"{DRAFTER}/{CONFIG_NAME}")
    return table if isinstance(table, dict) else {}


def _drafter_table(drafter: Checkpoint | None) -> JSON:
    found = drafter_config(drafter).get("quantization")
    return found if isinstance(found, dict) else {}


def _places(family: Family) -> list[HeadPlace]:
    seen: dict[tuple[str, str, str, tuple[str, ...]], HeadPlace] = {}
    for p in all_places(family):
        seen.setdefault((p.folder, p.prefix, "".join(p.rename), p.kinds), p)
    apart = (drafter_place(family, kind) for kind in family.heads)
    return [*seen.values(), *(p for p in apart if p is not None and p not in seen.values())]


def drafter_place(family: Family, kind: str) -> HeadPlace | None:
    """Return the place of a head of a kind in a drafter folder, None where the family has no place for it.

    Where no layout has such a folder, a head that is apart is spelled as in the first that keeps it in the model's.
    """
    known = [p for p in all_places(family) if kind in p.kinds]
    own = next((p for p in known if p.folder == DRAFTER), None)
    return own or next((replace(p, folder=DRAFTER, kinds=(kind,)) for p in known), None)


def _find_head(
    config: ModelConfig, own: Mapping[str, TensorInfo], below: Mapping[str, TensorInfo]
) -> tuple[str, int, HeadPlace | None]:
    """Return (kind, stages, place) of the head whose own tensors and spelling are present; the folder comes first."""
    best: tuple[tuple[int, bool], str, int, HeadPlace] | None = None
    places = _places(config.family)
    renamed = {mlx for p in places for mlx in p.rename}
    for place in places:
        pool = below if place.folder else own
        for kind in place.kinds:
            head = config.family.heads.get(kind)
            if head is None or not all(n in pool for n in _signature(head, place)):
                continue
            stages = 1
            while STAGE in place.prefix and any(n.startswith(place.prefix.replace(STAGE, str(stages))) for n in pool):
                stages += 1
            score = _spelled_so(config.family, head, place, renamed, pool), not place.folder
            if best is None or score > best[0]:
                best = (score, kind, stages, place)
    return ("none", 0, None) if best is None else best[1:]


def _find_spelling(inventory: Inventory, own: Mapping[str, TensorInfo]) -> Spelling:
    """Return how a folder spells its backbone: the way in which the most of its modules are there."""
    known = spellings_of(inventory.config.family)
    if len(known) == 1:
        return known[0]
    modules = [m for m in inventory.modules if m.part == BACKBONE]

    def count(spelling: Spelling) -> int:
        return sum((f"{n}.weight" if m.is_module else n) in own for m in modules for n in (spelling.name(m),))

    return max(known, key=count)


def _signature(head: HeadKind, place: HeadPlace) -> list[str]:
    """Return the names that the tensors of a head's signature have in a place."""
    prefix = place.own_prefix.replace(STAGE, "0")
    return [prefix + place.rename.get(mlx, mlx) + rest for mlx, rest in head.converted_signature()]


def _spelled_so(
    family: Family, head: HeadKind, place: HeadPlace, renamed: Set[str], pool: Mapping[str, TensorInfo]
) -> int:
    """Return how many of the names that are not the same in all places are there as this place has them."""
    rows = [(place.own_prefix, r.mlx) for r in head.rows] + [(place.prefix, r.mlx) for r in family.block]
    told = [prefix.replace(STAGE, "0") + place.rename.get(mlx, mlx) for prefix, mlx in rows if mlx in renamed]
    return sum(n in pool or f"{n}.weight" in pool for n in told)


def _other_places(inventory: Inventory, chosen: HeadPlace | None) -> set[tuple[str, str]]:
    """Return the names of the head in its other places (layout `universal` stores it twice)."""
    out: set[tuple[str, str]] = set()
    for place in _places(inventory.config.family):
        if chosen is None or place.folder == chosen.folder or inventory.head_kind not in place.kinds:
            continue
        for module in inventory.modules:
            if module.part == HEAD:
                prefix = place.name(module)
                out |= {(place.folder, n) for n in (prefix, f"{prefix}.weight", f"{prefix}.scales", f"{prefix}.biases")}
    return out


def second_head(folder: MlxFolder) -> TensorView | None:
    """Return the head's second copy in the drafter folder as a view, where the head also lies in the folder itself."""
    if folder.drafter is None or folder.place is None or folder.place.folder:
        return None
    places = _places(folder.config.family)
    place = next((p for p in places if p.folder == DRAFTER and folder.head_kind in p.kinds), None)
    if place is None:
        return None
    only = replace(folder.checkpoint, files=(), headers=())
    again = _match(folder.path, folder.config, {}, only, folder.drafter, part=HEAD)
    return again.view if again.place == place else None


def _mlx_logical(
    module: Module, at: matching.Place, shift: int, names: Sequence[str]
) -> tuple[LogicalTensor | None, tuple[Finding, ...]]:
    """Return the logical tensor of a module in a converted folder, None where it does not fit, and what is unlike."""
    shape, rows, cols = _geometry(module)
    found = matching.match(module, shape, at)
    info, codec = found.weight, found.codec
    if info is None or not found.fits:
        return None, found.findings
    cut = _slicer(module.experts or 1, shift)
    scale, bias = found.scale, found.bias
    store = info.dtype.lower() if codec is None else {"mxfp4": "fp4"}.get(codec.name, codec.name)
    made = LogicalTensor(
        key_of(module), info.name, names[info.file + shift], shape, rows, cols, store, cut(info),
        cut(scale) if scale else (), module.tile, module.part, module.role, module.block,
        sum(t.size for t in (info, scale, bias) if t), cut(bias) if bias else (),
        official=codec is not None and info.dtype == "F8_E4M3",
    )  # fmt: skip
    return made, found.findings


def _slicer(count: int, shift: int) -> Callable[[TensorInfo], tuple[ByteRange, ...]]:
    def cut(info: TensorInfo) -> tuple[ByteRange, ...]:
        each = info.size // count
        return tuple(ByteRange(info.file + shift, info.start + e * each, each) for e in range(count))

    return cut


def with_unexplained(
    view: TensorView, checkpoint: Checkpoint, left: Callable[[TensorInfo], bool], shift: int = 0
) -> TensorView:
    """Return a view that has the tensors of a checkpoint that are in none of its own, too, but for those `left` out.

    A tensor whose name is a key already (one that does not fit, of a weight that is elsewhere) is told by its file.
    """
    known = {(r.file, r.offset) for t in view.tensors.values() for r in (*t.weight_at, *t.scale_at, *t.bias_at)}
    out = dict(view.tensors)
    for t in checkpoint.tensors():
        if t.size and (t.file + shift, t.start) not in known and not left(t):
            file = view.names[t.file + shift]
            key = t.name if t.name not in out else f"{t.name} ({file})"
            out[key] = replace(_plain(t, file, shift), key=key)
    return replace(view, tensors=out)
