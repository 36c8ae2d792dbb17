"""What modules are called with and return: what δ is added to, and what a pass may change."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from mixadv.errors import GameError
from mixadv.model.modules import bound, unwrap


def is_whole(value: Any) -> bool:
    """Return whether a value is a tensor of whole numbers or Booleans, as of ids and labels."""
    real = isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())
    return isinstance(value, Tensor) and not real


def given(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return what a call is given, by name: also within a mapping, as of sentence-transformers."""
    arguments = bound(module, args, kwargs)
    for value in arguments.values():
        if not isinstance(value, Tensor) and isinstance(value, Mapping):  # slow to ask of a tensor
            arguments = {**value, **arguments}
    return arguments


def copies(value: Any) -> Any:
    """Return arguments of the model with copies of the whole numbers among them.

    Some models edit labels in place, and the next pass would read what the last one left.
    """
    if isinstance(value, Tensor):
        return value.clone() if is_whole(value) else value
    if type(value) in (tuple, list):
        return type(value)(map(copies, value))
    return {k: copies(v) for k, v in value.items()} if type(value) is dict else value


@contextmanager
def copying(model: nn.Module) -> Iterator[None]:
    """Call the model with copies of the whole numbers it is given, where no site does."""
    handle = model.register_forward_pre_hook(
        lambda module, args, kwargs: (copies(args), copies(kwargs)), with_kwargs=True, prepend=True
    )
    try:
        yield
    finally:
        handle.remove()


def tokens_of(module: nn.Module, entered: Any) -> tuple[Tensor | None, nn.Module | None]:
    """Return the token ids that an embedding was called with, and the embedding."""
    module = getattr(module, "base_layer", module)  # of an adapter around it
    known = hasattr(module, "num_embeddings") and isinstance(entered, Tensor)
    return (entered, module) if known else (None, None)


def first_of(output: Any) -> Any:
    """Return what δ is added to: the output of a module, or the first of a tuple."""
    return output[0] if isinstance(output, (tuple, list)) else output


def with_first(output: Any, first: Tensor) -> Any:
    """Return the output of a module with another `first_of` it."""
    if not isinstance(output, (tuple, list)):
        return first
    if hasattr(output, "_fields"):  # a NamedTuple takes its fields one by one
        return type(output)(first, *output[1:])
    return type(output)((first, *output[1:]))


def add(output: Tensor, delta: Tensor) -> Tensor:
    """Return output + δ, summed in δ's precision and cast once (bf16 would swallow a small δ)."""
    return (output.to(delta.dtype) + delta).to(output.dtype)


_BESIDE = ("label", "target", "mask", "weight")


def chosen_input(site: str, module: nn.Module, arguments: Mapping[str, Any]) -> str:
    """Return the argument of the model that a site "input" or "input:NAME" means."""
    floats = [name for name, value in arguments.items() if _is_float(value)]
    if ":" not in site:  # labels, masks and weights are read beside an input
        floats = [n for n in floats if not any(word in n for word in _BESIDE)] or floats
    wanted = site.partition(":")[2] or getattr(unwrap(module), "main_input_name", None)
    if wanted in floats:
        return wanted
    if ":" in site or not floats:
        raise GameError(
            f"The site is {site!r}, the model's own input, and it is called with "
            f"{list(arguments)}, of which {floats or 'none'} are floating-point tensors. Choose "
            "one of these as site='input:NAME', or a module with site=."
        )
    if len(floats) > 1:
        raise GameError(
            f"The model is called with several floating-point tensors, {floats}: say which one δ "
            f"is added to, as in site='input:{floats[0]}'."
        )
    return floats[0]


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()
