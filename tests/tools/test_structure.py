"""The tool that counts rooms, floors and arrows, on small made-up packages: what it must see, and what it must not."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.tools.loaded import load

structure = load("tools/structure.py")
KNOWN = {"errors", "words.figures", "words.__init__", "storage.disk", "storage.net.http", "cli.__init__", "cli.main"}


@pytest.mark.parametrize(
    ("name", "text", "found"),
    [
        ("cli.main", "from ds4convert.errors import A", {"errors"}),
        ("cli.main", "from ds4convert import errors", {"errors"}),
        ("cli.main", "from ds4convert.words import figures", {"words.figures"}),
        ("cli.main", "from ds4convert.words import WIDTH", {"words.__init__"}),
        ("cli.main", "from ds4convert.words import figures, WIDTH", {"words.figures", "words.__init__"}),
        ("cli.main", "def f():\n    from ds4convert.storage.disk import x", {"storage.disk"}),
        ("cli.main", "if TYPE_CHECKING:\n    from ds4convert.storage.net.http import x", {"storage.net.http"}),
        ("storage.disk", "from .net.http import x", {"storage.net.http"}),
        ("storage.disk", "from .net import http", {"storage.net.http"}),
        ("storage.net.http", "from ..disk import x", {"storage.disk"}),
        ("storage.net.http", "from .. import disk", {"storage.disk"}),
        ("cli.main", "from . import main", set()),
        ("cli.main", "import os\nfrom os import path\nfrom ds4convertx.errors import A", set()),
        ("cli.main", "'from ds4convert.errors import A'", set()),
    ],
)
def test_imports_of_ours_are_seen_wherever_they_stand(tmp_path: Path, name: str, text: str, found: set[str]) -> None:
    (tmp_path / "m.py").write_text(text)
    assert structure.imported(name, tmp_path / "m.py", KNOWN) == found


def test_an_arrow_goes_from_room_to_room_and_none_stays_inside_one() -> None:
    edges = {"a.x": {"a.y", "b.z"}, "a.y": {"b.z", "c"}, "b.z": set(), "c": {"b.z"}}
    assert structure.rooms(edges) == {"a": {"b", "c"}, "b": set(), "c": {"b"}}


def test_a_floor_is_one_above_the_highest_that_is_imported_and_a_circle_has_none() -> None:
    assert structure.floors({"a": set(), "b": {"a"}, "c": {"a", "b"}, "d": {"a"}}) == {"a": 1, "b": 2, "c": 3, "d": 2}
    assert structure.floors({"a": {"b"}, "b": {"a"}, "c": set(), "d": {"a", "c"}}) == {"c": 1}
    assert structure.floors({}) == {}


@given(st.dictionaries(st.integers(0, 7), st.sets(st.integers(0, 7)), max_size=8))
def test_floors_are_the_longest_way_down(links: dict[int, set[int]]) -> None:
    arrows = {str(n): {str(t) for t in targets if t < n and t in links} for n, targets in links.items()}
    found = structure.floors(arrows)

    def height(room: str) -> int:
        return 1 + max(map(height, arrows[room]), default=0)

    assert found == {room: height(room) for room in arrows}


def test_a_import_against_the_order_and_a_circle_are_told_and_end_with_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    package = tmp_path / "ds4convert"
    for name, text in {"errors.py": "", "words/a.py": "from ds4convert import errors", "cli/b.py": ""}.items():
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text(text)
    monkeypatch.setattr(structure, "PACKAGE", package)
    monkeypatch.setattr(structure, "ROOT", tmp_path)
    assert structure.main() == 0
    told = capsys.readouterr().out
    assert "rooms 3, floors 2, arrows 1" in told and "on a circle: none; not in the order: none" in told
    (package / "words" / "a.py").write_text("from ds4convert.cli import b")
    assert structure.main() == 1
    assert "  against the order: words.a imports cli.b" in capsys.readouterr().out
    (package / "words" / "a.py").write_text("from ds4convert.words import c")
    (package / "words" / "c.py").write_text("from ds4convert.words import a")
    assert structure.main() == 1
    assert "files on a circle: ['words.a', 'words.c']" in capsys.readouterr().out
    (package / "words" / "a.py").write_text("")
    (package / "strange.py").write_text("")
    assert structure.main() == 1
    assert "not in the order: ['strange']" in capsys.readouterr().out
