"""What a study found: values by method and seed, and their differences."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from common.parameters import PLAIN
from mixadv.robustness.statistics import Comparison, holm, paired_t_test
from studying.plan import COMPARED, Budget, Results, Study, measurable

NOISE = "noise"
PAIRS = (("pure", PLAIN), ("mixed", PLAIN), ("mixed", "pure"))
"""Groups that are compared in every study."""
Values = dict[int, float]
"""By seed."""


@dataclass(frozen=True)
class Findings:
    """The results of a study, by what they are of.

    Attributes:
        study: what was to be run.
        results: lines by key, those of training and those of measuring.
    """

    study: Study
    results: Results

    def line(self, task: str, method: str, budget: Budget, seed: int) -> Mapping[str, Any]:
        """Return the line of a run; an empty one if it is missing."""
        run = self.study.reported(task, method, budget, seed, self.results)
        return self.results[run.key] if run and self.study.done(run, self.results) else {}

    def measured(self, task: str, method: str, budget: Budget, seed: int) -> Mapping[str, Any]:
        """Return the sections that were measured of a run; none if they are missing."""
        run = self.study.reported(task, method, budget, seed, self.results)
        line = self.results.get(self.study.measured(run), {}) if run else {}
        return line.get("sections", {})

    def to_measure(self, task: str, method: str, budget: Budget, seed: int) -> bool:
        """Return whether the model of a run is still to be measured."""
        asked = budget in COMPARED and measurable(self.line(task, method, budget, seed))
        return asked and not self.measured(task, method, budget, seed)

    def values(
        self, task: str, method: str, budget: Budget, read: Callable[[Mapping[str, Any]], Any]
    ) -> Values:
        """Return what is read of a method's lines, by seed; in per cent."""
        lines = {s: self.line(task, method, budget, s) for s in self.study.seeds}
        return {seed: 100 * read(line) for seed, line in lines.items() if line}

    def official(self, task: str, method: str, budget: Budget) -> Values:
        """Return the official metric by seed, in per cent."""
        split = self.study.tasks[task].evaluate[0]
        return self.values(task, method, budget, lambda line: first(line["last"][split]))

    def attacked(self, task: str, method: str, budget: Budget) -> Values:
        """Return the accuracy under PGD in the largest ball by seed, in per cent.

        None where answers are alike: an accuracy that nothing can change is no robustness.
        """
        if self.answers_alike(task, method, budget):
            return {}
        found = {s: self.measured(task, method, budget, s) for s in self.study.seeds}
        largest = max(self.study.measure.radii)
        return {
            seed: 100 * of["radii"]["accuracy"][of["radii"]["radii"].index(largest)]["value"]
            for seed, of in found.items()
            if of
        }

    def answers_alike(self, task: str, method: str, budget: Budget) -> bool:
        """Return whether a method's model answers the same whatever it reads, for a seed.

        No attack changes that. Lines that do not count answers tell it by a correlation of 0.
        """
        split = self.study.tasks[task].evaluate[0]
        lines = [self.line(task, method, budget, seed) for seed in self.study.seeds]
        return any(
            line.get("answers", {}).get(split) == 1 or line["last"][split].get("Matthews") == 0
            for line in lines
            if line
        )

    def seconds(self, task: str, method: str) -> float | None:
        """Return the least seconds of an update over the seeds, the machine being shared.

        At equal epochs, where all methods are trained one after the other: on the same machine.
        """
        lines = [self.line(task, method, "epochs", seed) for seed in self.study.seeds]
        return min((of["seconds_per_update"] for of in lines if of), default=None)

    def metric(self, task: str) -> str:
        """Return the name of the official metric, and of its split."""
        split = self.study.tasks[task].evaluate[0]
        for budget, name, _, method in self.study.cells():
            for seed in self.study.seeds if name == task else ():
                if line := self.line(task, method, budget, seed):
                    return f"{next(iter(line['last'][split]))}, {split}"
        return split


def first(metrics: Mapping[str, float]) -> float:
    """Return the first of the metrics, the official one."""
    return next(iter(metrics.values()))


# Differences -----------------------------------------------------------------------------------

Read = Callable[[Findings, str, str, Budget], Values]
"""What is compared: the values by seed of a task, a method and a budget."""


def differences(
    findings: Findings, budget: Budget, read: Read = Findings.official
) -> dict[tuple[str, str], Comparison]:
    """Return the difference of each method to plain training, by task and method."""
    found = {}
    for task in findings.study.tasks:
        plain = read(findings, task, PLAIN, budget)
        for method in findings.study.methods:
            values = read(findings, task, method, budget)
            if method != PLAIN and plain.keys() & values.keys():
                found[task, method] = paired_t_test(values, plain)
    return found


def adjusted(found: Mapping[tuple[str, str], Comparison]) -> dict[tuple[str, str], float]:
    """Return Holm's p-values of the comparisons of a table."""
    names = {f"{task}/{method}": (task, method) for task, method in found}
    p = {name: found[pair].p for name, pair in names.items()}
    return {names[name]: value for name, value in holm(p).items()}


def groups(study: Study) -> dict[str, list[str]]:
    """Return the methods whose adversary plays one particle, and those that play several.

    Noise is neither: it does not look at the loss.
    """
    found: dict[str, list[str]] = {"pure": [], "mixed": []}
    for name, method in study.methods.items():
        if method.played is not None and method.solver != NOISE:
            found["mixed" if method.played.particles > 1 else "pure"].append(name)
    return found


def contrasts(
    findings: Findings, task: str, budget: Budget, read: Read = Findings.official
) -> dict[str, Comparison | None]:
    """Return how groups of methods differ, each the mean over its methods, seed by seed; and how
    the pairs of methods do that the study asks for.
    """
    study = findings.study
    means = {m: read(findings, task, m, budget) for m in study.methods}
    trained = study.trained(task, budget)
    for group, methods in groups(study).items():
        of = [means[method] for method in methods if method in trained]
        seeds = set.intersection(*(set(values) for values in of)) if of else set()
        means[group] = {seed: sum(v[seed] for v in of) / len(of) for seed in seeds}
    return {
        f"{a} − {b}": paired_t_test(means[a], means[b])
        if means[a].keys() & means[b].keys()
        else None
        for a, b in (*PAIRS, *study.pairs)
    }
