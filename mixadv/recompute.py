"""One graph at a time: passes of an objective that are run again for their backward.

    ∇θ J(f(X₀), …, f(X_M)) = Σ_m (∂J/∂f(X_m)) · ∂f(X_m)/∂θ

Each f(X_m) but the last is computed without a graph. The backward of J then stops at its outputs,
and goes on through each of them in turn when it has been run again.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from mixadv.closure import Reading
from mixadv.errors import GameError
from mixadv.site import Provide

NO_GRADIENT = (
    "The backward of the objective left no gradient on {}. A custom `backward=` must call backward "
    "on the loss it is given, without `inputs=`."
)


class Cut:
    """The passes of an objective whose graphs were not kept."""

    def __init__(self) -> None:
        self.passes: list[tuple[Reading, Provide]] = []

    def off(self, reading: Reading, provide: Provide) -> Reading:
        """Return a reading as leaves, to which its objective is differentiated first."""
        leaves = [None if x is None else x.detach().requires_grad_() for x in _outputs(reading)]
        loss, predictions, hidden = leaves
        assert loss is not None
        kept = reading._replace(loss=loss, predictions=predictions, hidden=hidden)
        self.passes.append((kept, provide))
        return kept

    def leaves(self) -> list[Tensor]:
        """Return what an objective is differentiated to besides weights and points."""
        return [x for reading, _ in self.passes for x in _outputs(reading) if x is not None]

    def parts(
        self, objective: Tensor, run: Callable[[Provide], Reading]
    ) -> Iterator[tuple[Tensor, bool]]:
        """Yield what to differentiate for an objective's gradient, and whether it is the last.

        First the objective, to the outputs of passes that were cut off; then each of them.
        """
        factors: list[Tensor] = []  # 1/accumulation, a loss scale: what multiplies the objective
        if self.passes:
            objective.register_hook(lambda g: factors.append(g.detach()))
        yield objective, not self.passes
        while self.passes:
            reading, provide = self.passes.pop(0)
            if not factors:
                raise GameError(NO_GRADIENT.format("passes that are run again"))
            pairs = zip(_outputs(run(provide)), _outputs(reading), strict=True)
            known = [(x, leaf.grad) for x, leaf in pairs if x is not None and leaf is not None]
            outputs = [x for x, gradient in known if gradient is not None]
            gradients = [gradient / factors[0] for _, gradient in known if gradient is not None]
            yield _Seeded.apply(objective.detach(), gradients, *outputs), not self.passes  # pyright: ignore


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


def _outputs(reading: Reading) -> list[Tensor | None]:
    return [reading.loss, reading.predictions, reading.hidden]
