"""Giants through the commands that run a model or carry a folder on: refused within 300 MB of memory.

`test_fuzz` has those of `inspect` and `quantize`.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import support
from tests.hostile.test_fuzz import LIMIT_MB, LIMIT_SECONDS, measured, write_giant
from tests.hostile.test_fuzz_all import READS_MLX, clean

__all__ = ["clean"]
SHARD = "model-00001-of-00001.safetensors"
GIANT = 2_000_000_000


def _header(length: int, size: int) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        path = folder / SHARD
        path.unlink()
        with path.open("wb") as f:
            f.write(length.to_bytes(8, "little") + b'{"')
            f.truncate(size)

    return write


def _file(name: str, text: bytes, size: int = 0) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        path = folder / name
        path.unlink(missing_ok=True)
        with path.open("wb") as f:
            f.write(text)
            if size:
                f.truncate(size)

    return write


def _known(kind: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        for path in folder.glob("*.safetensors"):
            path.unlink()
        (folder / support.INDEX).unlink()
        write_giant(kind, folder)

    return write


NESTED = b'{"a":' + b"[" * 3_000_000
GIANTS: dict[str, Callable[[Path], None]] = {
    "a sparse header of 3 GB": _header(3_000_000_000, 3_000_000_100),
    "a sparse header of 99 MB": _header(99_000_000, 100_000_000),
    "a sparse config of 2 GB": _file("config.json", b"{", GIANT),
    "a nested config": _file("config.json", NESTED),
    "a sparse index of 2 GB": _file(support.INDEX, b"{", GIANT),
    "a nested index": _file(support.INDEX, NESTED),
    "a sparse generation_config of 2 GB": _file("generation_config.json", b"{", GIANT),
    "a nested generation_config": _file("generation_config.json", NESTED),
    "a sparse manifest of 2 GB": _file("ds4convert_manifest.json", b"{", GIANT),
    "a nested manifest": _file("ds4convert_manifest.json", NESTED),
    "a sparse tokenizer of 2 GB": _file("tokenizer.json", b"{", GIANT),
    "a nested tokenizer": _file("tokenizer.json", NESTED),
    "a sparse template of 2 GB": _file("chat_template.jinja", b"{", GIANT),
    "two files of 140,000 valid tensors": _known("two files of 140,000 valid tensors"),
    "150,000 valid tensors": _known("150,000 valid tensors"),
    "the largest index that is accepted": _known("the largest index that is accepted"),
    "a config of many layers over one tensor": _known("a config of many layers over one tensor"),
    "a config of many experts over one tensor": _known("a config of many experts over one tensor"),
}
COMMANDS = [
    "calibrate", "relayout", "from-mlx", "verify --mtp of texts", "layerwise", "generate ids", "generate chat", "serve",
    "publish", "drafter", "graft",
]  # fmt: skip
ALWAYS = {
    ("a sparse header of 3 GB", "verify --mtp of texts"), ("a sparse header of 3 GB", "generate ids"),
    ("a nested generation_config", "generate chat"), ("a sparse config of 2 GB", "calibrate"),
    ("150,000 valid tensors", "layerwise"), ("a sparse tokenizer of 2 GB", "serve"), ("a nested index", "generate ids"),
}  # fmt: skip


def giants() -> list[object]:
    """Return every giant with every command; those that are not in ALWAYS run nightly."""
    return [
        pytest.param(g, c, marks=[] if (g, c) in ALWAYS else pytest.mark.nightly, id=f"{g}-{c}")
        for g in GIANTS
        for c in COMMANDS
    ]


def unread(giant: str, command: str) -> bool:
    """Return whether a command has no reason to open the giant, and may succeed."""
    tokens = ("tokenizer", "template", "generation_config")
    return any(t in giant for t in tokens) and command not in {"relayout", "from-mlx"}


@pytest.mark.sampled(3)
@pytest.mark.slow
@pytest.mark.parametrize(("giant", "command"), giants())
def test_giants_are_refused_within_300_mb(giant: str, command: str, clean: dict[str, Path], tmp_path: Path) -> None:
    folder, out = tmp_path / "giant", tmp_path / "out"
    shutil.copytree(clean["mlx"], folder)
    GIANTS[giant](folder)
    words = [str(w).replace("a/b", "no_such_owner/no_such_repo") for w in READS_MLX[command](folder, out, clean)]
    if command == "serve":
        words += ["--host", "no.such.host.invalid"]  # a server that would start ends here
    result, peak, seconds = measured(*words)
    print(f"{giant}: {command} {peak} MB, {seconds:.1f} s, code {result.code}: {result.err[-150:]!r}")
    assert peak <= LIMIT_MB and seconds < LIMIT_SECONDS, (peak, seconds)
    assert "Traceback" not in result.err and "this is a bug" not in result.err, result.err[:500]
    assert len(result.err) < 12_000
    assert result.code in ({0, 1, 2, 3} if unread(giant, command) else {1, 3}), result.err
    assert result.code != 3 or not out.exists()
