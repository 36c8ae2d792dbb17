"""Best responses: what the adversary can gain against a learner that stays where it is."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mixadv.closure import Closure
from mixadv.game import Game
from mixadv.stage import no_grad
from mixadv.strategy import Strategy


class BestResponse(NamedTuple):
    """The end of the adversary's ascent.

    Attributes:
        strategy: the point reached, one per row at the site.
        loss: task loss there, 0-d or `[B]`, as the closure returns it.
        predictions: predictions there, None where the closure returns a loss alone.
    """

    strategy: Strategy
    loss: Tensor
    predictions: Tensor | None


def best_response(game: Game, closure: Closure) -> BestResponse:
    """Return where projected ascent ends, and the model's predictions there.

    It is played in the words of the game's solver: its payoff, steps, ball and start. What a solver
    does besides (a perturbation of tokens, of representations) is for training alone.

    An approximate best response: what it reaches is a lower bound of what an adversary could. The
    learner is left alone: no gradients, no step, and the draws of later rounds are what they would
    have been. Called again it gives the same answer; another start needs a game with another
    `seed`. Put the model in evaluation mode first.

    Args:
        game: on the model to attack, with the solver whose ascent is played.
        closure: as for training; its labels are those the adversary wants missed.

    Raises:
        ValueError: if the solver plays several particles.

    Example:
        >>> import mixadv
        >>> model = torch.nn.Linear(2, 2)
        >>> x, y = torch.eye(2), torch.tensor([0, 1])
        >>> game = mixadv.Game(model, mixadv.PGD(steps=5, radius=1.0, step_size=0.5))
        >>> def closure():
        ...     logits = model(x)
        ...     return torch.nn.functional.cross_entropy(logits, y), logits
        >>> best_response(game, closure).predictions.shape
        torch.Size([2, 2])
    """
    if game.solver.particles > 1:
        raise ValueError(
            f"A best response is one point, and {type(game.solver).__name__} plays "
            f"particles={game.solver.particles}. Use particles=1, and other seeds for other starts."
        )
    found = game.round, game.outcome, game.strategy, game.updates, game._stepped
    try:
        with torch.enable_grad(), game.stage(closure) as stage:
            strategy = stage.ascend(game.solver.gain, game.solver)
            with no_grad():
                reading = stage.run(stage.at(strategy, 0))
    finally:
        game.round, game.outcome, game.strategy, game.updates, game._stepped = found
    return BestResponse(strategy, reading.loss, reading.predictions)
