"""Open a finished folder for decoding: tokenizer, stop tokens, memory check, and why there is no head."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ds4convert.checkpoint.types import JSON
from ds4convert.converted import manifest
from ds4convert.converted.modules import COMMIT_NAME
from ds4convert.converted.records import Manifest
from ds4convert.errors import InputError, UsageError
from ds4convert.storage.state_folder import PLAN_NAME, STATE_FOLDER
from ds4convert.words.figures import size

if TYPE_CHECKING:
    from ds4convert.inference.deepseek_v4.config import ModelArgs
    from ds4convert.inference.deepseek_v4.model import Model
    from ds4convert.inference.several.ranks import Team


Warn = Callable[[str], None]


def head_reason(
    folder: Path, model: Model, record: Manifest | None, mtp: bool | None, drafter: Path | None, warn: Warn
) -> str | None:
    """Return why the model has no head to draft with, None where it has one.

    `warn` is told where the head was asked for (`mtp` true) and is not there, and whose head it is if it lies
    elsewhere.
    """
    if model.head.present:
        if drafter is not None:
            warn(f"the head is that of {drafter}, as --drafter says")
        return None
    reason = why_no_head(folder, model, record)
    if mtp or drafter is not None:
        warn(f"{'--mtp' if mtp else '--drafter'} has no effect: {reason}. Decoding without it")
    return reason


def finished(folder: Path) -> Manifest | None:
    """Return the manifest of a converted folder; None where another program wrote it.

    Raises `InputError` for what is no folder, unfinished, or a checkpoint that was not converted yet.
    """
    from ds4convert.inference.tensor_files import headers_of

    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    record = manifest.read(folder)
    if record is not None:
        return record
    if any((folder / STATE_FOLDER / name).exists() for name in (PLAN_NAME, COMMIT_NAME)):
        raise InputError(f"{folder}: is unfinished", hint="repeat the command that wrote it, then this one")
    if not any(".switch_mlp." in t.name for _, tensors in headers_of(folder) for t in tensors):
        raise InputError(
            f"{folder}: no {manifest.MANIFEST_NAME}, and no converted folder of another program either",
            hint=(
                "convert it first: ds4convert quantize SRC OUT (again, if it was interrupted), "
                "and name its output folder"
            ),
        )
    return None


def stop_tokens(folder: Path, config: JSON) -> frozenset[int]:
    """Return the ids that end a text: those of generation_config.json, else of config.json."""
    from ds4convert.inference import tokens

    return tokens.stop_tokens(folder, config)


def read_tokenizer(folder: Path, stops: frozenset[int]) -> Any:
    """Return mlx-lm's tokenizer of the folder, whose `eos_token_ids` are `stops` and its own. Runs no code of it."""
    from ds4convert.inference import tokens

    return tokens.read_tokenizer(folder, stops)


def _encoded(tokenizer: Any, text: str, args: ModelArgs) -> list[int]:
    """Return the ids of the prompt; the start token is added as mlx-lm does it, where the tokenizer says so."""
    from ds4convert.inference import tokens

    ids = tokens.encode(tokenizer, text)
    if ids and max(ids) >= args.vocab_size:
        raise InputError(
            f"tokenizer.json: token {max(ids)} is not in the model's vocabulary of {args.vocab_size}; "
            "the tokenizer is another model's"
        )
    return ids


def _check_ids(ids: list[int], args: ModelArgs) -> None:
    if not ids:
        raise UsageError("the prompt is empty: it has no token; at least one is needed")
    if max(ids) >= args.vocab_size:
        raise UsageError(f"--prompt-ids: {max(ids)}: expected ids below {args.vocab_size}, the size of the vocabulary")
    if len(ids) > args.max_position_embeddings:
        raise UsageError(
            f"the prompt has {len(ids):,} tokens; the model takes at most {args.max_position_embeddings:,} "
            "(max_position_embeddings)"
        )


def check_memory(
    folder: Path, context: int, dtype: str, warn: Warn, drafter: Path | None = None, ranks: Team | None = None
) -> None:
    """Warn when the model will not fit in memory. Raises `InputError` on a file that cannot be read."""
    from ds4convert.inference import load

    estimate, free = load.memory_estimate(folder, context, dtype, drafter, ranks), load.free_memory_bytes()
    if free is not None and estimate.total_bytes > free:
        warn(
            f"about {size(estimate.total_bytes)} of memory are needed ({size(estimate.weight_bytes)} weights, "
            f"{size(estimate.cache_bytes)} state for {context:,} tokens), {size(free)} are free: this may swap or "
            "fail. `ds4convert verify --layerwise` checks a model that is larger than the memory"
        )


def why_no_head(folder: Path, model: Model, record: Manifest | None) -> str:
    """Return why the model has no head to draft with: what its tensors and config say, and what the manifest knows."""
    dropped = [x for x in record.left_out if "--drop-mtp" in x.why] if record else []
    if dropped:
        return (
            f"this conversion left the head out ({len(dropped):,} tensors, --drop-mtp); "
            "convert again with --keep-mtp to have it"
        )
    wrote = list(record.of_head()) if record else []
    if wrote and not any((folder / t.file).is_file() for t in wrote):
        total = size(sum(t.size for t in wrote))
        return (
            f"the conversion wrote a head ({len(wrote):,} tensors, about {total}), which was stripped from the folder"
        )
    return str(model.head.reason)


@contextlib.contextmanager
def wired(model: Model) -> Iterator[None]:
    """Let a GPU keep the weights in memory during the generation, as mlx-lm does; its remarks go to standard error."""
    from mlx_lm.generate import generation_stream, wired_limit

    with contextlib.ExitStack() as stack:
        with contextlib.redirect_stdout(sys.stderr):
            streams: Any = [generation_stream]
            stack.enter_context(wired_limit(model, streams))
        yield
