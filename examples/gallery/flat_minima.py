"""Train where 40 % of the labels are drawn at random, with SAM: an adversary of the weights."""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

import mixadv

pixels, digits = load_digits(return_X_y=True)
x, labels = torch.tensor(pixels / 16, dtype=torch.float32), torch.tensor(digits)
test_x, test_labels = x[1000:], labels[1000:]
torch.manual_seed(0)
wrong = torch.rand(1000) < 0.4
taught = torch.where(wrong, torch.randint(10, (1000,)), labels[:1000])

for name, solver in {
    "plain": mixadv.SAM(radius=0),
    "SAM": mixadv.SAM(radius=0.5),
}.items():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    optimizer = mixadv.wrap(optimizer, model, solver)
    for _ in range(40):
        for rows in torch.randperm(1000).split(100):
            optimizer.step(lambda rows=rows: F.cross_entropy(model(x[rows]), taught[rows]))
    fitted = (model(x[:1000]).argmax(1) == taught)[wrong].float().mean()
    right = (model(test_x).argmax(1) == test_labels).float().mean()
    print(f"{name:5} fits {fitted:.2f} of the wrong labels, test accuracy {right:.2f}")
