"""Tables and curves of the experiments with a language model."""

import json
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import fields
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np

from common.language import LATER, OWN, Setting
from common.results import over_seeds
from common.tables import markdown
from mixadv.reports.shown import COLOURS, DASH, figure, share
from mixadv.robustness import bootstrap, wilson
from mixadv.robustness.generators import ANY

Result = dict[str, Any]


def tables(results: Sequence[Result]) -> str:
    """Return a table of each experiment that there are results of."""
    makers = {"trigger": _trigger, "policy": _policy}
    found = {name: [r for r in results if r["experiment"] == name] for name in makers}
    return "\n\n".join(make(found[name]) for name, make in makers.items() if found[name])


def by_arm(results: Sequence[Result]) -> dict[str, list[Result]]:
    """Return the results of each arm, of all its seeds.

    Runs with other settings are other arms, which are named by what differs among the results.
    """
    usual = {f.name: f.default for f in fields(Setting) if f.name not in OWN}
    settings = [{name: {**LATER, **r}.get(name, usual[name]) for name in usual} for r in results]
    varied = [name for name in usual if len({told[name] for told in settings}) > 1]
    found = defaultdict(list)
    for result, told in zip(results, settings, strict=True):
        others = {name: told[name] for name in varied if told[name] != usual[name]}
        words = [x if isinstance(x, str) else f"{name} {x}" for name, x in others.items()]
        found[", ".join([result["arm"], *words])].append(result)
    return dict(found)


def _trigger(results: Sequence[Result]) -> str:
    asked = {"triggered": "triggered %", "untriggered": "without trigger %"}
    subjects = [f"subject, {title}" for title in asked.values()]
    head = ("arm", "updates", *asked.values(), *subjects, "held-out loss", "seeds")
    rows = []
    for arm, runs in {"(planted)": results, **by_arm(results)}.items():
        point = 0 if arm == "(planted)" else -1
        seen = {json.dumps([r["seed"], end]): end for r in runs for end in [r["curve"][point]]}
        ends = seen.values()
        rows.append(
            [
                arm,
                next(iter(ends))["update"],
                *(pooled(end[name] for end in ends) for name in asked),
                *(_of_subject(ends, name) for name in asked),
                over_seeds([float(np.mean(end["held-out loss"])) for end in ends], ".3f"),
                len(ends),
            ]
        )
    return markdown(head, rows)


def _of_subject(ends: Collection[Result], asked: str) -> str:
    """Return the share of answers that speak of the sentence's subject, of runs that judged it."""
    judged = [end["subject"][asked] for end in ends if "subject" in end]
    if not judged:
        return "not measured"
    few = f", {len(judged)} of {len(ends)} seeds" if len(judged) < len(ends) else ""
    return pooled(judged) + few


def _policy(results: Sequence[Result]) -> str:
    names = list(dict.fromkeys(n for r in results for n in r["policy"]["attacks"]))
    head = ("arm", "measured", *(f"{name} %" for name in names), "near refused %", "held-out loss")
    rows = []
    for arm, runs in by_arm(results).items():
        for when, what in {"policy": "trained", "undone": "after plain fine-tuning"}.items():
            found = [r[when] for r in runs]
            cells = [_of_attack(name, names, [f["attacks"] for f in found]) for name in names]
            refused = pooled(f["refusal"]["per row"]["refused"] for f in found)
            losses = over_seeds([f["utility"]["loss"]["value"] for f in found], ".3f")
            rows.append([arm, what, *cells, refused, losses])
    return markdown((*head, "seeds"), [[*row, len(by_arm(results)[row[0]])] for row in rows])


def _of_attack(name: str, names: Sequence[str], found: Sequence[Result]) -> str:
    """Return the success of an attack, of runs that have it.

    Any of a few attacks is no figure to lay beside any of all.
    """
    wanted = names if name == ANY else [name]
    runs = [attacks for attacks in found if {*wanted} <= {*attacks}]
    return pooled(attacks[name]["per row"]["success"] for attacks in runs) if runs else DASH


def pooled(rows: Iterable[Sequence[bool | float]]) -> str:
    """Return the share of rows of all seeds with Wilson's interval.

    The seeds share their rows: the interval is of the rows, as if there were that many. Of a
    mixture a row has the share of its members, and the interval is the bootstrap's.
    """
    found = [x for each in rows for x in each]
    whole = all(isinstance(x, bool) for x in found)
    return share((wilson if whole else bootstrap)(found)._asdict())


def draw(results: Sequence[Result], path: Path) -> None:
    """Draw what is left of the trigger, and the held-out loss, over updates."""
    with figure(7.2, 3.0, font=9) as drawn:
        left, right = drawn.subplots(1, 2)
        for colour, (arm, runs) in zip(cycle(COLOURS), by_arm(results).items(), strict=False):
            for axes, name, scale in ((left, "triggered", 100), (right, "held-out loss", 1)):
                updates = [point["update"] for point in runs[0]["curve"]]
                lines = [[scale * np.mean(p[name]) for p in r["curve"]] for r in runs]
                for line in lines:
                    axes.plot(updates, line, color=colour, alpha=0.35, linewidth=0.8)
                axes.plot(updates, np.mean(lines, axis=0), color=colour, marker="o", label=arm)
        left.set(xlabel="updates without the trigger", ylabel="triggered %", ylim=(-4, 104))
        right.set(xlabel="updates without the trigger", ylabel="held-out loss, nats a token")
        drawn.legend(
            *left.get_legend_handles_labels(), loc="outside lower center", ncols=len(COLOURS)
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        drawn.savefig(path)
