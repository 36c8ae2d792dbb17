"""Weights that are moved in place and put back, bit for bit."""

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from mixadv.model import parallel


class Displaced:
    """The weights of a model, away from where the learner has them or not.

    They move in place, so that compiled, checkpointed and sharded models compute with them, and the
    optimizer knows no others. Where they were is kept in a copy, which is all the memory it takes.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._found: dict[Tensor, Tensor] = {}

    @torch.no_grad()
    def move(self, weights: Sequence[Tensor], displacements: Iterable[Tensor]) -> Tensor:
        """Add a displacement to each weight, and return the L2 norm of all they moved, 0-d.

        A sum is rounded once, to the number format of its weight.
        """
        parallel.reshard(self._model)
        squares = []
        for weight, displacement in zip(weights, displacements, strict=True):
            found = self._found[weight] = weight.detach().clone()
            if weight.dtype == displacement.dtype:
                weight.add_(displacement)
                squares.append(parallel.sum_of_squares(displacement))
            else:  # rounded
                weight.copy_(found + displacement)
                squares.append(parallel.sum_of_squares((weight - found).to(displacement.dtype)))
        parallel.reshard(self._model)
        return torch.stack(squares).sum().sqrt()

    @torch.no_grad()
    def restore(self) -> None:
        """Put the weights back to where they were found, if they are away."""
        if not self._found:
            return
        parallel.reshard(self._model)
        for weight, found in self._found.items():
            weight.copy_(found)
        self._found.clear()


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
