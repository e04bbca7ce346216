"""The hosts' own ways to run the template, each with the same signature, to be compared with ours."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from ds4convert.inference.chat import template_text

ADDED = (
    "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>", "<think>",
    "</think>", "｜DSML｜", "<｜latest_reminder｜>", "<｜action｜>", "<｜query｜>", "<｜authority｜>",
    "<｜domain｜>", "<｜title｜>", "<｜read_url｜>",
)  # fmt: skip


@lru_cache(maxsize=1)
def tokenizer() -> Any:
    """Return a byte-level tokenizer of 256 tokens and the added tokens of the model, with our template."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(list(ADDED[:2]))
    core.add_tokens([AddedToken(token, normalized=False, special=False) for token in ADDED[2:]])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token=ADDED[0], eos_token=ADDED[1], chat_template=template_text()
    )


def by_renderer(messages: list[dict[str, Any]], **variables: Any) -> str:
    """Render as transformers does inside, with fields that are null kept."""
    from transformers.utils.chat_template_utils import render_jinja_template

    rendered, _ = render_jinja_template([messages], chat_template=template_text(), **variables)
    return rendered[0]


def by_tokenizer(messages: list[dict[str, Any]], **variables: Any) -> str:
    return tokenizer().apply_chat_template(messages, tokenize=False, **variables)


def by_mlx_lm(messages: list[dict[str, Any]], **variables: Any) -> str:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

    return TokenizerWrapper(tokenizer()).apply_chat_template(messages, tokenize=False, **variables)


def by_mlx_lm_tokens(messages: list[dict[str, Any]], **variables: Any) -> str:
    """Tokenize and decode, to see that BOS comes once and no text is lost."""
    from mlx_lm.tokenizer_utils import TokenizerWrapper

    wrapper = TokenizerWrapper(tokenizer())
    ids = wrapper.apply_chat_template(messages, tokenize=True, **variables)
    return wrapper.decode(ids)


HOSTS = (by_renderer, by_tokenizer, by_mlx_lm, by_mlx_lm_tokens)
