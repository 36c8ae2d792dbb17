"""Write a solver: half the clean loss, half the loss at the end of an ascent."""

from dataclasses import dataclass
from typing import ClassVar

import torch

import mixadv
from mixadv.solvers.base import Solver
from mixadv.solvers.play import Moves, Play, Step


@dataclass(frozen=True, kw_only=True)
class Half(Solver):
    """Half the clean loss, half the loss at the end of an ascent."""

    name: ClassVar[str] = "half"
    paper: ClassVar[str] = "none"
    summary: ClassVar[str] = "half clean, half perturbed"

    def play(self, stage: Moves) -> Play:
        """Play `∇θ ½·[ ℓ(X) + ℓ(X + δ) ]`."""
        delta = stage.ascend("loss", self)
        yield Step((stage.loss() + stage.loss(delta)) / 2)


torch.manual_seed(0)
x, model = torch.randn(64, 4), torch.nn.Linear(4, 2)
closure = lambda: torch.nn.functional.cross_entropy(model(x), (x[:, 0] > 0).long())  # noqa: E731
solver = Half(steps=2, step_size=0.05, radius=0.1)
optimizer = mixadv.wrap(torch.optim.SGD(model.parameters(), lr=0.5), model, solver)
print(optimizer.game.explain(closure))
for _ in range(30):
    loss = optimizer.step(closure)
print(f"loss {loss:.3f}, at the worst δ {optimizer.outcome.payoff:.3f}")
