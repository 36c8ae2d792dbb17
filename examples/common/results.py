"""Runs, their results as JSON lines, and the table of them."""

import hashlib
import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from common.tables import markdown

PLAIN = "plain"
EMBEDDED_MODEL = "minilm"
LATER = {
    "substitute": 0.0,
    "neighbours": "",
    "every": 1,
    "share": 1.0,
    "label_smoothing": 0.0,
    "evaluate_rows": 0,
}
"""Settings that came later: a run without them has the key, and the result, that it had before."""


def digest(settings: dict[str, Any]) -> str:
    """Return what is the same for the same settings, for names of runs."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:10]


@dataclass(frozen=True)
class Run:
    """One training run: all that its result depends on.

    Attributes:
        task: its name.
        train: the training sets, where a task has a choice of them.
        data: a folder or a hub data set; "" for the task's own.
        model: a hub model or a folder; "minilm" for the embedded encoder.
        solver: a name in `mixadv.SOLVERS`, or "plain" for the optimizer alone.
        parameters: hyper-parameters of the solver that are not the defaults.
        epochs: passes over the training rows; 0 where `updates` says how long.
        updates: 0 for as many as the epochs need.
        batch_size: rows of a micro-batch in one process.
        accumulate: micro-batches of an update.
        learning_rate: at the end of the warm-up, before its linear decay.
        warmup: share of the updates.
        hold_out: training rows to choose the best checkpoint on.
        shots: training rows of each label; 0 takes all.
        limit: training rows; 0 takes all.
        max_length: tokens of a row; the rest is cut.
        bf16: forward passes in bfloat16.
        evaluate: which weights: "last", "mean" or "mixture".
        evaluate_every: updates; 0 evaluates at the end alone.
        radii: at which metrics under PGD are measured, in token norms of the untrained encoder.
        attack_rows: 0 attacks the whole split.
        substitute: fraction of the training rows that get a copy with words replaced, made anew
            before each epoch but the first.
        neighbours: where the words come from, see `common.places.SOURCES`.
        every: updates of which the solver plays one; the others are plain.
        share: of the rows of a batch that the solver plays on; the others are plain. A divergence
            is then of these rows alone, and weighs as much less.
        label_smoothing: probability that the task loss spreads over all labels.
        evaluate_rows: of each split, drawn the same for all runs; 0 evaluates on all.
    """

    task: str
    train: tuple[str, ...] = ()
    data: str = ""
    model: str = EMBEDDED_MODEL
    solver: str = PLAIN
    parameters: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    epochs: float = 3.0
    updates: int = 0
    batch_size: int = 16
    accumulate: int = 1
    learning_rate: float = 4e-4
    warmup: float = 0.1
    weight_decay: float = 0.01
    hold_out: int = 0
    shots: int = 0
    limit: int = 0
    max_length: int = 128
    bf16: bool = False
    evaluate: str = "last"
    evaluate_every: int = 0
    radii: tuple[float, ...] = ()
    attack_rows: int = 0
    substitute: float = 0.0
    neighbours: str = ""
    every: int = 1
    share: float = 1.0
    label_smoothing: float = 0.0
    evaluate_rows: int = 0

    def __post_init__(self) -> None:
        least = {"batch_size": 1, "accumulate": 1, "max_length": 3, "updates": 0, "hold_out": 0}
        least |= {
            "shots": 0,
            "limit": 0,
            "evaluate_every": 0,
            "attack_rows": 0,
            "evaluate_rows": 0,
            "seed": 0,
            "every": 1,
        }
        for name, bound in least.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise ValueError(f"{name} must be a whole number, got {value!r}.")
            if value < bound:
                raise ValueError(f"{name} must be at least {bound}, got {value}.")
        if self.seed >= 2**32:
            raise ValueError(f"seed must be below 2**32, got {self.seed}.")
        for name in ("learning_rate", *(() if self.updates else ("epochs",))):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}.")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"weight_decay must be at least 0, got {self.weight_decay}.")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup must be a share in [0, 1), got {self.warmup}.")
        for radius in self.radii:
            if not 0 <= radius < math.inf:
                raise ValueError(f"radii must be at least 0 and finite, got {radius}.")
        if self.radii and self.evaluate == "mixture":
            raise ValueError(
                "radii are of an attack on one model: evaluate last or mean, not mixture."
            )
        for name in ("substitute", "label_smoothing"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be a share in [0, 1], got {getattr(self, name)}.")
        if self.solver == PLAIN and (self.every > 1 or self.share != 1):
            raise ValueError("every and share are of what a solver plays: choose a solver.")
        if not 0 < self.share <= 1:
            raise ValueError(f"share must be above 0 and at most 1, got {self.share}.")
        if self.share < 1 and self.accumulate > 1:
            raise ValueError("share is of one batch per update: set accumulate=1.")
        if (self.substitute > 0) != (self.neighbours != ""):
            raise ValueError(
                "substitute says how many rows get words replaced and neighbours by which words: "
                f"give both or none, got {self.substitute} and {self.neighbours!r}."
            )

    @property
    def key(self) -> str:
        """A name that is the same for the same run."""
        settings = asdict(self)
        told = {k: v for k, v in settings.items() if k not in LATER or v != LATER[k]}
        return f"{self.task}-{self.solver}-{self.seed}-{digest(told)}"


def append(path: Path, result: dict[str, Any]) -> None:
    """Add a result as one JSON line, in place of one that a kill has torn."""
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = len(_lines(path).encode())
    with path.open("r+" if path.exists() else "w") as file:
        file.truncate(whole)
        file.seek(whole)
        file.write(json.dumps(result) + "\n")


def _lines(path: Path) -> str:
    """Return the lines of a file that end; a kill may have torn the last one."""
    text = path.read_text() if path.exists() else ""
    return text[: text.rfind("\n") + 1]


def finished(path: Path) -> dict[str, dict[str, Any]]:
    """Return the results written so far by the key of their run."""
    results = {}
    for number, line in enumerate(_lines(path).splitlines(), 1):
        try:
            result = json.loads(line)
            results[result["key"]] = result
        except (json.JSONDecodeError, TypeError, KeyError):
            raise ValueError(
                f"{path}, line {number} is not a result of these scripts: remove the line."
            ) from None
    return results


# The table -------------------------------------------------------------------------------------


def table(results: Iterable[dict[str, Any]]) -> str:
    """Return a Markdown table: one row per setting, mean ± 95 % t-interval over its seeds.

    Settings that are not the same in all results have a column. Metrics are times 100; a split
    with one metric has its name alone.
    """
    results = [LATER | result for result in results]
    settings = [f.name for f in fields(Run) if f.name != "seed"]
    hidden = ("solver", "parameters", "radii", "attack_rows")
    values = {n: {json.dumps(r[n]) for r in results} for n in settings if n not in hidden}
    varied = [name for name, several in values.items() if len(several) > 1]
    groups: dict[str, list[dict[str, Any]]] = {}
    for result in results:
        groups.setdefault(json.dumps([result[name] for name in settings]), []).append(result)
    moments = [m for m in ("last", "best") if any(m in r for r in results)]
    metrics = _metrics(r[m] for r in results for m in moments if m in r)
    at = ["at"] if len(moments) > 1 else []
    head = ["solver", *varied, *at, *metrics, "passes", "s/step", "seeds"]
    lines = []
    for group in groups.values():
        for moment in moments:
            chosen = [r for r in group if moment in r]
            if chosen:
                at = [_at(moment, chosen[0])] if len(moments) > 1 else []
                lines.append(_row(chosen, moment, varied, at, metrics))
    return markdown(head, lines)


def _at(moment: str, result: dict[str, Any]) -> str:
    return f"best on {result['chosen_on']}" if moment == "best" else moment


def _metrics(measured: Iterable[dict[str, dict[str, float]]]) -> dict[str, tuple[str, str]]:
    """Return split and metric of each column."""
    splits: dict[str, dict[str, None]] = {}
    for splits_of_one in measured:
        for split, metrics in splits_of_one.items():
            splits.setdefault(split, {}).update(dict.fromkeys(metrics))
    return {
        split if len(metrics) == 1 else f"{split} {metric}": (split, metric)
        for split, metrics in splits.items()
        for metric in metrics
    }


def _row(
    group: list[dict[str, Any]],
    moment: str,
    varied: list[str],
    at: list[str],
    metrics: dict[str, tuple[str, str]],
) -> list[str]:
    first = group[0]
    parameters = f" {json.dumps(first['parameters'])}" if first["parameters"] else ""
    cells = [first["solver"] + parameters, *[_plain(first[name]) for name in varied], *at]
    for split, metric in metrics.values():
        values = [r[moment].get(split, {}).get(metric) for r in group]
        cells.append(over_seeds([100 * v for v in values if v is not None]))
    seconds = sum(r["seconds_per_update"] for r in group) / len(group)
    return [*cells, str(first["forwards_per_update"]), f"{seconds:.2f}", str(len(group))]


def _plain(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def over_seeds(values: Iterable[float], digits: str = ".1f", sign: str = "") -> str:
    """Return the mean and, of several values, the half width of Student's 95 % interval.

    `sign` is "+" for differences.
    """
    from mixadv.robustness.statistics import t_interval

    values = list(values)
    if not values:
        return "–"
    found = t_interval(values)
    mean = f"{found.value:{sign}{digits}}"
    return mean if len(values) == 1 else f"{mean} ± {found.high - found.value:{digits}}"
