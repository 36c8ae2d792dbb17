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


Gradients = list[tuple[Tensor | None, int]]


def gradients(parameters: list[Tensor]) -> Gradients:
    """Return the gradients with their version counters, which tell of changes in place."""
    return [(p.grad, -1 if p.grad is None else version(p.grad)) for p in parameters]


def unchanged(before: Gradients, parameters: list[Tensor]) -> bool:
    """Return whether each gradient is the one it was, with the values it had."""
    pairs = zip(before, gradients(parameters), strict=True)
    return all(a is b and old == new for (a, old), (b, new) in pairs)


@contextmanager
def gradients_untouched(parameters: list[Tensor]) -> Iterator[None]:
    """Raise if the body replaces or changes a gradient."""
    before = gradients(parameters)
    yield
    if not unchanged(before, parameters):
        raise GameError(CHANGES_GRADIENTS)


class Kept:
    """What to do with the gradients at the end: `keep_new` leaves those there are then."""

    keep_new = False


@contextmanager
def gradients_kept(live: list[Tensor]) -> Iterator[Kept]:
    """Raise if the body changes a gradient, and put gradients back, unless told to keep them."""
    found = gradients(live)
    values = [None if gradient is None else gradient.clone() for gradient, _ in found]
    kept = Kept()
    try:
        yield kept
    finally:
        same = unchanged(found, live)
        if not same and not kept.keep_new:
            with torch.no_grad():
                for p, (gradient, _), value in zip(live, found, values, strict=True):
                    p.grad = gradient
                    if gradient is not None and value is not None:
                        gradient.copy_(value)
    if not same and not kept.keep_new:
        raise GameError(CHANGES_GRADIENTS)
