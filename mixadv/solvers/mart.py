"""MART: misclassification-aware adversarial training. Wang et al. 2020 (ICLR, openreview
rklOg6EFwS), eq. 7–9, Alg. 1.

    min_θ  BCE( f(X+δ), y ) + λ·KL( f(X) ‖ f(X+δ) )·(1 − f_y(X)),     δ = argmax ℓ(f(X+δ), y)
    BCE(p, y) = −log p_y − log(1 − max_{k≠y} p_k)

with f the predicted probabilities: samples that are misclassified clean weigh more in the second
term. The adversary climbs the closure's loss by PGD. Use it where robust accuracy is what counts,
and labels are right: what is labelled wrongly weighs most.

Labels are read from the loss, where that is the cross entropy of the logits of three classes or
more, as its gradient shows (`mixadv.model.heads.shown`); else, as under label smoothing, the
closure returns `(loss, logits, labels)`, with labels below 0 where none counts. Predictions per
token count one by one, `[B, n, C]`. The first term of the BCE is the closure's loss, whatever
weights or smoothing it has.

The released code adds 1e-4 and 1e-7 to 1 − p against logarithms of 0; here they are computed from
logits and are finite. It runs the ascent in evaluation mode: see `help(mixadv.solvers.trades)`.

Published: github.com/YisenWang/MART, train_wideresnet.py and train_resnet.py. Trained by SGD with
momentum 0.9: learning rate, batch, epochs, weight decay

    wide-resnet-34-10  cifar10  1e-1  128   76  2e-4    rate / 10 from epoch 75
    resnet-18          cifar10  1e-2  128  120  3.5e-3  rate / 10 from epochs 75, 90 and 100
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mixadv.checks import check_number
from mixadv.maths.divergence import kl, log_probabilities
from mixadv.solvers.base import Presets, Solver, pixels
from mixadv.solvers.play import Moves, Play, Step


@dataclass(frozen=True, kw_only=True)
class MART(Solver):
    """Minimise a boosted cross entropy at the worst δ, and a KL weighted by how wrong a sample is.

    Use it for images where robust accuracy counts most and labels are right. It needs labels of
    classes. Passes: 2 + K forwards, K backwards for δ, 1 backward.

    Example:
        >>> import torch, mixadv
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 3))
        >>> images, labels = torch.rand(6, 1, 4, 4), torch.arange(6) % 3
        >>> def closure():
        ...     logits = model(images)
        ...     return torch.nn.functional.cross_entropy(logits, labels), logits, labels
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> solver = mixadv.MART.published("cifar10", model="resnet-18")
        >>> mixadv.wrap(optimizer, model, solver).step(closure).shape
        torch.Size([])

    Attributes:
        smoothness_weight: λ of the weighted KL.
    """

    name: ClassVar[str] = "mart"
    reads_labels: ClassVar[bool] = True
    paper: ClassVar[str] = "Wang et al. 2020, openreview rklOg6EFwS"
    summary: ClassVar[str] = "boosted cross entropy at the worst δ, and a KL weighed by mistakes"
    presets: ClassVar[Presets] = {  # step size, steps, start, radius
        "wide-resnet-34-10": {
            "cifar10": pixels(0.007, 10, 1e-3, 0.031, start="normal", smoothness_weight=6.0)
        },
        "resnet-18": {
            "cifar10": pixels(0.007, 10, 1e-3, 0.031, start="normal", smoothness_weight=5.0)
        },
    }

    steps: int = 3
    step_size: float = 0.05
    radius: float | None = 0.1
    smoothness_weight: float = 5.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("MART", "smoothness_weight", self.smoothness_weight)

    @property
    def compares(self) -> str:
        """Predictions are read as logits of classes."""
        return "kl"

    def play(self, stage: Moves) -> Play:
        """Play `∇θ [ BCE(X+δ) + λ·KL(X ‖ X+δ)·(1 − f_y(X)) ]`."""
        delta = stage.ascend("loss", self)
        clean, perturbed = stage.learned(), stage.run_at(delta)
        before, after = (x.compared.flatten(0, -2) for x in (clean, perturbed))
        labels = clean.labels.flatten()
        counts, labels = labels >= 0, labels.clamp(min=0)
        moved = self.smoothness_weight * weighed_kl(after, before, labels)
        values = torch.where(counts, margin(after, labels) + moved, 0.0)
        yield Step(perturbed.objective + values.sum() / counts.sum().clamp(min=1))


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """Return `−log(1 − max_{k≠y} p_k)` per sample, from logits `[B, C]`.

    As −log of what the other classes have together, y among them: finite for any logits.

    Example:
        >>> margin(torch.zeros(1, 4), torch.tensor([0])).exp()
        tensor([1.3333])
    """
    logs = log_probabilities(logits)
    right = labels[:, None] == torch.arange(logits.shape[1], device=logits.device)
    rival = logs.detach().masked_fill(right, -torch.inf).argmax(1, keepdim=True)
    return -logs.scatter(1, rival, -torch.inf).logsumexp(1)


def weighed_kl(perturbed: Tensor, clean: Tensor, labels: Tensor) -> Tensor:
    """Return `KL(clean ‖ perturbed)·(1 − p_y(clean))` per sample, from logits `[B, C]`."""
    right = log_probabilities(clean).gather(1, labels[:, None])[:, 0].exp()
    return kl(perturbed, clean) * (1 - right)
