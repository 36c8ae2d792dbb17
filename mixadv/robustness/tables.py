"""Tables of what an evaluation found."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mixadv.reports.tables import Table, number, share

INCREASES = {
    "increase": "loss increase",
    "from_zero": "from zero",
    "from_random": "from random",
    "clean_loss": "clean loss",
}
"""What a loss increase measures, in words."""


def tables(sections: Mapping[str, Any]) -> list[Table]:
    """Return a table for each kind of section that there is."""
    makers = {
        "radii": _radii,
        "loss increase": _increase,
        "attacks": _attacks,
        "exploitability": _exploitability,
        "learners": _learners,
    }
    found = [make(sections) for kind, make in makers.items() if kind in sections]
    return [_accuracy(sections), *found]


# One for each kind of section ------------------------------------------------------------------


def _accuracy(sections: Mapping[str, Any]) -> Table:
    sets = {"clean": sections["clean"], **sections.get("shifted", {})}
    rows = [
        [
            name,
            str(found["rows"]),
            share(found["accuracy"]),
            share(found.get("drop")),
            number(found["loss"]),
            number(found["ece"]),
        ]
        for name, found in sets.items()
    ]
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


def unit(about: Mapping[str, Any]) -> str:
    """Return what radii are multiples of."""
    return ("token norms of" if about["measured"] else "units of") + f" {number(about['unit'])}"


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


def _attacks(sections: Mapping[str, Any]) -> Table:
    head = ("attack", "rows", "clean %", "under attack %", "success %", "words", "queries")
    return Table(
        "Word substitution",
        head,
        [
            [
                name,
                str(attack["rows"]),
                share(attack["clean_accuracy"]),
                share(attack["accuracy_under_attack"]),
                success(attack),
                number(attack["words_changed"]),
                number(attack["queries"]),
            ]
            for name, attack in sections["attacks"].items()
        ],
    )


def success(attack: Mapping[str, Any]) -> str:
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
        [learner, name, share(found["accuracy"]), number(found["loss"]), number(found["ece"])]
        for learner, sets in sections["learners"].items()
        for name, found in sets.items()
    ]
    return Table("The learner's weights", ("weights", "set", "accuracy %", "loss", "ECE"), rows)
