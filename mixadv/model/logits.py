"""The logits in what a model, or a function that calls it, returned."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mixadv.errors import GameError
from mixadv.model.closure import parse_output


def logits_in(result: Any) -> Tensor:
    """Return the logits in a result, read as those of closures are; the loss is not needed.

    Raises:
        GameError: if it holds none.

    Example:
        >>> logits_in((torch.tensor(0.5), torch.eye(2))).shape
        torch.Size([2, 2])
    """
    found = getattr(result, "logits", result)
    if isinstance(found, Tensor):
        return found
    closed = result if isinstance(result, (tuple, list)) else (torch.zeros(()), result)
    logits = parse_output(closed).predictions
    if logits is None:
        keys = f" with keys {list(result)}" if isinstance(result, dict) else ""
        raise GameError(
            f"A mixture predicts from logits, and {type(result).__name__}{keys} holds none: return "
            "the logits, (loss, logits), or an output with .logits."
        )
    return logits


def probabilities_in(result: Any) -> Tensor:
    """Return the probabilities of classes that a result stands for, in at least fp32.

    Raises:
        GameError: if it holds no logits.
        ValueError: for logits of less than two classes.
    """
    logits = logits_in(result)
    if logits.dim() < 2 or logits.shape[-1] < 2:
        raise ValueError(
            "A mixture predicts probabilities of classes, of logits [B, C] of two or more, got "
            f"{list(logits.shape)}: call it within mixture.member(m), and average its outputs."
        )
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(-1)


def stacked(of_members: Sequence[Tensor]) -> Tensor:
    """Return what the members of a mixture predict, `[M, B, C]`.

    Raises:
        GameError: where they differ in shape.
    """
    shapes = sorted({tuple(x.shape) for x in of_members})
    if len(shapes) > 1:
        raise GameError(
            f"Members of a mixture predict in one shape, got {', '.join(map(str, shapes))}: give "
            "models of the same classes, which the closure calls on the same rows."
        )
    return torch.stack(list(of_members))
