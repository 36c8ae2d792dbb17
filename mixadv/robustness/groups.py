"""Accuracy by groups of rows, and that of the worst of them, clean and under each attack."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from mixadv.reports.shown import Table, share
from mixadv.robustness import mixture_tables
from mixadv.robustness.data import Rows
from mixadv.robustness.sections import mixtures_of
from mixadv.robustness.statistics import bootstrap

Found = Mapping[str, Any]


def accuracy_by_group(correct: ArrayLike, groups: Sequence[str]) -> dict[str, Any]:
    """Return the accuracy of each group, and which is the worst.

    The interval is that of a group by itself. The worst is chosen by what was measured, and of many
    small groups one looks worse than it is: compare models by their worst groups on the same rows.

    Args:
        correct: `[N]` Booleans, or of a randomised classifier how often it is right.
        groups: N names.

    Returns:
        `groups`: rows and accuracy by name, with a 95 % interval; `worst`: the name of the group of
        lowest accuracy, of equal ones the largest.

    Example:
        >>> found = accuracy_by_group([True, True, False, True], ["sea", "sea", "land", "land"])
        >>> found["worst"], found["groups"]["land"]["accuracy"]["value"]
        ('land', 0.5)
    """
    right, names = np.asarray(correct), np.asarray(groups)
    if right.shape != names.shape or right.ndim != 1 or not len(right):
        raise ValueError(
            "correct and groups must be of the same rows, at least one, got "
            f"{[*right.shape]} and {[*names.shape]}."
        )
    found = {}
    for name in sorted(set(groups)):
        own = right[names == name]
        own = own if np.issubdtype(own.dtype, np.floating) else own.astype(bool)
        found[name] = {"rows": len(own), "accuracy": bootstrap(own)._asdict()}
    rank = {name: (x["accuracy"]["value"], -x["rows"]) for name, x in found.items()}
    return {"groups": found, "worst": min(rank, key=rank.__getitem__)}


def with_groups(sections: dict[str, Any], sets: Mapping[str, Rows]) -> dict[str, Any]:
    """Return the sections of a report, with accuracy by group in those of sets that have some.

    Where the data have groups, so have all attacks: of the rows attacked alone.
    """
    for name, section in {"clean": sections["clean"], **sections.get("shifted", {})}.items():
        if (groups := sets[name].groups) is not None:
            section["by group"] = accuracy_by_group(section["per row"]["correct"], groups)
    if (groups := sets["clean"].groups) is not None:
        _attacked(sections, [groups[place] for place in sections["about"]["attacked"]])
    return sections


def _attacked(sections: dict[str, Any], groups: Sequence[str]) -> None:
    """Put accuracy by group into what was found of the rows attacked."""
    if (radii := sections.get("radii")) is not None:
        columns = radii["per row"]["correct"]
        radii["by group"] = [accuracy_by_group(column, groups) for column in columns]
    for attack in sections.get("attacks", {}).values():
        right = [row["before"] == row["after"] == row["label"] for row in attack["per row"]]
        attack["by group"] = accuracy_by_group(right, groups)
    if (mixture := sections.get("mixture")) is not None:
        worst_of_all = [found.under()["worst of all"] for found in mixtures_of(mixture)]
        mixture["by group"] = [
            [accuracy_by_group(way, groups) for way in rows.T] for rows in worst_of_all
        ]


def worst(section: Found) -> Found | None:
    """Return the accuracy of the worst group of a set, None where rows have no groups."""
    found = section.get("by group")
    return None if found is None else _worst(found)["accuracy"]


def worst_under(sections: Found) -> Iterator[tuple[str, Found]]:
    """Yield each attack by name, and of its worst group name, rows and accuracy.

    Where the data have no groups there are none.
    """
    radii = sections.get("radii", {})
    for radius, found in zip(radii.get("radii", []), radii.get("by group", []), strict=False):
        if radius:
            yield f"PGD {radius:g}", _worst(found)
    for name, attack in sections.get("attacks", {}).items():
        if "by group" in attack:
            yield f"under {name}", _worst(attack["by group"])
    mixture = sections.get("mixture", {})
    for radius, ways in zip(mixture.get("radii", []), mixture.get("by group", []), strict=False):
        for way, found in zip(mixture_tables.WAYS, ways, strict=True):
            yield f"{way} within {radius:g}", _worst(found)


def tables(sections: Found, sets: Mapping[str, Found]) -> list[Table]:
    """Return the tables of the groups of each set of rows, and of the worst under each attack."""
    rows = []
    for name, section in sets.items():
        groups = section.get("by group", {"groups": {}})["groups"]
        order = sorted(groups, key=lambda group: groups[group]["accuracy"]["value"])
        for group in order:
            found = groups[group]
            rows.append([name, group, str(found["rows"]), share(found["accuracy"])])
    attacked = [
        [name, found["name"], str(found["rows"]), share(found["accuracy"])]
        for name, found in worst_under(sections)
    ]
    head = ("group", "rows", "accuracy %")
    found = {
        "Accuracy by group, worst first": ("set", rows),
        "Accuracy of the worst group under each attack": ("attack", attacked),
    }
    return [Table(title, (what, *head), cells) for title, (what, cells) in found.items() if cells]


def _worst(found: Found) -> dict[str, Any]:
    return {"name": found["worst"], **found["groups"][found["worst"]]}
