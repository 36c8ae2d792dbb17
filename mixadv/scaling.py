"""Scales of gradients that are computed in fp16, which holds magnitudes from 6e-8 to 65504.

    ∇δ u = ∇δ(s·u) / s,     s a power of two, divided in fp32

A loss scaler multiplies the learner's loss alone. A payoff that is computed from predictions shows
how large its gradient is where fp16 begins: s brings the largest entry there near 16, for each
sample by itself where no sample reaches another's predictions. A loss that the model computes hides
that place: s follows the largest entry of the last gradient, one for the batch. Nothing is read
from the device.
"""

from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

Scaling = Literal["sample", "batch"]

KEY = "scale"  # in a stage's memory: the scale that follows
_FIRST = 2.0**8
_STRIDE = 2.0**8  # where the last gradient was nothing but zeros, or held no finite number
_LARGEST = 2.0**24
_GOAL = 2.0**4  # of the largest entry: some vanishes on the way to δ, sums such as θ's grow


class Formats(TorchFunctionMode):
    """Notes the number formats of what is computed in it, under autocast or not."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[torch.dtype] = set()

    @property
    def low(self) -> bool:
        """Whether a format was seen that has fewer digits than fp32."""
        return not self.seen.isdisjoint({torch.float16, torch.bfloat16})

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the function and note the number format of what it returns."""
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.seen.add(result.dtype)
        return result


def of_predictions(values: Tensor, predictions: Tensor | None, scaling: Scaling) -> Tensor | None:
    """Return the scales of payoffs, shaped like them, or one for all, 0-d.

    Args:
        values: the payoffs `[..., B]`, or fewer where samples share one.
        predictions: `[..., B, C]` or `[..., B, n, C]`, in at least fp32.
        scaling: whether each sample may have its own.

    Returns:
        None where the payoffs were not computed from the predictions.
    """
    if predictions is None or not predictions.requires_grad:
        return None
    (gradient,) = torch.autograd.grad(
        values.sum(), predictions, retain_graph=True, allow_unused=True
    )
    if gradient is None:
        return None
    alone = scaling == "sample" and gradient.shape[: values.dim()] == values.shape
    largest = gradient.abs().flatten(values.dim()).amax(-1) if alone else gradient.abs().amax()
    return torch.where(largest.isfinite() & (largest > 0), _over(_GOAL, largest), 1.0)


def following(memory: dict[str, Tensor], values: Tensor, samples: int) -> Tensor:
    """Return the scale that follows, 0-d; `values` are of `samples` each."""
    scale = memory.get(KEY, torch.tensor(_FIRST)).to(values.device)
    if values.dtype == torch.float16:  # which it is written into
        return scale.clamp(max=2.0**15 / samples)
    return scale


def follow(memory: dict[str, Tensor], scale: Tensor, gradients: Iterable[Tensor]) -> None:
    """Let the scale follow the gradients that came of it."""
    given = [g.detach() for g in gradients]
    largest = torch.stack([torch.where(g.isfinite(), g, 0).abs().amax().float() for g in given])
    finite = torch.stack([g.isfinite().all() for g in given]).all()
    blind = torch.where(finite, _STRIDE, 1 / _STRIDE)
    largest = largest.amax()
    scale = scale * torch.where(largest > 0, _over(_GOAL, largest), blind)
    memory[KEY] = scale.clamp(1 / _LARGEST, _LARGEST)


def divided(gradient: Tensor, scale: Tensor) -> Tensor:
    """Return a gradient over its scales, in at least fp32."""
    wide = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
    return wide / scale.view(*scale.shape, *[1] * (gradient.dim() - scale.dim()))


def _over(goal: float, largest: Tensor) -> Tensor:
    """Return the power of two that brings a number into [goal, 2·goal)."""
    exponent = largest.float().frexp().exponent.clamp(-100, 100)
    return 2 * goal * torch.exp2(-exponent.float())
