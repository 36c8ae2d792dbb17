"""A mixture of LoRA adapters: one is drawn for each answer, and each was trained by itself.

Members share the updates of an arm, so that a mixture takes as many passes as one model does. No
number is of an attack on one member that the others were then spared: each member is attacked as if
the attacker knew that it answers, which is no weaker than any attacker who does not, and what is
reported is the mean over members, the success to be expected when one of them is drawn.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from common.language.training import Setting
from mixadv.robustness.statistics import bootstrap

Sections = dict[str, Any]


def members(setting: Setting, count: int) -> list[Setting]:
    """Return a setting for each member: a seed of its own, and its part of the updates.

    Raises:
        ValueError: where a member would have no update.
    """
    if setting.updates < count:
        raise ValueError(
            f"--updates {setting.updates}: {count} members share them, and each needs one at least."
        )
    each, more = divmod(setting.updates, count)
    seeds = [setting.seed + 1000 * number for number in range(count)]
    parts = [each + (number < more) for number in range(count)]
    return [
        replace(setting, seed=seed, updates=part) for seed, part in zip(seeds, parts, strict=True)
    ]


def expected(reports: Sequence[Sections]) -> Sections:
    """Return the sections of a report on a mixture, whose members all have the same probability.

    Shares are means over rows of how many members give what is looked for, with bootstrap intervals
    over rows: each row counts once, however many members answer it.
    """
    first = reports[0]
    if len(reports) == 1:
        return first
    attacks = {name: _mean([r["attacks"][name] for r in reports]) for name in first["attacks"]}
    found: Sections = {"about": {**first["about"], "members": len(reports)}, "attacks": attacks}
    if "refusal" in first:
        found["refusal"] = _mean([r["refusal"] for r in reports], "share", "refused")
    if "utility" in first:
        found["utility"] = _mean([r["utility"] for r in reports], "loss", "losses")
    return found


def _mean(parts: Sequence[Sections], whole: str = "success", each: str = "success") -> Sections:
    """Return a part of the report, its rows the means over members."""
    rows = np.mean([part["per row"][each] for part in parts], axis=0)
    per_row = {**parts[0]["per row"], each: rows.tolist()}
    if "answers" in per_row:
        per_row["answers"] = [part["per row"]["answers"] for part in parts]  # by member
    return {**parts[0], whole: bootstrap(rows)._asdict(), "per row": per_row}
