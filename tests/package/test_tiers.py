"""The tiers of the suite: `fast` has something of every folder, and what it names is there."""

from __future__ import annotations

from tests import fast

FOLDERS = {p.relative_to(fast.TESTS).parts[0] for p in fast.TESTS.glob("*/**/test_*.py")}


def test_every_folder_has_fast_tests() -> None:
    assert set(fast.FILES) == FOLDERS and all(fast.FILES.values())


def test_every_fast_file_is_there_and_is_known_by_its_path() -> None:
    named = [fast.TESTS / folder / name for folder, names in fast.FILES.items() for name in names]
    assert [p for p in named if not p.is_file()] == []
    assert all(map(fast.is_fast, named)) and not fast.is_fast(fast.TESTS / "conftest.py")
    assert not fast.is_fast(fast.TESTS / "package" / "test_package.py")
