"""The seam to mlx-lm, and the thread that decodes.

Of mlx-lm stand here: the prompt cache, the processors and samplers of logits, the tokenizer with its streaming
detokenizer, and what it knows of other models' tool calls. All of them are functions of its library; its server is not
used. Requests are decoded one after the other: a batch would have to wait for its slowest draft.

tests/serving/test_seam.py holds what is relied on, by behaviour. When a newer mlx-lm moves it: run it, mend what
fails, and add the version to SUPPORTED.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import json
import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from queue import Empty, Queue
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import LRUPromptCache
from mlx_lm.sample_utils import make_logits_processors, make_sampler
from mlx_lm.tokenizer_utils import BPEStreamingDetokenizer, TokenizerWrapper

from ds4convert.checkpoint.types import JSON
from ds4convert.errors import EnvironmentFault
from ds4convert.inference import chat
from ds4convert.inference.decode import DecodeStats, fill_cache, level_cache, mtp_generate_step, plain_generate_step
from ds4convert.inference.sampling import Sampling
from ds4convert.serving import prompting
from ds4convert.serving.http.responses import Detokenizer, TokenBytes, byte_reader
from ds4convert.serving.metrics import Metrics
from ds4convert.serving.prompting import Encoded
from ds4convert.serving.refused import Refused
from ds4convert.serving.reply import REASONING, Marks, Piece, StopText
from ds4convert.serving.structured import Grammars, Kept
from ds4convert.serving.validation import Asked, Prompt

LOG = logging.getLogger(__name__)
SUPPORTED = ("0.32",)
"""Versions of mlx-lm that the seam was checked against."""

PARTS = {
    LRUPromptCache: ("fetch_nearest_cache", "insert_cache"),
    TokenizerWrapper: ("apply_chat_template", "rfind_think_start", "rfind_think_end", "detokenizer"),
}
"""What is called of classes."""

MODEL_KEY = ("model", None, None)
PREFILL_STEP = 512
DRAINED = "the server is shutting down, and the time that it gave to running requests is over"

Progress = Callable[[int, int], None]


def check_version(version: str) -> str | None:
    """Return a warning where mlx-lm is of a version that was not checked. Raises `EnvironmentFault` where a part that
    is needed is gone.
    """
    gone = [f"{owner.__name__}.{name}" for owner, names in PARTS.items() for name in names if not hasattr(owner, name)]
    known = " or ".join(f"{v}.x" for v in SUPPORTED)
    if gone:
        raise EnvironmentFault(
            f"mlx-lm {version}: it has no {', '.join(gone)}; `ds4convert serve` was made for {known}",
            hint=(f"Install one of those (pip install 'mlx-lm=={SUPPORTED[-1]}.*') or a newer ds4convert"),
        )
    if version.rpartition(".")[0] in SUPPORTED:
        return None
    return f"mlx-lm {version} was not checked with `ds4convert serve`, which was made for {known}; it may not work"


def keep_weights_wired() -> None:
    """Let a GPU keep the weights in memory, as mlx-lm's server does it."""
    from mlx_lm.utils import maybe_set_recommended_wired_limit

    maybe_set_recommended_wired_limit()  # type: ignore[no-untyped-call,unused-ignore]


class ClientGone(Exception):
    """The client left; nobody waits for the rest."""


class Ticket(Queue[Any]):
    """What a request waits on: context, then pieces and progress, then a finish reason; or an exception. `gone` tells
    the decoder that nobody waits any more.
    """

    def __init__(self) -> None:
        super().__init__()
        self.gone = threading.Event()
        self.born = time.perf_counter()


@dataclass
class Context:
    """What is known of a generation once its prompt is read: size, what the cache had of it, the first state."""

    prompt_tokens: int
    cached_tokens: int
    state: str
    mtp_active: bool
    stats: DecodeStats = field(default_factory=DecodeStats)


@dataclass(frozen=True)
class Job:
    """One prompt of a request. `prompt` None: its messages."""

    ticket: Ticket
    asked: Asked
    prompt: Prompt | None


def marks_of(tokenizer: Any) -> Marks:
    """Return the marks in a reply: DeepSeek-V4's tool calls, which mlx-lm does not know, or those that it knows."""
    start, end = (tokenizer.think_start, tokenizer.think_end) if tokenizer.has_thinking else (None, None)
    parser = tokenizer.tool_parser if tokenizer.has_tool_calling else None
    if parser is None:
        is_ours = not tokenizer.has_chat_template or chat.DSML in (tokenizer.chat_template or "")
        return Marks(start, end, parse=chat.read_calls if is_ours else None, is_dsml=is_ours)

    def parse(text: str) -> list[JSON]:
        found = parser(text, None)
        calls = found if isinstance(found, list) else [found]
        return [{"name": c["name"], "arguments": json.dumps(c["arguments"], ensure_ascii=False)} for c in calls]

    return Marks(start, end, tokenizer.tool_call_start, tokenizer.tool_call_end, parse)


@dataclass(frozen=True)
class Run:
    """What one reply counts into, whom it tells how far its prompt is read, its most tokens, and what it keeps to."""

    stats: DecodeStats
    progress: Progress
    most: int
    kept: Sequence[Any] = ()


class Decoder:
    """The generation thread: decodes one request at a time, with the head where `draft_depth` is not 0."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        draft_depth: int,
        context: int,
        cache_size: int,
        metrics: Metrics,
        confidence: float = 0.0,
    ) -> None:
        self.model, self.tokenizer, self.confidence = model, tokenizer, confidence
        self.draft_depth, self.context, self.metrics = draft_depth, context, metrics
        self.marks, self.longest_token = marks_of(tokenizer), prompting.longest_token(tokenizer)
        self.token_bytes = byte_reader(tokenizer)
        self.is_byte_level = isinstance(tokenizer.detokenizer, BPEStreamingDetokenizer)
        self.grammars = Grammars(tokenizer, model.args.vocab_size)
        self.requests: Queue[Job] = Queue()
        self.prompt_cache = LRUPromptCache(cache_size)  # type: ignore[no-untyped-call,unused-ignore]
        self._stop, self._abort = threading.Event(), threading.Event()
        self.thread = threading.Thread(target=self._run, name="generation")
        self.thread.start()

    @property
    def is_healthy(self) -> bool:
        """Whether requests can be decoded."""
        return self.thread.is_alive()

    def abort(self) -> None:
        """End what runs at its next token, and refuse what waits."""
        self._abort.set()

    def stop_and_join(self) -> None:
        """End the thread, at the next token where something runs."""
        self._abort.set()
        self._stop.set()
        self.thread.join()

    def _run(self) -> None:
        stream = mx.default_stream(mx.default_device())
        try:
            while not self._stop.is_set():
                with contextlib.suppress(Empty):
                    self._serve(self.requests.get(timeout=0.1), stream)
        finally:
            del self.prompt_cache
            gc.collect()
            mx.clear_streams()  # threads of MLX that outlive this one abort the process when it ends

    def _serve(self, job: Job, stream: Any) -> None:
        ticket = job.ticket
        self.metrics.queue(waiting=-1, running=1)
        self.metrics.time("queue_seconds", time.perf_counter() - ticket.born)
        try:
            self._check(ticket)
            ticket.put(self._decode(job, stream))
        except ClientGone:
            ticket.put("stop")
        except Refused as e:
            if e.status == 500:
                _log(e.__cause__ or e)
            ticket.put(e)
        except BaseException as e:  # whatever a library throws, panics included, ends this request and no other
            _log(e)
            ticket.put(Refused(500, f"the generation failed ({type(e).__name__}); the server's log says more"))
        finally:
            self.metrics.queue(running=-1)

    def _check(self, ticket: Ticket) -> None:
        if ticket.gone.is_set():
            raise ClientGone
        if self._abort.is_set():
            raise Refused(503, DRAINED, code="draining")

    def _too_long(self, job: Job, tokens: str) -> Refused:
        return Refused(
            400,
            f"this model's maximum context length is {self.context:,} tokens, and the prompt has {tokens}; shorten it",
            "messages" if job.prompt is None else "prompt",
            "context_length_exceeded",
        )

    def _decode(self, job: Job, stream: Any) -> str:
        """Decode one prompt; returns the finish reason."""
        ticket, asked = job.ticket, job.asked
        if (fewest := prompting.fewest_tokens(asked, job.prompt, self.longest_token)) >= self.context:
            raise self._too_long(job, f"{fewest:,} or more")
        found = prompting.encode(self.tokenizer, asked, job.prompt, self.model.args.vocab_size)
        prompt, room = found.tokens, self.context - len(found.tokens)
        if room < 1:
            raise self._too_long(job, f"{len(prompt):,}")
        matcher = None if asked.schema is None else self.grammars.of(asked.schema)
        most = min(asked.max_tokens, room)
        cache, covered = self._cached(prompt)
        ctx = Context(len(prompt), covered, found.state, self._drafts(asked))
        self.metrics.add("prompt_tokens_total", len(prompt))
        self.metrics.add("cached_tokens_total", covered)
        ticket.put(ctx)

        def progress(done: int, total: int) -> None:
            self._check(ticket)
            ticket.put((done, total))

        covered = self._fill(found, cache, covered, progress)
        if asked.seed is not None:
            mx.random.seed(asked.seed % 2**64)
        kept = [] if matcher is None else [self._kept(matcher, len(prompt) - covered, found.state)]
        run = Run(ctx.stats, progress, most, kept)
        steps = self._steps(prompt[covered:], asked, self.tokenizer, cache, stream, run)
        try:
            said, reason = self._say(ticket, steps, asked, most)
        finally:
            self.metrics.generation(ctx.stats)
        if self._drafts(asked) or not self.draft_depth:  # else the head knows nothing of the reply
            self.prompt_cache.insert_cache(MODEL_KEY, prompt + said, cache)  # type: ignore[no-untyped-call,unused-ignore]
        return reason

    def _kept(self, matcher: Any, start: int, state: str) -> Kept:
        """Return what keeps a reply to a grammar; behind the reasoning, where it begins with that."""
        if state != REASONING:
            return Kept(matcher, start)
        opens = self.tokenizer.encode(self.marks.think_end, add_special_tokens=False)
        return Kept(matcher, start, list(opens), sorted(self.tokenizer.eos_token_ids))

    def _cached(self, prompt: list[int]) -> tuple[list[Any], int]:
        """Return state for the longest known beginning of the prompt, and its length; at least one token is left."""
        cache, rest = self.prompt_cache.fetch_nearest_cache(MODEL_KEY, prompt)  # type: ignore[no-untyped-call,unused-ignore]
        if cache is not None:
            covered = level_cache(self.model, cache, min(len(prompt) - len(rest), len(prompt) - 1))
            if covered:
                return cache, covered
        return self.model.make_cache() + (self.model.make_mtp_cache() if self.draft_depth else []), 0

    def _fill(self, found: Encoded, cache: list[Any], covered: int, progress: Progress) -> int:
        """Feed all segments but the last, and keep the state at the end of each.

        A prompt of one segment is kept but for its last token: the state after a long reply cannot be taken back to it.
        """
        end, prompt, segments, kinds = 0, found.tokens, found.segments, found.kinds
        if len(segments) == 1 and len(prompt) > 1:
            segments, kinds = [prompt[:-1], prompt[-1:]], ["user", "assistant"]
        for segment, kind in zip(segments[:-1], kinds, strict=False):
            end += len(segment)
            if end > covered:
                fill_cache(
                    prompt[covered:end],
                    self.model,
                    cache,
                    prefill_step_size=PREFILL_STEP,
                    prompt_progress_callback=progress,
                )
                covered = end
                kept = copy.deepcopy(cache)
                self.prompt_cache.insert_cache(MODEL_KEY, prompt[:end], kept, cache_type=kind)  # type: ignore[no-untyped-call,unused-ignore]
        return covered

    def _steps(
        self,
        rest: list[int],
        asked: Asked,
        tokenizer: Any,
        cache: list[Any],
        stream: Any,
        run: Run,
    ) -> Any:
        """Return the generator of the run's tokens. With the sampler of mlx-lm that has no distribution of its own
        (XTC), a draft is accepted when it equals the token that is drawn.
        """
        options: dict[str, Any] = {
            "max_tokens": run.most,
            "prompt_cache": cache,
            "prefill_step_size": PREFILL_STEP,
            "prompt_progress_callback": run.progress,
            "logits_processors": [*_processors(asked), *run.kept],
            "stats": run.stats,
        } | _drawing(asked, tokenizer)
        tokens = mx.array(rest)
        if self._drafts(asked):
            options |= {"draft_depth": self.draft_depth, "confidence": self.confidence}
            return mtp_generate_step(tokens, self.model, stream, **options)
        options["prompt_cache"] = cache[: len(self.model.make_cache())]
        return plain_generate_step(tokens, self.model, stream, **options)

    def _drafts(self, asked: Asked) -> bool:
        """Return whether a request is decoded with the head."""
        return self.draft_depth > 0 and asked.mtp

    def _say(self, ticket: Ticket, steps: Any, asked: Asked, most: int) -> tuple[list[int], str]:
        """Put pieces on the ticket until an end; returns the tokens that were drawn, which the cache now covers, and
        why they ended.
        """
        said: list[int] = []
        ends, stop = self.tokenizer.eos_token_ids, StopText(list(asked.stop))
        text_of = _byte_texts(self.token_bytes) if self.is_byte_level else _texts(self.tokenizer.detokenizer)
        reason = "length"
        with contextlib.closing(steps):
            for token, logprobs, drafted in steps:
                said.append(token)
                if len(said) == 1:
                    self.metrics.time("first_token_seconds", time.perf_counter() - ticket.born)
                self._check_saying(ticket)
                is_end, is_last = token in ends, len(said) == most
                text = text_of(token, is_end, is_last)
                top = _likeliest(logprobs, asked.top_logprobs)
                if asked.logprobs:  # the tokenizer is asked in this thread only: it cannot be shared
                    for known in (token, *(t for t, _ in top)):
                        self.token_bytes(known)
                for piece in stop.push(Piece(text, token, logprobs[token].item(), top, drafted, not is_end)):
                    ticket.put(piece)
                if is_end or stop.is_found:
                    reason = "stop"
                if is_end or stop.is_found or is_last or ticket.gone.is_set():
                    break
        for piece in stop.rest():
            ticket.put(piece)
        return said, reason

    def _check_saying(self, ticket: Ticket) -> None:
        """Raise `Refused` when the time for draining is over. A client that left is no error: what was said is kept."""
        if self._abort.is_set() and not ticket.gone.is_set():
            raise Refused(503, DRAINED, code="draining")


def _log(error: BaseException) -> None:
    """Tell of a failure in one line; its traceback with -vv."""
    LOG.error("a generation failed: %s: %s", type(error).__name__, str(error)[:500].encode("unicode_escape").decode())
    LOG.debug("where", exc_info=error)


def _byte_texts(token_bytes: TokenBytes) -> Callable[[int, bool, bool], str]:
    """Return the texts of tokens from their bytes, as `_texts` does."""
    found = Detokenizer(token_bytes)

    def text_of(token: int, is_end: bool, is_last: bool) -> str:
        return ("" if is_end else found.add(token)) + (found.end() if is_end or is_last else "")

    return text_of


def _texts(detokenizer: Any) -> Callable[[int, bool, bool], str]:
    """Return a function from a token to the text that it adds, by mlx-lm's detokenizer. An end token has no text."""

    def text_of(token: int, is_end: bool, is_last: bool) -> str:
        if not is_end:
            detokenizer.add_token(token)
        if is_end or is_last:
            detokenizer.finalize()
        return str(detokenizer.last_segment)

    return text_of


def _processors(asked: Asked) -> list[Any]:
    """Return what changes logits before a token is drawn.

    A penalty on the last 0 tokens is none; mlx-lm would take all tokens.
    """
    options: list[Any] = []
    for kind in ("repetition", "presence", "frequency"):
        size = int(asked.numbers[f"{kind}_context_size"])
        options += [asked.numbers[f"{kind}_penalty"] if size else 0.0, size]
    found: list[Any] = make_logits_processors(dict(asked.logit_bias) or None, *options)
    return found


def _drawing(asked: Asked, tokenizer: Any) -> dict[str, Any]:
    """Return how tokens are drawn, as options of the decoding loops."""
    n = asked.numbers
    if n["xtc_probability"] <= 0:
        sampling = Sampling(temp=n["temperature"], top_p=n["top_p"], min_p=n["min_p"], top_k=int(n["top_k"]))
        return {"sampling": sampling}
    return {
        "sampler": make_sampler(
            n["temperature"],
            top_p=n["top_p"],
            top_k=int(n["top_k"]),
            min_p=n["min_p"],
            xtc_probability=float(n["xtc_probability"]),
            xtc_threshold=float(n["xtc_threshold"]),
            xtc_special_tokens=[*tokenizer.encode("\n"), *tokenizer.eos_token_ids],
        )
    }


def _likeliest(logprobs: mx.array, count: int) -> tuple[tuple[int, float], ...]:
    """Return the `count` likeliest tokens of [V] with their log-probabilities, the likeliest first."""
    count = min(count, logprobs.shape[0])
    if count <= 0:
        return ()
    places: list[int] = mx.argpartition(-logprobs, kth=count - 1)[:count].tolist()  # type: ignore[assignment]
    values: list[float] = logprobs[mx.array(places)].tolist()  # type: ignore[assignment]
    pairs = ((place, value) for place, value in zip(places, values, strict=True) if value > -math.inf)
    return tuple(sorted(pairs, key=lambda x: (-x[1], x[0])))
