"""What predictions stand for, as far as the model, its labels and the loss tell."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

_LIMIT = 100  # nodes between a loss and the predictions it reads
_LOSSES = {
    "BinaryCrossEntropy": "bernoulli",
    "LogSigmoid": "bernoulli",
    "Sigmoid": "bernoulli",
    "MseLoss": "squared_error",
    "SmoothL1Loss": "squared_error",
    "HuberLoss": "squared_error",
}
_SOFTMAX = ("Softmax", "NllLoss", "CrossEntropy")


class Kind(NamedTuple):
    """A divergence that suits a head, what tells so, and whether that is certain."""

    divergence: str
    why: str
    certain: bool = True


def kind_of(model: Any, labels: Any, loss: Tensor, predictions: Tensor) -> Kind | None:
    """Return what suits predictions that are no softmax's; None for a softmax, or if nothing tells.

    Args:
        model: whose configuration may name the problem.
        labels: that the model was called with, if any.
        loss: computed from the predictions.
        predictions: `[B, C]` or `[B, n, C]`.
    """
    problem = getattr(getattr(model, "config", None), "problem_type", None)
    if problem in ("multi_label_classification", "regression"):
        suits = "bernoulli" if problem == "multi_label_classification" else "squared_error"
        return Kind(suits, f"the model's problem_type is {problem!r}")
    found = [type(node).__name__ for node in _nodes(loss, {predictions.grad_fn}, set())]
    if any(name.startswith(_SOFTMAX) or "LogSoftmax" in name for name in found):
        return None
    if isinstance(labels, Tensor) and labels.is_floating_point():
        if labels.shape != predictions.shape:
            return None
        shares = bool(((labels >= 0) & (labels <= 1)).all())
        if not shares:
            return Kind("squared_error", "the labels are real numbers, one for each column")
        if bool(((labels.sum(-1) - 1).abs() > 1e-3).any()):
            return Kind("bernoulli", "the labels say yes or no for each column")
        return None
    for start, suits in _LOSSES.items():
        if any(name.startswith(start) for name in found):
            return Kind(suits, f"the loss is computed by {start}", certain=False)
    return None


def read_by(loss: Tensor, predictions: Tensor) -> Tensor | None:
    """Return which predictions `[B, n]` the loss reads: where its gradient is not 0.

    All of a sample where it reads none. None where that cannot be told: without gradients, or where
    the loss was not computed from this very tensor.
    """
    if not (loss.requires_grad and predictions.requires_grad):
        return None
    total = loss.sum()
    if predictions.dtype == torch.float16:  # in which a mean over many would have none
        total = total * predictions.shape[:2].numel()
    try:
        [slope] = torch.autograd.grad(total, [predictions], retain_graph=True, allow_unused=True)
    except RuntimeError as error:
        if "use_reentrant" not in str(error):
            raise
        slope = None
    if slope is None:
        return None
    read = (slope != 0).any(-1)
    return torch.where(read.any(1, keepdim=True), read, torch.ones_like(read))


def read_besides(loss: Tensor, first: Tensor, others: list[Tensor]) -> int:
    """Return how many of other tensors the loss reads, but for what `first` is computed from."""
    ends = {x.grad_fn for x in others} - {None}
    return len(ends.intersection(_nodes(loss, {first.grad_fn}, ends, 10 * _LIMIT)))


def _nodes(loss: Tensor, before: set[Any], at: set[Any], limit: int = _LIMIT) -> list[Any]:
    """Return so many of autograd's nodes behind a loss, the nearest first.

    The way ends `before` some nodes, and `at` others.
    """
    found: dict[Any, None] = {}
    waiting = [loss.grad_fn]
    while waiting and len(found) < limit:
        node = waiting.pop(0)
        if node is None or node in before or node in found:
            continue
        found[node] = None
        if node not in at:
            waiting += [after for after, _ in node.next_functions]
    return [*found]
