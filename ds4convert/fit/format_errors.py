"""What each format would cost each role and layer: bytes, and the error on a sample of rows. For `fit`.

A unit's error is the sum over its matrices of relative squared error times weights, times the part of all tokens that
a weight takes part in: an expert's weights count by experts per token over experts, as most tokens pass them by.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Container, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Protocol

import numpy as np

from ds4convert.checkpoint.inventory import BACKBONE, Inventory, Module, key_of
from ds4convert.checkpoint.names import Named
from ds4convert.errors import InputError
from ds4convert.execution.rounding_steps import Importance, no_importance, sample
from ds4convert.execution.workers import Pool
from ds4convert.fit.memory import is_mapped
from ds4convert.fit.optimiser import Option, Unit
from ds4convert.formats.codecs import CODECS
from ds4convert.formats.rounding import Encoded, encode, encode_fp4
from ds4convert.formats.samples import fp4_sample, fp8_sample, normal_sample
from ds4convert.planning import build
from ds4convert.planning.encodings import ENCODERS, Encoding
from ds4convert.planning.layouts import Spelling
from ds4convert.planning.recipes import Floor, kind_of, role_of
from ds4convert.planning.types import Output, Step
from ds4convert.storage.byte_source import Read

SAMPLE_VALUES = 1 << 15
"""Weights that are looked at per matrix: enough for an error to a few per cent."""

SAMPLE_EXPERTS = 2
"""Experts that are looked at per layer and matrix, far apart."""

CANDIDATES = ("native", *CODECS)

Errors = Callable[[Module, str, Encoding], float]
"""Returns the relative squared error of a module in a format."""


class Sensitivities(Protocol):
    """What rounding single matrices does to the output: KL by key, measured with the format that `probes` names."""

    @property
    def losses(self) -> Mapping[str, float]:
        """Return nats per token by key."""

    @property
    def probes(self) -> Mapping[str, str]:
        """Return formats by key."""


def is_chosen(module: Module, inventory: Inventory, said: Container[str] = ()) -> bool:
    """Return whether a choice is made for a module: for matrices of the backbone that are held in memory.

    Not for towers, nor for roles and kinds of matrix whose format is `said`.
    """
    free = module.may_quantize and not module.apart and not is_mapped(inventory, module)
    return module.part == BACKBONE and free and role_of(module) not in said and kind_of(module) not in said


def units(inventory: Inventory, by_kind: bool = False, said: Container[str] = ()) -> dict[Unit, list[Module]]:
    """Return the backbone's matrices by role (or by kind of matrix) and layer: what a choice is made for."""
    out: dict[Unit, list[Module]] = {}
    for module in inventory.modules:
        if is_chosen(module, inventory, said):
            out.setdefault((kind_of(module) if by_kind else role_of(module), module.block), []).append(module)
    return out


def options(
    inventory: Inventory,
    errors: Errors,
    known: Sensitivities | None = None,
    floor: Floor | None = None,
    said: Container[str] = (),
) -> dict[Unit, list[Option]]:
    """Return the formats that each unit may have, with bytes and errors; none that is larger than native and no better.

    None is below the `floor` in the layers that have it. There are none for roles whose format is `said`.

    Errors are parts of the whole: 1 would be to lose all that a token meets; or, with sensitivities, nats per token
    that the output is estimated to differ by. They are asked for on all cores.
    """
    family, dims = inventory.config.family, inventory.config.dims
    found, active = units(inventory, known is not None, said), dims[family.active] / dims[family.experts]
    met = {m.name: m.weights * (active if m.experts else 1) for ms in found.values() for m in ms}
    whole = sum(met.values())
    if known is not None:
        met, whole = _by_loss(found, errors, known), 1.0
    with ThreadPoolExecutor((os.cpu_count() or 1) + 1, "measure") as threads:
        made = {
            unit: [
                threads.submit(_option, name, modules, [met[m.name] / whole for m in modules], errors)
                for name in CANDIDATES
                if not (floor and floor.is_below(name) and floor.holds(modules[0], inventory.config.carriers))
            ]
            for unit, modules in found.items()
        }
        return {unit: [o for f in futures if (o := f.result()) is not None] for unit, futures in made.items()}


def _by_loss(found: Mapping[Unit, Sequence[Module]], errors: Errors, known: Sensitivities) -> dict[str, float]:
    """Return what one unit of relative squared error costs in each matrix: its KL over the error of its probe."""
    out = {}
    for module in (m for modules in found.values() for m in modules):
        key = key_of(module)
        probe = known.probes.get(key)
        error = errors(module, probe, ENCODERS[probe](module)) if probe else 0.0
        out[module.name] = known.losses.get(key, 0.0) / error if error else 0.0
    return out


def _option(name: str, modules: Sequence[Module], parts: Sequence[float], errors: Errors) -> Option | None:
    try:
        encodings = [ENCODERS[name](m) for m in modules]
    except InputError:  # no whole groups
        return None
    size = sum(e.size_bytes for e in encodings)
    if name != "native" and size >= sum(ENCODERS["native"](m).size_bytes for m in modules):
        return None
    error = sum(errors(m, name, e) * part for m, e, part in zip(modules, encodings, parts, strict=True))
    return Option(name, size, error)


def _is_exact(encoding: Encoding) -> bool:
    return not any(p.transform.startswith("quantize_") for p in encoding.parts)


def measured(
    named: Named, options: build.Options, read: Read, pool: Pool, importance: Importance = no_importance
) -> Errors:
    """Return errors as a sample of rows of the checkpoint has them, with the rounding of `options`, found in `pool`."""

    def errors(module: Module, name: str, encoding: Encoding) -> float:
        if _is_exact(encoding):
            return 0.0
        item = build.items([(module, name, encoding)], Spelling())[0][0]
        outputs = tuple(Output(d.name, d.dtype, d.shape, 0, 0, d.size) for d in item.drafts)
        step: Step = build.step_of(named, options, item, outputs)
        chunks = sample(step, read, importance, SAMPLE_VALUES, SAMPLE_EXPERTS)
        found = [f.result() for f in [pool.submit(c.encoded) for c in chunks]]
        good = [f for f in found if isinstance(f, Encoded)]  # a value that cannot be encoded is told of by the run
        norm = sum(f.norm for f in good)
        return sum(f.squared for f in good) / norm if norm else 0.0

    return errors


def imagined(rounding: str) -> Errors:
    """Return errors as normally distributed weights would have them: all that can be said from a config alone."""
    known: dict[tuple[str, str], float] = {}

    def errors(module: Module, name: str, encoding: Encoding) -> float:
        if _is_exact(encoding):
            return 0.0
        key = (module.store, name)
        if key not in known:
            found = SAMPLES[module.store if module.store in SAMPLES else "bf16"](name, rounding)
            known[key] = found.squared / found.norm
        return known[key]

    return errors


def _from_values(make: Callable[[], np.ndarray], name: str, rounding: str) -> Encoded:
    return encode(make(), CODECS[name], rounding)


def _from_fp4(name: str, rounding: str) -> Encoded:
    return encode_fp4(*fp4_sample(), CODECS[name], rounding)


SAMPLES: Mapping[str, Callable[[str, str], Encoded]] = {
    "bf16": partial(_from_values, normal_sample),
    "fp8": partial(_from_values, fp8_sample),
    "fp4": _from_fp4,
}
"""Rounds a sample of normal weights that went through each kind of storage."""
