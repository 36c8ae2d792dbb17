"""Games between Gaussian measures: quadratic payoffs with entropy, and their Langevin chains.

f(x, y) = ½xᵀAx + xᵀCy − ½yᵀBy + pᵀx + qᵀy, where x minimises and y maximises.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.linalg import solve_discrete_lyapunov
from torch import Tensor

Array = NDArray[np.floating]


class Gaussian(NamedTuple):
    """A normal law on R^d: mean `[d]`, covariance `[d, d]`."""

    mean: Array
    covariance: Array


class Quadratic(NamedTuple):
    """The payoff above: A `[d, d]`, B `[e, e]`, C `[d, e]`, p `[d]`, q `[e]`.

    For players that pay τ·KL to N(0, s²I) instead of τ times the negative entropy, add τ/s² to the
    diagonals of A and B: `anchored`.
    """

    a: Array
    b: Array
    c: Array
    p: Array
    q: Array

    def anchored(self, temperature: float, deviation: float) -> "Quadratic":
        """Return the payoff that has the same equilibrium under plain entropy."""
        pull = temperature / deviation**2
        a, b = (z + pull * np.eye(len(z)) for z in (self.a, self.b))
        return self._replace(a=a, b=b)

    def field(self) -> Array:
        """Return [[A, C], [−Cᵀ, B]]: where both descend their own loss, z falls by this times z."""
        return np.block([[self.a, self.c], [-self.c.T, self.b]])

    def means(self) -> tuple[Array, Array]:
        """Return the saddle point, where A·m_x + C·m_y = −p and B·m_y − Cᵀ·m_x = q."""
        both = np.linalg.solve(self.field(), np.r_[-self.p, self.q])
        return both[: len(self.a)], both[len(self.a) :]

    def equilibrium(self, temperature: float) -> tuple[Gaussian, Gaussian]:
        """E1: with entropy τ the equilibrium is N(m_x, τA⁻¹) and N(m_y, τB⁻¹).

        Example:
            >>> one = np.eye(1)
            >>> x, y = Quadratic(2 * one, one, one, -np.ones(1), np.zeros(1)).equilibrium(0.5)
            >>> print(f"{x.mean[0]:.4f} {x.covariance[0, 0]:.4f}")
            0.3333 0.2500
        """
        x, y = self.means()
        inverses = (temperature * np.linalg.inv(z) for z in (self.a, self.b))
        return Gaussian(x, next(inverses)), Gaussian(y, next(inverses))


def scalar_means(a: float, b: float, c: float, p: float, q: float) -> tuple[float, float]:
    """E1 in one dimension: m_x = −(bp + cq)/(ab + c²), m_y = (aq − cp)/(ab + c²)."""
    total = a * b + c * c
    return -(b * p + c * q) / total, (a * q - c * p) / total


def langevin_covariance(curvature: ArrayLike, step_size: float, temperature: float) -> Array:
    """E3: covariance τ·(A − γA²/2)⁻¹ that x ← (I − γA)x + √(2γτ)ξ keeps, where γ·λ_max < 2."""
    curvature = np.asarray(curvature, dtype=float)
    return temperature * np.linalg.inv(curvature - step_size / 2 * curvature @ curvature)


class DescentAscent(NamedTuple):
    """E4: Langevin descent–ascent of N particles a side, both at once, on a quadratic payoff.

    The mean z of the clouds follows z ← Mz + u + N(0, (2γτ/N)·I), with M = I − γ·[[A, C], [−Cᵀ, B]]
    and u = γ·(−p, q), and the deviations within a cloud follow E3's chain.
    """

    game: Quadratic
    step_size: float
    temperature: float
    particles: int

    @property
    def transition(self) -> Array:
        """M; the means converge iff its spectral radius is below 1."""
        field = self.game.field()
        return np.eye(len(field)) - self.step_size * field

    def means(self, start: ArrayLike, steps: int) -> Gaussian:
        """Return the exact law of the means after `steps`, from known means `start`, `[d + e]`."""
        matrix = self.transition
        shift = self.step_size * np.r_[-self.game.p, self.game.q]
        mean, covariance = np.asarray(start, dtype=float), np.zeros_like(matrix)
        for _ in range(steps):
            mean = matrix @ mean + shift
            covariance = matrix @ covariance @ matrix.T + self._noise()
        return Gaussian(mean, covariance)

    def stationary(self) -> Gaussian:
        """Return the limit law of the means; its covariance is O(τ/N).

        Raises:
            ValueError: if the spectral radius of M is 1 or more, where there is no limit.
        """
        radius = float(abs(np.linalg.eigvals(self.transition)).max())
        if radius >= 1:
            raise ValueError(f"The means diverge: spectral radius {radius}. Lower the step size.")
        covariance = solve_discrete_lyapunov(self.transition, self._noise())
        return Gaussian(np.concatenate(self.game.means()), covariance)

    def clouds(self) -> tuple[Array, Array]:
        """Return the limit of each cloud's expected sample covariance (divided by N − 1)."""
        a, b = self.game.a, self.game.b
        x = langevin_covariance(a, self.step_size, self.temperature)
        return x, langevin_covariance(b, self.step_size, self.temperature)

    def _noise(self) -> Array:
        return 2 * self.step_size * self.temperature / self.particles * np.eye(len(self.transition))


def damped(start: ArrayLike, samples: ArrayLike, damping: float) -> Array:
    """E6: θ̄_K = β^K·θ_0 + (1 − β)·Σ_k β^(K−k)·θ_k for θ̄ ← βθ̄ + (1 − β)θ_k; samples `[K, ..]`."""
    samples = np.asarray(samples, dtype=float)
    powers = damping ** np.arange(len(samples) - 1, -1, -1)
    return damping ** len(samples) * np.asarray(start) + (1 - damping) * np.tensordot(
        powers, samples, 1
    )


def quadratic(payoff: Callable[[Tensor, Tensor], Tensor], d: int, e: int) -> Quadratic:
    """Read A, B, C, p, q off a quadratic payoff of x `[d]` and y `[e]` by automatic derivatives."""
    origin = torch.zeros(d + e, dtype=torch.float64)

    def joint(z: Tensor) -> Tensor:
        return payoff(z[:d], z[d:])

    # not torch.func.hessian: its forward mode loads torch.jit.script, which warns
    h = torch.func.jacrev(torch.func.jacrev(joint))(origin).numpy()
    slope = torch.func.grad(joint)(origin).numpy()
    return Quadratic(h[:d, :d], -h[d:, d:], h[:d, d:], slope[:d], slope[d:])


def divergence_hessian(logits: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Return H = Jᵀ(diag p − ppᵀ)J, p = softmax of the logits at x and J their Jacobian.

    KL(p(x) ‖ p(x + δ)) = ½δᵀHδ + O(δ³), and the symmetric divergence is δᵀHδ + O(δ³).

    Args:
        logits: from a vector `[d]` to `[classes]`.
        x: the point.
    """
    p = logits(x).softmax(-1)
    jacobian = torch.func.jacrev(logits)(x)
    return jacobian.T @ (torch.diag(p) - torch.outer(p, p)) @ jacobian
