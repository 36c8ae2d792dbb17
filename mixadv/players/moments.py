"""Adam's direction: the mean of the gradients so far over the root of the mean of their squares."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

_MEAN, _SQUARE, _LEAST = 0.9, 0.999, 1e-8  # β₁, β₂ and ε, the defaults of `torch.optim.Adam`


class Moments(NamedTuple):
    """Running means of an ascent's gradients and of their squares, not corrected for their start.

    Attributes:
        mean: of the gradients, shaped as they are.
        square: of their squares.
        steps: how many there were.
    """

    mean: Tensor
    square: Tensor
    steps: int


def adam(gradient: Tensor, before: Moments | None) -> tuple[Tensor, Moments]:
    """Return Adam's direction for a gradient, and what the next one goes on from.

    Kingma and Ba 2015, arXiv:1412.6980, algorithm 1, without its step size.

    Args:
        gradient: any shape; each coordinate has moments of its own.
        before: what the last call returned; None at the first.

    Example:
        >>> direction, moments = adam(torch.tensor([2.0, -0.5, 0.0]), None)
        >>> direction.tolist(), moments.steps
        ([1.0, -1.0, 0.0], 1)
    """
    nothing = torch.zeros_like(gradient)
    mean, square, steps = before or Moments(nothing, nothing, 0)
    steps += 1
    mean = _MEAN * mean + (1 - _MEAN) * gradient
    square = _SQUARE * square + (1 - _SQUARE) * gradient.square()
    length = (square / (1 - _SQUARE**steps)).sqrt() + _LEAST
    return mean / (1 - _MEAN**steps) / length, Moments(mean, square, steps)


def turned(moments: Sequence[Moments | None], signs: Sequence[Tensor]) -> list[Moments | None]:
    """Return the moments of gradients times a sign each, per call `[M, B, 1, ...]`."""
    pairs = zip(moments, signs, strict=False)  # there are no moments before the first step
    return [m and m._replace(mean=m.mean * sign.flatten(0, 1)) for m, sign in pairs]
