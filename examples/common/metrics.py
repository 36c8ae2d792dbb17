"""Metrics of predictions against labels, by scikit-learn and scipy; 0 where one is undefined.

A model that answers the same for every row has no correlation with anything. Libraries answer NaN
and warn; a table of results needs a number, and 0 is what guessing is worth.
"""

import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
from scipy import stats
from sklearn import metrics

Metric = Callable[[Any, Any], float]


def accuracy(predictions: Any, labels: Any) -> float:
    """Return the share of rows that are right."""
    return float(metrics.accuracy_score(labels, predictions))


def f1(predictions: Any, labels: Any) -> float:
    """Return the harmonic mean of precision and recall of label 1."""
    return float(metrics.f1_score(labels, predictions, zero_division=0.0))


def _correlation(measure: Metric) -> Metric:
    """Return the measure, with 0 where it is undefined."""

    def measured(predictions: Any, labels: Any) -> float:
        if any(len(np.unique(values)) < 2 for values in (predictions, labels)):
            return 0.0
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of values that hardly vary, or are not finite
            value = float(measure(predictions, labels))
        return value if math.isfinite(value) else 0.0

    return measured


matthews = _correlation(lambda predictions, labels: metrics.matthews_corrcoef(labels, predictions))
"""Matthews' correlation of two labels, or of more."""
pearson = _correlation(lambda predictions, labels: stats.pearsonr(predictions, labels).statistic)
"""The linear correlation."""
spearman = _correlation(lambda predictions, labels: stats.spearmanr(predictions, labels).statistic)
"""The correlation of ranks."""

METRICS: dict[str, Metric] = {
    "accuracy": accuracy,
    "F1": f1,
    "Matthews": matthews,
    "Pearson": pearson,
    "Spearman": spearman,
}
"""Metrics by the names that tables give them."""
