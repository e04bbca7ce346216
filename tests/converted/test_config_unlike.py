"""What two folders say beside their tensors: every key that differs, by its path, and none that a conversion writes itself."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ds4convert.checkpoint.family import families
from ds4convert.converted import settings
from ds4convert.converted.settings import FOREIGN, OFFICIAL, OURS, Said, Unlike, config_unlike, files_unlike
from ds4convert.planning.layouts import layouts
from ds4convert.planning.side_files import template

V4 = families()["deepseek_v4"]
BASE: dict[str, Any] = {
    "model_type": "deepseek_v4",
    "num_hidden_layers": 2,
    "hidden_size": 8,
    "compress_ratios": [0, 4, 0],
}


def said(kind: str = OFFICIAL, files: dict[str, str] | None = None, headless: bool = False, **keys: Any) -> Said:
    return Said(kind, V4, {k: v for k, v in (BASE | keys).items() if v is not ...}, files or {}, headless)


def unlike(a: Said, b: Said) -> list[tuple[str, str | None, str | None]]:
    return [(u.name, u.a, u.b) for u in config_unlike(a, b)]


@pytest.mark.parametrize(
    ("a", "b", "found"),
    [
        (1, 1, []), (1, 1.0, []), (1, 2, [("x", "1", "2")]), (1, True, [("x", "1", "true")]), (0, False, [("x", "0", "false")]),
        (True, True, []), (None, None, []), (None, ..., [("x", "null", None)]), (..., None, [("x", None, "null")]),
        (0, None, [("x", "0", "null")]), ("é", "e", [("x", '"\\u00e9"', '"e"')]), ([], {}, [("x", "[]", "{}")]),
        ([1, 2], [1, 2], []), ([1, 2], [1, 3], [("x[1]", "2", "3")]), ([1], [1, 2], [("x", "[1]", "[1, 2]")]),
        ({"a": {"b": [1]}}, {"a": {"b": [2]}}, [("x.a.b[0]", "1", "2")]),
        ({"a": 1, "c": 3}, {"b": 2, "c": 3}, [("x.a", "1", None), ("x.b", None, "2")]),
        ({"a": 1}, [1], [("x", '{"a": 1}', "[1]")]),
    ],
)  # fmt: skip
def test_every_leaf_that_differs_is_told_by_its_path(a: Any, b: Any, found: list[Any]) -> None:
    assert unlike(said(x=a), said(x=b)) == found


values = st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=3), lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text("ab", min_size=1, max_size=2), x, max_size=3), max_leaves=8)  # fmt: skip


@given(values, values)
def test_no_value_differs_from_itself_and_sides_may_be_exchanged(x: Any, y: Any) -> None:
    assert unlike(said(x=x), said(x=json.loads(json.dumps(x)))) == []
    there = unlike(said(x=x), said(x=y))
    assert sorted(map(str, unlike(said(x=y), said(x=x)))) == sorted(str((n, b, a)) for n, a, b in there)
    assert bool(there) == (json.dumps(x, sort_keys=True) != json.dumps(y, sort_keys=True))


def test_long_values_are_cut() -> None:
    ((_, a, _),) = unlike(said(x="y" * 500), said(x=1))
    assert a is not None and len(a) == 80


OWN = {"quantization": {"bits": 4}, "quantization_config": {"bits": 4}, "expert_dtype": "fp4"}


def test_what_a_conversion_writes_itself_is_not_compared() -> None:
    source = said(**OWN, auto_map={"a": "b"}, num_nextn_predict_layers=1)
    ours = said(OURS, num_nextn_predict_layers=0, n_mtp_layers=1)
    assert unlike(source, ours) == []
    assert unlike(said(OURS, num_nextn_predict_layers=1), said(FOREIGN, num_nextn_predict_layers=0)) == []


def test_two_official_folders_are_compared_in_their_stages_and_code_too() -> None:
    a, b = said(num_nextn_predict_layers=1, auto_map={"a": "b"}), said(num_nextn_predict_layers=2)
    assert unlike(a, b) == [("num_nextn_predict_layers", "1", "2"), ("auto_map", '{"a": "b"}', None)]
    assert unlike(said(**OWN), said()) == [], "but not in how weights are stored: the tensors tell that"


@pytest.mark.parametrize("kind", [OURS, FOREIGN])
def test_keys_of_hosts_say_nothing_of_another_programs_folder_and_all_of_ours(kind: str) -> None:
    found = unlike(said(transformers_version="5"), said(kind, transformers_version="4", torch_dtype="x"))
    assert bool(found) == (kind == OURS)


def test_the_model_file_of_a_layout_is_ours_and_another_is_told() -> None:
    name = next(y.model_file for y in layouts().values() if y.model_file)
    assert unlike(said(), said(OURS, model_file=name)) == []
    assert unlike(said(), said(OURS, model_file="evil.py")) == [("model_file", None, '"evil.py"')]
    assert unlike(said(), replace(said(), config=BASE | {"model_file": name})) != [], "an official checkpoint has none"


DSPARK = {"dspark_block_size": 5, "dspark_markov_rank": 8, "dspark_noise_token_id": 1, "dspark_target_layer_ids": [1]}


def test_keys_of_a_head_may_lack_on_the_side_that_has_none_and_not_differ() -> None:
    source, without = said(**DSPARK), said(OURS, headless=True)
    assert unlike(source, without) == [] == unlike(without, source)
    assert [u[0] for u in unlike(source, said(OURS))] == list(DSPARK)
    assert unlike(source, said(OURS, headless=True, dspark_block_size=7)) == [("dspark_block_size", "5", "7")]


def test_ratios_are_compared_for_the_layers_alone_where_a_side_has_no_head() -> None:
    source, headless = said(), said(OURS, headless=True, compress_ratios=[0, 4])
    assert unlike(source, headless) == [] == unlike(headless, source)
    assert unlike(source, said(OURS, headless=True, compress_ratios=[0, 128])) == [("compress_ratios[1]", "4", "128")]
    assert [u[0] for u in unlike(source, said(OURS, compress_ratios=[0, 4]))] == ["compress_ratios"], "with a head"
    assert [u[0] for u in unlike(source, said(OURS, headless=True, compress_ratios=[0]))] == ["compress_ratios"]


def digest(raw: bytes) -> str:
    return hashlib.sha256(raw).hexdigest()


TEMPLATE = digest(template("deepseek_v4")["chat_template.jinja"])


@pytest.mark.parametrize(
    ("a", "b", "found"),
    [
        ({"t": "1"}, {"t": "1"}, []), ({"t": "1"}, {"t": "2"}, [("t", "1", "2")]),
        ({"b": "1", "a": "1"}, {}, [("a", "1", None), ("b", "1", None)]),
        ({}, {"chat_template.jinja": TEMPLATE}, []), ({}, {"chat_template.jinja": "1"}, [("chat_template.jinja", None, "1")]),
        ({"chat_template.jinja": TEMPLATE}, {}, [("chat_template.jinja", TEMPLATE, None)]),
    ],
)  # fmt: skip
def test_carried_files_that_differ_are_told_but_for_the_template_that_a_conversion_adds(
    a: dict[str, str], b: dict[str, str], found: list[Any]
) -> None:
    """A conversion of ours is side b: it adds the template, and a template that it lacks was taken out."""
    assert [(u.name, u.a, u.b) for u in files_unlike(said(files=a), said(OURS, files=b))] == found


def test_a_source_is_told_from_its_result_in_sentences() -> None:
    source = said(files={"a": "1" * 64, "b": "2" * 64})
    found = said(OURS, files={"b": "3" * 64, "c": "4" * 64}, hidden_size=9, more=1)
    del found.config["num_hidden_layers"]  # type: ignore[attr-defined]
    assert settings.against_source(source, found, "") == [
        "config.json: num_hidden_layers is missing, 2 in the source",
        "config.json: hidden_size is 9, 8 in the source",
        "config.json: more is 1, the source does not have it",
    ]
    assert settings.files_against_source(source, found) == [
        "a: missing; the source has it",
        "b: is not the source's (sha256 333333333333..., 222222222222... in the source)",
        "c: the source has no such file",
    ]


def test_a_model_file_of_another_layout_is_told() -> None:
    name = next(y.model_file for y in layouts().values() if y.model_file)
    assert settings.against_source(said(), said(OURS, model_file=name), name) == []
    assert settings.against_source(said(), said(OURS, model_file=name), "") == [
        f'config.json: model_file is "{name}"; no conversion of this layout has it, and hosts run it'
    ]


def drafted(**drafter: Any) -> Said:
    """A folder of layout vlm, whose drafter's config repeats keys of the source."""
    place = next(p for p in layouts()["vlm"].heads if p.folder == "mtp")
    keys = {"copied": "$hidden_size", "more": "$num_hidden_layers_plus_one", "fixed": "word", "unknown": "$not_there"}
    return replace(said(OURS), place=replace(place, config=keys), drafter=drafter)


def test_the_drafters_config_repeats_the_sources_keys() -> None:
    assert settings.against_source(said(), drafted(copied=8, more=3), "") == []
    assert settings.against_source(said(), drafted(copied=9, more=2), "") == [
        "mtp/config.json: copied is 9, 8 in the source",
        "mtp/config.json: more is 2, 3 in the source",
    ]
    assert settings.against_source(said(), drafted(more=3), "") == [
        "mtp/config.json: copied is missing, 8 in the source"
    ]
    assert settings.against_source(said(num_hidden_layers="x"), drafted(copied=8), "")[1:] == [], (
        "no number to add one to"
    )


def test_the_config_that_a_drafter_carries_is_compared_as_well() -> None:
    found = drafted(copied=8, more=3, text_config=BASE | {"hidden_size": 9})
    assert settings.against_source(said(), found, "") == [
        "mtp/config.json: text_config.hidden_size is 9, 8 in the source"
    ]


def test_a_difference_has_the_keys_of_the_contract_and_files_are_those_that_are_carried(tmp_path: Path) -> None:
    assert Unlike("x", None, "1").as_json("key") == {"key": "x", "a": None, "b": "1"}
    for name in ("tokenizer.json", "LICENSE", "README.md", "config.json"):
        (tmp_path / name).write_text(name)
    assert settings.carried(tmp_path) == {n: digest(n.encode()) for n in ("LICENSE", "tokenizer.json")}
