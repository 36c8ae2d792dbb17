"""A stage around another one, which answers what is asked of it."""

from collections.abc import Sequence

from torch import Tensor

from mixadv.maths.divergence import Divergence
from mixadv.model.closure import MeanOver, Reading
from mixadv.model.visits import Call
from mixadv.players.ascent import Ascent
from mixadv.players.opening import Begin
from mixadv.players.strategy import Rule, Strategy
from mixadv.solvers.play import Moves


class Wrapped(Moves):
    """What `stage` is; a class that inherits from it changes some of its answers."""

    def __init__(self, stage: Moves) -> None:
        self.stage = stage
        self.memory = stage.memory

    @property
    def site(self) -> list[str]:
        return self.stage.site

    @property
    def calls(self) -> list[Call]:
        return self.stage.calls

    def start(self, ascent: Ascent, begin: Begin | None = None) -> Strategy:
        return self.stage.start(ascent, begin)

    def draw(self, ascent: Ascent, call: Call) -> Tensor:
        return self.stage.draw(ascent, call)

    def constant(self, name: str, kind: str, like: Tensor) -> Tensor:
        return self.stage.constant(name, kind, like)

    def payoffs(
        self, q: Strategy, payoff: str | Divergence, ascent: Ascent, deviation_weight: float = 0.0
    ) -> tuple[Strategy, Tensor, list[Tensor]]:
        return self.stage.payoffs(q, payoff, ascent, deviation_weight)

    def clean_gradients(self, ascent: Ascent) -> tuple[Strategy, list[Tensor]]:
        return self.stage.clean_gradients(ascent)

    def second_order(self, kind: str | Divergence, ascent: Ascent) -> tuple[Strategy, list[Tensor]]:
        return self.stage.second_order(kind, ascent)

    def leap(self, kind: str | Divergence, ascent: Ascent) -> Strategy:
        return self.stage.leap(kind, ascent)

    def move(
        self, q: Strategy, how: Ascent | Rule, gradients: Sequence[Tensor] | None = None
    ) -> Strategy:
        return self.stage.move(q, how, gradients)

    def ascend(
        self,
        payoff: str | Divergence,
        ascent: Ascent,
        deviation_weight: float = 0.0,
        begin: Begin | None = None,
    ) -> Strategy:
        return self.stage.ascend(payoff, ascent, deviation_weight, begin)

    def clean(self) -> Reading:
        return self.stage.clean()

    def learned(self) -> Reading:
        return self.stage.learned()

    def plain_loss(self) -> Tensor:
        return self.stage.plain_loss()

    def losses(self, q: Strategy) -> Tensor:
        return self.stage.losses(q)

    def group_means(self, losses: Tensor, count: int) -> tuple[Tensor, Tensor]:
        return self.stage.group_means(losses, count)

    def weighed(self, values: Tensor, weights: Tensor, sizes: Tensor | None = None) -> Tensor:
        return self.stage.weighed(values, weights, sizes)

    def loss(self, q: Strategy | None = None, last: bool = True, clean: bool = False) -> Tensor:
        return self.stage.loss(q, last, clean)

    def run_at(self, q: Strategy) -> Reading:
        return self.stage.run_at(q)

    def divergence(
        self,
        q: Strategy,
        kind: str | Divergence,
        fixed: bool = False,
        sampled: bool = False,
        over: MeanOver = "samples",
    ) -> Tensor:
        return self.stage.divergence(q, kind, fixed, sampled, over)

    def proximal(self, kind: str | Divergence, over: MeanOver = "samples") -> Tensor:
        return self.stage.proximal(kind, over)
