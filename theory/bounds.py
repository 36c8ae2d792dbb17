"""The bounds of `statements.md`, one small function per statement.

Everywhere the learner minimises xᵀAy over x in the simplex of m rows, the adversary maximises over
y in that of n columns. `range_` is r = max A − min A, `steps` is T, `step_size` is η, `temperature`
is τ, and L = log m + log n. Arguments are numbers or arrays, which broadcast over a batch of games.
Bounds on a gap are in units of the payoff.
"""

import math
from typing import Any

import numpy as np

Real = Any  # a number or an array of them: everything broadcasts


def _log_size(m: Real, n: Real) -> Real:
    return np.log(m) + np.log(n)


def hedge(range_: Real, m: Real, n: Real, steps: Real, step_size: Real) -> Real:
    """H1, H3: gap of Hedge's mean strategies, `log m/(η_x·T) + log n/(η_y·T) + (η_x + η_y)·r²/8`.

    Args:
        range_: r, at least 0.
        m: number of rows.
        n: number of columns.
        steps: T, at least 1.
        step_size: η > 0 for both players, or the pair (η_x, η_y).

    Example:
        >>> print(f"{hedge(2.0, 4, 4, 100, 0.1):.4f}")
        0.3773
    """
    eta_x, eta_y = step_size if isinstance(step_size, tuple) else (step_size, step_size)
    start = np.log(m) / (eta_x * steps) + np.log(n) / (eta_y * steps)
    return start + (eta_x + eta_y) * range_**2 / 8


def hedge_step(range_: Real, m: Real, n: Real, steps: Real) -> Real:
    """H2: the η that makes `hedge` smallest, `(2/r)·√(L/T)`.

    Example:
        >>> eta = hedge_step(2.0, 4, 4, 100)
        >>> bool(np.isclose(hedge(2.0, 4, 4, 100, eta), hedge_optimal_step(2.0, 4, 4, 100)))
        True
    """
    return 2 * np.sqrt(_log_size(m, n) / steps) / range_


def hedge_optimal_step(range_: Real, m: Real, n: Real, steps: Real) -> Real:
    """H2: gap of Hedge's mean strategies with the best common η, `r·√(L/T)`."""
    return range_ * np.sqrt(_log_size(m, n) / steps)


def hedge_steps(range_: Real, m: Real, n: Real, steps: Real) -> tuple[Real, Real]:
    """H3: the pair (η_x, η_y) that makes `hedge` smallest, `√(8·log k/T)/r` for k = m, n.

    Example:
        >>> pair = hedge_steps(2.0, 4, 9, 100)
        >>> bool(np.isclose(hedge(2.0, 4, 9, 100, pair), hedge_optimal_steps(2.0, 4, 9, 100)))
        True
    """
    return np.sqrt(8 * np.log(m) / steps) / range_, np.sqrt(8 * np.log(n) / steps) / range_


def hedge_optimal_steps(range_: Real, m: Real, n: Real, steps: Real) -> Real:
    """H3: gap with that pair, `r·(√(log m/2T) + √(log n/2T))`; at most `hedge_optimal_step`."""
    return range_ * (np.sqrt(np.log(m) / 2) + np.sqrt(np.log(n) / 2)) / np.sqrt(steps)


def anytime_hedge(range_: Real, m: Real, n: Real, steps: Real) -> Real:
    """H4: gap with η_t = √(8·log k/t)/r at step t, `3r·(√log m + √log n)/√(8T)` at every T."""
    return 3 * range_ * (np.sqrt(np.log(m)) + np.sqrt(np.log(n))) / np.sqrt(8 * steps)


def relative_hedge(spread: Real, n: Real, steps: Real, step_size: Real) -> Real:
    """H7: mean regret in units of the spread, times their harmonic mean, `h·(log n/(ηT) + ηn/4)`.

    Args:
        spread: h, the harmonic mean of the payoffs' spreads, in units of the payoff.
        n: number of points of the one player.
        steps: T, at least 1.
        step_size: η > 0, a number without unit.

    Example:
        >>> print(f"{relative_hedge(0.03, 4, 100, 0.1):.5f}")
        0.00716
    """
    return spread * (np.log(n) / (step_size * steps) + step_size * n / 4)


def relative_response(spread: Real, n: Real, steps: Real, step_size: Real) -> Real:
    """H7: what the best of still points earns above the weights after T steps, `s·log n/(ηT)`."""
    return spread * np.log(n) / (step_size * steps)


def noisy_hedge(range_: Real, m: Real, n: Real, steps: Real, step_size: Real) -> Real:
    """H5: expected gap under unbiased payoffs that lie in an interval of width r.

    It is `hedge` plus the most that the noise can be worth in expectation,
    `r·(√(log m/2T) + √(log n/2T))`.
    """
    noise = hedge_optimal_steps(range_, m, n, steps)
    return hedge(range_, m, n, steps, step_size) + noise


def optimistic_hedge(range_: Real, m: Real, n: Real, steps: Real, step_size: Real) -> Real:
    """O2: gap of optimistic Hedge's mean strategies for η ≤ 1/r, `L/(ηT) + η·r²/(2T)`.

    At η = 1/r it is `r·(L + 1/2)/T`.

    Example:
        >>> bool(np.isclose(optimistic_hedge(2.0, 3, 3, 10, 0.5), 2 * (np.log(9) + 0.5) / 10))
        True
    """
    return _log_size(m, n) / (step_size * steps) + step_size * range_**2 / (2 * steps)


def mirror_prox(m: Real, n: Real, steps: Real, step_size: Real) -> Real:
    """P1: gap of the mean of mirror-prox's extrapolated strategies for η ≤ 2/r, `L/(ηT)`.

    Example:
        >>> bool(np.isclose(mirror_prox(3, 3, 10, 2 / 4.0), 4 * np.log(9) / 20))
        True
    """
    return _log_size(m, n) / (step_size * steps)


def quantal_response(m: Real, n: Real, temperature: Real) -> Real:
    """R1: gap, without entropy, of the equilibrium with entropy, `τ·L`."""
    return temperature * _log_size(m, n)


def magnetic_step(range_: Real, temperature: Real) -> Real:
    """R2: the largest step size that is known to contract, `4τ/r²`."""
    return 4 * temperature / range_**2


def magnetic_contraction(temperature: Real, step_size: Real) -> Real:
    """R2: factor of KL(x_τ‖x) + KL(y_τ‖y) in one step for η ≤ 4τ/r², `1/(1 + ητ)`."""
    return 1 / (1 + step_size * temperature)


def magnetic(
    range_: Real, m: Real, n: Real, steps: Real, temperature: Real, step_size: Real
) -> Real:
    """R2: gap of the last strategies after T steps, `τL + r·√L·(1 + ητ)^(−T/2)` for η ≤ 4τ/r².

    Example:
        >>> tau = magnetic_temperature(1.0, 5, 5, 1000)
        >>> bool(magnetic(1.0, 5, 5, 1000, tau, magnetic_step(1.0, tau)) < 0.2)
        True
    """
    size = _log_size(m, n)
    remaining = size * magnetic_contraction(temperature, step_size) ** steps
    return temperature * size + range_ * np.sqrt(remaining)


def magnetic_temperature(range_: Real, m: Real, n: Real, steps: Real) -> Real:
    """R2: the τ that makes `magnetic` smallest at η = 4τ/r², found by iterating its own equation.

    With s = 2τ/r the bound is r·(sL/2 + √L·(1 + s²)^(−T/2)). Where it is stationary,
    (T/2 + 1)·log(1 + s²) = log(2Ts/√L); iterated from above, this falls to the larger root, the
    minimum. It is 0, a bound of r·√L that says nothing, where there is no such root.
    """
    steps = np.asarray(steps, dtype=float)
    size = np.maximum(_log_size(m, n), np.log(2))  # 1×1 games have no gap at any τ
    scale = 2 * steps / np.sqrt(size)
    s = np.ones_like(scale)
    for _ in range(200):
        growth = np.log(np.maximum(scale * s, 1.0))
        s = np.sqrt(np.expm1(growth / (steps / 2 + 1)))
    return range_ * s / 2


def measure_hedge(divergence: Real, range_: Real, steps: Real, step_size: Real) -> Real:
    """C1: `F(μ̄,ν) − F(μ,ν̄)` against comparators at KL(μ‖μ₁) + KL(ν‖ν₁) = `divergence`.

    It is `divergence/(ηT) + η·r²/4`, on any two measurable spaces.
    """
    return divergence / (step_size * steps) + step_size * range_**2 / 4


def smoothing(dimension: int, lipschitz: Real, weight: Real, reach: float) -> Real:
    """C3, G1: cost of one player, `min over 0 < ε ≤ 1 of weight·d·log(1/ε) + Lip·reach·√d·ε`.

    Args:
        dimension: d of the player's unit torus or cube.
        lipschitz: Lip of the payoff in this player's ℓ2 norm, where the side is 1.
        weight: what a unit of KL costs, above 0.
        reach: `TORUS` or `CUBE`.
    """
    slope = lipschitz * reach * math.sqrt(dimension)
    epsilon = 1 / np.maximum(1.0, slope / (weight * dimension))
    return weight * dimension * np.log(1 / epsilon) + slope * epsilon


TORUS = 1 / math.sqrt(12)  # root mean square per coordinate of a uniform point of [−½, ½]
CUBE = 1 / math.sqrt(3)  # and of [0, 1] from 0, where the comparator sits in a corner

Pair = tuple[Real, Real]


def continuous_hedge(
    range_: Real,
    lipschitz: Pair,
    dimensions: tuple[int, int],
    steps: Real,
    step_size: Real,
    reach: float = TORUS,
) -> Real:
    """C3: gap of the mean measures of Hedge that starts uniform on unit tori or cubes.

    Each player costs `smoothing` at weight 1/(ηT), and both together `η·r²/4`.

    Args:
        range_: r = sup f − inf f.
        lipschitz: of the payoff in each player's ℓ2 norm.
        dimensions: of each player's space.
        steps: T, at least 1.
        step_size: η > 0.
        reach: `TORUS` or `CUBE`.
    """
    weight = 1 / (step_size * steps)
    players = zip(dimensions, lipschitz, strict=True)
    return sum(smoothing(d, c, weight, reach) for d, c in players) + step_size * range_**2 / 4


def grid_error(spacings: Pair, lipschitz: Pair, dimensions: tuple[int, int]) -> Real:
    """C4: what a gap on a grid lacks of the gap on the space, `Σ Lip·h·√d/2`.

    Every point of the space must lie within h/2 of a grid point in each coordinate.

    Example:
        >>> grid_error((0.1, 0.1), (2.0, 2.0), (1, 1))
        0.2
    """
    players = zip(spacings, lipschitz, dimensions, strict=True)
    return sum(c * h * math.sqrt(d) / 2 for h, c, d in players)


def regularised_torus(
    temperature: Real, lipschitz: Pair, dimensions: tuple[int, int], reach: float = TORUS
) -> Real:
    """G1: gap, without entropy, of the equilibrium with entropy on unit tori or cubes.

    Each player costs `smoothing` at weight τ, so it is O(τ·log(1/τ)).
    """
    players = zip(dimensions, lipschitz, strict=True)
    return sum(smoothing(d, c, temperature, reach) for d, c in players)


def langevin_variance(
    curvature: Real, step_size: Real, temperature: Real, steps: Real = math.inf, start: Real = 0.0
) -> Real:
    """G2: variance of x ← (1 − γa)x + √(2γτ)ξ after `steps`, exact for 0 < γa < 2.

    In the limit it is `τ/(a·(1 − γa/2))`; from variance `start` it gets there by (1 − γa)² a step.

    Args:
        curvature: a.
        step_size: γ.
        temperature: τ.
        steps: number of steps, the limit by default.
        start: variance before the first step.

    Example:
        >>> langevin_variance(2.0, 0.5, 1.0)
        1.0
    """
    limit = temperature / (curvature * (1 - step_size * curvature / 2))
    return limit + (1 - step_size * curvature) ** (2 * steps) * (start - limit)


def mixed_risk(pure_risk: Real, classifiers: Real) -> Real:
    """M1: no mixture of K classifiers has a robust risk below the best one's, `pure`, over K."""
    return pure_risk / classifiers


def first_order(smoothness: Real, radius: Real) -> Real:
    """W1: how far below the worst weights of a ball one step of length ρ ends, `β·ρ²` at most."""
    return smoothness * radius**2
