"""Reading a representation of each sample out of the model, while a pass runs.

    h = read(output of the source),   by default the first token of the encoder's last hidden state

side by side where the source is called several times in a pass, as by a model that compares two
texts. A hook on the source reads it: the model is not asked for hidden states it does not return.
On a compiled model the hook has to be there before the model's first call, and stays.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mixadv.errors import GameError, nearest
from mixadv.model.modules import compiled, unwrap
from mixadv.model.site import first_of
from mixadv.model.visits import recomputing


def first_token(output: Any) -> Tensor:
    """Return the first token of an encoder's last hidden state, `[B, d]`.

    The first token of a causal model has seen no other, and under left padding it is none: read
    another there.

    Args:
        output: what the encoder returned: a tensor `[B, n, d]`, or an output or tuple that starts
            with one. A tensor `[B, d]` is returned as it is.

    Example:
        >>> import torch
        >>> first_token(torch.zeros(2, 5, 3)).shape
        torch.Size([2, 3])
    """
    names = ("encoder_last_hidden_state", "last_hidden_state")
    hidden = next((h for name in names if (h := getattr(output, name, None)) is not None), None)
    hidden = first_of(output) if hidden is None else hidden
    return hidden[:, 0] if isinstance(hidden, Tensor) and hidden.dim() == 3 else hidden


def check_source(solver: Any) -> None:
    """Raise unless a solver's `source` is a name and its `representation` a function."""
    who = type(solver).__name__
    if not isinstance(solver.source, str | None):
        raise TypeError(f"{who}: source must be a submodule's name, got {solver.source!r}.")
    if not (solver.representation is None or callable(solver.representation)):
        raise TypeError(f"{who}: representation must be callable, got {solver.representation!r}.")


class Source(NamedTuple):
    """Where a representation comes from.

    Attributes:
        module: name of the submodule whose output is read; None for the base model of a Hugging
            Face model or of one it holds, and without one for what the model itself returns.
        read: called with that output, returns `[B, d]`.
    """

    module: str | None = None
    read: Callable[[Any], Tensor] = first_token


class Representation:
    """Reads a representation from the passes of a model."""

    def __init__(self, model: nn.Module, source: Source) -> None:
        self.source = source
        self.name, self.module = _find(unwrap(model), source.module)
        self._kept: list[Any] = []
        self.active = False
        self._dormant = []
        if self.module is unwrap(model):
            self.module = model  # whose hooks run outside of what is compiled
        elif compiled(model, [(self.name, self.module)]):
            self._dormant = [self.module.register_forward_hook(self._read)]

    @contextmanager
    def run(self) -> Iterator[None]:
        """Keep what the body's pass returns at the source, for `take`."""
        self._kept, self.active = [], True
        hooks = [] if self._dormant else [self.module.register_forward_hook(self._read)]
        try:
            yield
            if not self._kept:
                raise GameError(
                    f"The module {self.name!r}, whose output is the representation, was not called "
                    "in the forward pass (or ran in a graph that was compiled before this game was "
                    "made). Name another with source=."
                )
        except BaseException:
            self._kept = []  # and the graphs they belong to
            raise
        finally:
            self.active = False
            for hook in hooks:
                hook.remove()

    def take(self) -> Tensor:
        """Return the representation of what was kept, in at least fp32, and keep it no longer."""
        # Read after the pass: within a reentrant checkpoint it would have no gradient.
        outputs, self._kept = self._kept, []
        try:
            kept = [self.source.read(output) for output in outputs]
        except (AttributeError, IndexError, KeyError, TypeError) as error:
            raise GameError(
                f"representation= failed on what {self.name!r} returned, "
                f"{type(outputs[0]).__name__}: {error}. Give a function of that, or name another "
                "module with source=."
            ) from error
        return torch.cat([self._checked(h) for h in kept], 1)

    def _checked(self, kept: Any) -> Tensor:
        if not isinstance(kept, Tensor) or kept.dim() != 2 or not kept.is_floating_point():
            what = list(kept.shape) if isinstance(kept, Tensor) else type(kept).__name__
            raise GameError(
                f"The representation read at {self.name!r} must be [B, d] in floating point, got "
                f"{what}. Give representation=, a function of what that module returns, or name "
                "another module with source=."
            )
        return kept.to(torch.promote_types(kept.dtype, torch.float32))

    def close(self) -> None:
        """Remove the hook that stays on a compiled model."""
        for hook in self._dormant:
            hook.remove()

    def _read(self, module: nn.Module, args: Any, output: Any) -> None:
        if self.active and (torch.compiler.is_compiling() or not recomputing()):
            self._kept.append(output)


def _find(model: nn.Module, name: str | None) -> tuple[str, nn.Module]:
    if name is None:
        # The model's own, or that of the encoder it holds; adapters wrap one in another.
        base = next((m for m in model.modules() if hasattr(m, "base_model")), model)
        while (inner := getattr(base, "base_model", base)) is not base:
            base = inner
        found = next((n for n, m in model.named_modules() if m is base), "")
        return found or type(model).__name__, base if isinstance(base, nn.Module) else model
    modules = dict(model.named_modules())
    if name not in modules:
        raise ValueError(f"source: the model has no module {name!r}.{nearest(name, modules, 3)}")
    return name, modules[name]
