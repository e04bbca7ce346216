"""The options of a conversion as one frozen record, checked against each other."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ds4convert.api.opening import model_source
from ds4convert.api.values import (
    OptionRecord,
    bytes_of,
    fit_size,
    flag,
    mac_size,
    number,
    one_of,
    path,
    paths,
    size,
    text,
)
from ds4convert.errors import UsageError
from ds4convert.planning.build import DEFAULT_SHARD_BYTES, Options, check_limit
from ds4convert.planning.layouts import layout_of
from ds4convert.planning.recipes import recipe_of
from ds4convert.words import macs

COMPENSATED = "compensated"
ROUNDINGS = ("optimal", "nearest", COMPENSATED)


@dataclass(frozen=True)
class ConversionOptions(OptionRecord):
    """What `plan` and `convert` are asked for; each is the option of the same name of the command `convert`.

    `recipe` is a name or a file; `backbone`, `experts`, `engram`, `mtp` are formats in place of the recipe's. `mac` and
    `fit` are sizes of memory to choose formats for, with the state of `context` tokens. `from_mlx`: the source is a
    converted folder.
    `calibration` is a file that `calibrate` wrote; `calibrate` are the texts of compensated rounding (files, folders,
    JSON lines), of which `calibration_tokens` are used. `keep_mtp` false leaves the head out. `jobs` files are
    written at a time; `cores` are used, all of them if not said. `hashing` false leaves
    out digests.
    """

    recipe: str = text("native")
    backbone: str | None = text(None)
    experts: str | None = text(None)
    engram: str | None = text(None)
    mtp: str | None = text(None)
    mac: int | None = bytes_of(mac_size, None)
    fit: int | None = bytes_of(fit_size, None)
    context: int = number(8192, 1)
    from_mlx: bool = flag(False)
    rounding: str = one_of(ROUNDINGS, "optimal")
    calibration: Path | None = path(None)
    calibrate: tuple[Path, ...] = paths()
    calibration_tokens: int = number(32768, 64)
    keep_mtp: bool = flag(True)
    layout: str = text("inline")
    max_shard_size: int = bytes_of(size, DEFAULT_SHARD_BYTES)
    jobs: int = number(2, 1, 64)
    cores: int | None = number(None, 1, 1024)
    hashing: bool = flag(True)

    def __post_init__(self) -> None:
        """Raise `UsageError` on values out of range and on options that contradict each other."""
        super().__post_init__()
        if self.mtp and not self.keep_mtp:
            raise UsageError("--mtp FORMAT and --drop-mtp contradict each other")
        if self.fit is not None and self.mac is not None:
            raise UsageError("--mac and --fit both say what to fit into", hint="give one of them")
        if self.target is None and self.recipe == "fit":
            raise UsageError(
                "the recipe `fit` needs to know what to fit into", hint="say --mac SIZE, such as --mac 128GB"
            )
        if self.target is not None and (self.backbone or self.experts or self.recipe not in {"native", "fit"}):
            raise UsageError(
                "--fit or --mac chooses the formats of the backbone; it goes with no recipe, --backbone or --experts "
                "(--mtp can)"
            )
        if self.calibration is not None and self.rounding == "nearest":
            raise UsageError("--calibration weighs the search of --rounding optimal; nearest has no use for it")

    @property
    def is_compensated(self) -> bool:
        """Return whether rounding goes by what a text makes of the model."""
        return self.rounding == COMPENSATED

    @property
    def target(self) -> int | None:
        """Return the bytes to fit the model into, None where its formats are said."""
        return self.fit if self.mac is None else macs.usable(self.mac)

    def settled(self) -> Options:
        """Return the options as planning takes them: recipe and layout read from their files."""
        recipe = recipe_of(self.recipe).overridden(self.backbone, self.experts, self.mtp, self.engram)
        layout = layout_of(self.layout)
        source = model_source() if layout.model_file else b""
        limit = check_limit(self.max_shard_size)
        return Options(recipe, layout, self.keep_mtp, limit, self.hashing, source, self.rounding)

    def without_effect(self) -> dict[str, str]:
        """Return the names of options that have no use beside the others, each with what it is for."""
        needs = {
            "context": (self.target is not None, "--mac and --fit"),
            "calibration_tokens": (self.is_compensated, "--rounding compensated"),
        }
        return {name: what for name, (used, what) in needs.items() if not used}

    def advice(self) -> str | None:
        """Return what is to be said of `fit` where it names the memory of a Mac and not what is free of it."""
        if self.fit is None or (gib := macs.looks_like(self.fit)) is None:
            return None
        return (
            f"--fit takes bytes that are free for the model, and no Mac with {gib} GB has them: "
            f"{macs.said(gib * macs.GIB)}. For such a Mac say --mac {gib}GB"
        )
