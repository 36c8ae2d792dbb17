"""Clean and robust accuracy of a classifier of images, under attacks of ours and of others.

An attack is any function `(images, labels) -> images`: `pgd_attack` here, those of torchattacks and
AutoAttack through their adapters, or your own. Whatever it returns is checked to lie in the ball
and in the box before it counts, and an image is robust where no attack found another answer:

    robust(x, y) = 1[ f(x) = y  and  f(a(x, y)) = y  for every attack a ]

an upper bound of the accuracy in the ball. PGD alone is a weak bound where gradients are masked:
report AutoAttack beside it. The model is called with pixels in the box and returns logits,
normalisation inside; it is in evaluation mode meanwhile and left as it was.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm.auto import tqdm

from mixadv.checks import check_integer, check_number
from mixadv.equilibrium import attack
from mixadv.maths.geometry import Norm
from mixadv.maths.likelihood import label_margins
from mixadv.model.contexts import no_grad
from mixadv.model.replay import evaluating
from mixadv.robustness.ascents import learnable
from mixadv.robustness.image_checks import check_attacks, check_found, pair_of
from mixadv.robustness.predictions import check_labels, check_several
from mixadv.robustness.statistics import Estimate, wilson
from mixadv.solvers import PGD

ImageAttack = Callable[[Tensor, Tensor], Tensor]
"""`attack(images [B, ...], labels [B])`: the images that it found, in the ball and the box."""


@dataclass(frozen=True, eq=False)
class ImageAccuracy:
    """Which images a model classifies correctly, in the order of the data.

    Attributes:
        right: as they are, `[N]`.
        survived: under each attack, by name, `[N]`; an image that is wrong as it is counts as lost.
        radius: of the ball.
    """

    right: NDArray[np.bool_]
    survived: dict[str, NDArray[np.bool_]]
    radius: float

    @property
    def robust(self) -> NDArray[np.bool_]:
        """Which images are right under every attack, `[N]`."""
        return np.logical_and.reduce([self.right, *self.survived.values()])

    @property
    def clean(self) -> Estimate:
        """Clean accuracy with Wilson's interval over images."""
        return wilson(self.right)

    @property
    def worst(self) -> Estimate:
        """Accuracy under all attacks together, with Wilson's interval over images."""
        return wilson(self.robust)


def image_accuracy(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    attacks: Mapping[str, ImageAttack] | None = None,
    *,
    radius: float,
    norm: Norm = "linf",
    box: tuple[float, float] | None = (0.0, 1.0),
    progress: bool = False,
) -> ImageAccuracy:
    """Return clean and robust accuracy.

    Args:
        model: called with images, returns logits `[B, C]`, or an output with `.logits`.
        batches: of images `[B, ...]` and labels `[B]`, on the model's device; such as a DataLoader.
        attacks: by name; None is `pgd_attack` at its defaults.
        radius: of the ball, in the values that images have: `8 / 255`.
        norm: of the ball.
        box: that images lie in; None is none.
        progress: whether to show a bar.

    Raises:
        TypeError: for attacks without names; batches of other things than images and labels.
        ValueError: for images outside of the box; no batch; what an attack should not return.

    Example:
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(16, 2))
        >>> found = image_accuracy(model, [(torch.rand(4, 16), torch.arange(4) % 2)], radius=0.1)
        >>> found.robust.sum() <= found.right.sum()
        np.True_
    """
    check_number("image_accuracy", "radius", radius)
    if attacks is None:
        attacks = {"PGD": pgd_attack(model, radius=radius, norm=norm, box=box)}
    check_attacks(attacks)
    columns: list[list[Tensor]] = []
    with evaluating(model):
        for batch in tqdm(batches, desc="attacks", unit="batch", disable=not progress):
            images, labels = pair_of(batch, box)
            kept = [_hits(model, images, labels)]
            for name, play in attacks.items():
                found = play(images, labels)
                model.eval()  # some attacks put back the mode that they were made in
                check_found(name, images, found, radius, norm, box)
                kept.append(kept[0] & _hits(model, found, labels))
            columns.append(kept)
    if not columns:
        raise ValueError("There are no images to measure on: the batches are empty.")
    right, *survived = (torch.cat(parts).cpu().numpy() for parts in zip(*columns, strict=True))
    return ImageAccuracy(right, dict(zip(attacks, survived, strict=True)), radius)


def _margins(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    logits = logits_of(model(images))
    return label_margins(logits.float(), labels), logits


def pgd_attack(
    model: nn.Module,
    *,
    radius: float,
    norm: Norm = "linf",
    box: tuple[float, float] | None = (0.0, 1.0),
    steps: int = 20,
    step_size: float | None = None,
    restarts: int = 5,
    site: Any = "input",
    seed: int = 0,
) -> ImageAttack:
    """Return projected gradient ascent of the cross entropy, the worst of several random starts.

    `mixadv.attack` plays `mixadv.PGD` for `mixadv.maths.likelihood.label_margins`, which grow with
    the loss. Of each image the first end that is wrong is returned, else that of the largest loss.

    Args:
        model: to attack, as for `image_accuracy`.
        radius: of the ball, in the values that images have.
        norm: of ball and steps.
        box: that images lie in.
        steps: of each ascent.
        step_size: None is a quarter of the radius.
        restarts: random starts.
        site: where the model takes the images: its own input.
        seed: of the starts.
    """
    check_number("pgd_attack", "radius", radius)
    check_integer("pgd_attack", "restarts", restarts, 1)
    length = radius / 4 if step_size is None else step_size
    solver = PGD(steps=steps, step_size=length, radius=radius, norm=norm, box=box, unit="absolute")

    def play(images: Tensor, labels: Tensor) -> Tensor:
        closure = functools.partial(_margins, model, images, labels)
        worst, least = images, torch.full_like(labels, -torch.inf, dtype=torch.float32)
        for number in range(restarts):
            with learnable(model):
                found = attack(model, solver, closure, site, seed=seed + number)
            assert found.predictions is not None
            wrong = found.predictions.argmax(-1) != labels
            gained = torch.where(wrong, torch.inf, found.loss.detach().float())
            better = (gained > least).view(-1, *[1] * (images.dim() - 1))
            moved = (images + found.strategy.points[0][0]).to(images.dtype)
            worst, least = torch.where(better, moved, worst), torch.maximum(least, gained)
        return worst

    return play


def torchattack(name: str, model: nn.Module, **settings: Any) -> ImageAttack:
    """Return an attack of the package torchattacks, by its name there.

    Args:
        name: such as `"PGD"`, `"CW"`, `"Square"`, `"AutoAttack"`.
        model: as for `image_accuracy`, called with pixels in [0, 1].
        settings: of the attack, in the words of that package: `eps=8 / 255`.

    Raises:
        ImportError: where it is not installed.
        ValueError: for an attack that it has not.
    """
    module = _imported("torchattacks", "torchattacks")
    kind = getattr(module, name, None)
    if kind is None:
        raise ValueError(f"torchattacks has no attack {name!r}.")
    return kind(_Logits(model), **settings)


def auto_attack(
    model: nn.Module, *, radius: float, norm: Norm = "linf", **settings: Any
) -> ImageAttack:
    """Return AutoAttack (Croce and Hein 2020, arXiv:2003.01690) of its authors' package.

    Args:
        model: as for `image_accuracy`, called with pixels in [0, 1].
        radius: of the ball.
        norm: of the ball.
        settings: of `autoattack.AutoAttack`, such as `version="rand"`.

    Raises:
        ImportError: where it is not installed.
    """
    module = _imported("autoattack", "git+https://github.com/fra31/auto-attack")
    named = {"linf": "Linf", "l2": "L2", "l1": "L1"}[norm]
    settings = {"device": next(model.parameters()).device, "verbose": False, **settings}
    made = module.AutoAttack(_Logits(model), norm=named, eps=radius, **settings)
    return lambda images, labels: made.run_standard_evaluation(images, labels, bs=len(images))


class _Logits(nn.Module):
    """A model that returns its logits alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.training = model.training  # its own alone: the model's modules stay as they are

    def forward(self, images: Tensor) -> Tensor:
        return logits_of(self.model(images))


def logits_of(output: Any) -> Tensor:
    """Return the logits `[B, C]` in what a model returned."""
    found = getattr(output, "logits", output)
    if not isinstance(found, Tensor) or found.dim() != 2:
        what = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise ValueError(
            f"The model must return logits [B, C], by themselves or as .logits: {what}."
        )
    return found


def _imported(module: str, package: str) -> Any:
    try:
        return import_module(module)
    except ImportError as error:
        raise ImportError(f"{module} is not installed ({error}): pip install {package}") from error


def _hits(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    with no_grad():
        logits = logits_of(model(images))
    check_several(logits.shape[1])
    check_labels(labels, logits.shape[1])
    return logits.argmax(-1) == labels
