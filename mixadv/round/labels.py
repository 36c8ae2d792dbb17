"""The labels of a round's batch, for solvers that read them: told, or shown by the loss."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from mixadv.errors import GameError
from mixadv.model.closure import Reading
from mixadv.model.heads import Answers, shown, told


class Labels:
    """Finds the labels in the first pass of a round that has them; the batch stays the same.

    Args:
        check: read from the device whether the loss shows them for certain, as a first round does.
    """

    def __init__(self, check: bool) -> None:
        self._check = check
        self._found: Answers | None = None

    def in_(self, reading: Reading, result: Any, contexts: Sequence[Mapping[str, Any]]) -> Reading:
        """Return a reading with the labels of its predictions, as far as they are known."""
        predictions = reading.predictions
        if predictions is None or reading.heads > 1 or predictions.shape[-1] < 2:
            return reading
        if self._found is None:
            found = told(result, predictions, contexts) or shown(reading.loss, predictions)
            if found is None or (self._check and not bool(found.certain)):
                return reading
            if self._check:
                _check_range(found.labels, predictions.shape[-1])
            self._found = found
        return reading._replace(answers=self._found.labels)


def _check_range(labels: Tensor, classes: int) -> None:
    """Raise GameError for a label beyond the classes."""
    if (largest := int(labels.max())) >= classes:
        raise GameError(
            f"The closure gave the label {largest}, and the logits are of {classes} classes: "
            f"labels go from 0 to {classes - 1}, and are below 0 where none counts."
        )
