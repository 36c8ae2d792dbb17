"""What the adversary gains: payoffs read from a pass, and gradients that a backward left."""

from collections.abc import Callable

import torch
from torch import Tensor

from mixadv.errors import GameError
from mixadv.maths.contrastive import directions
from mixadv.maths.divergence import Divergence, divergence
from mixadv.model.closure import Reading
from mixadv.model.recompute import NO_GRADIENT
from mixadv.model.visits import Call
from mixadv.players.rows import of_rows
from mixadv.players.strategy import Strategy

Gains = Callable[[Reading, int], Tensor]
"""`gains(reading, copies)`: the payoffs of a pass over so many stacked copies."""


def gains_of(
    payoff: str | Divergence, clean: Callable[[], Reading], deviation_weight: float = 0.0
) -> Gains:
    """Return what reads the payoffs of a pass; for the words see `Moves.payoffs`.

    `clean` returns the clean pass, and is called where that is compared with.
    """
    target = None if payoff == "loss" else clean().compared.detach()
    measure = None if target is None else divergence(payoff)
    origin = directions(clean().representation.detach()) if deviation_weight else None

    def gains(reading: Reading, copies: int) -> Tensor:
        if target is None or measure is None:
            gained = losses_of_samples(reading, copies)
        else:
            gained = reading.diverge(repeated(target, copies), measure)
        if origin is None:
            return gained
        away = 1 - (directions(reading.representation) * repeated(origin, copies)).sum(-1)
        away = _of_payoffs(away.to(gained.dtype), len(gained), reading.owners)
        return gained + deviation_weight * away

    return gains


def shared(values: Tensor, payoff: str | Divergence, samples: int) -> int:
    """Return how many samples each of the payoffs `[M, B]` or `[M, 1]` is the sum of."""
    return samples if payoff == "loss" and values.shape[1] == 1 else 1


def losses_of_samples(reading: Reading, copies: int = 1) -> Tensor:
    """Each sample's loss `[B]`; a scalar loss is multiplied by B and stays one number `[1]`."""
    values = losses(reading, copies)
    return values if reading.loss.dim() else values * reading.samples


def losses(reading: Reading, copies: int) -> Tensor:
    """Return the losses as `[B]`, or `[1]` for a scalar one."""
    if copies > 1 and not reading.loss.dim():
        raise GameError(
            "particle_batching='stack' needs one loss per sample, and the closure returned a "
            "scalar: return losses [B] (reduction='none'), or use particle_batching='loop'."
        )
    return reading.loss.reshape(-1)


def repeated(x: Tensor, copies: int) -> Tensor:
    """Return a tensor `[B, ...]` as many times over as there are copies of the batch."""
    return x.repeat(copies, *[1] * (x.dim() - 1))


def _of_payoffs(values: Tensor, payoffs: int, owners: Tensor | None) -> Tensor:
    """Return values of representations added up for each payoff: of a sample, or of the batch."""
    if len(values) == payoffs:
        return values
    if payoffs == 1:
        return values.sum(0, keepdim=True)
    if owners is not None and len(owners) == len(values):
        return values.new_zeros(payoffs).index_add(0, owners, values)
    raise GameError(
        f"The representation has {len(values)} rows and the closure returned {payoffs} losses, and "
        "which belong together is not known: return one loss per sample, or name another source=."
    )


def expected(q: Strategy, values: Tensor) -> Tensor:
    """Return the mean over samples of what they expect, of values `[M, B]` or `[M, 1]`."""
    check_weights(q, values.shape[1])
    return (q.weights * values).mean(1).sum()


def check_weights(q: Strategy, samples: int) -> None:
    """Check that particles are weighed for the samples there are."""
    weighed = q.weights.shape[1]
    if weighed > 1 and samples not in (1, weighed):
        raise GameError(
            f"adversary= returned a payoff for each of {weighed} samples, by which particles are "
            f"weighed, and closure has {samples}: return as many from both, or a scalar from "
            "adversary=."
        )


class Arrived:
    """What a backward brings to a pass: whatever multiplied its loss, such as 1/K of FreeLB."""

    def __init__(self, reading: Reading, objective: Tensor) -> None:
        self.samples = reading.samples
        self.factor: Tensor | None = None
        if objective.requires_grad:
            objective.register_hook(self._note)

    def _note(self, gradient: Tensor) -> None:
        self.factor = gradient.detach()

    def gradients(self, q: Strategy) -> list[Tensor]:
        """Return the gradients left on the points, scaled back to each sample's own payoff."""
        if self.factor is None or all(point.grad is None for point in q.points):
            raise GameError(NO_GRADIENT.format("δ"))
        scale = self.samples / self.factor
        return [torch.zeros_like(x) if x.grad is None else x.grad * scale for x in q.points]


def one_sample(reading: Reading, call: Call | None) -> bool:
    """Return whether a loss `[1]` is that of one sample, and not of a batch."""
    if reading.predictions is not None:
        return len(reading.predictions) == 1
    return call is not None and (call.shape[0] == 1 or of_rows(call.owners) is not None)
