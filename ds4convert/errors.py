"""Every error that reaches a user, with its exit code.

    Ds4Error
    ├── UsageError          2   the options do not fit each other
    ├── InputError          3   the input is bad or unsupported
    │   ├── HeaderError         a safetensors header or index that cannot be trusted
    │   ├── ConfigError         config.json missing, malformed, or contradicting the tensors
    │   ├── InventoryError      tensors missing, extra or misshapen
    │   ├── ValueFault          a stored value that no format allows (NaN code, NaN scale)
    │   ├── OutputError         the output folder holds something that is not ours to touch
    │   ├── PromptError         (inference/chat.py) messages that the prompt format cannot express
    │   └── ReplyError          (inference/chat.py) a reply that the prompt format does not allow
    └── EnvironmentFault    4   disk, permission, network: what to do next is in the message

A message says what was wrong, where (file, tensor, byte range), what was expected, and what to do next.
Anything that is not a `Ds4Error` is a bug of ours.
"""

from __future__ import annotations


class Ds4Error(Exception):
    """Base of all errors meant for the user; `exit_code` is the process exit status."""

    exit_code = 1


class UsageError(Ds4Error):
    """Options that contradict each other or cannot be honoured."""

    exit_code = 2


class InputError(Ds4Error):
    """The input is bad or unsupported; nothing was written."""

    exit_code = 3


class HeaderError(InputError):
    """A safetensors header or index file that cannot be trusted."""


class ConfigError(InputError):
    """config.json is missing, malformed, unsupported, or contradicts the tensors."""


class InventoryError(InputError):
    """Tensors are missing, extra, misshapen or of another dtype than the config implies."""


class ValueFault(InputError):
    """A stored value that its format does not allow, such as a NaN code or a NaN block scale."""


class OutputError(InputError):
    """The output folder holds something that this run must not touch."""


class EnvironmentFault(Ds4Error):
    """Disk, permission or network failed; the message says what is safe to do next."""

    exit_code = 4
