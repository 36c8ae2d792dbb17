"""What is learned in pre-training, and how it is measured on held-out text."""

from typing import Any, NamedTuple

import numpy as np
import torch.nn.functional as F
from torch import Tensor, nn

from mixadv.tokens.masked import IGNORED, masked_predictions

Items = dict[str, Tensor]
"""Measures by name, one value per position `[N]`."""
Numbers = dict[str, float]


class Objective:
    """What is learned: how a batch is made, what is minimised, what is measured.

    Attributes:
        collator: makes a batch of rows.
        chance: what the held-out metrics are without learning, where that is known.
    """

    def __init__(self, collator: Any, chance: Numbers) -> None:
        self.collator = collator
        self.chance = chance

    def __call__(self, model: nn.Module, batch: dict[str, Tensor]) -> Any:
        """Return the loss and what comes with it, as a closure does."""
        raise NotImplementedError

    def measure(self, model: nn.Module, batch: dict[str, Tensor]) -> Items:
        """Return the measures of a batch."""
        raise NotImplementedError

    def metrics(self, items: dict[str, np.ndarray]) -> Numbers:
        """Return the metrics of the measures of all batches."""
        return {name: float(values.mean()) for name, values in items.items()}


class Masked(Objective):
    """Masked-language modelling, and correction of similar words: tokens at labelled positions."""

    def __call__(self, model: nn.Module, batch: dict[str, Tensor]) -> Any:
        """Return loss and logits at the labelled positions."""
        return masked_predictions(model, **batch)

    def measure(self, model: nn.Module, batch: dict[str, Tensor]) -> Items:
        """Return loss and hits of the labelled positions."""
        found = masked_predictions(model, **batch)
        labels = found["labels"][found["labels"] != IGNORED]
        logits = found["logits"][found["labels"] != IGNORED].float()
        return {
            "loss": F.cross_entropy(logits, labels, reduction="none"),
            "accuracy": (logits.argmax(-1) == labels).float(),
        }


class Guess(NamedTuple):
    """What one knows who knows how often each token occurs, and nothing else.

    Attributes:
        loss: cross-entropy of held-out tokens under the frequencies of training.
        accuracy: share of the most frequent token.
    """

    loss: float
    accuracy: float


def guess(train: Any, held_out: Any, vocabulary: int, special: list[int]) -> Guess:
    """Return how well frequencies foretell the tokens of rows that are held out.

    Args:
        train: rows of `input_ids`.
        held_out: rows likewise.
        vocabulary: its size.
        special: ids that are never predicted.
    """
    counts = [np.zeros(vocabulary), np.zeros(vocabulary)]
    for count, rows in zip(counts, (train, held_out), strict=True):
        for ids in rows["input_ids"]:
            np.add.at(count, ids, 1)
        count[special] = 0
    known, asked = counts[0] + 1, counts[1] / counts[1].sum()
    known[special] = 0
    shares = known / known.sum()
    logs = np.log(np.where(shares > 0, shares, 1))
    return Guess(float(-(asked * logs).sum()), float(asked[shares.argmax()]))
