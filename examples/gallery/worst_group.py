"""Raise the accuracy of the worst group: an adversary weighs the groups of the training rows."""

import torch
import torch.nn.functional as F

import mixadv


def rows(count: int, share: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return inputs, labels and groups; a shortcut agrees with the label in a share of the rows."""
    label = torch.randint(2, (count,))
    agrees = torch.rand(count) < share
    shortcut = torch.where(agrees, label, 1 - label)
    signal = torch.stack([label - 0.5 + torch.randn(count), 3 * (shortcut - 0.5)], 1)
    return signal, label, (~agrees).long()  # group 1 is the minority


torch.manual_seed(0)
x, labels, groups = rows(512, share=0.95)
test_x, test_labels, test_groups = rows(4000, share=0.5)
for name, solver in {
    "plain": mixadv.PGD(radius=0),
    "group DRO": mixadv.GroupDRO(groups=2, mirror_step=0.1),
}.items():
    torch.manual_seed(0)
    model = torch.nn.Linear(2, 2)
    optimizer = mixadv.wrap(torch.optim.Adam(model.parameters(), lr=0.05), model, solver)
    how = {"groups": groups} if name == "group DRO" else {}
    for _ in range(150):
        optimizer.step(lambda: F.cross_entropy(model(x), labels, reduction="none"), **how)
    right = (model(test_x).argmax(1) == test_labels).float()
    each = [right[test_groups == group].mean().item() for group in (0, 1)]
    print(f"{name:9} majority {each[0]:.2f}, minority {each[1]:.2f}")
