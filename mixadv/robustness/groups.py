"""Accuracy by groups of rows, and that of the worst of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from mixadv.reports.shown import Table, share
from mixadv.robustness.data import Rows
from mixadv.robustness.statistics import bootstrap


def accuracy_by_group(correct: ArrayLike, groups: Sequence[str]) -> dict[str, Any]:
    """Return the accuracy of each group, and which is the worst.

    The interval is that of a group by itself. The worst is chosen by what was measured, and of many
    small groups one looks worse than it is: compare models by their worst groups on the same rows.

    Args:
        correct: `[N]` Booleans.
        groups: N names.

    Returns:
        `groups`: rows and accuracy by name, with a 95 % interval; `worst`: the name of the group of
        lowest accuracy, of equal ones the largest.

    Example:
        >>> found = accuracy_by_group([True, True, False, True], ["sea", "sea", "land", "land"])
        >>> found["worst"], found["groups"]["land"]["accuracy"]["value"]
        ('land', 0.5)
    """
    right, names = np.asarray(correct, bool), np.asarray(groups)
    if right.shape != names.shape or right.ndim != 1 or not len(right):
        raise ValueError(
            "correct and groups must be of the same rows, at least one, got "
            f"{[*right.shape]} and {[*names.shape]}."
        )
    found = {}
    for name in sorted(set(groups)):
        own = right[names == name]
        found[name] = {"rows": len(own), "accuracy": bootstrap(own)._asdict()}
    rank = {name: (x["accuracy"]["value"], -x["rows"]) for name, x in found.items()}
    return {"groups": found, "worst": min(rank, key=rank.__getitem__)}


def with_groups(sections: dict[str, Any], sets: Mapping[str, Rows]) -> dict[str, Any]:
    """Return the sections of a report, with accuracy by group in those of sets that have some."""
    for name, section in {"clean": sections["clean"], **sections.get("shifted", {})}.items():
        if (groups := sets[name].groups) is not None:
            section["by group"] = accuracy_by_group(section["per row"]["correct"], groups)
    return sections


def worst(section: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return the accuracy of the worst group of a set, None where rows have no groups."""
    found = section.get("by group")
    return None if found is None else found["groups"][found["worst"]]["accuracy"]


def table(sets: Mapping[str, Mapping[str, Any]]) -> Table:
    """Return the table of the groups of each set of rows, worst first."""
    rows = []
    for name, section in sets.items():
        groups = section.get("by group", {"groups": {}})["groups"]
        order = sorted(groups, key=lambda group: groups[group]["accuracy"]["value"])
        for group in order:
            found = groups[group]
            rows.append([name, group, str(found["rows"]), share(found["accuracy"])])
    return Table("Accuracy by group, worst first", ("set", "group", "rows", "accuracy %"), rows)
