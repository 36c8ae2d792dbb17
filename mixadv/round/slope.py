"""The gradient that an adversary of the weights ascends by, kept apart from the learner's."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from mixadv.errors import GameError
from mixadv.model import parallel, scaling
from mixadv.model.contexts import without_autocast
from mixadv.round.arena import Arena
from mixadv.round.passes import Passes


class Slope:
    """∇θ J, collected pass by pass; `.grad` of the weights is not touched.

    Args:
        arena: of the round.
        parameters: its parameters, listed once.
    """

    def __init__(self, arena: Arena, parameters: Iterable[Tensor]) -> None:
        self.arena = arena
        self._parameters = [p for p in parameters if p.requires_grad]
        self._aside: list[tuple[Tensor, Tensor | None]] = []  # the learner's gradients
        self._divided: dict[Tensor, Tensor] = {}  # what came in scaled, over its scale

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Put the learner's gradients aside while the body collects."""
        try:
            self._put_aside(self._parameters)
            yield
        finally:
            for tensor, gradient in self._aside:
                tensor.grad = gradient
            self._aside.clear()

    def _put_aside(self, tensors: Iterable[Tensor]) -> None:
        for tensor in tensors:
            self._aside.append((tensor, tensor.grad))
            tensor.grad = None

    def add(self, passes: Passes, objective: Tensor, points: Sequence[Tensor] = ()) -> None:
        """Differentiate an objective, within `apart`.

        By a whole backward, which sharded weights and reentrant checkpoints need, and which leaves
        their gradients on the adversary's points and on passes that were cut off. Those of a head
        outside of the model, which the backward reaches too, are put aside as well.
        """
        known = [*(x for x, _ in self._aside), *passes.cut.leaves(), *points]
        self._put_aside(self.arena.besides(passes.goals, objective, known))
        passes.theta_backwards += 1
        scaled = self.arena.calibration.scaling is not None
        scale = scaling.following(passes.memory, objective, 1) if scaled else None
        weight = None if scale is None else scale.to(objective.dtype)
        with without_autocast(objective):
            torch.autograd.backward(objective, weight)
        if scale is None:
            return
        found = [(p, p.grad) for p in self._parameters if p.grad is not None]
        if found:
            scaling.follow(passes.memory, scale, [g for _, g in found], most=False)
        for parameter, gradient in found:
            part, before = scaling.divided(gradient, scale), self._divided.get(parameter)
            self._divided[parameter] = part if before is None else before + part
            parameter.grad = None

    def take(self, weights: Sequence[Tensor], shared: bool) -> list[Tensor]:
        """Return the gradient of each weight, within `apart`: dense, in at least fp32.

        Args:
            weights: those that move.
            shared: average it over the processes.
        """
        if weights and all(w.grad is None and w not in self._divided for w in weights):
            raise GameError(
                "No weight that the adversary moves got a gradient. Under fully_shard keep "
                "model.set_requires_gradient_sync(True), and give all micro-batches of an update "
                "at once: optimizer.step([functools.partial(loss, batch) for batch in batches])."
            )
        gradients = [self._taken(weight) for weight in weights]
        if shared:
            parallel.average(gradients)
        return gradients

    def _taken(self, weight: Tensor) -> Tensor:
        gradient, weight.grad = weight.grad, None
        gradient = self._divided.pop(weight, gradient)
        wide = torch.promote_types(weight.dtype, torch.float32)
        if gradient is None:
            return torch.zeros_like(weight, dtype=wide)
        dense = gradient.to_dense() if gradient.is_sparse else gradient
        return dense.detach().to(wide)
