"""What is asked of torch by names that it keeps to itself; no other file uses such names.

Each is there in torch 2.13, with which the tests run. What another version moves or drops, from 2.7
on, is mended here.
"""

import inspect
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch._functorch import config as functorch_config
from torch.utils.checkpoint import CheckpointFunction, checkpoint

# Untyped on purpose: the stubs of torch list a part of this.
_C: Any = torch._C

_CHECKPOINT = inspect.unwrap(checkpoint).__code__

KEEPING_BUFFERS: AbstractContextManager[Any] = functorch_config.patch(donated_buffer=False)
"""What to run a compiled pass in whose graph is differentiated more than once.

Made once: torch keeps a context variable of each such patch for ever.
"""


def running_backward() -> int:
    """Return the number of the backward that is running on this thread, -1 outside of any."""
    return _C._current_graph_task_id()


def sequence_number() -> int:
    """Return the number that autograd gives to the next node it makes on this thread."""
    return _C._autograd._get_sequence_nr()


def running_number() -> int:
    """Return the number of the node whose backward is running."""
    return _C._current_autograd_node()._sequence_nr()


def saving_hook() -> Any:
    """Return the innermost hook on saved tensors, None without one.

    A checkpoint that is not reentrant places one around its block.
    """
    top = getattr(_C._autograd, "_top_saved_tensors_default_hooks", None)
    if top is None:
        return _block_of_checkpoint()
    hooks = top(True)
    return None if hooks is None else hooks[0]


def _block_of_checkpoint() -> Any:
    """Return what runs the innermost block anew, None outside of any: for torch before 2.8."""
    frame = sys._getframe()
    while frame is not None and frame.f_code is not _CHECKPOINT:
        frame = frame.f_back
    runs = None if frame is None else frame.f_locals.get("gen")
    return None if runs is None else runs.gi_frame.f_locals["recompute_fn"]


def in_reentrant_checkpoint(grad: bool) -> bool:
    """Return whether the forward that is running is a reentrant checkpoint's, which disables grad.

    Args:
        grad: whether gradients were enabled before.
    """
    if not grad or torch.is_grad_enabled():
        return False
    frame = sys._getframe()
    while frame is not None and frame.f_code is not CheckpointFunction.forward.__code__:
        frame = frame.f_back
    return frame is not None


def after_backward(call: Callable[[], Any]) -> None:
    """Call a function when the backward that is running has ended."""
    engine: Any = torch.autograd.Variable._execution_engine  # pyright: ignore
    engine.queue_callback(call)


def version(tensor: Tensor) -> int:
    """Return how often a tensor was changed in place."""
    return tensor._version


def keeping_version(tensor: Tensor) -> AbstractContextManager[Any]:
    """Return what to change a tensor in without a trace: graphs that saved it stay valid."""
    return torch.autograd._unsafe_preserve_version_counter(tensor)  # pyright: ignore


# vmap ----------------------------------------------------------------------------------------


def is_mapped(tensor: Tensor) -> bool:
    """Return whether a tensor is what `torch.func.vmap` shows of a larger one."""
    return _C._functorch.is_batchedtensor(tensor)


def unmapped(tensor: Tensor | None) -> Tensor | None:
    """Return the tensor `[M, ...]` of which vmap shows a slice, None if there is none."""
    if tensor is None or not is_mapped(tensor) or _C._functorch.maybe_get_bdim(tensor):
        return None
    return _C._functorch.get_unwrapped(tensor)


# torch.compile -------------------------------------------------------------------------------


def more_graphs(factor: int) -> AbstractContextManager[Any]:
    """Return what to run compiled code in that may have more graphs than torch's limit."""
    config: Any = torch._dynamo.config
    name = "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit"  # of 2.6
    return config.patch({name: factor * getattr(config, name)})


def original(model: nn.Module) -> nn.Module | None:
    """Return the module that `torch.compile` has wrapped in a model, None elsewhere."""
    return model._modules.get("_orig_mod")  # of an attribute that is not there torch asks for long


def is_compiled(module: nn.Module) -> bool:
    """Return whether a module is what `torch.compile` returned."""
    return "_orig_mod" in module._modules


def compiled_in_place(module: nn.Module) -> bool:
    """Return whether a module was compiled by its own `compile()`."""
    return module._compiled_call_impl is not None


def lerp_all(tensors: list[Tensor], goals: list[Tensor], weight: float) -> None:
    """Move each tensor by `weight` of its way to its goal, in place."""
    torch._foreach_lerp_(tensors, goals, weight)  # pyright: ignore
