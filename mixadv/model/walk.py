"""What a model consists of, in the order of torch's own listings, which take ten times as long.

A round asks several times, and of a small model that was a tenth of its cost. Nothing is kept from
one round to the next: modules come and go, and weights are replaced.
"""

from collections.abc import Iterable, Iterator, Sequence

from torch import Tensor, nn


def modules(model: nn.Module) -> list[nn.Module]:
    """Return the module and all within, each once, those outside before those inside."""
    found: dict[int, nn.Module] = {}
    ahead = [model]
    while ahead:
        module = ahead.pop()
        if id(module) not in found:
            found[id(module)] = module
            if within := module._modules:  # most have none
                ahead += [m for m in reversed(within.values()) if m is not None]
    return list(found.values())


def parameters(listed: Iterable[nn.Module]) -> list[Tensor]:
    """Return the parameters of modules, each once."""
    held = [p for m in listed for p in m._parameters.values() if p is not None]
    return list({id(p): p for p in held}.values())


def names(model: nn.Module) -> dict[int, str]:
    """Return the name of each parameter of a model, the first it has, by its identity."""
    found: dict[int, str] = {}
    seen: set[int] = set()
    ahead = [("", model)]
    while ahead:
        prefix, module = ahead.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        for name, parameter in module._parameters.items():
            if parameter is not None:
                found.setdefault(id(parameter), prefix + name)
        inside = reversed(module._modules.items())
        ahead += [(f"{prefix}{name}.", m) for name, m in inside if m is not None]
    return found


def tensors(listed: Iterable[nn.Module]) -> Iterator[Tensor]:
    """Yield the parameters and buffers of modules; those that are shared several times."""
    for module in listed:
        for held in (module._parameters, module._buffers):
            for tensor in held.values():
                if tensor is not None:
                    yield tensor


def around(model: nn.Module, inner: Sequence[nn.Module]) -> list[nn.Module]:
    """Return the modules that contain one of `inner`, outermost first; always the model itself."""
    wanted, holding = {id(m) for m in inner}, {}
    _is_or_holds(model, wanted, holding)
    above = [m for m, holds in holding.values() if holds and id(m) not in wanted]
    return above if above and above[0] is model else [model, *above]


def _is_or_holds(
    module: nn.Module, wanted: set[int], holding: dict[int, tuple[nn.Module, bool]]
) -> bool:
    """Return whether a module is wanted or holds one that is; note of each whether it holds one."""
    key = id(module)
    if key not in holding:
        holding[key] = module, False  # in its place: those outside before those inside
        inside = [m for m in module._modules.values() if m is not None]
        within = [_is_or_holds(m, wanted, holding) for m in inside]
        holding[key] = module, any(within)
    return holding[key][1] or key in wanted
