"""A loss whose backward also delivers gradients that were computed before it."""

from typing import Any

import torch
from torch import Tensor

from mixadv.errors import GameError
from mixadv.model import parallel, scaling
from mixadv.model.contexts import without_autocast
from mixadv.model.private_torch import after_backward
from mixadv.round.stage import Stage

_NOT_PASS_BY_PASS = (
    "Reentrant checkpointing cannot be differentiated pass by pass, which game.loss needs for {}: "
    "set use_reentrant=False, or use game.backward."
)
_NOT_SHARDED = (
    "game.loss differentiates each pass of {} by itself, and weights that are sharded by "
    "fully_shard get their gradients from a whole backward: use game.backward."
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

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.gradients: dict[Tensor, Tensor] = {}
        self.value = torch.zeros(())

    def add(self, objective: Tensor) -> None:
        """Differentiate a pass: gradients of weights are carried, others left in `.grad`."""
        stage, game = self.stage, self.stage.game
        if parallel.sharded(game.model):
            raise GameError(_NOT_SHARDED.format(type(game.solver).__name__))
        if game.leaf_backward:
            raise GameError(_NOT_PASS_BY_PASS.format(type(game.solver).__name__))
        cut = stage.cut.leaves()
        points = [*cut, *([] if stage.played is None else stage.played.points)]
        inputs = [p for p in [*stage.parameters, *points] if p.requires_grad]
        scale = scaling.following(stage.memory, objective, 1) if game.scaling else None
        weight = None if scale is None else scale.to(objective.dtype)
        try:
            with without_autocast(objective):
                gradients = torch.autograd.grad(objective, inputs, weight, allow_unused=True)
        except RuntimeError as error:
            if "use_reentrant" not in str(error):
                raise
            raise GameError(_NOT_PASS_BY_PASS.format(type(game.solver).__name__)) from error
        stage.theta_backwards += 1
        self.value = self.value.to(objective) + objective.detach()
        if scale is not None:
            given = [
                gradient
                for tensor, gradient in zip(inputs, gradients, strict=True)
                if gradient is not None and not any(tensor is leaf for leaf in cut)
            ]
            scaling.follow(stage.memory, scale, given, most=False)
        for tensor, gradient in zip(inputs, gradients, strict=True):
            if gradient is None:
                continue
            if any(tensor is point for point in points):
                tensor.grad = gradient  # the stage divides by what has come in
            else:
                part = gradient if scale is None else scaling.divided(gradient, scale)
                before = self.gradients.get(tensor)
                self.gradients[tensor] = part if before is None else part + before

    def attach(self, objective: Tensor) -> Tensor:
        """Return a loss that delivers what is carried, and ends what its backward recomputes."""
        self.stage.theta_backwards += 1  # the caller's
        recomputable = [p for p in self.stage.passes if p.recomputable]
        if not self.gradients and not recomputable:
            return objective
        site = self.stage.game.site

        def end() -> None:
            recomputable.clear()
            site.detach()

        value, gradients = self.value.to(objective), list(self.gradients.values())
        return _Carried.apply(objective, value, gradients, end, *self.gradients)  # pyright: ignore
