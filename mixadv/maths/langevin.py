"""Projected Langevin steps with explicit temperature.

    x ← Π( x + η·drift + √(2·η·τ)·ξ ),   ξ ~ N(0, I)

With drift = ∇u(x), fixed, and no set, the law of x tends to the Gibbs measure ∝ exp(u(x)/τ) as
η → 0; for a quadratic the law at finite η is known exactly. The projection comes last:
noise added after it would leave the set. The learner takes the same step with its optimizer as
drift, so there the step consists of the noise alone, and the Gibbs law holds for plain SGD only.
"""

from collections.abc import Callable

from torch import Tensor


def noise_scale(step_size: float | Tensor, temperature: float) -> float | Tensor:
    """Return the standard deviation `√(2·step_size·temperature)` of one Langevin step.

    `step_size` may be a tensor (capturable and compiled optimizers keep `lr` on the device).

    Example:
        >>> noise_scale(0.5, 4.0)
        2.0
    """
    return (2.0 * step_size * temperature) ** 0.5


def step(
    x: Tensor,
    drift: Tensor,
    step_size: float,
    temperature: float = 0.0,
    noise: Callable[[Tensor], Tensor] | None = None,
    project: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Return the next point of the projected Langevin chain.

    Args:
        x: the point, any shape.
        drift: the direction to move in, same shape; the gradient for a true Langevin step.
        step_size: η, at least 0.
        temperature: τ, at least 0; 0 draws no noise.
        noise: called as `noise(x)` for a standard normal draw of x's shape; needed when τ > 0.
        project: projection onto the set, applied last.

    Example:
        >>> import torch
        >>> step(torch.zeros(2), torch.ones(2), 0.5, project=lambda x: x.clamp(max=0.25)).tolist()
        [0.25, 0.25]
    """
    x = x + step_size * drift
    if temperature > 0:
        if noise is None:
            raise ValueError(f"A Langevin step at temperature {temperature} needs `noise`.")
        x = x + noise_scale(step_size, temperature) * noise(x)
    return x if project is None else project(x)
