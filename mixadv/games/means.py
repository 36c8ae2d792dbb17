"""What a finite game keeps of the strategies that were played."""

from __future__ import annotations

import torch
from torch import Tensor

from mixadv.games.matrix import MatrixGame, gap
from mixadv.games.method import Answer, Method, Profile
from mixadv.games.strategies import Pair


class Means:
    """The strategies of a finite game that were played: their mean, the last, the best."""

    def __init__(self, game: MatrixGame, method: Method) -> None:
        self.game, self.method = game, method
        self.count = 0

    def answer(self, profile: Profile[Tensor]) -> Answer:
        """Return what rows pay and columns earn against a profile; keep it if it counts."""
        pair = Pair(profile.x.exp(), profile.y.exp())
        answer = Answer(self.game.losses(pair.adversary), self.game.gains(pair.learner))
        if profile.counts:
            self._keep(pair, answer)
        return answer

    def _keep(self, pair: Pair, answer: Answer) -> None:
        """Take in a step; a mean of strategies, not of their logarithms, is one."""
        self.count += 1
        self.last, self.answered = pair, answer
        if self.count == 1:
            self.mean = [v.clone() for v in (*pair, *answer)]
            self.least, self.best = gap(*answer), pair
            return
        for mean, new in zip(self.mean, (*pair, *answer), strict=True):
            mean.lerp_(new, 1 / self.count)
        if self.method.output == "best":
            found = gap(*answer)
            better = (found < self.least)[..., None]
            self.least = torch.minimum(found, self.least)
            self.best = Pair(*map(torch.where, (better, better), pair, self.best))

    @property
    def average(self) -> Pair:
        """The mean strategies."""
        return Pair(self.mean[0], self.mean[1])

    @property
    def output(self) -> Pair:
        """The strategies that the method's bound is about."""
        if self.method.output == "average":
            return self.average
        return self.best if self.method.output == "best" else self.last

    def gap(self) -> Tensor:
        """Return the gap of the method's output; the game is linear, so its answers average."""
        if self.method.output == "average":
            return gap(self.mean[2], self.mean[3])
        return self.least if self.method.output == "best" else gap(*self.answered)
