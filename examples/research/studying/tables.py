"""The tables of a study's report."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from common.results import over_seeds
from common.tables import markdown
from mixadv.reports.shown import DASH
from mixadv.robustness import all_correct
from mixadv.robustness.report import INCREASES
from mixadv.robustness.sections import increase_of
from mixadv.robustness.statistics import Comparison, paired_t_test
from studying.findings import Findings, Values, differences, first
from studying.plan import BUDGETS, COMPARED, PLAIN, Budget


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table to paste; nothing without rows."""
    return markdown(head, rows) if rows else ""


def signed(comparison: Comparison | None) -> str:
    """Return a difference and the half width of its interval."""
    if comparison is None:
        return DASH
    value, _, high = comparison.difference
    half = "" if math.isnan(high) else f" ± {high - value:.1f}"
    return f"{value:+.1f}{half}"


def official(findings: Findings, task: str) -> str:
    """Return the table of a task: the official metric at both budgets, beside plain training."""
    study = findings.study
    rows = []
    found = {b: differences(findings, b) for b in COMPARED}
    plain = findings.seconds(task, PLAIN)
    for name in study.trained(task, "epochs"):
        method = study.methods[name]
        cells = [name, DASH if method.cost is None else f"{method.cost:.1f}"]
        seconds = findings.seconds(task, name)
        cells.append(f"{seconds / plain:.1f}" if seconds and plain else DASH)
        for budget in COMPARED:
            values = findings.official(task, name, budget)
            cells += [over_seeds(values.values()), signed(found[budget].get((task, name)))]
        rows.append(cells)
    budgets = [cell for b in COMPARED for cell in (BUDGETS[b], "− plain")]
    return table(["method", "passes", "time", *budgets], rows)


def robust(findings: Findings, task: str, budget: Budget) -> str:
    """Return the table of what was measured of a task's models, means over seeds."""
    columns = _columns(findings, task, budget)
    rows = [
        [name, *(over_seeds(of.get(name, {}).values(), digits) for of, digits in columns.values())]
        for name in findings.study.trained(task, budget)
    ]
    return table(["method", *columns], rows if columns else [])


def _columns(
    findings: Findings, task: str, budget: Budget
) -> dict[str, tuple[dict[str, Values], str]]:
    """Return what was measured, by column: values by method and seed, and how they are shown."""
    study = findings.study
    columns: dict[str, tuple[dict[str, Values], str]] = {}

    def put(column: str, method: str, seed: int, value: float | None, digits: str = ".1f") -> None:
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
                put(column, method, seed, value, ".3g")
            for name, shifted in found.get("shifted", {}).items():
                put(name, method, seed, 100 * shifted["accuracy"]["value"])
                put(f"{name} drop", method, seed, 100 * shifted["drop"]["value"])
            for name, attack in found.get("attacks", {}).items():
                put(f"under {name}", method, seed, 100 * attack["accuracy_under_attack"])
                put(f"{name}: words", method, seed, attack["words_changed"])
                put(f"{name}: queries", method, seed, attack["queries"])
            put("ECE", method, seed, 100 * found["clean"]["ece"])
    return columns


def _increases(sections: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Return medians over the rows that all methods get right with this seed."""
    found = {method: increase_of(one["loss increase"]) for method, one in sections.items()}
    if not found or not np.all([one.correct for one in found.values()], axis=0).any():
        return {}
    return {
        method: {column: one[name]["median"] for name, column in INCREASES.items()}
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
                    kept.setdefault(name, {})[seed] = 100 * first(metrics[split])
            if kept:
                last = findings.official(task, method, budget)
                cells = [over_seeds(last.values())]
                for name in ("mean", "mixture"):
                    other = kept.get(name)
                    cells.append(over_seeds(other.values()) if other else DASH)
                    cells.append(signed(paired_t_test(other, last) if other else None))
                rows.append([task, method, *cells])
    head = ["task", "method", "last", "mean", "− last", "mixture", "− last"]
    return table(head, rows)


def exploitability(findings: Findings, budget: Budget) -> str:
    """Return the table of lower bounds of what adversaries gain by leaving their strategies."""
    study, rows = findings.study, []
    for method, way in study.methods.items():
        gains: list[str] = []
        for task in study.tasks:
            lines = [findings.line(task, method, budget, seed) for seed in study.seeds]
            found = [line["exploitability"] for line in lines if line.get("exploitability")]
            gains.append(over_seeds((one["gain"] for one in found), ".3g"))
        if way.played is not None and any(gain != DASH for gain in gains):
            payoff = "loss" if way.played.gain == "loss" else "divergence"
            rows.append([method, payoff, f"{way.played.radius:g}", *gains])
    return table(["method", "payoff", "radius", *study.tasks], rows)


def half(findings: Findings) -> str:
    """Return the table of methods on half of the rows, beside plain training on all of them."""
    rows = []
    for task, subject in findings.study.tasks.items():
        plain = findings.official(task, PLAIN, "epochs")
        for method in subject.half:
            few = findings.official(task, method, "half")
            every = findings.official(task, method, "epochs")
            to = paired_t_test(few, plain) if few.keys() & plain.keys() else None
            numbers = [over_seeds(values.values()) for values in (few, every)]
            rows.append([task, method, *numbers, signed(to)])
    head = ["task", "method", "half of the rows", "all rows", "half − plain on all"]
    return table(head, rows)


def rates(findings: Findings, budget: Budget) -> str:
    """Return the table of the learning rates chosen, and the scores that they were chosen by."""
    study = findings.study
    rows = []
    for method in study.methods:
        cells = [method]
        for task in study.tasks:
            if method not in study.trained(task, budget):
                cells.append(DASH)
                continue
            chosen = study.chosen(task, method, budget, findings.results)
            scores = []
            for run in study.search(task, method, budget):
                line = findings.results.get(run.key)
                score = f"{100 * first(line['last']['held-out']):.1f}" if line else DASH
                bold = "**" if run.learning_rate == chosen else ""
                scores.append(f"{bold}{run.learning_rate:g}: {score}{bold}")
            cells.append(", ".join(scores) or f"{chosen:g}")
        if set(cells[1:]) != {DASH}:
            rows.append(cells)
    return table(["method", *study.tasks], rows)
