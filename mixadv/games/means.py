"""What a finite game keeps of the strategies that were played."""

from __future__ import annotations

import torch
from torch import Tensor

from mixadv.games.matrix import MatrixGame, gap
from mixadv.games.method import Answer, Method, Play
from mixadv.games.solution import Pair


class Means:
    """The strategies of a finite game that were played: their mean, the last, the best."""

    def __init__(self, game: MatrixGame, method: Method) -> None:
        self.game, self.output = game, method.output
        self.count = 0

    def answer(self, play: Play) -> Answer:
        """Return what rows pay and columns earn against a play."""
        self.last = Pair(play.x.exp(), play.y.exp())
        self.answered = Answer(
            self.game.losses(self.last.adversary), self.game.gains(self.last.learner)
        )
        return self.answered

    def add(self, play: Play, answer: Answer) -> None:
        """Take in a step just answered; a mean of strategies, not of their logarithms, is one."""
        (x, y), seen = self.last, [*self.last, *answer]
        self.count += 1
        if self.count == 1:
            self.mean = [v.clone() for v in seen]
            self.least, self.best = gap(*answer), self.last
        else:
            for mean, new in zip(self.mean, seen, strict=True):
                mean.lerp_(new, 1 / self.count)
        if self.output == "best":
            found = gap(*answer)
            better = (found < self.least)[..., None]
            self.least = torch.minimum(found, self.least)
            self.best = Pair(
                torch.where(better, x, self.best[0]), torch.where(better, y, self.best[1])
            )

    @property
    def average(self) -> Pair:
        """The mean strategies."""
        return Pair(self.mean[0], self.mean[1])

    def gap(self) -> Tensor:
        """Return the gap of the method's output; the game is linear, so its answers average."""
        if self.output == "average":
            return gap(self.mean[2], self.mean[3])
        return self.least if self.output == "best" else gap(*self.answered)
