"""Word substitution as a finite zero-sum game, solved for mixtures of both players.

    min_{x ∈ Δ_m} max_{y ∈ Δ_n} Σ_ij x_i y_j A_ij,    A_ij = 1 − p_i(label | text_j)

Rows are samples of the learner: checkpoints, MAT's samples of θ, or dropout masks. Columns are a
text and what substitutions make of it. A_ij is how often learner i, drawing its answer from its
probabilities, is wrong about text j: a mixture of learners errs as the mean of their probabilities
does. Against a learner that mixes, the best single substitution is a best response; against one
that can look at the strategy and pick a sample, the adversary has to mix.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from mixadv.games import MatrixGame, solve
from mixadv.tokens.reading.encoding import Text


class Equilibrium(NamedTuple):
    """Mixtures of both players, and what they and the best pure strategies guarantee.

    Attributes:
        learner: weights x of the learner samples, `[m]`, float64.
        adversary: weights y of the texts, `[n]`, float64.
        value: xᵀAy.
        gap: the duality gap of x and y, exactly: `worst − guaranteed`.
        guaranteed: what the adversary's mixture earns at least, `min_i (Ay)_i`.
        pure_adversary_value: what its best single text earns at least, `max_j min_i A_ij`.
        worst: what the learner's mixture loses at most, `max_j (xᵀA)_j`.
        pure_learner_value: what its best single sample loses at most, `min_i max_j A_ij`.
    """

    learner: Tensor
    adversary: Tensor
    value: float
    gap: float
    guaranteed: float
    pure_adversary_value: float
    worst: float
    pure_learner_value: float


@dataclass(frozen=True)
class SubstitutionGame:
    """A game about one text.

    Attributes:
        texts: the columns; the first is the text itself.
        payoff: `[m, n]`, the error of each learner at each text, in [0, 1].
    """

    texts: tuple[Text, ...]
    payoff: Tensor

    def __post_init__(self) -> None:
        if self.payoff.dim() != 2 or self.payoff.shape[1] != len(self.texts):
            raise ValueError(
                f"payoff must have a column for each of the {len(self.texts)} texts, got shape "
                f"{list(self.payoff.shape)}."
            )

    def solve(self, steps: int = 20_000, tolerance: float = 1e-7) -> Equilibrium:
        """Return both players' mixtures; see `solve_games`.

        Example:
            >>> game = SubstitutionGame(("a", "b"), torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
            >>> found = game.solve()
            >>> round(found.guaranteed, 4), found.pure_adversary_value
            (0.5, 0.0)
            >>> round(found.worst, 4), found.pure_learner_value
            (0.5, 1.0)
        """
        return solve_games([self], steps, tolerance)[0]


def solve_games(
    games: Sequence[SubstitutionGame], steps: int = 20_000, tolerance: float = 1e-7
) -> list[Equilibrium]:
    """Return both players' mixtures in each game; all are solved at once.

    By restarted mirror prox, which stops where the gap of every game is within the tolerance. A
    player whose mixture guarantees less than its best pure strategy, by what is left of the gap,
    plays the pure one: no mixture returned is worse than a pure strategy.

    Args:
        games: with the same learners.
        steps: at most.
        tolerance: of the duality gap.

    Raises:
        ValueError: without games, or where they differ in the number of learners.
    """
    learners = {len(game.payoff) for game in games}
    if len(learners) != 1:
        raise ValueError(
            f"solve_games takes games with the same learners, got {len(games)} games with "
            f"{sorted(learners)} learners."
        )
    widest = max(len(game.texts) for game in games)
    # A column that is there twice changes no guarantee; its weights are added up.
    padded = torch.stack([_widened(game.payoff.double(), widest) for game in games])
    found = solve(MatrixGame(padded), "restarted", steps, tolerance=tolerance, progress=False)
    assert isinstance(found.learner, Tensor)
    assert isinstance(found.adversary, Tensor)
    result = []
    for game, x, y in zip(games, found.learner, found.adversary, strict=True):
        width = len(game.texts)
        own = y[:width].clone()
        own[0] += y[width:].sum()
        result.append(_certified(game.payoff.double(), x, own))
    return result


def _widened(payoff: Tensor, width: int) -> Tensor:
    first = payoff[:, :1].expand(-1, width - payoff.shape[1])
    return torch.cat([payoff, first], 1)


def _certified(payoff: Tensor, x: Tensor, y: Tensor) -> Equilibrium:
    rows, columns = payoff.amax(1), payoff.amin(0)  # what pure strategies lose, earn
    if (x @ payoff).amax() > rows.amin():
        x = torch.eye(len(rows), dtype=payoff.dtype)[rows.argmin()]
    if (payoff @ y).amin() < columns.amax():
        y = torch.eye(len(columns), dtype=payoff.dtype)[columns.argmax()]
    worst, guaranteed = (x @ payoff).amax().item(), (payoff @ y).amin().item()
    return Equilibrium(
        learner=x,
        adversary=y,
        value=(x @ payoff @ y).item(),
        gap=worst - guaranteed,
        guaranteed=guaranteed,
        pure_adversary_value=columns.amax().item(),
        worst=worst,
        pure_learner_value=rows.amin().item(),
    )
