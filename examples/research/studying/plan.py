"""What a study runs: methods × tasks × seeds at two budgets, from a TOML file."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, field
from typing import Annotated, Any, Literal

from pydantic import Field, StrictFloat, StrictInt
from pydantic.dataclasses import dataclass

from common.parameters import PLAIN, known
from common.results import EMBEDDED_MODEL, Run
from studying.parts import CHECKED, Measures, Method, Names, Subject

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


def measurable(line: Mapping[str, Any]) -> bool:
    """Return whether the model of a line is one whose robustness can be measured."""
    return line.get("classifies", True) and not line.get("diverged", False)


@dataclass(frozen=True, config=CHECKED)
class Study:
    """Methods × tasks × seeds."""

    methods: Mapping[str, Method]
    """table of those compared, by name, see below; plain = {} is among them"""
    tasks: Annotated[Mapping[str, Subject], Field(min_length=1)]
    """table of what they are trained on, by name, see below"""
    seeds: Annotated[tuple[StrictInt, ...], Field(min_length=1)] = (0, 1, 2)
    """list of those of the runs that are reported"""
    search_seed: StrictInt = 100
    """seed of the runs that the learning rate is chosen by"""
    hold_out: StrictInt = 300
    """training rows that these runs are judged on"""
    compute: Annotated[StrictFloat, Field(gt=0, allow_inf_nan=False)] = 3.0
    """passes at equal compute, in those of plain training at equal epochs"""
    pairs: tuple[Names, ...] = ()
    """list of pairs of methods, the second to be taken from the first"""
    model: str = EMBEDDED_MODEL
    """a hub model or a folder; "minilm" is the embedded encoder"""
    measure: Measures = field(default_factory=Measures)
    """table of what is measured of every model, see below"""

    def __post_init__(self) -> None:
        if self.methods.get(PLAIN) != Method():
            raise ValueError(
                "methods need plain = {}, plain training, which the others are compared with."
            )
        for seed in (*self.seeds, self.search_seed):
            Run(task="", seed=seed)  # raises for what is no seed
        if len(set(self.seeds)) < len(self.seeds) or self.search_seed in self.seeds:
            raise ValueError(
                f"seeds {list(self.seeds)} and search_seed {self.search_seed} must all differ: "
                "what is chosen on may not be reported."
            )
        for pair in self.pairs:
            if len(pair) != 2:
                raise ValueError(f"pairs are of two methods each, got {pair!r}.")
            for method in pair:
                known("pairs:", method, self.methods)
        for name, subject in self.tasks.items():
            for method in subject.methods:
                known(f"{name}: methods", method, self.methods)
            if subject.methods and PLAIN not in subject.methods:
                raise ValueError(f"{name}: methods need plain, which the others are compared with.")
            for method in subject.half:
                known(f"{name}: half", method, self.trained(name, "epochs"))
            if self.hold_out < 1 and len(subject.learning_rates) > 1:
                raise ValueError(
                    f"{name} has rates to choose from, which takes rows to choose them on: "
                    f"hold_out must be at least 1, got {self.hold_out}."
                )

    # Runs ------------------------------------------------------------------------------------

    def trained(self, task: str, budget: Budget) -> list[str]:
        """Return the methods that are trained at a budget."""
        subject = self.tasks[task]
        if budget == "half":
            return list(subject.half)
        methods = [method for method in self.methods if method in (subject.methods or self.methods)]
        return [m for m in methods if budget == "epochs" or self.methods[m].cost is not None]

    def search(self, task: str, method: str, budget: Budget) -> list[Run]:
        """Return the runs that the learning rate of a method at a budget is chosen by.

        Each budget has its own, since longer training wants smaller rates.
        """
        rates = self.tasks[task].learning_rates
        if len(rates) == 1:
            return []
        seed, rows = self.search_seed, self.hold_out
        return [self._run(task, method, budget, rate, seed, hold_out=rows) for rate in rates]

    def chosen(self, task: str, method: str, budget: Budget, results: Results) -> float | None:
        """Return the learning rate with the best score on the held-out rows; None before it is
        known. The first of several that score the same.
        """
        rates = self.tasks[task].learning_rates
        runs = self.search(task, method, budget)
        if not all(self.done(run, results) for run in runs):
            return None
        scores = [next(iter(results[r.key]["last"]["held-out"].values())) for r in runs]
        return rates[scores.index(max(scores))] if scores else rates[0]

    def reported(
        self, task: str, method: str, budget: Budget, seed: int, results: Results
    ) -> Run | None:
        """Return a run of the report; None before its learning rate is known."""
        if method not in self.trained(task, budget):
            return None
        rate = self.chosen(task, method, budget, results)
        return None if rate is None else self._run(task, method, budget, rate, seed)

    def first(self, task: str) -> list[Run]:
        """Return a run of each method at each budget; the others have another rate or seed."""
        found: list[Run] = []
        for budget in BUDGETS:
            for method in self.trained(task, budget):
                search = self.search(task, method, budget)
                run = self.reported(task, method, budget, self.seeds[0], {})
                found += search[:1] or ([run] if run else [])
        return found

    def runs(self, task: str, results: Results) -> list[Run]:
        """Return all runs of a task that are known, of searches and reported."""
        return [run for _, runs in self.stages(results) for run in runs if run.task == task]

    def cells(self) -> Iterator[tuple[Budget, str, int, str]]:
        """Yield budget, task, seed and method of all that is reported, a task at a time."""
        for budget in BUDGETS:
            for task in self.tasks:
                for seed in self.seeds:
                    for method in self.trained(task, budget):
                        yield budget, task, seed, method

    def stages(self, results: Results) -> Iterator[tuple[Budget | None, list[Run]]]:
        """Yield the runs of each budget and task as far as they are known, after its search."""
        for budget in BUDGETS:
            for task in self.tasks:
                methods = self.trained(task, budget)
                yield None, [run for m in methods for run in self.search(task, m, budget)]
                found = [
                    self.reported(task, method, budget, seed, results)
                    for seed in self.seeds
                    for method in methods
                ]
                yield budget, [run for run in found if run is not None]

    def done(self, run: Run, results: Results) -> bool:
        """Return whether there is a line of a run, with all splits that are to be evaluated."""
        splits = ["held-out"] if run.hold_out else self.tasks[run.task].evaluate
        return run.key in results and set(splits) <= results[run.key]["last"].keys()

    def measured(self, run: Run) -> str:
        """Return the key of the line of what is measured of a run's model."""
        subject = self.tasks[run.task]
        shifted = {name: asdict(at) for name, at in subject.shifted.items()}
        asked = [asdict(self.measure), shifted, subject.attacks, subject.evaluate[0]]
        return f"{run.key}-measured-{hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:6]}"

    def _run(
        self, task: str, method: str, budget: Budget, rate: float, seed: int, **changes: Any
    ) -> Run:
        subject, way = self.tasks[task], self.methods[method]
        epochs = subject.epochs
        if budget == "compute" and way.cost is not None:
            epochs = epochs * self.compute / way.cost
        given = {"task": task, "model": self.model, "learning_rate": rate, "seed": seed}
        given |= {"epochs": epochs, **vars(way), "parameters": dict(way.parameters)}
        fewer = subject.fewer(0.5) if budget == "half" else {}
        return Run(**(given | subject.settings | fewer | changes))
