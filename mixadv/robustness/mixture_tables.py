"""The tables of a mixture in a report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mixadv.reports.shown import Table, share
from mixadv.robustness.sections import unit

WAYS = ("a member drawn", "mean", "vote")

NOTE = (
    "A member drawn, mean, vote: accuracy where a mixture draws a member, of the mean of their "
    "probabilities and of their vote, of the rows attacked, each under the worst δ of all attacks "
    "that are made for mixtures."
)


def was_attacked(sections: Mapping[str, Any]) -> bool:
    """Return whether there is a mixture, within a radius above 0."""
    return bool(sections.get("mixture", {}).get("radii"))


def cells(sections: Mapping[str, Any]) -> dict[str, str]:
    """Return the cells of a mixture by column, none without one that was attacked."""
    if not was_attacked(sections):
        return {}
    found = sections["mixture"]
    under = [accuracy["worst of all"] for accuracy in found["accuracy"]]
    return {
        f"{way} within {radius:g} %": share(accuracy)
        for radius, ways in zip(
            (0, *found["radii"]), (found["accuracy"][0]["none"], *under), strict=True
        )
        for way, accuracy in zip(WAYS, ways, strict=True)
    }


def attacked(sections: Mapping[str, Any]) -> Table:
    """Return the accuracy under each attack of a member drawn, and of what is deterministic.

    The model evaluated with the mixture has a column: a draw of one is the model.
    """
    found, about, head = sections["mixture"], sections["about"], ("radius", "attack", *WAYS)
    rows = [
        [f"{radius:g}", attack, *map(share, cells)]
        for radius, under in zip(found["radii"], found["accuracy"], strict=True)
        for attack, cells in under.items()
    ]
    title = (
        f"Mixture of {len(found['probabilities'])} members: accuracy % under attacks made for it, "
        f"one perturbation for all ({about['steps']} steps, {len(about['attacked'])} rows; radii "
        f"in {unit(about)})"
    )
    if "beside" in sections:
        title += "; and of the model, under the same attacks made for it"
        head = (*head, "the model")
        beside = [own[0] for under in sections["beside"]["accuracy"] for own in under.values()]
        rows = [[*row, share(own)] for row, own in zip(rows, beside, strict=True)]
    return Table(title, head, rows)


def members(sections: Mapping[str, Any]) -> Table:
    """Return the accuracy of each member alone, under PGD of its own."""
    found = sections["mixture"]
    rows = []
    for member, probability in enumerate(found["probabilities"]):
        clean, attacked = zip(*(alone[member] for alone in found["alone"]), strict=True)
        rows.append([str(member + 1), share(probability), *map(share, (clean[0], *attacked))])
    head = ("member", "drawn %", "clean %", *(f"PGD {radius:g} %" for radius in found["radii"]))
    return Table("Members alone, each under PGD of its own", head, rows)
