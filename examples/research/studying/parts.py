"""What a study is made of: methods, tasks, and what is measured."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import mixadv
from common.parameters import PLAIN, known
from common.results import Run
from mixadv.checks import check_integer, check_number
from mixadv.round.cost import count_passes

SCRIPTS = ("glue", "intent", "anli")
SETTINGS = ("train", "shots", "limit", "max_length", "batch_size", "warmup", "weight_decay")
"""What a task may set of a run, besides what the study sets."""


@dataclass(frozen=True)
class Method:
    """A way to train.

    Attributes:
        solver: a name in `mixadv.SOLVERS`, or "plain".
        parameters: of the solver that are not the defaults.
        substitute: share of the rows that get a copy with words replaced, see `common.Run`.
        neighbours: where the words come from.
    """

    solver: str = PLAIN
    parameters: Mapping[str, Any] = field(default_factory=dict)
    substitute: float = 0.0
    neighbours: str = ""

    def __post_init__(self) -> None:
        Run(task="", substitute=self.substitute, neighbours=self.neighbours)  # raises for one alone
        if self.solver == PLAIN and self.parameters:
            raise ValueError(f"plain training has no parameters, got {dict(self.parameters)}.")
        if self.solver != PLAIN:
            known("solver", self.solver, mixadv.SOLVERS)
            self.played  # noqa: B018  raises for parameters that the solver does not take

    @property
    def played(self) -> mixadv.Solver | None:
        """The solver; None for plain training."""
        return None if self.solver == PLAIN else mixadv.make_solver(self.solver, **self.parameters)

    @property
    def cost(self) -> float | None:
        """Passes of an update in those of a plain one; forwards, backwards of activations and of
        weights count alike. None where texts are attacked: nobody knows how often they are read.
        """
        if self.substitute:
            return None
        return 1.0 if self.played is None else count_passes(self.played).plain_steps


@dataclass(frozen=True)
class Subject:
    """A task of the study.

    Attributes:
        script: that loads it, "glue", "intent" or "anli".
        epochs: of every method at equal epochs.
        learning_rates: that every method chooses from.
        evaluate: splits; the first metric of the first one is the official metric.
        settings: of its runs, see `SETTINGS`.
        methods: that are trained, all without a list of them.
        half: methods that are trained on half of the rows too.
        shifted: sets of other rows with the same labels by name, each with its `split`, its name
            on the `hub` and its `folder` of the data.
        attacks: names of sources of words, see `common.substitution.SOURCES`.
    """

    script: str
    epochs: float
    learning_rates: tuple[float, ...]
    evaluate: tuple[str, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)
    methods: tuple[str, ...] = ()
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
        if self.script == "anli" and not self.settings.get("train"):
            raise ValueError("anli needs train, a list of the sets to train on.")
        for rate in self.learning_rates:
            Run(task="", learning_rate=rate, epochs=self.epochs)
        for name, at in self.shifted.items():
            if set(at) != {"split", "hub", "folder"}:
                raise ValueError(f"shifted {name} needs split, hub and folder, got {list(at)}.")
            if isinstance(at["hub"], str):
                raise ValueError(f"shifted {name}: hub must be a list, got {at['hub']!r}.")
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
            check_integer("measure", name, getattr(self, name), 1)
        if not self.radii:
            raise ValueError("radii is empty: give at least one.")
        for radius in (*self.radii, self.increase_radius):
            check_number("measure", "a radius", radius)
