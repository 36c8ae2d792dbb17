"""Weights that are moved in place and put back, bit for bit."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mixadv.model import parallel


class Displaced:
    """The weights of a model, away from where the learner has them or not.

    They move in place, so that compiled, checkpointed and sharded models compute with them, and the
    optimizer knows no others. Where they were is kept in one copy. Its memory is held from round to
    round: to get it anew each time takes longer than to fill it.
    """

    def __init__(self) -> None:
        self.copies: dict[Tensor, Tensor] = {}
        self._moved: list[Tensor] = []

    @torch.no_grad()
    def move(
        self, model: nn.Module, weights: Sequence[Tensor], displacements: Iterable[Tensor]
    ) -> Tensor:
        """Add a displacement to each weight of a model; return the L2 norm of all they moved, 0-d.

        A sum is rounded once, to the number format of its weight.
        """
        parallel.reshard(model)
        now = {id(weight) for weight in weights}
        self.copies = {w: c for w, c in self.copies.items() if id(w) in now}
        squares = []
        for weight, displacement in zip(weights, displacements, strict=True):
            found = self._copy(weight)
            self._moved.append(weight)
            if weight.dtype == displacement.dtype:
                weight.add_(displacement)
                squares.append(parallel.sum_of_squares(displacement))
            else:  # rounded
                weight.copy_(found + displacement)
                squares.append(parallel.sum_of_squares((weight - found).to(displacement.dtype)))
        parallel.reshard(model)
        return torch.stack(squares).sum().sqrt()

    def _copy(self, weight: Tensor) -> Tensor:
        """Return a copy of a weight, in the memory of the last one where it fits."""
        kept = self.copies.get(weight)
        if kept is None or _kind(kept) != _kind(weight):
            kept = self.copies[weight] = torch.empty_like(weight)
        return kept.copy_(weight)

    @torch.no_grad()
    def restore(self, model: nn.Module) -> None:
        """Put the weights of a model back to where they were found, if they are away."""
        if not self._moved:
            return
        parallel.reshard(model)
        for weight in self._moved:
            weight.copy_(self.copies[weight])
        self._moved.clear()

    def __getstate__(self) -> dict[str, Any]:
        return {"copies": {}, "_moved": []}


def _kind(tensor: Tensor) -> tuple[object, ...]:
    """Return what a tensor has to have in common with another to hold its values."""
    return tensor.shape, tensor.dtype, tensor.device


class Rounding:
    """How much of a displacement is lost where it is added to weights of a coarse format."""

    def __init__(self) -> None:
        self._lost: list[Tensor] = []
        self._asked: list[Tensor] = []

    def watch(self, weights: Sequence[Tensor], displacements: Iterable[Tensor]) -> Iterator[Tensor]:
        """Yield the displacements, and see after each what it did to its weight."""
        for weight, displacement in zip(weights, displacements, strict=True):
            found, asked = weight.detach().clone(), displacement != 0
            yield displacement
            same = asked & (weight.detach() == found)
            self._lost.append(parallel.whole(same.sum()))
            self._asked.append(parallel.whole(asked.sum()))

    def share(self) -> float:
        """Return the share of the numbers to move that did not; reads the device."""
        asked = float(torch.stack(self._asked).sum())
        return float(torch.stack(self._lost).sum()) / max(asked, 1.0)
