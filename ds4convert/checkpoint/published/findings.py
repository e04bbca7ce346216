"""What is said of the differences between a config and its tensors, and what to do, told from their kinds. Pure.

"Pull it again" is the advice where files are missing or of two revisions, and nowhere else: it may cost 160 GB.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence

from ds4convert.checkpoint.advice import offers
from ds4convert.checkpoint.config import ModelConfig
from ds4convert.checkpoint.family import Family, HeadKind
from ds4convert.checkpoint.names import Speller, general
from ds4convert.checkpoint.published import pruning
from ds4convert.checkpoint.published.foreign import OFFICIAL
from ds4convert.checkpoint.types import Finding, TensorInfo
from ds4convert.errors import FindingsError
from ds4convert.words.terminal import show

STORED = (
    "this stores tensors in a dtype that is not converted; save them as BF16 (or FP8 E4M3 and FP4 with their block "
    "scales) with the program that wrote them"
)
UNKNOWN = (
    "the config implies no such tensors, so nothing would read them. If a program left them there, take them out of "
    "the files and the index; if this is a variant of the model, ds4convert does not know it"
)
OTHER_SIZES = (
    "config.json describes other sizes than the tensors have: it is of another model or was edited; take the "
    "config.json that belongs to these files"
)
MIXED = "config.json and the tensors contradict each other; pull the repo again, at one revision"
HEAD_ALONE = (
    "this folder holds the head alone, without a backbone; `ds4convert graft MLX_DIR --from` it puts the head into a "
    "converted folder, and a conversion needs the whole checkpoint"
)


UNINDEXED = (
    "the index decides which tensors a checkpoint has, and leaves these out: add them to the index's weight_map, or, "
    "where no tensor is in two files, delete model.safetensors.index.json"
)


def advice(
    findings: Sequence[Finding], config: ModelConfig, found: Mapping[str, TensorInfo], files: Sequence[str] = ()
) -> str:
    """Return what to do about `findings`, given the tensors `found` by official name, and the names of their files."""
    kinds = {f.kind for f in findings}
    if any(f.kind == "missing" and f.file for f in findings):
        return UNINDEXED
    family = config.family
    if found and all(family.is_of_head(n) for n in found):
        return HEAD_ALONE
    if kinds == {"missing"} and all(family.is_of_head(f.tensor) for f in findings):
        return _head(findings, config, found, files)
    if told := _tower(findings, config, found) or _odd_expert(findings, found, family) or _scales(findings, found):
        return told
    if told := pruning.advice(config, found):
        return told
    if kinds == {"dtype"} or (kinds == {"dtype", "missing"} and _lacks_scales_only(findings)):
        return STORED
    if len(kinds) == 1:
        return {"extra": UNKNOWN, "shape": OTHER_SIZES}.get(next(iter(kinds)), MIXED)
    return MIXED


def _head(
    findings: Sequence[Finding], config: ModelConfig, found: Mapping[str, TensorInfo], files: Sequence[str]
) -> str:
    """Return what to do where a head is promised, or partly there, and some of its tensors are not."""
    drop = ", or convert without it: --drop-mtp" if offers("--drop-mtp") else ""
    family, stem = config.family, config.family.prefix.head_stem
    there = [t for n, t in found.items() if family.is_of_head(n)]
    if not there:
        return (
            f"config.json promises a head ({family.config_keys['stages']}), but its tensors are not all here; "
            f"download the shard that holds {family.of_head}{drop}"
        )
    blocks = [m for n in found if (m := family.block_of(n)) and m["head"] and len(m["number"]) <= STAGE_DIGITS]
    stages = sorted({int(m["number"]) for m in blocks})
    wanted = max((*(n + 1 for n in stages), *(h.default_stages for h in _kinds(config)), config.stages))
    if absent := [n for n in range(wanted) if n not in stages]:
        names = " and ".join(f"{stem}{n}.*" for n in absent)
        return (
            f"of {wanted} stages of the head, {len(stages)} {'is' if len(stages) == 1 else 'are'} here "
            f"({', '.join(map(str, stages))}); download the file that holds {names}{drop}"
        )
    held = " and ".join(show(files[n]) for n in sorted({t.file for t in there}) if n < len(files)) or "this checkpoint"
    return (
        f"a part of the head is here: {held} has {len(there)} of its tensors, and {len(findings)} are missing; "
        f"download what holds the others of {family.of_head} (or that file again){drop}"
    )


STAGE_DIGITS = 3


def _kinds(config: ModelConfig) -> list[HeadKind]:
    """Return the kind of head that the config describes, if its stages are not counted there."""
    head = config.family.heads.get(config.head_hint)
    return [head] if head is not None and head.stages_from != "config" else []


def _tower(findings: Sequence[Finding], config: ModelConfig, found: Mapping[str, TensorInfo]) -> str | None:
    """Return what to do where a tower is there and not in the config, or in the config and not there."""
    family, kinds = config.family, {f.kind for f in findings}
    spell = Speller(family).official
    names = {general(family, spell(f.tensor)) for f in findings}
    for tower in family.towers:
        tails = family.tower_tails(tower)
        if not names <= tails or len(kinds) > 1:
            continue
        if kinds == {"extra"}:
            keys = ", ".join(dict.fromkeys((tower.needs, tower.count, *tower.dims.values())))
            return (
                f"these belong to a {tower.title}, which config.json does not describe ({tower.needs}). To keep it, "
                f"copy its keys ({keys}) from the config.json of the release that it is from; to do without, take "
                "these tensors out of the files and the index, or convert the text release of the same model"
            )
        own = {official for r in (*tower.root, *tower.rows) for _, official in r.tails()}
        if kinds == {"missing"} and not any(general(family, name) in own for name in found):
            return (
                f"config.json describes a {tower.title} ({tower.needs}), and none of its tensors is here. If the text "
                f"model was saved without it, take {tower.needs} out of config.json; else download the files that hold "
                "it"
            )
    return None


MOST_LOOKED_AT = 20
STORAGES = {"I8": "FP4 (I8)", "U8": "FP4 or E8M0 (U8)", "F8_E4M3": "FP8 (F8_E4M3)", "F8_E8M0": "E8M0 (F8_E8M0)"}


def _odd_expert(findings: Sequence[Finding], found: Mapping[str, TensorInfo], family: Family) -> str | None:
    """Return what to do where single experts are stored in another way than the others of their matrix."""
    words = "|".join(map(re.escape, sorted(family.expert_components)))
    of_expert = re.compile(rf"(.+\.(?:{words}))\.(\d+)\.(.+)")
    for m in [of_expert.fullmatch(f.tensor) for f in findings if f.kind == "dtype"][:MOST_LOOKED_AT]:
        if m is None or (odd := found.get(m[0])) is None:
            continue
        alike = {
            n: t for n, t in found.items()
            if n.startswith(f"{m[1]}.") and n.endswith(f".{m[3]}") and of_expert.fullmatch(n)
        }  # fmt: skip
        (usual, count), *others = Counter(t.dtype for t in alike.values()).most_common()
        if not others or odd.dtype == usual:
            continue
        one = next(n for n, t in alike.items() if t.dtype == usual)
        return (
            f"{m[0]} is stored as {STORAGES.get(odd.dtype, odd.dtype)}, but {count} others of its matrix (such as "
            f"{one}) as {STORAGES.get(usual, usual)}. The experts of a matrix become one tensor, so they have to be "
            "stored alike: save this expert as the others are, with the program that wrote it, or all of them in BF16"
        )
    return None


def _scales(findings: Sequence[Finding], found: Mapping[str, TensorInfo]) -> str | None:
    """Return what to do where block scales are not there, or are for whole tensors or rows."""
    for f in findings:
        weight = found.get(f.tensor.removesuffix("scale") + "weight") if f.tensor.endswith(".scale") else None
        scale = found.get(f.tensor) or found.get(f.tensor.removesuffix("scale") + "weight_scale")
        if weight is None or weight.dtype not in {"F8_E4M3", "I8", "U8"}:
            continue
        if scale is not None and weight.dtype == "F8_E4M3" and f.kind != "dtype":
            each = {1: "per tensor", weight.shape[0] if weight.shape else 1: "per row"}.get(math.prod(scale.shape))
            if each:
                return (
                    f"{f.tensor}: these are FP8 weights with one scale {each} ({scale.dtype} {list(scale.shape)}), not "
                    f"with one per block; MLX has no such format. To go on: {OFFICIAL}"
                )
    lacking = {f.tensor.removesuffix("scale") + "weight" for f in findings if f.kind == "missing"}
    if lacking and all(f.kind == "missing" and f.tensor.endswith(".scale") for f in findings) and lacking <= set(found):
        return (
            f"{len(lacking)} {'weight is' if len(lacking) == 1 else 'weights are'} there as codes (FP8 or FP4) without "
            "the block scales, which say what the codes are worth. A program that saved the model again may have lost "
            f"them; if they are in a file that is not here, download it. Else {OFFICIAL}"
        )
    return None


def _lacks_scales_only(findings: Sequence[Finding]) -> bool:
    """Return whether each missing tensor is a block scale of a weight that has an unknown dtype."""
    wrong = {f.tensor for f in findings if f.kind == "dtype"}
    missing = [f.tensor for f in findings if f.kind == "missing"]
    return all(n.endswith("scale") and n.removesuffix("scale") + "weight" in wrong for n in missing)


SHOWN_FINDINGS = 10


def findings_error(findings: Sequence[Finding], hint: str) -> FindingsError:
    """Return one error for all `findings`: the first ten in full, then the count, then what to do."""
    shown = [show(str(f), 300) for f in findings[:SHOWN_FINDINGS]]
    rest = len(findings) - len(shown)
    more = [f"and {rest} more"] if rest > 0 else []
    first = findings[0].tensor if findings else None
    return FindingsError("\n".join([*shown, *more, hint]), tensor=first, hint=hint)
