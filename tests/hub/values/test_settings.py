"""What an issue report shows of the Hub's settings: where, how and whence, and nothing secret."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import constants

from ds4convert.hub import settings


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("https://huggingface.co", "https://huggingface.co"),
        ("https://me:secret@hub.example:8443/path/", "https://hub.example:8443/path/"),
        ("https://secret@hub.example", "https://hub.example"),
        ("https://a@b:secret@hub.example/x", "https://hub.example/x"),
        ("https://hub.example/x?token=secret#secret", "https://hub.example/x"),
        ("http://[::1", "(not an address)"),
        ("", ""),
    ],
)
def test_an_address_is_shown_without_user_password_query_and_fragment(address: str, shown: str) -> None:
    assert settings.without_secrets(address) == shown


@pytest.mark.parametrize(
    ("home", "path", "shown"),
    [
        ("/home/ann", "/home/ann", "~"),
        ("/home/ann", "/home/ann/.cache", "~/.cache"),
        ("/home/ann", "/home/anna/.cache", "/home/anna/.cache"),
        ("/home/ann", "/data/home/ann", "/data/home/ann"),
        ("/", "/data", "/data"),
        ("/", "/", "/"),
    ],
)
def test_the_home_folder_is_shown_as_a_tilde_and_nothing_that_only_begins_like_it(
    home: str, path: str, shown: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", home)
    assert settings.at_home(path) == shown


def test_a_token_is_told_by_where_it_comes_from_and_never_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    assert settings.settings()["token"] is None
    (tmp_path / "token").write_text("hf_stored")
    assert settings.settings()["token"] == "login"
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    told = settings.settings()
    assert told["token"] == "environment" and "hf_" not in str(told)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setenv("HUGGING_FACE_HUB_TOKEN", "hf_secret")
    assert settings.settings()["token"] == "environment"


def test_endpoint_cache_and_offline_mode_are_those_of_the_client(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "https://u:p@hub.example")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(Path.home() / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    told = settings.settings()
    assert (told["endpoint"], told["cache"], told["offline"]) == ("https://hub.example", "~/hub", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert settings.settings()["offline"] is False
