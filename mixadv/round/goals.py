"""Goals of their own: what each player reads of a pass, where the game is not zero-sum.

    δ* ∈ argmax_δ u(θ, δ),     θ ← θ − γ·∇θ [ ℓ(θ, δ*) + r(θ) ]

u is what `adversary` returns, ℓ what `closure` returns under δ, r what `retain` returns at δ = 0.
Without them u = ℓ and r = 0.
"""

from typing import Literal, NamedTuple

from torch import Tensor

from mixadv.model.closure import Closure

Whose = Literal["closure", "adversary", "retain"]


class Goals(NamedTuple):
    """The closures of a round, and the groups of its rows `[B]` where some are weighed."""

    closure: Closure
    adversary: Closure | None = None
    retain: Closure | None = None
    groups: Tensor | None = None

    @property
    def general_sum(self) -> bool:
        """Whether the adversary has a payoff of its own; its δ is then one for all calls."""
        return self.adversary is not None

    @property
    def payer(self) -> Whose:
        """Whose closure tells what the adversary is paid."""
        return "adversary" if self.general_sum else "closure"
