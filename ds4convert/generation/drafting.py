"""How a loaded model is to draft: the options of `generate`, `serve` and `verify`, checked against its kind of head."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ds4convert.errors import UsageError

if TYPE_CHECKING:
    from ds4convert.inference.deepseek_v4.model import Model


def draft_depth(model: Model, depth: int | None, confidence: float = 0.0) -> int:
    """Return how many drafts are verified per pass: `depth`, or what the kind of head has where it is None.

    Raises `UsageError` on more than the head's block has, and on a confidence threshold for a classic head.
    """
    from ds4convert.inference.decode import deepest, default_depth

    if not 0 <= confidence <= 1:  # NaN passes the range of the option
        raise UsageError(f"--confidence {confidence:g}: expected 0 (off) to 1")
    if not model.head.present:
        return depth or 1
    if confidence and model.head.kind != "dspark":
        raise UsageError(
            f"--confidence {confidence:g}: this folder's head is {model.head.kind}, which does not estimate acceptance",
            hint="leave the option out (a DSpark head estimates)",
        )
    most = deepest(model)
    if depth is not None and depth > most:
        raise UsageError(
            f"--draft-depth {depth}: this head drafts at most {most} tokens per pass",
            hint=f"give 1 to {most}, or leave the option out",
        )
    return default_depth(model) if depth is None else depth
