"""An adversary of the weights, around a solver whose adversary plays on inputs.

    g = ∇θ J(θ),     v = argmax_{‖v‖ ≤ ρ} ⟨g, v⟩,     θ ← θ − γ·∇θ J(θ + v)

J is what the round of the inner solver minimises, at the strategy that its adversary finds at θ:
the second gradient is taken against that same strategy, under the same dropout mask. What the
learner retains is part of J: it is ascended too, and minimised at θ + v and δ = 0. The weights are
put back, bit for bit, before the optimizer steps. Solvers differ in the norm.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from mixadv.checks import check_flag
from mixadv.maths.divergence import Divergence
from mixadv.maths.geometry import Norm, Per
from mixadv.model.parallel import sum_of_squares
from mixadv.model.representation import Source
from mixadv.players.ascent import Normalize, ParticleBatching, Projection, Start, Unit
from mixadv.players.learner import Learner
from mixadv.solvers.base import Solver
from mixadv.solvers.play import Moves, Play, Step
from mixadv.solvers.rows import RowSolver

Which = Callable[[str, Tensor], bool]
"""`which(name, parameter)`: whether a parameter is one that the adversary moves."""


@dataclass(frozen=True, kw_only=True)
class Plain(Solver):
    """Plain training: nobody plays on inputs.

    Passes: 1 forward, 1 backward.

    Example:
        >>> Plain().radius
        0.0
    """

    name: ClassVar[str] = "plain"
    paper: ClassVar[str] = "no adversary"
    summary: ClassVar[str] = "the plain loss"

    perturbs: ClassVar[bool] = False

    steps: int = field(default=0, init=False)
    radius: float | None = field(default=0.0, init=False)
    start: Start = field(default="zero", init=False)

    def play(self, stage: Moves) -> Play:
        """Play `∇θ ℓ(X)`."""
        yield Step(stage.plain_loss())


@dataclass(frozen=True, kw_only=True)
class WeightsSolver(Solver):
    """A solver whose adversary moves the weights, around one whose adversary moves the inputs.

    It takes the inner solver's passes of the learner twice, its ascent once, and a copy of the
    weights.

    Attributes:
        solver: plays on inputs; None is the plain loss.
        radius: ρ, how far the weights move; 0 leaves them.
        shared: of several processes, one displacement for all, found from the gradient that is
            averaged over them, as one process would with the whole batch; False has each find its
            own from its own rows, without a word between them.
        which: `which(name, parameter)` says whether the adversary moves a parameter, of those that
            are trained; None is the rule of the solver.
    """

    ball: ClassVar[str]  # what the radius measures

    solver: Solver | None = None
    radius: float | None = 0.05
    shared: bool = True
    which: Which | None = None

    steps: int = field(default=1, init=False)
    step_size: float = field(default=1.0, init=False)
    norm: Norm = field(default="l2", init=False)
    per: Per = field(default="sample", init=False)
    normalize: Normalize = field(default="steepest", init=False)
    projection: Projection = field(default="ball", init=False)
    start: Start = field(default="zero", init=False)
    start_size: float | None = field(default=None, init=False)
    temperature: float = field(default=0.0, init=False)
    box: tuple[float, float] | None = field(default=None, init=False)
    unit: Unit = field(default="absolute", init=False)
    fresh_dropout: bool = field(default=False, init=False)
    particle_batching: ParticleBatching = field(default="loop", init=False)
    ascent_dtype: torch.dtype | Literal["bfloat16"] | None = field(default=None, init=False)
    recompute: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        who = type(self).__name__
        if self.solver is not None and not isinstance(self.solver, Solver):
            raise TypeError(
                f"{who}: solver must be a solver such as mixadv.PGD(), or None for the plain loss, "
                f"got {self.solver!r}."
            )
        super().__post_init__()
        if self.radius is None:
            raise ValueError(
                f"{who}: radius=None would let the weights go anywhere: give a radius such as "
                f"{type(self).radius}."
            )
        check_flag(who, "shared", self.shared)
        if isinstance(self.solver, WeightsSolver):
            raise ValueError(
                f"{who}: solver={type(self.solver).__name__}() moves the weights too, and a round "
                "has one adversary of weights: choose one of them."
            )
        if isinstance(self.solver, RowSolver):
            raise ValueError(
                f"{who}: solver={type(self.solver).__name__}() weighs rows, and whether it does so "
                "before or after the weights of the model move is not settled: write "
                f"{who}(solver=mixadv.PGD()), or mixadv.{type(self.solver).__name__}() by itself."
            )
        if self.which is not None and not callable(self.which):
            raise TypeError(
                f"{who}: which must be a function of a parameter's name and of the parameter, or "
                f"None, got {self.which!r}."
            )

    @abstractmethod
    def displacements(
        self, weights: Sequence[Tensor], gradients: Sequence[Tensor]
    ) -> Iterator[Tensor]:
        """Yield v for each weight; gradients, in at least fp32, may be used up.

        Gradients whose norm in fp32 is 0 or not finite displace nothing. A norm below about 1e-22
        rounds to 0, and one above 1e19 overflows.
        """

    def described_ball(self) -> str:
        """Return in words where the weights may go."""
        whose = "one displacement for all processes" if self.shared else "one for each process"
        return f"{self.radius:g} {self.ball}; of each call, or list of closures, {whose}"

    def moves(self, name: str, parameter: Tensor) -> bool:
        """Return whether the adversary moves a parameter that is trained."""
        return True if self.which is None else self.which(name, parameter)

    @property
    def on_inputs(self) -> Solver:
        """The inner solver, or plain training."""
        return Plain() if self.solver is None else self.solver

    def play(self, stage: Moves) -> Play:
        """Play the inner solver's round: once at θ, and again at θ + v."""
        return self.on_inputs.play(stage)

    def learner(self) -> Learner | None:
        """Return what the inner solver's learner does after a step."""
        return self.on_inputs.learner()

    def modules(self) -> dict[str, nn.Module]:
        """Return the modules of the inner solver."""
        return self.on_inputs.modules()

    @property
    def reads(self) -> Source | None:
        """Where the inner solver reads a representation."""
        return self.on_inputs.reads

    @property
    def gain(self) -> str | Divergence:
        """What the inner solver's adversary maximises."""
        return self.on_inputs.gain


def over_norm(size: float | Tensor, square: Tensor) -> Tensor:
    """Return size over a norm of which the square is given, 0 where that is 0 or not finite."""
    return torch.where(square.isfinite() & (square > 0), size / square.sqrt(), 0.0)


def scaled(gradient: Tensor, factor: Tensor) -> Tensor:
    """Multiply a gradient in place by a factor, which is 0 for one that is not finite."""
    return gradient.mul_(factor).nan_to_num_(0.0)  # of nan and infinity times 0


def square_of(tensors: Sequence[Tensor]) -> Tensor:
    """Return the square of the L2 norm of all tensors together, 0-d."""
    return torch.stack([sum_of_squares(x) for x in tensors]).sum()
