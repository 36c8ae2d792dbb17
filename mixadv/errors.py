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


def check_entries(what: str, state: Any, needed: Iterable[str]) -> None:
    """Raise ValueError unless a part of a checkpoint has the entries that it is written with."""
    missing = [key for key in needed if not isinstance(state, Mapping) or key not in state]
    if missing:
        found = list(state) if isinstance(state, Mapping) else type(state).__name__
        raise ValueError(
            f"The checkpoint's {what} lacks {', '.join(missing)} and has {found}: load what "
            "state_dict() returned."
        )


def check_kinds(what: str, state: Mapping[str, Any], kinds: Mapping[str, Any]) -> None:
    """Raise ValueError unless entries of a checkpoint are of their kinds; `int` is a count."""
    for name, kind in kinds.items():
        value = state[name]
        fits = isinstance(value, kind) and not isinstance(value, bool)
        if not fits or (kind is int and not 0 <= value < 2**63) or value != value:
            raise ValueError(
                f"The checkpoint's {what} has {value!s:.40} as {name}: load what state_dict() "
                "returned."
            )


def build(
    what: str, registry: Mapping[str, type[Any]], name: Any, parameters: dict[str, Any]
) -> Any:
    """Return what the registry has under a name, a dataclass, made with the parameters.

    Raises:
        ValueError: for an unknown name or hyper-parameter, with the nearest one.
    """
    if name not in registry:
        raise ValueError(
            f"Unknown {what} {name!r}.{nearest(name, registry)} There are {', '.join(registry)}."
        )
    cls = registry[name]
    known = [f.name for f in fields(cls)]
    for parameter in parameters:
        if parameter not in known:
            raise ValueError(
                f"{cls.__name__} has no hyper-parameter {parameter!r}."
                f"{nearest(parameter, known)} It has {', '.join(known)}."
            )
    return cls(**parameters)
