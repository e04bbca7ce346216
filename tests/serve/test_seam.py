"""The seam to mlx-lm's server, pinned. When one of these fails, ds4convert/serving/seam.py says what to do."""

from __future__ import annotations

import hashlib
import inspect
from importlib import metadata

import pytest

pytest.importorskip("mlx.core")
from mlx_lm import server as base
from mlx_lm.models.cache import LRUPromptCache

from ds4convert.errors import EnvironmentFault
from ds4convert.inference import chat
from ds4convert.serving import seam

PINNED = {
    "0.32.2": {
        "ResponseGenerator": "0343c5fe35016c27",
        "APIHandler": "c9bd71d2e2efd1f7",
        "ModelProvider": "c9fdd5c4792311d8",
        "LRUPromptCache": "042dfb02dda7f86b",
    },
}
"""Per version of mlx-lm, sha256 of the source of each class that the seam builds on, first 16 digits."""

NEXT = (
    "compare mlx_lm/server.py with the last version that is pinned, and follow the head of ds4convert/serving/seam.py"
)


def test_the_seam_is_pinned_to_this_version_of_mlx_lm() -> None:
    version = metadata.version("mlx-lm")
    assert version.rpartition(".")[0] in seam.SUPPORTED, f"mlx-lm {version} is not in SUPPORTED: {NEXT}"
    owners = (base.ResponseGenerator, base.APIHandler, base.ModelProvider, LRUPromptCache)
    found = {o.__name__: hashlib.sha256(inspect.getsource(o).encode()).hexdigest()[:16] for o in owners}
    assert found == PINNED.get(version), f"mlx-lm {version} is not what was checked: {NEXT}"


def test_an_unknown_version_is_told_and_a_missing_part_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert seam.check_version(metadata.version("mlx-lm")) is None
    assert "was not checked" in (seam.check_version("9.1.0") or "")
    monkeypatch.delattr(base.ResponseGenerator, "_tokenize")
    with pytest.raises(EnvironmentFault, match=r"no ResponseGenerator\._tokenize; .*pip install"):
        seam.check_version("9.1.0")


def test_tool_calls_of_the_model_are_read() -> None:
    text = (
        f'>\n<{chat.DSML}invoke name="weather">\n<{chat.DSML}parameter name="city" string="true">Rome</{chat.DSML}parameter>\n'
        f'<{chat.DSML}parameter name="days" string="false">3</{chat.DSML}parameter>\n</{chat.DSML}invoke>\n'
    )
    assert seam.parse_calls(text.removeprefix(">")) == [{"name": "weather", "arguments": {"city": "Rome", "days": 3}}]
    with pytest.raises(ValueError, match="expected"):
        seam.parse_calls("no call")


@pytest.mark.parametrize("size", [1, 2, 3, 50])
def test_a_stop_word_is_found_however_the_text_is_cut(size: int) -> None:
    text, words = "aab aba abab stop", ["abab", "stop"]
    watch, seen = seam.StopText(words), ""
    for at in range(0, len(text), size):
        piece = text[at : at + size]
        before = watch.find(piece)
        if before is not None:
            seen += piece[:before]
            break
        seen += piece
    assert "aab aba abab".startswith(seen) and seen.startswith("aab aba ") and len(seen) < len("aab aba abab")
