"""Adapters of PEFT as members: megabytes each on one base, and many in one pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from mixadv.errors import GameError
from mixadv.mixtures.members import Member
from mixadv.model.replay import evaluating


class Adapter(Member):
    """An adapter of a `peft.PeftModel`, by its name there.

    Args:
        name: as in `model.load_adapter(path, name)` or `model.add_adapter(name, config)`.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def check(self, model: nn.Module) -> None:
        """Raise ValueError unless the model has the adapter."""
        if not is_peft(model):
            raise ValueError(
                f"Adapter({self.name!r}) needs a peft.PeftModel, and the model is a "
                f"{type(model).__name__}: Mixture([…], model=peft.get_peft_model(model, config))."
            )
        known: Any = model.peft_config
        if self.name not in known:
            raise ValueError(
                f"The model has no adapter {self.name!r}, only {', '.join(map(repr, known))}: "
                "call model.load_adapter(path, name) first."
            )

    @contextmanager
    def playing(self, model: nn.Module) -> Iterator[nn.Module]:
        """Make the adapter the active one; the one before, and what is trained, come back."""
        if any(getattr(module, "merged", False) is True for module in model.modules()):
            raise GameError(
                "An adapter is merged into the base, so no other adapter can be used: call "
                "model.unmerge_adapter() first."
            )
        peft: Any = model
        active, several = peft.active_adapter, list(peft.active_adapters)
        flags = [(p, p.requires_grad) for p in model.parameters()]
        with evaluating(model):
            try:
                peft.set_adapter(self.name, inference_mode=True)
                yield model
            finally:
                peft.set_adapter(active)
                if len(several) > 1:
                    peft.base_model.set_adapter(several)
                for parameter, flag in flags:
                    parameter.requires_grad_(flag)


def is_peft(model: Any) -> bool:
    """Return whether a model is a `peft.PeftModel`."""
    return hasattr(type(model), "active_peft_config")


def in_one_pass(members: Sequence[Member], model: Any) -> TypeGuard[Sequence[Adapter]]:
    """Return whether each row of a batch may have another of the members: those of LoRA."""
    return all(
        isinstance(member, Adapter) and model.peft_config[member.name].peft_type == "LORA"
        for member in members
    )


class ByRow:
    """The model with an adapter of its own for each row of its inputs.

    Args:
        model: of PEFT.
        members: its adapters.
        draw: maps a number of rows to numbers of members, `[rows]`.

    Attributes:
        rows: of each call so far.
    """

    def __init__(
        self, model: nn.Module, members: Sequence[Adapter], draw: Callable[[int], Tensor]
    ) -> None:
        self.model, self.members, self.draw = model, members, draw
        self.rows: list[int] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model; the rows are those of the first tensor."""
        tensors = (value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        first = next(tensors, None)
        if first is None or first.dim() == 0:
            raise ValueError(
                "The model was called without a tensor, so its rows cannot be counted."
            )
        self.rows.append(len(first))
        names = [self.members[int(number)].name for number in self.draw(len(first))]
        return self.model(*args, adapter_names=names, **kwargs)

    @contextmanager
    def playing(self) -> Iterator[ByRow]:
        """Evaluate while the body runs; hooks that PEFT leaves after an exception are removed."""
        found = {module: set(module._forward_pre_hooks) for module in self.model.modules()}
        with evaluating(self.model):
            try:
                yield self
            finally:
                for module, known in found.items():
                    for number in set(module._forward_pre_hooks) - known:
                        del module._forward_pre_hooks[number]
                        module._forward_pre_hooks_with_kwargs.pop(number, None)


def drawn(probabilities: Tensor, seed: int | None, rows: int) -> Tensor:
    """Return the number of a member for each row, drawn by the probabilities, `[rows]`.

    A fresh generator has the same seed in all programs: without one given, the system draws it.
    """
    source = torch.Generator()
    source.manual_seed(source.seed() if seed is None else seed)
    return torch.multinomial(probabilities, rows, replacement=True, generator=source)
