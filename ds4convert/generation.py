"""Text from a converted folder: tokenizer, chat format, model and decoding loop, joined for `generate` and `demo`.

Owns what stands between the options of the command and the tokens: which prompt the model gets, what is refused
before a weight is read, and the figures of the run. The model and the loop are `inference/`'s, the tokenizer and the
detokenizer mlx-lm's.
"""

from __future__ import annotations

import contextlib
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ds4convert import manifest
from ds4convert.errors import InputError, UsageError
from ds4convert.folder import read_header
from ds4convert.report import size
from ds4convert.sidefiles import TEMPLATE_NAME
from ds4convert.types import JSON

if TYPE_CHECKING:
    from ds4convert.inference.config import ModelArgs
    from ds4convert.inference.deepseek_v4 import Model

Warn = Callable[[str], None]


@dataclass(frozen=True)
class Request:
    """What the user asks for. `chat` None: as mlx-lm does it, chat where the folder has a chat template.

    Exactly one of `prompt` (a text) and `prompt_ids` (token ids, which need no tokenizer) is given.
    """

    prompt: str | None = None
    prompt_ids: tuple[int, ...] | None = None
    mtp: bool = False
    draft_depth: int = 1
    temp: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    max_tokens: int = 100
    chat: bool | None = None
    thinking: bool = True
    system: str | None = None
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        """Raise `UsageError` on values out of range and on options that do not go together."""
        self._check_prompt()
        ranges = {
            "--draft-depth": (1 <= self.draft_depth <= 8, self.draft_depth, "1 to 8"),
            "--temp": (self.temp >= 0 and math.isfinite(self.temp), self.temp, "0 (greedy) or more"),
            "--top-p": (0 < self.top_p <= 1, self.top_p, "more than 0, at most 1 (off)"),
            "--top-k": (self.top_k >= 0, self.top_k, "0 (off) or more"),
            "--min-p": (0 <= self.min_p <= 1, self.min_p, "0 (off) to 1"),
            "--max-tokens": (self.max_tokens >= 1, self.max_tokens, "1 or more"),
        }
        for option, (good, value, wanted) in ranges.items():
            if not good:
                raise UsageError(f"{option} {value}: expected {wanted}")

    def _check_prompt(self) -> None:
        if (self.prompt is None) == (self.prompt_ids is None):
            raise UsageError("give either --prompt TEXT or --prompt-ids 1,2,3")
        if self.prompt == "" or self.prompt_ids == ():
            raise UsageError("the prompt is empty; at least one token is needed")
        for option, text in (("--prompt", self.prompt), ("--system", self.system)):
            if text is not None and not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text):
                raise UsageError(f"{option}: not UTF-8 text")
        if self.prompt_ids is not None and (self.chat or self.system is not None):
            raise UsageError("--chat and --system need --prompt TEXT; --prompt-ids are given to the model as they are")
        if self.chat is False and self.system is not None:
            raise UsageError("--system is a message of a chat; it does not go with --raw")


def parse_ids(text: str) -> tuple[int, ...]:
    """Return token ids from `1,2,3`. Raises `UsageError` on anything else."""
    pieces = [p.strip() for p in text.split(",")]
    if not all(p.isascii() and p.isdigit() and len(p) < 10 for p in pieces):
        raise UsageError(f"--prompt-ids {text!r}: expected token ids such as 1,2,3")
    return tuple(int(p) for p in pieces)


def prepare(folder: Path, request: Request, warn: Warn) -> Generation:
    """Return a generation that is ready to start, everything that can be refused having been refused.

    Raises `UsageError` on a prompt that does not fit the model and `InputError` on a folder that is not a whole
    conversion; `warn` is told why --mtp cannot be honoured, and when memory is short.
    """
    from ds4convert.inference import load

    record = finished(folder)
    config = load.read_config(folder)
    args = load.read_args(config, str(folder))
    stops = stop_tokens(folder, config)
    tokenizer = None if request.prompt_ids is not None else read_tokenizer(folder, stops)
    text = None if tokenizer is None else prompt_text(folder, tokenizer, request)
    ids = _encoded(tokenizer, text, args) if text is not None else list(request.prompt_ids or ())
    _check_ids(ids, args)
    request = replace(request, max_tokens=min(request.max_tokens, args.max_position_embeddings - len(ids) + 1))
    check_memory(folder, len(ids) + request.max_tokens, request.dtype, warn)
    model, _ = load.load_model(folder, dtype=request.dtype)
    reason = None if model.head.present else why_no_head(folder, model, record)
    if request.mtp and reason:
        warn(f"--mtp has no effect: {reason}. Decoding without it")
    return Generation(model, tokenizer, stops, ids, request, reason, text)


def finished(folder: Path) -> JSON:
    """Return the manifest: a folder without one is no finished conversion."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    record = manifest.read(folder)
    if record is None:
        raise InputError(
            f"{folder}: no {manifest.MANIFEST_NAME}, so this is not a finished conversion; "
            "run `ds4convert quantize` (again, if it was interrupted) and name its output folder"
        )
    return record


def stop_tokens(folder: Path, config: JSON) -> set[int]:
    """Return the ids that end a text: those of generation_config.json, else of config.json."""
    path = folder / "generation_config.json"
    stated = None
    if path.is_file():
        try:
            stated = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
        except (ValueError, AttributeError) as e:
            raise InputError(f"{path}: expected a JSON object: {e}") from None
    stated = config.get("eos_token_id") if stated is None else stated
    ids = stated if isinstance(stated, list) else [] if stated is None else [stated]
    if not all(type(i) is int for i in ids):
        raise InputError(f"{folder}: eos_token_id: expected a token id or a list of them, found {stated!r}")
    return set(ids)


def read_tokenizer(folder: Path, stops: set[int]) -> Any:
    """Return mlx-lm's tokenizer of the folder; its own end token is added to `stops`. Runs no code of the folder."""
    from mlx_lm.tokenizer_utils import load

    if not (folder / "tokenizer.json").is_file():
        raise InputError(f"{folder}: no tokenizer.json; copy it from the source, or give --prompt-ids")
    try:
        tokenizer = load(folder, {"trust_remote_code": False}, eos_token_ids=sorted(stops))
    except Exception as e:
        raise InputError(f"{folder}: the tokenizer cannot be read: {type(e).__name__}: {e}") from e
    stops |= tokenizer.eos_token_ids
    return tokenizer


def prompt_text(folder: Path, tokenizer: Any, request: Request) -> str:
    """Return the text that is tokenized: the prompt as it is (raw), or as the user's message of a chat.

    A chat is written by `inference.chat`, or by the folder's own template where that is another one.
    """
    from ds4convert.inference import chat

    assert request.prompt is not None
    if not (tokenizer.has_chat_template if request.chat is None else request.chat):
        if request.system is not None:
            raise UsageError(f"{folder}: has no chat template, so --system needs --chat")
        return request.prompt
    messages = [{"role": "system", "content": request.system}] if request.system is not None else []
    messages.append({"role": "user", "content": request.prompt})
    path = folder / TEMPLATE_NAME
    own = tokenizer.has_chat_template and not (
        path.is_file() and path.read_text(encoding="utf-8") == chat.template_text()
    )
    if not own:
        return chat.render(messages, mode="thinking" if request.thinking else "chat")
    try:
        options = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": request.thinking}
        return str(tokenizer.apply_chat_template(messages, **options))
    except Exception as e:
        raise InputError(f"{folder}: its chat template fails: {e}; use --raw") from e


def _encoded(tokenizer: Any, text: str, args: ModelArgs) -> list[int]:
    """Return the ids of the prompt; the start token is added as mlx-lm does it, where the tokenizer says so."""
    starts = tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)
    ids: list[int] = tokenizer.encode(text, add_special_tokens=not starts)
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


def check_memory(folder: Path, context: int, dtype: str, warn: Warn) -> None:
    """Warn when the model will not fit in memory. Raises `HeaderError` on a file that cannot be read."""
    from ds4convert.inference import load

    for path in load.weight_files(folder):
        read_header(path, path.name)
    estimate, free = load.memory_estimate(folder, context, dtype), load.free_memory_bytes()
    if free is not None and estimate.total_bytes > free:
        warn(
            f"about {size(estimate.total_bytes)} of memory are needed ({size(estimate.weight_bytes)} weights, "
            f"{size(estimate.cache_bytes)} state for {context:,} tokens), {size(free)} are free: this may swap or "
            "fail. `ds4convert verify --layerwise` checks a model that is larger than the memory"
        )


def why_no_head(folder: Path, model: Model, record: JSON) -> str:
    """Return why the model has no head to draft with: what its tensors and config say, and what the manifest knows."""
    if model.head.kind == "dspark":
        return "the head is of the DSpark kind, which this version keeps but does not decode with"
    dropped = [x for x in record["left_out"] if "--drop-mtp" in str(x.get("why"))]
    if dropped:
        return (
            f"this conversion left the head out ({len(dropped):,} tensors, --drop-mtp); "
            "convert again with --keep-mtp to have it"
        )
    wrote = [t for t in record["tensors"] if t.get("part") == "mtp"]
    if wrote and not any((folder / t["file"]).is_file() for t in wrote):
        total = size(sum(t["bytes"] for t in wrote))
        return (
            f"the conversion wrote a head ({len(wrote):,} tensors, about {total}), which was stripped from the folder"
        )
    return str(model.head.reason)


class Generation:
    """One generation: `pieces` runs it and yields what can be shown as it comes, `facts` tells of it afterwards.

    `reason` says why the model has no head, None where it has one; `text` is the prompt as tokenized.
    """

    def __init__(
        self,
        model: Model,
        tokenizer: Any,
        stops: set[int],
        prompt: list[int],
        request: Request,
        reason: str | None = None,
        text: str | None = None,
    ) -> None:
        from ds4convert.inference.decode import DecodeStats

        self.model, self.tokenizer, self.stops, self.prompt = model, tokenizer, stops, prompt
        self.request, self.reason, self.text = request, reason, text
        self.mtp_active = request.mtp and reason is None
        self.stats = DecodeStats()
        self.tokens: list[int] = []
        self.shown: list[str] = []
        self.seconds = self.first_seconds = 0.0

    def pieces(self) -> Iterator[str]:
        """Yield the text as it grows; without a tokenizer the ids, separated by commas."""
        detokenizer = self.tokenizer.detokenizer if self.tokenizer is not None else None
        for token in self._tokens():
            if detokenizer is None:
                yield f",{token}" if len(self.tokens) > 1 else str(token)
            elif token not in self.stops:
                detokenizer.add_token(token)
                yield from self._show(detokenizer.last_segment)
        if detokenizer is not None:
            detokenizer.finalize()
            yield from self._show(detokenizer.last_segment)

    def _show(self, piece: str) -> Iterator[str]:
        if piece:
            self.shown.append(piece)
            yield piece

    def _tokens(self) -> Iterator[int]:
        """Yield new tokens up to the first stop token (included); notes when the first and the last one came."""
        start = time.perf_counter()
        with wired(self.model), contextlib.closing(self._steps()) as steps:
            for token, _, _ in steps:
                self.seconds = time.perf_counter() - start
                self.first_seconds = self.first_seconds or self.seconds
                self.tokens.append(token)
                yield token
                if token in self.stops:
                    return

    def _steps(self) -> Any:
        """Return the generator of tokens: with the head where it is asked for and there."""
        import mlx.core as mx

        from ds4convert.inference.decode import mtp_generate_step, plain_generate_step
        from ds4convert.inference.sampling import Sampling

        r = self.request
        if r.seed is not None:
            mx.random.seed(r.seed)
        try:
            sampling = Sampling(temp=r.temp, top_p=r.top_p, min_p=r.min_p, top_k=r.top_k)
        except ValueError as e:
            raise UsageError(str(e)) from None
        options: dict[str, Any] = {"max_tokens": r.max_tokens, "sampling": sampling, "stats": self.stats}
        if self.mtp_active:
            return mtp_generate_step(mx.array(self.prompt), self.model, draft_depth=r.draft_depth, **options)
        return plain_generate_step(mx.array(self.prompt), self.model, **options)

    def facts(self) -> JSON:
        """Return the result under the keys of the command line contract, and more. `tokens` ends with the stop
        token where one was drawn; `text` does not.
        """
        count, after = len(self.tokens), self.seconds - self.first_seconds
        rate = (count - 1) / after if after > 0 else count / self.seconds if self.seconds else 0.0
        stopped = bool(self.tokens) and self.tokens[-1] in self.stops
        s = self.stats
        return {
            "text": "".join(self.shown),
            "tokens": self.tokens,
            "finish_reason": "stop" if stopped else "length",
            "mtp_active": self.mtp_active,
            "mtp_inactive_because": self.reason if self.request.mtp else None,
            "draft_depth": self.request.draft_depth if self.mtp_active else 0,
            "drafted": s.drafted,
            "accepted": s.accepted,
            "passes": s.passes,
            "acceptance": round(s.acceptance, 4) if s.drafted else None,
            "tokens_per_pass": round(s.tokens_per_pass, 4),
            "drafted_at": s.drafted_at,
            "accepted_at": s.accepted_at,
            "tokens_per_second": round(rate, 3),
            "prompt_tokens": len(self.prompt),
            "prompt_seconds": round(self.first_seconds, 4),
        }


@contextlib.contextmanager
def wired(model: Model) -> Iterator[None]:
    """Let a GPU keep the weights in memory during the generation, as mlx-lm does; its remarks go to standard error."""
    from mlx_lm.generate import generation_stream, wired_limit

    with contextlib.ExitStack() as stack:
        with contextlib.redirect_stdout(sys.stderr):
            streams: Any = [generation_stream]
            stack.enter_context(wired_limit(model, streams))
        yield
