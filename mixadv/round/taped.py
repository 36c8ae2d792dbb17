"""A round played again: what the adversary does the first time is given back the next."""

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar, final

from torch import Tensor

from mixadv.maths.divergence import Divergence
from mixadv.model.closure import MeanOver
from mixadv.model.noise import Noise
from mixadv.players.ascent import Ascent
from mixadv.players.opening import Begin
from mixadv.players.strategy import Rule, Strategy
from mixadv.round.wrapped import Wrapped
from mixadv.solvers.play import Moves

T = TypeVar("T")


class Tape:
    """What the adversary did, in the order in which a solver asked for it."""

    def __init__(self, noted: Iterable[Any] = ()) -> None:
        self._noted = deque(noted)

    def again(self) -> "Tape":
        """Return a tape of the same, where one is repeated more than once."""
        return Tape(self._noted)

    def note(self, make: Callable[[], T]) -> T:
        """Make something, note and return it."""
        made = make()
        self._noted.append(made)
        return made

    def repeat(self, make: Callable[[], T]) -> T:
        """Return the oldest of what was noted, without gradients, and make nothing."""
        return _detached(self._noted.popleft())


def _detached(made: Any) -> Any:
    if isinstance(made, tuple):
        return tuple(map(_detached, made))
    return made.detach() if isinstance(made, Tensor | Strategy) else made


@final
class Taped(Wrapped):
    """A stage whose strategies go over a tape; what the learner minimises is computed anew.

    Args:
        stage: what is played on.
        over: `tape.note` the first time, `tape.repeat` the second.
        noise: what the stage draws from, None where it draws nothing.
    """

    def __init__(
        self, stage: Moves, over: Callable[[Callable[[], Any]], Any], noise: Noise | None = None
    ) -> None:
        super().__init__(stage)
        self._over = over
        self._noise = noise

    def start(self, ascent: Ascent, begin: Begin | None = None) -> Strategy:
        return self._over(lambda: self.stage.start(ascent, begin))

    def payoffs(
        self, q: Strategy, payoff: str | Divergence, ascent: Ascent, deviation_weight: float = 0.0
    ) -> tuple[Strategy, Tensor, list[Tensor]]:
        return self._over(lambda: self.stage.payoffs(q, payoff, ascent, deviation_weight))

    def clean_gradients(self, ascent: Ascent) -> tuple[Strategy, list[Tensor]]:
        return self._over(lambda: self.stage.clean_gradients(ascent))

    def second_order(self, kind: str | Divergence, ascent: Ascent) -> tuple[Strategy, list[Tensor]]:
        return self._over(lambda: self.stage.second_order(kind, ascent))

    def leap(self, kind: str | Divergence, ascent: Ascent) -> Strategy:
        return self._over(lambda: self.stage.leap(kind, ascent))

    def move(
        self, q: Strategy, how: Ascent | Rule, gradients: Sequence[Tensor] | None = None
    ) -> Strategy:
        return self._over(lambda: self.stage.move(q, how, gradients))

    def ascend(
        self,
        payoff: str | Divergence,
        ascent: Ascent,
        deviation_weight: float = 0.0,
        begin: Begin | None = None,
    ) -> Strategy:
        return self._over(lambda: self.stage.ascend(payoff, ascent, deviation_weight, begin))

    def divergence(
        self,
        q: Strategy,
        kind: str | Divergence,
        fixed: bool = False,
        sampled: bool = False,
        over: MeanOver = "samples",
    ) -> Tensor:
        if sampled and self._noise is not None:  # the same particles
            self._noise.go_on_from(self._over(self._noise.state))
        return self.stage.divergence(q, kind, fixed, sampled, over)
