"""`verify` beyond the files: numerics, decoding with and without the head, and the verdict.

The edge that joins the conversion's checks (`verify`) with measurements of the loaded model (`inference`): decides what
is done, in which order, and turns it into checks and facts. Thresholds and sentences are those of `verdict`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ds4convert import layerwise_check, logical, losses, manifest, mtp_facts, prompts, verdict, verify
from ds4convert.convert import Source
from ds4convert.errors import Ds4Error, InputError, UsageError
from ds4convert.folder import read_checkpoint, resolve_inside
from ds4convert.types import JSON, TensorInfo
from ds4convert.verify import Check

if TYPE_CHECKING:
    from ds4convert.inference.deepseek_v4 import Model
    from ds4convert.inference.evaluate import Compute, Prompt, Runs
    from ds4convert.inference.forced import Passed

LEVELS = ("structure", "source", "numerics", "decode")
RUNNING = LEVELS[2:]
"""Levels that run the model on prompts."""
Say = Callable[[str], None]


@dataclass(frozen=True)
class Request:
    """What `verify` was asked for; `level` is one of LEVELS."""

    folder: Path
    level: str
    mtp: bool = False
    source: Path | Source | None = None
    reference: Path | None = None
    prompts: Path | None = None
    max_tokens: int = 64
    depth: int = 1
    atol: float = 2e-4
    rtol: float = 0.0
    dtype: str | None = None
    wants_report: bool = False
    layerwise: bool = False
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
        facts: JSON = _speakable({**verify.as_json(self.checks), **self.facts})
        return facts


def _speakable(value: Any) -> Any:
    """Return facts without NaN and infinities, which JSON does not have: null stands for them."""
    if isinstance(value, dict):
        return {k: _speakable(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_speakable(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def level_of(level: str | None, mtp: bool, source: bool, report: bool = False) -> str:
    """Return the level to check at (a report shows decoding unless told otherwise).

    Raises `UsageError` where the options contradict each other.
    """
    if level == "source" and not source:
        raise UsageError("--level source needs --source SRC")
    if level == "structure" and source:
        raise UsageError("--level structure does not look at a source; leave out --source")
    if mtp and level not in (None, "decode"):
        raise UsageError(f"--mtp decodes; --level {level} does not. Leave out one of them")
    return level or ("decode" if mtp or report else "source" if source else "structure")


def needs_model(request: Request) -> bool:
    """Return whether a request goes beyond the files."""
    return request.level in RUNNING or request.reference is not None or request.layerwise


def run(request: Request, say: Say = lambda text: None, progress: verify.Progress = lambda n: None) -> Outcome:
    """Carry out a request: files first, then (where asked) source, reference, numerics and decoding.

    Raises `InputError` where the folder cannot be loaded, before any decode, and `UsageError` on prompts that do not
    fit.
    """
    out = Outcome()
    if request.layerwise and isinstance(request.source, Source):
        raise UsageError("--layerwise runs the source as well, which needs its folder: `ds4convert pull` it first")
    if request.layerwise and (request.mtp or request.reference or request.level in RUNNING):
        raise UsageError("--layerwise never holds the whole model, so it cannot decode: leave out the other options")
    plan = _prepare(request, say) if needs_model(request) else None
    out.checks = verify.structure(request.folder, request.jobs, progress)
    if not all(c.ok for c in out.checks):
        _name_altered(request, out)
    if request.source is not None:
        out.checks += verify.against_source(request.folder, request.source, request.jobs, progress)
    if request.wants_report:
        out.facts["groups"] = mtp_facts.groups(request.folder)
        out.facts["losses"] = losses.by_layer(manifest.read(request.folder))
    if plan is not None and request.layerwise:
        ids = [list(p.ids) for p in plan.prompts]
        checks, out.facts["layerwise"] = layerwise_check.run(
            request.folder, ids, plan.vocab, _folder(request.source), request.dtype, progress
        )
        out.checks += checks
    elif plan is not None:
        _with_model(request, plan, out, say)
    return out


@dataclass(frozen=True)
class _Plan:
    """What will be run, settled from small files before anything large is read."""

    prompts: list[Prompt]
    compute: Compute
    reference: Any
    vocab: int


def _prepare(request: Request, say: Say) -> _Plan:
    """Return the prompts as ids, how to load the model, and the recording; every usage error comes from here."""
    from ds4convert.inference import evaluate, load

    given = prompts.read_prompts(request.prompts) if request.prompts else None
    if not request.folder.is_dir():
        raise InputError(f"{request.folder}: no such folder")
    args = load.read_args(load.read_config(request.folder), str(request.folder))
    reference = _read_reference(request, args.max_position_embeddings)
    chosen: list[Prompt] = []
    if given or request.level in RUNNING or request.layerwise:
        chosen = _prompts(request, given, args.vocab_size, args.max_position_embeddings, say)
    context = max((len(p.ids) for p in chosen), default=0) + request.max_tokens
    compute = evaluate.choose_compute(request.folder, context, "float32" if reference else request.dtype)
    if not request.layerwise:
        _warn_of_memory(compute, say)
    return _Plan(chosen, compute, reference, args.vocab_size)


# --- files ---------------------------------------------------------------------------------------------------------


def _name_altered(request: Request, out: Outcome) -> None:
    """Where a file's digest is wrong, say which tensors in it are not as the manifest records them."""
    record = mtp_facts.record_of(request.folder)
    wrong = next((c.detail for c in out.checks if c.name == "digests" and not c.ok), "")
    if not record or not wrong:
        return
    names = altered_tensors(request.folder, record)
    if names:
        shown, more = ", ".join(names[:10]), f" and {len(names) - 10} more" if len(names) > 10 else ""
        out.add("tensor digests", [f"altered since the conversion: {shown}{more}"], "")


def altered_tensors(folder: Path, record: JSON) -> list[str]:
    """Return the names of tensors whose bytes differ from their digest in the manifest (xxh3-128, where hashed).

    A tensor that only moved within its file is not altered.
    """
    try:
        checkpoint = read_checkpoint(folder)
    except Ds4Error:
        return []
    found = {(checkpoint.file_names[t.file], t.name): t for t in checkpoint.tensors()}
    out = []
    for r in record["tensors"]:
        t = found.get((r["file"], r["name"]))
        if t is None or not isinstance(r.get("xxh3_128"), str):
            continue
        if _digest(folder, r["file"], t) != r["xxh3_128"]:
            out.append(t.name)
    return out


def _digest(folder: Path, file: str, t: TensorInfo) -> str:
    import xxhash

    state, left = xxhash.xxh3_128(), t.size
    with resolve_inside(folder, file).open("rb") as f:
        f.seek(t.start)
        while left and (data := f.read(min(left, verify.HASH_CHUNK))):
            state.update(data)
            left -= len(data)
    return str(state.hexdigest())


# --- the model -----------------------------------------------------------------------------------------------------


def _with_model(request: Request, plan: _Plan, out: Outcome, say: Say) -> None:
    from ds4convert.inference import load

    compute = plan.compute
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
    if plan.reference:
        _compare_reference(request, model, plan.reference, out)
    if request.level in RUNNING:
        _measure(request, model, plan.prompts, compute, out, say)


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


def _measure(request: Request, model: Model, chosen: list[Prompt], compute: Compute, out: Outcome, say: Say) -> None:
    from ds4convert.inference import evaluate, forced, wiring

    passes = forced.backbone_passes(model, chosen)
    longest = max(chosen, key=lambda p: len(p.ids)).ids
    line = (longest * (verdict.CHUNK_TOKENS // len(longest) + 1))[
        : min(verdict.CHUNK_TOKENS, model.args.max_position_embeddings)
    ]
    found = verdict.Measured(forced.teacher_forced(model, passes), forced.chunk_invariance(model, line))
    numerics = verdict.numerics_problems(found, compute.dtype, model.args.vocab_size)
    out.add("numerics", numerics, verdict.numerics_good(found, compute))
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


def _folder(source: Path | Source | None) -> Path | None:
    """Return the folder of a source that is here."""
    return source if isinstance(source, Path) else None


def _divergence_from_source(request: Request, model: Model, passes: list[Passed], out: Outcome, say: Say) -> None:
    """Add KL(source || converted) over the prompts, where the memory holds the source too."""
    from ds4convert.inference import evaluate, forced, load

    source = _folder(request.source)
    if source is None:
        say("KL against the source left out: running it needs its folder; `ds4convert pull` it first.")
        return
    compute = evaluate.choose_compute(source, 512, "float32")
    if not compute.fits or (compute.free_bytes is not None and compute.needed_bytes > compute.free_bytes // 2):
        say(f"KL against the source left out: loading it takes about {compute.needed_bytes / 1e9:.1f} GB of memory.")
        out.facts["kl"] = None
        return
    drafts = [forced.head_logits(model, p) for p in passes] if model.head.present else []
    theirs, _ = load.load_model(source, dtype="float32", dense=compute.dense, require_manifest=False)
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
    sentence = (
        "The tensors under mtp.* are not those of a classic MTP head, so it was not run "
        f"(another kind of head renamed, or a damaged one): {'; '.join(problems[:3])}{more}."
    )
    out.facts["mtp"] = mtp_facts.without_figures("unknown", request.folder, True, sentence)
    out.add("head works", [sentence], "")


def _absence(model: Model, folder: Path) -> str:
    """Return why there is no head, from the manifest where it says so, else from config and tensors."""
    record = mtp_facts.record_of(folder)
    left = [x for x in record.get("left_out", []) if x["tensor"].startswith("mtp.")]
    if left and not record.get("head", {}).get("tensors"):
        return f"it was left out at conversion ({left[0].get('why', 'no reason recorded')})"
    return model.head.reason


def _judge(
    request: Request, model: Model, found: verdict.Measured, compute: Compute, numerics: list[str], out: Outcome
) -> None:
    """Add the checks of the head, the `mtp` object and its verdict."""
    if not model.head.present:
        kind = model.head.kind
        sentence = f"No MTP head to draft with: {_absence(model, request.folder)}."
        if kind != "none":
            sentence = f"The head is of the {kind} kind, which this version keeps and checks but does not run."
        out.facts["mtp"] = mtp_facts.without_figures(kind, request.folder, kind != "none", sentence)
        out.add("head works", [sentence], "")
        return
    runs, forced = found.runs, found.forced
    assert runs is not None
    useless = verdict.useless_reason(runs, forced)
    scrambled = [str(x) for x in found.wiring.found] if found.wiring else []
    unequal = verdict.inequality(runs, compute.dtype)
    off = [*numerics, *([] if runs.finite else ["log-probabilities that are not numbers"])]
    out.add("head works", [useless] if useless else [], verdict.works(runs, forced))
    out.add("head wiring", scrambled, verdict.wiring_good(found.wiring))
    out.add("greedy equality", unequal, verdict.equality_good(runs))
    altered = [c.name for c in out.checks if not c.ok and c.name in verdict.ALTERED]
    sentence = verdict.verdict(runs, off, altered, scrambled, useless, unequal)
    out.facts["mtp"] = mtp_facts.mtp_facts(request.folder, request.depth, found, sentence)
