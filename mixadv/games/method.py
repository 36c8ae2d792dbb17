"""What a method of playing a finite game is: a coroutine that never sees the game.

It yields the pair of strategies it plays, as log-weights, and is sent what each row pays and each
column earns against that pair:

    losses, gains = yield Profile(x, y)          losses = A·exp(y),  gains = Aᵀ·exp(x)
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Literal, TypeVar

import torch
from torch import Tensor
from typing_extensions import NamedTuple  # which may be generic in Python 3.10 too

from mixadv.checks import check_number

StepSize = float | tuple[float, float] | Literal["auto"]
Output = Literal["average", "last", "best"]

Strategy = TypeVar("Strategy")


class Profile(NamedTuple, Generic[Strategy]):
    """What learner and adversary play: log-weights `[..., m]` and `[..., n]`, or particles."""

    x: Strategy
    y: Strategy
    counts: bool = True  # a step of the method, or only looked at on the way to one


class Answer(NamedTuple):
    """What each row pays, `[..., m]`, and what each column earns, `[..., n]`."""

    losses: Tensor
    gains: Tensor


class Scene(NamedTuple):
    """What a method may know of a game: the range of payoffs, `[..., 1]`, and the steps T."""

    spread: Tensor
    steps: int

    def over_spread(self, number: float) -> Tensor:
        """Return number/r, `[..., 1]`; 0 for constant games, where any strategy is best."""
        # Ranges below 1/largest would make it infinite: their games are constant to rounding.
        varies = self.spread > 4 * torch.finfo(self.spread.dtype).tiny * max(1.0, number)
        return torch.where(varies, number / torch.where(varies, self.spread, 1.0), 0.0)


def check_step_size(who: str, step_size: Any) -> None:
    """Raise unless a step size is "auto", a number, or one for each player."""
    if step_size == "auto":
        return
    if isinstance(step_size, str) or (isinstance(step_size, tuple) and len(step_size) != 2):
        raise ValueError(
            f"{who}: step_size must be 'auto', a number, or a pair (learner, adversary), got "
            f"{step_size!r}."
        )
    for size in step_size if isinstance(step_size, tuple) else (step_size,):
        check_number(who, "step_size", size)


Players = Generator[Profile[Tensor], Answer, None]
StepSizes = tuple[float | Tensor, float | Tensor]


@dataclass(frozen=True, kw_only=True)
class Method:
    """A way to play; hyper-parameters only.

    Attributes:
        step_size: η in 1/payoff, one for both players or a pair, or `"auto"`: the best of the
            method's bound for the steps that are played.
        output: the strategies a method's bound is about: their average over the steps, the last,
            or the best seen, where there is no bound.
    """

    step_size: StepSize = "auto"

    name: ClassVar[str]
    paper: ClassVar[str]
    bound: ClassVar[str]
    output: ClassVar[Output] = "average"

    def __post_init__(self) -> None:
        check_step_size(type(self).__name__, self.step_size)

    def play(self, x: Tensor, y: Tensor, scene: Scene) -> Players:
        """Play from the log-weights x and y."""
        raise NotImplementedError

    def best_steps(self, x: Tensor, y: Tensor, scene: Scene) -> StepSizes:
        """Return the step sizes of both players that make the method's bound least."""
        raise NotImplementedError

    def step_sizes(self, x: Tensor, y: Tensor, scene: Scene) -> StepSizes:
        """Return the step sizes of both players."""
        if isinstance(self.step_size, str):
            return self.best_steps(x, y, scene)
        if isinstance(self.step_size, tuple):
            return self.step_size
        return self.step_size, self.step_size
