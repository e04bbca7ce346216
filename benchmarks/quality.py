"""What roundings and choices of formats cost the demo checkpoint, on 40 held-out chapters: KL from the source.

    printf 'gen1:1-rev22:21\nq\n' | bible -f > bible.txt
    python benchmarks/quality.py bible.txt --keep FOLDER [--only WORD ...] [--base CHECKOUT] [--table]

The text is that of the demo's trainer (tools/train_demo): 40 chapters that it was not trained on, 512 predicted tokens
each. Roundings that need a text get 16,384 tokens of the other chapters. `--only` takes words of a case's name,
`--base` is a checkout of an earlier version, whose `quantize --fit` is measured as well. Results stay in FOLDER and are
taken from there by the next call: a run that was stopped goes on. `--table` prints what is there, and runs nothing.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from held_out import CHAPTERS, Figure, Logits, Measured, Texts, backbone_bytes, mean, measured, ratio

from ds4convert.api.calibrating import calibrate
from ds4convert.checkpoint.inventory import Module
from ds4convert.checkpoint.source import Source, open_source
from ds4convert.demo import embedded
from ds4convert.evaluate import calibration
from ds4convert.evaluate.inputs.layer_inputs import LayerInputs
from ds4convert.execution import run
from ds4convert.execution.rounding_steps import Importance, no_importance
from ds4convert.execution.workers import ENOUGH_WEIGHTS, rounding_pool
from ds4convert.fit import format_errors, size_budget
from ds4convert.fit.optimiser import Optimiser
from ds4convert.formats.second_moments import COMPENSATED
from ds4convert.inference import calibration_text
from ds4convert.planning import build
from ds4convert.planning.build import make_plan
from ds4convert.planning.encodings import ENCODERS, Encoding
from ds4convert.planning.layouts import layout_of
from ds4convert.planning.recipes import Recipe, Rule, recipe_of, recipes

DEMO = Path(__file__).resolve().parent.parent / "manifests" / "demo"
ROUNDINGS = ("nearest", "optimal", COMPENSATED)
CALIBRATION_TOKENS, DENSE_TOKENS, EXPERT_TOKENS, SENSITIVITY_TOKENS = 16384, 2048, 192, 4096
DSPARK_CHAPTERS = 10
"""Chapters on which the DSpark head is tried: it drafts a block at every position."""

OTHERS = "Of other programs"
"""The table of folders that other programs made."""

FEWER = 10
"""Chapters where a case is one of many."""

AMPLE = 10**11
"""A size that every format fits into."""


def uniform(bits: int) -> Recipe:
    """Return the recipe that gives every matrix of the backbone so many bits."""
    return recipe_of("native").overridden(f"affine-{bits}-g64", None, None)


class Bench:
    """Source, texts, and what cases share."""

    def __init__(self, texts: Texts, keep: Path, base: Path | None) -> None:
        self.texts, self.keep, self.base = texts, keep, base
        self.source: Source = open_source(DEMO)

    @cached_property
    def known(self) -> calibration.Calibration:
        """Return a calibration with sensitivities, as `ds4convert calibrate --sensitivity` writes it."""
        path = self.keep / "calibration"
        if not path.exists():
            calibrate(
                DEMO, self.texts.other, path, max_tokens=CALIBRATION_TOKENS, sensitivity=True,
                sensitivity_tokens=SENSITIVITY_TOKENS,
            )  # fmt: skip
        return calibration.read(path, self.source.inventory)

    @cached_property
    def dspark(self) -> Path:
        """Return the demo checkpoint with the DSpark head."""
        folder = self.keep / "dspark"
        folder.mkdir(exist_ok=True)
        for name, data in embedded.files(embedded.DSPARK):
            (folder / name).write_bytes(data)
        return folder

    def options(self, recipe: Recipe, rounding: str) -> build.Options:
        """Return options of a conversion; of compensated rounding they lack the text."""
        return build.Options(recipe, layout_of("inline"), rounding=rounding)

    def size(self, recipe: Recipe) -> int:
        """Return the bytes of all matrices that a choice is made for."""
        modules = [m for ms in format_errors.units(self.source.inventory).values() for m in ms]
        return sum(ENCODERS[recipe.format_of(m)](m).size_bytes for m in modules)

    def room(self, folder: Path) -> int:
        """Return the bytes that our matrices may have for a backbone as large as that of a folder."""
        plan = make_plan(self.source, self.options(uniform(4), "optimal"))
        ours = sum(o.size for s in plan.steps if s.part != "mtp" for o in s.outputs)
        return backbone_bytes(folder) - (ours - self.size(uniform(4)))

    def convert(self, recipe: Recipe, rounding: str, out: Path, **text: object) -> None:
        """Convert the demo checkpoint (or that in `folder`) as the command does."""
        folder = text.pop("folder", DEMO)
        assert isinstance(folder, Path)
        source = self.source if folder == DEMO else open_source(folder)
        options, weigh = self.options(recipe, rounding), no_importance
        if rounding == COMPENSATED:
            weigh, rows = self.inputs(folder, out, **text)  # type: ignore[arg-type]
            options = replace(options, text=build.Text(rows.digest, rows.tokens))
        run.run(source, make_plan(source, options), out, run.Way(overwrite=True, importance=weigh))

    def inputs(
        self, folder: Path, out: Path, *, tokens: int = CALIBRATION_TOKENS, text: Path | None = None,
        experts: int = 0, texts: int = 1,
    ) -> tuple[Importance, calibration_text.Rows]:  # fmt: skip
        """Return what finds the inputs of each matrix; with `experts`, those of experts are so many tokens of `texts`.

        Experts of a large model get few rows of its text, this way these do as well.
        """
        places = [text or self.texts.other]
        rows = calibration_text.read(folder, places, tokens)
        found = LayerInputs(folder, rows.ids, out, print)
        if not experts:
            return found, rows
        scarce = calibration_text.read(folder, places, experts, experts // texts)
        few = LayerInputs(folder, scarce.ids, out / ".few", lambda said: None)
        return (lambda key, expert: (few if ".switch_mlp." in key else found)(key, expert)), rows

    @contextmanager
    def errors(self) -> Iterator[format_errors.Errors]:
        """Yield what tells the error of a matrix in a format, as `optimal` rounds a sample of it; findings are kept."""
        path = self.keep / "errors.json"
        known: dict[str, float] = json.loads(path.read_text()) if path.exists() else {}
        options = self.options(recipe_of("native"), "optimal")
        with run.reading(self.source) as read, rounding_pool(ENOUGH_WEIGHTS, cores=1) as pool:
            find = format_errors.measured(self.source.named, options, read, pool)

            def error(module: Module, name: str, encoding: Encoding) -> float:
                key = f"{module.name}, {name}"
                if key not in known:
                    known[key] = find(module, name, encoding)
                return known[key]

            yield error
        path.write_text(json.dumps(known))

    def fitted(self, size: int, known: bool) -> Recipe:
        """Return the recipe that `--fit` chooses so that the matrices take `size` bytes at most."""
        options, none = self.options(recipe_of("native"), "optimal"), size_budget.Room(AMPLE, 8192, 0, 0)
        sensitive = self.known.sensitivities if known else None
        with self.errors() as errors:
            find = partial(size_budget.fit, self.source.inventory, options, errors, known=sensitive)
            facts = find(room=none).facts
            fixed = facts["planned_bytes"] - sum(row["bytes"] for row in facts["table"])
            return find(room=replace(none, target=size + fixed)).recipe

    def earlier_fit(self, size: int, out: Path) -> None:
        """Convert with `quantize --fit` of the earlier version, for matrices of `size` bytes at most."""
        if self.base is None:
            raise SystemExit("cases of an earlier version need --base CHECKOUT")

        def asked(*words: str) -> dict[str, Any]:
            # -P: else the package in the current folder would be imported, whatever PYTHONPATH says.
            command = [sys.executable, "-P", "-m", "ds4convert", *words, "--json"]
            done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(self.base)}, stdout=-1, check=True)
            found: dict[str, Any] = json.loads(done.stdout)
            return found

        ample = asked("plan", str(DEMO), "--fit", f"{AMPLE // 10**9}GB")["fit"]
        planned = sum(ample[key] for key in ("weights_bytes", "cache_bytes", "working_bytes"))
        fixed = planned - sum(row["bytes"] for row in ample["table"])
        asked("quantize", str(DEMO), str(out), "--fit", f"{(size + fixed) / 1e9:.9f}GB")

    def experts_at(self, threes: frozenset[tuple[str, int | None]]) -> Recipe:
        """Return the recipe with experts at 2 bits, some kinds of matrix in some layers at 3, all else at 6."""
        base = uniform(6).overridden(None, "affine-2-g64", None)
        rules = [Rule(frozenset({kind}), frozenset({layer}), "affine-3-g64") for kind, layer in sorted(threes)]
        return replace(base, rules=tuple(rules))

    def best_experts(self, share: float) -> Recipe:
        """Return the recipe of experts at 2 and 3 bits, `share` of them at 3, chosen by sensitivities."""
        with self.errors() as errors:
            units = format_errors.options(self.source.inventory, errors, self.known.sensitivities)
        wanted = {
            unit: [o for o in options if o.format in ("affine-2-g64", "affine-3-g64")]
            for unit, options in units.items()
            if unit[0].startswith("experts.")
        }
        least, most = (sum(pick(o.size for o in options) for options in wanted.values()) for pick in (min, max))
        choice = Optimiser(wanted).choose(round(least + share * (most - least)))
        return self.experts_at(frozenset(u for u, o in choice.options.items() if o.format == "affine-3-g64"))


@dataclass(frozen=True)
class Case:
    """One conversion: its name, the case that its KL is compared with, the gate of that ratio, how it is made.

    `heads`: the head's drafts are counted; `group` is the table that it stands in.
    """

    name: str
    to: str
    gate: float | None
    make: Callable[[Bench, Path], object]
    heads: bool = False
    chapters: int = CHAPTERS
    group: str = "Roundings and recipes"


def _plain(recipe: Recipe, rounding: str, **text: object) -> Callable[[Bench, Path], None]:
    return lambda bench, out: bench.convert(recipe, rounding, out, **text)


UNIFORM = {f"{bits} bits": uniform(bits) for bits in (2, 3, 4)}
RECIPES = {name: recipe_of(name) for name in ("q2", "q3", "q4")}
GATES = {"2 bits": 0.67, "3 bits": 0.70, "4 bits": 0.70, "q2": 0.60, "q3": 0.70}
NEAREST_GATES = {"2 bits": 0.39, "3 bits": 0.48, "4 bits": 0.51}
STARVED_GATES = {"q2": 0.85, "q3": 0.90}
SIZES = {"2 bits": 2, "3 bits": 3, "q2": 0, "4 bits": 4, "q3": 0}


def cases() -> Iterator[Case]:
    """Yield every case, those that others are compared with first."""
    yield Case("native", "", None, _plain(recipe_of("native"), "optimal"), True)
    for name, recipe in (UNIFORM | RECIPES).items():
        for rounding in ("optimal", "nearest", COMPENSATED):
            to = "" if rounding == "optimal" else f"{name}, optimal"
            gate = GATES.get(name) if rounding == COMPENSATED else None
            yield Case(f"{name}, {rounding}", to, gate, _plain(recipe, rounding), True)
    for name in ("q8", "q6"):
        yield Case(f"{name}, optimal", "", None, _plain(recipe_of(name), "optimal"), True)
    for name, gate in STARVED_GATES.items():
        for texts in (8, 1):
            make = _plain(RECIPES[name], COMPENSATED, tokens=DENSE_TOKENS, experts=EXPERT_TOKENS, texts=texts)
            title = f"{name}, starved experts of {texts} text{'s' * (texts > 1)}, {COMPENSATED}"
            yield Case(title, f"{name}, optimal", gate, make)
    groups = {
        "Fitted to the bytes of other folders": _fit_cases(),
        "Bits of experts alone": _expert_cases(),
        "Heads": _head_cases(),
    }
    for group, found in groups.items():
        yield from (replace(case, group=group) for case in found)


def _fit_cases() -> Iterator[Case]:
    for name in SIZES:
        recipe = (UNIFORM | RECIPES)[name]
        size = partial(Bench.size, recipe=recipe)
        earlier = f"fit to {name}, version 6ff3422"
        yield Case(earlier, f"{name}, optimal", None, lambda b, out, size=size: b.earlier_fit(size(b), out))
        for known in (False, True):
            what = "with sensitivities" if known else "without"
            yield Case(
                f"fit to {name}, {what}", earlier, 0.75 if known else None,
                lambda b, out, size=size, known=known: b.convert(b.fitted(size(b), known), "optimal", out),
            )  # fmt: skip
    for name in ("2 bits", "3 bits"):
        size = partial(Bench.size, recipe=UNIFORM[name])
        yield Case(
            f"fit to {name}, with sensitivities, {COMPENSATED}", f"{name}, optimal", 0.45,
            lambda b, out, size=size: b.convert(b.fitted(size(b), True), COMPENSATED, out),
        )  # fmt: skip
    yield Case(
        f"2 bits, of licences, {COMPENSATED}", "2 bits, optimal", 0.95,
        lambda b, out: b.convert(UNIFORM["2 bits"], COMPENSATED, out, text=b.texts.licences),
    )  # fmt: skip


def _expert_cases() -> Iterator[Case]:
    layers, kinds = range(4), ("experts.w1", "experts.w2", "experts.w3")
    for share, count in ((0.25, 1), (0.5, 2), (0.75, 3)):
        for chosen in combinations(layers, count):
            threes = frozenset((kind, layer) for kind in kinds for layer in chosen)
            yield Case(
                f"experts {2 + share} bits, layers {'+'.join(map(str, chosen))}", "", None,
                lambda b, out, threes=threes: b.convert(b.experts_at(threes), "optimal", out), chapters=FEWER,
            )  # fmt: skip
        yield Case(
            f"experts {2 + share} bits, with sensitivities", f"experts {2 + share} bits, layers *", 0.65,
            lambda b, out, share=share: b.convert(b.best_experts(share), "optimal", out),
        )  # fmt: skip


def _head_cases() -> Iterator[Case]:
    for name, recipe in UNIFORM.items():
        for rounding in ROUNDINGS:
            yield Case(
                f"dspark, {name}, {rounding}", "", None,
                lambda b, out, r=recipe, how=rounding: b.convert(r, how, out, folder=b.dspark), True, DSPARK_CHAPTERS,
            )  # fmt: skip
    for bits in (2, 3, 4):
        recipe = recipe_of("native").overridden(None, None, f"affine-{bits}-g64")
        for rounding in ROUNDINGS:
            yield Case(f"head {bits} bits, {rounding}", "", None, _plain(recipe, rounding), True, FEWER)


class Results:
    """Results by the name of their case, kept in a file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        told = json.loads(path.read_text()) if path.exists() else {}
        self.found = {name: Measured(**fields) for name, fields in told.items()}

    def add(self, name: str, result: Measured) -> None:
        """Add one, and keep all."""
        self.found[name] = result
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps({n: m.as_json() for n, m in self.found.items()}))
        part.replace(self.path)


def tried(bench: Bench, case: Case, source: Logits) -> Measured:
    """Convert and measure."""
    out = bench.keep / "out"
    shutil.rmtree(out, ignore_errors=True)
    began, children = time.process_time(), os.times().children_user
    case.make(bench, out)
    spent = time.process_time() - began + os.times().children_user - children
    rows = bench.texts.rows[: case.chapters]
    found = measured(out, rows, source[: len(rows)], case.heads)
    found.seconds = (spent, found.seconds[1])
    shutil.rmtree(out)
    return found


def compared(case: Case, found: Mapping[str, Measured]) -> Figure | None:
    """Return the ratio of a case's KL to that of the case it is compared with; of several, to their mean."""
    names = [n for n in found if n == case.to or (case.to.endswith("*") and n.startswith(case.to[:-1]))]
    if not case.to or not names:
        return None
    columns = [sum(c) / len(c) for c in zip(*(found[n].kl for n in names), strict=True)]
    chapters = min(len(columns), len(found[case.name].kl))
    return ratio(found[case.name].kl[:chapters], columns[:chapters])


TITLES = {"2 bits": "backbone affine-2-g64", "3 bits": "backbone affine-3-g64", "4 bits": "backbone affine-4-g64"}


def line(case: Case, found: Mapping[str, Measured]) -> str:
    """Return a row of the table."""
    r, of = found[case.name], found["native"]
    to, met = compared(case, found), ""
    if to is not None and case.gate is not None:
        met = f"{case.gate}, {'met' if to.mean <= case.gate else 'not met'}"
    what, _, rounding = case.name.rpartition(", ")
    if rounding not in ROUNDINGS:
        what, rounding = case.name, "its own" if case.group == OTHERS else "optimal"
    what = f"recipe {what}" if what in recipes() and what != "native" else TITLES.get(what, what)
    kl, worse = mean(r.kl), mean([a - b for a, b in zip(r.nll, of.nll, strict=False)])
    drafts = f"{sum(r.accepted) / sum(r.drafts):.1%}" if r.drafts else ""
    shown = f"{kl.mean:.3g}" if kl.mean > 1e-9 else "0"
    return (
        f"| {what} | {rounding} | {math.exp(mean(r.nll).mean):.3f} | {shown} | {mean(r.same).mean:.1%} | {drafts} | "
        f"{r.size / 1e6:.3f} MB | {kl.error:.2g} | x {math.exp(worse.mean):.4f} | "
        f"{f'{to.said(3)} of {case.to}' if to else ''} | {met} |"
    )


HEADER = (
    "| what | rounding | perplexity | KL from source, nats | same choice | drafts accepted | size | KL +- | perplexity "
    "to source | KL to another | gate |\n| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"
)


def main() -> None:
    """Run what is asked for, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("--keep", type=Path, required=True)
    parser.add_argument("--only", nargs="*", default=[], help="Cases whose name holds one of these.")
    parser.add_argument("--base", type=Path)
    parser.add_argument("--table", action="store_true")
    parser.add_argument(
        "--peer", nargs=3, action="append", default=[], metavar=("NAME", "FOLDER", "CASE"),
        help="A folder that another program made of the demo (layout mlx-lm), and the case to compare it with.",
    )  # fmt: skip
    args = parser.parse_args()
    args.keep.mkdir(parents=True, exist_ok=True)
    results = Results(args.keep / "results.json")
    chosen = [case for words in args.peer for case in _peer(*words)] or [
        c for c in cases() if not args.only or any(word in c.name for word in args.only)
    ]
    if not args.table:
        bench, logits = Bench(Texts.of(args.text, DEMO, args.keep), args.keep, args.base), None
        for case in chosen:
            if case.name in results.found or ("6ff3422" in case.name and args.base is None):
                continue
            if logits is None:
                logits = _source(bench, results)
            results.add(case.name, tried(bench, case, logits))
            print(line(case, results.found), flush=True)
    for group in dict.fromkeys(c.group for c in chosen):
        print(f"\n{group}\n\n{HEADER}")
        for case in chosen:
            if case.name in results.found and case.group == group:
                print(line(case, results.found))


def _peer(name: str, folder: str, to: str) -> Iterator[Case]:
    """Yield the case of a folder that another program made, and ours with a backbone of as many bytes."""
    group = OTHERS
    yield Case(name, to, None, lambda bench, out: shutil.copytree(folder, out), group=group)
    for rounding in ("optimal", COMPENSATED):
        yield Case(
            f"fit to {name}, with sensitivities, {rounding}", name, None,
            lambda b, out, how=rounding: b.convert(b.fitted(b.room(Path(folder)), True), how, out), group=group,
        )  # fmt: skip


def _source(bench: Bench, results: Results) -> Logits:
    """Return the log-probabilities of the source."""
    from held_out import passed

    kept = bench.keep / "source.npy"
    if not kept.exists() or "native" not in results.found:
        results.add("native", measured(DEMO, bench.texts.rows, None, True))
        np.save(kept, np.stack(passed(DEMO, bench.texts.rows, False)[0]))
    return list(np.load(kept, mmap_mode="r"))


if __name__ == "__main__":
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    if os.environ["OPENBLAS_NUM_THREADS"] == "1" and "DS4_ONE_THREAD" not in os.environ:
        os.environ["DS4_ONE_THREAD"] = "1"  # numpy reads it when it is imported
        os.execv(sys.executable, [sys.executable, *sys.argv])
    main()
