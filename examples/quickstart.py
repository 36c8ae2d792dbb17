"""Train a small classifier against an adversary: the lines that mixadv adds are marked."""

import torch
import torch.nn.functional as F

import mixadv

torch.manual_seed(0)
inputs = torch.randn(256, 20)
labels = (inputs[:, 0] * inputs[:, 1] > 0).long()

model = torch.nn.Sequential(torch.nn.Linear(20, 64), torch.nn.Tanh(), torch.nn.Linear(64, 2))


def closure() -> tuple[torch.Tensor, torch.Tensor]:
    """Run the forward pass; return the loss and what the model predicts."""
    logits = model(inputs)
    return F.cross_entropy(logits, labels), logits


optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
optimizer = mixadv.wrap(optimizer, model, mixadv.MAT(particles=2))  # mixadv
print(optimizer.game.explain(closure))  # mixadv

for step in range(60):
    loss = optimizer.step(closure)  # mixadv: no zero_grad, no backward
    if step % 20 == 19:
        outcome = optimizer.outcome
        print(f"step {step + 1}: loss {loss:.3f}, the adversary gains {outcome.payoff:.4f}")

with optimizer.game.averaged():  # mixadv: the running average of the weights
    accuracy = (model(inputs).argmax(1) == labels).float().mean()
print(f"accuracy on the training set: {accuracy:.2f}")
