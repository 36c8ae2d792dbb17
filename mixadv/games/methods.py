"""How both players of a finite game move: mirror steps in different orders.

Each method is the coroutine of `mixadv.games.method`. Bounds are on the duality gap after T steps,
r is the range of A, L = log m + log n, both players start at the uniform strategy. They are derived
in `theory/statements.md`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from mixadv.checks import check_number
from mixadv.games.matrix import gap
from mixadv.games.method import Answer, Method, Output, Players, Profile, Scene, StepSizes
from mixadv.maths import mirror


class Hedge(Method):
    """Entropic mirror descent; both players move at once."""

    name: ClassVar[str] = "hedge"
    paper: ClassVar[str] = "Freund and Schapire 1999, Games and Economic Behavior 29"
    bound: ClassVar[str] = "r·(√(log m / 2T) + √(log n / 2T))"

    def play(self, x: Tensor, y: Tensor, scene: Scene) -> Players:
        """Move by x ∝ x·exp(−η·Ay), y ∝ y·exp(η·Aᵀx)."""
        eta_x, eta_y = self.step_sizes(x, y, scene)
        while True:
            losses, gains = yield Profile(x, y)
            x, y = mirror.step(x, -losses, eta_x, -1), mirror.step(y, gains, eta_y, -1)

    def best_steps(self, x: Tensor, y: Tensor, scene: Scene) -> StepSizes:
        """Return η = √(8·log m / T) / r, and with n for the adversary."""

        def best(actions: int) -> Tensor:
            return scene.over_spread(math.sqrt(8 * math.log(actions) / scene.steps))

        return best(x.shape[-1]), best(y.shape[-1])


class AnytimeHedge(Hedge):
    """Hedge with decreasing steps: its bound holds at every step, whenever one stops.

    `step_size` is that of the first step; the t-th is 1/√t of it.
    """

    name: ClassVar[str] = "anytime_hedge"
    paper: ClassVar[str] = "Cesa-Bianchi and Lugosi 2006, Prediction, Learning, and Games, thm 2.3"
    bound: ClassVar[str] = "3r·(√log m + √log n)/√(8T)"

    def play(self, x: Tensor, y: Tensor, scene: Scene) -> Players:
        """Move by x_t ∝ x_1·exp(−η_t·Σ_(s<t) Ay_s), and so y: the leader, regularised."""
        eta_x, eta_y = self.step_sizes(x, y, scene._replace(steps=1))
        start_x, start_y, step = x, y, 1
        paid, earned = torch.zeros_like(x), torch.zeros_like(y)
        while True:
            losses, gains = yield Profile(x, y)
            # In units of the first step: sums of raw payoffs could overflow.
            paid, earned, step = paid + eta_x * losses, earned + eta_y * gains, step + 1
            x = mirror.step(start_x, -paid, 1 / math.sqrt(step), -1)
            y = mirror.step(start_y, earned, 1 / math.sqrt(step), -1)


class OptimisticHedge(Method):
    """Hedge that expects the last payoffs to come again."""

    name: ClassVar[str] = "optimistic_hedge"
    paper: ClassVar[str] = "Rakhlin and Sridharan 2013, arXiv:1311.1869"
    bound: ClassVar[str] = "r·(L + 1/2)/T, for η = 1/r"

    def play(self, x: Tensor, y: Tensor, scene: Scene) -> Players:
        """Move by x ∝ x·exp(−η·(2·Ay_t − Ay_(t−1))), and so y."""
        eta_x, eta_y = self.step_sizes(x, y, scene)
        before = Answer(torch.zeros_like(x), torch.zeros_like(y))
        while True:
            losses, gains = answer = yield Profile(x, y)
            x = mirror.step(x, before.losses - 2 * losses, eta_x, -1)
            y = mirror.step(y, 2 * gains - before.gains, eta_y, -1)
            before = answer

    def best_steps(self, x: Tensor, y: Tensor, scene: Scene) -> StepSizes:
        """Return η = 1/r, the largest that the bound allows."""
        eta = scene.over_spread(1.0)
        return eta, eta


class MirrorProx(Method):
    """Two steps from one point, the second with the payoffs that the first one finds."""

    name: ClassVar[str] = "mirror_prox"
    paper: ClassVar[str] = "Nemirovski 2004, SIAM Journal on Optimization 15"
    bound: ClassVar[str] = "r·L/(2T), for η = 2/r"

    def play(self, x: Tensor, y: Tensor, scene: Scene) -> Players:
        """Move by u ∝ x·exp(−η·Ay), v ∝ y·exp(η·Aᵀx);  x ∝ x·exp(−η·Av), y ∝ y·exp(η·Aᵀu)."""
        eta_x, eta_y = self.step_sizes(x, y, scene)
        while True:
            losses, gains = yield Profile(x, y, counts=False)
            u, v = mirror.step(x, -losses, eta_x, -1), mirror.step(y, gains, eta_y, -1)
            losses, gains = yield Profile(u, v)
            x, y = mirror.step(x, -losses, eta_x, -1), mirror.step(y, gains, eta_y, -1)

    def best_steps(self, x: Tensor, y: Tensor, scene: Scene) -> StepSizes:
        """Return η = 2/r, the largest that the bound allows."""
        eta = scene.over_spread(2.0)
        return eta, eta


@dataclass(frozen=True, kw_only=True)
class Magnetic(Method):
    """Mirror descent towards a magnet, the start: its last iterate converges.

    To the equilibrium of the game with entropy, payoff + τ·KL(x‖start) − τ·KL(y‖start), whose
    duality gap in the game itself is at most τ·L, if the start is uniform.

    Attributes:
        temperature: τ in units of the payoff, or `"auto"`: the best of the bound.
    """

    temperature: float | Literal["auto"] = "auto"

    name: ClassVar[str] = "magnetic"
    paper: ClassVar[str] = "Sokota et al. 2023, arXiv:2206.05825"
    bound: ClassVar[str] = "τ·L + r·√(L/(1+ητ)^(T−1)), for η = 4τ/r²"
    output: ClassVar[Output] = "last"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.temperature != "auto":
            check_number("Magnetic", "temperature", self.temperature)
        if self.temperature == 0 and self.step_size == "auto":
            raise ValueError(
                "Magnetic: at temperature=0 nothing converges, so step_size='auto' "
                "has no best: give a temperature, or play mirror_prox."
            )

    def play(self, x: Tensor, y: Tensor, scene: Scene) -> Players:
        """Move by x ∝ (x·magnet^(ητ)·exp(−η·Ay))^(1/(1+ητ)), and so y."""
        magnet_x, magnet_y, tau = x, y, self.heat(x, y, scene)
        eta_x, eta_y = self.step_sizes(x, y, scene)
        while True:
            losses, gains = yield Profile(x, y)
            x = mirror.magnetic_step(x, -losses, eta_x, tau, magnet_x, -1)
            y = mirror.magnetic_step(y, gains, eta_y, tau, magnet_y, -1)

    def heat(self, x: Tensor, y: Tensor, scene: Scene) -> Tensor:
        """Return τ, `[..., 1]`."""
        if not isinstance(self.temperature, str):
            return torch.full_like(scene.spread, self.temperature)
        size = math.log(x.shape[-1]) + math.log(y.shape[-1])
        ratios = torch.logspace(-6, 1, 400, dtype=torch.float64).tolist()  # τ/r

        def bound(ratio: float) -> float:
            left = -scene.steps / 2 * math.log1p(4 * ratio**2)
            return ratio * size + math.sqrt(size) * math.exp(left)

        return min(ratios, key=bound) * scene.spread

    def best_steps(self, x: Tensor, y: Tensor, scene: Scene) -> StepSizes:
        """Return η = 4τ/r², the largest that the bound allows."""
        eta = scene.over_spread(4.0) * self.heat(x, y, scene) * scene.over_spread(1.0)
        return eta, eta


class BestResponseDynamics(Method):
    """Pure play: each player moves to the best answer to what the other has just played.

    It cycles wherever the equilibrium is mixed: the baseline that mixed play is compared with.
    """

    name: ClassVar[str] = "best_response_dynamics"
    paper: ClassVar[str] = "Cournot 1838"
    bound: ClassVar[str] = "none"
    output: ClassVar[Output] = "last"

    def play(self, x: Tensor, y: Tensor, scene: Scene) -> Players:
        """Move to x = argmin_i (Ay)_i, y = argmax_j (Aᵀx)_j."""
        while True:
            losses, gains = yield Profile(x, y)
            x, y = _pure(losses.argmin(-1), x), _pure(gains.argmax(-1), y)


@dataclass(frozen=True, kw_only=True)
class Restarted(Method):
    """Another method, begun anew from where it has come, in ever longer runs.

    A run of T steps ends at a gap of KL/(ηT), with KL from its start to an equilibrium. It starts
    from the better of the last run's average and last pair, mixed with a little of the uniform one,
    a tenth of the gap in units of r: so KL is at most about distance·log(1/gap), the distance at
    most gap/α for a constant α of the game, and once T is long enough each run divides the gap. α
    can be arbitrarily small, so there is no bound for all games.

    Attributes:
        inner: what is restarted, a class of methods; `step_size` is handed to it.
    """

    inner: type[Method] = MirrorProx

    name: ClassVar[str] = "restarted"
    paper: ClassVar[str] = "Applegate et al. 2023, arXiv:2105.12715, for linear programs"
    bound: ClassVar[str] = "none"
    output: ClassVar[Output] = "best"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (isinstance(self.inner, type) and issubclass(self.inner, Method)):
            raise TypeError(
                f"Restarted: inner must be a class of methods such as Hedge, got {self.inner!r}."
            )

    def play(self, x: Tensor, y: Tensor, scene: Scene) -> Players:
        """Play runs of growing length, each from the end of the one before."""
        method, length = self.inner(step_size=self.step_size), 16
        while True:
            run = _Run(x, y)
            yield from run.play(method, scene._replace(steps=length), length)
            x, y, least = run.best()
            yield Profile(x, y)
            share = (0.1 * least * scene.over_spread(1.0)).clamp(max=0.5)
            x, y = _with_uniform(x, share), _with_uniform(y, share)
            length = math.ceil(1.2 * length)


METHODS: dict[str, type[Method]] = {
    method.name: method
    for method in (
        Hedge,
        AnytimeHedge,
        OptimisticHedge,
        MirrorProx,
        Magnetic,
        Restarted,
        BestResponseDynamics,
    )
}
"""By name: a new one is a class and a line here."""


def _pure(choice: Tensor, like: Tensor) -> Tensor:
    certain = torch.full_like(like, -math.inf)
    return certain.scatter(-1, choice[..., None], 0.0)


def _with_uniform(x: Tensor, share: Tensor) -> Tensor:
    """Return the log-weights of (1 − share)·x + share·uniform."""
    return torch.logaddexp(x + (-share).log1p(), (share / x.shape[-1]).log())


class _Run:
    """A few steps of a method from one start, their average and the last of them."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.start = x, y
        self.x, self.y = torch.full_like(x, -math.inf), torch.full_like(y, -math.inf)
        self.paid, self.earned = torch.zeros_like(x), torch.zeros_like(y)

    def play(self, method: Method, scene: Scene, length: int) -> Players:
        players = method.play(*self.start, scene)
        move = next(players)
        for _ in range(length):
            while not move.counts:
                move = players.send((yield move))
            answer = yield move
            self.last, self.answer = move, answer
            # Summed in the log domain: weights that underflow once can come back.
            self.x, self.y = torch.logaddexp(self.x, move.x), torch.logaddexp(self.y, move.y)
            self.paid, self.earned = self.paid + answer.losses, self.earned + answer.gains
            move = players.send(answer)
        self.x, self.y = self.x.log_softmax(-1), self.y.log_softmax(-1)
        self.mean = Answer(self.paid / length, self.earned / length)

    def best(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the average or the last pair, whose gap is less in each game, and that gap."""
        mean, last = gap(*self.mean)[..., None], gap(*self.answer)[..., None]
        nearer = last < mean
        x = torch.where(nearer, self.last.x, self.x)
        y = torch.where(nearer, self.last.y, self.y)
        return x, y, torch.minimum(mean, last)
