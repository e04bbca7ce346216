"""`load`: a converted model that continues prompts, with its head where it has one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict, Unpack

from ds4convert.api.opening import Place, local
from ds4convert.api.reporting import Listener, MessageCallback, document
from ds4convert.api.values import PathLike
from ds4convert.checkpoint import advice
from ds4convert.checkpoint.types import JSON
from ds4convert.errors import UsageError
from ds4convert.generation import generate as generation
from ds4convert.generation.open_folder import check_memory, head_reason, read_tokenizer

if TYPE_CHECKING:
    from ds4convert.inference.deepseek_v4.model import Model

USUAL_CONTEXT = 4096
"""Tokens whose state is counted when a model is loaded: nobody has said yet how many it will be."""
Prompt = str | Sequence[int]


class GenerateChoices(TypedDict, total=False):
    """The options of `generate` and `stream`; each is the option of the same name of the command `generate`."""

    mtp: bool | None
    draft_depth: int | None
    confidence: float
    temp: float
    top_p: float
    top_k: int
    min_p: float
    seed: int | None
    max_tokens: int
    chat: bool | None
    thinking: bool
    system: str | None


@dataclass(frozen=True)
class Token:
    """A token as it comes: its id, the text that it completes (often "" for a part of a character), who drew it.

    `id` is None for the text that is left at the end.
    """

    id: int | None
    text: str
    drafted: bool


@dataclass(frozen=True)
class Generated:
    """What a model said: the text ("" where the prompt was of ids), the new ids, and how the head fared."""

    facts: Mapping[str, Any] = field(repr=False)

    @property
    def text(self) -> str:
        """Return the new text."""
        return str(self.facts["text"])

    @property
    def tokens(self) -> tuple[int, ...]:
        """Return the new token ids, the one that ended the text included."""
        return tuple(self.facts["tokens"])

    @property
    def acceptance(self) -> float | None:
        """Return the share of drafts that the backbone accepted, None where nothing was drafted."""
        found = self.facts["acceptance"]
        return None if found is None else float(found)

    def as_json(self) -> JSON:
        """Return the document of `generate`."""
        return document(dict(self.facts))


class LoadedModel:
    """A converted model in memory. Made by `load`."""

    def __init__(
        self, small: generation.SmallFiles, model: Model, dtype: str, drafter: Path | None, reason: str | None
    ) -> None:
        self._small, self.model, self.dtype, self._drafter, self._reason = small, model, dtype, drafter, reason

    @property
    def folder(self) -> Path:
        """Return the folder that the model was loaded from."""
        return self._small.folder

    @property
    def head_kind(self) -> str:
        """Return `classic`, `dspark` or `none`: what drafts."""
        return str(self.model.head.kind) if self.has_head else "none"

    @property
    def has_head(self) -> bool:
        """Return whether the model has a head to draft with."""
        return self._reason is None

    @property
    def no_head_because(self) -> str | None:
        """Return why the model has no head, None where it has one."""
        return self._reason

    @cached_property
    def tokenizer(self) -> Any:
        """Return the tokenizer of the folder, as mlx-lm has it. Raises `InputError` where the folder has none."""
        return read_tokenizer(self.folder, self._small.stops)

    def generate(self, prompt: Prompt, **choices: Unpack[GenerateChoices]) -> Generated:
        """Continue a prompt, a text or token ids. With the head where there is one, unless `mtp` is false.

        A text is the user's message of a chat where the folder has a chat template, unless `chat` says otherwise.
        Raises `UsageError` for a prompt that does not fit the model.

        >>> import ds4convert as ds4
        >>> done = ds4.convert("checkpoint", "converted")
        >>> model = ds4.load("converted", dtype="float32")
        >>> model.generate([1, 2, 3], max_tokens=5).tokens == model.generate([1, 2, 3], max_tokens=5, mtp=False).tokens
        True
        """
        running = self._start(prompt, choices)
        for _ in running.steps():
            pass
        return Generated(running.facts())

    def stream(self, prompt: Prompt, **choices: Unpack[GenerateChoices]) -> Iterator[Token]:
        """Yield the tokens as they come; else as `generate`. What does not fit is refused here, before the first one.

        >>> import ds4convert as ds4
        >>> done = ds4.convert("checkpoint", "converted")
        >>> model = ds4.load("converted")
        >>> len([token.id for token in model.stream([1, 2, 3], max_tokens=4)])
        4
        """
        running = self._start(prompt, choices)
        return (Token(*step) for step in running.steps())

    def _start(self, prompt: Prompt, choices: GenerateChoices) -> generation.Generation:
        for name in choices:
            if name not in GenerateChoices.__annotations__:
                near = advice.did_you_mean(name, GenerateChoices.__annotations__)
                raise UsageError(f"{name}: is no option here{near}")
        text = prompt if isinstance(prompt, str) else None
        request = generation.Request(
            text, None if text is not None else _ids(prompt), drafter=None, dtype=self.dtype, **choices
        )
        asked = generation.ask(self._small, request, None if text is None else self.tokenizer)
        return generation.start(self.model, asked, self._reason)


def begin(
    folder: Place, prompt: str | None, ids: str | None, say: MessageCallback, **choices: Any
) -> generation.Generation:
    """Return a single generation that is ready to start, as the command `generate` needs it.

    The prompt (a text, or ids as `1,2,3`) is refused before the model is loaded; `load` has no prompt to refuse.
    """
    from ds4convert.inference.several.ranks import team, together

    listener, ranks = Listener(say=say), team()
    with together(ranks):
        numbers = None if ids is None else generation.parse_ids(ids)
        request = generation.Request(prompt, numbers, **choices)
        place = local(folder)
    running = generation.prepare(place, request, listener.warn, ranks)
    if running.text is not None:
        listener.detail(f"prompt: {running.text!r}")
    return running


def _ids(prompt: Prompt) -> tuple[int, ...]:
    ids = tuple(prompt)
    if not all(type(i) is int and i >= 0 for i in ids):
        raise UsageError("the prompt: expected a text, or a list of token ids such as [1, 2, 3]")
    return ids  # type: ignore[return-value]


def load(
    folder: Place, *, dtype: Literal["float32", "bfloat16"] = "bfloat16", drafter: PathLike | None = None,
    say: MessageCallback | None = None,
) -> LoadedModel:  # fmt: skip
    """Load a converted folder, of any program that `relayout` reads, for decoding; with its head where it has one.

    `drafter` is a folder with a head that lies elsewhere. `say` is told when memory is short, and whose head is run.
    Raises `InputError` for a folder that is no whole conversion.

    >>> import ds4convert as ds4
    >>> done = ds4.convert("checkpoint", "converted")
    >>> model = ds4.load("converted")
    >>> model.head_kind, model.has_head
    ('classic', True)
    """
    from ds4convert.inference import load as loading

    if dtype not in ("float32", "bfloat16"):
        raise UsageError(f"--dtype {dtype!r}: expected float32 or bfloat16")
    listener, base = Listener(say=say), local(folder)
    other = None if drafter is None else Path(drafter)
    small = generation.read_folder(base, other)
    context = min(USUAL_CONTEXT, small.args.max_position_embeddings)
    check_memory(base, context, dtype, listener.warn, other)
    model, _ = loading.load_model(base, dtype=dtype, require_manifest=False, drafter=other)
    reason = head_reason(base, model, small.record, None, other, listener.warn)
    return LoadedModel(small, model, dtype, other, reason)
