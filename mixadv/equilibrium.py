"""Best responses: what the adversary can gain against a learner that stays where it is.

What an ascent reaches is a lower bound: an exploitability of 0 certifies nothing, and a gain shows
that the solver's own adversary is too weak. u is the solver's payoff: the task loss, or its
divergence from the clean predictions. The strategy in play, q, is what a round on this batch would
leave as `game.strategy` if the learner stood still: the last point of an ascent; MAT's mean where
that is played, else its mixture, which earns what its particles do on average. The response ascends
in the same ball by steps of a quarter of the radius: once from the point of q that pays most, so
that it is never weaker than q, then from random ones. What a solver has besides ball and payoff
(CAT's sharing, CreAT's distance) is left aside. All passes see one dropout mask; prefer evaluation
mode, where a sample's payoff is its own whatever the batch. Before the first round the unit of
lengths is measured on the first batch, and forgotten again. Of several processes each reports its
own samples.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mixadv.checks import check_integer
from mixadv.exploited import Exploitability, check_level
from mixadv.game import Game
from mixadv.model.closure import Closure
from mixadv.model.contexts import no_grad
from mixadv.model.masks import Where
from mixadv.model.replay import Buffers, evaluating
from mixadv.players.ascent import Ascent
from mixadv.players.strategy import Strategy
from mixadv.round.in_play import best, finite, in_play, payoffs_of, standing
from mixadv.solvers.base import Solver


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


def best_response(
    game: Game, closure: Closure, *, where: Where = None, adversary: Closure | None = None
) -> BestResponse:
    """Find a strong δ by projected ascent; return it, and the model's predictions there.

    The ascent has the payoff, steps, ball and start of the game's solver. If there are several
    particles, each sample gets the one that gains most. What a solver does besides (perturbations
    of tokens or of representations) is for training only.

    The response is approximate: what it reaches is a lower bound on what an adversary could reach.
    The learner is unchanged: no gradients, no step, and later rounds draw the same random numbers.
    A second call gives the same answer; another start needs a game with another `seed`. Put the
    model in evaluation mode first.

    Args:
        game: on the model to attack, with the solver whose ascent is played.
        closure: as for training; its labels are those the adversary wants missed.
        where: where δ may act, as in `Game.backward`; None is at real tokens.
        adversary: what the adversary maximises instead, as in `Game.backward`: `closure` is then
            what is read under its δ.

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
    check_game(game)
    rehearsal = game.rounds.rehearse(closure, where, adversary)
    with torch.inference_mode(False), torch.enable_grad(), rehearsal as stage:
        strategy = stage.ascend(game.rounds.arena.solver.gain, game.rounds.arena.solver)
        with no_grad():
            if strategy.size > 1:
                strategy = best(strategy, finite(payoffs_of(stage, strategy)))
            reading = stage.passes.run(stage.passes.at(strategy))
    return BestResponse(strategy, reading.loss, reading.predictions)


def attack(
    model: nn.Module,
    solver: Solver,
    closure: Closure,
    site: Any = None,
    *,
    seed: int = 0,
    where: Where = None,
    adversary: Closure | None = None,
) -> BestResponse:
    """Attack a model on one batch: `best_response` without a game of your own.

    Use it to measure robustness. The model is put into evaluation mode for the attack, and left
    unchanged. The point is where the ascent ends, which longer or more steps need not improve: the
    worst of several seeds is a stronger attack.

    Args:
        model: the model to attack.
        solver: its ascent is the attack, such as `PGD(steps=10)`.
        closure: runs the forward pass and returns the loss, or loss and predictions.
        site: where δ acts; None finds the input embedding that the encoder calls.
        seed: of the start.
        where: where δ may act, as in `Game.backward`; None is at real tokens.
        adversary: what the adversary maximises, where it is not the loss: of a targeted attack
            `lambda: -loss_to(target)`. `closure` is then what is read under its δ.

    Example:
        >>> import mixadv
        >>> model = torch.nn.Linear(2, 2)
        >>> x, y = torch.eye(2), torch.tensor([0, 1])
        >>> def closure():
        ...     logits = model(x)
        ...     return torch.nn.functional.cross_entropy(logits, y), logits
        >>> clean = closure()[0]
        >>> solver = mixadv.PGD(steps=5, radius=1.0, start="zero")
        >>> bool(mixadv.attack(model, solver, closure).loss > clean)
        True
    """
    if next(model.parameters(), None) is None:
        raise ValueError(f"{type(model).__name__} has no parameters: there is nothing to attack.")
    still = torch.optim.SGD(model.parameters(), lr=0.0)  # a learner part would ask for one
    game = Game(model, solver, site, seed=seed, optimizer=still)
    try:
        with evaluating(model):
            return best_response(game, closure, where=where, adversary=adversary)
    finally:
        game.close()


def exploitability(
    game: Game,
    closures: Closure | Iterable[Closure],
    *,
    steps: int = 20,
    restarts: int = 4,
    level: float = 0.95,
    where: Where = None,
    adversary: Closure | Iterable[Closure] | None = None,
) -> Exploitability:
    """Return by how much a stronger adversary out-earns the strategy in play.

        max_δ u(δ) − E_{δ~q} u(δ)     per sample, at the current θ

    bounded from below, by points that an ascent reached; see the file's docstring. Costs a round
    and `steps · restarts` forwards and backwards for δ; training goes on bit for bit as without it.

    Args:
        game: the one that trains (`optimizer.game`), or another on the model.
        closures: as for training; several for several batches. One that returns losses per sample
            `[B]`, where the payoff is the loss, gives a gain per sample; a scalar one per batch.
        steps: of each ascent.
        restarts: how many starts; the first is the strategy in play.
        level: of the confidence interval.
        where: as in `best_response`; of batches that differ, a function of the call.
        adversary: what it maximises instead, one for each closure: the gain is its regret under its
            own payoff, and no part of a duality gap, of which a general-sum game has none.

    Raises:
        ValueError: for a solver without a radius, as no response is best; without a closure.

    Example:
        >>> import mixadv
        >>> model, losses = torch.nn.Linear(2, 2), torch.nn.CrossEntropyLoss(reduction="none")
        >>> x, y = torch.eye(2), torch.tensor([0, 1])
        >>> game = mixadv.Game(model, mixadv.PGD(steps=1, radius=0.5))
        >>> exploitability(game, lambda: losses(model(x), y)).response
        'projected ascent, 20 steps × 4 restarts, l2 ball of 0.5 token norms'
    """
    check_game(game)
    ascent, response = _stronger(game.rounds.arena.solver, steps, restarts, adversary is not None)
    check_level("exploitability", level)
    with torch.inference_mode(False), torch.enable_grad(), untouched(game):
        pairs = _paired(closures, adversary)
        found = [_measure(game, where, ascent, restarts, *pair) for pair in pairs]
    if not found:
        raise ValueError("exploitability: no closure was given, so nothing was measured.")
    played, reached = (torch.cat(payoffs) for payoffs in zip(*found, strict=True))
    return Exploitability(played, reached, response, level)


def check_game(game: Game) -> None:
    """Raise unless it is a game."""
    if not isinstance(game, Game):
        raise TypeError(f"game must be a mixadv.Game, such as optimizer.game, got {game!r}.")
    if not game.rounds.arena.solver.perturbs:
        raise ValueError(
            f"{type(game.solver).__name__} moves the weights, and there is no adversary on inputs "
            "to respond: ask a game that has one, mixadv.Game(model, mixadv.PGD())."
        )


def _stronger(solver: Solver, steps: int, restarts: int, general_sum: bool) -> tuple[Ascent, str]:
    """Return steepest ascent by steps that do not shrink with their number, and its name.

    Where u is linear, the angle to the best direction shrinks by 1/(1 + step/radius) in each.
    """
    check_integer("exploitability", "steps", steps, 1)
    check_integer("exploitability", "restarts", restarts, 1)
    if solver.radius is None:
        raise ValueError(
            f"{type(solver).__name__} has radius=None: without a bound on δ there is no best "
            "response. Ask a game whose solver has a radius."
        )
    ball = {word: getattr(solver, word) for word in ("radius", "norm", "per", "unit")}
    where = f"{solver.norm} ball of {solver.radius:g}"
    where += " token norms" * (solver.unit == "relative") + " per token" * (solver.per == "token")
    named = f"projected ascent, {steps} steps × {restarts} restarts, {where}"
    named += ", in the adversary's own payoff" * general_sum
    return Ascent(steps=steps, step_size=solver.radius / 4, **ball), named


def each_closure(closures: Closure | Iterable[Closure]) -> Iterator[Closure]:
    """Yield closures one by one, of several or of one; raise if one is none."""
    several = [closures] if callable(closures) else closures
    for closure in several if isinstance(several, Iterable) else [several]:
        if not callable(closure):
            raise TypeError(
                "exploitability takes a closure, which runs the forward pass and returns the "
                f"loss, or several of them; got {closure!r}."
            )
        yield closure


def _paired(
    closures: Closure | Iterable[Closure], adversaries: Closure | Iterable[Closure] | None
) -> Iterator[tuple[Closure, Closure | None]]:
    """Yield each closure with what the adversary maximises, None where that is the loss."""
    if adversaries is None:
        yield from ((closure, None) for closure in each_closure(closures))
        return
    try:
        yield from zip(each_closure(closures), each_closure(adversaries), strict=True)
    except ValueError as error:
        raise ValueError("exploitability: give one adversary= for each closure.") from error


def _measure(
    game: Game,
    where: Where,
    ascent: Ascent,
    restarts: int,
    closure: Closure,
    adversary: Closure | None,
) -> tuple[Tensor, Tensor]:
    """Return the payoffs of the strategy in play and of the best response, `[B]` or `[1]`."""
    with standing(game.rounds, closure, where, adversary) as stage:
        stage.passes.replay.fresh = False  # payoffs are compared
        q = in_play(stage)
        payoffs = payoffs_of(stage, q)
        candidates = finite(payoffs)
        start = best(q, candidates)

        reached = [candidates]
        for restart in range(restarts):
            begin = None if restart else lambda index, call: start.points[index][0]
            end = stage.ascend(game.rounds.arena.solver.gain, ascent, begin=begin)
            reached.append(finite(payoffs_of(stage, end)))
        return (q.weights * payoffs).sum(0), torch.cat(reached).amax(0)


@contextmanager
def untouched(game: Game) -> Iterator[None]:
    """Put back what a round's play and the check before the first one change in a game."""
    rounds = game.rounds
    found = rounds.arena.calibration, rounds.memory
    heads = [Buffers(module.modules()) for module in game.rounds.arena.solver.modules().values()]
    # A loader draws from the random state when closures are made of its batches.
    random = torch.get_rng_state()
    try:
        with rounds.arena.site.forgetting():
            yield
    finally:
        torch.set_rng_state(random)
        rounds.arena.calibration, rounds.memory = found
        for buffers in heads:
            buffers.undo()
