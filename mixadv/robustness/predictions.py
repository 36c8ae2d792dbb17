"""Rows in batches, and what a model predicts of them unperturbed: accuracy, loss, calibration."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from mixadv.checks import check_integer
from mixadv.game import Game
from mixadv.maths.likelihood import label_losses
from mixadv.model.contexts import no_grad
from mixadv.model.replay import evaluating
from mixadv.robustness.data import DataError, Rows
from mixadv.robustness.statistics import Estimate, bootstrap, bootstrap_difference
from mixadv.tokens.reading.encoding import longest, tokens

BINS = 15  # of the calibration error, as in Guo et al.


class Batch(NamedTuple):
    """Some rows, as a closure that can be called again and again.

    Attributes:
        closure: runs the model and returns one loss per sample `[B]` and logits `[B, C]`.
        labels: `[B]`, on the device of the logits.
        rows: their places in the data set, `B` different ones.
    """

    closure: Callable[[], tuple[Tensor, Tensor]]
    labels: Tensor
    rows: list[int]


def text_batches(
    model: nn.Module,
    tokenizer: Any,
    rows: Rows,
    *,
    batch_size: int = 32,
    max_length: int | None = None,
) -> list[Batch]:
    """Return the batches of rows, on the model's device, the longest texts first.

    Rows of similar length are together, so that little is padded; what does not fit in memory
    breaks at once. The loss is cross-entropy in fp64 (fp32 where there is none), in the form of
    `mixadv.maths.likelihood`: else that of a sure prediction is 0, and no perturbation would be
    seen to raise it.

    Args:
        model: returns logits `[B, C]`, by themselves or as `.logits`.
        tokenizer: of the model.
        rows: as `read_rows` returns them.
        batch_size: rows that the model reads at a time.
        max_length: tokens; the rest of a text is cut. None asks model and tokenizer.

    Raises:
        DataError: for a text without tokens, which no model can read.
    """
    check_integer("text_batches", "batch_size", batch_size, 1)
    device = next(model.parameters()).device
    most = max_length or longest(model, tokenizer)
    order = sorted(range(len(rows)), key=rows.lengths.__getitem__, reverse=True)
    made = []
    for start in range(0, len(order), batch_size):
        places = order[start : start + batch_size]
        part = rows.take(places)
        encoding = {k: v.to(device) for k, v in tokens(model, tokenizer, part.texts, most).items()}
        _check_tokens(encoding, rows, places)
        labels = torch.tensor(part.labels, device=device)
        made.append(Batch(_closure(model, encoding, labels), labels, places))
    return made


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
            columns.append([logits.softmax(-1), batch.labels.cpu(), losses.cpu()])
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


def _check_tokens(encoding: Mapping[str, Tensor], rows: Rows, places: Sequence[int]) -> None:
    """Raise DataError for a row that the tokenizer makes nothing of."""
    counts = encoding.get("attention_mask", torch.ones_like(encoding["input_ids"])).sum(1).tolist()
    for count, place in zip(counts, places, strict=True):
        if not count:
            raise DataError(
                f"{rows.name}, row {place + 1}: the tokenizer finds no token in "
                f"{rows.texts[place]!r:.60}, and a model cannot read nothing: leave the row out."
            )


def _closure(
    model: nn.Module, encoding: Mapping[str, Tensor], labels: Tensor
) -> Callable[[], tuple[Tensor, Tensor]]:
    wide = torch.float32 if labels.device.type == "mps" else torch.float64

    def closure() -> tuple[Tensor, Tensor]:
        output = model(**encoding)
        logits = getattr(output, "logits", output)
        return label_losses(logits.to(wide), labels), logits

    return closure


def check_reading(batch: Batch, losses: Tensor, logits: Tensor) -> None:
    """Raise ValueError unless a closure returned what its batch promises."""
    count = len(batch.rows)
    if losses.shape != (count,) or logits.shape[:1] != (count,) or logits.dim() != 2:
        raise ValueError(
            f"The closure of a batch of {count} rows must return one loss per sample [{count}] "
            f"(reduction='none') and logits [{count}, C], got {list(losses.shape)} and "
            f"{list(logits.shape)}."
        )
    if batch.labels.shape != (count,):
        raise ValueError(f"{count} rows have labels of shape {list(batch.labels.shape)}.")
    check_labels(batch.labels, logits.shape[1])


def check_several(classes: int) -> None:
    """Raise ValueError for a model of one class."""
    if classes < 2:
        raise ValueError("The logits are of one class, and there is no other to be mistaken for.")


def check_labels(labels: Tensor, classes: int) -> None:
    """Raise ValueError unless labels are those of the classes that a model has."""
    if bool(((labels < 0) | (labels >= classes)).any()):
        raise ValueError(
            f"labels must be numbers from 0 to {classes - 1}, the model's classes; got "
            f"{int(labels.min())} to {int(labels.max())}."
        )


def in_order(
    rows: Sequence[Sequence[int]], columns: Sequence[Sequence[Tensor]]
) -> list[NDArray[Any]]:
    """Return columns of all batches as arrays, numbers in fp64, their rows as in the data set."""
    places = [place for batch in rows for place in batch]
    if not places:
        raise ValueError("There are no rows to measure on: the batches are empty.")
    if len(set(places)) < len(places):
        twice = next(place for place in places if places.count(place) > 1)
        raise ValueError(f"Row {twice} is in the batches twice.")
    order = np.argsort(places)
    joined = [torch.cat(list(parts)) for parts in zip(*columns, strict=True)]
    return [(x.double() if x.is_floating_point() else x).numpy()[order] for x in joined]
