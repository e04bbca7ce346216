"""What the server relies on in mlx-lm, by behaviour. When one of these fails, ds4convert/serving/seam.py says what to do."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.models.cache import KVCache, LRUPromptCache
from mlx_lm.sample_utils import make_logits_processors, make_sampler
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ds4convert.errors import EnvironmentFault
from ds4convert.generation.open_folder import read_tokenizer
from ds4convert.serving import seam
from ds4convert.serving.http.responses import Detokenizer, byte_reader
from ds4convert.serving.validation import Asked

pytest.importorskip("mlx.core")


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    return read_tokenizer(folder, {1})


def state(tokens: int) -> list[Any]:
    cache = KVCache()
    cache.update_and_fetch(mx.ones((1, 1, tokens, 2)), mx.ones((1, 1, tokens, 2)))
    return [cache]


def test_this_version_of_mlx_lm_is_a_known_one() -> None:
    version = metadata.version("mlx-lm")
    assert version.rpartition(".")[0] in seam.SUPPORTED, f"mlx-lm {version}: see the head of ds4convert/serving/seam.py"


def test_an_unknown_version_is_told_and_a_missing_part_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert seam.check_version(metadata.version("mlx-lm")) is None
    assert "was not checked" in (seam.check_version("9.1.0") or "")
    monkeypatch.delattr(TokenizerWrapper, "rfind_think_start")
    with pytest.raises(EnvironmentFault, match=r"no TokenizerWrapper\.rfind_think_start; .*pip install"):
        seam.check_version("9.1.0")


def test_the_prompt_cache_gives_a_copy_of_the_longest_beginning() -> None:
    cache = LRUPromptCache(2)
    cache.insert_cache(seam.MODEL_KEY, [1, 2, 3], state(3), cache_type="user")
    for _ in range(2):  # what is handed out may be changed
        found, rest = cache.fetch_nearest_cache(seam.MODEL_KEY, [1, 2, 3, 4])
        assert found[0].offset == 3 and rest == [4]
        found[0].trim(2)
    found, rest = cache.fetch_nearest_cache(seam.MODEL_KEY, [1, 2, 9])
    assert (found[0].offset, rest) == (2, [9])
    assert cache.fetch_nearest_cache(seam.MODEL_KEY, [7])[0] is None
    for first in (5, 6, 7):
        cache.insert_cache(seam.MODEL_KEY, [first], state(1))
    assert cache.fetch_nearest_cache(seam.MODEL_KEY, [5])[0] is None, "the oldest is forgotten"


def test_processors_change_logits_as_their_fields_say() -> None:
    logits = mx.array([[1.0, 2.0, -1.0]])
    before = mx.array([0, 2, 2])
    for fields, wanted in (
        (({1: -5.0}, 0.0, 20, 0.0, 20, 0.0, 20), [1.0, -3.0, -1.0]),
        ((None, 2.0, 20, 0.0, 20, 0.0, 20), [0.5, 2.0, -2.0]),
        ((None, 0.0, 20, 0.5, 20, 0.0, 20), [0.5, 2.0, -1.5]),
        ((None, 0.0, 20, 0.0, 20, 0.5, 20), [0.5, 2.0, -2.0]),
        ((None, 0.0, 20, 0.0, 20, 0.0, 20), [1.0, 2.0, -1.0]),
    ):
        row = mx.array(logits)
        for processor in make_logits_processors(*fields):
            row = processor(before, row)
        assert row[0].tolist() == pytest.approx(wanted)


def test_a_penalty_on_the_last_0_tokens_is_none() -> None:
    numbers = {f"{kind}_{what}": 1.5 for kind in ("repetition", "presence", "frequency") for what in ("penalty",)}
    for size, changed in ((0, False), (1, True)):
        sizes = {f"{kind}_context_size": size for kind in ("repetition", "presence", "frequency")}
        row = mx.array([[1.0, 2.0]])
        for processor in seam._processors(Asked("text", 1, numbers | sizes)):
            row = processor(mx.array([0]), row)
        assert (row[0].tolist() != [1.0, 2.0]) == changed


def test_a_sampler_with_xtc_leaves_out_the_likeliest() -> None:
    draw = make_sampler(1.0, xtc_probability=1.0, xtc_threshold=0.1, xtc_special_tokens=[])
    drawn = {draw(mx.log(mx.array([[0.6, 0.3, 0.05, 0.05]]))).item() for _ in range(60)}
    assert 0 not in drawn and 1 in drawn


def test_a_tokenizer_knows_its_end_and_where_thinking_begins(tokenizer: Any) -> None:
    assert tokenizer.eos_token_ids == {1} and tokenizer.has_thinking and not tokenizer.has_tool_calling
    text = [{"role": "user", "content": "x"}]
    on, off = (
        tokenizer.apply_chat_template(text, tokenize=True, add_generation_prompt=True, enable_thinking=e)
        for e in (True, False)
    )
    assert tokenizer.rfind_think_start(on) == len(on) - 1 > tokenizer.rfind_think_end(on)
    assert tokenizer.rfind_think_end(off) == len(off) - 1 > tokenizer.rfind_think_start(off)


def test_tokens_are_told_as_bytes_and_texts_are_put_together_from_them(tokenizer: Any) -> None:
    token_bytes = byte_reader(tokenizer)
    for text in (
        " a  first space",
        "\n\nlines\t",
        "é中😀 of many bytes",
        "<think>x</think>\n\n<｜DSML｜tool_calls>",
        "'s n't .",
    ):
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert b"".join(map(token_bytes, ids)) == text.encode()
        written = Detokenizer(token_bytes)
        assert "".join(map(written.add, ids)) + written.end() == text
    cut = Detokenizer(token_bytes)
    ids = tokenizer.encode("中", add_special_tokens=False)
    if len(ids) > 1:
        assert cut.add(ids[0]) == "" and cut.end() == "\ufffd"
