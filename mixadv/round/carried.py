"""A loss whose backward also delivers gradients that were computed before it."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mixadv.errors import GameError
from mixadv.model import parallel, scaling
from mixadv.model.contexts import without_autocast
from mixadv.model.private_torch import after_backward
from mixadv.round.passes import Passes
from mixadv.round.update import Update

_NOT_PASS_BY_PASS = (
    "Reentrant checkpointing cannot be differentiated pass by pass, which game.loss needs for {}: "
    "set use_reentrant=False, or use game.backward."
)


class _Carried(torch.autograd.Function):
    """Adds the earlier passes' values to the last objective, and in backward their gradients."""

    @staticmethod
    def forward(
        ctx: Any, objective: Tensor, earlier: Tensor, gradients: Any, end: Any, *inputs: Tensor
    ) -> Tensor:
        ctx.gradients, ctx.end = gradients, end
        ctx.save_for_backward(earlier)
        return objective + earlier

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        (factor,) = upstream
        after_backward(lambda: None if _retained(ctx) else ctx.end())
        return factor, None, None, None, *[factor.to(g.dtype) * g for g in ctx.gradients]


def _retained(ctx: Any) -> bool:
    """Return whether the backward that has run kept the graph, for another one."""
    try:
        return bool(ctx.saved_tensors)
    except RuntimeError:
        return False


class Carried:
    """Gradients of a round's earlier passes, which ride along with its last objective."""

    def __init__(self, passes: Passes) -> None:
        self.passes = passes
        self.gradients: dict[Tensor, Tensor] = {}
        self.value = torch.zeros(())

    def add(self, objective: Tensor, points: Sequence[Tensor]) -> None:
        """Differentiate a pass: gradients of weights are carried.

        Those of the adversary's points, and of passes that were cut off, are left in `.grad`.
        """
        passes, arena = self.passes, self.passes.arena
        if parallel.sharded(arena.model):
            raise GameError(
                "game.loss differentiates each pass of a round by itself, and weights that are "
                "sharded by fully_shard get their gradients from a whole backward: use "
                "game.backward."
            )
        if arena.calibration.leaf_backward:
            raise GameError(self._not_pass_by_pass())
        cut = passes.cut.leaves()
        inputs = [x for x in [*passes.parameters, *cut, *points] if x.requires_grad]
        inputs += arena.besides(passes.goals, objective, inputs)  # as of a head outside
        scaled = arena.calibration.scaling is not None
        scale = scaling.following(passes.memory, objective, 1) if scaled else None
        gradients = self._differentiate(objective, inputs, scale)
        passes.theta_backwards += 1
        self.value = self.value.to(objective) + objective.detach()
        found = [(x, g) for x, g in zip(inputs, gradients, strict=True) if g is not None]
        outputs, left = ({id(x) for x in xs} for xs in (cut, [*cut, *points]))
        if scale is not None:
            whole = [g for x, g in found if id(x) not in outputs]
            scaling.follow(passes.memory, scale, whole, most=False)
        for tensor, gradient in found:
            if id(tensor) in left:
                tensor.grad = gradient  # the stage divides by what has come in
                continue
            part = gradient if scale is None else scaling.divided(gradient, scale)
            before = self.gradients.get(tensor)
            self.gradients[tensor] = part if before is None else part + before

    def _differentiate(
        self, objective: Tensor, inputs: list[Tensor], scale: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        weight = None if scale is None else scale.to(objective.dtype)
        try:
            with without_autocast(objective):
                return torch.autograd.grad(objective, inputs, weight, allow_unused=True)
        except RuntimeError as error:
            if "use_reentrant" not in str(error):
                raise
            raise GameError(self._not_pass_by_pass()) from error

    def _not_pass_by_pass(self) -> str:
        arena = self.passes.arena
        return _NOT_PASS_BY_PASS.format(type(arena.weights or arena.solver).__name__)

    def whole(self) -> Tensor:
        """Return a loss that delivers what is carried, and has no pass of its own."""
        zero = torch.zeros_like(self.value)
        return _Carried.apply(  # pyright: ignore
            zero, self.value, [*self.gradients.values()], lambda: None, *self.gradients
        )

    def attach(self, objective: Tensor) -> Tensor:
        """Return a loss that delivers what is carried, and ends what its backward recomputes."""
        passes = self.passes
        passes.theta_backwards += 1  # the caller's
        recomputable = [p for p in passes.kept if p.recomputable]
        if not self.gradients and not recomputable:
            return objective
        site = passes.arena.site

        def end() -> None:
            recomputable.clear()
            site.detach()

        value, gradients = self.value.to(objective), list(self.gradients.values())
        return _Carried.apply(objective, value, gradients, end, *self.gradients)  # pyright: ignore


def carried(update: Update) -> Tensor:
    """Return a loss that delivers the gradient of the first step of an update on one batch.

    The last pass is left to the caller's backward, unless it was run at weights that are displaced:
    its graph would not outlive their return.
    """
    if len(update.stages) > 1:
        raise GameError(
            "game.loss takes one closure: add up the loss of each micro-batch, or give the list of "
            "them to game.backward or optimizer.step."
        )
    stage = update.stages[0]
    earlier = Carried(stage.passes)
    for objective, last in update.objectives():
        if last and update.weights is None:
            return earlier.attach(objective)
        earlier.add(objective, () if stage.played is None else stage.played.points)
        if last:
            update.restore()
            return earlier.whole()
    raise AssertionError("unreachable: a round ends with a step or raises")
