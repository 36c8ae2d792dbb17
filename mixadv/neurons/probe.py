r"""A linear probe, and the order of the neurons by its weights.

For class c the neurons are ordered by falling |W_cd|, and a_cd is the share of the weight of c that
lies before neuron d. To cover a share p of it takes the neurons with a_cd < p. As p rises from 0 to
1 for all classes at once, neuron d enters at

.. math:: a_d = \min_c a_{cd},

which ranks all neurons; of those that enter together the one with the larger share goes first.
The idea of raising the share is that of Dalvi et al. (2019, arXiv 1812.09355); the limit of
infinitely small raises, and the tie-break, are ours.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import minimize
from scipy.special import log_softmax


@dataclass(frozen=True)
class Probe:
    r"""A linear classifier of standardised features: logistic regression with an elastic net.

    Over W and b it minimises

    .. math:: \frac{1}{N} \sum_n -\log\operatorname{softmax}(W x_n + b)_{y_n}
        + \lambda \Big( \rho \lVert W \rVert_1 + \tfrac{1 - \rho}{2} \lVert W \rVert_2^2 \Big).

    Minimised by L-BFGS-B of scipy over the positive and the negative part of W, so that weights
    are exactly 0 where the l1-norm wants them to be. On the activations of a small encoder this
    takes a small part of the time that scikit-learn's saga, its one solver of this problem, does.
    """

    weights: np.ndarray  # W, [classes, features], fp64
    bias: np.ndarray  # b, [classes]
    scaler: Any  # standardises features as on the training rows
    converged: bool  # whether the minimum was reached within the steps allowed

    @classmethod
    def fit(
        cls,
        features: np.ndarray,
        labels: np.ndarray,
        classes: int,
        *,
        penalty: float = 3e-3,
        l1_ratio: float = 0.5,
        tolerance: float = 1e-6,
        max_steps: int = 500,
    ) -> Probe:
        """Fit λ = `penalty` and ρ = `l1_ratio` on [rows, features] and labels below `classes`.

        Steps of L-BFGS-B end where one lowers the objective by less than `tolerance`, in nats.
        """
        if not (penalty >= 0 and 0 <= l1_ratio <= 1):
            raise ValueError(
                f"penalty must be at least 0 and l1_ratio in [0, 1], got {penalty} and {l1_ratio}."
            )
        from sklearn.preprocessing import StandardScaler  # slow to import

        scaler = StandardScaler().fit(features)
        x = np.asarray(scaler.transform(features), np.float32)
        size = x.shape[1] * classes
        found = minimize(
            _objective(x, np.eye(classes, dtype=np.float32)[labels], penalty, l1_ratio),
            np.zeros(2 * size + classes),
            jac=True,
            method="L-BFGS-B",
            bounds=[(0, None)] * (2 * size) + [(None, None)] * classes,
            options={"maxiter": max_steps, "ftol": tolerance, "gtol": 0.0},
        )
        positive, negative = found.x[: 2 * size].reshape(2, -1, classes)
        return cls((positive - negative).T, found.x[2 * size :], scaler, bool(found.success))

    def predict(self, features: np.ndarray) -> np.ndarray:
        """Return the most probable class of each row, [rows]."""
        x = np.asarray(self.scaler.transform(features), np.float32)
        return (x @ self.weights.T.astype(np.float32) + self.bias).argmax(1)

    def accuracy(self, features: np.ndarray, labels: np.ndarray) -> float:
        """Return the share of rows whose class is predicted."""
        return float((self.predict(features) == labels).mean())


def _objective(
    x: np.ndarray, targets: np.ndarray, penalty: float, l1_ratio: float
) -> Callable[[np.ndarray], tuple[float, np.ndarray]]:
    """Return the objective and its gradient in the parts of W, transposed, and b, all flat."""
    (rows, features), classes = x.shape, targets.shape[1]
    size = features * classes
    l1, l2 = penalty * l1_ratio, penalty * (1 - l1_ratio)

    def objective(flat: np.ndarray) -> tuple[float, np.ndarray]:
        parts = flat[: 2 * size].reshape(2, features, classes)
        weights, bias = parts[0] - parts[1], flat[2 * size :]
        logs = log_softmax(x @ weights.astype(np.float32) + bias.astype(np.float32), axis=1)
        loss = -np.sum(logs * targets, dtype=np.float64) / rows
        value = loss + l1 * parts.sum() + l2 / 2 * np.square(weights).sum()
        error = (np.exp(logs) - targets) / rows
        slope = x.T @ error + l2 * weights
        return value, np.concatenate(
            [(slope + l1).ravel(), (l1 - slope).ravel(), error.sum(0, dtype=np.float64)]
        )

    return objective


def before(weights: np.ndarray) -> np.ndarray:
    """Return a, [classes, neurons], in [0, 1), of a probe's weights; 1 where the weight is 0.

    Example:
        >>> before(np.array([[0.0, 2, -5, 3], [1, 0, 0, 1]]))
        array([[1. , 0.8, 0. , 0.5],
               [0. , 1. , 1. , 0.5]])
    """
    share = _shares(weights)
    order = np.argsort(-share, axis=1, kind="stable")
    falling = np.take_along_axis(share, order, 1)
    found = np.empty_like(share)
    np.put_along_axis(found, order, np.cumsum(falling, 1) - falling, 1)
    return np.where(share > 0, found, 1.0)


def rank(weights: np.ndarray) -> np.ndarray:
    """Return the neurons in the order in which they enter, [neurons]."""
    return np.lexsort((-_shares(weights).max(0), before(weights).min(0)))


def claims(weights: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """Return which classes have brought in each of the first neurons of the ranking.

    True, [classes, chosen], where the class covers the neuron at the share at which the last of
    them enters; every neuron has a class, and may have several.
    """
    found = before(weights)[:, chosen]
    return (found < 1) & (found <= found.min(0).max())


def _shares(weights: np.ndarray) -> np.ndarray:
    size = np.abs(np.asarray(weights, dtype=np.float64))
    return size / np.maximum(size.sum(1, keepdims=True), np.finfo(np.float64).tiny)
