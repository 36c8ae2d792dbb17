"""Ascents of the loss in balls around the rows of batches.

An ascent moves as

    δ_{t+1} = Π( δ_t + η_t·g_t/‖g_t‖ ),     g_t = ∇_δ L(x + δ_t, y),     η_t = ε·(1 − t/K)

The first step is as long as the radius ε: where the loss is monotone in one direction, as that of a
linear model is, it ends in the maximum. The later ones shrink, as an ascent has to that shall
settle.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm.auto import tqdm

from mixadv.checks import check_integer, check_number
from mixadv.game import Game
from mixadv.model.contexts import no_grad
from mixadv.model.noise import Noise
from mixadv.model.replay import evaluating
from mixadv.model.visits import Call
from mixadv.players.ascent import Ascent
from mixadv.players.strategy import Strategy
from mixadv.robustness.predictions import Batch, check_reading, in_order
from mixadv.round.stage import Stage
from mixadv.round.unit import measure_unit
from mixadv.round.validate import check_seed
from mixadv.solvers import PGD

Measure = Callable[[Stage, Batch], Sequence[Tensor]]
"""Plays on a batch in a round of its own and returns columns `[B, ...]`."""


def ascents_of(
    who: str,
    model: nn.Module,
    batches: Iterable[Batch],
    radii: Sequence[float],
    steps: int,
    unit: float | None,
    seed: int,
) -> tuple[list[Ascent], list[Batch]]:
    """Check arguments; return the ascent in each ball, lengths as they stand, and the batches."""
    check_integer(who, "steps", steps, 1)
    check_seed(seed)
    for radius in radii:
        check_number(who, "radius", radius)
    if unit is not None:
        check_unit(who, unit)
    batches = list(batches)
    scale = token_norm(model, batches) if unit is None else unit
    return [Ascent(steps=steps, radius=scale * r, unit="absolute") for r in radii], batches


def check_unit(who: str, unit: float) -> None:
    """Raise unless radii can be measured in the unit."""
    check_number(who, "unit", unit)
    if unit == 0:
        raise ValueError(f"{who}: unit=0 makes every radius 0: leave it out to measure it.")


def play(
    model: nn.Module, batches: Iterable[Batch], measure: Measure, what: str, progress: bool
) -> list[NDArray[Any]]:
    """Measure on each batch and return the columns, rows in order; the model is left as it was."""
    rows, columns = [], []
    with (
        evaluating(model),
        learnable(model),
        torch.inference_mode(False),
        torch.enable_grad(),
        closing(game_on(model)) as game,
    ):
        for batch in tqdm(batches, desc=what, unit="batch", disable=not progress):
            with game.rounds.rehearse(batch.closure) as stage, stage.passes.frozen():
                clean = stage.clean()
                if clean.predictions is None:
                    raise ValueError(
                        "A batch's closure must return losses and logits, not losses alone."
                    )
                check_reading(batch, clean.loss, clean.predictions)
                measured = measure(stage, batch)
            rows.append(batch.rows)
            columns.append([column.detach().cpu() for column in measured])
    return in_order(rows, columns)


def game_on(model: nn.Module, site: Any = None) -> Game:
    """Return a game whose rounds are rehearsed: δ acts at the site, in lengths as they stand."""
    game = Game(model, PGD(unit="absolute", start="zero", start_size=0.0), site)
    # The unit is never used, and would be measured on all processes together.
    game.rounds.arena.calibrate(unit=1.0)
    return game


def climb(stage: Stage, ascent: Ascent, q: Strategy) -> tuple[Tensor, Tensor]:
    """Return the largest loss visited, `[B]`, and the predictions at the end, `[B, C]`."""
    visited = []
    for step in range(ascent.steps):
        _, losses, gradients = stage.payoffs(q, "loss", ascent)
        visited.append(losses[0])
        q = stage.move(q, replace(ascent, step_size=step_length(ascent, step)), gradients)
    with no_grad():
        end = stage.passes.run(stage.passes.at(q))
    assert end.predictions is not None
    last = torch.where(end.loss.isfinite(), end.loss, visited[-1])
    return torch.stack([*visited, last]).amax(0), end.predictions


def step_length(ascent: Ascent, step: int) -> float:
    """Return the length of a step: the first is as long as the radius, the later ones shrink."""
    return float(ascent.radius or 0.0) * (1 - step / ascent.steps)


def start(stage: Stage, ascent: Ascent, batch: Batch, seed: int, number: int) -> Strategy:
    """Return a random start, uniform as that of `Ascent`; a row's depends on its place alone."""
    noise = Noise(seed)

    def begin(index: int, call: Call) -> Tensor:
        def draw(kind: str, like: Tensor) -> Tensor:
            real = torch.ones_like(like) if call.mask is None else call.mask.expand_as(like)
            drawn = torch.zeros_like(like)
            each = max(1, len(like) // len(batch.rows))  # a sample has several rows at some sites
            for i, own in enumerate(real > 0):
                row = batch.rows[min(i // each, len(batch.rows) - 1)]
                noise.begin(f"start {number}, call {index}, {i % each}", row)
                drawn[i][own] = noise(kind, like.new_empty(int(own.sum())))
            return drawn

        return ascent.begin(call.empty(), call.mask, draw, call.owners)

    return stage.start(ascent, begin)


def token_norm(model: nn.Module, batches: Iterable[Batch]) -> float:
    """Return the mean L2 norm of a real token's embedding: the unit of radii.

    The mean is over the tokens of all rows, however they are batched. It costs a forward pass for
    each batch: a few hundred rows are enough.

    Raises:
        ValueError: without a batch.
    """
    closures = [batch.closure for batch in batches]
    if not closures:
        raise ValueError("There are no rows to measure on: the batches are empty.")
    with evaluating(model), closing(Game(model, PGD())) as game:
        return measure_unit(game.rounds.arena, closures)


@contextmanager
def learnable(model: nn.Module) -> Iterator[None]:
    """Let the loss of a frozen model depend on its weights meanwhile, as a game checks it does."""
    weights = [p for p in model.parameters() if p.is_floating_point()]
    frozen = [] if any(p.requires_grad for p in weights) else weights
    try:
        for parameter in frozen:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
