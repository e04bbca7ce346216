"""A request for text: what is refused before a weight is read, with the option and what it takes (cli.md, `generate`)."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ds4convert.checkpoint.types import LeftOut
from ds4convert.errors import UsageError
from ds4convert.generation import open_folder
from ds4convert.generation.drafting import draft_depth
from ds4convert.generation.generate import Asked, Generation, Request, parse_ids

NAN = float("nan")
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"draft_depth": 0}, "--draft-depth 0: expected 1 to 16"),
    ({"draft_depth": 17}, "--draft-depth 17: expected 1 to 16"),
    ({"confidence": 1.1}, "--confidence 1.1: expected 0 (off) to 1"),
    ({"confidence": NAN}, "--confidence nan: expected 0 (off) to 1"),
    ({"temp": -0.1}, "--temp -0.1: expected 0 (greedy) or more"),
    ({"temp": float("inf")}, "--temp inf: expected 0 (greedy) or more"),
    ({"temp": NAN}, "--temp nan: expected 0 (greedy) or more"),
    ({"top_p": 0.0}, "--top-p 0.0: expected more than 0, at most 1 (off)"),
    ({"top_p": 1.1}, "--top-p 1.1: expected more than 0, at most 1 (off)"),
    ({"top_k": -1}, "--top-k -1: expected 0 (off) or more"),
    ({"min_p": 1.1}, "--min-p 1.1: expected 0 (off) to 1"),
    ({"min_p": -0.1}, "--min-p -0.1: expected 0 (off) to 1"),
    ({"max_tokens": 0}, "--max-tokens 0: expected 1 or more"),
    ({"prompt": None}, "give either --prompt TEXT or --prompt-ids 1,2,3"),
    ({"prompt_ids": (1,)}, "give either --prompt TEXT or --prompt-ids 1,2,3"),
    ({"prompt": ""}, "the prompt is empty; at least one token is needed"),
    ({"prompt": None, "prompt_ids": ()}, "the prompt is empty; at least one token is needed"),
    ({"prompt": "a\ud800"}, "--prompt: not UTF-8 text"),
    ({"system": "\udfff"}, "--system: not UTF-8 text"),
    ({"mtp": False, "drafter": Path("d")}, "--drafter names a head to draft with; it does not go with --no-mtp"),
    ({"prompt": None, "prompt_ids": (1,), "chat": True},
     "--chat and --system need --prompt TEXT; --prompt-ids are given to the model as they are"),
    ({"prompt": None, "prompt_ids": (1,), "system": "s"},
     "--chat and --system need --prompt TEXT; --prompt-ids are given to the model as they are"),
    ({"chat": False, "system": "s"}, "--system is a message of a chat; it does not go with --raw"),
]  # fmt: skip


@pytest.mark.parametrize(("choices", "why"), WRONG, ids=lambda x: x[:24] if isinstance(x, str) else "")
def test_what_does_not_fit_is_told_with_the_option_and_what_it_takes(choices: dict[str, Any], why: str) -> None:
    with pytest.raises(UsageError) as found:
        Request(**({"prompt": "hello"} | choices))
    assert str(found.value) == why


@pytest.mark.parametrize(
    "choices",
    [{}, {"draft_depth": 1}, {"draft_depth": 16}, {"confidence": 1}, {"temp": 0}, {"top_p": 1}, {"top_p": 1e-9},
     {"min_p": 1}, {"max_tokens": 1}, {"system": ""}, {"chat": True, "system": "s"}, {"drafter": Path("d")},
     {"prompt": "é\u20ac\U0001f600"}, {"prompt": None, "prompt_ids": (0,), "chat": False}],
    ids=str,
)  # fmt: skip
def test_the_edges_of_what_fits_fit(choices: dict[str, Any]) -> None:
    Request(**({"prompt": "hello"} | choices))


@given(st.lists(st.integers(0, 999_999_999), min_size=1, max_size=8))
def test_ids_are_read_with_or_without_spaces(ids: list[int]) -> None:
    assert parse_ids(",".join(map(str, ids))) == parse_ids(" , ".join(map(str, ids))) == tuple(ids)


@pytest.mark.parametrize("text", ["", "1,,2", "1,", "-1", "1.0", "a", "1 2", "1000000000", "١", "0x1"])
def test_what_is_no_list_of_ids_is_told_as_it_is(text: str) -> None:
    with pytest.raises(UsageError) as found:
        parse_ids(text)
    assert str(found.value) == f"--prompt-ids {text!r}: expected token ids such as 1,2,3"


def test_a_threshold_is_for_a_head_that_estimates_and_within_0_and_1() -> None:
    classic = SimpleNamespace(head=SimpleNamespace(present=True, kind="classic"))
    with pytest.raises(UsageError) as found:
        draft_depth(classic, None, 0.5)  # type: ignore[arg-type]
    assert str(found.value) == (
        "--confidence 0.5: this folder's head is classic, which does not estimate acceptance; leave the option out (a "
        "DSpark head estimates)"
    )
    for wrong in (-0.1, 1.1, NAN):
        with pytest.raises(UsageError, match=rf"^--confidence {wrong:g}: expected 0 \(off\) to 1$"):
            draft_depth(classic, None, wrong)  # type: ignore[arg-type]
    bare = SimpleNamespace(head=SimpleNamespace(present=False))
    assert draft_depth(bare, None, 0.5) == 1 and draft_depth(bare, 4) == 4  # type: ignore[arg-type]


def args(vocab: int = 10, positions: int = 5) -> Any:
    return SimpleNamespace(vocab_size=vocab, max_position_embeddings=positions)


@pytest.mark.parametrize(
    ("ids", "why"),
    [
        ([], "the prompt is empty: it has no token; at least one is needed"),
        ([1, 10], "--prompt-ids: 10: expected ids below 10, the size of the vocabulary"),
        ([1] * 6, "the prompt has 6 tokens; the model takes at most 5 (max_position_embeddings)"),
    ],
)
def test_ids_have_to_fit_the_model(ids: list[int], why: str) -> None:
    with pytest.raises(UsageError) as found:
        open_folder._check_ids(ids, args())
    assert str(found.value) == why
    open_folder._check_ids([9] * 5, args())


# --- why there is no head ---


def folder_record(*left_out: LeftOut, wrote: int = 0) -> Any:
    head = [SimpleNamespace(file="model-mtp.safetensors", size=500) for _ in range(wrote)]
    return SimpleNamespace(left_out=left_out, of_head=lambda: iter(head))


def test_why_there_is_no_head_is_told_by_the_manifest_where_it_knows_and_else_by_the_tensors(tmp_path: Path) -> None:
    model: Any = SimpleNamespace(head=SimpleNamespace(reason="no tensor of one is here"))
    dropped = [LeftOut(f"mtp.{n}", "the head was dropped at the user's wish (--drop-mtp)") for n in range(1200)]
    why = open_folder.why_no_head
    assert why(tmp_path, model, None) == why(tmp_path, model, folder_record()) == "no tensor of one is here"
    assert why(tmp_path, model, folder_record(LeftOut("x", "another reason"))) == "no tensor of one is here"
    assert why(tmp_path, model, folder_record(*dropped)) == (
        "this conversion left the head out (1,200 tensors, --drop-mtp); convert again with --keep-mtp to have it"
    )
    assert why(tmp_path, model, folder_record(wrote=4)) == (
        "the conversion wrote a head (4 tensors, about 2.0 KB), which was stripped from the folder"
    )
    (tmp_path / "model-mtp.safetensors").touch()
    assert why(tmp_path, model, folder_record(wrote=4)) == "no tensor of one is here", "its file is there"


@pytest.mark.parametrize(
    ("present", "mtp", "drafter", "said"),
    [
        (True, None, None, []),
        (True, True, Path("d"), ["the head is that of d, as --drafter says"]),
        (False, None, None, []),
        (False, True, None, ["--mtp has no effect: none here. Decoding without it"]),
        (False, None, Path("d"), ["--drafter has no effect: none here. Decoding without it"]),
        (False, False, None, []),
    ],
)
def test_a_head_that_is_asked_for_and_not_there_is_warned_of(
    tmp_path: Path, present: bool, mtp: bool | None, drafter: Path | None, said: list[str]
) -> None:
    model: Any = SimpleNamespace(head=SimpleNamespace(present=present, reason="none here"))
    warned: list[str] = []
    found = open_folder.head_reason(tmp_path, model, None, mtp, drafter, warned.append)
    assert (found, warned) == (None if present else "none here", said)


# --- the figures of a run ---


def generation(
    tokens: list[int], seconds: float, first: float, reason: str | None = None, **request: Any
) -> Generation:
    made = Generation(
        SimpleNamespace(head=SimpleNamespace(kind="classic")),  # type: ignore[arg-type]
        Asked(Request(prompt_ids=(1, 2, 3), **request), [1, 2, 3], frozenset({7})),
        reason,
    )
    made.tokens, made.seconds, made.first_seconds = tokens, seconds, first
    return made


@pytest.mark.parametrize(
    ("tokens", "seconds", "first", "rate", "finish"),
    [
        ([5, 6, 5], 3.0, 1.0, 1.0, "length"),  # two tokens in the two seconds after the first
        ([5, 6, 7], 3.0, 1.0, 1.0, "stop"),
        ([5], 2.0, 2.0, 0.5, "length"),  # one token alone: all of the time
        ([7], 2.0, 2.0, 0.5, "stop"),
        ([], 0.0, 0.0, 0.0, "length"),
        ([7, 5], 0.5, 0.25, 4.0, "length"),
    ],
)
def test_speed_counts_the_tokens_after_the_first_and_a_stop_token_ends_the_text(
    tokens: list[int], seconds: float, first: float, rate: float, finish: str
) -> None:
    told = generation(tokens, seconds, first).facts()
    assert (told["tokens_per_second"], told["finish_reason"], told["tokens"]) == (rate, finish, tokens)
    assert (told["prompt_tokens"], told["prompt_seconds"], told["acceptance"]) == (3, first, None)


def test_a_head_is_active_unless_it_is_turned_off_or_not_there() -> None:
    on = generation([], 0, 0, draft_depth=4, confidence=0.5)
    on.stats.drafted, on.stats.accepted, on.stats.passes = 8, 6, 3
    told = on.facts()
    assert (told["mtp_active"], told["draft_depth"], told["confidence"], told["mtp_inactive_because"]) == (
        True, 4, 0.5, None,
    )  # fmt: skip
    assert (told["acceptance"], told["tokens_per_pass"], told["drafted"], told["accepted"]) == (0.75, 3.0, 8, 6)
    off = generation([], 0, 0, "why", draft_depth=4, confidence=0.5).facts()
    assert (off["mtp_active"], off["draft_depth"], off["confidence"], off["mtp_inactive_because"]) == (
        False, 0, 0.0, "why",
    )  # fmt: skip
    assert generation([], 0, 0, "why", mtp=False).facts()["mtp_inactive_because"] is None, "nobody asked for it"
