"""Checks of arguments and of checkpoints: what is wrong, and what to write instead."""

import math
import sys
from collections.abc import Iterable, Mapping
from typing import Any


def check_flag(who: str, name: str, value: Any) -> None:
    """Raise unless the value is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{who}: {name} must be True or False, got {value!r}.")


def check_integer(who: str, name: str, value: Any, least: int) -> None:
    """Raise unless the value is a whole number of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{who}: {name} must be an integer, got {value!r}.")
    if value < least:
        raise ValueError(f"{who}: {name} must be at least {least}, got {value}.")
    _check_size(who, name, value)


def check_number(
    who: str, name: str, value: Any, least: float = 0.0, most: float = math.inf
) -> None:
    """Raise unless the value is a finite number between `least` and `most`."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{who}: {name} must be a number, got {value!r}.")
    if not abs(value) <= sys.float_info.max or not least <= value <= most:
        bounds = f"at least {least:g}" if most == math.inf else f"between {least:g} and {most:g}"
        raise ValueError(f"{who}: {name} must be finite and {bounds}, got {value!r}.")
    _check_size(who, name, value)


def _check_size(who: str, name: str, value: float) -> None:
    if isinstance(value, int) and abs(value) > sys.maxsize:
        raise ValueError(f"{who}: {name} must be finite and fit into 64 bits, got {value}.")


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


def check_function(what: str, value: Any) -> None:
    """Raise TypeError unless what a round calls can be called."""
    if not callable(value):
        raise TypeError(f"{what}, got {value!r}.")


def check_backward(value: Any) -> None:
    """Raise unless a round can deliver its gradients by a function, as often as it has to."""
    check_function("backward must be a function of a loss", value)
    owner = getattr(value, "__self__", None)
    engine = type(owner).__name__.startswith("DeepSpeedEngine")
    if engine or getattr(owner, "deepspeed_engine_wrapped", None) is not None:
        raise TypeError(
            "DeepSpeed counts each backward as one of a batch, Accelerate steps within it, and a "
            "round may have several: write backward(game.loss(closure)), with that backward."
        )
