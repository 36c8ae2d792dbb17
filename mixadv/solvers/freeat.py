"""FreeAT: adversarial training for free. Shafahi et al. 2019, arXiv:1904.12843, Alg. 1.

    for t in 1..m:   g_θ, g_δ from one backward of ℓ(f(X + δ;θ), y)
                     δ ← Π( δ + α·g_δ/‖g_δ‖ ),   θ ← θ − τ·g_θ   at the old δ

Each batch is replayed m times, with an optimizer step in each: train a fraction 1/m of the epochs.
δ is carried to the next batch, as in the paper, at each call of the site where the shapes match,
which variable lengths seldom do; FreeLB's code starts anew each batch (`carry=False`).

Published: github.com/zhuchen03/FreeLB, fairseq-RoBERTa/launch/FreeAT/*.sh. That code does not
project δ_0 (which matters for CoLA alone), divides the loss by 1 + m, and shortens no training: it
is that of FreeLB (`help(mixadv.solvers.freelb)`), where updates count batches, not steps.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from mixadv.checks import check_flag, check_integer
from mixadv.model.visits import Call
from mixadv.players.learner import Learner
from mixadv.solvers.base import Presets, Solver, row
from mixadv.solvers.play import Moves, Play, Step


@dataclass(frozen=True, kw_only=True)
class FreeAT(Solver):
    """Take an optimizer step at every point of an ascent, on the same batch.

    Use it where an epoch is long and an adversary should cost no extra passes: train 1/m of the
    epochs. It works through `optimizer.step(closure)` only, because the steps fall within one
    batch. Passes: m forwards, m backwards, m optimizer steps, where m is `steps`. It keeps a copy
    of the trainable weights, to go back to if a round fails.

    Attributes:
        carry: start a round from the δ that the last one ended with. Each of several processes
            carries its own, so an exact resume needs a checkpoint of each.
    """

    name: ClassVar[str] = "freeat"
    paper: ClassVar[str] = "Shafahi et al. 2019, arXiv:1904.12843"
    summary: ClassVar[str] = "an optimizer step at every point of the ascent, δ carried on"
    own_payoff: ClassVar[str] = "one backward before each step gives both players their gradient"
    replays_batch: ClassVar[bool] = True
    presets: ClassVar[Presets] = {
        "roberta-large": {  # step size, replays, start, radius
            "mnli": row(1e-1, 2, 1e-2, 2e-1, carry=False),
            "qnli-fp16": row(1e-1, 2, 1.5e-1, 1.5e-1, carry=False),
            "qqp-fp16": row(1.5e-1, 2, 3.2e-1, 6.2e-1, carry=False),
            "sst2": row(1e-1, 2, 1.0, 6e-1, carry=False),
            "cola": row(5e-2, 3, 4e-1, 2e-1, carry=False),
            "mrpc": row(4e-2, 3, 6.4e-1, 4e-1, carry=False),
            "stsb": row(1e-1, 3, 1.6e-1, 2.8e-1, carry=False),
        }
    }

    steps: int = 3
    step_size: float = 0.05
    radius: float | None = 0.1
    carry: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer("FreeAT", "steps (the number of replays)", self.steps, 1)
        check_flag("FreeAT", "carry", self.carry)

    def learner(self) -> Learner | None:
        """Return the learner whose round is m optimizer steps."""
        return Learner(steps=self.steps)

    def play(self, stage: Moves) -> Play:
        """Play m times `∇θ ℓ(X + δ)` and a step."""

        def begin(index: int, call: Call) -> Tensor:
            carried = stage.memory.get("delta", [])
            if index >= len(carried) or carried[index].shape != call.shape:
                return stage.draw(self, call)
            like = call.empty()
            delta = carried[index].to(like)
            real = delta if call.mask is None else delta * call.mask
            return self.project(real, call.owners)

        delta = stage.start(self, begin)
        for _ in range(self.steps):
            yield Step(stage.loss(delta))
            delta = stage.move(delta, self)
        if self.carry:
            stage.memory["delta"] = [points[0].detach() for points in delta.points]
