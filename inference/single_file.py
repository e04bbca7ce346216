"""Writes the model as one Python file for mlx-lm, which loads it by `model_file` in config.json.

The file is made from this package's own modules: their text in order of dependence, imports gathered at the
top, no relative imports left. Its name is that of the layout (`model_file` in manifests/layouts/mlx-lm.toml).
It defines `Model` and `ModelArgs` and needs Python 3.11 and mlx, nothing else.
Annotations are evaluated in it (no `from __future__`): mlx-lm runs the file without registering it in
`sys.modules`, where dataclasses would look up annotations kept as text.
"""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

MODULES = ("config", "cache", "layers", "attention", "block", "dspark", "weights", "model")
"""In order of dependence: each uses only those before it."""

HEADER = '''"""DeepSeek-V4 for mlx-lm, backbone and multi-token-prediction head, in one file.

Written by ds4convert; loaded through `model_file` in config.json with trust_remote_code. mlx-lm decodes with
the backbone; the head is loaded with it and serves `ds4convert generate --mtp`.
"""
'''


@cache
def single_file_source() -> str:
    """The text of the file: standard and mlx imports, then the bodies of the modules."""
    imports: list[str] = []
    bodies: list[str] = []
    for name in MODULES:
        source = (Path(__file__).parent / "deepseek_v4" / f"{name}.py").read_text(encoding="utf-8")
        found, body = _split(source)
        imports += [line for line in found if line not in imports]
        bodies.append(f"# {'-' * 20} {name} {'-' * 20}\n\n{body.strip()}\n")
    ordered = sorted(imports, key=lambda line: ("mlx" in line, line))
    return "\n".join([HEADER, *ordered, "", "", "\n\n".join(bodies)])


def _split(source: str) -> tuple[list[str], str]:
    """Imports of other packages, one statement each, and the text after the last import."""
    lines, start = source.splitlines(), 0
    imports: list[str] = []
    for node in ast.parse(source).body:
        is_docstring = node.lineno == 1 and isinstance(node, ast.Expr)
        if not is_docstring and not isinstance(node, ast.Import | ast.ImportFrom):
            continue
        is_ours = isinstance(node, ast.ImportFrom) and (node.level > 0 or node.module == "__future__")
        if not is_docstring and not is_ours:
            imports.append(ast.unparse(node))
        start = node.end_lineno or node.lineno
    return imports, "\n".join(lines[start:])
