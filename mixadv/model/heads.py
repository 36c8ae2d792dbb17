"""What predictions stand for, as far as the model, its labels and the loss tell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mixadv.model.modules import base_of, configuration

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


class Answers(NamedTuple):
    """Labels of predictions `[B]` or `[B, n]`, below 0 where none counts, and whether they fit."""

    labels: Tensor
    certain: Tensor | bool  # 0-d, on the device


def told(result: Any, predictions: Tensor, contexts: Sequence[Mapping[str, Any]]) -> Answers | None:
    """Return the labels of classes behind or beside the logits, or that the model was called with.

    Those of the model's call are read where there is one for each sample: of tokens it may foretell
    the next one.
    """
    behind = [*result[2:]] if isinstance(result, (tuple, list)) else []
    named = [result, *contexts] if isinstance(result, Mapping) else contexts
    called = [c.get("labels") for c in named] if predictions.dim() == 2 else []
    whole = (torch.int32, torch.int64)
    tensors = [x for x in (*behind, *called) if isinstance(x, Tensor) and x.dtype in whole]
    found = next((x for x in tensors if x.shape == predictions.shape[:-1]), None)
    return None if found is None else Answers(found.long(), True)


def shown(loss: Tensor, predictions: Tensor) -> Answers | None:
    """Return the labels that the loss is a cross entropy of, as its gradient shows.

        ∂ℓ/∂z = c·(p − e_y),     c > 0 for each prediction

    so that the label is the one class whose logit the loss would raise. It is certain where the
    gradient has this form: not under label smoothing, where the sign turns once p_y is large, and
    never of two classes, where every gradient has it. A sample whose prediction is sure has none
    and keeps its answer; a token without one does not count. None where the loss was not computed
    from this very tensor.
    """
    slope = _slope(loss, predictions)
    if slope is None:
        return None
    wide = torch.promote_types(slope.dtype, torch.float32)
    slope, p = slope.to(wide), predictions.detach().to(wide).softmax(-1)
    labels = slope.argmin(-1)
    right = torch.zeros_like(p).scatter(-1, labels[..., None], 1.0)
    length = (p - right).square().sum(-1, True)  # 0 of a sample that is sure, to rounding
    size = (slope * (p - right)).sum(-1, keepdim=True) / torch.where(length > 0, length, 1.0)
    counted = (slope != 0).any(-1)
    apart = (slope - size * (p - right)).flatten(1).norm() / slope.norm().clamp(min=1e-30)
    off = predictions.argmax(-1) if predictions.dim() == 2 else torch.full_like(labels, -100)
    tolerance = 100 * torch.finfo(predictions.dtype).eps + 1e-4
    return Answers(torch.where(counted, labels, off), (apart <= tolerance) & (p.shape[-1] > 2))


def _slope(loss: Tensor, predictions: Tensor) -> Tensor | None:
    """Return the gradient of a loss in predictions; None where it cannot be told."""
    if not (loss.requires_grad and predictions.requires_grad):
        return None
    total = loss.sum()
    if predictions.dtype == torch.float16:  # in which a mean over many would have none
        total = total * predictions.shape[:-1].numel()
    try:
        return torch.autograd.grad(total, [predictions], retain_graph=True, allow_unused=True)[0]
    except RuntimeError as error:
        if "use_reentrant" not in str(error):
            raise
        return None


def of_transformers(model: Any) -> bool:
    """Return whether a model's outputs are those of a class of the transformers library."""
    return type(model).__module__.startswith("transformers.")


def counting(
    predictions: Tensor, contexts: Sequence[Mapping[str, Any]], model: Any, either: bool = False
) -> Tensor | None:
    """Return the mask of the predictions `[B, n, C]` that count, if one is known.

    They belong to real tokens, and to such as the loss is computed at, in samples that have any.
    In a model whose kind is not known a label may be of its token, or foretold by the one before:
    `either` counts both.
    """
    if predictions.dim() != 3:
        return None
    decoded = _decodes(model)
    mask = _fitting(
        contexts, "decoder_attention_mask" if decoded else "attention_mask", predictions
    )
    real = None if mask is None else mask > 0
    labels = labels_of(predictions, contexts)
    if labels is None:
        return real
    labelled = labels >= 0  # others are -100
    before = F.pad(labelled[:, 1:], (0, 1))
    if not decoded and _causal(model):
        labelled = before  # it foretells the next token
    elif not decoded and either:
        labelled = labelled | before
    if real is None:
        real = labelled if decoded else torch.ones_like(labelled)  # decoders are padded with -100
    labelled = labelled & real
    return torch.where(labelled.any(1, keepdim=True), labelled, real)


def labels_of(predictions: Tensor, contexts: Sequence[Mapping[str, Any]]) -> Tensor | None:
    """Return the labels of the predictions per token, where there are some."""
    if predictions.dim() != 3:
        return None
    labels = _fitting(contexts, "labels", predictions)
    return None if labels is None or labels.is_floating_point() else labels


def _fitting(contexts: Sequence[Mapping[str, Any]], name: str, like: Tensor) -> Tensor | None:
    """Return the first of this name with an entry for each token of the predictions."""
    found = (context.get(name) for context in contexts)
    return next((x for x in found if isinstance(x, Tensor) and x.shape == like.shape[:2]), None)


def _decodes(model: Any) -> bool:
    """Return whether predictions are those of a decoder behind an encoder, in a wrapper or not.

    A wrapper may hold the encoder alone, whose configuration is that of both.
    """
    config = configuration(model, "is_encoder_decoder")
    if config is None or not config.is_encoder_decoder:
        return False
    own = getattr(base_of(model), "config", None) is config
    return own or any(name.endswith("decoder") for name, _ in model.named_modules())


def known(model: Any) -> bool:
    """Return whether a model's kind tells to which token a label belongs.

    Not of a class of one's own, nor of a wrapper: what it does to predictions nobody knows.
    """
    return of_transformers(base_of(model)) or _causal(model)


def _causal(model: Any) -> bool:
    """Return whether a model of the transformers library predicts the next token."""
    kind = getattr(model, "loss_type", "")
    if kind is None:  # of classes with other names, among them GPT2LMHeadModel, which generates
        generates = getattr(model, "can_generate", None)
        return generates is not None and bool(generates())
    return kind in ("ForCausalLM", "ForConditionalGeneration")


def read_by(loss: Tensor, predictions: Tensor) -> Tensor | None:
    """Return which predictions `[B, n]` the loss reads: where its gradient is not 0.

    All of a sample where it reads none. None where that cannot be told: without gradients, or where
    the loss was not computed from this very tensor.
    """
    slope = _slope(loss, predictions)
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
