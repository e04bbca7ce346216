"""Corpus, tokenizer files and training rows.

Input is plain text: a file, or a folder of .txt files. A line like `Ge1:2 And the earth...`, as `bible -f` of
Debian's bible-kjv prints it, is a verse; a change of chapter starts a new passage. In other text each line is
a sentence of a passage, and an empty line ends it.
"""

from __future__ import annotations

import json
import random
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

if TYPE_CHECKING:
    from torch import Tensor

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
USER, ASSISTANT, THINK, END_THINK = "<｜User｜>", "<｜Assistant｜>", "<think>", "</think>"
MARKERS = (
    USER, ASSISTANT, THINK, END_THINK, "｜DSML｜", "<｜latest_reminder｜>", "<｜action｜>", "<｜query｜>",
    "<｜authority｜>", "<｜domain｜>", "<｜title｜>", "<｜extracted_url｜>", "<｜read_url｜>",
)  # fmt: skip
VERSE = re.compile(r"^([1-4]?[A-Za-z]+\d+):\d+ (.+)$")
HELD_OUT_EVERY = 20
CHAT_SHARE, THINK_SHARE = 0.25, 0.3

Passage = list[str]  # sentences, each ending in a line feed


def read_passages(source: Path) -> list[Passage]:
    """All passages of a text file or of the .txt files of a folder, in order of name."""
    files = sorted(source.rglob("*.txt")) if source.is_dir() else [source]
    return [passage for file in files for passage in split_passages(file.read_text())]


def split_passages(text: str) -> list[Passage]:
    """See the module text. In a `bible -f` dump the program's own lines carry no verse and are dropped."""
    lines = text.splitlines()
    verses = [match for match in map(VERSE.match, lines) if match]
    has_verses = len(verses) > len(lines) // 2
    passages: dict[str, Passage] = {}
    if has_verses:
        for chapter, verse in (match.groups() for match in verses):
            passages.setdefault(chapter, []).append(verse + "\n")
    else:
        for number, paragraph in enumerate(re.split(r"\n\s*\n", text)):
            passages[str(number)] = [line.strip() + "\n" for line in paragraph.splitlines() if line.strip()]
    return [passage for passage in passages.values() if passage]


def split_held_out(passages: list[Passage]) -> tuple[list[Passage], list[Passage]]:
    """(training, held-out): each twentieth passage is held out."""
    held_out = passages[HELD_OUT_EVERY // 2 :: HELD_OUT_EVERY]
    training = [p for n, p in enumerate(passages) if n % HELD_OUT_EVERY != HELD_OUT_EVERY // 2]
    return training, held_out


# -- tokenizer --


def train_tokenizer(passages: list[Passage], size: int) -> Tokenizer:
    """Byte-level BPE of `size` entries: BOS 0, EOS 1, bytes, merges; last the markers, not special."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size - len(MARKERS),
        special_tokens=[BOS, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(("".join(p) for p in passages), trainer)
    tokenizer.add_tokens([AddedToken(text, normalized=False, special=False) for text in MARKERS])
    if tokenizer.get_vocab_size() != size:
        raise ValueError(f"the text gives only {tokenizer.get_vocab_size()} tokens, wanted {size}")
    return tokenizer


def write_tokenizer(tokenizer: Tokenizer, folder: Path, max_length: int) -> None:
    """tokenizer.json, tokenizer_config.json and generation_config.json."""
    tokenizer.save(str(folder / "tokenizer.json"))
    tokenizer_config = {
        "add_bos_token": False,
        "add_eos_token": False,
        "bos_token": _added(BOS),
        "clean_up_tokenization_spaces": False,
        "eos_token": _added(EOS),
        "model_max_length": max_length,
        "pad_token": _added(EOS),
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": None,
    }
    generation_config = {
        "_from_model_config": True,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "do_sample": True,
        "temperature": 1.0,
        "top_p": 1.0,
        "transformers_version": "4.57.1",
    }
    write_json(folder / "tokenizer_config.json", tokenizer_config)
    write_json(folder / "generation_config.json", generation_config)


def _added(content: str) -> dict[str, object]:
    return {"__type": "AddedToken", "content": content, "lstrip": False, "normalized": True, "rstrip": False,
            "single_word": False}  # fmt: skip


def write_json(path: Path, value: object) -> None:
    """Indented UTF-8 JSON with a line feed at the end."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


# -- training rows --


@dataclass
class Rows:
    """Endless source of training rows of `length` token ids, each starting with BOS."""

    passages: list[list[list[int]]]  # token ids of each sentence of each passage
    sizes: list[int]  # tokens of each passage
    markers: dict[str, int]
    rng: random.Random

    @classmethod
    def of(cls, passages: list[Passage], tokenizer: Tokenizer, seed: int) -> Rows:
        """Tokenize sentence by sentence."""
        encoded = [[e.ids for e in tokenizer.encode_batch(p)] for p in passages]
        markers = {text: tokenizer.token_to_id(text) for text in (BOS, EOS, *MARKERS)}
        return cls(encoded, [sum(map(len, p)) for p in encoded], markers, random.Random(seed))

    def row(self, length: int) -> list[int]:
        """From a random sentence to the end of its passage, then on with the following passages.

        A quarter of the documents are in chat form: the first sentence is the user's, the rest is the reply.
        """
        number = self.rng.choices(range(len(self.passages)), self.sizes)[0]
        start = self.rng.randrange(len(self.passages[number]))
        ids: list[int] = []
        while len(ids) < length:
            ids += self._document(self.passages[number][start:])
            number, start = (number + 1) % len(self.passages), 0
        return ids[:length]

    def _document(self, sentences: list[list[int]]) -> list[int]:
        m = self.markers
        first, rest = sentences[0], [i for s in sentences[1:] for i in s]
        if self.rng.random() >= CHAT_SHARE:
            return [m[BOS], *first, *rest, m[EOS]]
        opening = [m[THINK], *first, m[END_THINK]] if self.rng.random() < THINK_SHARE else [m[END_THINK]]
        return [m[BOS], m[USER], *first[:-1], m[ASSISTANT], *opening, *rest, m[EOS]]

    def batch(self, rows: int, length: int) -> Tensor:
        """[rows, length] ids."""
        import torch  # the trainer of the DSpark head has none

        return torch.tensor([self.row(length) for _ in range(rows)])
