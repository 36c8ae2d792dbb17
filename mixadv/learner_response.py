"""Best responses of the learner: what it can gain against an adversary that stays where it is.

The other side of `mixadv.equilibrium`. With u the loss and q the strategy in play at θ, which is as
described there,

    max_δ u(θ, δ) − min_θ' E_(δ~q) u(θ', δ)  =  (exploitability of θ)  +  (exploitability of q)

is the duality gap of the pair, and its second part is measured here. The response takes steps of
Adam on half of the batches, and is judged on the others, which it did not see: so its gain there,
on average, is at most that of the best response. A gain of 0 certifies nothing.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from mixadv.checks import check_integer, check_number
from mixadv.equilibrium import check_game, each_closure, untouched
from mixadv.exploited import bound, check_level, interval_of
from mixadv.game import Game
from mixadv.model.closure import Closure
from mixadv.model.parallel import swapped
from mixadv.players.strategy import Strategy
from mixadv.round.in_play import in_play, payoffs_of


class LearnerGain(NamedTuple):
    """A lower bound of what the learner gains by leaving its weights; `str()` of it is one line.

    Attributes:
        played: loss of the weights in play under the adversary's strategy, `[N]` over the samples
            judged; over the batches where the closure returns a scalar.
        reached: loss of the response there, `[N]`.
        response: what was found by, in words.
        level: probability with which the interval covers the response's mean gain over the data
            that the samples were drawn from.
    """

    played: Tensor
    reached: Tensor
    response: str
    level: float

    @property
    def gain(self) -> Tensor:
        """The lower bound, 0-d: the mean over samples, at least 0, for the learner may stay."""
        return (self.played - self.reached).mean().clamp(min=0)

    @property
    def interval(self) -> tuple[Tensor, Tensor] | None:
        """Student's confidence interval of the mean gain, cut at 0; None for a single sample."""
        return interval_of(self.played - self.reached, self.level)

    def __str__(self) -> str:
        return f"learner's gain: {bound(self.gain, self.interval, self.level)}, by {self.response}"


def learner_exploitability(
    game: Game,
    closures: Iterable[Closure],
    *,
    steps: int = 20,
    rate: float = 1e-3,
    level: float = 0.95,
) -> LearnerGain:
    """Return by how much a learner that moves on out-plays the weights that are in play.

        E_(δ~q) u(θ, δ) − min_θ' E_(δ~q) u(θ', δ)

    bounded from below, by a response on batches 1, 3, … that is judged on batches 2, 4, … Weights,
    gradients, buffers, modes and random state are afterwards as they were.

    Args:
        game: the one that trains (`optimizer.game`), or another on the model; its solver's payoff
            is the loss.
        closures: as for training, at least two, of held-out batches.
        steps: of the response, each on one batch in turn.
        rate: of Adam.
        level: of the confidence interval.

    Raises:
        ValueError: with a solver whose payoff is a divergence, or of fewer than two batches.

    Example:
        >>> import mixadv
        >>> model = torch.nn.Linear(2, 2)
        >>> x, y = torch.eye(2), torch.tensor([0, 1])
        >>> game = mixadv.Game(model, mixadv.PGD(steps=1, radius=0.5))
        >>> def closure():
        ...     return torch.nn.functional.cross_entropy(model(x), y, reduction="none")
        >>> found = learner_exploitability(game, [closure, closure], rate=0.1)
        >>> bool(found.gain > 0), found.response
        (True, 'Adam, 20 steps of rate 0.1')
    """
    held_out = list(each_closure(closures))
    _check(game, len(held_out), steps, rate, level)
    with torch.inference_mode(False), torch.enable_grad(), untouched(game):
        played = [_strategy(game, closure) for closure in held_out]
        pairs = list(zip(held_out, played, strict=True))
        learnt, judged = pairs[::2], pairs[1::2]
        before = torch.cat([_payoff(game, *pair) for pair in judged])
        with _moved(game, learnt, steps, rate):
            after = torch.cat([_payoff(game, *pair) for pair in judged])
    return LearnerGain(before, after, f"Adam, {steps} steps of rate {rate:g}", level)


def _check(game: Game, batches: int, steps: int, rate: float, level: float) -> None:
    check_game(game)
    check_integer("learner_exploitability", "steps", steps, 1)
    check_number("learner_exploitability", "rate", rate)
    check_level("learner_exploitability", level)
    if game.solver.gain != "loss":
        raise ValueError(
            f"The payoff of {type(game.solver).__name__} is a divergence, which is 0 for any "
            "constant model: ask with a solver whose payoff is the loss, such as "
            "mixadv.Game(model, mixadv.PGD(radius=…))."
        )
    if batches < 2:
        raise ValueError(
            f"learner_exploitability needs at least two batches, got {batches}: the response is "
            "evaluated on batches that it was not trained on."
        )


def _strategy(game: Game, closure: Closure) -> Strategy:
    with game.rounds.rehearse(closure) as stage, stage.passes.frozen():
        return in_play(stage)


def _payoff(game: Game, closure: Closure, q: Strategy) -> Tensor:
    """Return the expected payoff of a strategy at the weights there are, `[B]` or `[1]`."""
    with game.rounds.rehearse(closure) as stage, stage.passes.frozen():
        return (q.weights * payoffs_of(stage, q)).sum(0)


@contextmanager
def _moved(
    game: Game, batches: list[tuple[Closure, Strategy]], steps: int, rate: float
) -> Iterator[None]:
    """Give the model the weights that descent against the strategies reaches, for the body."""
    parameters = [p for p in game.model.parameters() if p.requires_grad]
    gradients = [p.grad for p in parameters]
    with swapped(game.model, {p: p.detach().clone() for p in parameters}):
        try:
            adam = torch.optim.Adam(parameters, lr=rate)
            for step in range(steps):
                closure, q = batches[step % len(batches)]
                adam.zero_grad()
                with game.rounds.rehearse(closure) as stage:
                    stage.loss(q).backward()
                adam.step()
            adam.zero_grad()
            yield
        finally:
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
