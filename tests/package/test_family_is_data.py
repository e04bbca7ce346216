"""What is of a family stands in its file: no name of a block, an expert, a head or a model decides anything in code."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import ROOT

ROOMS = ("checkpoint", "planning", "converted", "fit", "execution", "derive", "demo")
FILES = [p for room in ROOMS for p in sorted((ROOT / "ds4convert" / room).rglob("*.py"))]
NAMES = re.compile(
    r"^(model\.)?mtp\.?$|layers\.|\bmtp\.\d|ffn\.|attn\.|switch_mlp|(^|\.)experts\.|^(classic|dspark)$|deepseek_v4"
    r"|dspark_|num_hidden_layers|n_routed_experts|tie_word|num_nextn"
)
"""What a string that decides something would hold: paths of tensors, kinds of head, model types, keys of a config."""

ALLOWED = {
    ("checkpoint/types.py", "mtp"),  # the folder of a drafter, on disk
    ("checkpoint/families/modules.py", "mtp"),  # the name of the part, on disk
    ("checkpoint/published/foreign.py", "deepseek_v41_text"),  # a model that is refused by its name
    ("checkpoint/folder.py", "mtp"),  # a file of this name is looked into where looking is a request
    ("demo/demo.py", "mtp"),  # a key of the result, in the contract
    ("demo/demo.py", "dspark"),  # likewise; the demo is of one model, and shows both of its heads
    ("demo/embedded.py", "dspark"),  # the heads that come with the package
    ("demo/embedded.py", "classic"),
    ("converted/verify_record.py", "mtp"),  # a key of the record, on disk
    ("checkpoint/provenance.py", "mtp"),  # what `pull --only` wrote into its record
    ("execution/transforms.py", "n_routed_experts"),  # advice, in words
}  # fmt: skip
"""(file, text) of names that stay: formats on disk, each in one place, and words of messages."""


def strings(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the string literals of a file, but for docstrings and other bare strings."""
    tree = ast.parse(path.read_text("utf-8"))
    bare = {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in bare:
            yield node.lineno, node.value


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT / "ds4convert")))
def test_no_name_of_a_family_decides_anything_in_code(path: Path) -> None:
    name = str(path.relative_to(ROOT / "ds4convert"))
    allowed = tuple(text for file, text in ALLOWED if file == name)
    found = [(line, text) for line, text in strings(path) if NAMES.search(text) and not any(a in text for a in allowed)]
    assert not found, f"{name}: {found}; this belongs into the file of the family"
