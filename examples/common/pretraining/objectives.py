"""What is learned in pre-training, and how it is measured on held-out text."""

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import torch.nn.functional as F
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from mixadv.robustness.data import DataError
from mixadv.tokens.reading.masked import IGNORED, masked_predictions

Items = dict[str, Tensor]
"""Measures by name, one value per position `[N]`."""
Numbers = dict[str, float]
Rows = Iterable[list[int]]
ORDER = "order"
"""The column with the order of a row's two segments."""


class Objective:
    """What is learned: how a batch is made, what is minimised, what is measured.

    Attributes:
        collator: makes a batch of rows.
        chance: what the held-out metrics are without learning, where that is known.
        minimised: what the loss of training is, for its curve.
    """

    minimised = "training loss"

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
        return {name: float(v.mean()) if len(v) else math.nan for name, v in items.items()}


class Masked(Objective):
    """Masked-language modelling, and correction of similar words: tokens at labelled positions."""

    def __call__(self, model: nn.Module, batch: dict[str, Tensor]) -> Any:
        """Return loss and logits at the labelled positions."""
        return masked_predictions(model, order=batch.pop(ORDER, None), **batch)

    def measure(self, model: nn.Module, batch: dict[str, Tensor]) -> Items:
        """Return loss and hits of the labelled positions."""
        order = batch.pop(ORDER, None)
        found = masked_predictions(model, order=order, **batch)
        labels = found["labels"][found["labels"] != IGNORED]
        logits = found["logits"][found["labels"] != IGNORED].float()
        items = {
            "loss": F.cross_entropy(logits, labels, reduction="none"),
            "accuracy": (logits.argmax(-1) == labels).float(),
        }
        if order is not None:
            items["order"] = (found["order_logits"].argmax(-1) == order).float()
        return items


class Detection(Objective):
    """Replaced-token detection: which tokens a generator has sampled."""

    minimised = "training loss:\ngenerator + 50 × discriminator"

    def __call__(self, model: nn.Module, batch: dict[str, Tensor]) -> Any:
        """Return both players' losses."""
        return model(**batch)._asdict()

    def measure(self, model: nn.Module, batch: dict[str, Tensor]) -> Items:
        """Return logits and truth at each token; the generator's loss and hits are a batch's."""
        found, real = model(**batch), batch["attention_mask"].bool()
        logits, replaced = found.logits[real].float(), found.replaced[real].float()
        return {
            "loss": F.binary_cross_entropy_with_logits(logits, replaced, reduction="none"),
            "logits": logits,
            "replaced": replaced,
            "generator loss": found.generator_loss.reshape(1),
            "generator accuracy": found.generator_accuracy.reshape(1),
        }

    def metrics(self, items: dict[str, np.ndarray]) -> Numbers:
        """Return the metrics; AUC is how often a replaced token has the larger logit of two."""
        found = super().metrics({n: v for n, v in items.items() if n not in ("logits", "replaced")})
        return {"AUC": float(roc_auc_score(items["replaced"], items["logits"])), **found}


class Guess(NamedTuple):
    """What one knows who knows how often each token occurs, and nothing else.

    Attributes:
        loss: cross-entropy of held-out tokens under the frequencies of training.
        accuracy: share of the most frequent token.
    """

    loss: float
    accuracy: float


def guess(train: Rows, held_out: Rows, vocabulary: int) -> Guess:
    """Return how well frequencies foretell the tokens of rows that are held out.

    Args:
        train: the tokens of each row that may be asked for.
        held_out: likewise.
        vocabulary: its size.
    """
    counts = [np.zeros(vocabulary), np.zeros(vocabulary)]
    for count, rows in zip(counts, (train, held_out), strict=True):
        for ids in rows:
            np.add.at(count, ids, 1)
    if counts[1].sum() == 0:
        raise DataError("The held-out text has no word to be predicted: give more text.")
    shares, asked = (counts[0] + 1) / (counts[0] + 1).sum(), counts[1] / counts[1].sum()
    return Guess(float(-(asked * np.log(shares)).sum()), float(asked[shares.argmax()]))
