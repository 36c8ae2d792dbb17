"""What passes and their backwards run in."""

import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from mixadv.model.private_torch import keeping_buffers


def reusable(wanted: bool) -> AbstractContextManager[Any]:
    """Return what to run a pass in whose graph is differentiated twice, where it is compiled."""
    return keeping_buffers() if wanted else nullcontext()


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
