"""The summary of a study: what its tables answer, for the sentences of the report."""

from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from scipy import stats

from mixadv.robustness.statistics import Comparison
from studying.findings import NOISE, Findings, Read, adjusted, contrasts, differences
from studying.plan import BUDGETS, COMPARED, Budget
from studying.tables import signed, table

ALPHA = 0.05
Pair = tuple[str, str]
"""A task and a method."""


class Verdict(NamedTuple):
    """Which methods differ from plain training."""

    comparisons: int
    seeds: int  # of the comparison with the most
    higher: int  # how many have a higher mean
    above: list[Pair]  # whose interval is above 0
    below: list[Pair]
    sure: list[Pair]  # which are shown to differ after the correction
    left_out: list[Pair]  # which have no accuracy under attack that could be compared


class Power(NamedTuple):
    """How many times its ± the first of the differences must be to pass Holm's correction."""

    seeds: int
    comparisons: int
    factor: float


def compared(findings: Findings) -> Iterator[tuple[str, Budget, Read]]:
    """Yield what is compared at which budget: the official metric, accuracy under PGD."""
    attack = f"PGD {max(findings.study.measure.radii):g}"
    for what, read in (("official metric", Findings.official), (attack, Findings.attacked)):
        for budget in COMPARED:
            yield what, budget, read


def verdict(findings: Findings, budget: Budget, read: Read) -> Verdict:
    """Return how methods differ from plain training, before and after the correction."""
    study, found = findings.study, _judged(findings, budget, read)
    corrected = adjusted(found)
    pairs = [(task, method) for task in study.tasks for method in study.trained(task, budget)]
    attacked = read is not Findings.official
    return Verdict(
        comparisons=len(found),
        seeds=max((len(c.seeds) for c in found.values()), default=0),
        higher=sum(c.difference.value > 0 for c in found.values()),
        above=[pair for pair, c in found.items() if c.difference.low > 0],
        below=[pair for pair, c in found.items() if c.difference.high < 0],
        sure=[pair for pair in found if corrected[pair] < ALPHA],
        left_out=[p for p in pairs if attacked and findings.answers_alike(*p, budget)],
    )


def _judged(findings: Findings, budget: Budget, read: Read) -> dict[Pair, Comparison]:
    """Return the differences of the methods whose adversary looks at the loss."""
    methods, found = findings.study.methods, differences(findings, budget, read)
    return {pair: c for pair, c in found.items() if methods[pair[1]].solver != NOISE}


def power(findings: Findings) -> Power | None:
    """Return what Holm's correction asks for; None without an interval.

    The largest of N passes where its p-value is below α / N.
    """
    judged = [_judged(findings, budget, Findings.official) for budget in COMPARED]
    number = max(map(len, judged))
    seeds = min((len(c.seeds) for found in judged for c in found.values()), default=0)
    if seeds < 2:
        return None
    needed, single = (stats.t.isf(ALPHA / 2 / n, seeds - 1) for n in (number, 1))
    return Power(seeds, number, needed / single)


def grouped(findings: Findings) -> str:
    """Return the table of differences between groups of methods."""
    rows, head = [], []
    for task in findings.study.tasks:
        for what, budget, read in compared(findings):
            found = contrasts(findings, task, budget, read)
            if any(found.values()):
                rows.append([task, what, BUDGETS[budget], *map(signed, found.values())])
                head = ["task", "what", "budget", *found]
    return table(head, rows)


def diverged(findings: Findings) -> list[str]:
    """Return the runs whose weights are not finite in the end."""
    return [
        f"{method} on {task} with seed {seed} at {BUDGETS[budget]}"
        for budget, task, seed, method in findings.study.cells()
        if findings.line(task, method, budget, seed).get("diverged")
    ]


def missing(findings: Findings) -> Counter[str]:
    """Return how much of what the study asks for results do not hold."""
    lost: Counter[str] = Counter()
    for budget, task, seed, method in findings.study.cells():
        if not findings.line(task, method, budget, seed):
            lost[f"runs at {BUDGETS[budget]}"] += 1
        elif findings.to_measure(task, method, budget, seed):
            lost[f"measures of runs at {BUDGETS[budget]}"] += 1
    return lost
