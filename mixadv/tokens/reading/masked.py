"""Predictions of a language model at chosen positions alone.

In pre-training, task and virtual labels are those of masked positions (Liu et al. 2020,
arXiv:2004.08994): f(X) are predictions there. Six tokens in seven are not masked; that their logits
are not computed saves most of the output layer.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import NotRequired

from mixadv.model.modules import base_of, unwrap

IGNORED = -100
"""The label of a position that is not predicted, as in transformers."""


class MaskedPredictions(TypedDict):
    """What a closure returns: a loss, logits, and the labels that tell which of them count.

    Attributes:
        loss: mean cross-entropy over the masked positions, 0-d; 0 where there are none.
        logits: `[B, k, C]`, at the masked positions of each row in reading order, then zeros.
        labels: `[B, k]`, token ids, then -100.
        order_logits: `[B, 2]`, of the order of two segments, where that is predicted.
    """

    loss: Tensor
    logits: Tensor
    labels: Tensor
    order_logits: NotRequired[Tensor]


def masked_predictions(
    model: nn.Module, *, labels: Tensor, order: Tensor | None = None, **inputs: Any
) -> MaskedPredictions:
    """Return loss and logits of a masked-language model at the positions that have a label.

    A closure that returns them plays the same game as one that returns the model's own output,
    whose divergences too are means over the labelled tokens of a row.

    Args:
        model: a masked one of transformers with a language-model head, wrapped or not.
        labels: `[B, n]`, token ids, and -100 where nothing is predicted.
        order: `[B]`, 1 where two segments are swapped and 0 elsewhere, for a model with a second
            head (BertForPreTraining, AlbertForPreTraining), whose cross-entropy is added.
        inputs: the model's own: `input_ids` `[B, n]`, `attention_mask`, ...

    Raises:
        TypeError, ValueError: as `predictions_at`; for a causal model, or one with a decoder.

    Example:
        >>> from transformers import BertConfig, BertForMaskedLM
        >>> size = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
        >>> model = BertForMaskedLM(BertConfig(vocab_size=9, **size))
        >>> labels = torch.tensor([[-100, 5, -100], [3, -100, 4]])
        >>> ids = torch.tensor([[1, 2, 3], [2, 7, 2]])
        >>> found = masked_predictions(model, input_ids=ids, labels=labels)
        >>> found["logits"].shape, found["labels"].tolist()
        (torch.Size([2, 2, 9]), [[5, -100], [3, 4]])
    """
    kind = type(base_of(unwrap(model)))
    if _foretells(kind):
        raise TypeError(
            f"{kind.__name__} predicts the next token, and labels here are those of the tokens "
            "themselves: take the model's own output, or load AutoModelForMaskedLM."
        )
    chosen = labels != IGNORED
    with at_positions(model, chosen):
        output = model(**inputs)
    logits, wanted = _first(output, "logits", "prediction_logits"), labels[chosen]
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    summed = F.cross_entropy(wide, wanted, reduction="sum")
    found: MaskedPredictions = {
        "loss": summed / max(1, len(wanted)),
        "logits": _by_row(logits, chosen, 0),
        "labels": _by_row(wanted, chosen, IGNORED),
    }
    if order is not None:
        found["order_logits"] = _first(output, "seq_relationship_logits", "sop_logits")
        found["loss"] = found["loss"] + F.cross_entropy(found["order_logits"].to(wide), order)
    return found


def predictions_at(model: nn.Module, positions: Tensor, **inputs: Any) -> Tensor:
    """Return the logits `[N, C]` of a language model at positions, in reading order.

    Args:
        model: one of transformers with a language-model head, wrapped or not.
        positions: `[B, n]`, bool.
        inputs: the model's own, without labels.

    Raises:
        TypeError: if the model has no language-model head.
        ValueError: if the output layer reads something else than one vector per token.
    """
    with at_positions(model, positions):
        return _first(model(**inputs), "logits", "prediction_logits")


@contextmanager
def at_positions(model: nn.Module, positions: Tensor) -> Iterator[None]:
    """Have a language model's output layer read hidden states at positions alone, `[N, C]`."""

    def select(_: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        read.append(True)
        hidden, *others = arguments
        if hidden.shape[:-1] != positions.shape:
            raise ValueError(
                f"The output layer reads {list(hidden.shape)}, and positions are "
                f"{list(positions.shape)}: they must be those of its tokens."
            )
        return (hidden[positions], *others)

    read: list[bool] = []
    own = unwrap(model)
    with output_layer(own).register_forward_pre_hook(select):
        yield
    if not read:
        raise TypeError(
            f"{type(own).__name__} did not call its output layer, so that logits at chosen "
            "positions alone cannot be had: take the model's own output, or, if it was compiled "
            "and run before, call torch.compiler.reset()."
        )


@cache  # a closure asks in each pass
def _foretells(kind: type) -> bool:
    """Return whether a class of transformers predicts the next token."""
    auto = sys.modules.get("transformers.models.auto.modeling_auto")
    causal, answering, masked = (
        {*getattr(auto, f"MODEL_FOR_{task}_MAPPING_NAMES", {}).values()}
        for task in ("CAUSAL_LM", "SEQ_TO_SEQ_CAUSAL_LM", "MASKED_LM")
    )
    return kind.__name__ in answering | (causal - masked)


def output_layer(model: nn.Module) -> nn.Module:
    """Return the layer that gives logits of the vocabulary; raise TypeError if there is none."""
    find = getattr(model, "get_output_embeddings", None)
    layer = find() if find is not None else None
    if not isinstance(layer, nn.Module):
        raise TypeError(
            f"{type(model).__name__} has no language-model head, its get_output_embeddings() gives "
            "no layer: load the checkpoint with AutoModelForMaskedLM."
        )
    return layer


def _by_row(values: Tensor, chosen: Tensor, rest: int) -> Tensor:
    """Return values `[N, ...]` of chosen positions `[B, n]` as `[B, k, ...]`, filled up."""
    slots = chosen.cumsum(1) - 1
    most = max(1, int(chosen.sum(1).max()))
    empty = values.new_full((len(chosen), most, *values.shape[1:]), rest)
    return empty.index_put((chosen.nonzero()[:, 0], slots[chosen]), values)


def _first(output: Any, *names: str) -> Tensor:
    """Return the first of these that the output of a model has."""
    found = [getattr(output, name) for name in names if getattr(output, name, None) is not None]
    if not found:
        raise TypeError(
            f"{type(output).__name__} has no {' or '.join(names)}: load the model with "
            "AutoModelForPreTraining."
        )
    return found[0]
