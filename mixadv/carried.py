"""A loss whose backward also delivers gradients that were computed before it."""

from typing import Any

import torch
from torch import Tensor

from mixadv.site import Pass, Site


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
        engine: Any = torch.autograd.Variable._execution_engine  # pyright: ignore
        engine.queue_callback(lambda: None if _retained(ctx) else ctx.end())
        return factor, None, None, None, *[factor.to(g.dtype) * g for g in ctx.gradients]


def _retained(ctx: Any) -> bool:
    """Return whether the backward that has run kept the graph, for another one."""
    try:
        return bool(ctx.saved_tensors)
    except RuntimeError:
        return False


def attach(
    objective: Tensor,
    carried: dict[Tensor, Tensor],
    earlier: Tensor,
    passes: list[Pass],
    site: Site,
) -> Tensor:
    """Return a loss that carries the earlier passes, and those that its backward recomputes."""
    recomputable: list[Pass] = [p for p in passes if p.recomputable]
    if not carried and not recomputable:
        return objective

    def end() -> None:
        recomputable.clear()
        site.detach()

    earlier = earlier.to(objective)
    gradients = list(carried.values())
    return _Carried.apply(objective, earlier, gradients, end, *carried)  # pyright: ignore
