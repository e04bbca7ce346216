"""`verify` beyond the files: numerics, decoding with and without the head, and the verdict.

The edge that joins the conversion's checks (`verify`) with measurements of the loaded model (`inference`): decides what
is done, in which order, and turns it into checks and facts. Thresholds and sentences are those of `verdict`.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ds4convert.checkpoint.source import Source
from ds4convert.converted import manifest
from ds4convert.errors import InputError, UsageError
from ds4convert.generation import drafting
from ds4convert.generation.open_folder import finished
from ds4convert.verification import layerwise, prompts, structure, verdict
from ds4convert.verification.against_source import against_source
from ds4convert.verification.checks import Check
from ds4convert.verification.facts import DecodeFacts, Numerics, PromptTokens, Reply, SourceKL, Word, record_of
from ds4convert.verification.head import _head_problems, _judge, _unfit_head
from ds4convert.verification.request import RUNNING, Outcome, Request, Say, needs_model
from ds4convert.verification.several import agreed as several
from ds4convert.verification.several.agreed import Plan
from ds4convert.verification.structure import altered_tensors
from ds4convert.words.figures import Progress

if TYPE_CHECKING:
    from ds4convert.evaluate.decode_runs import Compute, Prompt, PromptRun, Runs
    from ds4convert.evaluate.forced import Passed
    from ds4convert.inference.deepseek_v4.model import Model
    from ds4convert.inference.several.ranks import Team


def run(
    request: Request, say: Say = lambda text: None, progress: Progress = lambda n: None, ranks: Team | None = None
) -> Outcome:
    """Carry out a request: files first, then (where asked) source, reference, numerics and decoding.

    Raises `InputError` where the folder cannot be loaded, before any decode, and `UsageError` on prompts that do not
    fit. Several `ranks` do it together, each with its own copy of the folder: what is wrong with one is told by all.
    """
    from ds4convert.inference.several.ranks import together

    out = Outcome()
    with together(ranks) as agreed:
        plan = _looked_at(request, out, say, progress, ranks)
        if ranks is not None:
            several.put_in(request, plan, out, agreed)
    if ranks is not None:
        plan = several.settled(plan, out, agreed, ranks)
    if plan is not None and request.layerwise:
        ids = [list(p.ids) for p in plan.prompts]
        checks, out.facts.layerwise = layerwise.run(
            request.folder, ids, plan.vocab, _folder(request.source), request.dtype, progress
        )
        out.checks += checks
    elif plan is not None:
        _with_model(request, plan, out, say, ranks)
        with together(ranks) as agreed:
            agreed.mine = several.figures(out)
    return out


def _looked_at(request: Request, out: Outcome, say: Say, progress: Progress, ranks: Team | None) -> Plan | None:
    """Check the files, against the source where it is given; return how the model is to be run, None if it is not."""
    if ranks is not None:
        several.check(request)
    if request.layerwise and isinstance(request.source, Source):
        raise UsageError("--layerwise runs the source as well, which needs its folder: `ds4convert pull` it first")
    if request.layerwise and (request.mtp or request.reference or request.level in RUNNING):
        raise UsageError("--layerwise never holds the whole model, so it cannot decode: leave out the other options")
    plan = _prepare(request, say, ranks) if needs_model(request) else None
    as_it_is = plan is not None and request.source is None
    out.checks = structure.structure(request.folder, request.jobs, progress, as_it_is, request.part)
    if not all(c.ok for c in out.checks):
        _name_altered(request, out)
    if plan is not None:
        _check_headers(request.folder, out.checks)
    if request.source is not None:
        out.checks += against_source(
            request.folder, request.source, request.jobs, progress, request.calibration, request.part
        )
    if request.wants_report:
        record = record_of(request.folder)
        out.facts.groups = record.groups() if record else ()
        out.facts.losses = record.losses() if record else ()
    return plan


def _check_headers(folder: Path, checks: list[Check]) -> None:
    """Raise `InputError` where the headers cannot be trusted: then nothing is loaded by them."""
    found = next((c.detail for c in checks if c.name == "headers" and not c.ok), None)
    if found is not None:
        whose = f" (it has no {manifest.MANIFEST_NAME}: not finished, or of another program)"
        told = whose if manifest.is_missing(folder) else ""
        raise InputError(f"{folder}: {found}; something is missing or damaged, so nothing was run{told}")


def _prepare(request: Request, say: Say, ranks: Team | None) -> Plan:
    """Return the prompts as ids, how to load the model, and the recording; every usage error comes from here."""
    from ds4convert.evaluate import decode_runs
    from ds4convert.inference import load

    given = prompts.read_prompts(request.prompts) if request.prompts else None
    if manifest.is_missing(request.folder):  # one that is altered is a check that fails
        finished(request.folder)
    load.stored_parameters(request.folder, request.drafter)  # refuses broken files before a library is loaded
    args = load.read_args(load.read_config(request.folder), str(request.folder))
    reference = _read_reference(request, args.max_position_embeddings)
    chosen: list[Prompt] = []
    if given or request.level in RUNNING or request.layerwise:
        chosen = _prompts(request, given, args.vocab_size, args.max_position_embeddings, say)
    context = max((len(p.ids) for p in chosen), default=0) + request.max_tokens
    compute = decode_runs.choose_compute(request.folder, context, "float32" if reference else request.dtype, ranks)
    if not request.layerwise:
        _warn_of_memory(compute, say)
    return Plan(chosen, compute, reference, args.vocab_size)


# --- files ---------------------------------------------------------------------------------------------------------


def _name_altered(request: Request, out: Outcome) -> None:
    """Where a file's digest is wrong, say which tensors in it are not as the manifest records them."""
    record = record_of(request.folder)
    wrong = next((c.detail for c in out.checks if c.name == "digests" and not c.ok), "")
    if record is None or not wrong:
        return
    names = altered_tensors(request.folder, record)
    if names:
        shown, more = ", ".join(names[:10]), f" and {len(names) - 10} more" if len(names) > 10 else ""
        out.add("tensor digests", [f"altered since the conversion: {shown}{more}"], "")


# --- the model -----------------------------------------------------------------------------------------------------


def _with_model(request: Request, plan: Plan, out: Outcome, say: Say, ranks: Team | None) -> None:
    from ds4convert.inference import load
    from ds4convert.inference.several.ranks import together

    compute, drafter = plan.compute, request.drafter
    how: dict[str, Any] = {"dtype": compute.dtype, "dense": compute.dense, "drafter": drafter, "ranks": ranks}
    try:
        with together(ranks):
            model, _ = load.load_model(request.folder, require_manifest=False, **how)
    except InputError as e:
        problems = _head_problems(request.folder)
        if not problems or not request.mtp:
            raise
        _unfit_head(request, problems, out)
        say(str(e))
        return
    if request.drafter is not None:
        out.facts.drafter = str(request.drafter)
        say(f"The head is that of {request.drafter}, as --drafter says.")
    out.facts.compute = compute
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
    from ds4convert.evaluate import reference as references

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
    from ds4convert.evaluate import decode_runs

    if request.max_tokens >= positions:
        raise UsageError(f"--max-tokens {request.max_tokens}: the model has {positions} positions in all")
    encode = decode_runs.encoder(request.folder)
    raw = given or prompts.fixed_prompts()
    if given is None and (encode is None or not any(_is_known(encode(str(p.content))) for p in raw)):
        why = "No tokenizer.json in the folder" if encode is None else "The folder's tokenizer knows none of our texts"
        say(f"{why}: decoding prompts of token ids made from the vocabulary's size.")
        room = positions - request.max_tokens
        return [dataclasses.replace(p, ids=p.ids[:room]) for p in decode_runs.id_prompts(vocab)]
    out = []
    for p in raw:
        if isinstance(p.content, str) and encode is None:
            raise UsageError(
                f"--prompts: {p.name} is a text, but {request.folder} has no tokenizer.json",
                hint="give lists of token ids",
            )
        ids = tuple(encode(p.content)) if isinstance(p.content, str) and encode else tuple(map(int, p.content))
        _check_ids(p.name, ids, vocab, positions, request.max_tokens)
        out.append(decode_runs.Prompt(p.name, ids, isinstance(p.content, str)))
    return out


def _is_known(ids: list[int]) -> bool:
    """Return whether a tokenizer knows a text: one that does not makes one and the same token of most words."""
    return bool(ids) and 2 * max(Counter(ids).values()) <= len(ids)


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
    from ds4convert.evaluate import reference as references

    compared = references.compare(model, reference, request.atol, request.rtol)
    out.facts.reference = tuple(compared)
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
    from ds4convert.evaluate import decode_runs, forced, wiring, wiring_dspark

    depth = drafting.draft_depth(model, request.depth, request.confidence)
    passes = forced.backbone_passes(model, chosen)
    longest = max(chosen, key=lambda p: len(p.ids)).ids
    line = (longest * (verdict.CHUNK_TOKENS // len(longest) + 1))[
        : min(verdict.CHUNK_TOKENS, model.args.max_position_embeddings)
    ]
    found = verdict.Measured(forced.teacher_forced(model, passes), forced.chunk_invariance(model, line))
    numerics = verdict.numerics_problems(found, compute.dtype, model.args.vocab_size)
    out.add("numerics", numerics, verdict.numerics_good(found, compute))
    out.facts.numerics = Numerics(found.invariance, found.forced.perplexity)
    if request.source is not None:
        _divergence_from_source(request, model, passes, out, say)
    if request.level == "numerics":
        return
    if model.head.present and not numerics:
        look = wiring_dspark.check_wiring if model.is_dspark else wiring.check_wiring
        found.wiring = look(model, passes)
    ends, with_head = decode_runs.stop_tokens(request.folder), request.mtp or request.wants_report
    how = decode_runs.How(depth, request.max_tokens, request.confidence, ends, with_head)
    found.runs = decode_runs.decode_prompts(model, chosen, how)
    out.facts.decode = _decode_facts(found.runs, request)
    if request.mtp or (request.wants_report and model.head.present):
        _judge(request, model, found, compute, numerics, out)
    elif not found.runs.finite:
        out.add("decoding", ["log-probabilities that are not numbers"], "")


def _folder(source: Path | Source | None) -> Path | None:
    """Return the folder of a source that is here."""
    return source if isinstance(source, Path) else None


def _divergence_from_source(request: Request, model: Model, passes: list[Passed], out: Outcome, say: Say) -> None:
    """Add KL(source || converted) over the prompts, where the memory holds the source too."""
    from ds4convert.evaluate import decode_runs, forced
    from ds4convert.inference import load

    source = _folder(request.source)
    if source is None:
        say("KL against the source left out: running it needs its folder; `ds4convert pull` it first.")
        return
    compute = decode_runs.choose_compute(source, 512, "float32")
    if not compute.fits or (compute.free_bytes is not None and compute.needed_bytes > compute.free_bytes // 2):
        say(f"KL against the source left out: loading it takes about {compute.needed_bytes / 1e9:.1f} GB of memory.")
        out.facts.kl = SourceKL(None)
        return
    drafts = [forced.head_logits(model, p) for p in passes] if model.head.present else []
    theirs, _ = load.load_model(source, dtype="float32", dense=compute.dense, require_manifest=False)
    found = forced.source_divergence(theirs, passes, drafts)
    out.facts.kl = SourceKL(found)


def _decode_facts(runs: Runs, request: Request) -> DecodeFacts:
    from ds4convert.evaluate import decode_runs

    spell = decode_runs.speller(request.folder)
    return DecodeFacts(
        prompts=tuple(PromptTokens(r.prompt.name, len(r.prompt.ids), r.prompt.is_text) for r in runs.runs),
        max_tokens=request.max_tokens,
        new_tokens=sum(len(r.plain.tokens) for r in runs.runs),
        plain_tokens_per_second=round(runs.plain_rate_tok_s, 2),
        texts=tuple(_reply(run, spell) for run in runs.runs),
    )


def _reply(run: PromptRun, spell: Callable[[Sequence[int]], list[str]]) -> Reply:
    drafted = None
    if run.mtp is not None:
        drafted = tuple(map(Word, spell(run.mtp.tokens), run.mtp.places))
    differs = run.divergence.position if run.divergence is not None else None
    return Reply(run.prompt.name, "".join(spell(run.prompt.ids)), tuple(spell(run.plain.tokens)), drafted, differs)
