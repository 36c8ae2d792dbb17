"""What a round returns."""

from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Outcome:
    """What a round returns; tensors are detached and 0-d, and nothing is read from the device.

    Attributes:
        objective: what the learner minimised, averaged over the round's optimizer steps and
            micro-batches, with what it retained: at the displaced weights, where an adversary
            moves them.
        clean_loss: task loss of the first clean pass, where the solver runs one.
        retained: the loss that `retain=` returned in the last step, at δ = 0.
        payoff: the adversary's payoff where it was last evaluated: a loss, or a divergence in nats.
        radius: mean norm of the δ played, in the solver's norm and in units of the site: of several
            calls the mean over them, each in the unit of its module.
        displacement: L2 norm of v, by which an adversary of the weights moved them in the round's
            last step, on this process.
        entropy: mean entropy of the strategies played in nats, 0 for pure ones.
        effective_particles: exp of the entropy: 1 for a pure strategy, at most M.
        positions: tokens of the batch that δ could act on (coordinates of an input without tokens).
        nonfinite: samples whose δ fell back to 0 at some step because its gradient was not finite.
        forwards: runs of the closures.
        delta_backwards: backwards with respect to δ alone.
        theta_backwards: backwards that build the learner's gradients, and those that an adversary
            of the weights climbs by.
        steps: optimizer steps the round stands for.
        weights: "sample" or "batch": what the log-weights of a mixed strategy belong to.
        worst_group: number of the group that weighs most, where the adversary weighs groups.
        worst_group_weight: its weight, between 1/G and 1.
        effective_rows: of a batch whose rows are weighed: exp of the entropy of their weights, at
            most the rows there are.
        general_sum: whether the adversary had a payoff of its own. If so, the gap between payoff
            and objective is no bound, because neither player's loss is the other's gain.
    """

    objective: Tensor
    clean_loss: Tensor | None
    retained: Tensor | None
    payoff: Tensor | None
    radius: Tensor | None
    displacement: Tensor | None
    entropy: Tensor | None
    effective_particles: Tensor | None
    positions: Tensor | None
    nonfinite: Tensor | None
    forwards: int
    delta_backwards: int
    theta_backwards: int
    steps: int
    weights: str | None
    general_sum: bool
    worst_group: Tensor | None = None
    worst_group_weight: Tensor | None = None
    effective_rows: Tensor | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return the fields by name, for a logger."""
        return asdict(self)
