"""What every solver is: an ascent's hyper-parameters, and how a round is played with them."""

import inspect
from abc import ABC, abstractmethod
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, get_args

from torch import Tensor, nn
from typing_extensions import Self

from mixadv.checks import check_flag, check_number
from mixadv.errors import nearest, unknown_parameter
from mixadv.maths.divergence import DIVERGENCES, Divergence, divergence
from mixadv.maths.gauss_newton import CURVED, FLAT
from mixadv.model.closure import MeanOver
from mixadv.model.representation import Source
from mixadv.players.ascent import Ascent, Direction, Sign, check_choices
from mixadv.players.learner import Learner
from mixadv.players.strategy import Strategy
from mixadv.solvers.play import Moves, Play

WORDS = {
    "eps": "radius",
    "epsilon": "radius",
    "rho": "radius",
    "gamma": "radius",
    "beta": "smoothness_weight",
    "alpha": "step_size",
    "lr": "step_size",
    "K": "steps",
    "momentum": "ema_decay",
    "inner_steps": "teacher_every",
    "smoothness": "smoothness_weight",
    "proximal": "proximal_weight",
    "contrast": "contrast_weight",
    "deviation": "deviation_weight",
    "route": "particle_batching",
    "dtype": "ascent_dtype",
}
"""Words of papers, of other code and of earlier versions, and ours for the same."""

Presets = dict[str, dict[str, dict[str, Any]]]
"""Published hyper-parameters, by model and task."""


@dataclass(frozen=True, kw_only=True)
class Solver(Ascent, ABC):
    """How a round is played. Frozen: hyper-parameters only; state lives in the game.

    A solver is one file: a dataclass that sets the defaults of its ascent, names its paper and
    writes `play`, plus one line in the registry. What it always plays alike is no parameter: a
    field with `init=False`. Several particles are declared anew where they are played.

    Attributes:
        recompute: save memory: keep the graph of one pass at a time, and run the other passes
            again for their backward. About 1.3 of the memory of a plain step, one forward more for
            each pass.
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    summary: ClassVar[str]
    replays_batch: ClassVar[bool] = False  # an optimizer step per pass: no loop can split a round
    differentiates_twice: ClassVar[bool] = False  # a pass of its own: once for δ, once for θ
    reads_labels: ClassVar[bool] = False  # of classes, beside the predictions
    perturbs: ClassVar[bool] = True  # inputs: else there is no site
    own_payoff: ClassVar[str] = ""  # why no other payoff fits its ascent, where none does
    presets: ClassVar[Presets] = {}
    words: ClassVar[dict[str, str]] = WORDS

    particles: int = field(default=1, init=False)
    direction: Direction = field(default="gradient", init=False)
    sign: Sign | None = field(default=None, init=False)
    recompute: bool = False

    def __new__(cls, *arguments: Any, **parameters: Any) -> Self:
        """Answer a word of papers or of other code with ours for the same."""
        wrong = unknown_parameter(cls, parameters, cls.words)
        if arguments or wrong:  # unless the class has an __init__ of its own
            try:
                inspect.signature(cls.__init__).bind(None, *arguments, **parameters)
            except TypeError:
                raise TypeError(_by_place(cls, *arguments[:1]) if arguments else wrong) from None
        return super().__new__(cls)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_flag(type(self).__name__, "recompute", self.recompute)
        if self.recompute and self.particle_batching == "stack":
            raise ValueError(
                f"{type(self).__name__}: recompute=True keeps the graph of one particle at a time, "
                "and particle_batching='stack' that of all: use particle_batching='loop'."
            )
        if self.recompute and self.fresh_dropout:
            raise ValueError(
                f"{type(self).__name__}: recompute=True runs a pass again under the dropout mask "
                "it had, and fresh_dropout=True draws another in each: leave one of them out."
            )
        self._check_direction()

    def _check_direction(self) -> None:
        who, kind = type(self).__name__, self.gain
        curved = kind in CURVED
        if self.sign == "boundary" and not curved:
            raise ValueError(
                f"{who}: sign='boundary' makes a label less likely, and the payoff is {kind!r}: it "
                "takes the divergence 'kl', 'symmetric_kl' or 'js'."
            )
        if not self.leaps:
            return
        if not curved and kind not in FLAT:
            raise ValueError(
                f"{who}: direction='gauss_newton' takes a divergence 'kl', 'symmetric_kl', 'js' or "
                f"'squared_error' as payoff, got {kind!r}: leave direction='gradient'."
            )
        if self.particles > 1 or self.normalize in ("none", "adam") or self.steps == 0:
            raise ValueError(
                f"{who}: direction='gauss_newton' starts with one step along one direction: it "
                "needs particles=1, normalize other than 'none' and 'adam', and "
                f"steps=1 or more; got particles={self.particles}, normalize={self.normalize!r}, "
                f"steps={self.steps}."
            )

    @abstractmethod
    def play(self, stage: Moves) -> Play:
        """Yield the objectives of a round; see `mixadv.solvers.play`."""

    def learner(self) -> Learner | None:
        """Return what happens to θ after a step; None for the optimizer's step alone."""
        return None

    def modules(self) -> dict[str, nn.Module]:
        """Return modules that are trained with the model and saved with the game, by field."""
        return {}

    @property
    def on_inputs(self) -> "Solver":
        """The solver whose adversary plays on inputs: this one, or the one it is built around."""
        return self

    @property
    def reads(self) -> Source | None:
        """Where a representation of each sample is read from the model; None reads none."""
        return None

    @property
    def weighs(self) -> str:
        """What there is a distribution over besides δ, in words; empty where there is none."""
        return ""

    @property
    def grouped(self) -> int:
        """How many groups the rows of a batch belong to, told by `groups=`; 0 where they do not."""
        return 0

    @classmethod
    def published(cls, task: str, *, model: str) -> Self:
        """Return the solver with the hyper-parameters published for a task and a model.

        Those of the adversary. The docstring of the solver's file (`help(mixadv.solvers.freelb)`)
        names the source, says where its algorithm differs from ours, and lists the learning rates,
        batch sizes and schedules that belong to the rows.

        Args:
            task: as on the Hugging Face hub: `"cola"`, `"sst2"`, …
            model: likewise: `"roberta-large"`, …

        Raises:
            ValueError: for an unknown pair, with those there are.
        """
        tasks = cls.presets.get(model, {})
        if task not in tasks:
            there = "; ".join(f"{m}: {', '.join(tasks)}" for m, tasks in cls.presets.items())
            near = nearest(task, tasks) if tasks else nearest(model, cls.presets)
            raise ValueError(
                f"{cls.__name__} has no published hyper-parameters for {task!r} with {model!r}."
                f"{near} There are {there or 'none'}."
            )
        return cls(**tasks[task])

    @property
    def gain(self) -> str | Divergence:
        """What the adversary maximises: `"loss"`, or a divergence from the clean predictions."""
        return "loss"

    @property
    def compares(self) -> str | Divergence | None:
        """The divergence that needs predictions, None for solvers that need the loss alone."""
        return None if self.gain == "loss" else self.gain


@dataclass(frozen=True, kw_only=True)
class DivergenceSolver(Solver):
    """A solver whose learner minimises how far the adversary moves the predictions.

    Attributes:
        smoothness_weight: λ (α in ALUM, β in TRADES), the weight of the divergence beside the task
            loss: 1 to 10.
        divergence: ℓ_s: `"symmetric_kl"`, `"kl"`, `"js"`, `"bernoulli"` for several labels,
            `"squared_error"` for regression, or a callable
            `(perturbed [B, C], clean [B, C]) -> [B]`.
        mean_over: how the learner averages ℓ_s when predictions are per token: over `"samples"`,
            each the mean of its tokens, or over all `"tokens"` of the batch. The adversary of a
            sample always maximises the sample's own mean.
    """

    direction: Direction = "gradient"
    sign: Sign | None = None
    smoothness_weight: float = 1.0
    divergence: str | Divergence = "symmetric_kl"
    mean_over: MeanOver = "samples"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_divergence(self, "divergence")
        check_number(type(self).__name__, "smoothness_weight", self.smoothness_weight)
        check_choices(self, {"mean_over": get_args(MeanOver)})

    def smoothness(self, stage: Moves, q: Strategy, **how: bool) -> Tensor:
        """Return λ·ℓ_s of the learner at a strategy; `how` as in `Moves.divergence`."""
        moved = stage.divergence(q, self.divergence, **how, over=self.mean_over)
        return self.smoothness_weight * moved

    @property
    def gain(self) -> str | Divergence:
        """What the adversary maximises."""
        return self.divergence


def _by_place(cls: type[Solver], first: Any) -> str:
    """Return what to write in place of `SAM(model.parameters(), torch.optim.SGD, rho=0.05)`."""
    own = {field.name for field in fields(cls) if field.init}
    if isinstance(first, Solver) and "solver" in own:
        return f"{cls.__name__} takes the solver inside by name: write {cls.__name__}(solver=…)."
    length = getattr(cls, "radius", None)
    named = "" if length is None or "radius" not in own else f"radius={length:g}"
    return (
        f"{cls.__name__} is no optimizer, and takes its hyper-parameters by name. Write "
        f"mixadv.wrap(torch.optim.SGD(model.parameters(), lr=…), model, mixadv.{cls.__name__}"
        f"({named}))."
    )


def refuse_memory(solver: Solver) -> None:
    """Raise for a solver whose moves do not go on from each other."""
    if solver.remembers:
        raise ValueError(
            f"{type(solver).__name__}: normalize='adam' remembers the gradients of an ascent, and "
            f"the moves of {type(solver).__name__} are no ascent of several steps. Leave it out, "
            "or choose PGD, FreeLB, SMART, ALUM or MAT."
        )


def row(
    step_size: float, steps: int, start_size: float, radius: float | None, **more: Any
) -> dict[str, Any]:
    """Return a row of a published table in our words; its lengths are absolute."""
    ascent = {"step_size": step_size, "steps": steps, "start_size": start_size, "radius": radius}
    return {**ascent, "unit": "absolute", **more}


def pixels(
    step_size: float, steps: int, start_size: float, radius: float | None, **more: Any
) -> dict[str, Any]:
    """Return a row of a published table of images: L∞, pixels in [0, 1]."""
    return row(step_size, steps, start_size, radius, norm="linf", box=(0.0, 1.0), **more)


def check_divergence(solver: Solver, field: str) -> None:
    """Raise if the divergence is unknown, or its ascent starts where its gradient is zero."""
    value = getattr(solver, field)
    try:
        divergence(value)
    except ValueError as error:
        loss = " A payoff may also be 'loss'." if field == "payoff" else ""
        raise ValueError(f"{type(solver).__name__}: {field}={value!r}. {error}{loss}") from None
    known = value in [*DIVERGENCES, *DIVERGENCES.values()] and not solver.leaps
    at_zero = solver.start == "zero" or solver.start_size == 0
    if known and at_zero and solver.steps and solver.radius != 0 and not solver.temperature:
        where = "start='zero'" if solver.start == "zero" else f"start_size={solver.start_size}"
        raise ValueError(
            f"{type(solver).__name__}: {where} with {value!r}: a divergence has zero gradient "
            "at δ = 0, so the ascent would never move. Start from 'uniform' or 'normal'."
        )
