"""What a study runs: methods × tasks × seeds at two budgets, from a TOML file."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import mixadv
from mixadv.explain import passes
from training.parameters import PLAIN, known
from training.results import EMBEDDED_MODEL, Run

Budget = Literal["epochs", "compute", "half"]
BUDGETS: dict[Budget, str] = {
    "epochs": "equal epochs",
    "compute": "equal compute",
    "half": "half of the rows",
}
MEASURED: tuple[Budget, ...] = ("epochs", "compute")
"""Budgets at which robust measures are taken."""
SCRIPTS = ("glue", "intent", "anli")
SETTINGS = ("train", "shots", "limit", "max_length", "batch_size", "warmup", "weight_decay")
"""What a task may set of a run, besides what the study sets."""
Results = Mapping[str, Mapping[str, Any]]
"""Lines of results by their key."""


@dataclass(frozen=True)
class Method:
    """A way to train.

    Attributes:
        solver: a name in `mixadv.SOLVERS`, or "plain".
        parameters: of the solver that are not the defaults.
    """

    solver: str = PLAIN
    parameters: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.solver == PLAIN and self.parameters:
            raise ValueError(f"plain training has no parameters, got {dict(self.parameters)}.")
        if self.solver != PLAIN:
            known("solver", self.solver, mixadv.SOLVERS)
            self.played  # noqa: B018  raises for parameters that the solver does not take

    @property
    def played(self) -> mixadv.Solver | None:
        """The solver; None for plain training."""
        return None if self.solver == PLAIN else mixadv.solver(self.solver, **self.parameters)

    @property
    def cost(self) -> float:
        """Pass-units of an update, in those of a plain one: a backward counts as two forwards."""
        return 1.0 if self.played is None else passes(self.played).plain_steps


@dataclass(frozen=True)
class Subject:
    """A task of the study.

    Attributes:
        script: that loads it, "glue", "intent" or "anli".
        epochs: of every method at equal epochs.
        learning_rates: that every method chooses from.
        evaluate: splits; the first metric of the first one is the official metric.
        settings: of its runs, see `SETTINGS`.
        half: methods that are trained on half of the rows too.
        shifted: sets of other rows with the same labels by name, each with its `split`, its name
            on the `hub` and its `folder` of the data.
        attacks: names of sources of words, see `training.substitution.SOURCES`.
    """

    script: str
    epochs: float
    learning_rates: tuple[float, ...]
    evaluate: tuple[str, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)
    half: tuple[str, ...] = ()
    shifted: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    attacks: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        known("script", self.script, SCRIPTS)
        for name, value in self.settings.items():
            known("setting", name, SETTINGS)
            Run(task="", **{name: value})  # raises for a value out of range
        for name in ("learning_rates", "evaluate"):
            if not getattr(self, name):
                raise ValueError(f"{name} is empty: give at least one.")
        for rate in self.learning_rates:
            Run(task="", learning_rate=rate, epochs=self.epochs)
        for name, at in self.shifted.items():
            if set(at) != {"split", "hub", "folder"}:
                raise ValueError(f"shifted {name} needs split, hub and folder, got {list(at)}.")
        if self.half:
            self.fewer(0.5)

    def fewer(self, share: float) -> dict[str, int]:
        """Return the settings of runs that get a share of the rows."""
        for name in ("shots", "limit"):
            if self.settings.get(name):
                return {name: max(1, int(share * self.settings[name]))}
        raise ValueError("A share of the rows needs shots or limit: of which number it is a share.")


@dataclass(frozen=True)
class Measures:
    """What is measured of every model, in balls around the embeddings of the same rows.

    Attributes:
        rows: attacked, of those evaluated.
        clean_rows: evaluated for calibration and, beside shifted sets, for the drop.
        radii: of PGD, in token norms of the untrained encoder.
        increase_radius: of the loss increase.
        steps: of each ascent.
        restarts: of the loss increase.
    """

    rows: int = 64
    clean_rows: int = 1000
    radii: tuple[float, ...] = (0.05, 0.1)
    increase_radius: float = 0.1
    steps: int = 5
    restarts: int = 2

    def __post_init__(self) -> None:
        for name in ("rows", "clean_rows", "steps", "restarts"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        for radius in (*self.radii, self.increase_radius):
            if radius < 0:
                raise ValueError(f"A radius must be at least 0, got {radius}.")


@dataclass(frozen=True)
class Study:
    """Methods × tasks × seeds.

    Attributes:
        methods: by name; "plain" is among them, differences are taken to it.
        tasks: by name.
        seeds: of the runs that are reported.
        search_seed: of the runs that the learning rate is chosen by.
        search_share: of the training rows, that those runs get.
        hold_out: training rows that they are judged on.
        compute: pass-units that every method gets at equal compute, in those of plain training at
            equal epochs.
        model: a hub model or a folder; "minilm" for the embedded encoder.
        measure: what is measured of every model.
    """

    methods: Mapping[str, Method]
    tasks: Mapping[str, Subject]
    seeds: tuple[int, ...] = (0, 1, 2)
    search_seed: int = 100
    search_share: float = 1.0
    hold_out: int = 300
    compute: float = 3.0
    model: str = EMBEDDED_MODEL
    measure: Measures = Measures()

    def __post_init__(self) -> None:
        if PLAIN not in self.methods:
            raise ValueError("methods have no plain, which the others are compared with.")
        if not self.tasks or not self.seeds:
            raise ValueError("A study needs tasks and seeds, and one of them is empty.")
        if len(set(self.seeds)) < len(self.seeds) or self.search_seed in self.seeds:
            raise ValueError(
                f"seeds {list(self.seeds)} and search_seed {self.search_seed} must all differ: "
                "what is chosen on may not be reported."
            )
        if self.compute <= 0:
            raise ValueError(f"compute must be positive, got {self.compute}.")
        if not 0 < self.search_share <= 1:
            raise ValueError(f"search_share is a share in (0, 1], got {self.search_share}.")
        for name, subject in self.tasks.items():
            for method in subject.half:
                known(f"{name}: half", method, self.methods)

    # Runs ------------------------------------------------------------------------------------

    def search(self, task: str, method: str) -> list[Run]:
        """Return the runs that the learning rate of a method is chosen by."""
        rates = self.tasks[task].learning_rates
        if len(rates) == 1:
            return []
        changes = {"seed": self.search_seed, "hold_out": self.hold_out}
        if self.search_share < 1:
            changes |= self.tasks[task].fewer(self.search_share)
        return [self._run(task, method, learning_rate=rate, **changes) for rate in rates]

    def chosen(self, task: str, method: str, results: Results) -> float | None:
        """Return the learning rate with the best score on the held-out rows; None before it is
        known. The first of several that score the same.
        """
        rates = self.tasks[task].learning_rates
        runs = self.search(task, method)
        if any(run.key not in results for run in runs):
            return None
        scores = [next(iter(results[r.key]["last"]["held-out"].values())) for r in runs]
        return rates[scores.index(max(scores))] if scores else rates[0]

    def reported(
        self, task: str, method: str, budget: Budget, seed: int, results: Results
    ) -> Run | None:
        """Return a run of the report; None before its learning rate is known."""
        rate = self.chosen(task, method, results)
        if rate is None:
            return None
        subject, changes = self.tasks[task], {}
        if budget == "compute":
            changes["epochs"] = subject.epochs * self.compute / self.methods[method].cost
        if budget == "half":
            changes |= subject.fewer(0.5)
        return self._run(task, method, learning_rate=rate, seed=seed, **changes)

    def cells(self) -> Iterator[tuple[Budget, str, int, str]]:
        """Yield budget, task, seed and method of all that is reported, a task at a time."""
        for budget in BUDGETS:
            for task, subject in self.tasks.items():
                for seed in self.seeds:
                    for method in subject.half if budget == "half" else self.methods:
                        yield budget, task, seed, method

    def stages(self, results: Results) -> Iterator[tuple[Budget | None, list[Run]]]:
        """Yield the runs of each budget and task as far as they are known, after its search."""
        for budget in BUDGETS:
            for task in self.tasks:
                if budget == "epochs":
                    yield None, [r for method in self.methods for r in self.search(task, method)]
                found = [
                    self.reported(task, method, budget, seed, results)
                    for *where, seed, method in self.cells()
                    if where == [budget, task]
                ]
                yield budget, [run for run in found if run is not None]

    def measured(self, run: Run) -> str:
        """Return the key of the line of what is measured of a run's model."""
        subject = self.tasks[run.task]
        asked = [asdict(self.measure), dict(subject.shifted), subject.attacks]
        return f"{run.key}-measured-{hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:6]}"

    def _run(self, task: str, method: str, **changes: Any) -> Run:
        subject, way = self.tasks[task], self.methods[method]
        settings = {
            "task": task,
            "model": self.model,
            "solver": way.solver,
            "parameters": dict(way.parameters),
            "epochs": float(subject.epochs),  # 3 and 3.0 would have two keys
        }
        return Run(**{**settings, **subject.settings, **changes})
