"""The library's one exception, and help with names."""

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any


class GameError(RuntimeError):
    """A round could not be played as asked; the message says what to change.

    Raised where no built-in exception fits. Weights, buffers, modes, flags, hooks and the random
    state are as they were before the call; gradients too, unless a pass had delivered them already.
    """


def nearest(name: object, known: Iterable[str], most: int = 1) -> str:
    """Return " Did you mean …?" with the known names nearest to `name`, or nothing."""
    names = [n for n in known if n]
    near = difflib.get_close_matches(str(name), names, most, cutoff=0.5)
    near = near or [n for n in names if n.endswith(f".{name}")][:most]
    return f" Did you mean {' or '.join(map(repr, near))}?" if near else ""


def build(
    what: str,
    registry: Mapping[str, type[Any]],
    name: Any,
    parameters: dict[str, Any],
    words: Mapping[str, str] | None = None,
) -> Any:
    """Return what the registry has under a name, a dataclass, made with the parameters.

    `words` has our names by those that others give to the same, with a dot where ours is a class.

    Raises:
        ValueError: for an unknown name or hyper-parameter, with the nearest one.
    """
    if name not in registry:
        raise ValueError(
            f"Unknown {what} {name!r}.{nearest(name, registry)} There are {', '.join(registry)}."
        )
    if wrong := unknown_parameter(registry[name], parameters, words or {}):
        raise ValueError(wrong)
    return registry[name](**parameters)


def unknown_parameter(
    cls: type[Any], parameters: Iterable[str], words: Mapping[str, str]
) -> str | None:
    """Return what is wrong with the first parameter that a dataclass does not take, if one is."""
    known = [f.name for f in fields(cls) if f.init]
    for parameter in parameters:
        if parameter not in known:
            ours = words.get(parameter, "")
            there = ours in known or "." in ours  # a class of its own
            meant = f" Here it is {ours!r}." if there else nearest(parameter, known)
            lead = f"{cls.__name__} has no hyper-parameter {parameter!r}."
            return f"{lead}{meant} It has {', '.join(known)}."
    return None
