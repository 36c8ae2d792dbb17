"""What a study runs: methods × tasks × seeds, from a TOML file."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, field
from statistics import fmean
from typing import Annotated, Any

from pydantic import Field, StrictInt
from pydantic.dataclasses import dataclass

from common.parameters import PLAIN, known
from common.results import EMBEDDED_MODEL, Run
from studying.parts import CHECKED, Measures, Method, Names, Subject

Results = Mapping[str, Mapping[str, Any]]
"""Lines of results by their key."""
Seeds = Annotated[tuple[StrictInt, ...], Field(min_length=1)]


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
    seeds: Seeds = (0, 1, 2)
    """list of those of the runs that are reported"""
    search_seeds: Seeds = (100,)
    """list of those of the runs that the learning rate is chosen by"""
    hold_out: StrictInt = 300
    """training rows that these runs are judged on"""
    references: Names = (PLAIN,)
    """list of the methods that the others are compared with"""
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
        seeds = (*self.seeds, *self.search_seeds)
        for seed in seeds:
            Run(task="", seed=seed)  # raises for what is no seed
        if len(set(seeds)) < len(seeds):
            raise ValueError(
                f"seeds {list(self.seeds)} and search_seeds {list(self.search_seeds)} must all "
                "differ: what is chosen on may not be reported."
            )
        if len({*self.references}) < len(self.references):
            raise ValueError(f"references must all differ, got {list(self.references)}.")
        for reference in self.references:
            known("references:", reference, self.methods)
        for pair in self.pairs:
            if len({*pair}) != 2 or len(pair) != 2:
                raise ValueError(f"pairs are of two methods each, which differ, got {pair!r}.")
            for method in pair:
                known("pairs:", method, self.methods)
        for name, subject in self.tasks.items():
            for method in subject.methods:
                known(f"{name}: methods", method, self.methods)
            if subject.methods and PLAIN not in subject.methods:
                raise ValueError(f"{name}: methods need plain, which the others are compared with.")
            if self.judged_on(name) < 1 and subject.searched:
                raise ValueError(
                    f"{name} has rates to choose from, which takes rows to choose them on: "
                    f"hold_out must be at least 1, got {self.judged_on(name)}."
                )

    # Runs ------------------------------------------------------------------------------------

    def trained(self, task: str) -> list[str]:
        """Return the methods that are trained on a task."""
        chosen = self.tasks[task].methods or self.methods
        return [method for method in self.methods if method in chosen]

    def judged_on(self, task: str) -> int:
        """Return how many training rows the runs of a task's searches are judged on."""
        return self.tasks[task].hold_out or self.hold_out

    def search(self, task: str, method: str) -> dict[float, list[Run]]:
        """Return by rate the runs that a method's is chosen by; none where there is one.

        A method that trains longer has its own, as it may want a smaller rate.
        """
        rates = self.tasks[task].learning_rates
        if not self.tasks[task].searched:
            return {}
        return {
            rate: [
                self._run(task, method, rate, seed, hold_out=self.judged_on(task))
                for seed in self.search_seeds
            ]
            for rate in rates
        }

    def scores(self, task: str, method: str, results: Results) -> dict[float, float]:
        """Return the mean score on the held-out rows of each rate whose runs are all there."""
        return {
            rate: fmean(next(iter(results[r.key]["last"]["held-out"].values())) for r in runs)
            for rate, runs in self.search(task, method).items()
            if all(self.done(task, run, results) for run in runs)
        }

    def chosen(self, task: str, method: str, results: Results) -> float | None:
        """Return the learning rate with the best score on the held-out rows; None before it is
        known. The first of several that score the same.
        """
        rates = self.tasks[task].learning_rates
        if not self.tasks[task].searched:
            return rates[0]
        scores = self.scores(task, method, results)
        return max(scores, key=scores.__getitem__) if len(scores) == len(rates) else None

    def reported(self, task: str, method: str, seed: int, results: Results) -> Run | None:
        """Return a run of the report; None before its learning rate is known."""
        if method not in self.trained(task):
            return None
        rate = self.chosen(task, method, results)
        return None if rate is None else self._run(task, method, rate, seed)

    def runs(self, task: str, results: Results) -> list[Run]:
        """Return all runs of a task that are known, of searches and reported."""
        return [run for of, _, runs in self.stages(results) for run in runs if of == task]

    def first(self, task: str) -> list[Run]:
        """Return a run of each method; the others have another rate or seed."""
        rate, seed = self.tasks[task].learning_rates[0], self.seeds[0]
        runs = []
        for method in self.trained(task):
            search = self.search(task, method)
            runs.append(search[rate][0] if search else self._run(task, method, rate, seed))
        return runs

    def cells(self) -> Iterator[tuple[str, int, str]]:
        """Yield task, seed and method of all that is reported, a task at a time."""
        for task in self.tasks:
            for seed in self.seeds:
                for method in self.trained(task):
                    yield task, seed, method

    def stages(self, results: Results) -> Iterator[tuple[str, bool, list[Run]]]:
        """Yield the runs of each task as far as they are known, and whether they are reported.

        Every method with its search and half of the seeds, then with the other half: a study that
        is stopped early compares all methods by fewer seeds, not fewer methods by all.
        """
        half = (len(self.seeds) + 1) // 2
        for task in self.tasks:
            for method in self.trained(task):
                searches = self.search(task, method).values()
                yield task, False, [run for runs in searches for run in runs]
                yield task, True, self._known(task, method, self.seeds[:half], results)
            for method in self.trained(task):
                yield task, True, self._known(task, method, self.seeds[half:], results)

    def _known(self, task: str, method: str, seeds: Seeds, results: Results) -> list[Run]:
        found = [self.reported(task, method, seed, results) for seed in seeds]
        return [run for run in found if run is not None]

    def done(self, task: str, run: Run, results: Results) -> bool:
        """Return whether there is a line of a run, with all splits that are to be evaluated."""
        splits = ["held-out"] if run.hold_out else self.tasks[task].evaluate
        return run.key in results and set(splits) <= results[run.key]["last"].keys()

    def measured(self, task: str, run: Run) -> str:
        """Return the key of the line of what is measured of a run's model."""
        subject = self.tasks[task]
        shifted = {name: asdict(at) for name, at in subject.shifted.items()}
        asked = [asdict(self.measure), shifted, subject.attacks, subject.evaluate[0]]
        return f"{run.key}-measured-{hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:6]}"

    def _run(self, task: str, method: str, rate: float, seed: int, **changes: Any) -> Run:
        subject, way = self.tasks[task], self.methods[method]
        given = {
            "task": subject.name or task,
            "model": way.begins(self.model, seed),
            "learning_rate": rate,
            "seed": seed,
        }
        given |= {"epochs": subject.epochs * way.times, **way.settings}
        return Run(**(given | subject.settings | changes))
