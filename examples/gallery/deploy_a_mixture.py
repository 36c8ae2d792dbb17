"""Deploy a mixture: train by MAT, keep samples of the weights, save, load and predict by all."""

import torch
import torch.nn.functional as F

import mixadv
from mixadv.mixtures import Mixture, mixture_of

torch.manual_seed(0)
inputs = torch.randn(256, 20)
labels = (inputs[:, 0] * inputs[:, 1] > 0).long()
model = torch.nn.Sequential(torch.nn.Linear(20, 64), torch.nn.Tanh(), torch.nn.Linear(64, 2))


def closure() -> tuple[torch.Tensor, torch.Tensor]:
    """Run the forward pass; return the loss and what the model predicts."""
    logits = model(inputs)
    return F.cross_entropy(logits, labels), logits


optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
optimizer = mixadv.wrap(optimizer, model, mixadv.MAT(samples=4))
for _ in range(60):
    optimizer.step(closure)

mixture = mixture_of(optimizer.game)  # the last 4 samples, all alike
mixture.save_pretrained("mixture")  # safetensors and a small JSON
loaded = Mixture.from_pretrained("mixture", model)
for how in ("mean", "vote", "draw"):
    predictions = loaded.predict(lambda: loaded(inputs), how=how)
    print(f"{how}: accuracy {(predictions.argmax(1) == labels).float().mean():.2f}")
