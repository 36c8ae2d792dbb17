"""Restarts: a method whose bound is O(1/T), played in ever longer runs from where it has come."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mixadv.games.matrix import gap
from mixadv.games.method import Answer, Method, Output, Players, Profile, Scene
from mixadv.games.methods import MirrorProx


@dataclass(frozen=True, kw_only=True)
class Restarted(Method):
    """Another method, begun anew from where it has come, in ever longer runs.

    A run of T steps ends at a gap of KL/(ηT), with KL from its start to an equilibrium. It starts
    from the better of the last run's average and last pair, mixed with a little of the uniform one,
    a tenth of the gap in units of r: so KL is at most about distance·log(1/gap), the distance at
    most gap/α for a constant α of the game, and once T is long enough each run divides the gap. α
    can be arbitrarily small, so there is no bound for all games.

    Attributes:
        inner: what is restarted, a class of methods; `step_size` is handed to it.
    """

    inner: type[Method] = MirrorProx

    name: ClassVar[str] = "restarted"
    paper: ClassVar[str] = "Applegate et al. 2023, arXiv:2105.12715, for linear programs"
    bound: ClassVar[str] = "none"
    output: ClassVar[Output] = "best"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (isinstance(self.inner, type) and issubclass(self.inner, Method)):
            raise TypeError(
                f"Restarted: inner must be a class of methods such as Hedge, got {self.inner!r}."
            )

    def play(self, x: Tensor, y: Tensor, scene: Scene) -> Players:
        """Play runs of growing length, each from the end of the one before."""
        method, length = self.inner(step_size=self.step_size), 16
        while True:
            run = _Run(x, y)
            yield from run.play(method, scene._replace(steps=length), length)
            x, y, least = run.best()
            yield Profile(x, y)
            share = (0.1 * least * scene.over_spread(1.0)).clamp(max=0.5)
            x, y = _with_uniform(x, share), _with_uniform(y, share)
            length = math.ceil(1.2 * length)


def _with_uniform(x: Tensor, share: Tensor) -> Tensor:
    """Return the log-weights of (1 − share)·x + share·uniform."""
    return torch.logaddexp(x + (-share).log1p(), (share / x.shape[-1]).log())


class _Run:
    """A few steps of a method from one start, their average and the last of them."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.start = x, y
        self.x, self.y = torch.full_like(x, -math.inf), torch.full_like(y, -math.inf)
        self.paid, self.earned = torch.zeros_like(x), torch.zeros_like(y)

    def play(self, method: Method, scene: Scene, length: int) -> Players:
        players = method.play(*self.start, scene)
        move = next(players)
        for _ in range(length):
            while not move.counts:
                move = players.send((yield move))
            answer = yield move
            self.last, self.answer = move, answer
            # Summed in the log domain: weights that underflow once can come back.
            self.x, self.y = torch.logaddexp(self.x, move.x), torch.logaddexp(self.y, move.y)
            self.paid, self.earned = self.paid + answer.losses, self.earned + answer.gains
            move = players.send(answer)
        self.x, self.y = self.x.log_softmax(-1), self.y.log_softmax(-1)
        self.mean = Answer(self.paid / length, self.earned / length)

    def best(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the average or the last pair, whose gap is less in each game, and that gap."""
        mean, last = gap(*self.mean)[..., None], gap(*self.answer)[..., None]
        nearer = last < mean
        x, y = (
            torch.where(nearer, new, old)
            for new, old in ((self.last.x, self.x), (self.last.y, self.y))
        )
        return x, y, torch.minimum(mean, last)
