"""What a study is made of: methods, tasks, and what is measured. Its TOML file is checked by these.

The text below a field is what `study.py --help` says of its key.
"""

from collections.abc import Mapping
from dataclasses import field
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, StrictFloat, StrictInt
from pydantic.dataclasses import dataclass

import mixadv
from common.parameters import PLAIN, known
from common.results import Run
from mixadv.round.cost import count_passes

CHECKED = ConfigDict(extra="forbid", use_attribute_docstrings=True)
SETTINGS = ("train", "shots", "limit", "max_length", "batch_size", "warmup", "weight_decay")
"""What a task sets of its runs by itself."""
Names = tuple[str, ...]
SomeNames = Annotated[Names, Field(min_length=1)]
Count = Annotated[StrictInt, Field(ge=1)]
Positive = Annotated[StrictFloat, Field(gt=0, allow_inf_nan=False)]
Radius = Annotated[StrictFloat, Field(ge=0, allow_inf_nan=False)]


@dataclass(frozen=True, config=CHECKED)
class Method:
    """A way to train."""

    solver: str = PLAIN
    """a solver's name; "plain" is the optimizer alone"""
    parameters: Mapping[str, Any] = field(default_factory=dict)
    """those of the solver that are not its defaults"""
    times: Positive = 1.0
    """how often it is trained for as many updates as the others"""
    every: Count = 1
    """updates of which the solver plays one; the others are plain"""
    share: StrictFloat = 1.0
    """share of the rows of a batch that the solver plays on; the others are plain"""
    label_smoothing: StrictFloat = 0.0
    """probability that the task loss spreads over all labels"""
    substitute: StrictFloat = 0.0
    """share of the rows that get a copy with words replaced"""
    neighbours: str = ""
    """where the words come from, as --neighbours of glue.py"""
    model: str = ""
    """a hub model or a folder that it begins at, where that is not the study's; {seed} in it is the
    seed of the run"""

    def __post_init__(self) -> None:
        Run(task="", **self.settings)  # raises for what does not go together
        if self.solver == PLAIN and self.parameters:
            raise ValueError(f"plain training has no parameters, got {dict(self.parameters)}.")
        if self.solver != PLAIN:
            known("solver", self.solver, mixadv.SOLVERS)
            try:
                self.played  # noqa: B018  raises for parameters that the solver does not take
            except TypeError as error:
                raise ValueError(str(error)) from error

    @property
    def played(self) -> mixadv.Solver | None:
        """The solver; None for plain training."""
        return None if self.solver == PLAIN else mixadv.make_solver(self.solver, **self.parameters)

    @property
    def settings(self) -> dict[str, Any]:
        """What the method sets of a run, but for its length and the model that it begins at."""
        return {k: v for k, v in vars(self).items() if k not in ("times", "model")} | {
            "parameters": dict(self.parameters)
        }

    def begins(self, otherwise: str, seed: int) -> str:
        """Return the model that a run of a seed begins at: the method's own, or the study's."""
        return (self.model or otherwise).replace("{seed}", str(seed))

    @property
    def cost(self) -> float | None:
        """Passes of training in those of `plain`; forwards, backwards of activations and of
        weights count alike. None where that is not known: of texts that are attacked, which are
        read nobody knows how often, and of a model that was trained before.
        """
        if self.substitute or self.model:
            return None
        played = 1.0 if self.played is None else count_passes(self.played).plain_steps
        return self.times * (1 + (played - 1) * self.share / self.every)


@dataclass(frozen=True, config=CHECKED)
class Shifted:
    """A set of other rows with the labels of a task."""

    hub: SomeNames
    """list of its name on the hub and, where it has any, its subset"""
    folder: str
    """its folder of --data"""
    split: str
    """the split that is read"""


@dataclass(frozen=True, config=CHECKED)
class Subject:
    """A task of the study."""

    script: Literal["glue", "intent", "anli"]
    """the script that loads it: "glue", "intent" or "anli\""""
    epochs: StrictFloat
    """passes over the rows of every method, times its `times`"""
    learning_rates: Annotated[tuple[StrictFloat, ...], Field(min_length=1)]
    """list of those that every method chooses from"""
    evaluate: SomeNames
    """list of splits; the first metric of the first one is the official metric"""
    name: str = ""
    """of the data set, where it is not that of the table"""
    methods: Names = ()
    """list of those that are trained; without it all"""
    shifted: Mapping[str, Shifted] = field(default_factory=dict)
    """sets of other rows with the same labels, by name, see below"""
    attacks: Names = ()
    """list of sources of words to attack by, as --neighbours of glue.py"""
    train: Names = Run.train
    """list of the sets that anli trains on"""
    shots: StrictInt = Run.shots
    """training rows of each label; 0 takes all"""
    limit: StrictInt = Run.limit
    """training rows; 0 takes all"""
    max_length: StrictInt = Run.max_length
    """tokens of a row; the rest is cut"""
    batch_size: StrictInt = Run.batch_size
    """rows of an update"""
    warmup: StrictFloat = Run.warmup
    """share of the updates in which the rate rises"""
    weight_decay: StrictFloat = Run.weight_decay
    """of AdamW"""
    hold_out: StrictInt = 0
    """training rows that the runs of its searches are judged on; 0 takes the study's"""

    def __post_init__(self) -> None:
        if len({*self.learning_rates}) < len(self.learning_rates):
            raise ValueError(f"learning_rates must all differ, got {list(self.learning_rates)}.")
        for rate in self.learning_rates:  # raises for a value out of range
            Run(task="", learning_rate=rate, epochs=self.epochs, **self.settings)
        if self.script == "anli" and not self.train:
            raise ValueError("anli needs train, a list of the sets to train on.")

    @property
    def searched(self) -> bool:
        """Whether there are rates to choose from."""
        return len(self.learning_rates) > 1

    @property
    def settings(self) -> dict[str, Any]:
        """What the task sets of a run by itself."""
        return {name: getattr(self, name) for name in SETTINGS}


@dataclass(frozen=True, config=CHECKED)
class Measures:
    """What is measured of every model, in balls around the embeddings of the same rows."""

    rows: Count = 64
    """rows attacked, of those evaluated"""
    clean_rows: Count = 1000
    """rows evaluated for calibration and, beside shifted sets, for the drop"""
    radii: Annotated[tuple[Radius, ...], Field(min_length=1)] = (0.05, 0.1)
    """list of those of PGD, in token norms of the untrained encoder"""
    increase_radius: Radius = 0.1
    """radius of the loss increase, in the same norms"""
    steps: Count = 5
    """steps of each ascent"""
    restarts: Count = 2
    """random starts of the loss increase"""
