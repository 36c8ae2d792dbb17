"""Passes through the site: each call there, the δ it was given, and which one a backward repeats.

Autograd numbers its nodes in the order of creation: the number of the node whose backward is
running tells which visit a checkpoint recomputes.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mixadv.errors import GameError
from mixadv.model.private_torch import running_backward, saving_hook, sequence_number


class Call(NamedTuple):
    """What a call at the site returned: enough to make a δ for it."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    mask: Tensor | None  # 1 at real tokens, broadcastable to the output; None where all are real
    ids: Tensor | None = None  # that an embedding was called with, None at other sites
    embedding: nn.Module | None = None
    owners: Tensor | None = None
    site: str = ""  # name of the module that was called, as `Site.names` has it

    @property
    def vocabulary(self) -> int:
        """How many rows the embedding has."""
        return getattr(self.embedding, "num_embeddings", 0)

    def empty(self) -> Tensor:
        """Return an uninitialised tensor of δ's shape, in at least fp32."""
        dtype = torch.promote_types(self.dtype, torch.float32)
        return torch.empty(self.shape, dtype=dtype, device=self.device)


def positions(mask: Tensor | None, shape: torch.Size) -> Tensor | int:
    """Return how many positions of a call play: tokens, or coordinates where there are none.

    Args:
        mask: 1 where δ may act, broadcastable to the output; None is everywhere.
        shape: of the output; `[B, n, d]` has tokens.
    """
    if mask is None:
        return shape[:2].numel() if len(shape) == 3 else shape.numel()
    places = mask.expand(shape) > 0
    return (places.any(-1) if len(shape) == 3 else places).sum()


Provide = Callable[[int, Call, Tensor], Tensor | None]


class Visit(NamedTuple):
    """One call at the site in a pass."""

    module: nn.Module
    call: Call
    delta: Tensor | None  # what was added to its output
    number: int  # of the node that autograd made next
    frame: Any  # the same for visits that are recomputed together, in their order


class Pass:
    """One run of a closure: its visits to the site, and what the model was called with.

    Args:
        provide: gives the δ of each call at the site.
        shared: calls of the model share one δ, so that `provide` numbers those at the site anew in
            each call of the model; else throughout the pass.
        whose: closure runs, the learner's or another.
    """

    def __init__(self, provide: Provide, shared: bool = False, whose: str = "closure") -> None:
        self.provide = provide
        self.shared = shared
        self.whose = whose
        self.places: list[Call] = []  # the first call of each number that `provide` is asked for
        self._first = 0  # the visit that has the number 0
        self.visits: list[Visit] = []
        self.begin = self.end = sequence_number()
        self.grad = torch.is_grad_enabled()
        self.recomputable = False
        self.told = False  # masks say where δ may act, not which tokens are real
        self.still: list[bool] = []  # for each call at the site, whether it ran under no_grad
        self.context: dict[str, Any] = {}  # arguments of the model's call
        self.within: list[dict[str, Any]] = []  # and of the modules within, from outside in
        self._recomputed: dict[tuple[int, int], int] = {}

    @property
    def calls(self) -> list[Call]:
        """The calls at the site, in their order."""
        return [visit.call for visit in self.visits]

    def enter(self) -> None:
        """Begin a call of the model."""
        self.within = []
        if self.shared:
            self._first = len(self.visits)

    def tokens(self) -> list[Mapping[str, Any]]:
        """Return where to look for masks and labels of tokens; the site's own mask comes last."""
        mask = self.visits[0].call.mask if self.visits and not self.told else None
        own = (
            [] if mask is None else [{"attention_mask": mask.reshape(*mask.shape[:2], -1)[..., 0]}]
        )
        return [self.context, *self.within, *own]

    def visit(
        self, module: nn.Module, call: Call, output: Tensor, number: int, frame: Any
    ) -> Tensor | None:
        """Record a call at the site and return its δ; for the arguments see `Visit`."""
        place = len(self.visits) - self._first
        if place == len(self.places):
            self.places.append(call)
        delta = self.provide(place, call, output)
        self.visits.append(Visit(module, call, delta, number, frame))
        return delta

    def holds(self, module: nn.Module, number: int) -> bool:
        """Return whether a node of this number may recompute a visit to the module."""
        within = self.begin <= number < self.end
        return within and any(visit.module is module for visit in self.visits)

    def recomputed_delta(self, module: nn.Module, number: int) -> Tensor | None:
        """Return the δ of the visit that the running node of the backward recomputes."""
        mine = [visit for visit in self.visits if visit.module is module]
        if len(mine) > 1 and self._nested():
            raise GameError(
                "The site lies in nested checkpoints and is called several times in a pass: which "
                "call is recomputed cannot be told. Checkpoint one level, or choose another site."
            )
        begun = [visit for visit in mine if visit.number <= number] or mine[:1]
        together = [visit for visit in mine if visit.frame == begun[-1].frame]
        key = running_backward(), number
        turn = self._recomputed[key] = self._recomputed.get(key, -1) + 1
        return together[turn % len(together)].delta

    def _nested(self) -> bool:
        """Return whether the recompute that runs has come to a checkpoint within a checkpoint."""
        code = getattr(saving_hook(), "__code__", None)
        codes = [getattr(visit.frame, "__code__", None) for visit in self.visits]
        return (code is not None and any(c is code for c in codes)) or not torch.is_grad_enabled()


def recomputing() -> bool:
    """Return whether a backward is running, i.e. this forward recomputes a checkpoint."""
    return running_backward() != -1
