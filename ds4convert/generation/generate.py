"""Text from a converted folder: tokenizer, chat format, model and decoding loop, joined for `generate` and `demo`.

Owns what stands between the options of the command and the tokens: which prompt the model gets, what is refused
before a weight is read, and the figures of the run. The model and the loop are `inference/`'s, the tokenizer and the
detokenizer mlx-lm's.
"""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ds4convert.checkpoint.folder import TEMPLATE_NAME
from ds4convert.checkpoint.types import JSON
from ds4convert.errors import InputError, UsageError
from ds4convert.generation import drafting
from ds4convert.generation.open_folder import (
    Warn,
    _check_ids,
    _encoded,
    check_memory,
    finished,
    head_reason,
    read_tokenizer,
    stop_tokens,
    wired,
)
from ds4convert.storage.safe_open import read_small
from ds4convert.words.terminal import show

if TYPE_CHECKING:
    from ds4convert.converted.records import Manifest
    from ds4convert.inference.deepseek_v4.config import ModelArgs
    from ds4convert.inference.deepseek_v4.model import Model
    from ds4convert.inference.several.ranks import Team


@dataclass(frozen=True)
class Request:
    """What the user asks for. `chat` None: as mlx-lm does it, chat where the folder has a chat template.

    `mtp` None: with the head where there is one; True: the same, and a warning where there is none. `drafter` is the
    folder of a head that lies elsewhere. Exactly one of `prompt` (a text) and `prompt_ids` (token ids, which need no
    tokenizer) is given.
    """

    prompt: str | None = None
    prompt_ids: tuple[int, ...] | None = None
    mtp: bool | None = None
    draft_depth: int | None = None
    confidence: float = 0.0
    drafter: Path | None = None
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
            "--draft-depth": (self.draft_depth is None or 1 <= self.draft_depth <= 16, self.draft_depth, "1 to 16"),
            "--confidence": (0 <= self.confidence <= 1, self.confidence, "0 (off) to 1"),
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
        if self.mtp is False and self.drafter is not None:
            raise UsageError("--drafter names a head to draft with; it does not go with --no-mtp")
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


@dataclass(frozen=True)
class SmallFiles:
    """What the small files of a folder say, read before a weight is."""

    folder: Path
    record: Manifest | None
    args: ModelArgs
    stops: frozenset[int]


@dataclass(frozen=True)
class Asked:
    """A request with its prompt as token ids, and as text where a tokenizer made the ids."""

    request: Request
    ids: list[int]
    stops: frozenset[int]
    tokenizer: Any = None
    text: str | None = None


def read_folder(folder: Path, drafter: Path | None) -> SmallFiles:
    """Return what the small files of a folder say. Raises `InputError` where it is no whole conversion."""
    from ds4convert.inference import load

    record = finished(folder)
    config = load.read_config(folder)
    args = load.read_args(config, str(folder))
    stops = stop_tokens(folder, config)
    load.stored_parameters(folder, drafter)  # refuses broken files before a library is loaded
    return SmallFiles(folder, record, args, stops)


def ask(small: SmallFiles, request: Request, tokenizer: Any = None) -> Asked:
    """Return a request whose prompt fits the model; `tokenizer` is the folder's, where it has been read already.

    Raises `UsageError` where the prompt does not fit.
    """
    stops, text = small.stops, None
    if request.prompt_ids is None:
        tokenizer = tokenizer or read_tokenizer(small.folder, stops)
        stops = frozenset(tokenizer.eos_token_ids)
        text = prompt_text(small.folder, tokenizer, request)
    else:
        tokenizer = None
    ids = _encoded(tokenizer, text, small.args) if text is not None else list(request.prompt_ids or ())
    _check_ids(ids, small.args)
    most = min(request.max_tokens, small.args.max_position_embeddings - len(ids) + 1)
    return Asked(replace(request, max_tokens=most), ids, stops, tokenizer, text)


def start(model: Model, asked: Asked, reason: str | None, ranks: Team | None = None) -> Generation:
    """Return a generation of a loaded model; `reason` says why that has no head, None where it has one."""
    request = asked.request
    if request.mtp is not False and not reason:
        depth = drafting.draft_depth(model, request.draft_depth, request.confidence)
        request = replace(request, draft_depth=depth)
    return Generation(model, replace(asked, request=request), reason, ranks)


def prepare(folder: Path, request: Request, warn: Warn, ranks: Team | None = None) -> Generation:
    """Return a generation that is ready to start, everything that can be refused having been refused.

    Raises `UsageError` on a prompt that does not fit the model and `InputError` on a folder that is not a whole
    conversion; `warn` is told why --mtp cannot be honoured, whose head is run, and when memory is short.
    Several `ranks` do it together, with the seed of the first.
    """
    from ds4convert.inference import load
    from ds4convert.inference.several.ranks import alike, together

    with together(ranks) as agreed:
        small = read_folder(folder, request.drafter)
        asked = ask(small, request)
        if ranks is not None:
            options = replace(request, seed=None, drafter=None)
            agreed.mine = alike(folder, request.drafter) | {"options": repr(options), "prompt": repr(asked.ids)}
            agreed.each["seed"] = int.from_bytes(os.urandom(4)) if request.seed is None else request.seed
    if ranks is not None:
        asked = replace(asked, request=replace(asked.request, seed=agreed.told("seed")[0]))
    check_memory(folder, len(asked.ids) + asked.request.max_tokens, request.dtype, warn, request.drafter, ranks)
    with together(ranks):
        model, _ = load.load_model(
            folder, dtype=request.dtype, require_manifest=False, drafter=request.drafter, ranks=ranks
        )
    reason = head_reason(folder, model, small.record, request.mtp, request.drafter, warn)
    return start(model, asked, reason, ranks)


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
    ours = path.is_file() and read_small(folder, TEMPLATE_NAME) == chat.template_text().encode()
    own = tokenizer.has_chat_template and not ours
    if not own:
        return chat.render(messages, mode="thinking" if request.thinking else "chat")
    try:
        options = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": request.thinking}
        return str(tokenizer.apply_chat_template(messages, **options))
    except Exception as e:
        raise InputError(f"{folder}: its chat template fails: {show(str(e), 400)}", hint="use --raw") from e


class Generation:
    """One generation: `pieces` runs it and yields what can be shown as it comes, `facts` tells of it afterwards.

    `reason` says why the model has no head, None where it has one; `text` is the prompt as tokenized. Several `ranks`
    come to the same text, or are told apart at the end.
    """

    def __init__(self, model: Model, asked: Asked, reason: str | None = None, ranks: Team | None = None) -> None:
        from ds4convert.inference.decode import DecodeStats

        self.model, self.tokenizer, self.stops, self.prompt = model, asked.tokenizer, asked.stops, asked.ids
        self.request, self.reason, self.text, self._ranks = asked.request, reason, asked.text, ranks
        self.mtp_active = asked.request.mtp is not False and reason is None
        self.stats = DecodeStats()
        self.tokens: list[int] = []
        self.shown: list[str] = []
        self.seconds = self.first_seconds = 0.0

    def pieces(self) -> Iterator[str]:
        """Yield the text as it grows; without a tokenizer the ids, separated by commas."""
        for token, piece, _ in self.steps():
            if self.tokenizer is not None:
                yield from [piece] if piece else []
            elif token is not None:
                yield f",{token}" if len(self.tokens) > 1 else str(token)

    def steps(self) -> Iterator[tuple[int | None, str, bool]]:
        """Yield (token, the text that it completes, whether the head drafted it).

        Some tokens complete no text; what is left of it comes at the end, with no token (None).
        """
        detokenizer = self.tokenizer.detokenizer if self.tokenizer is not None else None
        for token, drafted in self._tokens():
            piece = ""
            if detokenizer is not None and token not in self.stops:
                detokenizer.add_token(token)
                piece = "".join(self._show(detokenizer.last_segment))
            yield token, piece, drafted
        self._compare_ranks()
        if detokenizer is not None:
            detokenizer.finalize()
            for piece in self._show(detokenizer.last_segment):
                yield None, piece, False

    def _compare_ranks(self) -> None:
        """Raise `EnvironmentFault` where ranks came to other tokens: then their arithmetic is not the same."""
        from ds4convert.inference.several.ranks import together

        with together(self._ranks) as agreed:
            agreed.mine = {"the result (tokens)": repr(self.tokens)}

    def _show(self, piece: str) -> Iterator[str]:
        if piece:
            self.shown.append(piece)
            yield piece

    def _tokens(self) -> Iterator[tuple[int, bool]]:
        """Yield (new token, whether it was drafted) up to the first stop token (included); notes when they came."""
        start = time.perf_counter()
        with wired(self.model), contextlib.closing(self._steps()) as steps:
            for token, _, drafted in steps:
                self.seconds = time.perf_counter() - start
                self.first_seconds = self.first_seconds or self.seconds
                self.tokens.append(token)
                yield token, drafted
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
            options |= {"draft_depth": r.draft_depth, "confidence": r.confidence}
            return mtp_generate_step(mx.array(self.prompt), self.model, **options)
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
            "mtp_inactive_because": self.reason if self.request.mtp is not False else None,
            "head_kind": self.model.head.kind,
            "draft_depth": self.request.draft_depth if self.mtp_active else 0,
            "confidence": self.request.confidence if self.mtp_active else 0.0,
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
