"""What passes and their backwards run in."""

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from mixadv.errors import GameError
from mixadv.model.private_torch import version

_CHANGED = (
    "The closure changes gradients: it calls backward or zero_grad. A closure runs the forward "
    "pass and returns the loss; the round does the rest."
)


def without_autocast(like: Tensor) -> torch.autocast:
    """Return what to run a backward in: autocast around it would cast what its forward did not."""
    return torch.autocast(like.device.type, enabled=False)


@contextmanager
def cast_anew() -> Iterator[None]:
    """Make autocast cast the weights anew for a pass, as where it ends within the closure.

    Its copies of them are stale after a step, require grad or not as the pass did that made them,
    and add the gradients of several passes up in low precision.
    """
    torch.clear_autocast_cache()
    try:
        yield
    finally:
        torch.clear_autocast_cache()


@contextmanager
def no_grad() -> Iterator[None]:
    """Disable gradients, and the warning of reentrant checkpoints that they are missing."""
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "None of the inputs have requires_grad")
        yield


def compute_dtype(output: Tensor) -> torch.dtype:
    """Return the number format that a tensor was computed in: that of autocast, where it is on."""
    kind = output.device.type
    if torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return output.dtype


def _noted(parameters: list[Tensor]) -> list[tuple[Tensor | None, int]]:
    """Return the gradients, each with its version, which tells of changes in place."""
    return [(g, -1 if g is None else version(g)) for g in [p.grad for p in parameters]]


def _changed(parameters: list[Tensor], before: list[tuple[Tensor | None, int]]) -> bool:
    """Return whether a gradient is another one now, or has other values."""
    pairs = zip(before, _noted(parameters), strict=True)
    return any(a is not b or old != new for (a, old), (b, new) in pairs)


@contextmanager
def gradients_untouched(parameters: list[Tensor]) -> Iterator[None]:
    """Raise if the body replaces or changes a gradient."""
    before = _noted(parameters)
    yield
    if _changed(parameters, before):
        raise GameError(_CHANGED)


@contextmanager
def gradients_kept(parameters: list[Tensor]) -> Iterator[Callable[[], None]]:
    """Put back gradients that the body changes, and raise; not if it calls what it is given."""
    before, kept = _noted(parameters), [*parameters]
    values = [None if g is None else g.detach().clone() for g, _ in before]
    changed = False
    try:
        yield kept.clear
    finally:
        if kept and (changed := _changed(kept, before)):
            for parameter, (gradient, _), value in zip(kept, before, values, strict=True):
                parameter.grad = gradient
                if gradient is not None and value is not None:
                    gradient.detach().copy_(value)
    if changed:
        raise GameError(_CHANGED)


@contextmanager
def aside(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Put gradients aside while the body runs."""
    gradients = [x.grad for x in tensors]
    try:
        for tensor in tensors:
            tensor.grad = None
        yield
    finally:
        for tensor, gradient in zip(tensors, gradients, strict=True):
            tensor.grad = gradient


@contextmanager
def frozen(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Freeze parameters while the body runs."""
    live = [p for p in parameters if p.requires_grad]
    for parameter in live:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in live:
            parameter.requires_grad_(True)
