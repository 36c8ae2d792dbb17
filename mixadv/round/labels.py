"""The labels of a round's batch, for solvers that read them: told, or shown by the loss."""

from collections.abc import Mapping, Sequence
from typing import Any

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
            self._found = found
        return reading._replace(answers=self._found.labels)
