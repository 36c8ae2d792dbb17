"""Arms compared over seeds: their options, runs that are kept as lines, and the table of them."""

import argparse
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from common.results import append, digest, finished, over_seeds
from common.tables import markdown

Result = dict[str, Any]
Seeds = Mapping[int, Result]


class Column(NamedTuple):
    """A column of the table: what it shows of a result, times a scale."""

    key: str
    scale: float = 100.0
    digits: str = ".1f"

    def of(self, seeds: Seeds) -> dict[int, float]:
        """Return the values by seed."""
        return {seed: self.scale * result[self.key] for seed, result in seeds.items()}


def options(
    parser: argparse.ArgumentParser, arms: Collection[str], output: Path, seeds: int
) -> None:
    """Add the options that all comparisons of arms have."""
    names, add = list(arms), parser.add_argument
    add("--arms", nargs="+", choices=names, default=names, metavar="ARM", help=", ".join(names))
    text = f"(default: 0 to {seeds - 1})"
    add("--seeds", nargs="+", type=int, default=[*range(seeds)], metavar="N", help=text)
    text = "(default: examples/results)"
    add("--output", type=Path, default=output, metavar="FILE", help=text)
    add("--report", action="store_true", help="measure nothing, print the table")


def results(
    options: argparse.Namespace,
    settings: Callable[[str, int, argparse.Namespace], Result],
    measure: Callable[[str, int, argparse.Namespace], Result],
) -> list[Result]:
    """Run each arm for each seed that has no line in the output yet; return all results there.

    Args:
        options: of the command line.
        settings: returns all that a result depends on, its arm and seed among it.
        measure: runs an arm for a seed, and returns what was found.

    Raises:
        ValueError: where nothing was measured, and nothing is to be.
    """
    known = finished(options.output)
    runs = [] if options.report else [(arm, seed) for seed in options.seeds for arm in options.arms]
    for arm, seed in runs:
        own = settings(arm, seed, options)
        if (key := digest(own)) not in known:
            known[key] = {**own, "key": key, **measure(arm, seed, options)}
            append(options.output, known[key])
    if not known:
        raise ValueError(f"{options.output} has no results yet: run without --report.")
    return list(known.values())


def tables(
    found: Sequence[Result],
    title: Callable[[Result], str],
    columns: Mapping[str, Column],
    over: tuple[str, str],
) -> str:
    """Return a table of arms for each title: means over seeds, ± Student's 95 % interval.

    Args:
        found: results.
        title: of the table that a result belongs to.
        columns: by their heads.
        over: the head of a column, and the arm that the others are set against in it, seed by seed.
    """
    parts: dict[str, dict[str, dict[int, Result]]] = {}
    for result in found:
        arms = parts.setdefault(title(result), {})
        arms.setdefault(result["arm"], {})[result["seed"]] = result
    made = (f"{name}\n\n{_table(arms, columns, *over)}" for name, arms in parts.items())
    return "\n\n".join(made)


def _table(
    arms: Mapping[str, Seeds], columns: Mapping[str, Column], paired: str, baseline: str
) -> str:
    head = ["arm"]
    for name in columns:
        head += [name, f"{name}, over {baseline}", "p"] if name == paired else [name]
    rows = []
    for arm, seeds in arms.items():
        cells = [arm]
        for name, column in columns.items():
            cells.append(over_seeds(column.of(seeds).values(), column.digits))
            if name == paired:
                theirs = {} if arm == baseline else arms.get(baseline, {})
                cells += _difference(column, seeds, theirs)
        rows.append([*cells, len(seeds)])
    return markdown([*head, "seeds"], rows)


def _difference(column: Column, own: Seeds, theirs: Seeds) -> tuple[str, str]:
    """Return by how much an arm differs, seed by seed, and p of Student's paired test."""
    from mixadv.robustness.statistics import paired_t_test

    if len(own.keys() & theirs.keys()) < 2:
        return "–", "–"
    found = paired_t_test(column.of(own), column.of(theirs))
    value = f"{found.difference.value:+{column.digits}}"
    if math.isnan(found.p):  # all seeds differ alike
        return value, "–"
    half = found.difference.high - found.difference.value
    return f"{value} ± {half:{column.digits}}", f"{found.p:.2g}"
