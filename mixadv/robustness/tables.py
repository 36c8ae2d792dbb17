"""Tables of what an evaluation found, as aligned text and as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

DASH = "–"  # where there is no number
INCREASES = {
    "increase": "loss increase",
    "from_zero": "from zero",
    "from_random": "from random",
    "clean_loss": "clean loss",
}
"""What a loss increase measures, in words."""


class Table(NamedTuple):
    """A title, a head, and rows of cells under it."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]

    def markdown(self) -> str:
        """Return it with a bold title, to be pasted."""
        lines = [self.head, ["---"] * len(self.head), *self.rows]
        return f"**{_cell(self.title)}**\n\n" * bool(self.title) + "\n".join(
            "| " + " | ".join(map(_cell, line)) + " |" for line in lines
        )

    def text(self) -> str:
        """Return it with columns aligned, to be read in a terminal."""
        lines = [self.head, *self.rows]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        aligned = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
            for line in lines
        ]
        return "\n".join([self.title, *(f"  {line}" for line in aligned)])


def tables(sections: Mapping[str, Any]) -> list[Table]:
    """Return a table for each kind of section that there is."""
    makers = (_accuracy, _radii, _increase, _attacks, _exploitability, _learners)
    return [table for maker in makers if (table := maker(sections)) is not None]


def share(value: Mapping[str, Any] | float | None) -> str:
    """Return a share or its estimate in per cent.

    Example:
        >>> share(0.5), share({"value": 0.5, "low": 0.4, "high": 0.625})
        ('50.0', '50.0 (40.0 to 62.5)')
    """
    return _estimate(value, lambda x: f"{100 * x:.1f}")


def number(value: Mapping[str, Any] | float | None) -> str:
    """Return a number or its estimate to three digits."""
    return _estimate(value, lambda x: f"{x:.3g}")


def quartiles(found: Mapping[str, Any]) -> str:
    """Return a median with the quartiles around it."""
    return number({"value": found["median"], "low": found["lower"], "high": found["upper"]})


def _estimate(value: Any, write: Any) -> str:
    if not isinstance(value, Mapping):
        return DASH if value is None else write(value)
    if value["value"] is None or value["low"] is None:
        return _estimate(value["value"], write)
    return f"{write(value['value'])} ({write(value['low'])} to {write(value['high'])})"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


# One for each kind of section ------------------------------------------------------------------


def _accuracy(sections: Mapping[str, Any]) -> Table:
    sets = {"clean": sections["clean"], **sections.get("shifted", {})}
    rows = [
        [
            name,
            str(one["rows"]),
            share(one["accuracy"]),
            share(one.get("drop")),
            number(one["loss"]),
            number(one["ece"]),
        ]
        for name, one in sets.items()
    ]
    title = f"Accuracy of {sections['about']['model']} on {sections['about']['data']}"
    return Table(title, ("set", "rows", "accuracy %", "drop", "loss", "ECE"), rows)


def _radii(sections: Mapping[str, Any]) -> Table | None:
    if "radii" not in sections:
        return None
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


def _increase(sections: Mapping[str, Any]) -> Table | None:
    if "loss increase" not in sections:
        return None
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


def _attacks(sections: Mapping[str, Any]) -> Table | None:
    if "attacks" not in sections:
        return None
    head = ("attack", "rows", "clean %", "under attack %", "success %", "words", "queries")
    return Table(
        "Word substitution",
        head,
        [
            [
                name,
                str(one["rows"]),
                share(one["clean_accuracy"]),
                share(one["accuracy_under_attack"]),
                success(one),
                number(one["words_changed"]),
                number(one["queries"]),
            ]
            for name, one in sections["attacks"].items()
        ],
    )


def success(attack: Mapping[str, Any]) -> str:
    """Return the success rate of an attack with Wilson's interval."""
    low, high = attack["success_interval"] or (None, None)
    return share({"value": attack["success_rate"], "low": low, "high": high})


def _exploitability(sections: Mapping[str, Any]) -> Table | None:
    if "exploitability" not in sections:
        return None
    found = sections["exploitability"]
    row = [found["solver"], *(number(found[key]) for key in ("played", "reached", "gain"))]
    head = ("strategy of", "its payoff", "best response found", "gain (lower bound)")
    return Table(f"Exploitability, by {found['response']}", head, [row])


def _learners(sections: Mapping[str, Any]) -> Table | None:
    if "learners" not in sections:
        return None
    rows = [
        [learner, name, share(one["accuracy"]), number(one["loss"]), number(one["ece"])]
        for learner, sets in sections["learners"].items()
        for name, one in sets.items()
    ]
    return Table("The learner's weights", ("weights", "set", "accuracy %", "loss", "ECE"), rows)
