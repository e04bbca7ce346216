"""What MTP decoding costs and gains: pass times, head step, rollback, the loop's own overhead, tokens/s.

    python benchmarks/mtp_speed.py [--experts 16] [--tokens 64] [--runs 3] [--only demo|dspark|real]

Three checkpoints: the trained demo (real acceptance), the same backbone with its DSpark head, and two layers of Flash's
real size with random weights (its acceptance means nothing, so an oracle takes the place of the head's choice: the head
computes all the same, and its draft is made right with a given probability). Converted and loaded by this package in a
temporary folder; with --experts 256 that needs 26 GB of disk, with 16 about 4 GB.

Of the DSpark head the cost model is `gain = E(K) x P(1) / (P(K+1) + C)`: C is what a block costs (context keys, the
pass of the whole block, all its drafts), E(K) = 1 + the shares of passes whose first i drafts were all accepted, summed
over i = 1..K.

Steps are timed interleaved and the fastest is kept: on a shared machine others can only slow a step down. Whole runs
alternate; their median is kept. On a CPU that is busy with other work, --clock cpu counts this process's own time.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx

from ds4convert.checkpoint.config import named_config
from ds4convert.checkpoint.source import open_source
from ds4convert.demo import embedded, synth
from ds4convert.demo.demo import PROMPT
from ds4convert.execution import run as convert
from ds4convert.generation.open_folder import read_tokenizer
from ds4convert.inference.decode import DecodeStats, mtp_generate_step, plain_generate_step
from ds4convert.inference.load import load_model
from ds4convert.planning import build
from ds4convert.planning.build import make_plan
from ds4convert.planning.layouts import layout_of
from ds4convert.planning.recipes import recipe_of

DEMO = Path(__file__).resolve().parent.parent / "manifests" / "demo"
clock: Callable[[], float] = time.perf_counter

FORMULA = "gain = (1 + a + ... + a^K) x P(1) / (P(K+1) + H(K)), K drafts per pass, acceptance a"
RULE = (
    f"{FORMULA}\nP(n): backbone pass of n tokens; H(K): the head's K steps of a round, the first also takes in "
    "the pairs of the drafts accepted before"
)


class Oracle:
    """The model, whose head computes as ever and then drafts the right token with probability `share`."""

    def __init__(self, inner: Any, line: list[int], share: float) -> None:
        self.inner, self.line, self.share = inner, mx.array(line), share
        mx.random.seed(0)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def mtp_forward(self, hidden: Any, next_tokens: Any, mtp_cache: Any, return_hidden: bool = False) -> Any:
        """Return logits with the right token on top, with the probability `share`, else a wrong one."""
        logits, own = self.inner.mtp_forward(hidden, next_tokens, mtp_cache, return_hidden=True)
        right = self.line[mtp_cache[0].offset + 1]
        chosen = mx.where(mx.random.uniform() < self.share, right, (right + 1) % logits.shape[-1])
        logits = mx.where(mx.arange(logits.shape[-1]) == chosen, 1e4, logits)
        return (logits, own) if return_hidden else logits


def ids_of(config: dict[str, Any], count: int) -> list[int]:
    """Return a prompt: ids spread over the vocabulary."""
    return [(7919 * n + 13) % config["vocab_size"] for n in range(count)]


def converted(source: Path, out: Path) -> None:
    """Convert a checkpoint at its own precision."""
    opened = open_source(source)
    made = make_plan(opened, build.Options(recipe_of("native"), layout_of("inline"), hashing=False))
    convert.run(opened, made, out)


def fastest(steps: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """Return the least seconds of each step; all are done once per round, in turn, after one round of warm-up."""
    best = dict.fromkeys(steps, float("inf"))
    for turn in range(rounds + 1):
        for name, step in steps.items():
            start = clock()
            step()
            if turn:
                best[name] = min(best[name], clock() - start)
    return best


def step_costs(model: Any, config: dict[str, Any], depths: list[int], rounds: int, context: int) -> dict[str, float]:
    """Return seconds of backbone passes of 1 and K+1 tokens, of one head step, and of taking back K tokens."""
    ids = ids_of(config, context)
    caches, head = model.make_cache(), model.make_mtp_cache()
    hidden = model(mx.array([ids]), cache=caches, return_hidden=True)[1]
    model.mtp_forward(hidden[:, :-1], mx.array([ids[1:]]), head)
    last = hidden[:, -1:]
    mx.eval(last, [c.state for c in caches + head])

    def passed(count: int) -> None:
        mx.eval(model(mx.array([ids[:count]]), cache=caches, return_hidden=True))
        for cache in caches:
            cache.trim(count)

    def drafted(count: int) -> None:
        pairs = mx.repeat(last, count, axis=1)
        logits = model.mtp_forward(pairs, mx.array([ids[:count]]), head, return_hidden=True)[0]
        mx.eval(mx.argmax(logits[0, -1]))
        head[0].trim(count)

    def rolled_back() -> None:
        for cache in caches + head:
            cache.advance(1)
            cache.trim(1)

    steps: dict[str, Callable[[], None]] = {"P1": lambda: passed(1), "H1": lambda: drafted(1)}
    steps |= {f"P{k + 1}": (lambda k=k: passed(k + 1)) for k in depths}
    steps |= {"H pairs 2": lambda: drafted(2), "rollback": rolled_back}
    return fastest(steps, rounds)


def block_costs(model: Any, config: dict[str, Any], rounds: int, context: int) -> dict[str, float]:
    """Return seconds of backbone passes of 1..B+1 tokens that are tapped, and of a block of which all is drafted."""
    ids, slots = ids_of(config, context), model.args.dspark_block_size
    caches, head = model.make_cache(), model.make_mtp_cache()
    taps = model.tapped_forward(mx.array([ids]), caches)[1]
    model.append_context(taps, head)
    last = taps[:, -1:]
    mx.eval(last, [c.state for c in caches + head])

    def passed(count: int) -> None:
        mx.eval(model.tapped_forward(mx.array([ids[:count]]), caches)[:2])
        for cache in caches:
            cache.trim(count)

    def drafted() -> None:
        model.append_context(last, head)
        block, drafts = model.draft_block(ids[0], head), []
        for slot in range(slots):
            drafts.append(mx.argmax(block.logits(slot, drafts), axis=-1))
        mx.eval(drafts, block.confidence(drafts))
        for cache in head:
            cache.trim(1)

    steps: dict[str, Callable[[], None]] = {f"P{n}": (lambda n=n: passed(n)) for n in range(1, slots + 2)}
    return fastest(steps | {"C": drafted}, rounds)


def block_figures(model: Any, config: dict[str, Any], prompt: list[int], args: argparse.Namespace) -> list[str]:
    """Return the lines of the demo with its DSpark head."""
    slots = model.args.dspark_block_size
    cost = block_costs(model, config, args.rounds, args.context)
    runs = whole_runs({"plain": (model, 0)} | {f"K={k}": (model, k) for k in range(1, slots + 1)}, prompt, args.tokens,
                      args.runs)  # fmt: skip
    passes = ", ".join(f"P({n + 1})/P(1) {cost[f'P{n + 1}'] / cost['P1']:.2f}" for n in range(1, slots + 1))
    lines = [
        f"### Demo with its DSpark head, a block of {slots}",
        "",
        f"- backbone pass of 1 token after {args.context}, ms: {cost['P1'] * 1e3:.2f}; {passes}",
        f"- a block and all its drafts, ms: {cost['C'] * 1e3:.2f}, {cost['C'] / cost['P1']:.2f} of a 1-token pass",
        "",
        "| decoding | tokens/s | against plain | expected | E(K) | accepted up to each position | loop's own share |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    base = statistics.median(runs["plain"]["rates"])
    lines.append(f"| plain | {base:.1f} | 1 | | 1 | | |")
    for k in range(1, slots + 1):
        run = runs[f"K={k}"]
        stats, count = run["stats"], sum(s.passes for s in run["stats"])
        shares = [sum(s.accepted_at[i] for s in stats if i < len(s.accepted_at)) / count for i in range(k)]
        each = 1 + sum(shares)
        own = sum(s.other_seconds for s in stats) / sum(s.decode_seconds for s in stats)
        expected = each * cost["P1"] / (cost[f"P{k + 1}"] + cost["C"])
        rate, note = statistics.median(run["rates"]), "" if run["tokens"] == runs["plain"]["tokens"] else " (differs)"
        lines.append(
            f"| K={k}{note} | {rate:.1f} | {rate / base:.2f}x | {expected:.2f}x | "
            f"{each:.2f} | {' '.join(f'{share:.0%}' for share in shares)} | {own:.1%} |"
        )
    return [*lines, ""]


def decoded(model: Any, prompt: list[int], count: int, depth: int) -> tuple[list[int], DecodeStats, float]:
    """Return tokens, statistics and tokens/s (prompt not counted) of one greedy run; depth 0 is plain."""
    stats = DecodeStats()
    options: dict[str, Any] = {"max_tokens": count, "stats": stats}
    if depth:
        steps = mtp_generate_step(mx.array(prompt), model, draft_depth=depth, **options)
    else:
        steps = plain_generate_step(mx.array(prompt), model, **options)
    tokens, first = [], 0.0
    for token, _, _ in steps:
        first = first or clock()
        tokens.append(token)
    return tokens, stats, (count - 1) / (clock() - first)


def whole_runs(models: dict[str, tuple[Any, int]], prompt: list[int], count: int, runs: int) -> dict[str, Any]:
    """Return per name the median tokens/s, and statistics summed over the runs; runs alternate, after a warm-up."""
    out: dict[str, Any] = {name: {"rates": [], "stats": []} for name in models}
    for turn in range(runs + 1):
        order = list(models.items())
        for name, (model, depth) in order if turn % 2 else order[::-1]:
            tokens, stats, rate = decoded(model, prompt, count if turn else 8, depth)
            if turn:
                out[name]["rates"].append(rate)
                out[name]["stats"].append(stats)
                out[name]["tokens"] = tokens
    return out


def growth(model: Any, prompt: list[int], count: int) -> str:
    """Return how often the caches grew over `count` tokens, and how much slower the last tokens are than the first."""
    cache = model.make_cache() + model.make_mtp_cache()
    sizes, stamps = [], []
    for _ in mtp_generate_step(mx.array(prompt), model, draft_depth=1, max_tokens=count, prompt_cache=cache):
        sizes.append(sum(c.nbytes for c in cache))
        stamps.append(time.process_time())
    grown = sum(b > a for a, b in itertools.pairwise(sizes))
    quarter = count // 4
    early, late = stamps[2 * quarter] - stamps[quarter], stamps[-1] - stamps[-1 - quarter]
    return (
        f"caches grew {grown} times over {count} tokens; last quarter takes {late / early:.2f} of the second's CPU time"
    )


def figures(title: str, model: Any, config: dict[str, Any], prompt: list[int], args: argparse.Namespace) -> list[str]:
    """Return the lines of one checkpoint."""
    depths = args.depths
    cost = step_costs(model, config, depths, args.rounds, args.context)
    plain = decoded(model, prompt, args.tokens, 0)[0]
    line = prompt + plain + [0] * 16
    models: dict[str, tuple[Any, int]] = {"plain": (model, 0)} | {f"own head, K={k}": (model, k) for k in depths}
    for share in (0.0, 0.8, 1.0):
        models[f"oracle {share:.0%}, K=1"] = (Oracle(model, line, share), 1)
    runs = whole_runs(models, prompt, args.tokens, args.runs)
    ms = {name: seconds * 1e3 for name, seconds in cost.items()}
    passes = ", ".join(f"{k + 1} tokens {ms[f'P{k + 1}']:.2f} ({ms[f'P{k + 1}'] / ms['P1']:.2f}x)" for k in depths)
    lines = [
        f"### {title}",
        "",
        f"- backbone pass after {args.context} tokens, ms: 1 token {ms['P1']:.2f}, {passes}",
        f"- head step, ms: 1 pair {ms['H1']:.2f} ({ms['H1'] / ms['P1']:.2f} of a 1-token pass), 2 pairs (after an "
        f"accepted draft) {ms['H pairs 2']:.2f}",
        f"- rollback of all caches by one token: {ms['rollback'] * 1e3:.1f} us ({ms['rollback'] / ms['P1']:.3%} of a "
        "1-token pass)",
        f"- break-even acceptance at K=1: (P(2) + H) / P(1) - 1 = {(ms['P2'] + ms['H1']) / ms['P1'] - 1:.0%}",
        f"- {growth(model, prompt, args.tokens)}",
        "",
        "| decoding | tokens/s | against plain | expected | acceptance | tokens per pass | loop's own share |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    base = statistics.median(runs["plain"]["rates"])
    for name, (_, depth) in models.items():
        lines.append(_row(name, depth, runs[name], runs["plain"]["tokens"], base, ms))
    return [*lines, ""]


def _row(name: str, depth: int, run: dict[str, Any], plain: list[int], base: float, ms: dict[str, float]) -> str:
    rate = statistics.median(run["rates"])
    if not depth:
        return f"| {name} | {rate:.1f} | 1 | | | 1 | |"
    drafted, accepted, passes = (sum(getattr(s, k) for s in run["stats"]) for k in ("drafted", "accepted", "passes"))
    own = sum(s.other_seconds for s in run["stats"]) / sum(s.decode_seconds for s in run["stats"])
    per_pass = 1 + accepted / passes
    head = depth * ms["H1"] + (per_pass - 1) * (ms["H pairs 2"] - ms["H1"])
    expected = per_pass * ms["P1"] / (ms[f"P{depth + 1}"] + head)
    note = "" if run["tokens"] == plain else " (tokens differ from plain)"
    return (
        f"| {name}{note} | {rate:.1f} | {rate / base:.2f}x | {expected:.2f}x | {accepted / drafted:.0%} | "
        f"{per_pass:.2f} | {own:.1%} |"
    )


def real_size(folder: Path, experts: int) -> None:
    """Write two layers of Flash's size, converted, to `real` in a folder."""
    raw = named_config("flash")
    assert raw is not None
    shrunk = synth.shrink(json.loads(raw), 2, experts)
    synth.write(shrunk, folder / "source")
    converted(folder / "source", folder / "real")
    for path in (folder / "source").iterdir():
        path.unlink()


def main() -> None:
    """Print the tables."""
    global clock
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, default=16, help="routed experts of the real-size layers (Flash: 256)")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--context", type=int, default=256, help="tokens before the timed steps")
    parser.add_argument("--rounds", type=int, default=40, help="rounds of timed steps")
    parser.add_argument("--runs", type=int, default=3, help="whole runs of each kind")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="float32")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--depths", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--only", choices=["demo", "dspark", "real"])
    args = parser.parse_args()
    clock = time.process_time if args.clock == "cpu" else time.perf_counter
    machine = f"{platform.machine()}, {os.cpu_count()} cores, {mx.default_device()}, mlx {mx.__version__}"
    print(f"{machine}, {args.dtype}, {args.clock} time")
    print(f"\n{RULE}\n")
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        if args.only in (None, "dspark"):
            (folder / "dspark-source").mkdir()
            for name, data in embedded.files(embedded.DSPARK):
                (folder / "dspark-source" / name).write_bytes(data)
            converted(folder / "dspark-source", folder / "dspark")
            model, config = load_model(folder / "dspark", dtype=args.dtype)
            prompt = read_tokenizer(folder / "dspark", set()).encode(PROMPT)
            print("\n".join(block_figures(model, config, prompt, args)), flush=True)
        if args.only in (None, "demo"):
            converted(DEMO, folder / "demo")
            model, config = load_model(folder / "demo", dtype=args.dtype)
            prompt = read_tokenizer(folder / "demo", set()).encode(PROMPT)
            print("\n".join(figures("Demo checkpoint", model, config, prompt, args)), flush=True)
        if args.only in (None, "real"):
            real_size(folder, args.experts)
            model, config = load_model(folder / "real", dtype=args.dtype)
            title = f"Two layers of Flash's size, {args.experts} experts, random weights"
            print("\n".join(figures(title, model, config, ids_of(config, 8), args)), flush=True)


if __name__ == "__main__":
    main()
