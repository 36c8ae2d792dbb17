"""What a solver plays on, and what its `play` yields.

`play(stage)` is a generator. It yields an objective for every pass that only accumulates gradients,
and `Step(objective)` for the last pass before an optimizer step; between two yields the caller has
run the backward pass, after a `Step` also the learner's step.
"""

from collections.abc import Generator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from mixadv.maths.divergence import Divergence
from mixadv.model.closure import MeanOver, Reading
from mixadv.model.visits import Call
from mixadv.players.ascent import Ascent
from mixadv.players.opening import Begin
from mixadv.players.strategy import Rule, Strategy


class Step(NamedTuple):
    """The objective of the last pass before an optimizer step."""

    objective: Tensor


Play = Generator[Tensor | Step, None, None]


class Moves(Protocol):
    """What a solver can do in a round. `mixadv.Stage` does it on a model.

    Attributes:
        memory: what the solver keeps from round to round, by name: tensors, or lists of them.
    """

    memory: dict[str, Any]

    @property
    def site(self) -> list[str]:
        """Names of the modules at whose output δ is added."""
        ...

    @property
    def calls(self) -> list[Call]:
        """The calls at the site in a pass; empty before the first."""
        ...

    def start(self, ascent: Ascent, begin: Begin | None = None) -> Strategy:
        """Return the adversary's start points, leaves that require grad.

        Args:
            ascent: how to start.
            begin: `begin(index, call)` gives the one point `[B, ...]` of each call instead.
        """
        ...

    def origin(self, ascent: Ascent) -> Strategy:
        """Return δ = 0, as a point that requires grad."""
        return self.start(ascent, lambda index, call: torch.zeros_like(call.empty()))

    def draw(self, ascent: Ascent, call: Call) -> Tensor:
        """Return the ascent's own start at a call, `[B, ...]`."""
        ...

    def constant(self, name: str, kind: str, like: Tensor) -> Tensor:
        """Return a draw that is the same in every round: it depends on seed and name alone."""
        ...

    def payoffs(
        self, q: Strategy, payoff: str | Divergence, ascent: Ascent, deviation_weight: float = 0.0
    ) -> tuple[Strategy, Tensor, list[Tensor]]:
        """Return the strategy, each particle's payoff, and its gradient with respect to δ alone.

        Args:
            q: where to evaluate, M particles.
            payoff: `"loss"`, or a divergence from the clean predictions, by name or callable.
            ascent: says how many particles share a pass, and whether signs are chosen.
            deviation_weight: of the cosine distance between the perturbed and the clean
                representation, added to the payoff.

        Returns:
            The strategy as it was evaluated, its points turned towards the decision boundary where
            the ascent says so; payoffs `[M, B]`, or `[M, 1]` where only a scalar loss is known; per
            call at the site the gradients `[M, B, ...]` of each sample's own payoff.
        """
        ...

    def clean_gradients(self, ascent: Ascent) -> tuple[Strategy, list[Tensor]]:
        """Return δ = 0 and each sample's own gradient there, from the clean pass itself.

        The clean pass keeps its graph for the learner: one backward for δ and no pass more.
        """
        ...

    def second_order(self, kind: str | Divergence, ascent: Ascent) -> tuple[Strategy, list[Tensor]]:
        """Return δ = 0 and the direction that `gauss_newton` finds there.

        The clean pass keeps its graph for the learner: one backward for δ and no pass more.
        """
        ...

    def leap(self, kind: str | Divergence, ascent: Ascent) -> Strategy:
        """Return the first move of an ascent that begins by Gauss–Newton; see `gauss_newton`."""
        zero, gradients = self.second_order(kind, ascent)
        size = ascent.step_size if ascent.radius is None else ascent.radius
        return self.move(zero, replace(ascent, step_size=size), gradients)

    def move(
        self, q: Strategy, how: Ascent | Rule, gradients: Sequence[Tensor] | None = None
    ) -> Strategy:
        """Return the strategy after one move of the ascent.

        Args:
            q: the points to move.
            how: the ascent to move by, or a rule for each call at the site.
            gradients: as `payoffs` returns them; None takes what the backward of the last
                `loss(q)` left on the points, scaled back to each sample's own payoff.
        """
        ...

    def ascend(
        self,
        payoff: str | Divergence,
        ascent: Ascent,
        deviation_weight: float = 0.0,
        begin: Begin | None = None,
    ) -> Strategy:
        """Return where the ascent ends after its K steps, detached; `begin` as for `start`."""
        leaps = ascent.leaps and begin is None
        q = self.leap(payoff, ascent) if leaps else self.start(ascent, begin)
        for _ in range(ascent.steps - leaps):
            q, _, gradients = self.payoffs(q, payoff, ascent, deviation_weight)
            q = self.move(q, ascent, gradients)
        return q.detach()

    def clean(self) -> Reading:
        """Return the clean pass; run once between two optimizer steps and shared."""
        ...

    def learned(self) -> Reading:
        """Return the clean pass, as one that gradients of an objective go through."""
        ...

    def plain_loss(self) -> Tensor:
        """Return the clean loss, 0-d, as an objective of its own."""
        ...

    def loss(self, q: Strategy | None = None, last: bool = True, clean: bool = False) -> Tensor:
        """Return the task loss, 0-d: clean, or at the strategy (its expectation, if mixed).

        Args:
            q: the strategy; None is the clean pass.
            last: False for a pass that only accumulates: its gradients stay on this process.
            clean: the strategy is δ = 0, and its loss the clean one of the outcome.
        """
        ...

    def losses(self, q: Strategy) -> Tensor:
        """Return the loss of each sample at a point, `[B]`, for rows that are weighed.

        Raises:
            GameError: if the closure returns a scalar.
        """
        ...

    def group_means(self, losses: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Return the mean loss of each group, over all processes, and how many rows it has there.

        Groups are those that `groups=` tells; without it all rows are of the first one.
        """
        ...

    def weighed(self, values: Tensor, weights: Tensor, sizes: Tensor | None = None) -> Tensor:
        """Return Σ w·v, 0-d, as what the adversary is paid that plays the weights.

        Args:
            values: losses of rows, or means of groups.
            weights: as many, constants.
            sizes: how many rows each group has, where groups are weighed.
        """
        ...

    def run_at(self, q: Strategy) -> Reading:
        """Return the pass at a point: loss, predictions, and the representation if one is read."""
        ...

    def divergence(
        self,
        q: Strategy,
        kind: str | Divergence,
        fixed: bool = False,
        sampled: bool = False,
        over: MeanOver = "samples",
    ) -> Tensor:
        """Return the expected divergence between perturbed and clean predictions, 0-d.

        Gradients reach θ through both arguments, or, where the clean predictions are `fixed`,
        through the perturbed ones alone; the points are constants. Where it is `sampled`, each
        sample meets one particle, drawn anew by the weights: the same in expectation, for one pass.
        It is the mean over samples, or over all tokens of the batch.
        """
        ...

    def proximal(self, kind: str | Divergence, over: MeanOver = "samples") -> Tensor:
        """Return the divergence of the predictions from those of the teacher, 0-d."""
        ...
