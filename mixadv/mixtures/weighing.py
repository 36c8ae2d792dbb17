"""How much each member of a mixture should weigh, given how often it errs under attack.

    min_{π ∈ Δ_M} max_j Σ_m π_m A_mj,    A_mj = error of member m under attack j

A mixture that is drawn from errs as its members do on average, so this is a finite zero-sum game,
which `mixadv.games` solves. Where the attack is made for the mixture, and so depends on π, its
error max_δ Σ_m π_m err_m(δ) is convex in π, and the members' errors at the worst δ a subgradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mixadv.checks import check_integer, check_number
from mixadv.games import MatrixGame
from mixadv.games.solve import mixtures, pure_where_no_worse
from mixadv.mixtures.mixture import Mixture


class Weighing(NamedTuple):
    """Probabilities of members, and how far they are from the best.

    Attributes:
        probabilities: π, `[M]`, fp64: what `Mixture.weighed` takes.
        adversary: how often the adversary plays each attack, `[N]`, fp64.
        error: of the mixture under the worst attack, `max_j (πᵀA)_j`.
        guaranteed: what no mixture of these members can go below: each member errs at least that
            often under the adversary's mixture of attacks.
        errors: A, `[M, N]`, fp64.
    """

    probabilities: Tensor
    adversary: Tensor
    error: float
    guaranteed: float
    errors: Tensor

    @property
    def gap(self) -> float:
        """The duality gap: by how much another weighing could be better, at most."""
        return max(0.0, self.error - self.guaranteed)


def weigh(
    errors: Any, *, least: float = 0.0, steps: int = 20_000, tolerance: float = 1e-7
) -> Weighing:
    """Return the probabilities of members that minimise the error under the worst attack.

    It runs restarted mirror prox until the duality gap is within the tolerance. If one member alone
    is no worse than the mixture, it returns that member.

    Args:
        errors: A, `[M, N]`: how often each member errs under each attack, or any other loss.
        least: members whose share is below this are dropped (never the largest), and the others
            are weighed again, until none is. The gap, which is that among all members, says what
            this cost.
        steps: the largest number of steps.
        tolerance: the duality gap to reach.

    Example:
        >>> found = weigh([[1.0, 0.0], [0.0, 1.0]])  # each member loses to an attack of its own
        >>> round(found.error, 3), found.gap < 1e-6
        (0.5, True)
    """
    check_number("weigh", "least", least, 0.0, 1.0)
    payoff = MatrixGame(errors).payoff.double().cpu()
    if payoff.dim() != 2:
        raise ValueError(f"errors must be [members, attacks], got shape {list(payoff.shape)}.")
    x, y = _solved(payoff, steps, tolerance)
    kept = x > 0
    while (fewer := (x >= least) | (x == x.max()))[kept].logical_not().any():
        kept = kept & fewer
        x = torch.zeros_like(x)
        x[kept] = _solved(payoff[kept], steps, tolerance)[0]
    return _weighing(payoff, x, y)


def weigh_under(
    mixture: Mixture,
    attacked: Callable[[Mixture], Tensor],
    rounds: int = 10,
    *,
    step_size: float = 1.0,
) -> Weighing:
    """Return the probabilities that were best under attacks made for the mixture they weigh.

    OSP, Dbouk & Shanbhag 2023: projected subgradient, π ← P(π − η·err/(t + 1)) from the mixture's
    own probabilities, and the best kept. Each is judged under the attack made for it and those
    made for the others. `guaranteed` holds whatever the attacks; if they are not the worst, `error`
    is too small.

    Args:
        mixture: whose members are weighed; it is left as it is.
        attacked: attacks the mixture it is given, and returns the error of each member, `[M]`,
            under that attack; of members with probability 0 too.
        rounds: attacks.
        step_size: η, in 1/error.

    Raises:
        ValueError: if the errors are not `[M]` or not finite.

    Example:
        >>> columns = torch.tensor([[1.0, 0.0], [0.0, 1.0]])  # of two attacks, each one's worst
        >>> mixture = Mixture([{}, {}], [3, 1], model=torch.nn.Linear(1, 1))
        >>> def attacked(played):
        ...     return columns[:, (played.probabilities.float() @ columns).argmax()]
        >>> weigh_under(mixture, attacked, rounds=50).error < 0.55
        True
    """
    check_integer("weigh_under", "rounds", rounds, 1)
    check_number("weigh_under", "step_size", step_size)
    shares, played, columns = mixture.probabilities, [], []
    for t in range(rounds):
        here = Mixture(mixture.members, shares, model=mixture.model)
        errors = _checked(attacked(here), len(mixture))
        played.append(shares)
        columns.append(errors)
        shares = _projected(shares - step_size / (t + 1) * errors)
    payoff = torch.stack(columns, 1)
    best = int((torch.stack(played) @ payoff).amax(1).argmin())
    return _weighing(payoff, played[best], weigh(payoff).adversary)


def _solved(payoff: Tensor, steps: int, tolerance: float) -> tuple[Tensor, Tensor]:
    return pure_where_no_worse(payoff, *mixtures(payoff, steps, tolerance))


def _weighing(payoff: Tensor, x: Tensor, y: Tensor) -> Weighing:
    return Weighing(x, y, (x @ payoff).amax().item(), (payoff @ y).amin().item(), payoff)


def _checked(errors: Any, count: int) -> Tensor:
    found = torch.as_tensor(errors).detach().double().cpu()
    if found.shape != (count,) or not found.isfinite().all():
        raise ValueError(
            f"attacked(mixture) must return {count} finite errors, one for each member, got "
            f"{found.tolist()!s:.80}."
        )
    return found


def _projected(values: Tensor) -> Tensor:
    """Return the nearest point of the simplex: max(values − λ, 0) with the λ that sums to 1."""
    falling = values.sort(descending=True).values
    counts = torch.arange(1, len(values) + 1, dtype=values.dtype)
    levels = (falling.cumsum(0) - 1) / counts
    return (values - levels[int((falling > levels).sum()) - 1]).clamp(min=0)
