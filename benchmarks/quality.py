"""What formats cost the demo checkpoint: perplexity, KL from the source, acceptance, bytes. Prints a Markdown table.

Every other text of the fixed prompt set is for calibration, the rest for the figures; teacher-forced, in float32.

    python benchmarks/quality.py
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from ds4convert.checkpoint.source import Source, open_source
from ds4convert.evaluate import calibration
from ds4convert.evaluate.input_moments import collect
from ds4convert.evaluate.layerwise import LayerwiseResult, run_layerwise
from ds4convert.execution import run
from ds4convert.execution.rounding_steps import no_importance
from ds4convert.generation.open_folder import read_tokenizer
from ds4convert.planning import build
from ds4convert.planning.build import make_plan
from ds4convert.planning.layouts import layout_of
from ds4convert.planning.recipes import Recipe, recipe_of
from ds4convert.verification import prompts

DEMO = Path(__file__).resolve().parent.parent / "manifests" / "demo"
WIDTHS = (8, 6, 4, 3, 2)


@dataclass(frozen=True)
class Case:
    """One conversion: what it is called, its recipe, rounding, and whether it is calibrated."""

    name: str
    recipe: Recipe
    rounding: str
    calibrated: bool = False


def cases() -> Iterator[Case]:
    """Yield every conversion of the table."""
    native = recipe_of("native")
    yield Case("native", native, "optimal")
    kinds: tuple[tuple[str, Callable[[int], Recipe]], ...] = (
        ("recipe q{}", lambda b: recipe_of(f"q{b}")),
        ("backbone affine-{}-g64", lambda b: native.overridden(f"affine-{b}-g64", None, None)),
    )
    for kind, pick in kinds:
        for bits in WIDTHS:
            name, recipe = kind.format(bits), pick(bits)
            yield Case(name, recipe, "nearest")
            yield Case(name, recipe, "optimal")
            yield Case(name, recipe, "optimal", True)
    for bits in WIDTHS:
        for rounding in ("nearest", "optimal"):
            name = f"head affine-{bits}-g64"
            yield Case(name, native.overridden(None, None, f"affine-{bits}-g64"), rounding)


def measured(
    case: Case, out: Path, source: Source, known: calibration.Calibration, texts: list[list[int]]
) -> tuple[LayerwiseResult, int]:
    """Convert, and return what the layers of the result give, with its bytes."""
    options = build.Options(case.recipe, layout_of("inline"), rounding=case.rounding)
    if case.calibrated:
        options = replace(options, calibration=known)
    weigh = known.importance if case.calibrated else no_importance
    run.run(source, make_plan(source, options), out, run.Way(overwrite=True, importance=weigh))
    return run_layerwise(out, texts, source=DEMO), sum(p.stat().st_size for p in out.rglob("*.safetensors"))


def line(case: Case, found: LayerwiseResult, size: int) -> str:
    """Return the line of a conversion."""
    d, f = found.divergence, found.converted
    assert d is not None and f.acceptance is not None
    how = case.rounding + (", calibrated" if case.calibrated else "")
    return (
        f"| {case.name} | {how} | {f.perplexity:.4f} | {d.kl_mean:.3g} | {d.same_argmax / d.positions:.1%} | "
        f"{f.acceptance:.1%} | {size / 1e6:.3f} MB |"
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="Only cases whose name holds this.")
    only = parser.parse_args().only
    tokenizer = read_tokenizer(DEMO, set())
    ids = [tokenizer.encode(p.content) for p in prompts.fixed_prompts() if isinstance(p.content, str)]
    source = open_source(DEMO)
    print(f"{sum(map(len, ids[1::2]))} tokens for the figures, {sum(map(len, ids[::2]))} for calibration\n")
    print("| what | rounding | perplexity | KL from source, nats | same choice | drafts accepted | size |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "calibration"
        calibration.write(file, source.inventory, collect(DEMO, ids[::2]), sum(map(len, ids[::2])))
        known = calibration.read(file, source.inventory)
        for n, case in enumerate(cases()):
            if only in case.name:
                out = Path(folder) / str(n)
                print(line(case, *measured(case, out, source, known, ids[1::2])), flush=True)


if __name__ == "__main__":
    main()
