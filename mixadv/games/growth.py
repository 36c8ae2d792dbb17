"""Double oracle: a game too large to write down, solved on the few strategies that matter.

The game of the rows and columns known so far is solved; each player's best response to the other's
mixture is added; play ends when the responses gain no more than a tolerance. McMahan, Gordon & Blum
2003, "Planning in the Presence of Cost Functions Controlled by an Adversary".
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from typing_extensions import NamedTuple  # which may be generic in Python 3.10 too

from mixadv.checks import check_integer, check_number
from mixadv.games.solve import mixtures

Row = TypeVar("Row")
Column = TypeVar("Column")


class Grown(NamedTuple, Generic[Row, Column]):
    """Both players' mixtures on the strategies that were found.

    Attributes:
        rows: of the learner, those it started with first.
        columns: of the adversary.
        learner: weights of the rows, `[m]`, fp64.
        adversary: weights of the columns, `[n]`, fp64.
        payoff: `[m, n]`, fp64.
        lower: what the adversary's mixture earns at least, against every row known and the
            learner's response.
        upper: what the learner's mixture pays at most, against every column known and the
            adversary's response.
        gaps: `upper − lower` of each round. Where both responses are best ones, the value of the
            whole game lies between `lower` and `upper`; otherwise the gap is a lower bound of what
            the players could still win.
    """

    rows: list[Row]
    columns: list[Column]
    learner: Tensor
    adversary: Tensor
    payoff: Tensor
    lower: float
    upper: float
    gaps: list[float]

    @property
    def gap(self) -> float:
        """The last round's gap."""
        return self.gaps[-1]


def double_oracle(
    payoff: Callable[[Row, Column], Any],
    row_response: Callable[[Sequence[Column], Tensor], Row],
    column_response: Callable[[Sequence[Row], Tensor], Column],
    rows: Sequence[Row],
    columns: Sequence[Column],
    *,
    tolerance: float = 1e-6,
    rounds: int = 100,
    steps: int = 20_000,
) -> Grown[Row, Column]:
    """Return mixtures of both players on strategies that are added where they win something.

    On finite sets, with best responses, it ends at the value: B1 in `theory/statements.md`.

    Args:
        payoff: what the learner pays the adversary for a row and a column, a number.
        row_response: given columns and their weights `[n]`, fp64, returns the row that pays least.
        column_response: given rows and weights `[m]`, fp64, returns the column that earns most.
        rows: of the learner, to start with; at least one. They are whatever `payoff` takes.
        columns: of the adversary, to start with.
        tolerance: of the gap, at which to stop; above 0.
        rounds: at most. On infinite sets responses may go on to win a little for ever.
        steps: at most, of solving the game of known strategies; too few give a warning.

    Raises:
        ValueError: without rows or columns, or for a payoff that is not finite.

    Example:
        >>> squares = double_oracle(  # the adversary mixes both ends, the learner stays between
        ...     lambda x, y: (x - y) ** 2,
        ...     lambda ys, weights: float(torch.tensor(ys).double() @ weights),
        ...     lambda xs, weights: -1.0 if torch.tensor(xs).double() @ weights > 0 else 1.0,
        ...     rows=[1.0],
        ...     columns=[1.0],
        ... )
        >>> sorted(squares.columns), round(squares.upper, 4)
        ([-1.0, 1.0], 1.0)
    """
    check_number("double_oracle", "tolerance", tolerance)
    for name, value in {"rounds": rounds, "steps": steps}.items():
        check_integer("double_oracle", name, value, 1)
    if not len(rows) or not len(columns) or tolerance == 0:  # a tensor's rows, too
        raise ValueError(
            "double_oracle starts from at least one row and one column, and ends at a tolerance "
            f"above 0, got {len(rows)}, {len(columns)} and {tolerance!r}."
        )
    found = _Restricted(payoff, rows, columns, steps)
    return _played(found, row_response, column_response, tolerance, rounds)


def _played(
    found: _Restricted[Row, Column],
    row_response: Callable[[Sequence[Column], Tensor], Row],
    column_response: Callable[[Sequence[Row], Tensor], Column],
    tolerance: float,
    rounds: int,
) -> Grown[Row, Column]:
    """Let the restricted game grow until its gap is within the tolerance, or nothing wins."""
    gaps, finest = [], tolerance / 2
    accuracy = finest
    while True:
        grew = found.round(row_response, column_response, accuracy)
        gaps.append(found.upper - found.lower)
        still = not (grew or accuracy > finest)
        if gaps[-1] <= tolerance or len(gaps) == rounds or still:
            if still and gaps[-1] > tolerance:
                found.warn(gaps[-1], tolerance)
            return found.grown(gaps)
        # A response to a coarse solution shows the way as well, as long as play goes on.
        accuracy = max(finest, gaps[-1] / 10) if grew else finest


class _Restricted(Generic[Row, Column]):
    """The game of the rows and columns known so far."""

    def __init__(
        self,
        payoff: Callable[[Row, Column], Any],
        rows: Sequence[Row],
        columns: Sequence[Column],
        steps: int,
    ) -> None:
        self.payoff, self.rows, self.columns = payoff, list(rows), list(columns)
        self.steps = steps
        self.payoffs = torch.stack([self._paid(row) for row in self.rows])

    def round(
        self,
        row_response: Callable[[Sequence[Column], Tensor], Row],
        column_response: Callable[[Sequence[Row], Tensor], Column],
        accuracy: float,
    ) -> bool:
        """Solve the game, and add the responses that win something; return whether one was added.

        One that wins against the mixture more than all that are known is none of them.
        """
        self.x, self.y = x, y = mixtures(self.payoffs, self.steps, accuracy)
        row, column = row_response(self.columns, y), column_response(self.rows, x)
        paid, earned = self._paid(row), self._earned(column)
        least, most = (self.payoffs @ y).min(), (x @ self.payoffs).max()
        self.lower = torch.minimum(least, paid @ y).item()
        self.upper = torch.maximum(most, x @ earned).item()
        slack = 1e-12 * self.payoffs.abs().max()  # of rounding: what is known wins it again
        wins, gains = bool(self.lower < least - slack), bool(self.upper > most + slack)
        if wins:
            self.rows.append(row)
            self.payoffs = torch.cat([self.payoffs, paid[None]])
        if gains:
            earned = torch.cat([earned, self._number(row, column)[None]]) if wins else earned
            self.columns.append(column)
            self.payoffs = torch.cat([self.payoffs, earned[:, None]], 1)
        return wins or gains

    def warn(self, gap: float, tolerance: float) -> None:
        """Say that it is the known strategies whose game is not solved."""
        m, n = self.payoffs.shape
        warnings.warn(
            f"double_oracle ends with a gap of {gap:.1e}, above tolerance={tolerance:g}: no "
            f"response wins anything, but {self.steps} steps have not solved the game of the "
            f"{m}×{n} strategies found. Write steps={10 * self.steps}, or a larger tolerance.",
            stacklevel=4,
        )

    def grown(self, gaps: list[float]) -> Grown[Row, Column]:
        """Return the last solution; what was added since has the weight 0."""
        m, n = self.payoffs.shape
        x = torch.cat([self.x, self.x.new_zeros(m - len(self.x))])
        y = torch.cat([self.y, self.y.new_zeros(n - len(self.y))])
        return Grown(self.rows, self.columns, x, y, self.payoffs, self.lower, self.upper, gaps)

    def _paid(self, row: Row) -> Tensor:
        return torch.stack([self._number(row, column) for column in self.columns])

    def _earned(self, column: Column) -> Tensor:
        return torch.stack([self._number(row, column) for row in self.rows])

    def _number(self, row: Row, column: Column) -> Tensor:
        found = torch.as_tensor(self.payoff(row, column), dtype=torch.float64).detach().cpu()
        if found.numel() != 1 or not found.isfinite().all():
            raise ValueError(
                "payoff must return a finite number for a row and a column, got "
                f"{found.tolist()!s:.80} for {row!r:.40} and {column!r:.40}."
            )
        return found.reshape(())
