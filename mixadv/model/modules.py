"""Finding modules in a model, and reading how they are called."""

import functools
import inspect
import weakref
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call

from mixadv.errors import nearest
from mixadv.model.parallel import sharded, swapped
from mixadv.model.private_torch import compiled_in_place, is_compiled, original

INPUT = "input"
"""The model's own input as the site; "input:NAME" says which of several."""


def is_input(name: str) -> bool:
    """Return whether a site of this name is the model's own input."""
    return name.partition(":")[0] == INPUT


def weak_hook(method: Callable[[], None]) -> Callable[..., None]:
    """Return a hook that calls a method, and does not keep the method's object alive."""
    held = weakref.WeakMethod(method)

    def hook(*_: Any) -> None:
        found = held()
        if found is not None:
            found()

    return hook


def functional(
    model: nn.Module, weights: dict[Tensor, Tensor], call: Callable[[], Any]
) -> Callable[[], Any]:
    """Return a call of the model with other values for parameters, in their number format."""
    if sharded(model):  # each forward gathers the weights anew, from the parameters alone

        def run() -> object:
            with swapped(model, weights):
                return call()

        return run
    values = {
        f"model.{path}.{name}".replace("..", "."): weights[p].to(p.dtype)
        for path, module in model.named_modules()
        for name, p in module._parameters.items()
        if p is not None and p in weights
    }
    # Ties are spelled out above: torch would swap a module that is registered twice only once back.
    return lambda: functional_call(_Holder(model, call), values, (), tie_weights=False)


class _Holder(nn.Module):
    """A module whose forward is a call."""

    def __init__(self, model: nn.Module, call: Callable[[], Any]) -> None:
        super().__init__()
        self.model = model
        self.call = call

    def forward(self) -> object:
        return self.call()


def bound(module: nn.Module, args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call by name; surplus positional ones by their index."""
    inner = unwrap(module)
    usual = "forward" not in vars(inner)  # else patched, by a function that may hold the model
    positional = _positional(type(inner)) if usual else _names(inner.forward)
    names = positional + [str(i) for i in range(len(positional), len(args))]
    return {**dict(zip(names, args, strict=False)), **kwargs}


@functools.lru_cache
def _positional(kind: type[nn.Module]) -> list[str]:
    return _names(kind.forward, bound_to=1)


def _names(function: Callable[..., Any], bound_to: int = 0) -> list[str]:
    parameters = [*inspect.signature(function).parameters.values()][bound_to:]
    return [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]


def unwrap(model: nn.Module) -> nn.Module:
    """Return the model inside DistributedDataParallel and torch.compile."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif (inner := original(model)) is not None:
            model = inner
        else:
            return model


def base_of(model: Any) -> Any:
    """Return the model inside PEFT's, or the model."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def configuration(model: Any, *names: str) -> Any:
    """Return the configuration of a model, or of the only one within a wrapper, by what it has.

    None where none has an attribute of these names, or where models side by side have their own.
    """
    found: dict[int, Any] = {}
    ahead = [model]
    while ahead:
        module = ahead.pop()
        config = getattr(module, "config", None)
        if any(hasattr(config, name) for name in names):
            found[id(config)] = config
        else:
            ahead += [m for m in getattr(module, "_modules", {}).values() if m is not None]
    return next(iter(found.values())) if len(found) == 1 else None


def find(model: nn.Module, site: Any) -> list[tuple[str, nn.Module]]:
    """Return the modules that a `site=` argument means, each with its name; see `Site`."""
    if isinstance(site, (list, tuple)):
        if not site:
            raise ValueError("site=[] names no module; leave it out for the input embedding.")
        return _each_once([target for part in site for target in find(model, part)])
    if site is None:
        return [_default(model)]
    if isinstance(site, str) and is_input(site):
        return [(site, unwrap(model))]
    inner = unwrap(model)
    named = dict(inner.named_modules(remove_duplicate=False))
    if isinstance(site, str):
        if site in named and site:
            return [(site, named[site])]
        raise ValueError(f"The model has no module named {site!r}.{nearest(site, named, 3)}")
    if isinstance(site, nn.Module):
        name = next((n for n, m in named.items() if m is site), None)
        if name is None:
            raise ValueError(f"The {type(site).__name__} given as site is not part of the model.")
        return [(name, site)] if name else [(INPUT, site)]
    raise TypeError(
        f"site must be None, a module, its name, 'input' or a list of these, got {site!r}."
    )


def _each_once(targets: list[tuple[str, nn.Module]]) -> list[tuple[str, nn.Module]]:
    """Return targets; refuse a module, or input, that several names mean."""
    known: dict[object, str] = {}
    for name, module in targets:
        key = name if is_input(name) else module
        if key in known:
            raise ValueError(
                f"site= names one module twice, as {known[key]!r} and {name!r}: name it once."
            )
        known[key] = name
    return targets


def _default(model: nn.Module) -> tuple[str, nn.Module]:
    """Return the input embedding that the encoder really calls, else the model's own input."""
    inner = unwrap(model)
    embeddings = [(n, m) for n, m in inner.named_modules() if isinstance(m, nn.Embedding)]
    reads_ids = getattr(inner, "main_input_name", "input_ids") == "input_ids"
    encoders = _encoders(inner) if reads_ids else []
    if len(encoders) == 1:
        try:
            found = _input_embedding(encoders[0])
        except NotImplementedError:  # as of models that read texts and images
            found = None
        named = next((pair for pair in inner.named_modules() if pair[1] is found), None)
        if named is not None:
            return named
    if not reads_ids or not embeddings:
        return INPUT, inner
    if len(embeddings) == 1:
        return embeddings[0]
    listed = ", ".join(repr(n) for n, _ in embeddings[:8])
    which = f"and {len(encoders)} encoders" if len(encoders) > 1 else "and does not say which reads"
    raise ValueError(
        f"The model has {len(embeddings)} embeddings {which}: {listed}. "
        "Name the one that δ is added to with site=."
    )


def _encoders(model: nn.Module) -> list[Any]:
    """Return the outermost modules that know their input embedding, of token ids."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        within = any(not outer or name.startswith(f"{outer}.") for outer in found)
        ids = getattr(module, "main_input_name", "input_ids") == "input_ids"
        if not within and ids and callable(getattr(module, "get_input_embeddings", None)):
            found[name] = module
    return list(found.values())


def _input_embedding(holder: Any) -> Any:
    # The tied `shared` module of an encoder–decoder is never called: its encoder has its own.
    if getattr(getattr(holder, "config", None), "is_encoder_decoder", False):
        base = getattr(holder, "base_model", holder)  # the head has it since transformers 5
        holder = (holder if hasattr(holder, "get_encoder") else base).get_encoder()
    return holder.get_input_embeddings()


def compiled(model: nn.Module, targets: Sequence[tuple[str, nn.Module]]) -> bool:
    """Return whether a target lies in what `torch.compile` made; refuse compilation in place."""

    def holds(module: nn.Module) -> bool:
        return any(inner is target for inner in module.modules() for _, target in targets)

    if any(compiled_in_place(m) and holds(m) for m in model.modules()):
        raise TypeError(
            "The model was compiled in place by model.compile(), which hides its inputs from "
            "hooks. Give the game torch.compile(model) instead, and call that in the closure."
        )
    return any(is_compiled(m) and holds(m) for m in model.modules())
