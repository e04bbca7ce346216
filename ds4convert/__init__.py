"""Convert DeepSeek-V4 checkpoints to MLX without losing the multi-token-prediction head.

    import ds4convert as ds4

    source = ds4.open("DeepSeek-V4-Flash")                  # a folder, or a repo: hf://owner/name
    plan = ds4.plan(source, recipe="q4")                    # what would be written; plan.as_json()
    done = ds4.convert(plan, "flash-q4", progress=print)    # goes on where an earlier call was cut off
    ds4.verify("flash-q4", source=source, mtp=True).ok
    model = ds4.load("flash-q4")
    print(model.generate("Why is the sky blue?").text)

Functions: open, inspect, plan, convert, verify, diff, graft, relayout, calibrate, pull, publish, load. Each is a
command of the program `ds4convert`, takes the command's options as keywords, and returns a frozen record whose
`as_json()` is the command's JSON document. Errors are classes below `Ds4Error`. What `__all__` does not list is not
public.

Importing the package loads nothing else: each function is loaded when it is first asked for.
"""

# Nothing is imported here, not even from Python's own library: `isolation` has this module loaded before the import
# path is one that can be trusted.
TYPE_CHECKING = False  # type checkers take a name like this as true

if TYPE_CHECKING:
    from ds4convert.api.asking.inspecting import inspect
    from ds4convert.api.calibrating import calibrate
    from ds4convert.api.comparing import diff
    from ds4convert.api.conversion import convert, plan
    from ds4convert.api.deriving import graft, relayout
    from ds4convert.api.generating import load
    from ds4convert.api.hub import publish, pull
    from ds4convert.api.opening import open
    from ds4convert.api.verifying import verify
    from ds4convert.errors import (
        ConfigError,
        Ds4Error,
        EnvironmentFault,
        FindingsError,
        HeaderError,
        InputError,
        InventoryError,
        OutputError,
        UsageError,
        ValueFault,
    )
    from ds4convert.inference.chat import PromptError, ReplyError

    __version__: str

_HOMES = {
    "calibrate": "api.calibrating", "convert": "api.conversion", "diff": "api.comparing", "graft": "api.deriving",
    "inspect": "api.asking.inspecting", "load": "api.generating", "open": "api.opening", "plan": "api.conversion",
    "publish": "api.hub", "pull": "api.hub", "relayout": "api.deriving", "verify": "api.verifying",
    "ConfigError": "errors", "Ds4Error": "errors", "EnvironmentFault": "errors", "FindingsError": "errors",
    "HeaderError": "errors", "InputError": "errors", "InventoryError": "errors", "OutputError": "errors",
    "PromptError": "inference.chat", "ReplyError": "inference.chat", "UsageError": "errors", "ValueFault": "errors",
}  # fmt: skip
"""The module below this package that each public name lives in."""

__all__ = [
    "ConfigError", "Ds4Error", "EnvironmentFault", "FindingsError", "HeaderError", "InputError", "InventoryError",
    "OutputError", "PromptError", "ReplyError", "UsageError", "ValueFault", "__version__", "calibrate", "convert",
    "diff", "graft", "inspect", "load", "open", "plan", "publish", "pull", "relayout", "verify",
]  # fmt: skip


def __getattr__(name: str) -> object:
    """Return a public name, loading the module that it lives in."""
    from importlib import import_module

    if name == "__version__":
        return import_module(f"{__name__}.words.project").version()
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    """Return the public names."""
    return list(__all__)
