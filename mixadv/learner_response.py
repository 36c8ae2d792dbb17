"""Best responses of the learner: what it can gain against an adversary that stays where it is.

The other side of `mixadv.equilibrium`. q is the strategy in play at θ, as described there, u what
the adversary is paid, and J what the learner is judged by:

    E_(δ~q) J(θ, δ) − min_θ' E_(δ~q) J(θ', δ)

* Where u is the loss, J is u, also of a solver that minimises more, as CAT or MART. The learner's
  gain and the adversary's then add up to the duality gap of the pair,
  max_δ u(θ, δ) − min_θ' E_(δ~q) u(θ', δ).
* Where u is a divergence, which is 0 for any constant model, J is the objective of the solver, up
  to its first optimizer step: of MAT ℓ(θ) + λ·u(θ, δ), of SMART that and μ times the divergence
  from the teacher. What the adversary did at θ, points and weights, it does again at θ'. The game
  is of general sum, and the two gains add up to the sum of regrets (NashConv): 0 at a Nash
  equilibrium alone, and no duality gap. But where J is ℓ(θ) + λ·u(θ, δ) and terms without δ, as of
  every `DivergenceSolver`, λ times the adversary's gain and the learner's add up to the duality gap
  of the game that pays J (L2 in theory/statements.md). Of `PGD(payoff=…)`, whose J is the task loss
  at δ, they do not.

A teacher stays where it is. What becomes of θ after a step (noise, damping, averages) is no part of
J: the weights that are judged are those in the model. The response moves what the optimizer holds,
where the game knows it; a graph made before cannot be differentiated any more. Where
`mean_over="tokens"`, J counts tokens and u samples, and only the sum of regrets is left.

The response takes steps of Adam on half of the batches, and is judged on the others, which it did
not see: so its gain there, on average, is at most that of the best response. A gain of 0 certifies
nothing. Dropout masks and buffers are alike at θ and θ', and the bound is then one under these
masks: prefer evaluation mode.
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
from mixadv.model.contexts import aside
from mixadv.model.parallel import swapped
from mixadv.round.held import Held, differentiate, hold, objectives
from mixadv.round.in_play import standing


class LearnerGain(NamedTuple):
    """A lower bound of what the learner gains by leaving its weights; `str()` of it is one line.

    Attributes:
        played: J of the weights in play under the adversary's strategy, `[N]` over the samples
            judged; over the batches where the closure returns a scalar, or an objective is made of
            more than means over samples.
        reached: the same of the response, `[N]`.
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

        E_(δ~q) J(θ, δ) − min_θ' E_(δ~q) J(θ', δ)

    bounded from below, by a response on batches 1, 3, … that is judged on batches 2, 4, … J is the
    loss, or the solver's objective where its payoff is a divergence; see the file's docstring.
    Weights, gradients, buffers, modes and random state are afterwards as they were.

    Args:
        game: the one that trains (`optimizer.game`), or another on the model.
        closures: as for training, at least two, of held-out batches. Those that return losses per
            sample `[B]` give a gain per sample, scalar ones a gain per batch.
        steps: of the response, each on one batch in turn.
        rate: of Adam.
        level: of the confidence interval.

    Raises:
        ValueError: of fewer than two batches; with a payoff that is a divergence, where no strategy
            can be held: of a solver that also moves the weights (`SAM`), that moves δ on between
            steps, or that weighs rows.

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
    response = f"Adam, {steps} steps of rate {rate:g}"
    if game.solver.gain != "loss":
        response += f", in the objective of {type(game.solver).__name__}"
    with torch.inference_mode(False), torch.enable_grad(), untouched(game), _teacher(game):
        better = _response(game, held_out[::2][:steps], steps, rate)
        pairs = [_judged(game, closure, better) for closure in held_out[1::2]]
    played, reached = (torch.cat(values) for values in zip(*pairs, strict=True))
    return LearnerGain(played, reached, response, level)


def _check(game: Game, batches: int, steps: int, rate: float, level: float) -> None:
    check_game(game)
    check_integer("learner_exploitability", "steps", steps, 1)
    check_number("learner_exploitability", "rate", rate)
    check_level("learner_exploitability", level)
    if game.solver.gain != "loss":
        _check_holds(game)
    if batches < 2:
        raise ValueError(
            f"learner_exploitability needs at least two batches, got {batches}: the response is "
            "evaluated on batches that it was not trained on."
        )


def _check_holds(game: Game) -> None:
    """Raise for what the learner minimises, where no strategy can be held in it."""
    solver, inner = game.solver, game.rounds.arena.solver
    who = type(solver).__name__
    if solver is not inner:
        still = ", optimizer=torch.optim.SGD(model.parameters(), lr=0.0)" * bool(inner.learner())
        raise ValueError(
            f"{who} moves the weights from wherever the learner stands, so its move cannot be held "
            "while the learner goes elsewhere: ask about the solver inside, in a game of its own, "
            f"mixadv.Game(model, optimizer.game.solver.solver{still})."
        )
    if solver.replays_batch or solver.weighs:
        why = "moves on before each step of the learner" if solver.replays_batch else "weighs rows"
        raise ValueError(
            f"The adversary of {who} {why}, so none of its strategies stands for a round: ask with "
            "a solver that plays one, such as mixadv.Game(model, mixadv.PGD(radius=…))."
        )


@contextmanager
def _teacher(game: Game) -> Iterator[None]:
    """Hold a teacher where it is; one that begins as a copy of the weights is one of θ."""
    learner = game.rounds.arena.learner
    if learner is None or learner.ema_decay is None:
        yield
        return
    found = dict(learner.teacher)
    learner.teacher_weights()
    try:
        yield
    finally:
        learner.teacher = found


def _held(game: Game, closure: Closure) -> Held:
    with standing(game.rounds, closure) as stage:
        return hold(stage)


def _judged(game: Game, closure: Closure, better: dict[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Return what the learner minimises on a batch, at its own weights and at better ones."""
    held = _held(game, closure)
    with standing(game.rounds, closure) as stage:
        played = objectives(stage, held)
    with swapped(game.model, better), standing(game.rounds, closure) as stage:
        reached = objectives(stage, held)
    if len(played) != len(reached):  # apart by samples at one of the two alone
        return played.mean().reshape(1), reached.mean().reshape(1)
    return played, reached


def _response(game: Game, closures: list[Closure], steps: int, rate: float) -> dict[Tensor, Tensor]:
    """Return weights that descent reaches against what the adversary plays now."""
    batches = [(closure, _held(game, closure)) for closure in closures]
    arena = game.rounds.arena
    parameters = arena.trained(arena.parameters())
    with aside(parameters), swapped(game.model, {p: p.detach().clone() for p in parameters}):
        adam = torch.optim.Adam(parameters, lr=rate)
        for step in range(steps):
            closure, held = batches[step % len(batches)]
            adam.zero_grad()
            with game.rounds.rehearse(closure) as stage:
                differentiate(stage, held)
            adam.step()
        return {p: p.detach().clone() for p in parameters}
