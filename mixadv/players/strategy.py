"""What the adversary plays: particles with log-weights on the simplex.

    q = Σ_m w_m δ_(δ_m)

a pure strategy when there is one particle, a mixed one when there are more. A particle is a list of
tensors, one per call at the site. Weights are per sample where the payoff of each sample is known,
else one per batch.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mixadv.errors import GameError
from mixadv.maths import mirror
from mixadv.maths.geometry import Norm, Per, norms, of_samples
from mixadv.model.visits import Call, positions
from mixadv.players.ascent import Draw
from mixadv.players.moments import Moments, adam, turned
from mixadv.players.rows import by_row, mean_where, of_rows, once, repeat_mask, repeat_owners

Rule = Callable[[int, Tensor, Tensor, Tensor | None, Draw, Tensor | None], Tensor]
"""`rule(index, δ, gradient, mask, draw, owners)`: where δ `[B, ...]` of a call moves."""

Memory = Sequence[Moments | None]


class Strategy:
    """Particles `[M, B, ...]` per call at the site, with log-weights `[M, B]` or `[M, 1]`.

    Never changed once it is made: what moves or weighs returns another one.

    Args:
        points: one tensor per call at the site, `[M, B, ...]`, in at least fp32.
        masks: one per call, broadcastable to `[B, ...]`, None where all coordinates are real.
        log_weights: `[M, B]` (per sample) or `[M, 1]` (per batch), which sum to 1 over M; None
            weighs all particles alike.
        owners: one per call, the sample `[R]` that each row belongs to, or `[R, n]` the text of
            each token of packed rows; None where there are as many rows as samples, or it is not
            known.
        unit: what one unit of length is at the site, or at each call; the attribute `units` has
            one for each.
        moments: one per call, what an ascent remembers of its gradients; empty at its start.

    Example:
        >>> q = Strategy([torch.tensor([[[1.0]], [[3.0]]])])
        >>> q.size, q.mean().points[0].tolist()
        (2, [[[2.0]]])
    """

    def __init__(
        self,
        points: Sequence[Tensor],
        masks: Sequence[Tensor | None] | None = None,
        log_weights: Tensor | None = None,
        unit: float | Sequence[float] = 1.0,
        owners: Sequence[Tensor | None] | None = None,
        moments: Memory = (),
    ) -> None:
        self._owners = (None,) * len(points) if owners is None else tuple(owners)
        self._moments = tuple(moments)
        self._points = tuple(points)
        self._masks = (None,) * len(self._points) if masks is None else tuple(masks)
        self._log_weights = log_weights
        self.units = tuple(unit) if isinstance(unit, Sequence) else (unit,) * len(self._points)

    @property
    def points(self) -> tuple[Tensor, ...]:
        """The particles of each call at the site, `[M, B, ...]`."""
        return self._points

    @property
    def masks(self) -> tuple[Tensor | None, ...]:
        """The mask of real coordinates at each call."""
        return self._masks

    @property
    def unit(self) -> float:
        """What one unit of length is at the site; GameError where calls differ in that."""
        if len({*self.units}) > 1:
            raise GameError(f"Calls at the site have units {self.units}: read strategy.units.")
        return self.units[0]

    @property
    def size(self) -> int:
        """M, the number of particles."""
        return len(self.points[0])

    def point(self, index: int, call: Call) -> Tensor | None:
        """Return the particles at a call, None at one that the strategy was not made for."""
        return self.points[index] if index < len(self.points) else None

    @property
    def log_weights(self) -> Tensor:
        """Log-weights `[M, B]` or `[M, 1]`."""
        if self._log_weights is None:  # made once: payoffs, entropy and the mirror step ask for it
            like = self.points[0]
            uniform = mirror.uniform(self.size, dtype=like.dtype, device=like.device)
            self._log_weights = uniform[:, None]
        return self._log_weights

    @property
    def weights(self) -> Tensor:
        """Weights `[M, B]` or `[M, 1]`, summing to 1 over M."""
        return self.log_weights.exp()

    def detach(self) -> "Strategy":
        """Return the strategy without gradients."""
        return self._at([p.detach() for p in self.points])

    def reweight(self, log_weights: Tensor) -> "Strategy":
        """Return the same points with other log-weights."""
        made = self.points, self.masks, log_weights, self.units, self._owners, self._moments
        return Strategy(*made)

    def turned(self, signs: Sequence[Tensor]) -> "Strategy":
        """Return the points times a sign each, per call `[M, B, 1, ...]`; leaves stay leaves."""
        pairs = zip(signs, self.points, strict=True)
        points = [(s * p.detach()).requires_grad_(p.requires_grad) for s, p in pairs]
        return self._at(points, turned(self._moments, signs))

    def move(
        self, gradients: Sequence[Tensor], rule: Rule, draw: Draw, remembers: bool = False
    ) -> tuple["Strategy", list[Tensor]]:
        """Return the points after one move by the rule, as leaves that require grad.

        Where it `remembers`, the rule is given Adam's direction in place of the gradient. A sample
        whose gradient or step is not finite falls back to δ = 0, decided on the device; which ones
        did is returned too, per call at the site as `[B]`.
        """
        moved, fallen = [], []
        memory = [*self._moments] or [None] * len(self.points)
        calls = zip(self.points, gradients, self.masks, self._owners, strict=True)
        for index, (point, gradient, mask, owner) in enumerate(calls):
            flat, slope = point.detach().flatten(0, 1), gradient.flatten(0, 1)
            repeated = repeat_mask(mask, self.size)
            if repeated is not None:  # what is not played may have no gradient: NaN · 0 is NaN
                slope = slope.masked_fill(repeated <= 0, 0)
            owned = repeat_owners(owner, self.size)
            way = slope
            if remembers:
                way, memory[index] = adam(slope.nan_to_num(0, 0, 0), memory[index])
            new = rule(index, flat, way, repeated, draw, owned)
            fell = (0 * slope + 0 * new).flatten(1).sum(1).isnan()  # where one is not finite
            rows = of_rows(owned)
            if rows is not None:  # the other rows of a sample fall with one
                fell = of_samples(fell.to(slope.dtype), rows, "amax") > 0
            fallen.append(fell.view(self.size, -1).any(0))
            fell = (fell if rows is None else fell[rows]).view(-1, *[1] * (flat.dim() - 1))
            moved.append(new.masked_fill(fell, 0).view_as(point).requires_grad_())
        return self._at(moved, memory), fallen

    def mean(self) -> "Strategy":
        """Return the pure strategy at the mean Σ_m w_m δ_m, inside any convex set they lie in."""
        return self._combined(self.weights)

    def pick(self, levels: Tensor) -> "Strategy":
        """Return the pure strategy that plays one particle for each sample.

        Args:
            levels: `[B]`, or `[1]` for the whole batch, from 0 to 1: the particle is the one at
                which the weights, added up, pass the level. Uniform draws pick by the weights.

        Example:
            >>> q = Strategy([torch.tensor([[[1.0], [1.0]], [[3.0], [3.0]]])])
            >>> q.pick(torch.tensor([0.2, 0.7])).points[0].tolist()
            [[[1.0], [3.0]]]
        """
        below = self.weights.cumsum(0)
        passed = (below <= levels * below[-1]).sum(0).clamp(max=self.size - 1)
        return self.choose(passed)

    @classmethod
    def joined(cls, strategies: "Sequence[Strategy]") -> "Strategy":
        """Return all points of strategies on the same calls as one, alike in weight, detached."""
        first = strategies[0]
        calls = zip(*(q.points for q in strategies), strict=True)
        points = [torch.cat([p.detach() for p in points]) for points in calls]
        return cls(points, first.masks, None, first.units, first._owners)

    def spread(self, values: Tensor) -> list[Tensor]:
        """Return values `[M, B]` of samples for the rows of each call, `[M, R, 1, ...]`.

        Raises:
            GameError: where the sample that a row belongs to is not known.
        """
        pairs = zip(self.points, self._owners, strict=True)
        return [by_row(values, points, owner) for points, owner in pairs]

    def knows(self, samples: int) -> bool:
        """Return whether it is known to which of so many samples each row belongs."""
        pairs = zip(self.points, self._owners, strict=True)
        return all(p.shape[1] == samples or of_rows(owner) is not None for p, owner in pairs)

    def lerp(self, other: "Strategy", weight: float) -> "Strategy":
        """Return `self + weight · (other − self)`, point by point, with the other's weights."""
        pairs = zip(self.points, other.points, strict=True)
        return other._at([p.detach().lerp(o.detach(), weight) for p, o in pairs])

    def sample(self, generator: torch.Generator | None = None) -> "Strategy":
        """Return a pure strategy that draws one particle for each sample, by the weights.

        For each row where all samples share their weights.
        """
        samples, rows = self.weights.shape[1], self.points[0].shape[1]
        levels = torch.rand(samples if samples > 1 else rows, generator=generator)
        return self.pick(levels.to(self.weights))

    def choose(self, particles: Tensor) -> "Strategy":
        """Return the pure strategy that plays one particle, `[B]` or `[1]`, for each sample."""
        each = torch.arange(self.size, device=particles.device)[:, None]
        chosen = (each == particles).to(self.points[0].dtype)  # `one_hot` would read the device
        return self._combined(chosen)

    def norms(self, norm: Norm = "l2", per: Per = "sample") -> list[Tensor]:
        """Return the norm of each group, in the unit of its call: per call `[M, B, 1, ...]`.

        Each of the rows of a sample has the norm of them all.
        """
        found = []
        for point, owner in zip(self.points, self._owners, strict=True):
            rows = point.detach().flatten(0, 1), norm, per, repeat_owners(owner, self.size)
            found.append(norms(*rows).unflatten(0, (self.size, -1)))
        return found

    def length(self, norm: Norm = "l2", per: Per = "sample") -> Tensor:
        """Return the mean norm of the groups, 0-d, over real tokens and in units of the site."""
        means = []
        calls = zip(self.norms(norm, per), self.masks, self._owners, strict=True)
        for lengths, mask, owner in calls:
            real = mask if per == "token" else None
            if owner is not None and per == "sample":  # each sample counts once
                real = once(owner, mask, lengths)
            means.append(mean_where(lengths, real))
        return torch.stack(means).mean()

    def positions(self) -> Tensor:
        """Return how many positions of the batch δ may act on, 0-d; see `visits.positions`."""
        counts = [positions(m, p.shape[1:]) for p, m in zip(self.points, self.masks, strict=True)]
        return torch.zeros((), dtype=torch.long, device=self.points[0].device) + sum(counts)

    def entropy(self) -> Tensor:
        """Return the entropy of the weights in nats, `[B]` or `[1]`: at most log M."""
        if self.size == 1:
            return torch.zeros_like(self.log_weights[0])
        return -(self.weights * self.log_weights).nan_to_num().sum(0)

    def state_dict(self) -> dict[str, Any]:
        """Return points, masks, log-weights and unit, for `torch.save`."""
        return {
            "points": [p.detach() for p in self.points],
            "masks": [*self.masks],
            "log_weights": self.log_weights,
            "unit": self.unit if len({*self.units}) == 1 else [*self.units],
            "owners": [*self._owners],
        }

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> "Strategy":
        """Return the strategy that `state_dict` described."""
        points, masks, weights = (state[name] for name in ("points", "masks", "log_weights"))
        return cls(points, masks, weights, state["unit"], state.get("owners"))

    def plot(self, sample: int = 0, axes: Any = None) -> Any:
        """Draw one sample's particles in the plane of their two main directions, sized by weight.

        Needs matplotlib. Returns the axes. δ = 0 is marked: it is where plain training plays.
        """
        import matplotlib.pyplot as plt

        axes = axes or plt.subplots(figsize=(4, 4))[1]
        flat = torch.cat([p.detach()[:, sample].flatten(1) for p in self.points], 1).double().cpu()
        shifted = torch.cat([flat, torch.zeros_like(flat[:1])])
        plane = shifted @ torch.linalg.svd(shifted, full_matrices=False)[2][:2].T
        if plane.shape[1] < 2:
            plane = torch.nn.functional.pad(plane, (0, 1))
        column = min(sample, self.weights.shape[1] - 1)
        sizes = 40 + 400 * self.weights[:, column].double().cpu()
        axes.scatter(plane[:-1, 0], plane[:-1, 1], s=sizes.numpy(), alpha=0.6, label="particles")
        axes.scatter(*plane[-1], marker="+", s=120, color="black", label="δ = 0")
        axes.set(xlabel="first direction", ylabel="second direction")
        effective = math.exp(self.entropy()[column])
        axes.set_title(f"strategy against sample {sample} ({effective:.1f} effective particles)")
        axes.legend(frameon=False)
        return axes

    def _combined(self, weights: Tensor) -> "Strategy":
        """Return the pure strategy at the particles weighted and added up."""
        pairs = zip(self.spread(weights), self.points, strict=True)
        means = [(weights * p.detach()).sum(0, keepdim=True) for weights, p in pairs]
        return Strategy(means, self.masks, None, self.units, self._owners)

    def _at(self, points: Sequence[Tensor], moments: Memory | None = None) -> "Strategy":
        """Return the same weights at other points."""
        kept = self._moments if moments is None else moments
        return Strategy(points, self.masks, self._log_weights, self.units, self._owners, kept)
