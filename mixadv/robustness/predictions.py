"""What a model predicts of unperturbed rows: accuracy, loss, calibration."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import nn

from mixadv.checks import check_integer
from mixadv.game import Game
from mixadv.model.contexts import no_grad
from mixadv.model.replay import evaluating
from mixadv.robustness.batches import Batch, check_reading, in_order
from mixadv.robustness.statistics import Estimate, bootstrap, bootstrap_difference

BINS = 15  # of the calibration error, as in Guo et al.


@dataclass(frozen=True, eq=False)
class Predictions:
    """Predictions of rows, in the order of the data set.

    Attributes:
        probabilities: `[N, C]`, fp64.
        labels: the right ones, `[N]`.
        losses: as the closures return them, `[N]`, fp64; of a mixture −log p of the label.
    """

    probabilities: NDArray[np.float64]
    labels: NDArray[np.int64]
    losses: NDArray[np.float64]

    @property
    def correct(self) -> NDArray[np.bool_]:
        """Which rows are classified correctly, `[N]`."""
        return self.probabilities.argmax(-1) == self.labels

    @cached_property
    def accuracy(self) -> Estimate:
        """Share of rows classified correctly, with its bootstrap interval over rows."""
        return bootstrap(self.correct)

    @cached_property
    def loss(self) -> Estimate:
        """Mean loss, with its bootstrap interval over rows."""
        return bootstrap(self.losses)

    @property
    def ece(self) -> float:
        """Expected calibration error of 15 bins."""
        return expected_calibration_error(self.probabilities, self.labels)


def predict(
    model: nn.Module, batches: Iterable[Batch], *, mixture: Game | None = None
) -> Predictions:
    """Return the predictions of batches.

    The model is put in evaluation mode meanwhile; its modes and the random state are restored.

    Args:
        model: which the closures call.
        batches: as `text_batches` makes them, or your own.
        mixture: a game that keeps learner samples (`samples=`), the mixture of which predicts
            instead of the model as it is.

    Raises:
        ValueError: for logits or labels that are not those of classes, rows that come twice, or
            losses that are not finite.

    Example:
        >>> import torch
        >>> import torch.nn.functional as F
        >>> model = torch.nn.Linear(2, 2)
        >>> x, y = torch.eye(2), torch.tensor([0, 1])
        >>> def closure():
        ...     return F.cross_entropy(model(x), y, reduction="none"), model(x)
        >>> predict(model, [Batch(closure, y, [0, 1])]).probabilities.shape
        (2, 2)
    """
    kept, columns = [], []
    with evaluating(model), no_grad():
        for batch in batches:
            if mixture is None:
                losses, logits = batch.closure()
            else:
                logits = mixture.mixture(lambda b=batch: b.closure()[1])
                losses = -logits.gather(1, batch.labels[:, None])[:, 0]
            check_reading(batch, losses, logits)
            logits = logits.double().cpu()
            kept.append(batch.rows)
            columns.append([logits.softmax(-1), batch.labels.cpu(), losses.double().cpu()])
    found = Predictions(*in_order(kept, columns))
    if wrong := int((~np.isfinite(found.losses)).sum()):
        raise ValueError(
            f"The loss is not finite on {wrong} of {len(found.losses)} rows: the model has "
            "diverged, or its logits overflow. Train it with a smaller rate, or measure it in fp32."
        )
    return found


def expected_calibration_error(
    probabilities: ArrayLike, labels: ArrayLike, bins: int = BINS
) -> float:
    """Return by how much confidence and accuracy differ.

        Σ_b n_b/N · | accuracy(b) − mean confidence(b) |

    over bins (i/M, (i + 1)/M] of the probability of the predicted class: Guo et al. 2017,
    arXiv:1706.04599, eq. 3.

    Args:
        probabilities: `[N, C]`.
        labels: `[N]`.
        bins: M, of equal width.

    Example:
        >>> print(f"{expected_calibration_error([[0.9, 0.1], [0.9, 0.1]], [0, 1]):.2f}")
        0.40
    """
    check_integer("expected_calibration_error", "bins", bins, 1)
    given, wanted = np.asarray(probabilities, np.float64), np.asarray(labels)
    if given.ndim != 2 or given.shape[:1] != wanted.shape or not len(given):
        raise ValueError(
            "probabilities must be [N, C] and labels [N] of at least one row, got "
            f"{list(given.shape)} and {list(wanted.shape)}."
        )
    confidence, correct = given.max(-1), given.argmax(-1) == wanted
    edges = np.linspace(0, 1, bins + 1)[1:-1]
    which = np.digitize(confidence, edges, right=True)
    excess = np.bincount(which, correct - confidence, minlength=bins)
    return float(np.abs(excess).sum() / len(given))


def accuracy_drop(clean: Predictions, shifted: Predictions) -> Estimate:
    """Return accuracy(clean) − accuracy(shifted), of two sets of rows, with a bootstrap interval.

    Positive where the shifted rows are harder.
    """
    return bootstrap_difference(clean.correct, shifted.correct)
