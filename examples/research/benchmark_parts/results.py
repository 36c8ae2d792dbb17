"""Results as JSON lines, and the tables made of them."""

import json
import statistics
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

from benchmark_parts.contenders import CONTENDERS
from benchmark_parts.measure import floor
from benchmark_parts.work import Setting
from common.tables import markdown

Result = dict[str, Any]
HEAD = ["row", "seconds", "÷ step", "÷ floor", "memory ÷ step", "kept, MiB", "KL reached"]
NAMES = [f.name for f in fields(Setting)]


class Spread(NamedTuple):
    """The median of the rounds, the least and the most."""

    median: float
    least: float
    most: float

    def __str__(self) -> str:
        return f"{self.median:.2f} [{self.least:.2f}, {self.most:.2f}]"


def spread(values: Iterable[float]) -> Spread:
    """Return the spread of one value for each round."""
    values = list(values)
    return Spread(statistics.median(values), min(values), max(values))


def ratio(numerators: Iterable[float], denominators: Iterable[float]) -> Spread:
    """Return the spread of the ratios of each round."""
    return spread(a / b for a, b in zip(numerators, denominators, strict=True))


def setting(result: Result) -> Setting:
    """Return what a result was measured on."""
    return Setting(**{name: result[name] for name in NAMES})


def floors(result: Result) -> list[float]:
    """Return the floor of each round."""
    rounds = zip(*result["units"].values(), strict=True)
    return [floor(dict(zip(result["units"], r, strict=True)), result["passes"]) for r in rounds]


# The file --------------------------------------------------------------------------------------


def load(path: Path) -> list[Result]:
    """Return the results in a file; none if there is no such file.

    Raises:
        ValueError: for a line that is not a result.
    """
    results = []
    lines = path.read_text().splitlines() if path.exists() else []
    for number, line in enumerate(lines, 1):
        try:
            result = json.loads(line)
            floors(result), setting(result), result["row"], result["seconds"]
        except (json.JSONDecodeError, TypeError, KeyError, ValueError):
            raise ValueError(
                f"{path}, line {number} is not a result of this script: remove the line."
            ) from None
        results.append(result)
    return results


def store(path: Path, new: Iterable[Result]) -> None:
    """Write results; those of the same row and setting are replaced where they stand."""
    kept = {(setting(r), r["row"]): r for r in load(path)}
    kept.update({(setting(r), r["row"]): r for r in new})
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text("".join(json.dumps(r) + "\n" for r in kept.values()))
    partial.replace(path)


def grouped(results: Iterable[Result]) -> dict[Setting, list[Result]]:
    """Return the results by setting, rows in the order in which they are known."""
    order = {name: number for number, name in enumerate(CONTENDERS)}
    groups: dict[Setting, list[Result]] = {}
    for result in sorted(results, key=lambda r: order.get(r["row"], len(order))):
        groups.setdefault(setting(result), []).append(result)
    return groups


# Tables ----------------------------------------------------------------------------------------


def report(results: Iterable[Result]) -> str:
    """Return for each setting its table, the parts of a step, and comparisons with rivals."""
    texts = []
    for where, group in grouped(results).items():
        parts = [f"**{where}** ({units(group[0])})", table(group), *versus(group)]
        texts.append("\n\n".join(parts))
    return "\n\n".join(texts)


def units(result: Result) -> str:
    """Return the parts of an ordinary step, in words."""
    step, plain = result["units"]["S"], result["plain_peak"] / 2**20
    shares = [
        f"{name} {ratio(result['units'][name], step).median:.2g}" for name in ("F", "A", "O", "N")
    ]
    seconds = statistics.median(step)
    rounds = f"{len(step)} round{'s' * (len(step) > 1)}"
    return f"S = {seconds:.3g} s and {plain:.0f} MiB; in S: {', '.join(shares)}; {rounds}"


def table(group: Iterable[Result]) -> str:
    """Return a Markdown table of the results of one setting."""
    rows = []
    for result in group:
        seconds, step = result["seconds"], result["units"]["S"]
        cells = [f"{statistics.median(seconds):.3g}", f"{ratio(seconds, step).median:.2f}"]
        cells += [ratio(seconds, floors(result)), f"{result['peak'] / result['plain_peak']:.2f}"]
        cells += [f"{result['kept'] / 2**20:.0f}", f"{result['payoff']:.2g}"]
        rows.append([result["row"], *cells])
    return markdown(HEAD, rows)


def versus(group: Iterable[Result]) -> list[str]:
    """Return a list of rows with the rivals that they were measured together with."""
    rows = {result["row"]: result for result in group}
    lines = []
    for name, mine in rows.items():
        contender = CONTENDERS.get(name)
        for other in contender.rivals if contender else ():
            rival = rows.get(other)
            if rival is not None and rival["units"] == mine["units"]:
                times = ratio(mine["seconds"], rival["seconds"])
                memory = mine["peak"] / rival["peak"]
                lines.append(f"- {name} ÷ {other}: time {times}, memory {memory:.2f}")
    return ["\n".join(lines)] if lines else []
