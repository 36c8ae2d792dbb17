"""What is refused where the robust accuracy of images is measured, and what to write instead."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mixadv.maths.box import within
from mixadv.maths.geometry import Norm, norms
from mixadv.players.ascent import check_box

_ROUNDING = 1e-5  # of a ball, in fp32


def check_attacks(attacks: Any) -> None:
    """Raise TypeError unless attacks are functions by name."""
    if not isinstance(attacks, Mapping):
        raise TypeError(
            f"attacks must be a dict of attacks by name, got {type(attacks).__name__}: write "
            '{"PGD": attack}.'
        )
    for name, attack in attacks.items():
        if not callable(attack):
            raise TypeError(
                f"The attack {name!r} must be a function of images and labels, such as "
                f"pgd_attack(model, radius=…), got {attack!r:.80}."
            )


def pair_of(batch: Any, box: tuple[float, float] | None) -> tuple[Tensor, Tensor]:
    """Return the images `[B, ...]` and the labels `[B]` of a batch that can be measured on."""
    pair = tuple(batch) if isinstance(batch, (tuple, list)) else ()
    if len(pair) != 2 or not all(isinstance(part, Tensor) for part in pair):
        raise TypeError(
            f"A batch must be a pair of tensors (images, labels), got a {type(batch).__name__}: "
            "give batches as [(images, labels)] for one, or a DataLoader of pairs."
        )
    images, labels = pair
    if not images.is_floating_point():
        raise TypeError(
            f"Images must be real numbers, and are {images.dtype}: give images.float() / 255."
        )
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise TypeError(
            f"Labels must be whole numbers, and are {labels.dtype}: give labels.long()."
        )
    _check_values(images, labels, box)
    return images, labels.long()  # by which torch gathers


def _check_values(images: Tensor, labels: Tensor, box: tuple[float, float] | None) -> None:
    if labels.shape != images.shape[:1]:
        raise ValueError(f"{len(images)} images have labels of shape {list(labels.shape)}.")
    if box is None:
        return
    check_box("image_accuracy", box)
    if not within(images, box):
        least, most = float(images.detach().min()), float(images.detach().max())
        raise ValueError(
            f"Images have values from {least:.3g} to {most:.3g}, outside of box={box}: normalise "
            "inside of the model, and give it pixels."
        )


def check_found(
    name: str,
    images: Tensor,
    found: Any,
    radius: float,
    norm: Norm,
    box: tuple[float, float] | None,
) -> None:
    """Raise ValueError unless an attack returned images in the ball and the box."""
    if not isinstance(found, Tensor) or found.shape != images.shape:
        what = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise ValueError(f"The attack {name!r} must return {list(images.shape)}, got {what}.")
    if not found.is_floating_point():
        raise ValueError(
            f"The attack {name!r} returned {found.dtype}, and must return images as it was given "
            f"them, {images.dtype}."
        )
    found = found.detach()
    moved = (found.float() - images.detach().float()).abs()
    rounding = torch.finfo(found.dtype).eps / 2 * found.float().abs()
    farthest = float(norms((moved - rounding).clamp_min(0), norm).max())
    if not farthest <= radius * (1 + _ROUNDING) + 1e-6:
        raise ValueError(
            f"The attack {name!r} moved an image by {farthest:.4g} in {norm}, and the ball has the "
            f"radius {radius:.4g}: give it the same one."
        )
    if box is not None and not within(found, box):
        raise ValueError(f"The attack {name!r} left the box {box}: what it found is no image.")
