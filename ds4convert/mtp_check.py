"""`verify` beyond the files: numerics, decoding with and without the head, and the verdict.

The edge that joins the conversion's checks (`verify`) with measurements of the loaded model (`inference`). Owns the
thresholds and every sentence about them; measures nothing itself.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ds4convert import logical, manifest, prompts, verify
from ds4convert.errors import Ds4Error, InputError, UsageError
from ds4convert.inspection import group_of
from ds4convert.types import JSON
from ds4convert.verify import Check

if TYPE_CHECKING:
    from ds4convert.inference.deepseek_v4 import Model
    from ds4convert.inference.evaluate import Compute, Prompt, Runs
    from ds4convert.inference.forced import Forced, Invariance, Passed
    from ds4convert.inference.wiring import Wiring

USELESS = 0.10
"""Acceptance below which a head is useless (published: 59 % before, 4 % after over-quantization), or below CHANCE."""

WEAK = 0.40
"""Acceptance below which a working head is called weak (published heads at one draft: 59 to 82 %)."""

CHANCE = 1.5
"""A head has to be this many times better than one that always proposes the commonest token."""

FORCED_USELESS = 0.05
"""Agreement with the backbone on the prompts' own tokens below which a head is useless (chance as above)."""

TIE = {"float32": 1e-3, "bfloat16": 0.5}
"""Top-2 margin up to which a divergence of greedy tokens counts as a near tie, in nats."""

CHUNK_LIMIT = 2e-3
"""Largest difference of logits between decoding and prefill in float32 (golden checkpoints: below 5e-5)."""

CHUNK_KL = 5e-3
"""The same in bfloat16, as median KL in nats (golden checkpoints: below 1e-3)."""

CHUNK_TOKENS = 140
"""Tokens of the chunk test: across the windows of ratio 4 and 128."""

BROKEN = 0.25
"""A backbone whose perplexity on its best text is above this part of the vocabulary is broken."""

LEVELS = ("structure", "source", "numerics", "decode")
FIGURES = (
    "acceptance", "drafted", "accepted", "tokens_per_pass", "plain_tokens_per_second", "mtp_tokens_per_second",
    "speedup", "greedy_equal", "first_divergence",
)  # fmt: skip

Say = Callable[[str], None]


@dataclass(frozen=True)
class Request:
    """What `verify` was asked for; `level` is one of LEVELS."""

    folder: Path
    level: str
    mtp: bool = False
    source: Path | None = None
    reference: Path | None = None
    prompts: Path | None = None
    max_tokens: int = 64
    depth: int = 1
    atol: float = 2e-4
    rtol: float = 0.0
    dtype: str | None = None
    wants_report: bool = False
    jobs: int = 2


@dataclass
class Outcome:
    """Checks in order, and the facts beside them under the keys of the command line contract."""

    checks: list[Check] = field(default_factory=list)
    facts: JSON = field(default_factory=dict)

    def add(self, name: str, problems: list[str], good: str) -> None:
        """Add a check that is good where there are no problems."""
        self.checks.append(Check(name, not problems, "; ".join(problems) or good))

    def as_json(self) -> JSON:
        """Return everything, `ok` and `checks` first."""
        return {**verify.as_json(self.checks), **self.facts}


def level_of(level: str | None, mtp: bool, source: bool) -> str:
    """Return the level to check at; raises `UsageError` where the options contradict each other."""
    if level == "source" and not source:
        raise UsageError("--level source needs --source SRC")
    if level == "structure" and source:
        raise UsageError("--level structure does not look at a source; leave out --source")
    if mtp and level not in (None, "decode"):
        raise UsageError(f"--mtp decodes; --level {level} does not. Leave out one of them")
    return level or ("decode" if mtp else "source" if source else "structure")


def needs_model(request: Request) -> bool:
    """Return whether a request goes beyond the files."""
    return request.level in ("numerics", "decode") or request.reference is not None or request.wants_report


def run(request: Request, say: Say = lambda text: None, progress: verify.Progress = lambda n: None) -> Outcome:
    """Carry out a request: files first, then (where asked) source, reference, numerics and decoding.

    Raises `InputError` where the folder cannot be loaded, before any decode, and `UsageError` on prompts that do not
    fit.
    """
    out = Outcome()
    given = prompts.read_prompts(request.prompts) if request.prompts else None
    out.checks = verify.structure(request.folder, request.jobs, progress)
    if not all(c.ok for c in out.checks):
        _name_altered(request, out)
    if request.source is not None:
        out.checks += verify.against_source(request.folder, request.source, request.jobs, progress)
    if request.wants_report:
        out.facts["groups"] = groups(request.folder)
    if needs_model(request):
        _with_model(request, given, out, say)
    return out


# --- files ---------------------------------------------------------------------------------------------------------


def groups(folder: Path) -> list[JSON]:
    """Return per group of tensors, the head's behind the backbone's: name, bytes, tensors, formats."""
    record = manifest.read(folder)
    out: dict[str, JSON] = {}
    for r in record["tensors"] if record else []:
        name = group_of(str(r.get("part", "")), str(r.get("role", "unknown")))
        g = out.setdefault(name, {"name": name, "tensors": 0, "bytes": 0, "formats": []})
        g["tensors"] += 1
        g["bytes"] += r["bytes"]
        if r["format"] not in g["formats"]:
            g["formats"].append(r["format"])
    return sorted(out.values(), key=lambda g: g["name"].startswith("mtp."))


def head_formats(folder: Path) -> JSON:
    """Return the bytes of the head per stored format, most bytes first, from the manifest."""
    record = manifest.read(folder)
    out: dict[str, int] = {}
    for r in record["tensors"] if record else []:
        if r.get("part") == "mtp":
            out[r["format"]] = out.get(r["format"], 0) + r["bytes"]
    return dict(sorted(out.items(), key=lambda x: -x[1]))


def _name_altered(request: Request, out: Outcome) -> None:
    """Where a file's digest is wrong, say which tensors in it are not as the manifest records them."""
    record = manifest.read(request.folder)
    wrong = next((c.detail for c in out.checks if c.name == "digests" and not c.ok), "")
    if record is None or not wrong:
        return
    names = altered_tensors(request.folder, record)
    if names:
        shown, more = ", ".join(names[:10]), f" and {len(names) - 10} more" if len(names) > 10 else ""
        out.add("tensor digests", [f"altered since the conversion: {shown}{more}"], "")


def altered_tensors(folder: Path, record: JSON) -> list[str]:
    """Return the names of tensors whose bytes differ from their digest in the manifest (xxh3-128, where hashed)."""
    import xxhash

    out = []
    for r in record["tensors"]:
        digest = r.get("xxh3_128")
        if not isinstance(digest, str):
            continue
        try:
            with verify.resolve_inside(folder, r["file"]).open("rb") as f:
                f.seek(r["offset"])
                state, left = xxhash.xxh3_128(), r["bytes"]
                while left and (data := f.read(min(left, verify.HASH_CHUNK))):
                    state.update(data)
                    left -= len(data)
        except (OSError, Ds4Error):
            continue  # named by the check of files
        if state.hexdigest() != digest:
            out.append(str(r["name"]))
    return out


# --- the model -----------------------------------------------------------------------------------------------------


def _with_model(request: Request, given: list[prompts.RawPrompt] | None, out: Outcome, say: Say) -> None:
    from ds4convert.inference import evaluate, load

    args = load.read_args(load.read_config(request.folder), str(request.folder))
    chosen = _prompts(request, given, args.vocab_size, args.max_position_embeddings, say)
    context = max(len(p.ids) for p in chosen) + request.max_tokens
    dtype = "float32" if request.reference else request.dtype
    compute = evaluate.choose_compute(request.folder, context, dtype)
    _warn_of_memory(compute, say)
    reference = _read_reference(request, args.max_position_embeddings)
    try:
        model, _ = load.load_model(request.folder, dtype=compute.dtype, dense=compute.dense)
    except InputError as e:
        problems = _head_problems(request.folder)
        if not problems or not request.mtp:
            raise
        _unfit_head(request, problems, out)
        say(str(e))
        return
    out.facts["compute"] = {"dtype": compute.dtype, "dense": compute.dense, "needed_bytes": compute.needed_bytes}
    if reference:
        _compare_reference(request, model, reference, out)
    if request.level in ("numerics", "decode") or request.wants_report:
        _measure(request, model, chosen, compute, out, say)


def _warn_of_memory(compute: Compute, say: Say) -> None:
    if not compute.fits:
        free = (compute.free_bytes or 0) / 1e9
        say(
            f"Warning: this needs about {compute.needed_bytes / 1e9:.1f} GB of memory and {free:.1f} GB are free. "
            "With --layerwise, verify never holds more than one layer."
        )


def _read_reference(request: Request, positions: int) -> Any:
    from ds4convert.inference import reference as references

    if request.reference is None:
        return None
    found = references.read_reference(request.reference)
    if (longest := references.longest_prompt(found)) > positions:
        raise UsageError(
            f"--reference {request.reference}: its longest prompt takes {longest} positions; "
            f"the model has {positions} (max_position_embeddings)"
        )
    return found


def _prompts(
    request: Request, given: list[prompts.RawPrompt] | None, vocab: int, positions: int, say: Say
) -> list[Prompt]:
    """Return the prompts as token ids; raises `UsageError` on one that does not fit the model."""
    from ds4convert.inference import evaluate

    if request.max_tokens >= positions:
        raise UsageError(f"--max-tokens {request.max_tokens}: the model has {positions} positions in all")
    encode = evaluate.encoder(request.folder)
    raw = given or prompts.fixed_prompts()
    if encode is None and given is None:
        say("No tokenizer.json in the folder: decoding prompts of token ids made from the vocabulary's size.")
        room = positions - request.max_tokens
        return [dataclasses.replace(p, ids=p.ids[:room]) for p in evaluate.id_prompts(vocab)]
    out = []
    for p in raw:
        if isinstance(p.content, str) and encode is None:
            raise UsageError(
                f"--prompts: {p.name} is a text, but {request.folder} has no tokenizer.json; give lists of token ids"
            )
        ids = tuple(encode(p.content)) if isinstance(p.content, str) and encode else tuple(map(int, p.content))
        _check_ids(p.name, ids, vocab, positions, request.max_tokens)
        out.append(evaluate.Prompt(p.name, ids, isinstance(p.content, str)))
    return out


def _check_ids(name: str, ids: tuple[int, ...], vocab: int, positions: int, max_tokens: int) -> None:
    if not ids:
        raise UsageError(f"--prompts: {name} is empty: at least one token is needed")
    if max(ids) >= vocab or min(ids) < 0:
        raise UsageError(f"--prompts: {name}: token id {max(ids)} is beyond the vocabulary of {vocab}")
    if len(ids) + max_tokens > positions:
        raise UsageError(
            f"--prompts: {name}: {len(ids)} tokens and --max-tokens {max_tokens} are more than the model's "
            f"{positions} positions (max_position_embeddings)"
        )


def _compare_reference(request: Request, model: Model, reference: Any, out: Outcome) -> None:
    from ds4convert.inference import reference as references

    compared = references.compare(model, reference, request.atol, request.rtol)
    out.facts["reference"] = [dataclasses.asdict(c) for c in compared]
    wrong = [
        f"{c.key}: {c.detail}" + (f", by up to {c.max_abs_diff:.3g}" if c.max_abs_diff is not None else "")
        for c in compared
        if not c.ok
    ]
    shown = wrong[:5] + ([f"and {len(wrong) - 5} more"] if len(wrong) > 5 else [])
    largest = max((c.max_abs_diff or 0.0 for c in compared), default=0.0)
    out.add("reference", shown, f"{len(compared)} keys within tolerance in float32, largest difference {largest:.2g}")


# --- measurements ----------------------------------------------------------------------------------------------------


@dataclass
class _Measured:
    """What the checks and the verdict look at."""

    forced: Forced
    invariance: Invariance
    wiring: Wiring | None = None
    runs: Runs | None = None


def _measure(request: Request, model: Model, chosen: list[Prompt], compute: Compute, out: Outcome, say: Say) -> None:
    from ds4convert.inference import evaluate, forced, wiring

    passes = forced.backbone_passes(model, chosen)
    longest = max(chosen, key=lambda p: len(p.ids)).ids
    line = (longest * (CHUNK_TOKENS // len(longest) + 1))[: min(CHUNK_TOKENS, model.args.max_position_embeddings)]
    found = _Measured(forced.teacher_forced(model, passes), forced.chunk_invariance(model, line))
    numerics = _numerics_problems(found, compute.dtype, model.args.vocab_size)
    out.add("numerics", numerics, _numerics_good(found, compute))
    out.facts["numerics"] = dataclasses.asdict(found.invariance) | {"perplexity": found.forced.perplexity}
    if request.source is not None:
        _divergence_from_source(request, model, passes, out, say)
    if request.level == "numerics":
        return
    if model.head.present and not numerics:
        found.wiring = wiring.check_wiring(model, passes)
    found.runs = evaluate.decode_prompts(
        model,
        chosen,
        depth=request.depth,
        max_tokens=request.max_tokens,
        stop=evaluate.stop_tokens(request.folder),
        with_head=request.mtp or request.wants_report,
    )
    out.facts["decode"] = _decode_facts(found.runs, request)
    if request.mtp or (request.wants_report and model.head.present):
        _judge(request, model, found, compute, numerics, out)
    elif not found.runs.finite:
        out.add("decoding", ["log-probabilities that are not numbers"], "")


def _numerics_problems(found: _Measured, dtype: str, vocab: int) -> list[str]:
    problems = []
    if not found.forced.finite:
        problems.append("logits or hidden states that are NaN or infinite")
        return problems
    v = found.invariance
    if dtype == "float32" and max(v.max_abs_logits, v.max_abs_head or 0.0) > CHUNK_LIMIT:
        worst = max(v.max_abs_logits, v.max_abs_head or 0.0)
        problems.append(f"decoding in pieces differs from prefill by {worst:.3g} (limit {CHUNK_LIMIT:g})")
    if dtype != "float32" and v.median_kl_nats > CHUNK_KL:
        problems.append(
            f"decoding in pieces differs from prefill: median KL {v.median_kl_nats:.3g} (limit {CHUNK_KL:g})"
        )
    texts = found.forced.perplexity
    if texts and min(texts.values()) > BROKEN * vocab:
        problems.append(
            f"the backbone is broken: perplexity {min(texts.values()):.4g} on its best text, of {vocab} tokens"
        )
    return problems


def _numerics_good(found: _Measured, compute: Compute) -> str:
    v, texts = found.invariance, found.forced.perplexity
    apart = f"{v.max_abs_logits:.2g}" if compute.dtype == "float32" else f"median KL {v.median_kl_nats:.2g}"
    text = f"; perplexity of the best text {min(texts.values()):.1f}" if texts else ""
    how = f"{compute.dtype}, {'matrices dequantized' if compute.dense else 'matrices as stored'}"
    return f"all finite; decoding equals prefill over {v.tokens} tokens ({apart}){text}; {how}"


def _divergence_from_source(request: Request, model: Model, passes: list[Passed], out: Outcome, say: Say) -> None:
    """Add KL(source || converted) over the prompts, where the memory holds the source too."""
    from ds4convert.inference import evaluate, forced, load

    assert request.source is not None
    compute = evaluate.choose_compute(request.source, 512, "float32")
    if not compute.fits or (compute.free_bytes is not None and compute.needed_bytes > compute.free_bytes // 2):
        say(f"KL against the source left out: loading it takes about {compute.needed_bytes / 1e9:.1f} GB of memory.")
        out.facts["kl"] = None
        return
    drafts = [forced.head_logits(model, p) for p in passes] if model.head.present else []
    theirs, _ = load.load_model(request.source, dtype="float32", dense=compute.dense, require_manifest=False)
    found = forced.source_divergence(theirs, passes, drafts)
    out.facts["kl"] = {part: dataclasses.asdict(d) for part, d in found.items()}


def _decode_facts(runs: Runs, request: Request) -> JSON:
    return {
        "prompts": [
            {"name": r.prompt.name, "tokens": len(r.prompt.ids), "is_text": r.prompt.is_text} for r in runs.runs
        ],
        "max_tokens": request.max_tokens,
        "new_tokens": sum(len(r.plain.tokens) for r in runs.runs),
        "plain_tokens_per_second": round(runs.plain_rate_tok_s, 2),
    }


# --- the head --------------------------------------------------------------------------------------------------------


def _empty(kind: str, folder: Path, present: bool, verdict: str) -> JSON:
    formats = head_formats(folder)
    first = {"present": present, "kind": kind, "format": "+".join(formats) or None}
    return {**first, **dict.fromkeys(FIGURES), "verdict": verdict, "formats": formats}


def _head_problems(folder: Path) -> list[str]:
    """Return what is wrong with the head's tensors, or nothing where the backbone's are wrong too."""
    try:
        found = logical.read_mlx(folder).findings
    except Ds4Error:
        return []
    own = [str(f) for f in found if f.tensor.startswith(("mtp.", "model.mtp."))]
    return own if len(own) == len(found) else []


def _unfit_head(request: Request, problems: list[str], out: Outcome) -> None:
    more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
    verdict = (
        "The tensors under mtp.* are not those of a classic MTP head, so it was not run "
        f"(another kind of head renamed, or a damaged one): {'; '.join(problems[:3])}{more}."
    )
    out.facts["mtp"] = _empty("unknown", request.folder, True, verdict)
    out.add("head works", [verdict], "")


def _absence(model: Model, folder: Path) -> str:
    """Return why there is no head, from the manifest where it says so, else from config and tensors."""
    record = manifest.read(folder) or {}
    left = [x for x in record.get("left_out", []) if x["tensor"].startswith("mtp.")]
    if left and not record.get("head", {}).get("tensors"):
        return f"it was left out at conversion ({left[0].get('why', 'no reason recorded')})"
    return model.head.reason


def _judge(
    request: Request, model: Model, found: _Measured, compute: Compute, numerics: list[str], out: Outcome
) -> None:
    """Add the checks of the head, the `mtp` object and its verdict."""
    if not model.head.present:
        kind = model.head.kind
        reason = _absence(model, request.folder)
        verdict = f"No MTP head to draft with: {reason}." if kind == "none" else f"The head was not run: {reason}."
        out.facts["mtp"] = _empty(kind, request.folder, kind != "none", verdict)
        out.add("head works", [verdict], "")
        return
    runs, forced = found.runs, found.forced
    assert runs is not None
    useless = useless_reason(runs, forced)
    scrambled = [str(x) for x in found.wiring.found] if found.wiring else []
    unequal = _inequality(runs, compute.dtype)
    off = [*numerics, *([] if runs.finite else ["log-probabilities that are not numbers"])]
    out.add("head works", [useless] if useless else [], _works(runs, forced))
    out.add("head wiring", scrambled, _wiring_good(found.wiring))
    out.add("greedy equality", unequal, _equality_good(runs))
    altered = [c.name for c in out.checks if not c.ok and c.name in ALTERED]
    verdict = _verdict(runs, off, altered, scrambled, useless, unequal)
    out.facts["mtp"] = _mtp_facts(request, found, verdict)


ALTERED = ("digests", "values", "values of the head in mtp/", "headers", "inventory", "manifest")
"""Checks of the files that say that the weights are not what the conversion wrote."""


def useless_reason(runs: Runs, forced: Forced) -> str:
    """Return why the head is useless, in words, or nothing.

    Acceptance counts against the backbone's own greedy text, which may repeat itself; so the prompts' own tokens are
    asked as well.
    """
    limit = max(USELESS, CHANCE * min(runs.common_token_share, 0.5))
    if runs.drafted and runs.acceptance < limit:
        return (
            f"acceptance {runs.acceptance:.1%} is at chance (limit {limit:.0%}): a head of the wrong kind, "
            "over-quantized, or wired wrongly"
        )
    limit = max(FORCED_USELESS, CHANCE * min(forced.chance, 0.5))
    if forced.positions and forced.agreement < limit:
        return (
            f"the head agrees with the backbone on {forced.agreement:.1%} of the prompts' tokens, which is chance "
            f"(limit {limit:.0%}): a head of the wrong kind, over-quantized, or wired wrongly"
        )
    return ""


def _works(runs: Runs, forced: Forced) -> str:
    return (
        f"acceptance {runs.acceptance:.1%} ({runs.accepted} of {runs.drafted} drafts), "
        f"{runs.tokens_per_pass:.2f} tokens per backbone pass; {forced.agreement:.1%} teacher-forced"
    )


def _wiring_good(wiring: Wiring | None) -> str:
    if wiring is None or not wiring.experts_comparable:
        return "not judged: the head's experts show no trace of training; only --source or --reference can tell"
    return f"no two parts of the head agree better exchanged ({wiring.tried} exchanges tried)"


def _inequality(runs: Runs, dtype: str) -> list[str]:
    real = [r.divergence for r in runs.runs if r.divergence and r.divergence.top2_margin > TIE[dtype]]
    if not real:
        return []
    d = real[0]
    return [
        f"greedy tokens with the head differ from plain ones on {len(real)} prompts; first {d.prompt}, new token "
        f"{d.position}: {d.plain_token} plain, {d.mtp_token} with the head, top-2 margin {d.top2_margin:.3g}"
    ]


def _equality_good(runs: Runs) -> str:
    d = runs.first_divergence
    if d is None:
        return f"{sum(len(r.plain.tokens) for r in runs.runs)} tokens equal with and without the head"
    return f"differs at a near tie only: {d.prompt}, new token {d.position}, top-2 margin {d.top2_margin:.2g}"


def _verdict(
    runs: Runs, off: list[str], altered: list[str], scrambled: list[str], useless: str, unequal: list[str]
) -> str:
    if off:
        return f"Numerics are off, so nothing can be said of the head: {'; '.join(off)}."
    if scrambled:
        return f"The head is present but scrambled: {'; '.join(scrambled)}."
    if altered:
        how = f"useless too: {useless}" if useless else f"accepted {runs.acceptance:.1%}"
        return f"The weights are not what was converted ({', '.join(altered)}); the head as it is now is {how}."
    if useless:
        return f"The head is present but useless: {useless}."
    if unequal:
        return f"Numerics are off: {unequal[0]}."
    return _healthy(runs)


def _healthy(runs: Runs) -> str:
    quality = "works" if runs.acceptance >= WEAK else "works, but weakly (published heads: 59 to 82 %; see --source)"
    ratio = runs.mtp_rate_tok_s / runs.plain_rate_tok_s if runs.plain_rate_tok_s else 0.0
    pace = f"{ratio:.2f} times the speed of plain decoding here"
    if ratio < 1:
        pace += ", so it does not pay on this machine"
    same = "greedy text unchanged" if runs.first_divergence is None else "greedy text changed at near ties only"
    return f"The head {quality}: acceptance {runs.acceptance:.1%}, {runs.tokens_per_pass:.2f} tokens per pass, {pace}; {same}."


def _mtp_facts(request: Request, found: _Measured, verdict: str) -> JSON:
    runs, forced = found.runs, found.forced
    assert runs is not None
    facts = _empty("classic", request.folder, True, verdict)
    plain, mtp = runs.plain_rate_tok_s, runs.mtp_rate_tok_s
    facts |= {
        "acceptance": round(runs.acceptance, 4),
        "drafted": runs.drafted,
        "accepted": runs.accepted,
        "tokens_per_pass": round(runs.tokens_per_pass, 4),
        "plain_tokens_per_second": round(plain, 2),
        "mtp_tokens_per_second": round(mtp, 2),
        "speedup": round(mtp / plain, 3) if plain else None,
        "greedy_equal": runs.first_divergence is None,
        "first_divergence": dataclasses.asdict(runs.first_divergence) if runs.first_divergence else None,
        "draft_depth": request.depth,
        "passes": runs.passes,
        "per_position": [
            {"position": n, "drafted": d, "accepted": a, "acceptance": round(a / d, 4) if d else None}
            for n, (d, a) in enumerate(runs.positions(), 1)
        ],
        "per_prompt": [_prompt_facts(r) for r in runs.runs],
        "teacher_forced": {
            "positions": forced.positions,
            "agreement": round(forced.agreement, 4),
            "chance": round(forced.chance, 4),
            "kl_nats": forced.divergence_nats,
        },
        "wiring": _wiring_facts(found.wiring),
        "milliseconds": _times(runs),
    }
    return facts


def _prompt_facts(run: Any) -> JSON:
    stats, rate = run.mtp.stats, lambda d: round(d.timed_tokens / d.seconds, 2) if d.seconds else None
    return {
        "prompt": run.prompt.name,
        "prompt_tokens": len(run.prompt.ids),
        "new_tokens": len(run.plain.tokens),
        "drafted": stats.drafted,
        "accepted": stats.accepted,
        "acceptance": round(stats.acceptance, 4),
        "tokens_per_pass": round(stats.tokens_per_pass, 4),
        "plain_tokens_per_second": rate(run.plain),
        "mtp_tokens_per_second": rate(run.mtp),
        "greedy_equal": run.divergence is None,
    }


def _wiring_facts(wiring: Wiring | None) -> JSON:
    if wiring is None:
        return {"judged": False, "tried": 0, "found": []}
    return {
        "judged": wiring.experts_comparable,
        "tried": wiring.tried,
        "found": [dataclasses.asdict(x) for x in wiring.found],
    }


def _times(runs: Runs) -> JSON:
    """Return milliseconds of a plain pass, of a pass that verifies drafts, of its drafting, and of the loop's rest."""
    drafting = [r.mtp.stats for r in runs.runs if r.mtp is not None]
    passes = max(1, sum(s.passes for s in drafting))
    plain = sum(r.plain.seconds for r in runs.runs) / max(1, sum(r.plain.timed_tokens for r in runs.runs))
    return {
        "plain_pass": round(1e3 * plain, 3),
        "verifying_pass": round(1e3 * sum(s.backbone_seconds for s in drafting) / passes, 3),
        "drafting": round(1e3 * sum(s.head_seconds for s in drafting) / passes, 3),
        "rest": round(1e3 * sum(s.other_seconds for s in drafting) / passes, 3),
    }
