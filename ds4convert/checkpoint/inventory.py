"""The exact set of tensors that a config implies, and its difference from what headers hold.

Owns the recognition of what the config leaves open: the kind of head, and how experts and dense weights are stored.
Tensor names decide these; the config has to agree.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

from ds4convert.checkpoint.config import MAX_TENSORS, ModelConfig, count_bound
from ds4convert.checkpoint.families.expansion import expand
from ds4convert.checkpoint.families.modules import (
    BACKBONE,
    FP4_GROUP,
    HEAD,
    HEAD_GROUPS,
    Inventory,
    Module,
    Storage,
    TensorSpec,
    backbone_name,
    fused_name,
    group_of,
    key_of,
)
from ds4convert.checkpoint.families.rows import NUMBER
from ds4convert.checkpoint.family import Family, Fused, HeadKind
from ds4convert.checkpoint.names import Named, ignored_reason
from ds4convert.checkpoint.published import pruning
from ds4convert.checkpoint.types import Finding, TensorInfo
from ds4convert.errors import InventoryError

__all__ = [
    "BACKBONE", "FP4_GROUP", "HEAD", "HEAD_GROUPS", "Inventory", "Module", "Storage", "TensorSpec", "backbone_name",
    "compare", "expand", "expected", "fused_name", "group_of", "key_of", "recognise",
]  # fmt: skip


def expected(config: ModelConfig) -> Inventory:
    """Return the inventory that the config alone implies (absent `expert_dtype`: FP8 where it declares FP8)."""
    dense = "fp8" if config.has_fp8 else "bf16"
    storage = Storage(dense, config.expert_dtype or dense)
    kind, stages = _promised_head(config)
    return _settled(expand(config, kind, stages, {BACKBONE: storage, HEAD: storage}), {})


def _promised_head(config: ModelConfig) -> tuple[str, int]:
    """Return (kind, stages) of the head that the config alone promises; ("none", 0) without one."""
    head = config.family.heads.get(config.head_hint)
    stages = 0 if head is None else _stages_from_config(config, head)
    return (config.head_hint, stages) if stages else ("none", 0)


def _stages_from_config(config: ModelConfig, head: HeadKind) -> int:
    if head.stages_from == "config":
        return config.stages
    return max(config.stages, head.default_stages)


def recognise(config: ModelConfig, found: Mapping[str, TensorInfo]) -> Inventory:
    """Return the inventory for the tensors `found` (by official name): names and dtypes settle what is open.

    A head that the config promises and that has no tensor at all is expected as the config says, so that its
    absence shows as missing tensors. Raises `InventoryError` when the head is of no known kind, of two kinds, or
    of another kind than the config describes.
    """
    config = pruning.as_left(config, found)
    kind, stages = _head_kind(config, found)
    hint = config.head_hint
    if kind != "none" and hint != "none" and kind != hint:
        raise InventoryError(
            f"the tensors under {config.family.of_head} are a {config.family.heads[kind].title}, but config.json "
            f"describes a {config.family.heads[hint].title}; this is a mixture of two releases, pull the repo again"
        )
    if kind == "none":
        kind, stages = _promised_head(config)
    if kind != "none" and not config.stages:  # some programs strip the key, and leave the head
        config = config.with_stages(stages)
    first = {BACKBONE: config.family.prefix.block, HEAD: config.family.prefix.head}
    storage = {part: _storage(config, found, prefix.replace(NUMBER, "0")) for part, prefix in first.items()}
    return _settled(expand(config, kind, stages, storage), found)


def _settled(inventory: Inventory, found: Mapping[str, TensorInfo]) -> Inventory:
    """Return the inventory with every module stored as its own tensors say; as the config says where there is none."""
    family = inventory.config.family
    return replace(inventory, modules=tuple(_settle(m, found, family) for m in inventory.modules))


def _settle(module: Module, found: Mapping[str, TensorInfo], family: Family) -> Module:
    if module.experts:
        module = _where_experts_lie(module, found, family.fused)
    names = (
        (fused_name(module), fused_name(module) + module.fused_scale)
        if module.fused
        else (_first_there(module, found), "")
    )
    weight = found.get(names[0])
    scale = found.get(names[1] or names[0].removesuffix("weight") + "scale")
    dtype = weight.dtype if weight else ""
    if module.is_module:
        store = _FOUND_STORE.get(dtype, module.store)
        store = "BF16" if store == "bf16" else store
        if dtype in SAME_VALUES["BF16"]:
            return replace(module, store="BF16", found_dtype=dtype)
        if scale is None or scale.dtype not in SCALE_DTYPES:
            return replace(module, store=store)
        tile = _tile_of(module, scale.shape, family) if store == "fp8" and not module.fused else module.tile
        return replace(module, store=store, scale_dtype=scale.dtype, tile=tile)
    options = module.store.split(" or ")
    if len(options) > 1:
        return replace(module, store=dtype if dtype in options else options[0])
    return replace(module, found_dtype=dtype) if dtype in SAME_VALUES.get(module.store, ()) else module


def _first_there(module: Module, found: Mapping[str, TensorInfo]) -> str:
    """Return the name of the weight that tells how a module lies: of the first expert that lies as most of them do."""
    names = [n for n in (module.weight_name(e) for e in range(module.experts or 1)) if n in found]
    usual = Counter(found[n].dtype for n in names).most_common(1)
    return next((n for n in names if found[n].dtype == usual[0][0]), module.weight_name())


def _where_experts_lie(module: Module, found: Mapping[str, TensorInfo], kinds: Sequence[Fused]) -> Module:
    """Return the module with its experts in a fused tensor or one by one, whichever is there in its own block."""
    last = module.name.rpartition(".")[2]
    fused = next((f for f in kinds if last in f.parts), None)
    if fused is not None and fused_name(replace(module, fused=fused)) in found:
        return replace(module, fused=fused)
    return replace(module, fused=None) if _first_there(module, found) in found else module


def _tile_of(module: Module, grid: tuple[int, ...], family: Family) -> tuple[int, int]:
    """Return the (rows, columns) of one block scale: as the config says where that gives `grid`, else a usual tile."""
    rows, cols = module.shape
    tiles = (module.tile, *family.storage.tiles)
    return next((t for t in tiles if (-(-rows // t[0]), -(-cols // t[1])) == grid), module.tile)


SCALE_DTYPES = ("F8_E8M0", "U8", "F32", "BF16", "F16")
"""Dtypes that block scales are stored in: the same bytes as U8, or the same powers of two as a float."""

SAME_VALUES = {"F32": ("BF16", "F16"), "BF16": ("F32", "F16"), "I64": ("I32", "I16", "I8", "U64", "U32", "U16", "U8")}
"""By the usual dtype: others that are taken over value for value. Where the usual one is smaller, only if it holds all
of the values (else the run stops); integers are indices, and checked for their range."""


def _head_kind(config: ModelConfig, found: Mapping[str, TensorInfo]) -> tuple[str, int]:
    """Return (kind, stages) that the names of the head's tensors show; ("none", 0) without any."""
    family = config.family
    numbers = _stage_numbers(family, found)
    if not numbers:
        return "none", 0
    first = family.prefix.head.replace(NUMBER, "0")
    kinds = [h for h in family.heads.values() if all(first + s in found for s in h.signature)]
    if len(kinds) != 1:
        known = ", ".join(f"{h.name} ({' and '.join(h.signature)})" for h in family.heads.values())
        found_kinds = " and ".join(h.name for h in kinds) or "none of them"
        raise InventoryError(
            f"the tensors under {first[:-1]} must show exactly one kind of head: {known}; found {found_kinds}. "
            f"If the file that holds the rest of {first}* is missing, download it; if this head is of another kind or "
            "was left over, take its tensors out of the files and the index"
        )
    head = kinds[0]
    if head.stages_from == "config" and config.stages:
        return head.name, config.stages
    flat = config.flat
    missing = [k for k in head.config_keys if k not in flat]
    if missing:
        raise InventoryError(f"the tensors are a {head.title}, but config.json lacks {', '.join(missing)}")
    stages = 1 + max((int(n) for n in numbers if n.isascii() and n.isdigit() and len(n) < 4), default=0)
    if count_bound(config.layers + stages, config.dims[family.experts], len(family.expert_rows)) > MAX_TENSORS:
        raise InventoryError(
            f"the tensors under {family.of_head} name {stages} head stages, which is more than this tool handles"
        )
    _check_ratios(config)
    return head.name, stages


def _stage_numbers(family: Family, found: Mapping[str, TensorInfo]) -> set[str]:
    """Return what follows the head's prefix in the names found, up to the next dot."""
    stem = family.prefix.head_stem
    return {n.removeprefix(stem).split(".", 1)[0] for n in found if n.startswith(stem)}


def _check_ratios(config: ModelConfig) -> None:
    """Raise `InventoryError` where the stages that the config itself counts have no compress ratio of their own.

    Public configs count one stage where the names show three; for the rest 0 is taken, as in all releases, and told.
    """
    if "ratios" not in config.family.config_keys:
        return
    stages = config.stages
    wanted = config.layers + stages
    if len(config.ratios) < wanted:
        raise InventoryError(
            f"config.json: {config.family.config_keys['ratios']} has {len(config.ratios)} items, but "
            f"{config.layers} layers and {stages} head stages need {wanted}",
            hint="add a 0 for each stage that lacks one",
        )


def taken(inventory: Inventory) -> list[str]:
    """Return notes on what the tensors were believed in, and not the config."""
    return [told for told in (pruning.told(inventory.config), ratios_taken(inventory)) if told]


def ratios_taken(inventory: Inventory) -> str:
    """Return a note on head stages whose compress ratio the config does not give; "" where it gives all."""
    config, stages = inventory.config, inventory.stages
    lacking = config.layers + stages - len(config.ratios)
    if inventory.head_kind == "none" or lacking <= 0 or "ratios" not in config.family.config_keys:
        return ""
    key = config.family.config_keys["ratios"]
    return (
        f"config.json: {key} has {len(config.ratios)} items for {config.layers} layers and {stages} head stages; "
        f"0 (no compression) is taken for the last {lacking}"
    )


def _storage(config: ModelConfig, found: Mapping[str, TensorInfo], prefix: str) -> Storage:
    """Return how a part is stored where a module of it is not there to tell: as its first tensors, else the config."""
    probes = config.family.storage
    dense = _FOUND_STORE.get(_dtype(found, prefix + probes.dense), "fp8" if config.has_fp8 else "bf16")
    fused_tensor = next((found[prefix + f.name] for f in config.family.fused if prefix + f.name in found), None)
    first = fused_tensor.dtype if fused_tensor else _dtype(found, prefix + probes.expert)
    experts = _FOUND_STORE.get(first, config.expert_dtype or dense)
    return Storage(dense, experts, fused_tensor is not None)


_FOUND_STORE = {"I8": "fp4", "U8": "fp4", "F8_E4M3": "fp8", "BF16": "bf16"}


def _dtype(found: Mapping[str, TensorInfo], name: str) -> str:
    info = found.get(name)
    return info.dtype if info else ""


def compare(inventory: Inventory, named: Named, files: tuple[str, ...]) -> list[Finding]:
    """Return every difference between the expected and the found tensors, in the order of the inventory."""
    findings: list[Finding] = []
    left = dict(named.tensors)
    for spec in inventory.tensors():
        info = left.pop(spec.name, None)
        if info is None:
            wanted, outside = f"{spec.dtypes[0]} {list(spec.shape)}", named.outside.get(spec.name)
            file = "" if outside is None else files[outside]
            findings.append(Finding("missing", spec.name, wanted, "nothing", file))
        elif info.dtype not in spec.dtypes:
            wanted = " or ".join(spec.dtypes)
            findings.append(Finding("dtype", info.name, wanted, info.dtype, files[info.file]))
        elif info.shape != spec.shape:
            wanted = str(list(spec.shape))
            findings.append(Finding("shape", info.name, wanted, str(list(info.shape)), files[info.file]))
    for name, info in left.items():
        if ignored_reason(inventory.config.family, name) is None:
            found = f"{info.dtype} {list(info.shape)}"
            findings.append(Finding("extra", info.name, "nothing of this name", found, files[info.file]))
    for first, second in named.doubled:
        wanted = "one spelling of each tensor"
        findings.append(Finding("extra", second, wanted, f"also present as {first}"))
    return findings
