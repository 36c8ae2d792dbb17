"""The summary of a study: what its tables answer, in sentences that follow from the numbers."""

from collections.abc import Iterable, Iterator

from scipy import stats

from mixadv.robustness.statistics import Comparison
from studying.findings import NOISE, Findings, Read, adjusted, contrasts, differences
from studying.plan import BUDGETS, COMPARED, Budget
from studying.tables import markdown, signed

ALPHA = 0.05
Pair = tuple[str, str]


def compared(findings: Findings) -> Iterator[tuple[str, Budget, Read]]:
    """Yield what is compared at which budget: the official metric, accuracy under PGD."""
    attack = f"PGD {max(findings.study.measure.radii):g}"
    for what, read in (("official metric", Findings.official), (attack, Findings.attacked)):
        for budget in COMPARED:
            yield what, budget, read


def verdict(findings: Findings, what: str, budget: Budget, read: Read) -> str:
    """Return how many methods differ from plain training, before and after the correction."""
    found = _judged(findings, budget, read)
    title = f"{BUDGETS[budget].capitalize()}, {what}"
    if not found:
        return f"- {title}: nothing to compare."
    corrected = adjusted(found)
    above = _named(pair for pair in found if found[pair].difference.low > 0)
    below = _named(pair for pair in found if found[pair].difference.high < 0)
    sure = _named(pair for pair in found if corrected[pair] < ALPHA)
    higher = sum(c.difference.value > 0 for c in found.values())
    return (
        f"- {title}: of {len(found)} comparisons with plain training, "
        f"{higher} have a higher mean. The 95 % interval of the difference is above 0 for {above}; "
        f"below 0 for {below}. After Holm's correction, at {ALPHA:g}, what is shown to differ is: "
        f"{sure}.{'' if read is Findings.official else _left_out(findings, budget)}"
    )


def _left_out(findings: Findings, budget: Budget) -> str:
    """Return which methods have no accuracy under attack that could be compared."""
    study = findings.study
    pairs = [(task, method) for task in study.tasks for method in study.trained(task, budget)]
    alike = [pair for pair in pairs if findings.answers_alike(*pair, budget)]
    why = "always the same answer with some seed, which no attack changes"
    return f" Left out for {why}: {_named(alike)}." if alike else ""


def _judged(findings: Findings, budget: Budget, read: Read) -> dict[Pair, Comparison]:
    """Return the differences of the methods whose adversary looks at the loss."""
    methods, found = findings.study.methods, differences(findings, budget, read)
    return {pair: of for pair, of in found.items() if methods[pair[1]].solver != NOISE}


def power(findings: Findings) -> str:
    """Return how large the first of the differences must be for Holm's correction to let it pass.

    The largest of N passes where its p-value is below α / N.
    """
    judged = [_judged(findings, budget, Findings.official) for budget in COMPARED]
    number = max(map(len, judged))
    seeds = min((len(one.seeds) for found in judged for one in found.values()), default=0)
    if seeds < 2:
        return ""
    needed, single = (stats.t.isf(ALPHA / 2 / n, seeds - 1) for n in (number, 1))
    return (
        f"With {seeds} seeds, one of {number} differences has to be {needed / single:.1f} times "
        "its ± to be shown after the correction: that none is shown does not say that there is "
        "none."
    )


def _named(pairs: Iterable[Pair]) -> str:
    return ", ".join(f"{method} on {task}" for task, method in pairs) or "none"


def grouped(findings: Findings) -> str:
    """Return the table of differences between groups of methods."""
    rows, head = [], []
    for task in findings.study.tasks:
        for what, budget, read in compared(findings):
            found = contrasts(findings, task, budget, read)
            if any(found.values()):
                signs = [signed(one) for one in found.values()]
                rows.append([task, what, BUDGETS[budget], *signs])
                head = ["task", "what", "budget", *found]
    return markdown(head, rows) if rows else ""


def diverged(findings: Findings) -> str:
    """Return the runs whose weights are not finite in the end."""
    found = [
        f"{method} on {task} with seed {seed} at {BUDGETS[budget]}"
        for budget, task, seed, method in findings.study.cells()
        if findings.line(task, method, budget, seed).get("diverged")
    ]
    return f" Diverged, so that robustness was not measured: {', '.join(found)}." if found else ""


def missing(findings: Findings) -> str:
    """Return what the study asks for and results do not hold."""
    study = findings.study
    lost: dict[str, int] = {}
    for budget, task, seed, method in study.cells():
        if not findings.line(task, method, budget, seed):
            kind = f"runs at {BUDGETS[budget]}"
        elif findings.to_measure(task, method, budget, seed):
            kind = f"measures of runs at {BUDGETS[budget]}"
        else:
            continue
        lost[kind] = lost.get(kind, 0) + 1
    if not lost:
        return "nothing"
    named = ", ".join(f"{number} {kind}" for kind, number in lost.items())
    return f"{named}, of {len(list(study.cells()))} runs"
