"""A linear probe: multinomial logistic regression with an elastic net."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy.optimize import minimize
from scipy.special import log_softmax

if TYPE_CHECKING:
    from sklearn.preprocessing import StandardScaler


@dataclass(frozen=True)
class Probe:
    r"""A linear classifier of standardised features.

    Over W and b it minimises

    .. math:: \frac{1}{N} \sum_n -\log\operatorname{softmax}(W x_n + b)_{y_n}
        + \lambda \Big( \rho \lVert W \rVert_1 + \tfrac{1 - \rho}{2} \lVert W \rVert_2^2 \Big).

    Minimised by L-BFGS-B of scipy over the positive and the negative part of W, so that weights
    are exactly 0 where the l1-norm wants them to be. On the activations of a small encoder this
    takes a small part of the time that scikit-learn's saga, its one solver of this problem, does.

    Attributes:
        weights: W, [classes, features], fp64.
        bias: b, [classes].
        scaler: standardises features as on the training rows.
        converged: whether the minimum was reached within the steps allowed.
    """

    weights: np.ndarray
    bias: np.ndarray
    scaler: StandardScaler
    converged: bool

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
        """Fit a probe.

        Args:
            features: [rows, features].
            labels: numbers below `classes`, [rows].
            classes: how many there are.
            penalty: λ.
            l1_ratio: ρ, 1 for the l1-norm alone.
            tolerance: the decrease of the objective in a step at which to stop, nats.
            max_steps: of L-BFGS-B.

        Example:
            >>> x = np.random.default_rng(0).normal(size=(200, 3))
            >>> probe = Probe.fit(x, (x[:, 1] > 0).astype(int), 2, penalty=0.1)
            >>> probe.weights.round(1) + 0
            array([[ 0., -1.,  0.],
                   [ 0.,  1.,  0.]])
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
