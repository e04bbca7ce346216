"""What names a repo: the forms of cli.md (second part, Sources), each with what it means, and what is refused why."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ds4convert.errors import UsageError
from ds4convert.hub.names import is_repo, split_name

EXPECTED = "expected hf://owner/name, owner/name, either with @revision, or the address of its page"
PART = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,20}", fullmatch=True)
REVISION = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,20}", fullmatch=True)
MEANT = [
    ("hf://me/model", ("me/model", None)),
    ("me/model", ("me/model", None)),
    ("hf://me/model@v1", ("me/model", "v1")),
    ("me/model@refs/pr/3", ("me/model", "refs/pr/3")),
    ("https://huggingface.co/me/model", ("me/model", None)),
    ("HTTPS://HuggingFace.co/me/model/", ("me/model", None)),
    ("http://hf.co/me/model", ("me/model", None)),
    ("https://www.huggingface.co/me/model/tree/v1", ("me/model", "v1")),
    ("https://huggingface.co/me/model/blob/v1/config.json", ("me/model", "v1")),
    ("https://huggingface.co/me/model/resolve/v1/a/b.json", ("me/model", "v1")),
    ("https://huggingface.co/me/model/raw/v1/config.json", ("me/model", "v1")),
    ("https://huggingface.co/me/model/commit/0123abc", ("me/model", "0123abc")),
    ("https://huggingface.co/me/model/tree/refs%2Fpr%2F3", ("me/model", "refs/pr/3")),
    ("https://huggingface.co/me/model/discussions/4", ("me/model", None)),
    ("https://huggingface.co/me/model/tree", ("me/model", None)),
    ("https://huggingface.co/api/models/me/model", ("me/model", None)),
    ("https://huggingface.co/api/models/me/model/revision/v1", ("me/model", "v1")),
    ("https://huggingface.co/me/model?not-for-all-audiences=true#top", ("me/model", None)),
]
"""An address as people paste it from a browser, with the repo and the revision that it means."""


@pytest.mark.parametrize(("src", "meant"), MEANT)
def test_every_way_to_name_a_repo_means_that_repo_at_that_revision(src: str, meant: tuple[str, str | None]) -> None:
    assert split_name(src) == meant and is_repo(src)


@given(PART, PART, REVISION)
def test_all_forms_of_one_repo_and_revision_mean_the_same(owner: str, name: str, revision: str) -> None:
    forms = [
        split_name(f"hf://{owner}/{name}@{revision}"),
        split_name(f"{owner}/{name}@{revision}"),
        split_name(f"https://huggingface.co/{owner}/{name}/tree/{revision}"),
        split_name(f"{owner}/{name}", revision),
        split_name(f"hf://{owner}/{name}@{revision}", revision),
    ]
    assert forms == [(f"{owner}/{name}", revision)] * 5


@pytest.mark.parametrize(
    ("src", "why"),
    [
        ("hf://me/model@", f"hf://me/model@: names no revision after @; {EXPECTED}"),
        ("hf://model", f"hf://model: is not a repo of the Hub; {EXPECTED}"),
        ("hf://a/b/c", f"hf://a/b/c: is not a repo of the Hub; {EXPECTED}"),
        ("hf:///model", f"hf:///model: is not a repo of the Hub; {EXPECTED}"),
        ("hf://me/..", f"hf://me/..: is not a repo of the Hub; {EXPECTED}"),
        ("hf://./model", f"hf://./model: is not a repo of the Hub; {EXPECTED}"),
        ("hf://me/mo\ndel", f"hf://me/mo\\ndel: is not a repo of the Hub; {EXPECTED}"),
        ("https://huggingface.co/me", f"https://huggingface.co/me: is not a repo of the Hub; {EXPECTED}"),
        (
            "https://example.org/me/model",
            f"https://example.org/me/model: is not a page of the Hub (or of HF_ENDPOINT); {EXPECTED}",
        ),
        (
            "https://huggingface.co/datasets/me/data",
            f"https://huggingface.co/datasets/me/data: is a page of datasets; a checkpoint is a model repo: {EXPECTED}",
        ),
        (
            "https://huggingface.co/api/models/spaces/me/app",
            f"https://huggingface.co/api/models/spaces/me/app: is a page of spaces; a checkpoint is a model repo: {EXPECTED}",
        ),
    ],
)
def test_what_is_no_repo_is_refused_with_the_forms_there_are(src: str, why: str) -> None:
    with pytest.raises(UsageError) as found:
        split_name(src)
    assert str(found.value) == why


def test_two_revisions_that_differ_are_refused_and_equal_ones_are_one() -> None:
    with pytest.raises(UsageError) as found:
        split_name("me/model@v1", "v2")
    assert str(found.value) == "me/model@v1: names the revision v1, --revision another; give one of them"
    assert split_name("me/model@v1", "v1") == split_name("me/model", "v1") == ("me/model", "v1")


@pytest.mark.parametrize(
    "src", ["model", "/me/model", "./me/model", "me/model/more", "~/model", "me//model", "", "-a/b"]
)
def test_what_looks_like_a_path_is_a_path(src: str) -> None:
    assert not is_repo(src)


def test_a_folder_of_that_name_goes_before_a_repo_unless_the_scheme_says_repo(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert is_repo("me/model") and is_repo("me/model@v1")
    Path("me/model").mkdir(parents=True)
    assert not is_repo("me/model") and is_repo("hf://me/model") and is_repo("me/model@v1")


def test_an_owner_or_name_of_96_characters_is_the_longest() -> None:
    assert is_repo(f"{'a' * 96}/{'b' * 96}")
    assert not is_repo(f"{'a' * 97}/b") and not is_repo(f"a/{'b' * 97}")


ENDPOINTS = [
    ("https://hub.example.org", "https://hub.example.org/me/model/tree/v1"),
    ("https://hub.example.org/", "https://HUB.example.org/me/model/tree/v1"),
    ("https://example.org/hub", "https://example.org/hub/me/model/tree/v1"),
    ("https://example.org/hub/", "https://example.org/hub/api/models/me/model/revision/v1"),
]


@pytest.mark.parametrize(("endpoint", "page"), ENDPOINTS)
def test_pages_of_another_hub_count_where_it_is_the_endpoint(
    endpoint: str, page: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert split_name(page, endpoint=endpoint) == ("me/model", "v1")
    assert not is_repo(page)
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    assert is_repo(page) and split_name(page) == ("me/model", "v1")


def test_a_path_beside_that_of_the_endpoint_is_no_page_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "https://example.org/hub")
    assert not is_repo("https://example.org/hubbub/me/model") and not is_repo("https://example.org/me/model")
    assert is_repo("https://huggingface.co/me/model"), "the Hub itself stays one"
