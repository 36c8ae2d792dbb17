"""Finite games: exact equilibria by linear programming, and games whose answer is a formula."""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import linprog

Array = NDArray[np.floating]


class Equilibrium(NamedTuple):
    """The value of a game xᵀAy, a best mixture of rows (minimiser), and one of columns."""

    value: float
    x: Array
    y: Array


def gap(payoff: ArrayLike, x: ArrayLike, y: ArrayLike) -> Array:
    """Return max_j (Aᵀx)_j − min_i (Ay)_i, for one game or a batch: `[.., m, n]`, `[.., m]`."""
    payoff, x, y = (np.asarray(z, dtype=float) for z in (payoff, x, y))
    gains = np.einsum("...mn,...m->...n", payoff, x)
    losses = np.einsum("...mn,...n->...m", payoff, y)
    return gains.max(-1) - losses.min(-1)


def equilibrium(payoff: ArrayLike, tolerance: float = 1e-9) -> Equilibrium:
    """Solve a finite game by linear programming: min v with Aᵀx ≤ v on the simplex.

    The payoff is first shifted and scaled to [−½, ½], so that units do not matter.

    Args:
        payoff: `[m, n]`.
        tolerance: largest gap of the answer, in units of the payoff's range.

    Raises:
        ArithmeticError: if the solver fails or its answer has a larger gap.

    Example:
        >>> equilibrium([[0.0, 2.0], [1.0, 0.0]]).x.round(4).tolist()
        [0.3333, 0.6667]
    """
    payoff = np.asarray(payoff, dtype=float)
    m, n = payoff.shape
    low, range_ = payoff.min(), np.ptp(payoff)
    if range_ == 0:
        return Equilibrium(float(low), np.full(m, 1 / m), np.full(n, 1 / n))
    unit = (payoff - low) / range_ - 0.5
    exact = {"primal_feasibility_tolerance": 1e-10, "dual_feasibility_tolerance": 1e-10}
    answer = linprog(
        np.r_[np.zeros(m), 1.0],
        A_ub=np.c_[unit.T, -np.ones(n)],
        b_ub=np.zeros(n),
        A_eq=[np.r_[np.ones(m), 0.0]],
        b_eq=[1.0],
        bounds=[(0, None)] * m + [(None, None)],
        options=exact,
    )
    if answer.status != 0:
        raise ArithmeticError(f"HiGHS did not solve a {m}×{n} game: {answer.message}")
    x, y = (np.clip(z, 0, None) for z in (answer.x[:m], -answer.ineqlin.marginals))
    x, y = x / x.sum(), y / y.sum()
    if (found := gap(unit, x, y)) > tolerance:
        raise ArithmeticError(f"HiGHS left a gap of {found:.1e} of the range of a {m}×{n} game.")
    return Equilibrium(float((x @ unit @ y + 0.5) * range_ + low), x, y)


def planted(x: ArrayLike, y: ArrayLike, value: float, noise: ArrayLike) -> Array:
    """Return a game with the interior equilibrium (x, y): v + (I − 1xᵀ)·M·(I − y1ᵀ).

    xᵀA and Ay are constant, v, so no pure strategy gains: F2.

    Args:
        x: `[m]`, positive, summing to 1.
        y: `[n]`, likewise.
        value: v.
        noise: M, `[m, n]`, anything.
    """
    x, y, noise = (np.asarray(z, dtype=float) for z in (x, y, noise))
    centred = noise - x @ noise
    return value + centred - (centred @ y)[:, None]


def diagonal(entries: ArrayLike) -> tuple[Array, Equilibrium]:
    """F3: diag(d) with d > 0 has value 1/Σ(1/d), and both players play ∝ 1/d."""
    entries = np.asarray(entries, dtype=float)
    value = 1 / (1 / entries).sum()
    return np.diag(entries), Equilibrium(float(value), value / entries, value / entries)


def two_by_two(a: float, b: float, c: float, d: float) -> tuple[Array, Equilibrium]:
    """F4: [[a, b], [c, d]] without a saddle point, that is a, d on one side of b, c.

    Raises:
        ValueError: if the game has a saddle point in pure strategies.
    """
    if not (max(b, c) < min(a, d) or max(a, d) < min(b, c)):
        raise ValueError(f"[[{a}, {b}], [{c}, {d}]] has a saddle point in pure strategies.")
    total = a - b - c + d
    x, y = (d - c) / total, (d - b) / total
    value = (a * d - b * c) / total
    game = np.array([[a, b], [c, d]], dtype=float)
    return game, Equilibrium(value, np.array([x, 1 - x]), np.array([y, 1 - y]))


def circulant(first_row: ArrayLike) -> tuple[Array, Equilibrium]:
    """F5: rows that are shifts of one another: uniform play is optimal, the value is the mean.

    The row (0, 1, −1) is rock, paper, scissors.
    """
    row = np.asarray(first_row, dtype=float)
    game = np.stack([np.roll(row, k) for k in range(len(row))])
    uniform = np.full(len(row), 1 / len(row))
    return game, Equilibrium(float(row.mean()), uniform, uniform)


def thresholds(classifiers: int) -> tuple[Array, Equilibrium]:
    """F6: classifier k errs on perturbation k alone: pure robust risk 1, mixed 1/K."""
    uniform = np.full(classifiers, 1 / classifiers)
    return np.eye(classifiers), Equilibrium(1 / classifiers, uniform, uniform)


def _softmax(z: Array) -> Array:
    weights = np.exp(z - z.max())
    return weights / weights.sum()


def quantal_response(
    payoff: ArrayLike,
    temperature: float,
    prior_x: ArrayLike | None = None,
    prior_y: ArrayLike | None = None,
) -> tuple[Array, Array]:
    """Return the saddle of xᵀAy + τ·KL(x‖π_x) − τ·KL(y‖π_y), unique for τ > 0.

    Its fixed point x ∝ π_x·exp(−Ay/τ), y ∝ π_y·exp(Aᵀx/τ) is solved by Newton's method in the
    payoffs g = Ay/τ and h = Aᵀx/τ, whose Jacobian is never singular, at temperatures that fall to
    τ. Priors are uniform by default; the masses of a quadrature rule give the equilibrium of a
    continuous game.

    Raises:
        ArithmeticError: if the fixed point is not met to 1e-10 in total variation.

    Example:
        >>> x, y = quantal_response([[1.0, -1.0], [-1.0, 1.0]], 0.5)
        >>> x.tolist(), y.tolist()
        ([0.5, 0.5], [0.5, 0.5])
    """
    payoff = np.asarray(payoff, dtype=float)
    m, n = payoff.shape
    log_x = np.zeros(m) if prior_x is None else np.log(np.asarray(prior_x, dtype=float))
    log_y = np.zeros(n) if prior_y is None else np.log(np.asarray(prior_y, dtype=float))
    middle, range_ = (payoff.max() + payoff.min()) / 2, np.ptp(payoff)
    hottest = max(range_ / temperature, 1.0)
    g, h = np.zeros(m), np.zeros(n)
    for heat in np.geomspace(1 / hottest, 1.0, 1 + int(np.ceil(np.log2(hottest)))):
        scaled = heat * (payoff - middle) / temperature
        g, h = _newton(scaled, log_x, log_y, g, h)
    x, y = _softmax(log_x - g), _softmax(log_y + h)
    scaled = (payoff - middle) / temperature
    error = (
        abs(_softmax(log_x - scaled @ y) - x).sum() + abs(_softmax(log_y + x @ scaled) - y).sum()
    )
    if not error < 1e-10:
        raise ArithmeticError(f"Newton's method stopped {error:.1e} from the fixed point.")
    return x, y


def _newton(scaled: Array, log_x: Array, log_y: Array, g: Array, h: Array) -> tuple[Array, Array]:
    """Solve g = A·softmax(log π_y + h), h = Aᵀ·softmax(log π_x − g), halving steps that worsen."""

    def residual(g: Array, h: Array) -> tuple[Array, Array, Array]:
        x, y = _softmax(log_x - g), _softmax(log_y + h)
        return np.r_[g - scaled @ y, h - x @ scaled], x, y

    m, n = scaled.shape
    wrong, x, y = residual(g, h)
    for _ in range(100):
        spread_x, spread_y = np.diag(x) - np.outer(x, x), np.diag(y) - np.outer(y, y)
        jacobian = np.block([[np.eye(m), -scaled @ spread_y], [scaled.T @ spread_x, np.eye(n)]])
        move, length = np.linalg.solve(jacobian, wrong), 1.0
        while length > 1e-6:
            tried = g - length * move[:m], h - length * move[m:]
            found, x, y = residual(*tried)
            if np.linalg.norm(found) < np.linalg.norm(wrong):
                break
            length /= 2
        else:
            break  # at the limit of rounding
        (g, h), wrong = tried, found
    return g, h
