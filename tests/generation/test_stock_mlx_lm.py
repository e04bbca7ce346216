"""A folder of layout mlx-lm, converted by our command line, in stock mlx-lm: load, generate, logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support import run

mx = pytest.importorskip("mlx.core")
mlx_lm = pytest.importorskip("mlx_lm")

PROMPT = "And the king of Israel said unto the servants"


@pytest.fixture(scope="module")
def stock(demo_mlx: Path) -> tuple[Any, Any]:
    return mlx_lm.load(str(demo_mlx), trust_remote_code=True)


def test_it_is_refused_without_trust(demo_mlx: Path) -> None:
    with pytest.raises(ValueError, match="trust_remote_code"):
        mlx_lm.load(str(demo_mlx))


def test_logits_equal_those_of_our_runtime(stock: tuple[Any, Any], demo_mlx: Path) -> None:
    from ds4convert.inference.load import load_model

    model, tokenizer = stock
    ids = mx.array([tokenizer.encode(PROMPT * 20)])
    assert type(model).__module__ == "custom_model" and model.head.present
    ours, _ = load_model(demo_mlx, dtype="bfloat16")
    assert ids.shape[1] > 128 and mx.array_equal(model(ids), ours(ids)).item()


def test_generate_writes_what_our_command_writes(stock: tuple[Any, Any], demo_mlx: Path) -> None:
    model, tokenizer = stock
    ids = tokenizer.encode(PROMPT)
    text = mlx_lm.generate(model, tokenizer, ids, max_tokens=40)
    facts = run("generate", demo_mlx, "--raw", "--prompt", PROMPT, "--max-tokens", 40, "--json").json
    assert facts["text"] == text and facts["prompt_tokens"] == len(ids) and len(text) > 40


def test_its_tokenizer_finds_the_chat_template_and_ours_is_the_same_text(
    stock: tuple[Any, Any], demo_mlx: Path
) -> None:
    _, tokenizer = stock
    assert tokenizer.has_chat_template
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": PROMPT}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    told = run("generate", demo_mlx, "--prompt", PROMPT, "--system", "Be brief.", "--max-tokens", 1, "-v").err
    assert f"prompt: {text!r}\n" in told
