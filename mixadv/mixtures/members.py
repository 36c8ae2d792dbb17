"""What a mixture draws: other weights of one model, another model, or a dropout mask."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from mixadv.model.parallel import swapped
from mixadv.model.replay import (
    RandomState,
    accelerators,
    evaluating,
    random_state,
    seeded,
    set_random_state,
)


class Member(ABC):
    """A pure strategy of the learner, which plays in the place of the mixture's model."""

    @abstractmethod
    def playing(self, model: nn.Module) -> Any:
        """Return a context that gives a module which is this member meanwhile, evaluating."""

    def check(self, model: nn.Module) -> None:  # noqa: B027
        """Raise ValueError unless the member can play in the place of the model."""

    def drawn_anew(self, seed: int) -> Member:
        """Return another draw of what the member is drawn from; itself where it is none."""
        return self


class Weights(Member):
    """The model with other values of some parameters or buffers, such as those of an adapter.

    Args:
        values: tensors by name, as in `model.state_dict()`; what is not named stays as it is.
    """

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        self.values = {name: value.detach() for name, value in values.items()}

    def check(self, model: nn.Module) -> None:
        """Raise ValueError unless the model has tensors of these names and shapes."""
        for name, value in self.replaced(model).items():
            if value.shape != self.values[name].shape:
                raise ValueError(
                    f"A member's {name!r} has the shape {list(self.values[name].shape)}, and the "
                    f"model's is {list(value.shape)}: members are weights of one model. Give whole "
                    "models, Mixture([a, b]), where they differ in shape."
                )

    def replaced(self, model: nn.Module) -> dict[str, Tensor]:
        """Return the model's own tensors of these names, and raise ValueError where one is none."""
        return _named(model, self.values)

    @contextmanager
    def playing(self, model: nn.Module) -> Iterator[nn.Module]:
        """Give the model the values while the body runs; its own come back, bit for bit."""
        own = self.replaced(model)
        values = {own[name]: value for name, value in self.values.items()}
        with evaluating(model), swapped(model, values):
            yield model


class Model(Member):
    """A model of its own."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    @contextmanager
    def playing(self, model: nn.Module) -> Iterator[nn.Module]:
        """Give the member's own model."""
        with evaluating(self.module):
            yield self.module


class Dropout(Member):
    """The model under one dropout mask: the same in each of its calls on a batch of one shape.

    Dropout that is a module drops; attention that drops by a function of its own does not.

    Args:
        seed: of the mask.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def check(self, model: nn.Module) -> None:
        """Raise ValueError unless the model drops something."""
        if not any(isinstance(m, _DropoutNd) and m.p > 0 for m in model.modules()):
            raise ValueError("The model has no dropout, so all dropout masks are the same model.")

    def drawn_anew(self, seed: int) -> Dropout:
        """Return a mask that another seed draws."""
        return Dropout(seed * 1_000_003 + self.seed)

    @contextmanager
    def playing(self, model: nn.Module) -> Iterator[nn.Module]:
        """Draw the mask anew in each call, from the seed; modes and random state come back."""
        found: list[RandomState] = []
        devices = accelerators(model.parameters())

        def before(module: nn.Module, args: Any) -> None:
            found.append(random_state(devices))
            set_random_state(seeded(devices, self.seed))

        def after(module: nn.Module, args: Any, output: Any) -> None:
            set_random_state(found.pop())

        handles = [
            model.register_forward_pre_hook(before),
            model.register_forward_hook(after, always_call=True),
        ]
        try:
            with evaluating(model):
                for module in model.modules():
                    if isinstance(module, _DropoutNd):
                        module.train()
                yield model
        finally:
            for handle in handles:
                handle.remove()


def _named(model: nn.Module, names: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the model's own tensors of these names."""
    own = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    if unknown := [name for name in names if name not in own]:
        raise ValueError(
            f"A member has {unknown[0]!r}, and the model has no tensor of this name: members are "
            f"named as in model.state_dict(), such as {next(iter(own), 'none')!r}."
        )
    return {name: own[name] for name in names}
