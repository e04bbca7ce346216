"""Texts to token ids and back: the tokenizer of a folder, its start token, and the ids that end a text.

One rule of each for every command. The start token is added as mlx-lm does it: by the tokenizer, unless the text begins
with it (mlx_lm/generate.py, `add_special_tokens`). The end tokens are those of generation_config.json, else of
config.json, and the tokenizer's own (mlx_lm/utils.py, `load_config`; mlx_lm/tokenizer_utils.py, `TokenizerWrapper`).

The tokenizer library is Rust: what it does not expect is a panic, which reaches Python as a BaseException that
`except Exception` does not catch (PyO3's guide, "Panics"). Every call of it goes through `_Guarded`, so that callers
see an InputError that names the file. No code of a folder is run: `trust_remote_code` stays off.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ds4convert.checkpoint import advice
from ds4convert.checkpoint.folder import CONFIG_NAME
from ds4convert.errors import InputError
from ds4convert.inference import chat_templates
from ds4convert.storage import strict_json
from ds4convert.storage.safe_open import read_small
from ds4convert.words.terminal import show

TOKENIZER = "tokenizer.json"
GENERATION = "generation_config.json"
READ_AS_JSON = (CONFIG_NAME, TOKENIZER, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
READ_AS_TEXT = ("chat_template.jinja", "chat_template.json", "tokenizer.model", "vocab.json", "merges.txt", "vocab.txt")
"""What the tokenizer libraries look for in a folder, beside folders of templates, which are refused."""

MAX_TOKENIZER_BYTES = 64_000_000
"""Eight times the tokenizer.json of DeepSeek-V4."""

PROBE = "In 1 é\n漢"


def stop_tokens(folder: Path, config: dict[str, Any]) -> frozenset[int]:
    """Ids that end a text: those of generation_config.json, else of config.json. InputError on what is no id."""
    stated = None
    where = GENERATION
    if os.path.lexists(folder / GENERATION):
        table = strict_json.loads(read_small(folder, GENERATION), str(folder / GENERATION))
        if not isinstance(table, dict):
            raise InputError(f"{folder / GENERATION}: expected a JSON object, found {type(table).__name__}")
        stated = table.get("eos_token_id")
    if stated is None or stated == []:
        where, stated = CONFIG_NAME, config.get("eos_token_id")
    ids = stated if isinstance(stated, list) else [] if stated is None else [stated]
    if not all(type(i) is int and i >= 0 for i in ids):
        raise InputError(
            f"{folder / where}: eos_token_id: expected a token id or a list of them, found {show(repr(stated))}"
        )
    return frozenset(ids)


def read_tokenizer(folder: Path, stops: frozenset[int] = frozenset()) -> Any:
    """mlx-lm's tokenizer of a folder; its `eos_token_ids` are `stops` and its own. Runs no code of the folder.

    Raises InputError where a file of it is missing, cannot be read, leads out of the folder, or breaks the library.
    """
    if not os.path.lexists(folder / TOKENIZER):
        other = ", or give --prompt-ids" if advice.offers("--prompt-ids") else ""
        raise InputError(f"{folder}: no {TOKENIZER}", hint=f"copy it from the source{other}")
    try:
        os.fspath(folder.absolute()).encode()
    except UnicodeEncodeError:
        raise InputError(
            f"{folder}: the name of this folder (or of one above it) is no UTF-8 text, "
            "which the libraries that read the tokenizer need",
            hint="rename it, or link to it under another name from elsewhere",
        ) from None
    _check_files(folder)
    from mlx_lm.tokenizer_utils import load

    with _refusing(folder), _silent():
        tokenizer = load(folder, {"trust_remote_code": False}, eos_token_ids=sorted(stops))
        inner = tokenizer._tokenizer
        if getattr(inner, "_tokenizer", None) is not None:
            inner._tokenizer = _Guarded(inner._tokenizer, folder / TOKENIZER)
        inner.decode(encode(tokenizer, PROBE))
    if isinstance(tokenizer.chat_template, str):
        chat_templates.check(tokenizer.chat_template, str(folder))
    if not all(type(i) is int for i in tokenizer.eos_token_ids):
        raise InputError(
            f"{folder / TOKENIZER}: its end token is no token id", hint="copy the source's tokenizer files"
        )
    return tokenizer


def compressed_ids(folder: Path) -> list[int]:
    """The number of every token among the texts that tokens reduce to, by which engram tables are read.

    Raises InputError where the folder has no tokenizer.json, or one that cannot be read.
    """
    if not os.path.lexists(folder / TOKENIZER):
        raise InputError(f"{folder}: no {TOKENIZER}, and the engram tables are read by it; copy it from the source")
    from ds4convert.inference.deepseek_v41 import ngrams

    text = read_small(folder, TOKENIZER, MAX_TOKENIZER_BYTES).decode("utf-8", "replace")
    with _refusing(folder), _silent():
        return ngrams.token_map(text)


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text, the start token first where the tokenizer has one and the text does not begin with it."""
    starts = tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)
    ids: list[int] = tokenizer.encode(text, add_special_tokens=not starts)
    return ids


def _check_files(folder: Path) -> None:
    """Refuse files that are no plain, bounded files of the folder, before a library opens them."""
    for name in READ_AS_JSON:
        if os.path.lexists(folder / name):
            strict_json.loads(read_small(folder, name, MAX_TOKENIZER_BYTES), str(folder / name))
    for name in READ_AS_TEXT:
        if os.path.lexists(folder / name):
            read_small(folder, name, MAX_TOKENIZER_BYTES)
    if os.path.lexists(folder / "additional_chat_templates"):
        raise InputError(
            f"{folder}: additional_chat_templates: only one chat template is read", hint="remove that folder"
        )


def is_panic(error: BaseException) -> bool:
    """Whether an error is a panic of a Rust library."""
    return type(error).__name__ == "PanicException" and not isinstance(error, Exception)


@contextlib.contextmanager
def _refusing(folder: Path) -> Iterator[None]:
    """Turn whatever a tokenizer library raises into an InputError."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        why = show(f"{type(error).__name__}: {error}", 400)
    except BaseException as error:
        if not is_panic(error):
            raise
        why = f"the tokenizer library breaks on it: {show(str(error), 200)}"
    else:
        return
    raise InputError(
        f"{folder / TOKENIZER}: the tokenizer cannot be read: {why}", hint="copy the source's tokenizer files"
    )


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Keep what the library itself writes to standard output and error (unknown keys, a panic) from the user."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept, nothing = [(n, os.dup(n)) for n in (1, 2)], os.open(os.devnull, os.O_WRONLY)
    try:
        for number, _ in kept:
            os.dup2(nothing, number)
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, copy in kept:
            os.dup2(copy, number)
            os.close(copy)
        os.close(nothing)


class _Guarded:
    """The library's tokenizer; a panic of any of its calls is an InputError."""

    def __init__(self, inner: Any, path: Path) -> None:
        object.__setattr__(self, "_inner", inner)
        object.__setattr__(self, "_path", path)

    def __getattr__(self, name: str) -> Any:
        if name in {"_inner", "_path"}:  # of a copy that is being made
            raise AttributeError(name)
        found = _unpanicked(self._path, lambda: getattr(self._inner, name))
        if not callable(found) or name.startswith("__"):
            return found

        def call(*args: Any, **options: Any) -> Any:
            return _unpanicked(self._path, lambda: found(*args, **options))

        return call

    def __setattr__(self, name: str, value: Any) -> None:
        _unpanicked(self._path, lambda: setattr(self._inner, name, value))

    def __reduce__(self) -> Any:
        return _Guarded, (self._inner, self._path)


def _unpanicked(path: Path, call: Callable[[], Any]) -> Any:
    try:
        return call()
    except BaseException as error:
        if not is_panic(error):
            raise
        raise InputError(f"{path}: the tokenizer library breaks on this text: {show(str(error), 200)}") from None
