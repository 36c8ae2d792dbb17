"""Scales of gradients that are computed in fp16, which holds magnitudes from 6e-8 to 65504.

    ∇δ u = ∇δ(s·u) / s,     s a power of two, divided in fp32

A loss scaler multiplies the learner's loss alone. A payoff that is computed from predictions shows
how large its gradient is where fp16 begins: s brings the largest entry there near 16, for each
sample by itself where no sample reaches another's predictions. A loss that the model computes hides
that place: s follows the largest entry of the last gradient, one for the batch, and stays well
below what overflowed on the way there. Nothing is read from the device.
"""

from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

Scaling = Literal["sample", "batch"]

KEY = "scale"  # in a stage's memory: the scale that follows, its bound, 1 if it held last time
_LARGEST = 2.0**24
_FIRST = (2.0**8, _LARGEST, 1.0)
_STRIDE = 2.0**8  # where the last gradient was nothing but zeros, or overflowed
_RELAXED = 2.0 ** (1 / 256)  # of the bound, with each gradient that does not overflow
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

    None where the payoffs `[..., B]` (fewer where samples share one) were not computed from the
    predictions `[..., B, C]` or `[..., B, n, C]`, in at least fp32.
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
    scale = memory.get(KEY, torch.tensor(_FIRST))[0].to(values.device)
    if values.dtype == torch.float16:  # which it is written into
        return scale.clamp(max=2.0**15 / samples)
    return scale


def follow(
    memory: dict[str, Tensor], scale: Tensor, gradients: Iterable[Tensor], most: bool = True
) -> None:
    """Let the scale in memory follow the gradients that came of it.

    `most` of their entries have to be finite, for one sample may be broken by itself; else all.
    """
    given = [g.detach() for g in gradients]
    largest = torch.stack([torch.where(g.isfinite(), g, 0).abs().amax().float() for g in given])
    broken = torch.stack([(~g.isfinite()).sum() for g in given]).sum()
    whole = torch.stack([(g.isfinite() & (g != 0)).sum() for g in given]).sum()
    held, largest = broken <= whole * most, largest.amax()
    grown = scale * torch.where(largest > 0, _over(_GOAL, largest), _STRIDE)
    *_, bound, trusted = memory.get(KEY, torch.tensor(_FIRST)).to(scale.device)
    lifted = torch.where(largest > 0, bound * _RELAXED, torch.maximum(bound, grown))
    # What overflows again right after a cut is broken whatever the scale.
    lowered = torch.where(trusted > 0, scale / _STRIDE, bound)
    bound = torch.where(held, lifted, lowered).clamp(1 / _LARGEST, _LARGEST)
    scale = torch.where(held, torch.minimum(grown, bound.log2().floor().exp2()), scale / _STRIDE)
    memory[KEY] = torch.stack([scale.clamp(1 / _LARGEST, _LARGEST), bound, held.to(bound)])


def divided(gradient: Tensor, scale: Tensor) -> Tensor:
    """Return a gradient over its scales, in at least fp32."""
    wide = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
    return wide / scale.view(*scale.shape, *[1] * (gradient.dim() - scale.dim()))


def _over(goal: float, largest: Tensor) -> Tensor:
    """Return the power of two that brings a number into [goal, 2·goal)."""
    exponent = largest.float().frexp().exponent.clamp(-100, 100)
    return 2 * goal * torch.exp2(-exponent.float())
