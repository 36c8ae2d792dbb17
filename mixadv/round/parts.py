"""What each sample adds to the objective of a round."""

from typing import final

import torch
from torch import Tensor

from mixadv.maths.divergence import Divergence
from mixadv.model.closure import MeanOver
from mixadv.players.strategy import Strategy
from mixadv.round.gains import losses
from mixadv.round.routes import readings
from mixadv.round.stage import Stage
from mixadv.round.wrapped import Wrapped


@final
class Parts(Wrapped):
    """A stage that gives means over samples to an objective, and knows of which values.

        J = Σ_k c_k·m_k,   m_k the mean of v_k over samples:   sample b has Σ_k c_k·v_kb

    c_k is ∂J/∂m_k, so a solver adds its terms up as it likes. A strategy is played whole, also
    where the solver would draw a particle for each sample. No gradient reaches θ.
    """

    def __init__(self, stage: Stage) -> None:
        super().__init__(stage)
        self._of = stage
        self._means: list[Tensor] = []
        self._values: list[Tensor] = []

    def plain_loss(self) -> Tensor:
        return self.loss()

    def loss(self, q: Strategy | None = None, last: bool = True, clean: bool = False) -> Tensor:
        if q is None:
            return self._mean(self._of.clean().loss)
        each, _ = readings(self._of.passes, q, losses, auto=False)
        return self._expected(q, each)

    def divergence(
        self,
        q: Strategy,
        kind: str | Divergence,
        fixed: bool = False,
        sampled: bool = False,
        over: MeanOver = "samples",
    ) -> Tensor:
        return self._expected(*self._of.divergences(q, kind, fixed, False, over))

    def proximal(self, kind: str | Divergence, over: MeanOver = "samples") -> Tensor:
        return self._mean(self._of.proximals(kind, over))

    def of_samples(self, objective: Tensor) -> Tensor:
        """Return an objective of these means apart by samples, `[B]`.

        It is `[1]`, the objective itself, where not every term is known per sample.
        """
        whole = objective.detach().reshape(1)
        sizes = {len(v) if v.dim() else 0 for v in self._values}
        if len(sizes) != 1 or 0 in sizes or not objective.requires_grad:
            return whole
        factors = torch.autograd.grad(objective, self._means, materialize_grads=True)
        each = sum(c * v for c, v in zip(factors, self._values, strict=True))
        assert isinstance(each, Tensor)
        known = torch.isclose(each.mean(), whole[0], rtol=1e-4, atol=0.0, equal_nan=True)
        return each if known else whole

    def _expected(self, q: Strategy, values: Tensor) -> Tensor:
        """Return the mean of what a strategy expects, of values `[M, B]` or `[M, 1]`."""
        each = (q.weights * values).sum(0)
        return self._mean(each if values.shape[1] > 1 else each.mean())

    def _mean(self, values: Tensor) -> Tensor:
        wide = values.detach().to(torch.promote_types(values.dtype, torch.float32))
        self._values.append(wide)
        self._means.append(wide.mean().requires_grad_())
        return self._means[-1]
