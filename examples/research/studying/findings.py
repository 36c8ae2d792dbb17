"""What a study found: values by method and seed, and their differences."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from common.parameters import PLAIN
from mixadv.robustness.statistics import Comparison, holm, paired_t_test
from studying.plan import Results, Study, measurable

Values = dict[int, float]
"""By seed."""


class Pair(NamedTuple):
    """Two methods on a task, the second to be taken from the first."""

    task: str
    method: str
    reference: str


@dataclass(frozen=True)
class Findings:
    """The results of a study, by what they are of.

    Attributes:
        study: what was to be run.
        results: lines by key, those of training and those of measuring.
    """

    study: Study
    results: Results

    def line(self, task: str, method: str, seed: int) -> Mapping[str, Any]:
        """Return the line of a run; an empty one if it is missing."""
        run = self.study.reported(task, method, seed, self.results)
        return self.results[run.key] if run and self.study.done(task, run, self.results) else {}

    def measured(self, task: str, method: str, seed: int) -> Mapping[str, Any]:
        """Return the sections that were measured of a run; none if they are missing."""
        run = self.study.reported(task, method, seed, self.results)
        line = self.results.get(self.study.measured(task, run), {}) if run else {}
        return line.get("sections", {})

    def to_measure(self, task: str, method: str, seed: int) -> bool:
        """Return whether the model of a run is still to be measured."""
        return measurable(self.line(task, method, seed)) and not self.measured(task, method, seed)

    def official(self, task: str, method: str) -> Values:
        """Return the official metric by seed, in per cent."""
        split = self.study.tasks[task].evaluate[0]
        lines = {seed: self.line(task, method, seed) for seed in self.study.seeds}
        return {seed: 100 * first(line["last"][split]) for seed, line in lines.items() if line}

    def finished(self, task: str) -> list[str]:
        """Return the methods of a task that a run of is finished."""
        return [method for method in self.study.trained(task) if self.official(task, method)]

    def attacked(self, task: str, method: str) -> Values:
        """Return the accuracy under PGD in the largest ball by seed, in per cent.

        None where answers are alike: an accuracy that nothing can change is no robustness.
        """
        if self.answers_alike(task, method):
            return {}
        found = {seed: self.measured(task, method, seed) for seed in self.study.seeds}
        largest = max(self.study.measure.radii)
        return {
            seed: 100 * of["radii"]["accuracy"][of["radii"]["radii"].index(largest)]["value"]
            for seed, of in found.items()
            if of
        }

    def answers_alike(self, task: str, method: str) -> bool:
        """Return whether a method's model answers the same whatever it reads, for a seed.

        No attack changes that. Lines that do not count answers tell it by a correlation of 0.
        """
        split = self.study.tasks[task].evaluate[0]
        lines = [self.line(task, method, seed) for seed in self.study.seeds]
        return any(
            line.get("answers", {}).get(split) == 1 or line["last"][split].get("Matthews") == 0
            for line in lines
            if line
        )

    def seconds(self, task: str, method: str) -> float | None:
        """Return the least seconds of an update over the seeds, the machine being shared."""
        lines = [self.line(task, method, seed) for seed in self.study.seeds]
        return min((of["seconds_per_update"] for of in lines if of), default=None)

    def metric(self, task: str) -> str:
        """Return the name of the official metric, and of its split."""
        split = self.study.tasks[task].evaluate[0]
        for of, seed, method in self.study.cells():
            if of == task and (line := self.line(task, method, seed)):
                return f"{next(iter(line['last'][split]))}, {split}"
        return split


def first(metrics: Mapping[str, float]) -> float:
    """Return the first of the metrics, the official one."""
    return next(iter(metrics.values()))


# Differences -----------------------------------------------------------------------------------

Read = Callable[[Findings, str, str], Values]
"""What is compared: the values by seed of a task and a method."""


def asked(study: Study) -> Iterator[Pair]:
    """Yield the comparisons that a study asks for: with each reference, and its pairs.

    Plain training that is longer or shorter is a point of a curve, and compared with none, unless
    it is a reference: then with plain training.
    """
    for task in study.tasks:
        trained = study.trained(task)
        pairs = [
            (method, reference)
            for reference in study.references
            for method in trained
            if not lengths(study, method) or (reference == PLAIN and method in study.references)
        ]
        for method, reference in dict.fromkeys([*pairs, *map(tuple, study.pairs)]):
            if method != reference and method in trained and reference in trained:
                yield Pair(task, method, reference)


def lengths(study: Study, method: str) -> bool:
    """Return whether a method is plain training but for its length."""
    return replace(study.methods[method], times=1.0) == study.methods[PLAIN]


def differences(findings: Findings, read: Read = Findings.official) -> dict[Pair, Comparison]:
    """Return the differences that a study asks for, where there is a seed of both methods."""
    found = {}
    for pair in asked(findings.study):
        a, b = (read(findings, pair.task, method) for method in pair[1:])
        if a.keys() & b.keys():
            found[pair] = paired_t_test(a, b)
    return found


def adjusted(study: Study, found: Mapping[Pair, Comparison]) -> dict[Pair, float]:
    """Return Holm's p-values of the comparisons found, in the family of all that are asked for.

    Those to come count with p = 1: a study that begins with its best method proves no more by it.
    """
    names = {"/".join(pair): pair for pair in asked(study)}
    p = {name: found[pair].p for name, pair in names.items() if pair in found}
    known = {name: value for name, value in p.items() if not math.isnan(value)}  # of several seeds
    corrected = holm({**dict.fromkeys(names, 1.0), **known})
    return {names[name]: corrected[name] if name in known else math.nan for name in p}
