"""Checks at construction, and of what a solver yields; those that need a batch: `first_round`."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from mixadv.errors import GameError
from mixadv.solvers.base import Solver


def game_arguments(model: Any, solver: Any, optimizer: Any, seed: Any) -> None:
    """Check the arguments of a game."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}.")
    if not isinstance(solver, Solver):
        built = f"mixadv.{solver.__name__}()" if inspect.isclass(solver) else "mixadv.FreeLB()"
        raise TypeError(f"solver must be a solver such as {built}, got {solver!r}.")
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed must be an integer, got {seed!r}.")
    if any(isinstance(m, nn.DataParallel) for m in model.modules()):
        raise TypeError(
            "The model is wrapped in torch.nn.DataParallel, whose replicas would not receive δ. "
            "Use DistributedDataParallel (one process per device), or the bare model."
        )
    if optimizer is None:
        if solver.learner() is not None:
            raise ValueError(
                f"{solver!r} moves the weights after a step, which needs the optimizer: use "
                "mixadv.wrap(optimizer, model, solver) and its .game."
            )
        return
    base_optimizer(optimizer)
    own = {id(p) for p in model.parameters()}
    held = [p for g in optimizer.param_groups for p in g["params"]]
    if not any(id(p) in own for p in held):
        raise ValueError(
            f"The optimizer holds {len(held)} parameters and none of the {len(own)} of this "
            f"{type(model).__name__}: build it from the parameters of the model that is trained."
        )


def base_optimizer(optimizer: Any) -> None:
    """Check that an optimizer can be wrapped."""
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}."
        )
    if hasattr(optimizer, "game"):
        raise TypeError("The optimizer is wrapped already: wrap its .base.")
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    if closure is not None and closure.default is closure.empty:
        raise TypeError(
            f"{type(optimizer).__name__} evaluates its closure several times per step, and a round "
            "does too: they cannot be nested. Wrap a first-order optimizer such as AdamW or SGD."
        )


def objective(value: Any, solver: Solver) -> None:
    """Check what a solver's play yields."""
    if not isinstance(value, Tensor) or value.dim():
        tensor = isinstance(value, Tensor)
        what = f"a tensor of shape {list(value.shape)}" if tensor else repr(value)
        raise GameError(f"{type(solver).__name__}.play yielded {what}, not a 0-d tensor.")
    depends(value)


def depends(loss: Tensor) -> None:
    """Check that a loss can be differentiated."""
    if not loss.requires_grad:
        raise GameError(
            "The loss does not depend on any parameter that requires grad: the closure ran under "
            "no_grad, detached its loss, or all parameters are frozen."
        )
