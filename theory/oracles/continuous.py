"""Continuous games with known equilibria, and measures by quadrature.

Payoffs take arrays or tensors of coordinates that broadcast; x minimises, y maximises.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import ndtr

Array = NDArray[np.floating]


class Measure(NamedTuple):
    """Points on a line or circle with their masses, which sum to 1."""

    points: Array
    masses: Array

    def mean(self, values: Array) -> Array:
        """Return the integral of `values`, `[.., points]`."""
        return values @ self.masses


class Example(NamedTuple):
    """A continuous game and one of its equilibria.

    Attributes:
        payoff: f(x, y), which x minimises and y maximises.
        bounds: of both players' interval; of one period for a game on the circle.
        value: of the game in mixed strategies.
        learner: an optimal measure of x.
        adversary: an optimal measure of y.
        periodic: whether both play on the circle.
    """

    payoff: Callable[[Any, Any], Any]
    bounds: tuple[float, float]
    value: float
    learner: Measure
    adversary: Measure
    periodic: bool = False


def atoms(*pairs: tuple[float, float]) -> Measure:
    """Return the measure with mass p at each of the points z, given as pairs (z, p)."""
    points, masses = np.array(pairs, dtype=float).T
    return Measure(points, masses)


def interval(low: float, high: float, nodes: int) -> Measure:
    """Return the uniform law on an interval as a Gauss–Legendre rule."""
    points, masses = np.polynomial.legendre.leggauss(nodes)
    return Measure(low + (high - low) * (points + 1) / 2, masses / 2)


def circle(nodes: int) -> Measure:
    """Return the uniform law on the circle of length 1 as equally spaced points."""
    return Measure(np.arange(nodes) / nodes, np.full(nodes, 1 / nodes))


def gibbs(potential: Callable[[Array], Array], temperature: float, reference: Measure) -> Measure:
    """Return the measure ∝ exp(−U/τ) with respect to the reference.

    Example:
        >>> law = gibbs(lambda x: x**2 / 2, 0.25, interval(-8.0, 8.0, 200))
        >>> print(f"{law.mean(law.points**2):.6f}")
        0.250000
    """
    log_density = -potential(reference.points) / temperature
    masses = reference.masses * np.exp(log_density - log_density.max())
    return Measure(reference.points, masses / masses.sum())


def _cos(z: Any) -> Any:
    return z.cos() if hasattr(z, "cos") else np.cos(z)


def _duel(x: Any, y: Any) -> Any:
    """Silent duel from the side of the one who fires at y: it gains when y hits first."""
    return -((x < y) * (x - y + x * y) + (x > y) * (x - y - x * y))


def _duel_law(nodes: int) -> Measure:
    """Density 1/(4t³) on [1/3, 1]."""
    points, masses = interval(1 / 3, 1.0, nodes)
    return Measure(points, masses * (2 / 3) / (4 * points**3))


_ENDS = atoms((-1.0, 0.5), (1.0, 0.5))
_ORIGIN = atoms((0.0, 1.0))
_KNEE = 4 ** (-1 / 3)

EXAMPLES = {
    # K1: no pure equilibrium: pure max-min is 0
    "squared distance": Example(lambda x, y: (x - y) ** 2, (-1.0, 1.0), 1.0, _ORIGIN, _ENDS),
    # K2: any law of x with mean 0 is optimal
    "distance": Example(lambda x, y: abs(x - y), (-1.0, 1.0), 1.0, _ORIGIN, _ENDS),
    # K3: the equilibria are the pairs with means 0; the gap is |E x| + |E y|
    "bilinear": Example(lambda x, y: x * y, (-1.0, 1.0), 0.0, _ORIGIN, _ENDS),
    # K4: the gap is the sum of the first Fourier coefficients; pure min-max 1, max-min −1
    "cosine": Example(
        lambda x, y: _cos(2 * np.pi * (x - y)), (0.0, 1.0), 0.0, circle(8), circle(8), True
    ),
    # K5: with entropy the uniform laws are the only equilibrium at every temperature
    "stationary": Example(
        lambda x, y: _cos(2 * np.pi * (x - y)) - 0.7 * _cos(4 * np.pi * (x - y)),
        (0.0, 1.0), 0.0, circle(8), circle(8), True,
    ),
    # K6: Parrilo's polynomial game, his x maximises
    "parrilo": Example(
        lambda x, y: 2 * x**2 + 2 * x * y**2 + y - 5 * x * y,
        (-1.0, 1.0), 0.48, atoms((0.2, 1.0)), atoms((1.0, 0.78), (-1.0, 0.22)),
    ),
    # K7: pure equilibrium inside
    "saddle": Example(
        lambda x, y: x**2 + y - 2 * x * y**2,
        (-1.0, 1.0), _KNEE - _KNEE**4, atoms((_KNEE**2, 1.0)), atoms((_KNEE, 1.0)),
    ),
    # K8: discontinuous, so only a grid can play it
    "silent duel": Example(_duel, (0.0, 1.0), 0.0, _duel_law(400), _duel_law(400)),
}  # fmt: skip


def first_harmonic(measure: Measure) -> float:
    """Return |∫exp(−2πiz)dμ|; for K4 the gap of (μ, ν) is the sum of both players'."""
    return float(abs(measure.mean(np.exp(-2j * np.pi * measure.points))))


class Trigonometric(NamedTuple):
    """K9: f(x, y) = Re Σ c_ab·exp(2πi(ax + by)), 0 ≤ a ≤ k, −k ≤ b ≤ k, on the circle.

    An equilibrium with at most 2k + 1 atoms per player exists (Carathéodory).

    Attributes:
        coefficients: c, complex, `[k + 1, 2k + 1]`.
    """

    coefficients: NDArray[np.complex128]

    @property
    def frequencies(self) -> tuple[Array, Array]:
        """The a `[k + 1]` and b `[2k + 1]`."""
        k = len(self.coefficients) - 1
        return np.arange(k + 1.0), np.arange(-k, k + 1.0)

    def payoff(self, x: Array, y: Array) -> Array:
        """Return f on all pairs of points, `[len(x), len(y)]`."""
        a, b = self.frequencies
        waves = (np.exp(2j * np.pi * np.outer(z, f)) for z, f in ((x, a), (y, b)))
        left, right = waves
        return (left @ self.coefficients @ right.T).real

    @property
    def lipschitz(self) -> tuple[float, float]:
        """Bounds Σ 2π|a||c| and Σ 2π|b||c| on the slopes."""
        sizes = 2 * np.pi * abs(self.coefficients)
        a, b = self.frequencies
        return float(abs(a) @ sizes.sum(1)), float(sizes.sum(0) @ abs(b))


def trigonometric(degree: int, seed: int) -> Trigonometric:
    """Draw a random `Trigonometric` game of this degree with |c| decreasing like 1/(1+|a|+|b|)."""
    draw = np.random.default_rng(seed)
    shape = degree + 1, 2 * degree + 1
    noise = draw.standard_normal(shape) + 1j * draw.standard_normal(shape)
    a, b = Trigonometric(noise).frequencies
    return Trigonometric(noise / (1 + a[:, None] + abs(b)))


class ProjectedLangevin:
    """The chain x ← clip(x + γ·drift(x) + √(2γτ)·ξ, lo, hi) as a matrix between points.

    Its law has a density inside and an atom at each end, so the points are lo, the nodes of a
    Gauss–Legendre rule, and hi. Exact up to the quadrature, whose spacing must resolve √(2γτ).

    Args:
        low: left end.
        high: right end.
        step_size: γ.
        temperature: τ.
        nodes: of the rule inside.

    Raises:
        ArithmeticError: if a row of the matrix misses 1 by more than 1e-9, for want of nodes.
    """

    def __init__(
        self, low: float, high: float, step_size: float, temperature: float, nodes: int = 400
    ) -> None:
        inside = interval(low, high, nodes)
        self.points = np.r_[low, inside.points, high]
        self.weights = inside.masses * (high - low)
        self.step_size = step_size
        self.spread = np.sqrt(2 * step_size * temperature)

    def kernel(self, drift: ArrayLike) -> Array:
        """Return the transition matrix for the drift at each of `points`; rows sum to 1."""
        low, *_, high = self.points
        centre = (self.points + self.step_size * np.asarray(drift))[:, None]
        z = (self.points[1:-1] - centre) / self.spread
        density = np.exp(-(z**2) / 2) / (self.spread * np.sqrt(2 * np.pi))
        ends = ndtr((low - centre) / self.spread), ndtr((centre - high) / self.spread)
        matrix = np.hstack([ends[0], density * self.weights, ends[1]])
        missing = abs(matrix.sum(1) - 1).max()
        if missing > 1e-9:
            raise ArithmeticError(
                f"The rule with {len(self.weights)} nodes misses {missing:.1e} of the mass of a "
                f"step with noise {self.spread:.1e}: use more nodes."
            )
        return matrix

    def law(self, drift: ArrayLike) -> Measure:
        """Return the stationary law for a fixed drift."""
        kernel = self.kernel(drift)
        balance = np.vstack([kernel.T - np.eye(len(kernel)), np.ones(len(kernel))])
        target = np.r_[np.zeros(len(kernel)), 1.0]
        masses = np.linalg.lstsq(balance, target, rcond=None)[0]
        return Measure(self.points, masses)
