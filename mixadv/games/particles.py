"""How both players of a continuous game move particles: Langevin, Wasserstein–Fisher–Rao, pure.

Coroutines, as in `methods`: a method yields both strategies and is sent their payoffs and slopes.
Positions move by `mixadv.langevin.step`, weights by `mixadv.mirror.step`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from mixadv import langevin, mirror
from mixadv.ascent import check_integer, check_number
from mixadv.games.continuous import ContinuousGame, Particles, Slopes
from mixadv.games.deviations import grid_size
from mixadv.games.matrix import gap
from mixadv.games.method import Output, StepSize, check_step_size
from mixadv.games.spaces import Space

KEPT = 4096
"""Particles kept of the clouds along the way, whose union is the average strategy."""

CLOUDS = 16
"""Clouds kept at least, however large they are."""


class Clouds(NamedTuple):
    """What both players play.

    Attributes:
        x: the learner's particles.
        y: the adversary's.
        counts: always, here: every cloud is a step.
    """

    x: Particles
    y: Particles
    counts: bool = True


Moves = Generator[Clouds, Slopes, None]


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
    ) -> Moves:
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
        pulls = [temperature * space.curvature for space in (game.learner, game.adversary)]
        if smoothness + min(pulls) > 0:
            return 0.1 / (smoothness + pulls[0]), 0.1 / (smoothness + pulls[1])
        drawn = [
            s.sample(64, game.generator(0), game.dtype) for s in (game.learner, game.adversary)
        ]
        found = game.slopes(*map(game.particles, drawn))

        def best(space: Space, uphill: Tensor) -> float:
            return space.diameter / math.sqrt(steps) / (uphill.norm(dim=1).max().item() or 1.0)

        return best(game.learner, found.uphill_x), best(game.adversary, found.uphill_y)


@dataclass(frozen=True, kw_only=True)
class Langevin(ParticleMethod):
    """Langevin descent–ascent: noisy gradient steps, which sample the equilibrium with entropy.

    Where it settles, its law is that of the game payoff + τ·KL(μ‖π) − τ·KL(ν‖π), up to the bias
    of finite steps and the noise of finitely many particles.

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
    ) -> Moves:
        """Move by x ← Π( x − γ·∇h(x) + γτ·∇log π(x) + √(2γτ)·ξ ), h the mean payoff against y."""
        step_x, step_y = self.step_sizes(game, steps, self.temperature)

        def move(cloud: Particles, uphill: Tensor, size: float, space: Space) -> Particles:
            drift = uphill + self.temperature * space.score(cloud.points)
            moved = langevin.step(
                cloud.points, drift, size, self.temperature, _noise(draw), space.project
            )
            return cloud._replace(points=moved)

        while True:
            found = yield Clouds(x, y)
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
    ) -> Moves:
        """Move by x ← Π( x − γ·∇h(x) ), w ∝ w·exp(−η·h(x)), h the mean payoff against y."""
        step_x, step_y = self.step_sizes(game, steps)
        eta = self.mirror_step
        if isinstance(eta, str):
            pairs = game.payoffs(x.points, y.points)
            spread = (pairs.max() - pairs.min()).item()
            eta = math.sqrt(8 * math.log(max(2, self.particles)) / steps) / (spread or 1.0)
        while True:
            found = yield Clouds(x, y)
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


def _noise(draw: torch.Generator) -> Callable[[Tensor], Tensor]:
    def noise(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=draw, dtype=like.dtype, device=like.device)

    return noise


class Snapshots:
    """The clouds that were played: the last one, and the union of those evenly spaced in time.

    Payoffs are linear in a strategy. So the gap of the average on a grid needs what its nodes pay
    and earn against the clouds that are new since the last record, and the whole history costs what
    one gap does. Without a grid each record is a search of its own, and there are few.
    """

    def __init__(
        self, game: ContinuousGame, method: ParticleMethod, steps: int, grid: int | None
    ) -> None:
        self.game, self.output, self.grid = game, method.output, grid
        self.every = math.ceil(steps / max(KEPT // method.particles, CLOUDS))
        size = grid_size(game, grid)
        self.nodes = None if size is None else game.grid(size)
        self.record_every = math.ceil(steps / (5 if self.nodes is None else 50))
        self.kept: list[Clouds] = []
        self.count, self.judged = 0, 0
        self.paid = self.earned = torch.zeros((), dtype=game.dtype, device=game.device)

    def add(self, play: Clouds, answer: Slopes) -> None:
        """Take in a step; of each stretch the end is kept, so that the start alone never is."""
        self.last, self.count = play, self.count + 1
        if self.count % self.every == 0:
            self.kept.append(play)

    @property
    def average(self) -> tuple[Particles, Particles]:
        """The mean strategies: all kept particles, each cloud with the same mass."""
        return _union(self.kept or [self.last])

    def gap(self) -> Tensor:
        """Return the gap of the method's output.

        Raises:
            FloatingPointError: if the particles have left for infinity.
        """
        if not all(cloud.points.isfinite().all() for cloud in (self.last.x, self.last.y)):
            raise FloatingPointError(
                f"The particles left for infinity within {self.count} steps: give a step_size "
                "below 2/smoothness of the payoff, or sets that are bounded."
            )
        if self.output == "last" or not self.kept or self.nodes is None:
            played = self.average if self.output == "average" else (self.last.x, self.last.y)
            return self.game.duality_gap(*played, grid=self.grid).value
        new = self.kept[self.judged :]
        if new:
            mu, nu = _union(new)
            paid = self.game.losses(self.nodes[0].points, nu)
            earned = self.game.gains(self.nodes[1].points, mu)
            self.paid = self.paid + len(new) * paid
            self.earned = self.earned + len(new) * earned
            self.judged = len(self.kept)
        return gap(self.paid / self.judged, self.earned / self.judged)


def _union(clouds: list[Clouds]) -> tuple[Particles, Particles]:
    share = math.log(len(clouds))

    def joined(sides: list[Particles]) -> Particles:
        points = torch.cat([side.points for side in sides])
        return Particles(points, torch.cat([side.log_weights for side in sides]) - share)

    return joined([cloud.x for cloud in clouds]), joined([cloud.y for cloud in clouds])
