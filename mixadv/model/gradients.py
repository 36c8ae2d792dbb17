"""Gradients that a closure must leave as they are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from mixadv.errors import GameError
from mixadv.model.private_torch import version

CHANGES_GRADIENTS = (
    "The closure changes gradients: it calls backward or zero_grad. A closure runs the forward "
    "pass and returns the loss; the round does the rest."
)


Noted = list[tuple[Tensor | None, int]]
"""The gradient of each parameter, and its version, which tells of changes in place."""


def noted(parameters: list[Tensor]) -> Noted:
    """Note the gradients there are."""
    return [(g, -1 if g is None else version(g)) for g in [p.grad for p in parameters]]


def changed(parameters: list[Tensor], before: Noted) -> bool:
    """Return whether a gradient is another one now, or has other values."""
    pairs = zip(before, noted(parameters), strict=True)
    return any(a is not b or old != new for (a, old), (b, new) in pairs)


class KeptGradients:
    """Gradients with copies of their values, to put them back; see `gradients_kept`."""

    def __init__(self, parameters: list[Tensor]) -> None:
        self._parameters = parameters
        self._before = noted(parameters)
        self._values = [None if p.grad is None else p.grad.clone() for p in parameters]

    def release(self) -> None:
        """Keep them no longer: those that the body has made stay."""
        self._parameters, self._before = [], []

    @torch.no_grad()
    def put_back(self) -> bool:
        """Put the gradients back, and return whether one had changed."""
        if not changed(self._parameters, self._before):
            return False
        kept = zip(self._parameters, self._before, self._values, strict=True)
        for parameter, (gradient, _), values in kept:
            parameter.grad = gradient
            if gradient is not None and values is not None:
                gradient.copy_(values)
        return True


@contextmanager
def gradients_untouched(parameters: list[Tensor]) -> Iterator[None]:
    """Raise if the body replaces or changes a gradient."""
    before = noted(parameters)
    yield
    if changed(parameters, before):
        raise GameError(CHANGES_GRADIENTS)


@contextmanager
def gradients_kept(parameters: list[Tensor]) -> Iterator[KeptGradients]:
    """Put back gradients that the body changes, and raise; unless it releases them."""
    kept = KeptGradients(parameters)
    try:
        yield kept
    finally:
        moved = kept.put_back()
    if moved:
        raise GameError(CHANGES_GRADIENTS)
