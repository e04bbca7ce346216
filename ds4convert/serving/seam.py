"""The seam to mlx-lm's server: everything of it that is replaced, in one place.

mlx_lm.server brings the HTTP handler, the chat template with its segments, stop sequences, reasoning and tool texts,
and the prompt cache. Three things are ours: the model (`Provider`), the loop that decodes a request (`Decoder`, in
place of mlx-lm's `_serve_single`), and how a request waits for it (`Ticket`).

tests/serve/test_seam.py pins what is relied on. WHEN A NEWER MLX-LM MOVES IT: compare `_serve_single`, `generate` and
`_tokenize` of mlx_lm/server.py with those of a version in SUPPORTED, carry over what changed, run tests/serve, then
add the version to SUPPORTED and its digests to the test.
"""

# mlx-lm's server carries few types, so these checks would only repeat that.
# mypy: disable-error-code="no-untyped-call,no-untyped-def,misc"

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import logging
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from queue import Queue
from typing import Any

import mlx.core as mx
from mlx_lm import server as base
from mlx_lm.models.cache import LRUPromptCache
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ds4convert.errors import EnvironmentFault, InputError
from ds4convert.inference import chat
from ds4convert.inference.decode import (
    DecodeStats,
    fill_cache,
    level_cache,
    mtp_generate_step,
    plain_generate_step,
)
from ds4convert.inference.sampling import Sampling
from ds4convert.serving.metrics import Metrics
from ds4convert.serving.validation import Refused

SUPPORTED = ("0.32",)
"""Versions of mlx-lm that the seam was checked against."""

PARTS = {
    base.ResponseGenerator: ("_tokenize", "_make_state_machine", "_serve_single", "_is_batchable", "stop_and_join"),
    base.APIHandler: ("do_POST", "generate_response", "completion_usage_response", "handle_completion"),
    base.ModelProvider: ("load", "load_default", "reset"),
    LRUPromptCache: ("fetch_nearest_cache", "insert_cache"),
}
"""What is called or replaced."""

MODEL_KEY = ("model", None, None)
PREFILL_STEP = 512


def check_version(version: str) -> str | None:
    """Return a warning where mlx-lm is of a version that was not checked. Raises `EnvironmentFault` where a part that
    is needed is gone.
    """
    gone = [f"{owner.__name__}.{name}" for owner, names in PARTS.items() for name in names if not hasattr(owner, name)]
    known = " or ".join(f"{v}.x" for v in SUPPORTED)
    if gone:
        raise EnvironmentFault(
            f"mlx-lm {version}: its server has no {', '.join(gone)}; `ds4convert serve` was made for {known}. "
            f"Install one of those (pip install 'mlx-lm=={SUPPORTED[-1]}.*') or a newer ds4convert"
        )
    if version.rpartition(".")[0] in SUPPORTED:
        return None
    return f"mlx-lm {version} was not checked with `ds4convert serve`, which was made for {known}; it may not work"


class ClientGone(Exception):
    """The client left; nobody waits for the rest."""


class Ticket(Queue[Any]):
    """What a request waits on: context, then pieces, then None; `gone` tells the decoder that nobody does any more."""

    def __init__(self) -> None:
        super().__init__()
        self.gone = threading.Event()
        self.born = time.perf_counter()


@dataclass
class Piece(base.Response):
    """One token's text, and whether the head drafted it. `whole` is False for the rest of a token told before."""

    drafted: bool = False
    whole: bool = True


@dataclass
class Context(base.GenerationContext):
    """mlx-lm's context of a generation, and the figures of ours."""

    stats: DecodeStats = field(default_factory=DecodeStats)
    mtp_active: bool = False


class Provider(base.ModelProvider):
    """The one model, loaded by ds4convert before the server starts; a request cannot load another."""

    model: Any
    tokenizer: Any
    model_key: Any

    def __init__(self, model: Any, tokenizer: Any, cli_args: argparse.Namespace) -> None:
        super().__init__(cli_args)
        self.model, self.tokenizer, self.model_key = model, tokenizer, MODEL_KEY

    def load(self, *_: Any) -> tuple[Any, Any]:
        """Return the model and the tokenizer."""
        return self.model, self.tokenizer

    def load_default(self) -> None:
        """Do nothing: the model is there."""


def server_args(folder: Path, max_tokens: int, sampling: dict[str, float], cache_size: int) -> argparse.Namespace:
    """Return mlx-lm's options, those of its own parser that its server reads."""
    return argparse.Namespace(
        model=str(folder), adapter_path=None, draft_model=None, trust_remote_code=False, chat_template="",
        use_default_chat_template=False, pipeline=False, allowed_origins=[], num_draft_tokens=0,
        max_tokens=max_tokens, chat_template_args={}, decode_concurrency=1, prompt_concurrency=1,
        prefill_step_size=PREFILL_STEP, prompt_cache_size=cache_size, prompt_cache_bytes=None, kv_bits=None,
        kv_group_size=64, quantized_kv_start=0, log_level="WARNING", **sampling,
    )  # fmt: skip


def with_tools(tokenizer: Any) -> Any:
    """Return the tokenizer with the tool calls of DeepSeek-V4, which mlx-lm does not know, where it has no others."""
    if tokenizer.has_tool_calling or not tokenizer.has_chat_template or chat.DSML not in tokenizer.chat_template:
        return tokenizer
    return TokenizerWrapper(
        tokenizer._tokenizer,
        lambda _: tokenizer.detokenizer,
        eos_token_ids=sorted(tokenizer.eos_token_ids),
        tool_parser=parse_calls,
        tool_call_start=chat.CALLS_START.lstrip() + ">",
        tool_call_end=chat.CALLS_END,
    )


def parse_calls(text: str, tools: Any = None) -> list[dict[str, Any]]:
    """Return the calls in the text of a block. Raises ValueError where it is not one, as mlx-lm's parsers do."""
    try:
        reply = chat.parse_reply(f"{chat.CALLS_START}>\n{text.strip()}\n{chat.CALLS_END}{chat.EOS}", "chat")
    except InputError as e:
        raise ValueError(str(e)) from None
    calls = [call["function"] for call in reply["tool_calls"]]
    return [{"name": c["name"], "arguments": json.loads(c["arguments"])} for c in calls]


class Decoder(base.ResponseGenerator):
    """mlx-lm's generation thread, decoding one request at a time with the head where there is one.

    `draft_depth` 0 decodes plainly.
    """

    model_provider: Any

    def __init__(self, provider: Provider, draft_depth: int, context: int, metrics: Metrics) -> None:
        self.draft_depth, self.context, self.metrics = draft_depth, context, metrics
        super().__init__(provider, LRUPromptCache(provider.cli_args.prompt_cache_size))

    def _is_batchable(self, args: Any) -> bool:
        return False

    def _generate(self) -> None:
        try:
            super()._generate()
        finally:
            mx.clear_streams()  # threads of MLX that outlive this one abort the process when it ends

    def _serve_single(self, request: Any, stream: Any) -> None:
        ticket, asked, args = request
        self.metrics.queue(waiting=-1, running=1)
        self.metrics.time("queue_seconds", time.perf_counter() - ticket.born)
        try:
            if not ticket.gone.is_set():
                self._decode(ticket, asked, args, stream)
            ticket.put(None)
        except ClientGone:
            ticket.put(None)
        except Exception as e:
            if not isinstance(e, Refused):
                logging.exception("a generation failed")
            ticket.put(e)
        finally:
            self.metrics.queue(running=-1)

    def _decode(self, ticket: Ticket, asked: Any, args: Any, stream: Any) -> None:
        tokenizer = self.model_provider.tokenizer
        prompt, segments, kinds, stops, text_sm, initial = self._prompt(tokenizer, asked, args)
        cache, covered = self._cached(prompt)
        ctx = Context(
            has_thinking=tokenizer.has_thinking,
            has_tool_calling=tokenizer.has_tool_calling,
            tool_parser=tokenizer.tool_parser,
            text_sm=text_sm,
            initial_state=initial,
            prompt=prompt,
            prompt_cache_count=covered,
            mtp_active=self.draft_depth > 0,
        )
        self.metrics.add("prompt_tokens_total", len(prompt))
        self.metrics.add("cached_tokens_total", covered)
        ticket.put(ctx)

        def progress(done: int, total: int) -> None:
            if ticket.gone.is_set():
                raise ClientGone
            ticket.put((done, total))

        covered = self._fill(prompt, segments, kinds, cache, covered, progress)
        if args.seed is not None:
            mx.random.seed(args.seed % 2**64)
        steps = self._steps(prompt[covered:], args, tokenizer, cache, stream, ctx.stats, progress)
        try:
            said = self._say(ticket, ctx, steps, args, tokenizer, stops.matcher())
        finally:
            self.metrics.generation(ctx.stats)
        self.prompt_cache.insert_cache(MODEL_KEY, prompt + said, cache)

    def _prompt(self, tokenizer: Any, asked: Any, args: Any) -> tuple[Any, ...]:
        """Return the prompt's tokens, their segments and kinds, and the machines that watch the text."""
        try:
            prompt, segments, kinds, initial, _ = self._tokenize(tokenizer, asked, args)
            stops, text_sm = self._make_state_machine(MODEL_KEY, tokenizer, args.stop_words)
        except Exception as e:
            raise Refused(422, f"the messages cannot be encoded: {type(e).__name__}: {e}") from None
        size = self.model_provider.model.args.vocab_size
        if not prompt or max(prompt) >= size:
            raise Refused(422, f"the prompt: expected at least one token, and ids below {size:,}")
        if len(prompt) + args.max_tokens > self.context:
            raise Refused(
                422,
                f"the prompt has {len(prompt):,} tokens and {args.max_tokens:,} more are asked for; the model takes "
                f"{self.context:,} in all",
                code="context_length_exceeded",
            )
        bias = args.logits.logit_bias
        if bias and max(bias) >= size:
            raise Refused(422, f"logit_bias: expected token ids below {size:,}, found {max(bias)}", "logit_bias")
        return list(prompt), segments, kinds, stops, text_sm, initial

    def _cached(self, prompt: list[int]) -> tuple[list[Any], int]:
        """Return state for the longest known beginning of the prompt, and its length; at least one token is left."""
        model = self.model_provider.model
        cache, rest = self.prompt_cache.fetch_nearest_cache(MODEL_KEY, prompt)
        if cache is not None:
            covered = level_cache(model, cache, min(len(prompt) - len(rest), len(prompt) - 1))
            if covered:
                return cache, covered
        return model.make_cache() + (model.make_mtp_cache() if self.draft_depth else []), 0

    def _fill(
        self,
        prompt: list[int],
        segments: list[list[int]],
        kinds: list[str],
        cache: list[Any],
        covered: int,
        progress: Callable[[int, int], None],
    ) -> int:
        """Feed all segments but the last, and keep the state at the end of each, as mlx-lm does in a batch.

        A prompt of one segment is kept but for its last token: the state after a long reply cannot be taken back to it.
        """
        end = 0
        if len(segments) == 1 and len(prompt) > 1:
            segments, kinds = [prompt[:-1], prompt[-1:]], ["user", "assistant"]
        for segment, kind in zip(segments[:-1], kinds, strict=False):
            end += len(segment)
            if end > covered:
                fill_cache(
                    prompt[covered:end],
                    self.model_provider.model,
                    cache,
                    prefill_step_size=self.cli_args.prefill_step_size,
                    prompt_progress_callback=progress,
                )
                covered = end
                self.prompt_cache.insert_cache(MODEL_KEY, prompt[:end], copy.deepcopy(cache), cache_type=kind)
        return covered

    def _steps(
        self,
        rest: list[int],
        args: Any,
        tokenizer: Any,
        cache: list[Any],
        stream: Any,
        stats: DecodeStats,
        progress: Callable[[int, int], None],
    ) -> Any:
        """Return the generator of tokens. With the sampler of mlx-lm that has no distribution of its own (XTC), a
        draft is accepted when it equals the token that is drawn.
        """
        s = args.sampling
        options: dict[str, Any] = {
            "max_tokens": args.max_tokens,
            "prompt_cache": cache,
            "prefill_step_size": self.cli_args.prefill_step_size,
            "prompt_progress_callback": progress,
            "logits_processors": base._make_logits_processors(args),
            "stats": stats,
        }
        if s.xtc_probability > 0:
            options["sampler"] = base._make_sampler(args, tokenizer)
        else:
            options["sampling"] = Sampling(temp=s.temperature, top_p=s.top_p, min_p=s.min_p, top_k=s.top_k)
        model, tokens = self.model_provider.model, mx.array(rest)
        if self.draft_depth:
            return mtp_generate_step(tokens, model, stream, draft_depth=self.draft_depth, **options)
        return plain_generate_step(tokens, model, stream, **options)

    def _say(self, ticket: Ticket, ctx: Context, steps: Any, args: Any, tokenizer: Any, matcher: Any) -> list[int]:
        """Put pieces on the ticket until an end; returns the tokens that were drawn, which the cache now covers."""
        said: list[int] = []
        detokenizer, tail = tokenizer.detokenizer, StopText(args.stop_words)
        with contextlib.closing(steps):
            for token, logprobs, drafted in steps:
                said.append(token)
                if len(said) == 1:
                    self.metrics.time("first_token_seconds", time.perf_counter() - ticket.born)
                if ticket.gone.is_set() or ctx._should_stop:
                    break
                is_stop = matcher.advance(token) or token in tokenizer.eos_token_ids
                is_last = len(said) == args.max_tokens
                if token not in tokenizer.eos_token_ids:
                    detokenizer.add_token(token)
                if is_stop or is_last:
                    detokenizer.finalize()
                text = detokenizer.last_segment
                before = tail.find(text)
                reason = "stop" if is_stop or before is not None else "length" if is_last else None
                top = base._format_top_logprobs(logprobs, args.top_logprobs, tokenizer)
                piece = Piece(text, token, logprobs[token].item(), reason, top, drafted)
                for part in _parts(piece, before):
                    ticket.put(part)
                if reason is not None:
                    break
        return said


def _parts(piece: Piece, before: int | None) -> Iterator[Piece]:
    """Yield the piece; in two where a stop word begins in it, as mlx-lm drops the whole text of a last piece."""
    if before:
        yield Piece(piece.text[:before], piece.token, piece.logprob, None, piece.top_tokens, piece.drafted)
    yield Piece(
        piece.text, piece.token, piece.logprob, piece.finish_reason, piece.top_tokens, piece.drafted, not before
    )


class StopText:
    """Finds stop words in text that comes in pieces: mlx-lm compares tokens, and others can spell the same."""

    def __init__(self, words: list[str]) -> None:
        self.words, self.text = words, ""
        self.reach = max(map(len, words), default=1) - 1

    def find(self, piece: str) -> int | None:
        """Return where in `piece` the first stop word begins (0: before it, or at its start), or None."""
        kept = len(self.text)
        text = self.text + piece
        places = [at for at in (text.find(word) for word in self.words) if at >= 0]
        self.text = text[-self.reach :] if self.reach else ""
        return max(0, min(places) - kept) if places else None
