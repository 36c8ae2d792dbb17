"""The vicinity of inputs: what the worst perturbation found in a ball costs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mixadv.checks import check_integer
from mixadv.players.ascent import Ascent
from mixadv.robustness.ascents import ascents_of, climb, play, start
from mixadv.robustness.predictions import Batch
from mixadv.round.stage import Stage


@dataclass(frozen=True, eq=False)
class LossIncrease:
    """By how much the worst perturbation found raises each row's loss, in the data set's order.

        max_{‖δ‖₂ ≤ ε} L(x + δ, y) − L(x, y)

    the measure of Zhu et al. 2020, arXiv:1909.11764, eq. 5 and table 5, bounded from below by the
    largest loss that an ascent from δ = 0 and ascents from random starts visit. Their code takes
    random starts alone and cuts the step from one to the next; here it shrinks within each.

    Attributes:
        clean_loss: without perturbation, `[N]`.
        correct: whether a row is classified correctly without perturbation, `[N]`.
        from_zero: increase found by the ascent from δ = 0, `[N]`; at least 0.
        from_random: increase found from random starts, `[N]`; below 0 where all they saw is better
            than the row itself.
        radius: ε, as it stands.
    """

    clean_loss: NDArray[np.float64]
    correct: NDArray[np.bool_]
    from_zero: NDArray[np.float64]
    from_random: NDArray[np.float64]
    radius: float

    @property
    def increase(self) -> NDArray[np.float64]:
        """The largest increase found, `[N]`: a lower bound of the largest there is."""
        return np.maximum(self.from_zero, self.from_random)

    def summary(self, rows: Any = None) -> dict[str, Any]:
        """Return medians and quartiles over rows.

        Args:
            rows: which, as a mask `[N]` or their numbers; None takes all.

        Returns:
            `n`, and of `increase`, `from_zero`, `from_random` and `clean_loss` each a dict of
            `median`, `lower` and `upper` quartile.

        Raises:
            ValueError: if there are no such rows.
        """
        chosen = slice(None) if rows is None else rows
        names = ("increase", "from_zero", "from_random", "clean_loss")
        values = {name: getattr(self, name)[chosen] for name in names}
        count = len(values["increase"])
        if not count:
            raise ValueError("There are no rows to sum up: choose at least one.")
        shares = {"lower": 0.25, "median": 0.5, "upper": 0.75}
        return {"n": count} | {
            name: {key: float(np.quantile(x, share)) for key, share in shares.items()}
            for name, x in values.items()
        }


def loss_increase(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    radius: float,
    steps: int = 10,
    restarts: int = 3,
    unit: float | None = None,
    seed: int = 0,
    progress: bool = False,
) -> LossIncrease:
    """Return by how much the loss of each row can be raised within a ball.

    The model is in evaluation mode meanwhile and left as it was. A row's random starts depend on
    the seed and its place in the data set. Costs `(steps + 1)·(restarts + 1)` forwards and nearly
    as many backwards. Processes do not wait for each other, unless the model is sharded or fp16.

    Args:
        model: which the closures call.
        batches: as `text_batches` makes them, or your own.
        radius: ε, in units.
        steps: K of each ascent.
        restarts: how many ascents start at random.
        unit: a length; None takes the `token_norm` of these batches. To compare, give all one.
        seed: of the random starts.
        progress: whether to show a bar.

    Raises:
        ValueError: for a bad argument, or a closure without a loss per sample and logits.
        GameError: if the loss does not depend on δ.

    Example:
        >>> import torch.nn.functional as F
        >>> model = torch.nn.Linear(2, 2)
        >>> x, y = torch.eye(2), torch.tensor([0, 1])
        >>> def closure():
        ...     return F.cross_entropy(model(x), y, reduction="none"), model(x)
        >>> found = loss_increase(model, [Batch(closure, y, [0, 1])], radius=0.1, unit=1.0)
        >>> found.from_zero.shape, bool((found.increase > 0).all())
        ((2,), True)
    """
    check_integer("loss_increase", "restarts", restarts, 1)
    [ascent], batches = ascents_of("loss_increase", model, batches, [radius], steps, unit, seed)

    measure = partial(_increase, ascent=ascent, restarts=restarts, seed=seed)
    columns: list[Any] = play(model, batches, measure, f"loss increase, {radius:g}", progress)
    return LossIncrease(*columns, radius=float(ascent.radius or 0.0))


def _increase(
    stage: Stage, batch: Batch, ascent: Ascent, restarts: int, seed: int
) -> Sequence[Tensor]:
    """Return a batch's columns of `LossIncrease`."""
    clean = stage.clean()
    assert clean.predictions is not None
    from_zero, _ = climb(stage, ascent, stage.origin(ascent))
    starts = (start(stage, ascent, batch, seed, number) for number in range(restarts))
    from_random = torch.stack([climb(stage, ascent, q)[0] for q in starts]).amax(0)
    return (
        clean.loss,
        clean.predictions.argmax(-1) == batch.labels,
        (from_zero - clean.loss).clamp(min=0),  # by rounding alone it could be less
        from_random - clean.loss,
    )


def all_correct(found: Mapping[str, LossIncrease]) -> dict[str, dict[str, Any]]:
    """Return each model's `summary` of the rows that all of them classify correctly.

    As in table 5 of Zhu et al. 2020: of other rows the loss is large already, and models that
    make different mistakes are compared on different rows.

    Args:
        found: what `loss_increase` returned of each model, on the same rows.

    Raises:
        ValueError: if the models were measured on data sets of different length, or no row is
            classified correctly by all.

    Example:
        >>> zeros = np.zeros(2)
        >>> one = LossIncrease(zeros, np.array([True, False]), zeros + 1, zeros, 0.1)
        >>> other = LossIncrease(zeros, np.array([True, True]), zeros + 2, zeros, 0.1)
        >>> table = all_correct({"plain": one, "pgd": other})
        >>> table["pgd"]["n"], table["pgd"]["increase"]["median"]
        (1, 2.0)
    """
    counts = {name: len(own.correct) for name, own in found.items()}
    if len(set(counts.values())) != 1:
        raise ValueError(f"Models are compared on the same rows, and were measured on {counts}.")
    rows = np.logical_and.reduce([own.correct for own in found.values()])
    if not rows.any():
        right = {name: int(own.correct.sum()) for name, own in found.items()}
        raise ValueError(
            f"No row is classified correctly by all of {', '.join(found)}: of {len(rows)} rows "
            f"{right} are right."
        )
    return {name: own.summary(rows) for name, own in found.items()}


def accuracy_at_radii(
    model: nn.Module,
    batches: Iterable[Batch],
    radii: Sequence[float],
    *,
    steps: int = 10,
    unit: float | None = None,
    seed: int = 0,
    progress: bool = False,
) -> NDArray[np.bool_]:
    """Return which rows are classified correctly at the end of an ascent of the loss.

    One ascent for each radius, from a random start, by itself: rows that a smaller radius got wrong
    may be right at a larger one. The arguments are those of `loss_increase`; radius 0 gives the
    unperturbed rows.

    Returns:
        `[len(radii), N]`.

    Example:
        >>> import torch.nn.functional as F
        >>> model = torch.nn.Linear(2, 2)
        >>> x, y = torch.eye(2), torch.tensor([0, 1])
        >>> def closure():
        ...     return F.cross_entropy(model(x), y, reduction="none"), model(x)
        >>> batches = [Batch(closure, y, [0, 1])]
        >>> accuracy_at_radii(model, batches, [0.0, 0.1, 0.2], unit=1.0).mean(1).shape
        (3,)
    """
    ascents, batches = ascents_of("accuracy_at_radii", model, batches, radii, steps, unit, seed)

    def measure(stage: Stage, batch: Batch) -> Sequence[Tensor]:
        stage.clean()  # the first pass of a round: it shows what the site is called with
        ends = (climb(stage, a, start(stage, a, batch, seed, 0))[1] for a in ascents)
        return [torch.stack([logits.argmax(-1) == batch.labels for logits in ends], 1)]

    [correct] = play(model, batches, measure, "accuracy at radii", progress)
    return correct.T
