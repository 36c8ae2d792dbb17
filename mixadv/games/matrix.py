"""Finite zero-sum games: a matrix of payoffs, or a batch of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class MatrixGame:
    """min_x max_y xᵀAy over two simplices: the learner picks a row, the adversary a column.

    The learner minimises, the adversary maximises. A batch of games of one shape is solved at once.

    Args:
        payoff: `[m, n]`, or `[g, m, n]` for g games: a tensor, an array or nested lists. Lists,
            integers and booleans become float64; float16 and bfloat16 become float32, in which
            mirror steps keep the small weights; float32, float64 and the device stay.

    Raises:
        TypeError: if the payoffs are no real numbers.
        ValueError: if there are none, rows differ in length, the shape is another, or one is not
            finite.

    Example:
        >>> game = MatrixGame([[0, 1, -1], [-1, 0, 1], [1, -1, 0]])
        >>> third = torch.full((3,), 1 / 3, dtype=torch.float64)
        >>> game.shape, game.duality_gap(third, third).item()
        ((3, 3), 0.0)
    """

    def __init__(self, payoff: Any) -> None:
        self.payoff = _checked(payoff)

    def __repr__(self) -> str:
        games = f"{len(self.payoff)} games of " if self.payoff.dim() == 3 else ""
        rows, columns = self.shape
        return f"MatrixGame({games}{rows}×{columns}, {self.payoff.dtype})"

    @property
    def shape(self) -> tuple[int, int]:
        """Number of rows m and of columns n."""
        return self.payoff.shape[-2], self.payoff.shape[-1]

    @property
    def spread(self) -> Tensor:
        """Range of the payoffs r = max A − min A, 0-d or `[g]`."""
        return self.payoff.amax((-2, -1)) - self.payoff.amin((-2, -1))

    def losses(self, y: Tensor) -> Tensor:
        """Return what each row pays against the weights y `[..., n]`: Ay, `[..., m]`."""
        if self.payoff.dim() == 2:
            return y @ self.payoff.mT
        return (self.payoff @ y[..., None])[..., 0]

    def gains(self, x: Tensor) -> Tensor:
        """Return what each column earns against the weights x `[..., m]`: Aᵀx, `[..., n]`."""
        if self.payoff.dim() == 2:
            return x @ self.payoff
        return (x[..., None, :] @ self.payoff)[..., 0, :]

    def value(self, x: Tensor, y: Tensor) -> Tensor:
        """Return xᵀAy, 0-d or `[g]`."""
        return (x * self.losses(y)).sum(-1)

    def duality_gap(self, x: Tensor, y: Tensor) -> Tensor:
        """Return max_j (Aᵀx)_j − min_i (Ay)_i, exactly: at least 0, and 0 at equilibria only.

        Args:
            x: the learner's weights, `[..., m]`.
            y: the adversary's weights, `[..., n]`.

        Returns:
            0-d or `[g]`; what rounding would make negative is 0.
        """
        return gap(self.losses(y), self.gains(x))

    def weights(self, who: str, values: Any, side: int) -> Tensor:
        """Return weights `[..., size]` of a side, 0 or 1; raise unless they are a strategy."""
        size = self.shape[side]
        weights = numbers(who, values, self.payoff.dtype, self.payoff.device)
        if weights.shape[-1:] != (size,) or not weights.numel():
            raise ValueError(
                f"{who} must be weights of shape [..., {size}], got {list(weights.shape)}."
            )
        total = weights.sum(-1)
        if not (weights >= 0).all() or not torch.allclose(total, torch.ones_like(total), atol=1e-4):
            raise ValueError(
                f"{who} must be weights on the simplex: at least 0 and of sum 1, got "
                f"{weights.min().item():g} to {weights.max().item():g} and a sum of "
                f"{total.flatten()[0].item():g}."
            )
        return weights


def gap(losses: Tensor, gains: Tensor) -> Tensor:
    """Return the duality gap of a pair from what rows pay and columns earn against it."""
    return (gains.amax(-1) - losses.amin(-1)).clamp(min=0)


def numbers(who: str, values: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return values as a tensor; raise unless they are real numbers, with rows of one length."""
    try:
        if not torch.as_tensor(values).is_complex():
            return torch.as_tensor(values, dtype=dtype, device=device).detach()
        why = "they are complex"
    except (ValueError, TypeError, RuntimeError, OverflowError) as error:
        why = str(error)
    raise ValueError(f"{who} must be real numbers, with rows of one length: {why}.")


def _checked(payoff: Any) -> Tensor:
    try:
        matrix = payoff.detach() if isinstance(payoff, Tensor) else torch.as_tensor(payoff)
        if isinstance(payoff, (list, tuple)) and not matrix.is_complex():
            matrix = torch.as_tensor(payoff, dtype=torch.float64)
    except (ValueError, TypeError, RuntimeError) as error:
        raise ValueError(
            "payoff must be a matrix [m, n] or a batch [g, m, n] of numbers, with rows of one "
            f"length: {error}."
        ) from error
    if matrix.is_complex():
        raise TypeError(f"payoff must be real, got {matrix.dtype}.")
    if matrix.dim() not in (2, 3) or matrix.numel() == 0:
        raise ValueError(
            "payoff must be a matrix [m, n] or a batch [g, m, n] with at least one row and one "
            f"column, got shape {list(matrix.shape)}."
        )
    if not matrix.is_floating_point():
        matrix = matrix.double()
    elif matrix.dtype.itemsize < 4:
        matrix = matrix.float()
    bad = (~matrix.isfinite()).nonzero()
    if len(bad):
        where = tuple(bad[0].tolist())
        raise ValueError(
            f"payoff must be finite: {len(bad)} entries are not, the first is "
            f"{matrix[where].item()} at {where}. Leave a forbidden action out, or give it a large "
            "finite payoff."
        )
    if not (matrix.amax() - matrix.amin()).isfinite():
        raise ValueError(
            f"payoff ranges from {matrix.amin().item():g} to {matrix.amax().item():g}, whose "
            f"difference overflows in {matrix.dtype}: divide the payoffs by a constant, which "
            "scales the value and leaves the strategies as they are."
        )
    return matrix
