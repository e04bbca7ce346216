"""Texts cut into rows for a calibration; heads that lie in a folder of their own; ids that end a text."""

from __future__ import annotations

import hashlib
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ds4convert.errors import HeaderError, InputError
from ds4convert.inference import calibration_text as texts
from ds4convert.inference import head_folder as heads
from ds4convert.inference.calibration_text import Rows
from ds4convert.inference.tokens import stop_tokens


@pytest.mark.parametrize(
    ("ids", "length", "start", "rows"),
    [
        ([1, 2, 3, 4, 5], 2, None, [(1, 2), (3, 4)]), ([1, 2, 3, 4, 5], 3, 0, [(0, 1, 2), (0, 3, 4), (0, 5)]),
        ([0, 1, 2, 3], 3, 0, [(0, 1, 2), (0, 3)]), ([1, 2, 3], 1, 0, [(0, 1), (0, 2), (0, 3)]), ([], 4, 0, []), ([7], 4, None, []),
        ([0], 4, 0, []), ([1, 0, 2], 3, 0, [(0, 1, 0), (0, 2)]), ([1, 2], 9, None, [(1, 2)]),
    ],
)  # fmt: skip
def test_a_text_is_cut_into_rows_that_each_begin_as_a_text_begins(
    ids: list[int], length: int, start: int | None, rows: list[tuple[int, ...]]
) -> None:
    """A row of one token says nothing of what follows what: it is left out."""
    assert list(texts._cut(ids, length, start)) == rows


@given(st.integers(1, 40), st.integers(2, 9), st.integers(2, 400))
def test_rows_come_from_everywhere_in_their_order_and_fill_the_limit(count: int, length: int, limit: int) -> None:
    rows = [tuple(range(n * 100, n * 100 + length)) for n in range(count)]
    found = texts._spread(rows, limit)
    total = sum(map(len, found))
    assert found == sorted(found) and all(r == rows[r[0] // 100][: len(r)] for r in found)
    assert (
        total <= max(limit, 0) and total >= min(limit - 1, count * length) and sum(len(r) < length for r in found) <= 1
    )


def test_few_rows_of_many_are_far_apart() -> None:
    rows = [(n, n) for n in range(100)]
    chosen = sorted(r[0] for r in texts._spread(rows, 10))
    assert len(chosen) == 5 and all(b - a >= 10 for a, b in itertools.pairwise(chosen))


def test_rows_tell_tokens_and_a_digest_of_their_ids() -> None:
    rows = Rows(((1, 2), (3, 4, 5)), 2, 9)
    assert rows.tokens == 5 and rows.digest == hashlib.sha256(b"[[1, 2], [3, 4, 5]]").hexdigest()


class Tokenizer:
    """A tokenizer with or without a chat template."""

    def __init__(self, has_template: bool = True) -> None:
        self.has_chat_template = has_template

    def apply_chat_template(self, messages: list[Any], tokenize: bool) -> str:
        if messages[0].get("role") == "bad":
            raise TypeError("no such role")
        return "|".join(m["content"] for m in messages)


def written(place: Path) -> list[str]:
    return [make(Tokenizer()) for make in texts._documents(place)]


def test_documents_of_files_lines_and_folders(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_bytes("\ufeffplain é\n".encode())
    lines = [{"text": "one"}, {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}]
    (tmp_path / "a.JSONL").write_text("\n\n".join(map(json.dumps, lines)) + "\n")
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "c.md").write_text("deep")
    (tmp_path / "d.bin").write_text("not read")
    assert written(tmp_path / "b.txt") == ["plain é\n"] and written(tmp_path / "a.JSONL") == ["one", "x|y"]
    assert written(tmp_path) == ["one", "x|y", "plain é\n", "deep"]


@pytest.mark.parametrize(
    ("name", "raw", "words"),
    [
        ("a.txt", b"\xff", "a.txt: not UTF-8 text: "), ("a.jsonl", b"{", "a.jsonl, line 1: not valid JSON: "),
        ("a.jsonl", b'{"text": "x"}\n\n[1]', 'a.jsonl, line 3: expected an object with "text" (a text) or "messages" (a list of objects)'),
        ("a.jsonl", b'{"text": 3}', "a.jsonl, line 1: expected an object"), ("a.jsonl", b'{"messages": []}', "a.jsonl, line 1: expected an object"),
        ("a.jsonl", b'{"messages": ["x"]}', "a.jsonl, line 1: expected an object"), ("a.jsonl", b"[" * 100_000, "a.jsonl, line 1: not valid JSON: "),
        ("a.jsonl", b'{"messages": [{"role": "bad"}]}', "a.jsonl, line 1: the chat template does not take these messages: no such role"),
    ],
)  # fmt: skip
def test_a_text_that_is_none_is_refused_by_file_and_line(name: str, raw: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(InputError) as caught:
        written(tmp_path / name)
    assert str(caught.value).startswith(f"{tmp_path}/{words}")


def test_places_without_texts_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"holds no file that ends in \.txt, \.md, \.jsonl, \.ndjson; name a text file$"
    ):
        written(tmp_path)
    with pytest.raises(InputError, match=r"none\.txt: cannot be read: No such file or directory$"):
        written(tmp_path / "none.txt")


def test_messages_without_a_template_are_written_as_deepseek_v4_writes_them(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"messages": [{"role": "user", "content": "Hello"}]}')
    (make,) = texts._documents(tmp_path / "a.jsonl")
    assert "<｜User｜>Hello" in make(Tokenizer(has_template=False))


# --- heads apart ---


@pytest.mark.parametrize(
    ("name", "whole"),
    [("stages.2.attn.wq_a", "mtp.2.attn.wq_a"), ("e_proj", "mtp.0.e_proj"), ("decoder.attn.w", "mtp.0.decoder.attn.w"), ("mtp.1.norm", "mtp.1.norm"), ("model.mtp.0.x", "model.mtp.0.x")],
)  # fmt: skip
def test_names_of_a_head_apart_in_the_whole_model(name: str, whole: str) -> None:
    assert heads.head_name(name) == whole


def test_of_a_whole_model_only_the_head_is_taken(tmp_path: Path) -> None:
    assert heads.head_of(tmp_path, {"mtp.0.x": 1, "model.layers.0.y": 2}) == {"mtp.0.x": 1}
    assert heads.head_of(tmp_path, {"e_proj.weight": 1}) == {"mtp.0.e_proj.weight": 1}
    with pytest.raises(
        InputError, match=r"holds a model without a head; name the folder of a head, or of a model with one$"
    ):
        heads.head_of(tmp_path, {"model.layers.0.y": 2})
    assert heads.without_head({"mtp.0.x": 1, "model.mtp.0.z": 2, "a": 3}) == {"a": 3}


def test_the_drafter_is_the_one_that_is_named_or_the_one_inside_where_the_model_has_none(tmp_path: Path) -> None:
    inside, named = tmp_path / "mtp", tmp_path / "named"
    assert heads.drafter_place(tmp_path, None, ["a"]) is None
    inside.mkdir()
    (inside / "config.json").write_text("{}")
    assert (
        heads.drafter_place(tmp_path, None, ["a"]) == inside
        and heads.drafter_place(tmp_path, None, ["mtp.0.x"]) is None
    )
    with pytest.raises(InputError, match=r"named: no config\.json, so no head can be loaded from it$"):
        heads.drafter_place(tmp_path, named, ["mtp.0.x"])
    named.mkdir()
    (named / "config.json").write_text("{}")
    assert heads.drafter_place(tmp_path, named, ["mtp.0.x"]) == named


def test_a_link_named_mtp_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text("{}")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mtp").symlink_to(tmp_path / "other")
    with pytest.raises(HeaderError, match="is a link that leads out of the folder"):
        heads.drafter_place(tmp_path / "model", None, [])


def test_a_head_of_another_model_is_refused_by_its_first_dimension(tmp_path: Path) -> None:
    ours = {"hidden_size": 8, "vocab_size": 4, "text_config": None}
    heads.check_same_model(tmp_path, {"hidden_size": 8}, ours)
    heads.check_same_model(tmp_path, {"text_config": {"hidden_size": 8}}, {"text_config": {"hidden_size": 8}})
    for theirs in ({"vocab_size": 5}, {"text_config": {"hidden_size": 9}}):
        with pytest.raises(InputError, match=str(tmp_path)):
            heads.check_same_model(tmp_path, theirs, ours)


def test_keys_of_a_dspark_head_come_under_the_names_of_a_model() -> None:
    """mlx-vlm's drafter config (layouts.md, section 6): its block counts the anchor as a slot."""
    theirs = {
        "model_type": "deepseek_v4_dspark",
        "target_layer_ids": [1],
        "mask_token_id": 2,
        "markov_rank": 3,
        "block_size": 6,
    }
    assert heads.dspark_keys(theirs) == {
        "dspark_target_layer_ids": [1], "dspark_noise_token_id": 2, "dspark_markov_rank": 3, "dspark_block_size": 5,
    }  # fmt: skip
    assert heads.dspark_keys({"dspark_block_size": 4, "text_config": {"dspark_block_size": 5, "x": 1}}) == {
        "dspark_block_size": 5
    }
    assert (
        heads.dspark_keys({"block_size": 6, "target_layer_ids": [1]}) == {}
        and heads.dspark_keys(theirs | {"block_size": "6"}).get("dspark_block_size") is None
    )


def test_the_config_of_a_model_takes_over_what_its_head_says() -> None:
    model = {"a": 1, "quantization": {"model.x": {"bits": 4}, "mtp.0.old": {"bits": 2}}}
    own = {
        "num_nextn_predict_layers": 2, "dspark_block_size": 5,
        "quantization": {"group_size": 32, "bits": 8, "mode": "mxfp8", "e_proj": {"bits": 4}, "attn.wq_a": False},
    }  # fmt: skip
    merged = heads.merged_config(model, own, ["mtp.0.h_proj.scales", "mtp.0.norm.weight"])
    assert (merged["a"], merged["num_nextn_predict_layers"], merged["dspark_block_size"]) == (1, 2, 5)
    assert merged["quantization"] == {
        "model.x": {"bits": 4}, "mtp.0.h_proj": {"group_size": 32, "bits": 8, "mode": "mxfp8"}, "mtp.0.e_proj": {"bits": 4}, "mtp.0.attn.wq_a": False,
    }  # fmt: skip
    assert heads.merged_config({"a": 1}, {}, []) == {"a": 1, "num_nextn_predict_layers": 1}
    nested = heads.merged_config({"text_config": {"b": 2}}, {"text_config": {"num_nextn_predict_layers": 3}}, [])
    assert nested == {"text_config": {"b": 2, "num_nextn_predict_layers": 3}}
    listed = heads.merged_config({}, {"quantization": {"mtp.0.e_proj": {"bits": 4}, "model.y": {"bits": 6}}}, [])
    assert listed["quantization"] == {"mtp.0.e_proj": {"bits": 4}}, "of a whole model's table the head's part alone"


# --- ids that end a text ---


@pytest.mark.parametrize(
    ("generation", "config", "ids"),
    [
        (None, {}, set()), (None, {"eos_token_id": 1}, {1}), (None, {"eos_token_id": [1, 2]}, {1, 2}), ({"eos_token_id": 3}, {"eos_token_id": 1}, {3}),
        ({"eos_token_id": []}, {"eos_token_id": 1}, {1}), ({"eos_token_id": None}, {"eos_token_id": [4]}, {4}), ({}, {"eos_token_id": 0}, {0}),
    ],
)  # fmt: skip
def test_end_tokens_are_those_of_the_generation_config_else_of_the_config(
    generation: Any, config: dict[str, Any], ids: set[int], tmp_path: Path
) -> None:
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    assert stop_tokens(tmp_path, config) == ids


@pytest.mark.parametrize("bad", [-1, True, "1", [1, None], 1.0, {"a": 1}])
def test_an_end_token_that_is_none_is_told_with_its_file(bad: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"config\.json: eos_token_id: expected a token id or a list of them, found "):
        stop_tokens(tmp_path, {"eos_token_id": bad})
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": bad}))
    with pytest.raises(InputError, match=r"generation_config\.json: eos_token_id"):
        stop_tokens(tmp_path, {"eos_token_id": 1})


def test_a_generation_config_that_is_no_object_is_refused(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text("[1]")
    with pytest.raises(InputError, match=r"generation_config\.json: expected a JSON object, found list$"):
        stop_tokens(tmp_path, {})
