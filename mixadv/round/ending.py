"""The end of a round: what its outcome is read from, and when."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mixadv.players.strategy import Strategy
from mixadv.round.outcome import Outcome
from mixadv.round.update import Update


class Ending:
    """What a round came to.

    What δ and its weights tell is computed where the outcome is first read, which most loops do in
    a few rounds of many. Of several micro-batches it is computed at once, or the δ of them all
    would be held; so it is while a CUDA graph is captured, or a replay would change δ alone.

    Args:
        update: the rounds, all played.
        objective: the sum of what was minimised in each step, detached.
        steps: how many there were.

    Attributes:
        objective: their mean.
        strategy: what the adversary played last, detached; None without one.
    """

    def __init__(self, update: Update, objective: Tensor, steps: int) -> None:
        stages = update.stages
        played = [stage.played.detach() for stage in stages if stage.played is not None]
        self.objective = objective / steps
        self.strategy = played[-1] if played else None
        self._words = stages[0].arena.solver
        self._rows = stages[-1].weights
        self._fallen = [x for stage in stages for x in stage.fallen]
        self._facts = _facts(update, self.objective, steps)
        self._outcome: Outcome | None = None
        captured = objective.is_cuda and torch.cuda.is_current_stream_capturing()
        if captured or len(stages) > 1:
            self._outcome = self._told(played)

    @property
    def outcome(self) -> Outcome:
        """What the round returned."""
        if self._outcome is None:
            self._outcome = self._told([] if self.strategy is None else [self.strategy])
        return self._outcome

    @torch.inference_mode(False)
    @torch.no_grad()
    def _told(self, played: Sequence[Strategy]) -> Outcome:
        entropy = _mean([q.entropy().mean().detach() for q in played])
        positions = [q.positions() for q in played]
        weights = {"sample" if q.log_weights.shape[1] > 1 else "batch" for q in played}
        norm, per = self._words.norm, self._words.per
        rows, fallen = self._rows, self._fallen
        return Outcome(
            radius=_mean([q.length(norm, per) for q in played]),
            entropy=entropy,
            effective_particles=None if entropy is None else entropy.exp(),
            positions=torch.stack(positions).sum() if positions else None,
            nonfinite=torch.stack([x.sum() for x in fallen]).sum() if fallen else None,
            weights=weights.pop() if weights else None,
            worst_group=None if rows is None else rows.worst_group,
            worst_group_weight=None if rows is None else rows.worst_group_weight,
            effective_rows=None if rows is None else rows.effective_rows,
            **self._facts,
        )


def _facts(update: Update, objective: Tensor, steps: int) -> dict[str, Any]:
    """Return the fields of an outcome that cost nothing to tell."""
    stages = update.stages
    return {
        "objective": objective,
        "clean_loss": _mean([stage.clean_loss for stage in stages]),
        "retained": _mean([stage.retained for stage in stages]),
        "payoff": _mean([stage.payoff for stage in stages]),
        "displacement": update.displacement,
        "forwards": sum(stage.passes.forwards for stage in stages),
        "delta_backwards": sum(stage.delta_backwards for stage in stages),
        "theta_backwards": sum(stage.passes.theta_backwards for stage in stages),
        "steps": steps,
        "general_sum": stages[0].goals.general_sum,
    }


def _mean(values: Sequence[Tensor | None]) -> Tensor | None:
    """Return the mean over the micro-batches that know it."""
    known = [value for value in values if value is not None]
    return torch.stack(known).mean() if len(known) > 1 else next(iter(known), None)
