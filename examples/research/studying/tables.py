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
from studying import summary
from studying.findings import Findings, Pair, Values, adjusted, differences, first
from studying.plan import PLAIN


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table to paste; nothing without rows."""
    return markdown(head, rows) if rows else ""


def signed(comparison: Comparison | None) -> str:
    """Return a difference and the half width of its interval."""
    if comparison is None:
        return DASH
    value, _, high = comparison.difference
    margin = "" if math.isnan(high) else f" ± {high - value:.1f}"
    return f"{value:+.1f}{margin}"


def official(findings: Findings, task: str) -> str:
    """Return the table of a task: the official metric, and how far it is from each reference.

    Methods without a finished run have no row. What differs significantly after the correction is
    bold.
    """
    study, found = findings.study, differences(findings)
    corrected = adjusted(study, found)
    plain = findings.seconds(task, PLAIN)
    rows = []
    for name in findings.finished(task):
        cost, seconds = study.methods[name].cost, findings.seconds(task, name)
        values = findings.official(task, name)
        cells = [name, DASH if cost is None else f"{cost:.1f}"]
        cells.append(f"{seconds / plain:.1f}" if seconds and plain else DASH)
        cells += [str(len(values)), over_seeds(values.values())]
        for reference in study.references:
            pair = Pair(task, name, reference)
            bold = "**" if corrected.get(pair, 1.0) < summary.ALPHA else ""
            cells.append(f"{bold}{signed(found.get(pair))}{bold}")
        rows.append(cells)
    references = [f"− {reference}" for reference in study.references]
    return table(["method", "passes", "time", "seeds", findings.metric(task), *references], rows)


def others(findings: Findings, task: str) -> str:
    """Return the table of what a task is evaluated by besides the official metric."""
    study, splits = findings.study, findings.study.tasks[task].evaluate
    columns: dict[str, dict[str, Values]] = {}
    for method in study.trained(task):
        for seed in study.seeds:
            last = findings.line(task, method, seed).get("last", {})
            found = {f"{m}, {of}": v for of in splits for m, v in last.get(of, {}).items()}
            for column in list(found)[1:]:
                of = columns.setdefault(column, {}).setdefault(method, {})
                of[seed] = 100 * found[column]
    names = findings.finished(task) if columns else []
    rows = [[m, *(over_seeds(of.get(m, {}).values()) for of in columns.values())] for m in names]
    return table(["method", *columns], rows)


def pairs(findings: Findings) -> str:
    """Return the table of the pairs that the study asks for; of one seed there is no p."""
    rows, several = [], len(findings.study.seeds) > 1
    for what, read in summary.readings(findings).items():
        found = differences(findings, read)
        corrected = adjusted(findings.study, found)
        for pair, comparison in found.items():
            if list(pair[1:]) in map(list, findings.study.pairs):
                cells = [pair.task, f"{pair.method} − {pair.reference}", what, signed(comparison)]
                p = corrected[pair]
                shown = DASH if math.isnan(p) else f"{p:.2g}"
                rows.append([*cells, *([shown] if several else [])])
    head = ["task", "pair", "what", "difference", *(["p, corrected"] if several else [])]
    return table(head, rows)


def power(findings: Findings) -> str:
    """Return the table of the smallest differences that the design can see."""
    rows = [
        [row.task, str(row.seeds), *(f"{v:.1f}" for v in (row.spread, *row[3:]))]
        for row in summary.smallest(findings)
    ]
    by_all = f"among all, {len(findings.study.seeds)} seeds"
    return table(["task", "seeds", "spread", "alone", "among all", by_all], rows)


def robust(findings: Findings, task: str) -> str:
    """Return the table of what was measured of a task's models, means over seeds."""
    columns = _columns(findings, task)
    rows = [
        [name, *(over_seeds(of.get(name, {}).values(), digits) for of, digits in columns.values())]
        for name in findings.study.trained(task)
        if any(name in of for of, _ in columns.values())
    ]
    return table(["method", *columns], rows)


def _columns(findings: Findings, task: str) -> dict[str, tuple[dict[str, Values], str]]:
    """Return what was measured, by column: values by method and seed, and how they are shown."""
    study = findings.study
    columns: dict[str, tuple[dict[str, Values], str]] = {}

    def put(column: str, method: str, seed: int, value: float | None, digits: str = ".1f") -> None:
        if value is not None:
            columns.setdefault(column, ({}, digits))[0].setdefault(method, {})[seed] = value

    for seed in study.seeds:
        sections = {m: findings.measured(task, m, seed) for m in study.methods}
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


def learners(findings: Findings) -> str:
    """Return the table of the learners that a method leaves: last, mean and mixture."""
    rows = []
    for task, subject in findings.study.tasks.items():
        split = subject.evaluate[0]
        for method in findings.study.methods:
            kept: dict[str, Values] = {}
            for seed in findings.study.seeds:
                line = findings.line(task, method, seed)
                for name, metrics in line.get("learners", {}).items():
                    kept.setdefault(name, {})[seed] = 100 * first(metrics[split])
            if kept:
                last = findings.official(task, method)
                cells = [over_seeds(last.values())]
                for name in ("mean", "mixture"):
                    other = kept.get(name)
                    cells.append(over_seeds(other.values()) if other else DASH)
                    cells.append(signed(paired_t_test(other, last) if other else None))
                rows.append([task, method, *cells])
    head = ["task", "method", "last", "mean", "− last", "mixture", "− last"]
    return table(head, rows)


def exploitability(findings: Findings) -> str:
    """Return the table of lower bounds of what adversaries gain by leaving their strategies."""
    study, rows = findings.study, []
    tasks = [task for task in study.tasks if findings.finished(task)]
    for method, way in study.methods.items():
        gains: list[str] = []
        for task in tasks:
            lines = [findings.line(task, method, seed) for seed in study.seeds]
            found = [line["exploitability"] for line in lines if line.get("exploitability")]
            gains.append(over_seeds((one["gain"] for one in found), ".3g"))
        if way.played is not None and any(gain != DASH for gain in gains):
            payoff = "loss" if way.played.gain == "loss" else "divergence"
            rows.append([method, payoff, f"{way.played.radius:g}", *gains])
    return table(["method", "payoff", "radius", *tasks], rows)


def rates(findings: Findings) -> str:
    """Return the table of the learning rates chosen, and the scores that they were chosen by."""
    study = findings.study
    found = {
        (method, task): study.scores(task, method, findings.results)
        for task in study.tasks
        for method in study.trained(task)
    }
    known = [of for of, scores in found.items() if scores or not study.tasks[of[1]].searched]
    tasks = [task for task in study.tasks if any(task == of for _, of in known)]
    rows = []
    for method in study.methods:
        cells = [
            _rated(findings, task, method, found[method, task]) if (method, task) in known else DASH
            for task in tasks
        ]
        if set(cells) != {DASH}:
            rows.append([method, *cells])
    return table(["method", *tasks], rows)


def _rated(findings: Findings, task: str, method: str, scores: Mapping[float, float]) -> str:
    """Return the rates that a method was tried at, with scores, and the chosen one bold."""
    subject = findings.study.tasks[task]
    chosen, shown = findings.study.chosen(task, method, findings.results), []
    for rate in subject.learning_rates:
        score = f": {100 * scores[rate]:.1f}" if rate in scores else ""
        best = rate == chosen and subject.searched
        shown.append(f"**{rate:g}{score}**" if best else f"{rate:g}{score}")
    return ", ".join(shown)


def at_the_edge(findings: Findings) -> list[str]:
    """Return the methods whose learning rate is the smallest or largest of several."""
    study, found = findings.study, []
    for task, subject in study.tasks.items():
        edges = (min(subject.learning_rates), max(subject.learning_rates))
        for method in study.trained(task) if edges[0] < edges[1] else ():
            if study.chosen(task, method, findings.results) in edges:
                found.append(f"{method} on {task}")
    return found
