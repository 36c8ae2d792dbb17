"""Predictions of a language model at chosen positions alone.

In pre-training, task and virtual labels are those of masked positions (Liu et al. 2020,
arXiv:2004.08994): f(X) are predictions [N, C], one sample of the game per masked token. Seven
tokens in eight are not masked; that their logits are not computed saves most of the output layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixadv.modules import unwrap

IGNORED = -100
"""The label of a position that is not predicted, as in transformers."""


class MaskedPredictions(NamedTuple):
    """What a closure returns: the loss, and logits at the masked positions.

    Attributes:
        loss: mean cross-entropy over the masked positions, 0-d; 0 where there are none.
        logits: `[N, C]`, one row per masked position, in reading order.
    """

    loss: Tensor
    logits: Tensor


def masked_predictions(model: nn.Module, *, labels: Tensor, **inputs: Any) -> MaskedPredictions:
    """Return loss and logits of a masked-language model at the positions that have a label.

    Args:
        model: one of transformers with a language-model head, wrapped or not.
        labels: `[B, n]`, token ids, and -100 where nothing is predicted.
        inputs: the model's own: `input_ids` `[B, n]`, `attention_mask`, ...

    Raises:
        TypeError, ValueError: as `predictions_at`.

    Example:
        >>> from transformers import BertConfig, BertForMaskedLM
        >>> size = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
        >>> model = BertForMaskedLM(BertConfig(vocab_size=9, **size))
        >>> labels = torch.tensor([[-100, 5, -100], [3, -100, 4]])
        >>> ids = torch.tensor([[1, 2, 3], [2, 7, 2]])
        >>> masked_predictions(model, input_ids=ids, labels=labels).logits.shape
        torch.Size([3, 9])
    """
    positions = labels != IGNORED
    logits = predictions_at(model, positions, **inputs)
    summed = F.cross_entropy(logits.float(), labels[positions], reduction="sum")
    return MaskedPredictions(summed / max(1, len(logits)), logits)


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
        return model(**inputs).logits


@contextmanager
def at_positions(model: nn.Module, positions: Tensor) -> Iterator[None]:
    """Have a language model's output layer read hidden states at positions alone.

    Args:
        model: one of transformers with a language-model head, wrapped or not.
        positions: `[B, n]`, bool; logits of the vocabulary come out as `[N, C]`.

    Raises:
        TypeError, ValueError: as `predictions_at`.
    """

    def select(_: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden, *others = arguments
        if hidden.shape[:-1] != positions.shape:
            raise ValueError(
                f"The output layer reads {list(hidden.shape)}, and positions are "
                f"{list(positions.shape)}: they must be those of its tokens."
            )
        return (hidden[positions], *others)

    hook = output_layer(unwrap(model)).register_forward_pre_hook(select)
    try:
        yield
    finally:
        hook.remove()


def output_layer(model: nn.Module) -> nn.Module:
    """Return the layer of a language model that gives logits of the vocabulary.

    Raises:
        TypeError: if there is none.
    """
    find = getattr(model, "get_output_embeddings", None)
    layer = find() if find is not None else None
    if not isinstance(layer, nn.Module):
        raise TypeError(
            f"{type(model).__name__} has no language-model head, its get_output_embeddings() gives "
            "no layer: load the checkpoint with AutoModelForMaskedLM."
        )
    return layer
