"""What an evaluation found: to read, to paste, to keep, and to compare models by."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mixadv.reports.kept import write
from mixadv.reports.shown import DASH, Table, number, quartiles, share
from mixadv.robustness import groups, mixture_tables, pictures
from mixadv.robustness.sections import increase_of, unit
from mixadv.robustness.vicinity import all_correct

FILE = "report.json"

ALIKE = {
    "texts": "on other data",
    "attacked": "with other rows attacked",
    "steps": "with other steps",
    "restarts": "with other restarts",
}
ALIKE_HOW = "evaluate both with the same data, rows, seed, steps and restarts."

INCREASES = {
    "increase": "loss increase",
    "from_zero": "from zero",
    "from_random": "from random",
    "clean_loss": "clean loss",
}
"""What a loss increase measures, in words."""


@dataclass(frozen=True)
class Report:
    """What `evaluate` measured of one model.

    Attributes:
        sections: by name, as JSON has them: `about` and `clean`; `shifted`, `radii`,
            `loss increase`, `attacks`, `exploitability`, `learners` and `mixture` where asked for,
            and `beside` it the model as the mixture of itself. Sums with their intervals, and what
            they sum up under `per row`: of the data in its order, of attacks in the order of
            `about`'s `attacked`.
    """

    sections: dict[str, Any]

    @property
    def name(self) -> str:
        """The model's."""
        return self.sections["about"]["model"]

    def table(self) -> str:
        """Return tables to read in a terminal."""
        return "\n\n".join(table.text() for table in _tables(self.sections))

    __str__ = table

    def markdown(self) -> str:
        """Return tables to paste."""
        return "\n\n".join(table.markdown() for table in _tables(self.sections)) + "\n"

    def json(self) -> str:
        """Return the sections as JSON."""
        return json.dumps(self.sections, allow_nan=False)

    def save(self, folder: str | Path) -> list[Path]:
        """Write report.json, report.md and the pictures; return their paths.

        Needs matplotlib.
        """
        folder = Path(folder)
        written = {folder / FILE: self.json(), folder / "report.md": self.markdown()}
        for path, text in written.items():
            write(path, text)
        return [*written, *pictures.save({self.name: self.sections}, folder)]

    @classmethod
    def load(cls, path: str | Path) -> Report:
        """Return the report of a file or folder that `save` wrote.

        Raises:
            ValueError: if it is none.
        """
        path = Path(path)
        path = path / FILE if path.is_dir() else path
        try:
            report = cls(json.loads(path.read_text("utf-8")))
            report.markdown()
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{path} is no report of an evaluation: {type(error).__name__}, {error}."
            ) from error
        return report


def compare(reports: Mapping[str, Report]) -> str:
    """Return a Markdown table of several models, one in each row, and what to know of it.

    Accuracies are in per cent, with 95 % intervals over rows. The loss increase is the median, with
    quartiles, over the rows that all models classify correctly (Zhu et al. 2020, table 5). Mixtures
    stand under the worst of the attacks that are made for them, and with them the models that were
    evaluated with `mixture=`; a single model compares as the mixture of itself.

    Args:
        reports: by the name of the model or mixture, on the same data with the same rows attacked.
            Attacks of one name are taken to be the same.

    Raises:
        ValueError: for reports of other rows, steps or restarts, and for loss increases at
            different radii.

    Example:
        >>> print(compare({"plain": plain, "freelb": freelb}))  # doctest: +SKIP
    """
    if not reports:
        raise ValueError("There are no reports to compare: give at least one.")
    sections = {name: report.sections for name, report in reports.items()}
    _check_alike(sections)
    cells = {name: _cells(found) for name, found in sections.items()}
    notes, units = [], {name: found["about"]["unit"] for name, found in sections.items()}
    if len(set(units.values())) > 1:
        each = ", ".join(f"{name} {number(value)}" for name, value in units.items())
        notes.append(f"Radii are in token norms of each model, balls of different size: {each}.")
    if any(map(mixture_tables.was_attacked, sections.values())):
        notes.append(mixture_tables.NOTE)
    for name, more in _increases(sections, notes).items():
        cells[name].update(more)
    columns = dict.fromkeys(column for row in cells.values() for column in row)
    rows = [[name, *(row.get(column, DASH) for column in columns)] for name, row in cells.items()]
    return "\n\n".join([Table("", ["model", *columns], rows).markdown(), *notes]) + "\n"


def _tables(sections: Mapping[str, Any]) -> list[Table]:
    """Return a table for each kind of section that there is."""
    makers = {
        "radii": _radii,
        "loss increase": _increase,
        "attacks": _substitution,
        "exploitability": _exploitability,
        "learners": _learners,
    }
    found = [make(sections) for kind, make in makers.items() if kind in sections]
    if mixture_tables.was_attacked(sections):
        found += [mixture_tables.attacked(sections), mixture_tables.members(sections)]
    sets = _sets(sections)
    return [_accuracy(sections), *groups.tables(sections, sets), *found]


def _sets(sections: Mapping[str, Any]) -> dict[str, Any]:
    """Return what was predicted unperturbed, by the names of the sets."""
    return {"clean": sections["clean"], **sections.get("shifted", {})}


def _accuracy(sections: Mapping[str, Any]) -> Table:
    cells = "rows accuracy drop loss ece"
    rows = [[name, *_row(x, cells)] for name, x in _sets(sections).items()]
    title = f"Accuracy of {sections['about']['model']} on {sections['about']['data']}"
    return Table(title, ("set", "rows", "accuracy %", "drop", "loss", "ECE"), rows)


def _radii(sections: Mapping[str, Any]) -> Table:
    found, about = sections["radii"], sections["about"]
    rows = [
        [f"{radius:g}", share(accuracy)]
        for radius, accuracy in zip(found["radii"], found["accuracy"], strict=True)
    ]
    steps, attacked = about["steps"], len(about["attacked"])
    title = f"Accuracy under PGD ({steps} steps, {attacked} rows; radii in {unit(about)})"
    return Table(title, ("radius", "accuracy %"), rows)


def _increase(sections: Mapping[str, Any]) -> Table:
    found, about = sections["loss increase"], sections["about"]
    rows = [
        [what, *(number(found[name][key]) for key in ("lower", "median", "upper"))]
        for name, what in INCREASES.items()
        if name in found
    ]
    title = (
        f"Loss increase within {found['radius']:g} {unit(about)} "
        f"({found['restarts']} random starts, {found['n']} rows that are classified correctly)"
    )
    return Table(title, ("", "lower quartile", "median", "upper quartile"), rows)


def _substitution(sections: Mapping[str, Any]) -> Table:
    head = ("attack", "rows", "clean %", "under attack %", "success %", "words", "queries")
    rows = []
    for name, attack in sections["attacks"].items():
        accuracies = _row(attack, "rows clean_accuracy accuracy_under_attack")
        rows.append([name, *accuracies, _success(attack), *_row(attack, "words_changed queries")])
    return Table("Word substitution", head, rows)


def _row(found: Mapping[str, Any], names: str) -> list[str]:
    """Return the cells of what is found, by the names of its parts."""
    shares = {"accuracy", "drop", "clean_accuracy", "accuracy_under_attack"}
    cell = {"rows": str, **dict.fromkeys(shares, share)}
    return [cell.get(name, number)(found.get(name)) for name in names.split()]


def _success(attack: Mapping[str, Any]) -> str:
    """Return the success rate of an attack with Wilson's interval."""
    low, high = attack["success_interval"] or (None, None)
    return share({"value": attack["success_rate"], "low": low, "high": high})


def _exploitability(sections: Mapping[str, Any]) -> Table:
    found = sections["exploitability"]
    row = [found["solver"], *(number(found[key]) for key in ("played", "reached", "gain"))]
    head = ("strategy of", "its payoff", "best response found", "gain (lower bound)")
    return Table(f"Exploitability, by {found['response']}", head, [row])


def _learners(sections: Mapping[str, Any]) -> Table:
    rows = [
        [learner, name, *_row(found, "accuracy loss ece")]
        for learner, sets in sections["learners"].items()
        for name, found in sets.items()
    ]
    return Table("The learner's weights", ("weights", "set", "accuracy %", "loss", "ECE"), rows)


def _check_alike(sections: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise unless all reports are of the same rows, attacked with the same effort."""
    first, *others = sections
    for name in others:
        section, reference = sections[name], sections[first]
        for key, what in ALIKE.items():
            if section["about"][key] != reference["about"][key]:
                raise ValueError(f"{name} was evaluated {what} than {first}: {ALIKE_HOW}")
        shifted = section.get("shifted", {}), reference.get("shifted", {})
        for key in shifted[0].keys() & shifted[1].keys():
            if shifted[0][key]["texts"] != shifted[1][key]["texts"]:
                raise ValueError(f"{name} has other rows in {key} than {first}: {ALIKE_HOW}")


def _cells(sections: Mapping[str, Any]) -> dict[str, str]:
    """Return the cells of one model by column."""
    clean = sections["clean"]
    cells = {"clean %": share(clean["accuracy"]), "ECE": number(clean["ece"])}
    for name, found in sections.get("shifted", {}).items():
        cells |= {f"{name} %": share(found["accuracy"]), f"{name} drop": share(found["drop"])}
    for name, found in _sets(sections).items():
        if (worst := groups.worst(found)) is not None:
            cells[f"{name} worst group %"] = share(worst)
    found = sections.get("radii", {"radii": [], "accuracy": []})
    for radius, accuracy in zip(found["radii"], found["accuracy"], strict=True):
        if radius:
            cells[f"PGD {radius:g} %"] = share(accuracy)
    for name, found in sections.get("attacks", {}).items():
        cells[f"under {name} %"] = share(found["accuracy_under_attack"])
        cells[f"{name} success %"] = _success(found)
    for name, found in groups.worst_under(sections):
        cells[f"{name} worst group %"] = share(found["accuracy"])
    if "exploitability" in sections:
        cells["exploitability ≥"] = number(sections["exploitability"]["gain"])
    return cells | mixture_tables.cells(sections)


def _increases(
    sections: Mapping[str, Mapping[str, Any]], notes: list[str]
) -> dict[str, dict[str, str]]:
    """Return cells of the loss increase, over rows that all models classify correctly."""
    held = {n: found["loss increase"] for n, found in sections.items() if "loss increase" in found}
    radii = {name: section["radius"] for name, section in held.items()}
    if len(set(radii.values())) > 1:
        raise ValueError(f"Loss increases were measured at different radii, {radii}: choose one.")
    found = {name: increase_of(section) for name, section in held.items()}
    if not found:
        return {}
    if not np.logical_and.reduce([measured.correct for measured in found.values()]).any():
        notes.append("No attacked row is classified correctly by all: there is no loss increase.")
        return {}
    sums = all_correct(found)
    count = next(iter(sums.values()))["n"]
    notes.append(
        f"Loss increase: median (quartiles) of {count} rows that are classified correctly by all."
    )
    return {
        model: {
            f"{what} {radii[model]:g}" if key != "clean_loss" else what: quartiles(row[key])
            for key, what in INCREASES.items()
            if key != "from_zero"  # random starts alone are the published measure
        }
        for model, row in sums.items()
    }
