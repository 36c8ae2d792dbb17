"""What a study runs: methods × tasks × seeds at two budgets, from a TOML file."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from studying.parts import Measures, Method, Subject
from training.parameters import PLAIN, known
from training.results import EMBEDDED_MODEL, Run

Budget = Literal["epochs", "compute", "half"]
BUDGETS: dict[Budget, str] = {
    "epochs": "equal epochs",
    "compute": "equal compute",
    "half": "half of the rows",
}
COMPARED: tuple[Budget, ...] = ("epochs", "compute")
"""Budgets at which all methods are trained, measured and compared."""
Results = Mapping[str, Mapping[str, Any]]
"""Lines of results by their key."""


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
    measure: Measures = field(default_factory=Measures)

    def __post_init__(self) -> None:
        if self.methods.get(PLAIN) != Method():
            raise ValueError(
                "methods need plain = {}, plain training, which the others are compared with."
            )
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
            if self.search_share < 1:
                subject.fewer(self.search_share)

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
        if not all(self.done(run, results) for run in runs):
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
            cost = self.methods[method].cost
            if cost is None:
                return None
            changes["epochs"] = subject.epochs * self.compute / cost
        if budget == "half":
            changes |= subject.fewer(0.5)
        return self._run(task, method, learning_rate=rate, seed=seed, **changes)

    def cells(self) -> Iterator[tuple[Budget, str, int, str]]:
        """Yield budget, task, seed and method of all that is reported, a task at a time."""
        for budget in BUDGETS:
            for task, subject in self.tasks.items():
                methods = subject.half if budget == "half" else self.methods
                for seed in self.seeds:
                    for method in methods:
                        if budget != "compute" or self.methods[method].cost is not None:
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

    def done(self, run: Run, results: Results) -> bool:
        """Return whether there is a line of a run, with all splits that are to be evaluated."""
        splits = ["held-out"] if run.hold_out else self.tasks[run.task].evaluate
        return run.key in results and set(splits) <= results[run.key]["last"].keys()

    def measured(self, run: Run) -> str:
        """Return the key of the line of what is measured of a run's model."""
        subject = self.tasks[run.task]
        asked = [asdict(self.measure), dict(subject.shifted), subject.attacks, subject.evaluate[0]]
        return f"{run.key}-measured-{hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:6]}"

    def _run(self, task: str, method: str, **changes: Any) -> Run:
        subject, way = self.tasks[task], self.methods[method]
        settings = {
            "task": task,
            "model": self.model,
            "solver": way.solver,
            "parameters": dict(way.parameters),
            "substitute": way.substitute,
            "neighbours": way.neighbours,
            "epochs": float(subject.epochs),  # 3 and 3.0 would have two keys
        }
        return Run(**{**settings, **subject.settings, **changes})
