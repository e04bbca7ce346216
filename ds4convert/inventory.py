"""The exact set of tensors that a config implies, and its difference from what headers hold.

Owns the expansion of a family's rows into modules and tensors, and the recognition of what the config leaves open:
the kind of head, and how experts and dense weights are stored. Tensor names decide these; the config has to agree.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from ds4convert.config import MAX_TENSORS, ModelConfig, count_bound
from ds4convert.errors import InventoryError
from ds4convert.family import Family, Fused, HeadKind, Row, Speller, evaluate
from ds4convert.types import Finding, TensorInfo

FP4_GROUP = 32
"""Columns that share one E8M0 scale in packed FP4 weights. Source: architecture.md section 10."""

BACKBONE, HEAD = "backbone", "mtp"


@dataclass(frozen=True, slots=True)
class Storage:
    """How the weights of one part (backbone or head) lie on disk.

    `dense` is fp8 or bf16, `experts` is fp4, fp8 or bf16; `fused` is true where the experts of a layer lie in
    stacked tensors of the Transformers namespace.
    """

    dense: str
    experts: str
    fused: bool = False


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One expected tensor: official name, shape, acceptable dtypes (the first is the usual one), and its place."""

    name: str
    shape: tuple[int, ...]
    dtypes: tuple[str, ...]
    role: str
    part: str
    layer: int | None


@dataclass(frozen=True, slots=True)
class Module:
    """A weight with what belongs to it (block scales), or a lone tensor; the unit that is converted as one.

    `name` is official and may hold `{expert}`; `mlx` is the path below the block. `shape` is logical, of one expert
    where `experts` is not 0. `store` is fp4, fp8, or the dtype of a plain tensor. `own` is true for what only a
    head block has.
    """

    name: str
    mlx: str
    role: str
    part: str
    block: int | None
    shape: tuple[int, ...]
    store: str
    experts: int
    tile: tuple[int, int]
    is_module: bool
    own: bool = False
    write: str = ""
    values_below: int = 0
    fused: Fused | None = None
    fused_scale: str = ""

    def weight_name(self, expert: int = 0) -> str:
        """Return the official name of the weight (of one expert)."""
        name = self.name.replace("{expert}", str(expert)) if self.experts else self.name
        return f"{name}.weight" if self.is_module else name

    def scale_name(self, expert: int = 0) -> str:
        """Return the official name of the block scales (of one expert)."""
        return self.weight_name(expert).removesuffix("weight") + "scale"

    @property
    def has_scale(self) -> bool:
        """Return whether block scales are stored beside the weight."""
        return self.store in {"fp4", "fp8"}

    @property
    def may_quantize(self) -> bool:
        """Return whether a recipe may choose its format: matrices alone, never norms, router, sinks and the like."""
        return self.is_module

    @property
    def weights(self) -> int:
        """Return the number of logical weights, all experts counted."""
        n = self.experts or 1
        for size in self.shape:
            n *= size
        return n

    def weight_spec(self) -> tuple[tuple[int, ...], tuple[str, ...]]:
        """Return (shape, acceptable dtypes) of one weight tensor on disk."""
        if self.store == "fp4":
            return (self.shape[0], self.shape[1] // 2), ("I8", "U8")
        if self.store == "fp8":
            return self.shape, ("F8_E4M3",)
        return self.shape, tuple(self.store.split(" or "))

    def scale_shape(self) -> tuple[int, int]:
        """Return the shape of one block scale tensor on disk; grids are ceil-sized."""
        rows, cols = self.shape[0], self.shape[1]
        if self.store == "fp4":
            return rows, cols // FP4_GROUP
        return -(-rows // self.tile[0]), -(-cols // self.tile[1])


@dataclass(frozen=True)
class Inventory:
    """All modules of a checkpoint in their natural order: embedding, layers, output, head."""

    config: ModelConfig
    head_kind: str
    stages: int
    storage: Mapping[str, Storage]
    modules: tuple[Module, ...]

    def tensors(self) -> Iterator[TensorSpec]:
        """Yield every expected tensor once, weights before their scales."""
        fused: set[str] = set()
        for module in self.modules:
            if module.fused is None:
                yield from _module_specs(module)
            elif (name := fused_name(module)) not in fused:
                fused.add(name)
                yield from _fused_specs(module)


def fused_name(module: Module) -> str:
    """Return the official-namespace name of the fused tensor that holds a module's weights."""
    assert module.fused is not None
    return module.name[: module.name.index("ffn.experts.")] + module.fused.name


def _module_specs(module: Module) -> Iterator[TensorSpec]:
    shape, dtypes = module.weight_spec()
    for expert in range(max(module.experts, 1)):
        name = module.weight_name(expert)
        yield TensorSpec(name, shape, dtypes, module.role, module.part, module.block)
        if module.has_scale:
            name = module.scale_name(expert)
            yield TensorSpec(name, module.scale_shape(), ("F8_E8M0",), module.role, module.part, module.block)


def _fused_specs(module: Module) -> Iterator[TensorSpec]:
    assert module.fused is not None
    name, parts = fused_name(module), len(module.fused.parts)
    (rows, *rest), dtypes = module.weight_spec()
    place = (module.role, module.part, module.block)
    yield TensorSpec(name, (module.experts, parts * rows, *rest), dtypes, *place)
    if module.has_scale:
        if module.store == "fp8" and parts > 1 and rows % module.tile[0]:
            raise InventoryError(
                f"{name}: a tile of {module.tile[0]} rows spans two matrices of {rows} rows each; this is not supported"
            )
        rows, cols = module.scale_shape()
        shape = (module.experts, parts * rows, cols)
        yield TensorSpec(name + module.fused_scale, shape, ("F8_E8M0",), *place)


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
    kind, stages = _head_kind(config, found)
    hint = config.head_hint
    if kind != "none" and hint != "none" and kind != hint:
        raise InventoryError(
            f"the tensors under mtp.* are a {config.family.heads[kind].title}, but config.json describes a "
            f"{config.family.heads[hint].title}; this is a mixture of two releases, pull the repo again"
        )
    if kind == "none":
        kind, stages = _promised_head(config)
    storage = {part: _storage(config, found, prefix) for part, prefix in _PREFIXES.items()}
    return _settled(expand(config, kind, stages, storage), found)


def _settled(inventory: Inventory, found: Mapping[str, TensorInfo]) -> Inventory:
    """Return the inventory with a dtype chosen where the family allows several: the one found, else the first."""

    def settle(module: Module) -> Module:
        options = module.store.split(" or ")
        if len(options) == 1:
            return module
        dtype = _dtype(found, module.weight_name())
        return replace(module, store=dtype if dtype in options else options[0])

    return replace(inventory, modules=tuple(settle(m) for m in inventory.modules))


_PREFIXES = {BACKBONE: "layers.0.", HEAD: "mtp.0."}


def _head_kind(config: ModelConfig, found: Mapping[str, TensorInfo]) -> tuple[str, int]:
    """Return (kind, stages) that the names under mtp.* show; ("none", 0) without any."""
    numbers = {n.split(".", 2)[1] for n in found if n.startswith("mtp.")}
    if not numbers:
        return "none", 0
    kinds = [h for h in config.family.heads.values() if all(f"mtp.0.{s}" in found for s in h.signature)]
    if len(kinds) != 1:
        known = ", ".join(f"{h.name} ({' and '.join(h.signature)})" for h in config.family.heads.values())
        found_kinds = " and ".join(h.name for h in kinds) or "none of them"
        raise InventoryError(
            f"the tensors under mtp.0 must show exactly one kind of head: {known}; found {found_kinds}"
        )
    head = kinds[0]
    if head.stages_from == "config":
        return head.name, max(config.stages, 1) if config.stages else 0
    missing = [k for k in head.config_keys if k not in config.raw]
    if missing:
        raise InventoryError(f"the tensors are a {head.title}, but config.json lacks {', '.join(missing)}")
    stages = 1 + max((int(n) for n in numbers if n.isascii() and n.isdigit() and len(n) < 4), default=0)
    if count_bound(config.layers + stages, config.dims) > MAX_TENSORS:
        raise InventoryError(f"the tensors under mtp.* name {stages} head stages, which is more than this tool handles")
    return head.name, stages


def _storage(config: ModelConfig, found: Mapping[str, TensorInfo], prefix: str) -> Storage:
    """Return how one part is stored: as the config says where it does, else by the dtypes of its first tensors."""
    dense = "fp8" if config.has_fp8 else _FOUND_STORE.get(_dtype(found, prefix + "attn.wq_a.weight"), "bf16")
    fused_tensor = next((found[prefix + f.name] for f in config.family.fused if prefix + f.name in found), None)
    first = fused_tensor.dtype if fused_tensor else _dtype(found, prefix + "ffn.experts.0.w1.weight")
    declared = config.expert_dtype if config.expert_dtype == "fp4" else None
    experts = declared or _FOUND_STORE.get(first, config.expert_dtype or dense)
    return Storage(dense, experts, fused_tensor is not None)


_FOUND_STORE = {"I8": "fp4", "U8": "fp4", "F8_E4M3": "fp8", "BF16": "bf16"}


def _dtype(found: Mapping[str, TensorInfo], name: str) -> str:
    info = found.get(name)
    return info.dtype if info else ""


def expand(config: ModelConfig, kind: str, stages: int, storage: Mapping[str, Storage]) -> Inventory:
    """Return the inventory of a config with everything that it leaves open settled: head and storage per part."""
    family, sizes = config.family, _Sizes(config)
    modules: list[Module] = []
    first = [r for r in family.root if r.file == "first"]
    last = [r for r in family.root if r.file != "first"]
    modules += [_module(sizes, r, r.name, BACKBONE, None, 0, storage[BACKBONE]) for r in first]
    for layer in range(config.layers):
        ratio, is_hash = config.ratios[layer], layer < config.hash_layers
        rows = _rows_of(family, ratio, is_hash)
        prefix = f"layers.{layer}."
        modules += [_module(sizes, r, prefix + r.name, BACKBONE, layer, ratio, storage[BACKBONE]) for r in rows]
    modules += [_module(sizes, r, r.name, BACKBONE, None, 0, storage[BACKBONE]) for r in last]
    for stage in range(stages):
        at = config.layers + stage
        ratio = config.ratios[at] if at < len(config.ratios) else 0
        prefix = f"mtp.{stage}."
        for own, rows in (
            (True, _head_rows(family.heads[kind], stage, stages)),
            (False, _rows_of(family, ratio, False)),
        ):
            modules += [_module(sizes, r, prefix + r.name, HEAD, stage, ratio, storage[HEAD], own) for r in rows]
    return Inventory(config, kind, stages, storage, tuple(modules))


def _rows_of(family: Family, ratio: int, is_hash: bool) -> list[Row]:
    def present(row: Row) -> bool:
        if not row.when:
            return True
        rule = family.when[row.when]
        return ratio in rule.get("ratios", (ratio,)) and is_hash == rule.get("hash", is_hash)

    return [row for row in family.block if present(row)]


def _head_rows(head: HeadKind, stage: int, stages: int) -> list[Row]:
    here = {""} | ({"first"} if stage == 0 else set()) | ({"last"} if stage == stages - 1 else set())
    return [row for row in head.rows if row.stage in here]


class _Sizes:
    """Shapes of rows for layers of one compression: the same for many layers, so each is evaluated once."""

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        self._known: dict[tuple[tuple[str, ...], int], tuple[int, ...]] = {}

    def of(self, expressions: tuple[str, ...], ratio: int) -> tuple[int, ...]:
        """Return the values of expressions over the config's dims and those of the ratio."""
        key = expressions, ratio
        if key not in self._known:
            dims = dict(self.config.dims) | {"r": ratio, "k": self.config.family.compression.get(ratio, 0)}
            self._known[key] = tuple(evaluate(e, dims) for e in expressions)
        return self._known[key]


def _module(
    sizes: _Sizes,
    row: Row,
    name: str,
    part: str,
    block: int | None,
    ratio: int,
    storage: Storage,
    own: bool = False,
) -> Module:
    config = sizes.config
    store = {"dense": storage.dense, "expert": storage.experts}.get(row.store, row.store)
    fused = None
    if row.store == "expert" and storage.fused:
        last = row.name.rpartition(".")[2]
        fused = next(f for f in config.family.fused if last in f.parts)
    return Module(
        name=name,
        mlx=row.mlx,
        role=row.role,
        part=part,
        block=block,
        shape=sizes.of(row.shape, ratio),
        store={"bf16": "BF16", "linear": "BF16"}.get(store, store),
        experts=config.dims["E"] if row.store == "expert" else 0,
        tile=config.tile,
        is_module=row.store in {"dense", "expert", "linear"},
        own=own,
        write=row.write,
        values_below=sizes.of((row.values_below,), ratio)[0] if row.values_below else 0,
        fused=fused,
        fused_scale=config.family.fused_scale,
    )


@dataclass(frozen=True)
class Named:
    """Found tensors under official names, and those whose official name two tensors claim."""

    tensors: Mapping[str, TensorInfo]
    doubled: tuple[tuple[str, str], ...]


def name_tensors(family: Family, found: Iterable[TensorInfo]) -> Named:
    """Return the tensors by official name, whichever known spelling the checkpoint uses."""
    spell = Speller(family).official
    out: dict[str, TensorInfo] = {}
    doubled: list[tuple[str, str]] = []
    for tensor in found:
        name = spell(tensor.name)
        if name in out:
            doubled.append((out[name].name, tensor.name))
        out[name] = tensor
    return Named(out, tuple(doubled))


def ignored_reason(family: Family, name: str) -> str | None:
    """Return why the official name `name` may be left out, or None: only copies of shared tensors may."""
    kind, _, rest = name.partition(".")
    number, _, tail = rest.partition(".")
    return family.ignored.get(tail) if kind == "mtp" and number.isdigit() else None


def compare(inventory: Inventory, named: Named, files: tuple[str, ...]) -> list[Finding]:
    """Return every difference between the expected and the found tensors, in the order of the inventory."""
    findings: list[Finding] = []
    left = dict(named.tensors)
    for spec in inventory.tensors():
        info = left.pop(spec.name, None)
        if info is None:
            findings.append(Finding("missing", spec.name, f"{spec.dtypes[0]} {list(spec.shape)}", "nothing"))
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
