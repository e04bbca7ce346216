"""The version, of an installed package and of a tree that was never installed: one place knows it."""

from __future__ import annotations

import re
from importlib import metadata

import pytest

import ds4convert
from ds4convert.words import project
from tests.support import ROOT, run


def test_a_tree_that_is_not_installed_has_a_version_too(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = metadata.version

    def unknown(name: str) -> str:
        if name == "ds4convert":
            raise metadata.PackageNotFoundError(name)
        return asked(name)

    monkeypatch.setattr(metadata, "version", unknown)
    assert project.version() == ds4convert.__version__ == "0+source"
    shown = run("--version")
    assert shown.code == 0 and shown.out.strip() == "0+source"


def test_nothing_else_asks_for_it() -> None:
    for path in sorted((ROOT / "ds4convert").rglob("*.py")):
        if path.name != "project.py":
            assert not re.search(r"""version\(['"]ds4convert['"]\)""", path.read_text()), path
