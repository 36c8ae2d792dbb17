"""The report of a study: what was measured, against plain training, with what is missing."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from mixadv.robustness import all_correct
from mixadv.robustness.sections import increase_of
from mixadv.robustness.statistics import Comparison, holm, paired, t_interval

import mixadv
from studying.plan import BUDGETS, Budget, Results, Study
from training.parameters import PLAIN
from training.results import over_seeds

NOISE = "noise"
NONE = "–"
"""A cell without a number."""
CONTRASTS = {
    f"{a} − {b}": (a, b) for a, b in (("pure", PLAIN), ("mixed", PLAIN), ("mixed", "pure"))
}
"""Groups that are compared."""
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
        return self.results.get(run.key, {}) if run else {}

    def measured(self, task: str, method: str, budget: Budget, seed: int) -> Mapping[str, Any]:
        """Return the sections that were measured of a run; none if they are missing."""
        run = self.study.reported(task, method, budget, seed, self.results)
        line = self.results.get(self.study.measured(run), {}) if run else {}
        return line.get("sections", {})

    def values(
        self, task: str, method: str, budget: Budget, read: Callable[[Mapping[str, Any]], Any]
    ) -> Values:
        """Return what is read of a method's lines, by seed; in per cent."""
        lines = {s: self.line(task, method, budget, s) for s in self.study.seeds}
        return {seed: 100 * read(line) for seed, line in lines.items() if line}

    def official(self, task: str, method: str, budget: Budget) -> Values:
        """Return the official metric by seed, in per cent."""
        split = self.study.tasks[task].evaluate[0]
        return self.values(task, method, budget, lambda line: _first(line["last"][split]))

    def metric(self, task: str) -> str:
        """Return the name of the official metric, and of its split."""
        split = self.study.tasks[task].evaluate[0]
        for budget, _, name, method in self.study.cells():
            for seed in self.study.seeds if name == task else ():
                if line := self.line(task, method, budget, seed):
                    return f"{next(iter(line['last'][split]))}, {split}"
        return split


def _first(metrics: Mapping[str, float]) -> float:
    return next(iter(metrics.values()))


# Differences -----------------------------------------------------------------------------------


def differences(findings: Findings, budget: Budget) -> dict[tuple[str, str], Comparison]:
    """Return the difference of each method to plain training, by task and method."""
    found = {}
    for task in findings.study.tasks:
        plain = findings.official(task, PLAIN, budget)
        for method in findings.study.methods:
            values = findings.official(task, method, budget)
            if method != PLAIN and plain.keys() & values.keys():
                found[task, method] = paired(values, plain)
    return found


def adjusted(found: Mapping[tuple[str, str], Comparison]) -> dict[tuple[str, str], float]:
    """Return Holm's p-values of the comparisons of a table."""
    names = {f"{task}/{method}": (task, method) for task, method in found}
    p = {name: found[pair].p for name, pair in names.items()}
    return {names[name]: value for name, value in holm(p).items()}


def groups(study: Study) -> dict[str, list[str]]:
    """Return the methods that play pure strategies and those that play mixed ones.

    Noise is neither: it does not look at the loss.
    """
    found: dict[str, list[str]] = {"pure": [], "mixed": []}
    for name, method in study.methods.items():
        if method.solver not in (PLAIN, NOISE):
            mixed = mixadv.SOLVERS[method.solver].mixed
            found["mixed" if mixed else "pure"].append(name)
    return found


def contrasts(findings: Findings, task: str, budget: Budget) -> dict[str, Comparison | None]:
    """Return how groups of methods differ, each the mean over its methods, seed by seed."""
    means = {PLAIN: findings.official(task, PLAIN, budget)}
    for group, methods in groups(findings.study).items():
        of = [findings.official(task, method, budget) for method in methods]
        seeds = set.intersection(*(set(values) for values in of)) if of else set()
        means[group] = {seed: sum(v[seed] for v in of) / len(of) for seed in seeds}
    return {
        name: paired(means[a], means[b]) if means[a].keys() & means[b].keys() else None
        for name, (a, b) in CONTRASTS.items()
    }


# Tables ----------------------------------------------------------------------------------------


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def signed(comparison: Comparison | None) -> str:
    """Return a difference and the half width of its interval."""
    if comparison is None:
        return NONE
    value, _, high = comparison.difference
    half = "" if math.isnan(high) else f" ± {high - value:.1f}"
    return f"{value:+.1f}{half}"


def official(findings: Findings, task: str) -> str:
    """Return the table of a task: the official metric at both budgets, beside plain training."""
    study = findings.study
    rows = []
    found = {b: differences(findings, b) for b in ("epochs", "compute")}
    for name, method in study.methods.items():
        cells = [name, f"{method.cost:.1f}"]
        for budget in ("epochs", "compute"):
            values = findings.official(task, name, budget)
            cells += [over_seeds(list(values.values())), signed(found[budget].get((task, name)))]
        rows.append(cells)
    head = ["method", "passes", BUDGETS["epochs"], "− plain", BUDGETS["compute"], "− plain"]
    return table(head, rows)


def robust(findings: Findings, task: str, budget: Budget) -> str:
    """Return the table of what was measured of a task's models, means over seeds."""
    columns = _columns(findings, task, budget)
    rows = [
        [name, *(_mean(column.get(name, {}), digits) for column, digits in columns.values())]
        for name in findings.study.methods
    ]
    return table(["method", *columns], rows) if columns else ""


def _mean(values: Values, digits: int) -> str:
    found = t_interval(list(values.values())) if values else None
    if found is None:
        return NONE
    half = "" if math.isnan(found.high) else f" ± {found.high - found.value:.{digits}f}"
    return f"{found.value:.{digits}f}{half}"


def _columns(
    findings: Findings, task: str, budget: Budget
) -> dict[str, tuple[dict[str, Values], int]]:
    """Return what was measured, by column: values by method and seed, and digits to show."""
    study = findings.study
    columns: dict[str, tuple[dict[str, Values], int]] = {}

    def put(column: str, method: str, seed: int, value: float | None, digits: int = 1) -> None:
        if value is not None:
            columns.setdefault(column, ({}, digits))[0].setdefault(method, {})[seed] = value

    for seed in study.seeds:
        sections = {m: findings.measured(task, m, budget, seed) for m in study.methods}
        sections = {method: found for method, found in sections.items() if found}
        increase = _increases(sections)
        for method, found in sections.items():
            radii = found["radii"]
            for radius, accuracy in zip(radii["radii"], radii["accuracy"], strict=True):
                put(f"PGD {radius:g}", method, seed, 100 * accuracy["value"])
            for column, value in increase.get(method, {}).items():
                put(column, method, seed, value, 3)
            for name, shifted in found.get("shifted", {}).items():
                put(name, method, seed, 100 * shifted["accuracy"]["value"])
                put(f"{name} drop", method, seed, 100 * shifted["drop"]["value"])
            for name, attack in found.get("attacks", {}).items():
                put(f"under {name}", method, seed, 100 * attack["accuracy_under_attack"])
                put("words", method, seed, attack["words_changed"])
                put("queries", method, seed, attack["queries"])
            put("ECE", method, seed, 100 * found["clean"]["ece"])
            exploited = findings.line(task, method, budget, seed).get("exploitability")
            put("exploitability", method, seed, exploited and exploited["gain"], 4)
    return columns


def _increases(sections: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Return medians over the rows that all methods get right with this seed."""
    found = {method: increase_of(one["loss increase"]) for method, one in sections.items()}
    if not found or not np.all([one.correct for one in found.values()], axis=0).any():
        return {}
    names = {"increase": "loss increase", "from_random": "from random", "clean_loss": "clean loss"}
    return {
        method: {column: one[name]["median"] for name, column in names.items()}
        for method, one in all_correct(found).items()
    }


def learners(findings: Findings, budget: Budget) -> str:
    """Return the table of the learners that a method leaves: last, mean and mixture."""
    rows = []
    for task, subject in findings.study.tasks.items():
        split = subject.evaluate[0]
        for method in findings.study.methods:
            kept: dict[str, Values] = {}
            for seed in findings.study.seeds:
                line = findings.line(task, method, budget, seed)
                for name, metrics in line.get("learners", {}).items():
                    kept.setdefault(name, {})[seed] = 100 * _first(metrics[split])
            if kept:
                last = findings.official(task, method, budget)
                cells = [over_seeds(list(last.values()))]
                for name in ("mean", "mixture"):
                    other = kept.get(name)
                    cells.append(over_seeds(list(other.values())) if other else NONE)
                    cells.append(signed(paired(other, last) if other else None))
                rows.append([task, method, *cells])
    head = ["task", "method", "last", "mean", "− last", "mixture", "− last"]
    return table(head, rows) if rows else ""


def half(findings: Findings) -> str:
    """Return the table of methods on half of the rows, beside plain training on all of them."""
    rows = []
    for task, subject in findings.study.tasks.items():
        plain = findings.official(task, PLAIN, "epochs")
        for method in subject.half:
            few = findings.official(task, method, "half")
            every = findings.official(task, method, "epochs")
            to = paired(few, plain) if few.keys() & plain.keys() else None
            numbers = [over_seeds(list(values.values())) for values in (few, every)]
            rows.append([task, method, *numbers, signed(to)])
    head = ["task", "method", "half of the rows", "all rows", "half − plain on all"]
    return table(head, rows) if rows else ""


def rates(findings: Findings) -> str:
    """Return the table of the learning rates chosen, and the scores that they were chosen by."""
    study = findings.study
    rows = []
    for method in study.methods:
        cells = [method]
        for task in study.tasks:
            chosen = study.chosen(task, method, findings.results)
            scores = []
            for run in study.search(task, method):
                line = findings.results.get(run.key)
                score = f"{100 * _first(line['last']['held-out']):.1f}" if line else NONE
                bold = "**" if run.learning_rate == chosen else ""
                scores.append(f"{bold}{run.learning_rate:g}: {score}{bold}")
            cells.append(", ".join(scores) or f"{chosen:g}")
        rows.append(cells)
    return table(["method", *study.tasks], rows)
