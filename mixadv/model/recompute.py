"""One graph at a time: passes of an objective that are run again for their backward.

    ∇θ J(f(X₀), …, f(X_M)) = Σ_m (∂J/∂f(X_m)) · ∂f(X_m)/∂θ

Each f(X_m) but the last is computed without a graph. The backward of J then stops at its outputs,
and goes on through each of them in turn when it has been run again.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from mixadv.errors import GameError
from mixadv.model.closure import Reading
from mixadv.model.visits import Provide

NO_GRADIENT = (
    "The backward of the objective left no gradient on {}. A custom `backward=` must call backward "
    "on the loss it is given, without `inputs=`."
)


class Cut:
    """The passes since the last optimizer step whose graphs were not kept."""

    def __init__(self) -> None:
        self.passes: list[tuple[Reading, Provide]] = []  # outputs as leaves, what the site added
        self.more = False  # another backward follows that of the pass that runs

    def off(self, reading: Reading, provide: Provide) -> Reading:
        """Return a reading as leaves, to which its objective is differentiated first."""
        leaves = [
            None if x is None else x.detach().requires_grad_(x.is_floating_point())
            for x in _outputs(reading)
        ]
        loss, predictions, hidden = leaves
        assert loss is not None
        kept = reading._replace(loss=loss, predictions=predictions, hidden=hidden)
        self.passes.append((kept, provide))
        self.more = True
        return kept

    def clear(self) -> None:
        """Forget the passes: weights have changed."""
        self.passes.clear()
        self.more = False

    def leaves(self) -> list[Tensor]:
        """Return what an objective is differentiated to besides weights and points."""
        return [x for reading, _ in self.passes for x in _leaves(reading)]

    def parts(
        self, objective: Tensor, steps: bool, run: Callable[[Provide], Reading]
    ) -> Iterator[tuple[Tensor, bool]]:
        """Yield what to differentiate, one after another, for an objective's gradient.

        First the objective, to the outputs of passes that were cut off, and then those of them that
        it needs; each with whether an optimizer step follows it, where one follows the objective.
        """
        if not self.passes:
            yield objective, steps
            return
        factors: list[Tensor] = []  # 1/accumulation, a loss scale: what multiplies the objective
        objective.register_hook(lambda g: factors.append(g.detach()))
        yield objective, False
        needed = [p for p in self.passes if any(x.grad is not None for x in _leaves(p[0]))]
        if not factors or (not needed and _reaches(objective, self.leaves())):
            raise GameError(NO_GRADIENT.format("passes that are run again"))
        if steps and not needed:
            needed = self.passes[-1:]  # with zeros: a last backward, which processes wait for
        for reading, provide in needed:
            last = steps and reading is needed[-1][0]
            self.more = not last
            pairs = zip(_outputs(run(provide)), _outputs(reading), strict=True)
            known = [(x, leaf) for x, leaf in pairs if x is not None and leaf is not None]
            outputs = [x for x, leaf in known if leaf.requires_grad]
            gradients = [_over(leaf, factors[0]) for _, leaf in known if leaf.requires_grad]
            part: Any = _Seeded.apply(objective.detach(), gradients, *outputs)
            yield part, last


class _Seeded(torch.autograd.Function):
    """A zero whose backward gives outputs of a pass the gradients that are known already."""

    @staticmethod
    def forward(ctx: Any, like: Tensor, gradients: list[Tensor], *outputs: Tensor) -> Tensor:
        ctx.gradients = gradients
        return torch.zeros_like(like)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        (factor,) = upstream
        wide = [(g, torch.promote_types(g.dtype, factor.dtype)) for g in ctx.gradients]
        return None, None, *[(factor * g.to(w)).to(g.dtype) for g, w in wide]


def _over(leaf: Tensor, factor: Tensor) -> Tensor:
    """Take a leaf's gradient off it, and return it over what has multiplied it."""
    gradient, leaf.grad = leaf.grad, None
    if gradient is None:
        return torch.zeros_like(leaf)
    return torch.where(factor == 0, torch.zeros_like(gradient), gradient / factor)


def _reaches(objective: Tensor, leaves: list[Tensor]) -> bool:
    """Return whether an objective depends on one of the leaves."""
    wanted, seen = {id(leaf) for leaf in leaves}, set()
    nodes = [objective.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            if id(getattr(node, "variable", None)) in wanted:
                return True
            nodes += [parent for parent, _ in node.next_functions]
    return False


def _leaves(reading: Reading) -> list[Tensor]:
    return [x for x in _outputs(reading) if x is not None and x.requires_grad]


def _outputs(reading: Reading) -> list[Tensor | None]:
    return [reading.loss, reading.predictions, reading.hidden]
