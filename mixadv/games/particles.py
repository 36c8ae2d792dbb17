"""How both players of a continuous game move particles: Langevin, Wasserstein–Fisher–Rao, pure.

Coroutines, as in `methods`: a method yields both strategies and is sent their payoffs and slopes.
Positions move by `mixadv.maths.langevin.step`, weights by `mixadv.maths.mirror.step`.
"""

from __future__ import annotations

import math
from collections.abc import Generator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from mixadv.checks import check_integer, check_number
from mixadv.games.continuous import ContinuousGame
from mixadv.games.method import Output, Profile, StepSize, check_step_size
from mixadv.games.spaces import Space
from mixadv.games.strategies import Particles, Slopes
from mixadv.maths import langevin, mirror

Clouds = Profile[Particles]
Movers = Generator[Clouds, Slopes, None]


@dataclass(frozen=True, kw_only=True)
class ParticleMethod:
    """A way to move particles; hyper-parameters only.

    Attributes:
        step_size: γ of the positions, for both players or a pair. `"auto"` is a tenth of
            1/smoothness, measured at draws of the references (a Langevin step is stable below
            2/smoothness, to which a Gaussian reference adds τ/scale²); for payoffs of no curvature,
            diameter/(slope·√T).
        particles: N of each player.
    """

    step_size: StepSize = "auto"
    particles: int = 64

    name: ClassVar[str]
    paper: ClassVar[str]
    output: ClassVar[Output] = "average"

    def __post_init__(self) -> None:
        who = type(self).__name__
        check_integer(who, "particles", self.particles, 1)
        check_step_size(who, self.step_size)

    def play(
        self, x: Particles, y: Particles, game: ContinuousGame, steps: int, draw: torch.Generator
    ) -> Movers:
        """Play from the particles x and y; `draw` is where noise comes from."""
        raise NotImplementedError

    def step_sizes(
        self, game: ContinuousGame, steps: int, temperature: float = 0.0
    ) -> tuple[float, float]:
        """Return γ of both players, at temperature τ."""
        if isinstance(self.step_size, tuple):
            return self.step_size
        if not isinstance(self.step_size, str):
            return self.step_size, self.step_size
        smoothness = game.smoothness()
        pulls = [temperature * space.curvature for space in game.spaces]
        if smoothness + min(pulls) > 0:
            return 0.1 / (smoothness + pulls[0]), 0.1 / (smoothness + pulls[1])
        drawn = [space.sample(64, game.generator(0), game.dtype) for space in game.spaces]
        found = game.slopes(*map(game.particles, drawn))

        def best(space: Space, uphill: Tensor) -> float:
            return space.diameter / math.sqrt(steps) / (uphill.norm(dim=1).max().item() or 1.0)

        return best(game.learner, found.uphill_x), best(game.adversary, found.uphill_y)


@dataclass(frozen=True, kw_only=True)
class Langevin(ParticleMethod):
    """Langevin descent–ascent: noisy gradient steps, which sample the equilibrium with entropy.

    Where it settles, its law is that of the game payoff + τ·KL(μ‖π) − τ·KL(ν‖π), up to the bias
    of finite steps and the noise of finitely many particles. At low τ particles cross no barrier,
    and keep the proportions between modes that their starts had: after 1,000 steps on (x − y)² over
    [−1, 1]² the gap is 0.1 to 0.3 at τ = 0.01, where Wasserstein–Fisher–Rao, which moves mass by
    weights, reaches 0.02.

    Attributes:
        temperature: τ, in units of the payoff.
    """

    temperature: float = 0.01

    name: ClassVar[str] = "langevin"
    paper: ClassVar[str] = "Domingo-Enrich et al. 2020, arXiv:2002.06277"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(type(self).__name__, "temperature", self.temperature)

    def play(
        self, x: Particles, y: Particles, game: ContinuousGame, steps: int, draw: torch.Generator
    ) -> Movers:
        """Move by x ← Π( x − γ·∇h(x) + γτ·∇log π(x) + √(2γτ)·ξ ), h the mean payoff against y."""
        step_x, step_y = self.step_sizes(game, steps, self.temperature)

        def noise(like: Tensor) -> Tensor:
            return torch.randn(like.shape, generator=draw, dtype=like.dtype, device=like.device)

        def move(cloud: Particles, uphill: Tensor, size: float, space: Space) -> Particles:
            drift = uphill + self.temperature * space.score(cloud.points)
            x = langevin.step(cloud.points, drift, size, self.temperature, noise, space.project)
            return cloud._replace(points=x)

        while True:
            found = yield Profile(x, y)
            x = move(x, -found.uphill_x, step_x, game.learner)
            y = move(y, found.uphill_y, step_y, game.adversary)


@dataclass(frozen=True, kw_only=True)
class WassersteinFisherRao(ParticleMethod):
    """Particles that move along the gradient and change weight by mirror steps.

    Attributes:
        mirror_step: η of the log-weights, in 1/payoff. `"auto"` is Hedge's best, √(8·log N/T)/r
            with the range r of payoffs between the particles at the start.
    """

    mirror_step: float | Literal["auto"] = "auto"

    name: ClassVar[str] = "wasserstein_fisher_rao"
    paper: ClassVar[str] = "Domingo-Enrich et al. 2020, arXiv:2002.06277"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mirror_step != "auto":
            check_number("WassersteinFisherRao", "mirror_step", self.mirror_step)

    def play(
        self, x: Particles, y: Particles, game: ContinuousGame, steps: int, draw: torch.Generator
    ) -> Movers:
        """Move by x ← Π( x − γ·∇h(x) ), w ∝ w·exp(−η·h(x)), h the mean payoff against y."""
        step_x, step_y = self.step_sizes(game, steps)
        eta = self.mirror_step
        if isinstance(eta, str):
            pairs = game.payoffs(x.points, y.points)
            spread = (pairs.max() - pairs.min()).item()
            eta = math.sqrt(8 * math.log(max(2, self.particles)) / steps) / (spread or 1.0)
        while True:
            found = yield Profile(x, y)
            x = Particles(
                langevin.step(x.points, -found.uphill_x, step_x, project=game.learner.project),
                mirror.step(x.log_weights, -found.losses, eta),
            )
            y = Particles(
                langevin.step(y.points, found.uphill_y, step_y, project=game.adversary.project),
                mirror.step(y.log_weights, found.gains, eta),
            )


@dataclass(frozen=True, kw_only=True)
class GradientDescentAscent(Langevin):
    """Pure play: one point each, no noise. It cycles wherever the equilibrium is mixed."""

    particles: int = 1
    temperature: float = 0.0

    name: ClassVar[str] = "gradient_descent_ascent"
    paper: ClassVar[str] = "Arrow, Hurwicz and Uzawa 1958"
    output: ClassVar[Output] = "last"


PARTICLE_METHODS: dict[str, type[ParticleMethod]] = {
    method.name: method for method in (Langevin, WassersteinFisherRao, GradientDescentAscent)
}
