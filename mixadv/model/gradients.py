"""Gradients that a closure must leave as they are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from mixadv.errors import GameError
from mixadv.model.private_torch import version

CHANGES_GRADIENTS = (
    "The closure changes gradients: it calls backward or zero_grad. A closure runs the forward "
    "pass and returns the loss; the round does the rest."
)


class Found(NamedTuple):
    """A parameter's gradient as it was found, and its version, which tells of changes in place."""

    parameter: Tensor
    gradient: Tensor | None
    version: int

    @classmethod
    def of(cls, parameter: Tensor) -> Found:
        """Note the gradient there is."""
        gradient = parameter.grad
        return cls(parameter, gradient, -1 if gradient is None else version(gradient))

    def changed(self) -> bool:
        """Return whether the gradient is another one now, or has other values."""
        now = Found.of(self.parameter)
        return now.gradient is not self.gradient or now.version != self.version


class KeptGradients:
    """Gradients with copies of their values, to put them back; see `gradients_kept`."""

    def __init__(self, parameters: list[Tensor]) -> None:
        found = [Found.of(parameter) for parameter in parameters]
        self._pairs = [(f, None if f.gradient is None else f.gradient.clone()) for f in found]

    def release(self) -> None:
        """Keep them no longer: those that the body has made stay."""
        self._pairs = []

    @torch.no_grad()
    def put_back(self) -> bool:
        """Put the gradients back, and return whether one had changed."""
        if not any(found.changed() for found, _ in self._pairs):
            return False
        for found, values in self._pairs:
            found.parameter.grad = found.gradient
            if found.gradient is not None and values is not None:
                found.gradient.copy_(values)
        return True


@contextmanager
def gradients_untouched(parameters: list[Tensor]) -> Iterator[None]:
    """Raise if the body replaces or changes a gradient."""
    before = [Found.of(parameter) for parameter in parameters]
    yield
    if any(found.changed() for found in before):
        raise GameError(CHANGES_GRADIENTS)


@contextmanager
def gradients_kept(parameters: list[Tensor]) -> Iterator[KeptGradients]:
    """Put back gradients that the body changes, and raise; unless it releases them."""
    kept = KeptGradients(parameters)
    try:
        yield kept
    finally:
        changed = kept.put_back()
    if changed:
        raise GameError(CHANGES_GRADIENTS)
