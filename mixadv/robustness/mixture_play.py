"""One batch, and what each member of a mixture makes of it under one δ for all of them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from mixadv.game import Game
from mixadv.mixtures import Mixture
from mixadv.model.closure import Reading
from mixadv.model.contexts import no_grad
from mixadv.model.logits import stacked
from mixadv.model.visits import Call, Provide
from mixadv.players.ascent import Ascent
from mixadv.players.strategy import Strategy
from mixadv.robustness.ascents import game_on, learnable, start
from mixadv.robustness.predictions import Batch, check_reading, check_several
from mixadv.round.stage import Stage

CHOSEN, JUDGED, CLIMBED = 0, 1, 2
"""Which draws: those by which δ is chosen, by which it is judged, and of ascents' steps (on)."""

Drawn = tuple[int, int]
"""A member's number, and the seed that it is drawn anew from."""


@dataclass(frozen=True, eq=False)
class MixturePlay:
    """A batch against members of a mixture; each pass is a game's, on the module that plays.

    Attributes:
        mixture: which the batch's closure calls.
        game: on a module.
        batch: the rows.
        members: the numbers of those that play, and
        probabilities: theirs, `[M]`.
        draws: D, how often each member is drawn anew where it is a draw; 1 where none is.
        seed: of draws and random starts.
        zero: δ = 0, at the site as the first member calls it.
    """

    mixture: Mixture
    game: Callable[[nn.Module], Game]
    batch: Batch
    members: Sequence[int]
    probabilities: Tensor
    draws: int
    seed: int
    zero: Strategy

    @property
    def weights(self) -> Tensor:
        """The probability of each draw of each member, `[D·M]`."""
        return self.probabilities.repeat(self.draws) / self.draws

    def only(self, member: int) -> MixturePlay:
        """Return the play against a member alone."""
        return replace(self, members=[member], probabilities=torch.ones(1, dtype=torch.float64))

    def drawn(self, which: int) -> list[Drawn]:
        """Return the members as they are drawn at one time, `D·M`."""
        first = self.seed * 1_000_003 + which * self.draws
        seeds = [(first + draw) % 2**31 + 1 for draw in range(self.draws)]
        return [(member, seed) for seed in seeds for member in self.members]

    def start(self, ascent: Ascent, number: int) -> Strategy:
        """Return a random start in the ball."""
        with _stage(self.mixture, self.game, self.batch, self.drawn(CHOSEN)[0]) as stage:
            stage.clean()
            return start(stage, ascent, self.batch, self.seed, number)

    def logits(self, q: Strategy, which: int) -> Tensor:
        """Return the logits that each member gives under δ, `[D·M, B, C]`."""
        found = []
        for drawn in self.drawn(which):
            with _stage(self.mixture, self.game, self.batch, drawn) as stage, no_grad():
                found.append(logits_of(stage.passes.run(_at(q.points))))
        return stacked(found)

    def right(self, logits: Tensor) -> Tensor:
        """Return whether each member's logits, as from `logits`, are right: 0 or 1, `[D, M, B]`."""
        right = logits.argmax(-1) == self.batch.labels
        return right.view(self.draws, -1, right.shape[-1]).cpu().double()

    def slopes(
        self, drawn: Drawn, q: Strategy, of: Callable[[Reading], Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """Return values of a member, and their gradients in δ: 0 where they are not finite.

        Args:
            drawn: which member.
            q: δ.
            of: makes values `[K, B]` of what the member returned.

        Returns:
            `[K, B]`, and for each call at the site `[K, B, ...]`.
        """
        found = []
        with _stage(self.mixture, self.game, self.batch, drawn) as stage:
            leaves = [point.detach().clone().requires_grad_() for point in q.points]
            values = of(stage.passes.run(_at(leaves)))
            for number, row in enumerate(values):
                for leaf in leaves:
                    leaf.grad = None
                keep = number + 1 < len(values)
                slope = stage.passes.differentiate(row[None], leaves, len(row), keep=keep)
                found.append([g.clone() for g in slope])
        columns = [torch.cat(column) for column in zip(*found, strict=True)]
        pairs = zip(columns, q.masks, strict=True)
        real = [g if mask is None else g.where(mask > 0, 0) for g, mask in pairs]
        return values.detach(), [g.nan_to_num(0, 0, 0) for g in real]

    def check_moves(self, stacklevel: int = 4) -> None:
        """Warn if at δ = 0 no member's loss has a gradient, so that no attack has a direction."""
        first = (self.slopes(member, self.zero, loss_of)[1] for member in self.drawn(CHOSEN))
        if not any(bool(slope.any()) for slopes in first for slope in slopes):
            warnings.warn(
                "The gradient of the loss with respect to δ is exactly zero for every member. "
                "Weights between site and loss may be zero, losses too small for their number "
                "format, or a function such as round() may have no gradient. Attacks move by "
                "chance only, so what they leave right need not be robust.",
                stacklevel=stacklevel,
            )


@contextmanager
def playing(
    mixture: Mixture, site: Any, draws: int, seed: int
) -> Iterator[Callable[[Batch], MixturePlay]]:
    """Give what makes the play of a batch; games are kept meanwhile, one for each module."""
    anew = any(member.drawn_anew(1) is not member for member in mixture.members)
    with ExitStack() as games:
        made: dict[nn.Module, Game] = {}

        def game(module: nn.Module) -> Game:
            if module not in made:
                made[module] = game_on(module, site)
                games.callback(made[module].close)
            return made[module]

        def play(batch: Batch) -> MixturePlay:
            with _stage(mixture, game, batch, (0, 1)) as stage:
                zero = _zero(stage, batch)
            members = range(len(mixture))
            count = draws if anew else 1
            return MixturePlay(
                mixture, game, batch, members, mixture.probabilities, count, seed, zero
            )

        yield play


def loss_of(reading: Reading) -> Tensor:
    """Return the loss of each sample, `[1, B]`."""
    return reading.loss[None]


def logits_of(reading: Reading) -> Tensor:
    """Return the logits `[B, C]`, detached only if the pass was."""
    if reading.predictions is None:
        raise ValueError("A batch's closure must return losses and logits, not losses alone.")
    return reading.predictions


def _zero(stage: Stage, batch: Batch) -> Strategy:
    """Return δ = 0 at the calls of a clean pass, if that is what the batch promises."""
    clean = stage.clean()
    check_reading(batch, clean.loss, logits_of(clean))
    check_several(logits_of(clean).shape[1])
    for call in stage.calls:
        if call.shape[0] != len(batch.rows):
            raise ValueError(
                f"The site returns {call.shape[0]} rows for {len(batch.rows)} samples: mixtures "
                "are attacked where each sample has one row. Name another site=."
            )
    return stage.origin(Ascent()).detach()


@contextmanager
def _stage(
    mixture: Mixture, game: Callable[[nn.Module], Game], batch: Batch, drawn: Drawn
) -> Iterator[Stage]:
    """Rehearse a round in which the member plays, its weights frozen."""
    number, seed = drawn
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        _drawn_anew(mixture, number, seed),
        mixture.member(number) as module,
        learnable(module),
        unwarned(),
        game(module).rounds.rehearse(batch.closure) as stage,
        stage.passes.frozen(),
    ):
        yield stage


@contextmanager
def unwarned() -> Iterator[None]:
    """Leave out that one member has no gradient: others may have, see `check_moves`."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The gradient with respect to δ at .* is exactly zero")
        yield


@contextmanager
def _drawn_anew(mixture: Mixture, number: int, seed: int) -> Iterator[None]:
    """Put another draw of a member in its place while the body runs."""
    own = mixture.members[number]
    mixture.members[number] = own.drawn_anew(seed)
    try:
        yield
    finally:
        mixture.members[number] = own


def _at(points: Sequence[Tensor]) -> Provide:
    """Return what adds δ at the site, where it is as δ was made for."""

    def provide(index: int, call: Call, output: Tensor) -> Tensor:
        if index >= len(points) or points[index].shape[1:] != call.shape:
            made = [list(point.shape[1:]) for point in points]
            raise ValueError(
                f"δ is one for all members, and they differ at the site: it was made for {made}, "
                f"and call {index + 1} of a member returns {list(call.shape)}. Name a site= that "
                "all have alike, such as 'input' for pixels."
            )
        return points[index][0]

    return provide
