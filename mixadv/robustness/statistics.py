"""How sure a measured number is: intervals over samples, intervals and tests over seeds."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from mixadv.checks import check_integer

Statistic = Literal["mean", "median"] | Callable[..., Any]
"""A name, or a function of an array and `axis=`."""

_CHUNK = 4_000_000  # numbers that are resampled at a time


class Estimate(NamedTuple):
    """A number and its confidence interval; the bounds are nan where there is none."""

    value: float
    low: float
    high: float


class Comparison(NamedTuple):
    """How two methods differ over the seeds that both were run with.

    Attributes:
        difference: mean of a − b, with Student's interval.
        p: of the two-sided paired t test; nan for a single seed.
        seeds: those that both have, in order.
    """

    difference: Estimate
    p: float
    seeds: tuple[int, ...]


def bootstrap(
    values: ArrayLike,
    statistic: Statistic = "mean",
    *,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Estimate:
    """Return a statistic of samples with its bootstrap interval.

    A resample draws as many of the samples as there are, with replacement; the interval is that of
    the percentiles (Efron 1979). Where all values are equal every resample is the same, and the
    interval would be a point: for an accuracy (the mean of Booleans, all true or all false) it is
    Wilson's then, for another statistic of Booleans there is none, for other values it is that
    point. A single value that is not Boolean has no interval.

    Args:
        values: `[N]`, numbers or Booleans.
        statistic: `"mean"`, `"median"`, or a function `(values [..., N], axis=) -> [...]`.
        level: probability with which the interval covers the statistic of what was sampled from.
        resamples: how many are drawn.
        seed: of the draws.

    Raises:
        ValueError: without values, or for values that are not finite.

    Example:
        >>> found = bootstrap([0.0, 1.0, 2.0, 3.0, 4.0] * 20)
        >>> found.value, found.low < 2 < found.high
        (2.0, True)
        >>> print("{:.2f} [{:.2f}, {:.2f}]".format(*bootstrap([True] * 20)))
        1.00 [0.84, 1.00]
    """
    accuracy = statistic in ("mean", np.mean)
    return _bootstrap([_values(values)], _named(statistic), accuracy, level, resamples, seed)


def bootstrap_difference(
    a: ArrayLike,
    b: ArrayLike,
    statistic: Statistic = "mean",
    *,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Estimate:
    """Return statistic(a) − statistic(b) with its bootstrap interval, two sets resampled apart.

    Arguments and errors are those of `bootstrap`. Of two accuracies (Boolean values) one of which
    is all true or all false the interval is Newcombe's (1998), of Wilson's for each: resamples of
    that set are all alike. A single value that is not Boolean gives no interval.

    Example:
        >>> found = bootstrap_difference([1.0, 2.0, 3.0] * 20, [0.0, 1.0, 2.0] * 20)
        >>> found.value, found.low < 1 < found.high
        (1.0, True)
    """
    statistic_of = _named(statistic)

    def difference(x: NDArray[Any], y: NDArray[Any], axis: int = -1) -> Any:
        return statistic_of(x, axis=axis) - statistic_of(y, axis=axis)

    sets, accuracy = [_values(a), _values(b)], statistic in ("mean", np.mean)
    return _bootstrap(sets, difference, accuracy, level, resamples, seed)


def wilson(values: ArrayLike, level: float = 0.95) -> Estimate:
    """Return the share of Booleans that are true with Wilson's interval (1927).

    For shares near 0 or 1 of few rows, such as the success of an attack, for which a bootstrap's
    interval is too narrow.

    Raises:
        ValueError: without values, or for values that are not Booleans.

    Example:
        >>> print("{:.2f} [{:.2f}, {:.2f}]".format(*wilson([True] + [False] * 9)))
        0.10 [0.02, 0.40]
    """
    found = _values(values)
    _check_level(level)
    if found.dtype != bool:
        raise ValueError(f"Wilson's interval is of Booleans, got {found.dtype}.")
    return _of_accuracies([found], float(found.mean()), level)


def t_interval(values: ArrayLike, level: float = 0.95) -> Estimate:
    """Return the mean of a few values, such as those of several seeds, with Student's interval.

    A single value has no interval.

    Example:
        >>> found = t_interval([70.0, 72.0, 74.0])
        >>> print(f"{found.value:.1f} [{found.low:.1f}, {found.high:.1f}]")
        72.0 [67.0, 77.0]
    """
    found = _values(values)
    _check_level(level)
    mean, half = float(found.mean()), math.nan
    if len(found) > 1:
        half = float(stats.sem(found) * stats.t.ppf((1 + level) / 2, len(found) - 1))
    return Estimate(mean, mean - half, mean + half)


def paired_t_test(
    a: Mapping[int, float], b: Mapping[int, float], level: float = 0.95
) -> Comparison:
    """Return how two methods differ over the seeds that both were run with.

    Args:
        a: a number for each seed.
        b: those of the other method.
        level: of the interval.

    Gains that are equal up to rounding, and not 0, have neither interval nor p-value: without a
    spread a t-test cannot be made, and a few seeds gain as many rows of a small set by chance.

    Raises:
        ValueError: if no seed is in both.

    Example:
        >>> found = paired_t_test({1: 72.0, 2: 74.0, 3: 73.5}, {1: 71.0, 2: 72.0, 3: 72.0, 4: 70.0})
        >>> found.seeds, f"{found.difference.value:.2f}", f"{found.p:.3f}"
        ((1, 2, 3), '1.50', '0.035')
    """
    seeds = tuple(sorted(a.keys() & b.keys()))
    if not seeds:
        raise ValueError(
            f"No seed is in both: {sorted(a)} and {sorted(b)}. Methods are compared seed by seed."
        )
    ours, theirs = (_values([scores[seed] for seed in seeds]) for scores in (a, b))
    gains = ours.astype(np.float64) - theirs
    difference, p = t_interval(gains, level), math.nan
    rounding = 8 * float(np.finfo(np.float64).eps * np.abs([ours, theirs]).max())
    if np.ptp(gains) > rounding:
        t = abs(difference.value) / stats.sem(gains)
        p = float(2 * stats.t.sf(t, len(seeds) - 1))
    elif abs(difference.value) <= rounding and len(seeds) > 1:
        p, difference = 1.0, Estimate(0.0, 0.0, 0.0)
    else:
        difference = Estimate(difference.value, math.nan, math.nan)
    return Comparison(difference, p, seeds)


def holm(p: Mapping[str, float]) -> dict[str, float]:
    """Return p-values adjusted for there being several of them (Holm 1979).

    Rejecting where the adjusted value is below α makes any false rejection at most α likely,
    however the tests depend on each other. nan, of a test that could not be made, stays nan and
    does not count.

    Example:
        >>> holm({"pgd": 0.01, "freelb": 0.04, "mat": 0.03})
        {'pgd': 0.03, 'freelb': 0.06, 'mat': 0.06}
    """
    for name, value in p.items():
        if not (math.isnan(value) or 0 <= value <= 1):
            raise ValueError(f"holm: the p-value of {name} must be between 0 and 1, got {value}.")
    tests = sorted((value, name) for name, value in p.items() if not math.isnan(value))
    adjusted, least = dict.fromkeys(p, math.nan), 0.0
    for before, (value, name) in enumerate(tests):
        least = max(least, min(1.0, (len(tests) - before) * value))
        adjusted[name] = least
    return adjusted


def _bootstrap(
    sets: Sequence[NDArray[Any]],
    statistic: Callable[..., Any],
    accuracy: bool,
    level: float,
    resamples: int,
    seed: int,
) -> Estimate:
    _check_level(level)
    check_integer("bootstrap", "resamples", resamples, 1)
    numbers = [x.astype(np.float64) for x in sets]
    value = float(statistic(*numbers, axis=-1))
    constant = [bool((x == x[0]).all()) for x in sets]
    if all(x.dtype == bool for x in sets):
        if any(constant):
            unknown = Estimate(value, math.nan, math.nan)  # resamples are alike
            return _of_accuracies(sets, value, level) if accuracy else unknown
    elif min(map(len, sets)) == 1:
        return Estimate(value, math.nan, math.nan)
    elif all(constant):
        return Estimate(value, value, value)
    found: Any = stats.bootstrap(
        numbers,
        statistic,
        n_resamples=resamples,
        batch=max(1, _CHUNK // max(map(len, sets))),
        confidence_level=level,
        method="percentile",
        vectorized=True,
        rng=np.random.default_rng(seed),
    )
    return Estimate(value, *map(float, found.confidence_interval))


def _of_accuracies(sets: Sequence[NDArray[Any]], value: float, level: float) -> Estimate:
    """Return Wilson's interval of an accuracy, Newcombe's of a difference of two."""
    below, above = [], []
    for sign, x in zip((1, -1), sets, strict=False):  # the second set is taken away
        interval = stats.binomtest(int(x.sum()), len(x)).proportion_ci(level, "wilson")
        down, up = (x.mean() - interval.low, interval.high - x.mean())[::sign]
        below.append(down)
        above.append(up)
    return Estimate(value, value - math.hypot(*below), value + math.hypot(*above))


def _named(statistic: Statistic) -> Callable[..., Any]:
    names = {"mean": np.mean, "median": np.median}
    if not callable(statistic) and statistic not in names:
        raise ValueError(f"statistic must be 'mean', 'median' or a function, got {statistic!r}.")
    return statistic if callable(statistic) else names[statistic]


def _values(values: ArrayLike) -> NDArray[Any]:
    found = np.asarray(values)
    if found.ndim != 1 or not len(found):
        raise ValueError(f"values must be a row of at least one, got shape {list(found.shape)}.")
    if found.dtype != bool:
        found = found.astype(np.float64)
    if not np.isfinite(found).all():
        place = int(np.flatnonzero(~np.isfinite(found))[0])
        raise ValueError(f"values must be finite: number {place} is {found[place]}.")
    return found


def _check_level(level: float) -> None:
    if isinstance(level, bool) or not isinstance(level, float) or not 0 < level < 1:
        raise ValueError(f"level must be between 0 and 1, got {level!r}.")
