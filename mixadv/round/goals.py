"""Goals of their own: what each player reads of a pass, where the game is not zero-sum.

    δ* ∈ argmax_δ u(θ, δ),     θ ← θ − γ·∇θ [ ℓ(θ, δ*) + r(θ) ]

u is what `adversary` returns, ℓ what `closure` returns under δ, r what `retain` returns at δ = 0.
Without them u = ℓ and r = 0.
"""

from collections.abc import Sequence
from types import FunctionType
from typing import Any, Literal, NamedTuple

from torch import Tensor

from mixadv.errors import GameError
from mixadv.model.closure import Closure
from mixadv.model.masks import Where

Whose = Literal["closure", "adversary", "retain"]


class Goals(NamedTuple):
    """The closures of a round, where δ may act, and the groups of rows `[B]` where some weigh."""

    closure: Closure
    adversary: Closure | None = None
    retain: Closure | None = None
    where: Where = None
    groups: Tensor | None = None

    @property
    def general_sum(self) -> bool:
        """Whether the adversary has a payoff of its own; its δ is then one for all calls."""
        return self.adversary is not None

    @property
    def payer(self) -> Whose:
        """Whose closure tells what the adversary is paid."""
        return "adversary" if self.general_sum else "closure"


def micro_batches(
    closure: Any, adversary: Any, retain: Any, where: Any, groups: Any
) -> list[Goals]:
    """Return the goals of each micro-batch of an update, of which a list of closures has several.

    Raises:
        GameError: if they cannot be told apart.
    """
    if not isinstance(closure, list | tuple):
        return [Goals(closure, adversary, retain, where, groups)]
    if not closure:
        raise GameError("An update needs at least one closure, and the list of them is empty.")
    besides = {"adversary": adversary, "retain": retain, "where": where, "groups": groups}
    for name, given in besides.items():
        several = isinstance(given, list | tuple) and len(given) == len(closure)
        if given is not None and not several:
            raise GameError(
                f"{name}= must be a list of {len(closure)}, one for each micro-batch, or None, "
                f"where closures are: got {given!r}."
            )
    if len(closure) > 1 and _bound_late(closure):
        raise GameError(
            "The closures of these micro-batches are one and the same function, so each runs on "
            "the batch that the loop ended with. Give each its own: "
            "[functools.partial(loss, batch) for batch in batches]."
        )
    each = [[None] * len(closure) if g is None else g for g in besides.values()]
    return [Goals(*goals) for goals in zip(closure, *each, strict=True)]


def _bound_late(closures: Sequence[Any]) -> bool:
    """Return whether functions are one: the same code with the same variables and defaults."""
    if not all(isinstance(c, FunctionType) for c in closures):
        return False

    def parts(function: FunctionType) -> list[int]:
        cells = [c.cell_contents for c in function.__closure__ or ()]
        defaults = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
        return [*map(id, [function.__code__, *cells, *defaults])]

    first, *others = map(parts, closures)
    return all(other == first for other in others)
