"""Train with Accelerate, with gradient accumulation: the game takes the place of the backward."""

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, TensorDataset

import mixadv

torch.manual_seed(0)
x = torch.randn(128, 8)
loader = DataLoader(TensorDataset(x, (x[:, 0] > 0).long()), batch_size=16)
model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 2))
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
optimizer = mixadv.wrap(optimizer, model, mixadv.FreeLB())

accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
game = optimizer.optimizer.game
for epoch in range(4):
    for inputs, labels in loader:

        def closure() -> tuple[torch.Tensor, torch.Tensor]:
            """Return the loss and the logits."""
            logits = model(inputs)
            return torch.nn.functional.cross_entropy(logits, labels), logits

        with accelerator.accumulate(model):
            outcome = game.backward(closure, backward=accelerator.backward)
            optimizer.step()
            optimizer.zero_grad()
    print(f"epoch {epoch + 1}: loss {outcome.objective:.3f}, δ of {outcome.radius:.2f} units")
accelerator.save_state("checkpoint")  # both players
