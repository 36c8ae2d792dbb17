"""Where the adversary acts on a compiled model: its graph reads δ from a slot.

Compiled code ignores hooks that come after it was made, so one hook stays on each module of the
site and does nothing while the slots are empty. δ must be there before the model runs: one eager
pass learns how the shape and the padding at the site follow from the inputs of the model. A graph
that is older than the hook would leave δ out; the hook counts the slots that it takes, so that no
such pass goes unnoticed.
"""

import functools
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mixadv.errors import GameError
from mixadv.model.masks import told, where_in
from mixadv.model.modules import compiled, find, is_input
from mixadv.model.no_site import NoSite
from mixadv.model.private_torch import is_mapped, more_graphs
from mixadv.model.site import Site
from mixadv.model.values import add, first_of, tokens_of, with_first
from mixadv.model.visits import Call, Pass, Provide, recomputing


def place(model: nn.Module, site: Any = None, acts: bool = True) -> Site:
    """Return the site of a model, compiled or not; the arguments are those of `Site`.

    Where nobody `acts` there is none, whatever `site` is.
    """
    if not acts:
        return NoSite(model)
    kind = CompiledSite if compiled(model, find(model, site)) else Site
    return kind(model, site)


class Pattern(NamedTuple):
    """How one call at the site follows from the inputs of the model."""

    module: nn.Module
    name: str  # the input whose leading sizes are those of the output
    sizes: int  # how many they are
    ids: str | None  # the input that the module itself is called with, None if there is none
    call: Call  # that was learned from


class CompiledSite(Site):
    """The site of a model that is compiled; see `Site`."""

    def __init__(self, model: nn.Module, site: Any = None) -> None:
        super().__init__(model, site)
        self._inside = [m for name, m in self.targets if not is_input(name)]
        self._patterns: list[Pattern] = []
        self._entered: list[Any] = []
        self._learning = False
        self._slots: list[Tensor] = []
        self._taken = 0
        self._dormant = [m.register_forward_hook(self._at_slot) for m in self._inside]

    @contextmanager
    def learning(self) -> Iterator[None]:
        """Run passes eagerly, to see what the site returns."""
        self.detach(force=True)
        self._patterns, self._learning = [], True
        try:
            with torch.compiler.set_stance("force_eager"):
                yield
        finally:
            self._learning = False
            self._entered.clear()
            self.detach(force=True)

    @contextmanager
    def run(
        self, provide: Provide, copies: int = 1, shared: bool = False, whose: str = "closure"
    ) -> Iterator[Pass]:
        """Make calls at the site add what `provide(index, call, output)` returns, unless None.

        Of the output, `provide` gets shape, dtype and device alone.
        """
        # Each shape has up to four graphs: clean, for δ, for the learner, the teacher's.
        with super().run(provide, copies, shared, whose) as current, _quiet(), more_graphs(4):
            try:
                yield current
            finally:
                self._slots = []

    def _register(self) -> None:
        if self._learning:
            super()._register()
            self._handles.append(self.model.register_forward_hook(self._learn, prepend=True))
            return
        self._pre(self.model, self._fill)
        for name, _ in self.targets:
            if is_input(name):  # hooks of the compiled model itself run outside of the graph
                self._pre(self.model, functools.partial(self._at_input, name))
        self._handles.append(self.model.register_forward_hook(self._verify))

    def close(self) -> None:
        """Remove every hook."""
        super().close()
        for handle in self._dormant:
            handle.remove()

    def _at_slot(self, module: nn.Module, args: Any, output: Any) -> Any:
        if not torch.compiler.is_compiling():
            if self._learning and self.current is not None:
                self._entered.append(args[0] if args else None)
            self._refuse_recomputation()
        if not self._slots:
            return None
        first = first_of(output)
        if self._taken >= len(self._slots) or self._slots[self._taken].shape != first.shape:
            self._taken = len(self._slots) + 1  # said after the pass, outside of the graph
            return None
        delta = self._slots[self._taken]
        self._taken += 1
        return with_first(output, add(first, delta))

    def _learn(self, module: nn.Module, args: Any, output: Any) -> None:
        """Note how the calls at the site follow from the inputs of the model."""
        if self.current is None or self._patterns or recomputing():
            return
        given = self._given()
        seen = [v for v in self.current.visits if any(v.module is m for m in self._inside)]
        if len(seen) != len(self._entered):
            raise GameError(
                f"The compiled model calls its site {self.names} under no_grad too, where its "
                "graph would add δ as well, with no way to the loss: compute that part without "
                "the module, name another with site=, or do not compile the model."
            )
        for visit, entered in zip(seen, self._entered, strict=True):
            call = visit.call
            shared = {name: _shared(value.shape, call.shape) for name, value in given.items()}
            name = max(shared, key=lambda name: shared[name], default="")
            ids = next((name for name, value in given.items() if _same(value, entered)), None)
            pattern = Pattern(visit.module, name, shared.get(name, 0), ids, call)
            where = where_in(self.where, self.current.whose)
            foretold = told(where, len(self._patterns), self._call(pattern))
            if not pattern.sizes or not _same(foretold.mask, call.mask):
                self._refuse_inputs()
            self._patterns.append(pattern)

    def _fill(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Make the δ of every call at the site, before the model runs."""
        self._refuse_recomputation()
        if self.current is None:
            return
        self._enter(module, args, kwargs)
        deltas = []
        where = where_in(self.where, self.current.whose)
        self.current.told = where is not None
        for pattern in self._patterns:
            index = len(self.current.visits)  # of several calls of the model in a pass too
            call = told(where, index, self._call(pattern), self._copies)
            deltas.append(self.current.visit(pattern.module, call, _stand_in(call), 0, 0))
        # Empty for a clean pass: it takes the same graph as a call outside of a round.
        self._slots, self._taken = [_leaf(d) for d in deltas if d is not None], 0

    def _verify(self, module: nn.Module, args: Any, output: Any) -> None:
        """Refuse a pass whose graph did not take every δ."""
        self._leave(module, args, output)
        slots, self._slots = self._slots, []
        if slots and self._taken != len(slots):
            raise GameError(
                f"The compiled model did not take δ at the site {self.names}. It ran before this "
                "game was made, and compiled code ignores hooks that come later: make the game "
                "before the model's first call, or call torch.compiler.reset() once after making "
                "it. Otherwise what the site returns changes its shape independently of the "
                "model's inputs: choose another site."
            )

    def _given(self) -> dict[str, Tensor]:
        assert self.current is not None
        return {k: v for k, v in self.current.context.items() if isinstance(v, Tensor)}

    def _call(self, pattern: Pattern) -> Call:
        """Return the call that a pattern foretells for the inputs the model is called with."""
        given = self._given()
        if pattern.name not in given or pattern.ids not in {None, *given}:
            self._refuse_inputs()
        sizes, device = given[pattern.name].shape[: pattern.sizes], given[pattern.name].device
        shape = torch.Size([*sizes, *pattern.call.shape[pattern.sizes :]])
        entered = None if pattern.ids is None else given[pattern.ids]
        tokens = tokens_of(pattern.module, entered)
        owned = self._owners(pattern.module, shape, device)
        call = Call(shape, pattern.call.dtype, device, None, *tokens, owned, pattern.call.site)
        return call._replace(mask=self._mask(pattern.module, _stand_in(call), entered))

    def _refuse_inputs(self) -> None:
        raise GameError(
            f"The model is compiled, and what its site {self.names} returns (the shape, or which "
            f"tokens are padding) cannot be told from its inputs {list(self._given())}: choose "
            "another site, or do not compile the model."
        )

    def _refuse_recomputation(self) -> None:
        if recomputing() and any(ref() is not None for ref in self._alive):
            raise GameError(
                f"The site {self.names} of the compiled model is recomputed in backward, where it "
                "would lack δ: choose a site outside of the checkpoint, or do not compile."
            )


def _stand_in(call: Call) -> Tensor:
    return torch.zeros((), dtype=call.dtype, device=call.device).expand(call.shape)


def _leaf(delta: Tensor) -> Tensor:
    # A constant δ would take another graph than one that is differentiated. Within vmap, a tensor
    # does not tell whether it requires grad: there every δ does.
    return delta if is_mapped(delta) or delta.requires_grad else delta.detach().requires_grad_()


@contextmanager
def _quiet() -> Iterator[None]:
    """Where warnings are errors, ignore the one of reading `.grad` of δ, which is no leaf.

    torch.compile reads it of whatever it is given, and itself only keeps the warning from being
    shown. Elsewhere filters stay as they are: a change makes warnings shown once appear again.
    """
    if all(action != "error" for action, *_ in warnings.filters):
        yield
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"The \.grad attribute of a Tensor that is not a leaf")
        yield


def _shared(a: torch.Size, b: torch.Size) -> int:
    """Return how many leading sizes are the same."""
    pairs = enumerate(zip(a, b, strict=False))
    return next((i for i, (x, y) in pairs if x != y), min(len(a), len(b)))


def _same(a: Any, b: Any) -> bool:
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return a is b
    return a is b or (a.dtype == b.dtype and torch.equal(a, b))
