"""What attacks on texts found, one by one and in sum."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from mixadv.tokens.reading.encoding import Text


@dataclass(frozen=True)
class Attack:
    """What an attack made of one text.

    Attributes:
        original: the text, or the pair.
        perturbed: the text with words replaced; the original where none was.
        label: the right one.
        before: the label predicted of the original.
        after: the label predicted of the perturbed text.
        swaps: old and new word by the index of the word.
        words: of the text.
        queries: texts that the model read; the pass with a gradient is one.
    """

    original: Text
    perturbed: Text
    label: int
    before: int
    after: int
    swaps: Mapping[int, tuple[str, str]]
    words: int
    queries: int

    @property
    def skipped(self) -> bool:
        """Whether the original was misclassified, and so not attacked."""
        return self.before != self.label

    @property
    def succeeded(self) -> bool:
        """Whether the model was right before and is wrong now."""
        return not self.skipped and self.after != self.label


def attack_summary(attacks: Iterable[Attack]) -> dict[str, Any]:
    """Return how a model fared.

    Returns:
        `rows`; `clean_accuracy` and `accuracy_under_attack`; `success_rate` among the texts
        attacked, with Wilson's 95 % interval `success_interval`; of the successes the means
        `words_changed` and `share_changed`; `queries`, the mean of the texts attacked. What there
        is nothing to average for is `None`.

    Raises:
        ValueError: without attacks.
    """
    attacks = list(attacks)
    if not attacks:
        raise ValueError("There are no attacks to sum up: attack at least one text.")
    tried = [a for a in attacks if not a.skipped]
    successes = [a for a in tried if a.succeeded]
    return {
        "rows": len(attacks),
        "clean_accuracy": len(tried) / len(attacks),
        "accuracy_under_attack": (len(tried) - len(successes)) / len(attacks),
        "success_rate": len(successes) / len(tried) if tried else None,
        "success_interval": wilson(len(successes), len(tried)) if tried else None,
        "words_changed": _mean(len(a.swaps) for a in successes),
        "share_changed": _mean(len(a.swaps) / a.words for a in successes),
        "queries": _mean(a.queries for a in tried),
    }


def wilson(successes: int, trials: int, z: float = 1.959964) -> tuple[float, float]:
    """Return Wilson's score interval of a rate, 95 % by default.

    Example:
        >>> low, high = wilson(8, 10)
        >>> print(f"{low:.3f} to {high:.3f}")
        0.490 to 0.943
    """
    rate, weight = successes / trials, z * z / trials
    half = z * math.sqrt(rate * (1 - rate) / trials + weight / (4 * trials))
    low, high = rate + weight / 2 - half, rate + weight / 2 + half
    return max(low / (1 + weight), 0.0), min(high / (1 + weight), 1.0)


def _mean(values: Iterable[float]) -> float | None:
    values = list(values)
    return statistics.fmean(values) if values else None
