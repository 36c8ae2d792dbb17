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


def matthews(predictions: Any, labels: Any) -> float:
    """Return Matthews' correlation of two labels, or of more."""
    if _constant(predictions) or _constant(labels):
        return 0.0
    return float(metrics.matthews_corrcoef(labels, predictions))


def pearson(predictions: Any, labels: Any) -> float:
    """Return the linear correlation."""
    return _correlation(stats.pearsonr, predictions, labels)


def spearman(predictions: Any, labels: Any) -> float:
    """Return the correlation of ranks."""
    return _correlation(stats.spearmanr, predictions, labels)


def _correlation(measure: Callable[..., Any], predictions: Any, labels: Any) -> float:
    if _constant(predictions) or _constant(labels):
        return 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of values that hardly vary, or are not finite
        value = float(measure(predictions, labels).statistic)
    return value if math.isfinite(value) else 0.0


def _constant(values: Any) -> bool:
    array = np.asarray(values)
    return len(array) < 2 or bool((array == array[0]).all())
