"""Where the adversary acts: finding the module, adding δ to its output, the mask of real tokens.

The inputs of the model are never touched (`inputs_embeds` is not `input_ids`: pooling, positions
and decoder shifts depend on the ids). A forward hook adds δ to the output of the site while a pass
runs, and is removed when the round ends. A call made while a backward recomputes a checkpoint gets
the δ of the visit it repeats; see `visits`.
"""

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from mixadv.errors import GameError
from mixadv.model.modules import INPUT, around, bound, find, unwrap
from mixadv.model.private_torch import running_number, saving_hook, sequence_number
from mixadv.model.visits import Call, Pass, Provide, recomputing

PER_TOKEN = ("attention_mask", "decoder_attention_mask", "labels")


class Site:
    """The modules at whose output (or, for `"input"`, at the model's own input) δ is added.

    Args:
        model: the model that the closure calls; wrapped or not.
        site: None for the input embedding that the encoder really calls (for a model without one,
            its own input), the name of a submodule, a submodule, `"input"`, or several of them.
    """

    def __init__(self, model: nn.Module, site: Any = None) -> None:
        self.model = model
        self._inner = unwrap(model)
        self.targets = find(model, site)
        self.current: Pass | None = None
        self._alive: list[weakref.ref[Pass]] = []
        self._handles: list[Any] = []
        self._numbers: dict[nn.Module, int] = {}
        self._masks: list[Tensor | None] = []

    @property
    def names(self) -> list[str]:
        """Names of the submodules, `"input"` for the model's own input."""
        return [name for name, _ in self.targets]

    def learning(self) -> AbstractContextManager[None]:
        """Return what to run the passes in that see what the site returns; see `CompiledSite`."""
        return nullcontext()

    @contextmanager
    def run(self, provide: Provide) -> Iterator[Pass]:
        """Make calls at the site add what `provide(index, call, output)` returns, unless None."""
        current = Pass(provide)
        self.prune()
        self._alive.append(weakref.ref(current))
        self.attach()
        self.current, self._masks = current, []
        try:
            yield current
            current.end = sequence_number()
        except BaseException:
            self.forget([current])
            raise
        finally:
            self.current, self._masks = None, []
            self._numbers.clear()

    def attach(self) -> None:
        """Register the hooks, once."""
        if self._handles:
            return
        for name, module in self.targets:
            if name == INPUT:
                self._pre(module, self._at_input)
            else:
                self._pre(module, self._note_number)
                hook = module.register_forward_hook(self._at_output, with_kwargs=True)
                self._handles.append(hook)
        for module in around(self.model, [m for _, m in self.targets]):
            self._pre(module, self._enter)
            hook = module.register_forward_hook(self._leave)
            self._handles.append(hook)

    def _pre(self, module: nn.Module, hook: Callable[..., Any]) -> None:
        handle = module.register_forward_pre_hook(hook, with_kwargs=True, prepend=True)
        self._handles.append(handle)

    def detach(self, force: bool = False) -> None:
        """Remove the hooks, unless a loss with recomputed passes still waits for its backward."""
        self.prune()
        if force or not self._alive:
            for handle in self._handles:
                handle.remove()
            self._handles.clear()

    def close(self) -> None:
        """Remove every hook."""
        self.detach(force=True)

    def forget(self, passes: list[Pass]) -> None:
        """Give up passes whose round is over: a traceback may keep them alive."""
        over = {id(current) for current in passes}
        self._alive = [ref for ref in self._alive if id(ref()) not in over]

    def prune(self) -> None:
        """Forget passes that no graph can recompute any more."""
        self._alive = [ref for ref in self._alive if ref() is not None]

    def not_called(self) -> str:
        """Say that a pass did not call the site."""
        modules = self._inner.named_modules()
        names = [name for name, m in modules if isinstance(m, nn.Embedding)]
        return (
            f"The site {self.names} was not called in the forward pass (a call that bypasses the "
            "module, or the wrong module). Name another with site=; the model's embeddings are "
            f"{names[:6]}."
        )

    def _enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if self.current is None or recomputing():
            return
        arguments = bound(module, args, kwargs)
        for features in [v for v in arguments.values() if isinstance(v, Mapping)]:
            arguments = {**features, **arguments}  # as of sentence-transformers, in one argument
        mask = arguments.get("attention_mask")
        usable = isinstance(mask, Tensor) and mask.dim() == 2
        inherited = self._masks[-1] if self._masks else None
        if not self._masks:
            self.current.within = []
        if not self._masks or module is self._inner:
            self.current.context = arguments
        self.current.within.append({k: arguments[k] for k in PER_TOKEN if k in arguments})
        self._masks.append(mask if usable else inherited)

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if self.current is not None and not recomputing() and self._masks:
            self._masks.pop()

    def _note_number(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self._numbers[module] = sequence_number()

    def _at_output(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        first = first_of(output)
        if not isinstance(first, Tensor) or not first.is_floating_point():
            what = f"a tensor of {first.dtype}" if isinstance(first, Tensor) else type(first)
            raise GameError(
                f"The site returns {what}, and δ is added to a floating-point tensor (or to the "
                "first of a tuple). Choose a module that returns one with site=."
            )
        delta = self._delta(module, first, args, kwargs)
        return None if delta is None else with_first(output, add(first, delta))

    def _at_input(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        if self.current is not None and not recomputing():
            self._numbers[module] = sequence_number()
        arguments = bound(module, args, kwargs)
        floats = [
            k for k, v in arguments.items() if isinstance(v, Tensor) and v.is_floating_point()
        ]
        preferred = getattr(unwrap(module), "main_input_name", None)
        name = preferred if preferred in floats else floats[0] if floats else None
        if name is None:
            raise GameError(
                f"The site is the model's own input, but it is called with {list(arguments)}, none "
                "of them a floating-point tensor. Choose a module with site=."
            )
        delta = self._delta(module, arguments[name], (), {})
        if delta is None:
            return None
        total = add(arguments[name], delta)
        if name in kwargs:
            return args, {**kwargs, name: total}
        where = list(arguments).index(name)
        return (*args[:where], total, *args[where + 1 :]), kwargs

    def _delta(self, module: nn.Module, output: Tensor, args: Any, kwargs: Any) -> Tensor | None:
        if recomputing():
            number = running_number()
            mine = [p for ref in self._alive if (p := ref()) and p.holds(module, number)]
            return mine[-1].recomputed_delta(module, number) if mine else None
        if self.current is None:
            return None
        number = self._numbers.get(module, self.current.begin)
        reentrant = self.current.grad and not torch.is_grad_enabled()
        pack = saving_hook()
        self.current.recomputable |= reentrant or pack is not None
        # A reentrant checkpoint runs its block without gradients: the node to look for is its own,
        # the last one made before.
        number -= int(reentrant)
        mask, entered = self._mask(output, args, kwargs), args[0] if args else kwargs.get("input")
        call = Call(output.shape, output.dtype, output.device, mask, *tokens_of(module, entered))
        delta = self.current.visit(module, call, output, number, pack or number)
        if delta is not None and delta.shape != output.shape:
            raise GameError(
                f"The site returned {list(output.shape)} in this pass but {list(delta.shape)} "
                "before. A closure is run several times on one batch and must be repeatable."
            )
        return delta

    def _mask(self, output: Tensor, args: Any, kwargs: Any) -> Tensor | None:
        if output.dim() < 3:
            return None
        fitting = (m for m in self._masks[::-1] if m is not None and m.shape == output.shape[:2])
        mask = next(fitting, None)
        if mask is None:
            ids = args[0] if args else None
            embeddings = [m for _, m in self.targets if isinstance(m, nn.Embedding)]
            padding = next((i for m in embeddings if (i := m.padding_idx) is not None), None)
            if padding is None or not isinstance(ids, Tensor) or ids.shape != output.shape[:2]:
                return None
            mask = ids != padding
        mask = (mask > 0).to(torch.promote_types(output.dtype, torch.float32))
        return mask.view(*mask.shape, *[1] * (output.dim() - 2))


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
    return type(output)((first, *output[1:])) if isinstance(output, (tuple, list)) else first


def add(output: Tensor, delta: Tensor) -> Tensor:
    """Return output + δ, summed in δ's precision and cast once (bf16 would swallow a small δ)."""
    return (output.to(delta.dtype) + delta).to(output.dtype)
