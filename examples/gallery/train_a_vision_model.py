"""Train a classifier of images by TRADES: pixels stay in [0, 1], the ball is L∞."""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

import mixadv
from mixadv.robustness import image_accuracy, pgd_attack

pixels, digits = load_digits(return_X_y=True)
images = torch.tensor(pixels / 16, dtype=torch.float32).view(-1, 1, 8, 8)
labels = torch.tensor(digits)
RADIUS = 0.1
ball = {"norm": "linf", "unit": "absolute", "box": (0.0, 1.0), "radius": RADIUS}

for name, solver in {
    "plain": mixadv.PGD(radius=0),
    "TRADES": mixadv.TRADES(steps=3, step_size=RADIUS / 3, **ball),
}.items():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    optimizer = mixadv.wrap(optimizer, model, solver)
    for step in range(120):
        rows = torch.arange(128) + 128 * step % 1280

        def closure() -> tuple[torch.Tensor, torch.Tensor]:
            """Return the loss and the logits."""
            logits = model(images[rows])
            return F.cross_entropy(logits, labels[rows], reduction="none"), logits

        optimizer.step(closure)
    attack = pgd_attack(model, radius=RADIUS)
    found = image_accuracy(model, [(images[1400:], labels[1400:])], {"PGD": attack}, radius=RADIUS)
    print(f"{name:7} clean {found.clean.value:.2f}, under PGD {found.worst.value:.2f}")
