"""The summary of a study: what its tables answer, for the sentences of the report."""

import math
from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from scipy import optimize, stats

from mixadv.robustness.statistics import Comparison
from studying.findings import Findings, Pair, Read, adjusted, asked, differences
from studying.plan import Study

ALPHA, POWER = 0.05, 0.8


class Verdict(NamedTuple):
    """Which methods differ from a reference."""

    comparisons: Mapping[Pair, Comparison]
    seeds: int  # of the comparison with the most
    higher: int  # how many have a higher mean
    above: list[Pair]  # whose interval is above 0
    below: list[Pair]
    sure: list[Pair]  # which are shown to differ after the correction
    left_out: list[Pair]  # which have no accuracy under attack that could be compared


class Smallest(NamedTuple):
    """The smallest difference that the design can see: true, found with a chance of `POWER`."""

    task: str
    spread: float  # standard deviation of paired differences, the median over comparisons
    seeds: int
    single: float  # by one comparison alone
    family: float  # by the first of the family, after Holm's correction
    design: float  # the same with all seeds of the study


def readings(findings: Findings) -> dict[str, Read]:
    """Return what is compared, by name: the official metric, accuracy under PGD."""
    attack = f"PGD {max(findings.study.measure.radii):g}"
    return {"official metric": Findings.official, attack: Findings.attacked}


def verdict(findings: Findings, reference: str, read: Read) -> Verdict:
    """Return how methods differ from a reference, before and after the correction.

    The family that the correction is for is all that the study compares by the same reading.
    """
    study, every = findings.study, differences(findings, read)
    corrected = adjusted(study, every)
    found = {pair: c for pair, c in every.items() if pair.reference == reference}
    left_out = [
        Pair(task, method, reference)
        for task in study.tasks
        for method in study.trained(task)
        if read is not Findings.official and findings.answers_alike(task, method)
    ]
    return Verdict(
        comparisons=found,
        seeds=max((len(c.seeds) for c in found.values()), default=0),
        higher=sum(c.difference.value > 0 for c in found.values()),
        above=[pair for pair, c in found.items() if c.difference.low > 0],
        below=[pair for pair, c in found.items() if c.difference.high < 0],
        sure=[pair for pair in found if corrected[pair] < ALPHA],
        left_out=left_out,
    )


def smallest(findings: Findings) -> list[Smallest]:
    """Return, for each task, the smallest difference in the official metric that can be seen."""
    study, found, rows = findings.study, differences(findings), []
    level = ALPHA / max(1, planned(study))
    for task in study.tasks:
        own = [c for pair, c in found.items() if pair.task == task and len(c.seeds) > 1]
        spreads = [spread for c in own if math.isfinite(spread := deviation(c))]
        if spreads:
            seeds, spread = min(len(c.seeds) for c in own), float(np.median(spreads))
            ways = (seeds, ALPHA), (seeds, level), (len(study.seeds), level)
            rows.append(Smallest(task, spread, seeds, *(spread * detectable(*w) for w in ways)))
    return rows


def deviation(comparison: Comparison) -> float:
    """Return the standard deviation of paired differences, from their interval."""
    n, (value, _, high) = len(comparison.seeds), comparison.difference
    return (high - value) / stats.t.isf(ALPHA / 2, n - 1) * n**0.5


def detectable(seeds: int, level: float) -> float:
    """Return the mean of paired differences, in their standard deviations, that a two-sided t-test
    at a level finds with a chance of `POWER`.
    """
    degrees = seeds - 1
    critical = stats.t.isf(level / 2, degrees)

    def missed(effect: float) -> float:
        return float(stats.nct.cdf(critical, degrees, effect * seeds**0.5)) - (1 - POWER)

    above = 1.0
    while missed(above) > 0:  # far out the distribution is not a number in scipy
        above *= 2
    return float(optimize.brentq(missed, 0, above))


def diverged(findings: Findings) -> list[str]:
    """Return the runs whose weights are not finite in the end."""
    return [
        f"{method} on {task} with seed {seed}"
        for task, seed, method in findings.study.cells()
        if findings.line(task, method, seed).get("diverged")
    ]


def planned(study: Study) -> int:
    """Return how many comparisons of one metric a study asks for."""
    return len([*asked(study)])


def missing(findings: Findings) -> Counter[str]:
    """Return how much of what the study asks for results do not hold."""
    lost = Counter({"runs": 0, "measures of robustness": 0})
    for task, seed, method in findings.study.cells():
        if not findings.line(task, method, seed):
            lost["runs"] += 1
            lost["measures of robustness"] += 1
        elif findings.to_measure(task, method, seed):
            lost["measures of robustness"] += 1
    return +lost
