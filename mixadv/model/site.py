"""Where the adversary acts: finding the module, adding δ to its output, the mask of real tokens.

The inputs of the model are never touched (`inputs_embeds` is not `input_ids`: pooling, positions
and decoder shifts depend on the ids). A forward hook adds δ to the output of the site while a pass
runs, and is removed when the round ends. A call made while a backward recomputes a checkpoint gets
the δ of the visit it repeats; see `visits`.
"""

import functools
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from mixadv.errors import GameError
from mixadv.model.masks import (
    Around,
    Where,
    batch_is_second,
    owners,
    placeholders,
    real_tokens,
    told,
    where_in,
    without_placeholders,
)
from mixadv.model.modules import bound, find, is_input, unwrap
from mixadv.model.private_torch import (
    in_reentrant_checkpoint,
    running_number,
    saving_hook,
    sequence_number,
)
from mixadv.model.values import add, chosen_input, copies, first_of, given, tokens_of, with_first
from mixadv.model.visits import Call, Pass, Provide, recomputing
from mixadv.model.walk import around

PER_TOKEN = ("attention_mask", "decoder_attention_mask", "labels")


class Site:
    """The modules at whose output (or, for `"input"`, at the model's own input) δ is added.

    Args:
        model: the model that the closure calls; wrapped or not.
        site: None for the input embedding that the encoder really calls (for a model without one,
            its own input), the name of a submodule, a submodule, `"input"`, or several of them.

    Attributes:
        named: whether the user said which modules.
        where: where δ may act in the round that is open; None is at real tokens.
        unsure: modules of which it is not known whether the batch comes first.
        apart: modules of whose rows each is a sample, whatever map the model is called with.
        packed: whether the model is told of texts in rows.
        constant: names of arguments of the model that are not of the batch, whatever their sizes.
    """

    def __init__(self, model: nn.Module, site: Any = None) -> None:
        self.model = model
        self._inner = unwrap(model)
        self.targets = find(model, site)
        self.named = site is not None
        self.current: Pass | None = None
        self._alive: list[weakref.ref[Pass]] = []
        self._handles: list[Any] = []
        self._numbers: dict[nn.Module, int] = {}
        self.where: Where = None
        self.unsure: set[nn.Module] = set()
        self.apart: set[nn.Module] = set()
        self.packed = False
        self.constant: set[str] = set()
        self._turned: dict[nn.Module, bool] = {}
        self._around = [Around()]  # and one more for each call that runs
        self._copies = 1
        self._places: list[int] = []  # ids whose embeddings the model overwrites
        self._still: dict[str, list[bool]] = {}  # of the last pass of each closure

    @property
    def names(self) -> list[str]:
        """Names of the submodules, `"input"` for the model's own input."""
        return [name for name, _ in self.targets]

    def learning(self) -> AbstractContextManager[None]:
        """Return what to run the passes in that see what the site returns; see `CompiledSite`."""
        return nullcontext()

    @contextmanager
    def run(
        self, provide: Provide, copies: int = 1, shared: bool = False, whose: str = "closure"
    ) -> Iterator[Pass]:
        """Make calls at the site add what `provide(index, call, output)` returns, unless None.

        The batch is stacked in so many copies; `shared` as for `Pass`; `whose` closure runs.
        """
        current = Pass(provide, shared, whose)
        self.prune()
        self._alive.append(weakref.ref(current))
        self.attach()
        self.current, self._around, self._copies = current, [Around()], copies
        try:
            yield current
            current.end = sequence_number()
            if current.grad:
                self._still[whose] = current.still
        except BaseException:
            self.forget([current])
            raise
        finally:
            self.current, self._around = None, [Around()]
            self._numbers.clear()

    def attach(self) -> None:
        """Register the hooks, once."""
        if not self._handles:
            self._places = placeholders(self._inner)  # once a round: configurations answer slowly
            self._register()

    def _register(self) -> None:
        for name, module in self.targets:
            if is_input(name):
                self._pre(module, functools.partial(self._at_input, name))
                continue
            self._pre(module, self._note_number)
            self._handles.append(module.register_forward_hook(self._at_output, with_kwargs=True))
        for module in around(self.model, [m for _, m in self.targets]):
            self._pre(module, self._enter)
            self._handles.append(module.register_forward_hook(self._leave))

    def _pre(self, module: nn.Module, hook: Callable[..., Any]) -> None:
        handle = module.register_forward_pre_hook(hook, with_kwargs=True, prepend=True)
        self._handles.append(handle)

    def detach(self, force: bool = False) -> None:
        """Remove the hooks, unless a loss with recomputed passes still waits for its backward."""
        self.prune()
        if force or not self._alive:
            while self._handles:
                self._handles.pop().remove()

    def close(self) -> None:
        """Remove every hook."""
        self.detach(force=True)

    def forget(self, passes: list[Pass]) -> None:
        """Give up passes whose round is over: a traceback may keep them alive."""
        self._alive = [ref for ref in self._alive if ref() not in passes]

    def prune(self) -> None:
        """Forget passes that no graph can recompute any more."""
        self._alive = [ref for ref in self._alive if ref() is not None]

    def not_called(self) -> str:
        """Say that a pass did not call the site."""
        names = [n for n, m in self._inner.named_modules() if isinstance(m, nn.Embedding)]
        return (
            f"The site {self.names} was not called in the forward pass (a call that bypasses the "
            "module, or the wrong module). Name another with site=; the model's embeddings are "
            f"{names[:6]}."
        )

    def _enter(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        if self.current is None or recomputing():
            return None
        arguments = given(module, args, kwargs)
        if outermost := len(self._around) == 1:
            self.current.enter()
        if outermost or module is self._inner:
            self.current.context = arguments
        self.current.within.append({k: arguments[k] for k in PER_TOKEN if k in arguments})
        self._around.append(self._around[-1].within(arguments))
        return (copies(args), copies(kwargs)) if outermost else None

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if self.current is not None and not recomputing() and len(self._around) > 1:
            self._around.pop()

    def _note_number(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self._numbers[module] = sequence_number()

    def _at_output(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        if not isinstance(first := first_of(output), Tensor) or not first.is_floating_point():
            what = f"a tensor of {first.dtype}" if isinstance(first, Tensor) else type(first)
            raise GameError(
                f"The site returns {what}, and δ is added to a floating-point tensor (or to the "
                "first of a tuple). Choose a module that returns one with site=."
            )
        name = next(name for name, target in self.targets if target is module)
        delta = self._delta(name, module, first, args[0] if args else kwargs.get("input"))
        return None if delta is None else with_first(output, add(first, delta))

    def _at_input(self, site: str, module: nn.Module, args: Any, kwargs: Any) -> Any:
        if self.current is not None and not recomputing():
            self._numbers[module] = sequence_number()
        arguments = bound(module, args, kwargs)
        name = chosen_input(site, module, arguments)
        delta = self._delta(site, module, arguments[name], None)
        if delta is None:
            return None
        total = add(arguments[name], delta)
        if name in kwargs:
            return args, {**kwargs, name: total}
        where = list(arguments).index(name)
        return (*args[:where], total, *args[where + 1 :]), kwargs

    def _delta(self, name: str, module: nn.Module, output: Tensor, entered: Any) -> Tensor | None:
        if recomputing():
            number = running_number()
            mine = [p for ref in self._alive if (p := ref()) and p.holds(module, number)]
            return mine[-1].recomputed_delta(module, number) if mine else None
        if self.current is None:
            return None
        number = self._numbers.get(module, self.current.begin)
        reentrant = in_reentrant_checkpoint(self.current.grad)
        if self._is_still(self.current, reentrant):
            return None
        pack = saving_hook()
        self.current.recomputable |= reentrant or pack is not None
        # A reentrant checkpoint runs its block without gradients: the node to look for is its own,
        # the last one made before.
        number -= int(reentrant)
        contexts = [self.current.context, *self.current.within]
        turned = batch_is_second(contexts, output, entered, self._turned.get(module))
        if turned is not None:
            self.orient(module, turned)
        elif module not in self._turned:
            self.unsure.add(module)
        if turned := self.second(module):
            output = output.transpose(0, 1)
            entered = entered.T if isinstance(entered, Tensor) and entered.dim() == 2 else entered
        mask = self._mask(module, output, entered)
        ids = tokens_of(module, entered)
        owned = self._owners(module, output.shape, output.device)
        call = Call(output.shape, output.dtype, output.device, mask, *ids, owned, name)
        where = where_in(self.where, self.current.whose)
        call = told(where, len(self.current.visits), call, self._copies)
        self.current.told = where is not None
        delta = self.current.visit(module, call, output, number, pack or number)
        if delta is not None and delta.shape != output.shape:
            raise GameError(
                f"The site returned {list(output.shape)} in this pass but {list(delta.shape)} "
                "before. A closure is run several times on one batch and must be repeatable."
            )
        return delta.transpose(0, 1) if turned and delta is not None else delta

    @contextmanager
    def forgetting(self) -> Iterator[None]:
        """Forget at the end what is found out meanwhile of the rows of what modules return."""
        found = {*self.unsure}, {*self.apart}, {**self._turned}, self.packed
        try:
            yield
        finally:
            self.unsure, self.apart, self._turned, self.packed = found

    def orient(self, module: nn.Module, second: bool) -> None:
        """Note whether the batch is the second dimension of what a module returns."""
        self._turned[module] = second
        self.unsure.discard(module)

    def second(self, module: nn.Module) -> bool:
        """Return whether the batch is the second dimension of what a module returns."""
        return self._turned.get(module, False)

    def _owners(self, module: nn.Module, shape: torch.Size, device: torch.device) -> Tensor | None:
        """Return the sample of each row, or token, of what a module returned, if it is known."""
        assert self.current is not None
        apart = module in self.apart
        return None if apart else owners(self.current.context, shape, device, self.packed)

    def _mask(self, module: nn.Module, output: Tensor, entered: Any) -> Tensor | None:
        """Return 1 at real tokens of what the site returned, as far as it is known."""
        assert self.current is not None
        at_input = module is self._inner
        if output.dim() < 2 or (output.dim() == 2 and not at_input):
            return None
        inputs = self.current.context if at_input else {}
        embeddings = [m for _, m in self.targets if isinstance(m, nn.Embedding)]
        mask = real_tokens(output, self._around[-1].masks, inputs, entered, embeddings)
        mask = without_placeholders(mask, self._places, output, entered)
        if mask is None:
            return None
        mask = (mask > 0).to(torch.promote_types(output.dtype, torch.float32))
        return mask.view(*mask.shape, *[1] * (output.dim() - 2))

    def _is_still(self, current: Pass, reentrant: bool) -> bool:
        """Return whether the closure makes a call under no_grad: it is not on the way to the loss.

        A pass that is run under no_grad itself goes by the last one that was not.
        """
        number = len(current.still)
        still = not torch.is_grad_enabled() and not reentrant
        if not current.grad:
            before = self._still.get(current.whose, [])
            still = number < len(before) and before[number]
        current.still.append(still)
        return still
