"""Metrics are those of scikit-learn and scipy, and 0 where these are undefined."""

import math
import warnings
from typing import Any

import numpy as np
import pytest
import sklearn.metrics
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from common import metrics

PAIRS = st.integers(1, 30).flatmap(
    lambda n: st.tuples(*[st.lists(st.integers(0, 1), min_size=n, max_size=n)] * 2)
)
SCORES = st.integers(2, 30).flatmap(
    lambda n: st.tuples(
        *[st.lists(st.integers(-50, 50).map(lambda k: k / 10), min_size=n, max_size=n)] * 2
    )
)


def counts(predictions: list[int], labels: list[int]) -> tuple[int, int, int, int]:
    """Return true and false positives, false and true negatives."""
    pairs = list(zip(predictions, labels, strict=True))
    return tuple(pairs.count(pair) for pair in [(1, 1), (1, 0), (0, 1), (0, 0)])


def correlation(x: Any, y: Any) -> float:
    """Return Pearson's correlation by its definition; 0 where one does not vary."""
    x, y = np.array(x, float) - np.mean(x), np.array(y, float) - np.mean(y)
    scale = math.sqrt((x @ x) * (y @ y))
    return float(x @ y) / scale if scale > 1e-12 else 0.0


def ranks(values: Any) -> list[float]:
    """Return the rank of each value, the mean one among equals."""
    return [
        sum(other < value for other in values) + (values.count(value) + 1) / 2 for value in values
    ]


@given(PAIRS)
def test_two_labels(pair: tuple[list[int], list[int]]):
    predictions, labels = pair
    tp, fp, fn, tn = counts(predictions, labels)
    assert metrics.accuracy(predictions, labels) == pytest.approx((tp + tn) / len(labels))
    f1 = 2 * tp / (2 * tp + fp + fn) if tp + fp + fn else 0.0
    assert metrics.f1(predictions, labels) == pytest.approx(f1)
    product = (tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)
    matthews = (tp * tn - fp * fn) / math.sqrt(product) if product else 0.0
    assert metrics.matthews(predictions, labels) == pytest.approx(matthews, abs=1e-12)


@given(SCORES)
def test_scores(pair: tuple[list[float], list[float]]):
    predictions, labels = pair
    assert metrics.pearson(predictions, labels) == pytest.approx(
        correlation(predictions, labels), abs=1e-9
    )
    assert metrics.spearman(predictions, labels) == pytest.approx(
        correlation(ranks(predictions), ranks(labels)), abs=1e-9
    )


@pytest.mark.parametrize("seed", range(3))
def test_random_predictions_give_what_the_libraries_give(seed: int):
    draw = np.random.default_rng(seed)
    several, labels = draw.integers(0, 4, (2, 200))
    assert metrics.accuracy(several, labels) == sklearn.metrics.accuracy_score(labels, several)
    assert metrics.matthews(several, labels) == sklearn.metrics.matthews_corrcoef(labels, several)
    two, gold = draw.integers(0, 2, (2, 200))
    assert metrics.f1(two, gold) == sklearn.metrics.f1_score(gold, two)
    x, y = draw.normal(size=(2, 200))
    assert metrics.pearson(x, y) == stats.pearsonr(x, y).statistic
    assert metrics.spearman(x, y) == stats.spearmanr(x, y).statistic


CONSTANT = [
    ([1, 1, 1], [0, 1, 0]),
    ([0, 1, 0], [1, 1, 1]),
    ([1, 1, 1], [1, 1, 1]),
    ([0, 0, 0], [0, 0, 0]),
    ([1], [1]),
]


@pytest.mark.parametrize(("predictions", "labels"), CONSTANT)
@pytest.mark.parametrize("kind", [int, float])
def test_where_nothing_varies_there_is_no_correlation_and_no_warning(
    predictions: list[int], labels: list[int], kind: type
):
    predictions, labels = [kind(p) for p in predictions], [kind(y) for y in labels]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert metrics.matthews(predictions, labels) == 0.0
        assert metrics.pearson(predictions, labels) == 0.0
        assert metrics.spearman(predictions, labels) == 0.0


def test_f1_without_a_positive_is_zero():
    assert metrics.f1([0, 0], [0, 0]) == 0.0
    assert metrics.f1([0, 0], [1, 0]) == 0.0


@pytest.mark.parametrize("predictions", [[1.0, 1.0 + 1e-14, 1.0], [math.nan] * 3, [math.inf, 1, 2]])
def test_what_hardly_varies_or_is_not_finite_is_a_number_still(predictions: list[float]):
    for metric in (metrics.pearson, metrics.spearman):
        assert math.isfinite(metric(predictions, [0.0, 1.0, 2.0]))
