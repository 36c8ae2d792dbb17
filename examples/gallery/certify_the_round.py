"""Ask how much a stronger adversary would gain over the one in training: a bound from below."""

import torch
import torch.nn.functional as F

import mixadv
from mixadv.equilibrium import exploitability

torch.manual_seed(0)
inputs = torch.randn(256, 20)
labels = (inputs[:, 0] * inputs[:, 1] > 0).long()


def gain(solver: mixadv.Solver) -> str:
    """Train against an adversary; return what a better response would earn more."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(20, 64), torch.nn.Tanh(), torch.nn.Linear(64, 2))
    closure = lambda: F.cross_entropy(model(inputs), labels, reduction="none")  # noqa: E731
    optimizer = mixadv.wrap(torch.optim.AdamW(model.parameters(), lr=0.01), model, solver)
    for _ in range(40):
        optimizer.step(closure)
    return str(exploitability(optimizer.game, closure))


for steps in (0, 1, 3):
    print(f"PGD of {steps} steps:", gain(mixadv.PGD(steps=steps, radius=0.3, step_size=0.15)))
