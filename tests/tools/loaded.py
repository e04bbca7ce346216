"""Load a program of tools/ or benchmarks/, which are no part of the package, as a module."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType

from tests.support import ROOT


def load(path: str) -> ModuleType:
    """Return the module of a file, named by its place in the repository; nothing of its `main` is run."""
    name = "loaded_" + path.replace("/", "_").removesuffix(".py")
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, ROOT / path)
        assert spec is not None and spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)  # its dataclasses look their module up
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]
