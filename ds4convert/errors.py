"""Every error that reaches a user, with its exit code.

    Ds4Error
    ├── UsageError          2   the options do not fit each other
    ├── InputError          3   the input is bad or unsupported
    │   ├── HeaderError         a safetensors header or index that cannot be trusted
    │   ├── ConfigError         config.json missing, malformed, or contradicting the tensors
    │   ├── InventoryError      tensors missing, extra or misshapen
    │   │   └── FindingsError       several of them, a line for each
    │   ├── ValueFault          a stored value that no format allows (NaN code, NaN scale)
    │   ├── OutputError         the output folder holds something that is not ours to touch
    │   ├── PromptError         (inference/chat.py) messages that the prompt format cannot express
    │   └── ReplyError          (inference/chat.py) a reply that the prompt format does not allow
    └── EnvironmentFault    4   disk, permission, network: what to do next is in the message

A message says what was wrong, where (file, tensor, byte range), what was expected, and what to do next. What programs
want of it stands beside it: `kind` (of the class), and `file`, `tensor` and `hint` where they are known.
Anything that is not a `Ds4Error` is a bug of ours.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class Ds4Error(Exception):
    """Base of all errors meant for the user; `exit_code` is the process exit status.

    `file` and `tensor` are what the message is about; each None where no single one is known. `hint` says what to do
    next. It ends the text of the error, unless `message` has it already, so that it is written and read once.
    """

    exit_code = 1
    kind = "error"
    is_told = False
    """Whether another process tells it: the first of several that were launched together."""

    def __init__(
        self, message: str = "", *, file: str | None = None, tensor: str | None = None, hint: str | None = None
    ) -> None:
        super().__init__(message if not hint or hint in message else f"{message}{_joint(hint)}{hint}")
        self.file, self.tensor, self.hint = file, tensor, hint

    def concerns(self, file: object, tensor: object) -> None:
        """Note the file and the tensor that the message is about, unless what raised it has known better."""
        self.file = self.file or (None if file is None else str(file))
        self.tensor = self.tensor or (None if tensor is None else str(tensor))


def _joint(hint: str) -> str:
    """Return what stands between a message and its hint: a sentence of its own begins with a capital."""
    return ". " if hint[0].isupper() else "; "


def naming(file: str = "", tensor: str = "") -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Have the errors of a function tell the file and the tensor that it is given in the arguments of these names."""

    def wrap(f: Callable[P, T]) -> Callable[P, T]:
        names = f.__code__.co_varnames[: f.__code__.co_argcount]
        values = f.__defaults__ or ()
        usual = dict(zip(names[len(names) - len(values) :], values, strict=True))

        @functools.wraps(f)
        def named(*args: P.args, **kwargs: P.kwargs) -> T:
            try:
                return f(*args, **kwargs)
            except Ds4Error as e:
                given = usual | dict(zip(names, args, strict=False)) | kwargs
                e.concerns(given.get(file), given.get(tensor))
                raise

        return named

    return wrap


class UsageError(Ds4Error):
    """Options that contradict each other or cannot be honoured."""

    exit_code = 2
    kind = "usage"


class InputError(Ds4Error):
    """The input is bad or unsupported; nothing was written."""

    exit_code = 3
    kind = "input"


class HeaderError(InputError):
    """A safetensors header or index file that cannot be trusted."""

    kind = "header"


class ConfigError(InputError):
    """config.json is missing, malformed, unsupported, or contradicts the tensors."""

    kind = "config"


class InventoryError(InputError):
    """Tensors are missing, extra, misshapen or of another dtype than the config implies."""

    kind = "inventory"


class FindingsError(InventoryError):
    """Several differences, a line for each: the one error of more than one line. Names in it are spelled out."""

    kind = "findings"


class ValueFault(InputError):
    """A stored value that its format does not allow, such as a NaN code or a NaN block scale."""

    kind = "value"


class OutputError(InputError):
    """The output folder holds something that this run must not touch."""

    kind = "output"


class EnvironmentFault(Ds4Error):
    """Disk, permission or network failed; the message says what is safe to do next."""

    exit_code = 4
    kind = "environment"
