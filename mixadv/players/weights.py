"""Weights kept beside the live ones, by parameter: copies, means, and their place in a state."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from mixadv.checks import check_kinds
from mixadv.errors import GameError
from mixadv.model.private_torch import lerp_all

Weights = dict[Tensor, Tensor]  # by parameter


def copied(
    parameters: Iterable[Tensor], into: Weights, wide: bool = False, renew: bool = True
) -> Weights:
    """Copy parameters, in at least fp32 if `wide`; those already copied only if `renew`."""
    for parameter in parameters:
        if parameter not in into:
            dtype = torch.promote_types(parameter.dtype, torch.float32) if wide else parameter.dtype
            into[parameter] = parameter.detach().to(dtype, copy=True)
        elif renew:
            into[parameter].copy_(parameter)
    return into


def renewed(parameters: Sequence[Tensor], before: Weights, wide: bool = False) -> Weights:
    """Copy parameters as `copied` does, in the memory of copies before; no others are kept."""
    return copied(parameters, {p: before[p] for p in parameters if p in before}, wide)


def move_toward(live: Weights, goal: Weights, weight: float, keep: Tensor | None) -> None:
    """Move each live tensor by `weight` of its way to the goal, in place; not where keep is 0."""
    common = [p for p in live if p in goal]
    moving = [live[p].detach() for p in common]
    goals = [goal[p].detach().to(live[p].dtype) for p in common]
    if keep is not None:
        for x, g in zip(moving, goals, strict=True):
            x.lerp_(g, (weight * keep).to(x.dtype).reshape(()))
    elif weight == 1.0:
        for x, g in zip(moving, goals, strict=True):  # sharded weights have no copy of many
            x.copy_(g)
    elif weight:
        lerp_all(moving, goals, weight)


def by_number(weights: Weights, held: list[Tensor]) -> dict[int, Tensor]:
    """Return weights by the number of their parameter, of those that the optimizer holds."""
    numbers = {id(p): i for i, p in enumerate(held)}
    return {numbers[id(p)]: w for p, w in weights.items() if id(p) in numbers}


def by_parameter(weights: dict[int, Tensor], held: list[Tensor]) -> Weights:
    """Return copies of numbered weights by their parameter, on its device."""
    return {held[i]: w.detach().to(held[i].device, copy=True) for i, w in weights.items()}


def check_fit(weights: dict[int, Any], held: list[Tensor]) -> None:
    """Raise ValueError unless numbered weights of a checkpoint belong to these parameters."""
    check_kinds("learner part", {"a sample": weights}, {"a sample": dict})
    shapes = {i: p.shape for i, p in enumerate(held)}
    for number, weight in weights.items():
        if shapes.get(number) != getattr(weight, "shape", ()):
            raise ValueError(
                f"The checkpoint's learner part holds {weight!s:.40} for parameter {number!r}, "
                "which the optimizer does not have, or has in another shape: it belongs to "
                "another model."
            )


def check_shapes(kept: Iterable[Weights]) -> None:
    """Raise GameError unless what is kept of weights has their shape."""
    for weights in kept:
        for parameter, value in weights.items():
            if parameter.shape != value.shape:
                raise GameError(
                    f"A weight of shape {list(parameter.shape)} had the shape {list(value.shape)} "
                    "when a copy of it was kept: the model was resized, as by "
                    "resize_token_embeddings. Build the optimizer anew and wrap it again."
                )
