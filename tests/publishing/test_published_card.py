"""The card here and the card on the Hub joined: what people wrote below the mark is never lost, and nothing above it unseen."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ds4convert.errors import OutputError
from ds4convert.publishing.published_card import MARK, check_own, joined, split, text_of

TEXT = st.text(st.sampled_from("ab# \n"), max_size=8).map(str.strip)
WORDS = TEXT.filter(bool)
REFUSED = (
    "README.md: the card on the Hub {}, and would be replaced. Nothing was sent. Take over here what is of use "
    "(below its last line it is kept), then add --replace-card"
)
OTHER = REFUSED.format("is another than `publish` wrote")
ABOVE = REFUSED.format("was edited there, above the line that says what is kept")
BELOW = REFUSED.format("was edited there, below its last line")


@given(TEXT, TEXT)
def test_a_card_that_is_written_is_read_as_what_it_was_made_of(upper: str, below: str) -> None:
    found = split(text_of(upper, below))
    assert found is not None and (found.upper, found.below) == (upper, below)
    assert not found.below_edited
    assert found.upper_digest == hashlib.sha256(upper.encode()).hexdigest()[:16]
    assert text_of(found.upper, found.below) == text_of(upper, below), "written again it is the same"


@given(TEXT, TEXT)
def test_line_ends_and_empty_lines_around_a_text_are_no_change_of_it(upper: str, below: str) -> None:
    text = "\n\n" + text_of(upper, below).replace("\n", "\r\n") + "\r\n\r\n"
    found = split(text)
    assert found is not None and (found.upper, found.below, found.below_edited) == (upper, below, False)


@pytest.mark.parametrize("text", ["", "# mine", MARK[:-1], MARK.upper()])
def test_a_card_without_the_mark_is_another_program_s(text: str) -> None:
    assert split(text) is None


def test_a_card_without_digests_has_its_texts_and_counts_as_edited() -> None:
    found = split(f"above\n\n{MARK}\nbelow\n")
    assert found is not None and (found.upper, found.below, found.upper_digest) == ("above", "below", "")
    assert found.below_edited
    torn = split(f"above\n<!-- ds4convert card 0123 4567 -->\n{MARK}\n")
    assert torn is not None and torn.upper.endswith("4567 -->"), "what is no digest line is text"


@given(TEXT, TEXT, TEXT)
def test_nothing_on_the_hub_gives_the_new_card_with_what_stands_below_here(upper: str, old: str, below: str) -> None:
    assert joined(upper, "", "") == text_of(upper, "")
    assert joined(upper, text_of(old, below), "") == text_of(upper, below)


def changed(card: str, below: str) -> str:
    """Return a card as it is once somebody has edited what stands below its mark."""
    return f"{card.partition(MARK)[0]}{MARK}\n{below}\n"


@given(TEXT, TEXT, TEXT, TEXT)
def test_a_text_below_that_was_changed_on_one_side_since_it_was_published_is_kept(
    upper: str, old: str, before: str, after: str
) -> None:
    published = text_of(old, before)
    assert joined(upper, changed(published, after), published) == text_of(upper, after)
    assert joined(upper, changed(published, after), changed(published, after)) == text_of(upper, after)
    if after not in before:
        assert joined(upper, published, changed(published, after)) == text_of(upper, after)


@given(TEXT, TEXT, TEXT, TEXT, TEXT)
def test_a_run_that_was_broken_off_after_it_wrote_the_card_here_comes_to_the_same_card(
    upper: str, old: str, before: str, mine: str, theirs: str
) -> None:
    here, there = changed(text_of(old, before), mine), changed(text_of(old, before), theirs)
    once = joined(upper, here, there)
    kept = split(once)
    assert kept is not None and (theirs in kept.below or theirs == before)
    if kept.below not in theirs:
        assert joined(upper, once, there) == once


def test_words_taken_out_on_the_hub_alone_come_back_as_a_broken_off_run_looks_the_same() -> None:
    published = text_of("old", "one two")
    assert joined("new", published, changed(published, "one")) == text_of("new", "one two")
    assert joined("new", changed(published, "one"), published) == text_of("new", "one")
    assert joined("new", text_of("new", "one"), published) == text_of("new", "one two"), (
        "nothing is lost, both unedited"
    )


@given(TEXT, TEXT, WORDS, WORDS)
def test_texts_that_were_changed_on_both_sides_are_both_there(upper: str, old: str, mine: str, theirs: str) -> None:
    head = text_of(old, "published").partition(MARK)[0]
    found = split(joined(upper, f"{head}{MARK}\n{mine}", f"{head}{MARK}\n{theirs}"))
    assert found is not None and mine in found.below and theirs in found.below
    assert len(found.below) <= len(mine) + len(theirs) + 2, "and neither twice"


def test_of_two_changed_texts_that_of_the_hub_comes_first() -> None:
    head = text_of("x", "published").partition(MARK)[0]
    assert joined("new", f"{head}{MARK}\nmine", f"{head}{MARK}\ntheirs") == text_of("new", "theirs\n\nmine")


@pytest.mark.parametrize(
    ("there", "why"),
    [
        ("# a card of their own", OTHER),
        (text_of("old", "").replace("old", "edited"), ABOVE),
        (f"edited\n\n{MARK}\n", ABOVE),
    ],
)
def test_a_change_above_the_mark_on_the_hub_is_not_replaced_unseen(there: str, why: str) -> None:
    with pytest.raises(OutputError) as found:
        joined("new", "", there)
    assert str(found.value) == why
    assert joined("new", "", there, known=True).startswith("new") and joined("new", "", there, replace=True)
    assert "edited" not in joined("new", "", there, replace=True)


def test_a_card_on_the_hub_that_says_what_is_written_now_or_was_written_here_may_go() -> None:
    unsigned = f"above\n\n{MARK}\nwords\n"
    assert joined("above", "", unsigned) == text_of("above", "words")
    assert joined("new", text_of("above", ""), unsigned) == text_of("new", "words")
    assert joined("new", "", text_of("old", "words")) == text_of("new", "words"), "signed, and unchanged since"


@pytest.mark.parametrize(
    ("there", "why"),
    [
        ("# another", OTHER),
        (text_of("old", "").replace("old", "edited"), ABOVE),
        (text_of("old", "published").replace("published", "changed"), BELOW),
        (f"old\n\n{MARK}\nwords", ABOVE),
    ],
)
def test_a_readme_of_ones_own_does_not_replace_words_of_others_unseen(there: str, why: str) -> None:
    with pytest.raises(OutputError) as found:
        check_own("# mine", there)
    assert str(found.value) == why
    check_own("# mine", there, replace=True)
    check_own("# mine", there, known=True)


@pytest.mark.parametrize("there", ["", "# mine", "\r\n# mine\r\n", text_of("old", ""), text_of("old", "as published")])
def test_a_readme_of_ones_own_may_replace_nothing_itself_and_what_publish_wrote(there: str) -> None:
    check_own("# mine", there)
