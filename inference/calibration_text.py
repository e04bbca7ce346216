"""Texts to the rows of tokens that a model is calibrated on: spread over all of the texts, each begun as a text begins.

How many texts the rows come from matters more than how many rows there are, so rows are taken from everywhere, not
from the beginning. A row that begins within a text gets the start token too: models give it weight of its own.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ds4convert.errors import InputError
from ds4convert.inference import chat, tokens
from ds4convert.words.terminal import show

LINES = (".jsonl", ".ndjson")
"""Endings of files with a JSON object in each line."""

PLAIN = (".txt", ".md", *LINES)
"""Endings of the files of a folder that are read."""

ROW_TOKENS = 512
"""Tokens that are run together, unless told otherwise."""

GOLDEN = (math.sqrt(5) - 1) / 2
"""Steps of this part of a circle come near every place soon, however many are made."""

Document = Callable[[Any], str]
"""Makes the text of a document, given the tokenizer."""


@dataclass(frozen=True)
class Rows:
    """Rows of token ids, from `texts` texts that have `available` tokens in all."""

    ids: tuple[tuple[int, ...], ...]
    texts: int
    available: int

    @property
    def tokens(self) -> int:
        """Return the number of tokens of all rows."""
        return sum(map(len, self.ids))

    @property
    def digest(self) -> str:
        """Return the sha256 of the token ids of all rows."""
        return hashlib.sha256(json.dumps(self.ids).encode()).hexdigest()


def read(folder: Path, places: Sequence[Path], limit: int, length: int = ROW_TOKENS) -> Rows:
    """Return at most `limit` tokens in rows of `length` of the texts at `places`, with the tokenizer of `folder`.

    A place is a text file, a file of JSON lines with `text` or `messages`, or a folder of such files. Raises
    `InputError` for what cannot be read, and where there is not a single row.
    """
    tokenizer = tokens.read_tokenizer(folder)
    documents = [d for place in places for d in _documents(place)]
    ids = [tokens.encode(tokenizer, make(tokenizer)) for make in documents]
    start = tokenizer.bos_token_id
    found = [row for document in ids for row in _cut(document, length, start)]
    if not found:
        named = ", ".join(map(str, places))
        raise InputError(
            f"{named}: {sum(map(len, ids))} tokens; expected at least 2, some thousands for a good calibration"
        )
    return Rows(tuple(_spread(found, limit)), len(documents), sum(map(len, ids)))


def _cut(ids: list[int], length: int, start: int | None) -> Iterator[tuple[int, ...]]:
    """Yield the rows of a document, each with the start token in front where there is one."""
    if start is not None and ids[:1] == [start]:
        ids = ids[1:]
    begin = () if start is None else (start,)
    room = max(length - len(begin), 1)
    for first in range(0, len(ids), room):
        row = (*begin, *ids[first : first + room])
        if len(row) >= 2:
            yield row


def _spread(rows: list[tuple[int, ...]], limit: int) -> list[tuple[int, ...]]:
    """Return rows from everywhere, in their order, as many as fit into `limit` tokens; the last one cut short."""
    if sum(map(len, rows)) <= limit:
        return rows
    chosen: dict[int, tuple[int, ...]] = {}
    room = limit
    for n in sorted(range(len(rows)), key=lambda n: (n * GOLDEN) % 1):
        if room < 2:
            break
        chosen[n] = rows[n][:room]
        room -= len(chosen[n])
    return [chosen[n] for n in sorted(chosen)]


def _documents(place: Path) -> Iterator[Document]:
    """Yield the documents at a place. Raises `InputError` for what is no text."""
    if place.is_dir():
        files = sorted(p for p in place.rglob("*") if p.is_file() and p.suffix.lower() in PLAIN)
        if not files:
            raise InputError(f"{place}: holds no file that ends in {', '.join(PLAIN)}", hint="name a text file")
        for path in files:
            yield from _documents(path)
        return
    text = _text(place)
    if place.suffix.lower() in LINES:
        yield from (
            _from_line(line, f"{place}, line {n}") for n, line in enumerate(text.splitlines(), 1) if line.strip()
        )
    else:
        yield lambda tokenizer: text


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8-sig")
    except UnicodeDecodeError as e:
        raise InputError(f"{path}: not UTF-8 text: {e}; save it as UTF-8") from None
    except OSError as e:
        raise InputError(f"{path}: cannot be read: {e.strerror}") from None


def _from_line(line: str, where: str) -> Document:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as e:
        raise InputError(f"{where}: not valid JSON: {e}") from None
    if isinstance(found, dict) and isinstance(found.get("text"), str):
        text: str = found["text"]
        return lambda tokenizer: text
    messages = found.get("messages") if isinstance(found, dict) else None
    if isinstance(messages, list) and messages and all(isinstance(m, dict) for m in messages):
        return lambda tokenizer: _conversation(tokenizer, messages, where)
    raise InputError(f'{where}: expected an object with "text" (a text) or "messages" (a list of objects)')


def _conversation(tokenizer: Any, messages: list[dict[str, Any]], where: str) -> str:
    """Return messages as the folder's chat template writes them, or as DeepSeek-V4's does where it has none."""
    try:
        if tokenizer.has_chat_template:
            return str(tokenizer.apply_chat_template(messages, tokenize=False))
        return chat.render(messages, add_generation_prompt=False)
    except Exception as e:
        raise InputError(f"{where}: the chat template does not take these messages: {show(str(e), 400)}") from None
