"""What happens to θ after a step: noise, damping, average, samples, teacher. Each is optional.

A round of the learner is K samples of θ (Langevin: the wrapped optimizer's step plus noise):

    θ^{k+1} = step(θ^k) + √(2·lr·τ)·ξ                      ξ ~ N(0, I)
    a ← β·a + (1−β)·θ^{k+1},   a = θ_t at the start       (or the uniform mean of the samples)
    θ_{t+1} = β'·θ_t + (1−β')·a                            after K samples

with θ_t a true copy taken before the first step of the round, and only trainable parameters
touched: `state_dict()` is an alias of the live weights, and averaging it corrupts integer buffers.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mixadv.checks import check_entries, check_kinds, check_number
from mixadv.errors import GameError
from mixadv.maths.langevin import noise_scale
from mixadv.model import parallel
from mixadv.model.modules import weak_hook
from mixadv.model.noise import Noise
from mixadv.players.weights import (
    Weights,
    by_number,
    by_parameter,
    check_fit,
    check_shapes,
    copied,
    move_toward,
    renewed,
)

Damping = float | Literal["uniform"]

_WEIGHTS = ("backup", "mean", "average", "teacher")
_COUNTERS = ("count", "position", "rounds")


@dataclass(kw_only=True, eq=False, repr=False)
class Learner:
    """The learner's moves, run by hooks around the base optimizer's step, whoever calls it.

    What is kept of the weights is kept by parameter, so that layers may be frozen, thawed or added
    in training. Means are kept in at least fp32: bf16 would round a small step of an average away.

    Args:
        steps: K, samples of a round.
        temperature: τ; the law of θ is the Gibbs measure for plain SGD only.
        damping: β within a round: 0 keeps the last sample, `"uniform"` the mean of the samples.
        round_damping: β' between rounds.
        average_decay: None, `"uniform"`, or the decay of an exponential average over closed rounds.
        most_samples: R, how many of the last samples to keep.
        ema_decay: of the teacher `ϑ ← (1−ema_decay)·θ + ema_decay·ϑ`; None keeps no teacher.
        teacher_every: samples between two updates of the teacher.
    """

    steps: int = 1
    temperature: float = 0.0
    damping: Damping = 0.0
    round_damping: float = 0.0
    average_decay: Damping | None = None
    most_samples: int = 0
    ema_decay: float | None = None
    teacher_every: int = 1

    def __post_init__(self) -> None:
        self.swapped = False  # the average is in the model
        self._depth = 0  # of steps within steps
        self._opened = False  # a round since the last step
        self.reset()

    def reset(self) -> None:
        """Forget the past: no copies, no samples."""
        self.count = 0  # samples drawn since the start of training
        self.position = 0  # samples drawn in the round that is open
        self.rounds = 0  # closed rounds
        self.backup: Weights = {}
        self.mean: Weights = {}
        self.average: Weights = {}
        self.teacher: Weights = {}
        self.samples: list[Weights] = []

    @property
    def keeps_samples(self) -> bool:
        """Whether samples of θ are kept."""
        return self.most_samples > 0

    def bind(self, base: Optimizer, seed: int) -> None:
        """Register the moves around the steps of the base optimizer."""
        self.base = base
        self.reseed(seed)
        self._handles = [
            base.register_step_pre_hook(weak_hook(self._enter)),
            base.register_step_post_hook(weak_hook(self._leave)),
        ]

    def unbind(self) -> None:
        """Remove the moves from the base optimizer."""
        for handle in self._handles:
            handle.remove()

    def reseed(self, seed: int) -> None:
        """Draw the noise of the rounds to come from another seed."""
        self.noise = Noise(seed)

    def __getstate__(self) -> dict[str, Any]:
        # Hooks hold functions, which do not pickle; the optimizer that loads them binds anew.
        return {name: value for name, value in self.__dict__.items() if name != "_handles"}

    def parameters(self, trainable: bool = True) -> list[Tensor]:
        """Return the parameters of the base optimizer, in its order."""
        held = [p for group in self.base.param_groups for p in group["params"]]
        return [p for p in held if p.requires_grad or not trainable]

    def open_round(self) -> None:
        """Note that a round has been opened: the next step is not within one that failed."""
        check_shapes([self.backup, self.mean, self.average, self.teacher, *self.samples])
        self._opened = True

    @property
    def keeps_weights(self) -> bool:
        """Whether weights are kept that the model is run with: an average, a teacher, samples."""
        kept = (self.average_decay, self.ema_decay)
        return self.keeps_samples or any(decay is not None for decay in kept)

    @torch.no_grad()
    def abandon(self) -> None:
        """Give up the open round: back to θ_t, where a copy of it is kept."""
        if self.position:
            for parameter, value in self.backup.items():
                parameter.copy_(value)
        for _ in range(min(self.position, len(self.samples))):
            self.samples.pop()
        self.count -= self.position
        self.position = self._depth = 0

    @torch.no_grad()
    def teacher_weights(self) -> Weights:
        """Return the teacher's weights; at first a copy of the learner's."""
        copied(self.parameters(), self.teacher, wide=True, renew=False)
        return self.teacher

    @contextmanager
    def averaged(self, model: nn.Module) -> Iterator[None]:
        """Swap the average into the model while the body runs, which must not train it."""
        with parallel.swapped(model, self.average):
            outer, self.swapped = self.swapped, True
            try:
                yield
            finally:
                self.swapped = outer

    # An optimizer whose step calls that of its parent class runs its hooks twice, and one whose
    # step fails does not leave; after a round has been opened, a step that enters is a new one.

    def _enter(self) -> None:
        if self._opened:
            self._depth, self._opened = 0, False
        if self._depth == 0:
            self._before()
        self._depth += 1

    def _leave(self) -> None:
        if self._depth == 0:
            return
        self._depth -= 1
        if self._depth == 0:
            self._after()

    @torch.no_grad()
    def _before(self) -> None:
        if self.swapped:
            raise GameError(
                "An optimizer step within game.averaged() would train the averaged weights and be "
                "undone at its end: step outside of it."
            )
        if self.ema_decay is not None:
            self.teacher_weights()
        if self.position == 0 and (self.damping or self.round_damping or self.steps > 1):
            live = self.parameters()  # without those that were frozen since
            self.backup = renewed(live, self.backup)
            if self.damping:
                self.mean = renewed(live, self.mean, wide=True)

    @torch.no_grad()
    def _after(self) -> None:
        # A fused optimizer under loss scaling is called on overflow too, and skips on the device.
        skipped = getattr(self.base, "found_inf", None)
        keep = None if skipped is None else 1 - skipped
        live = {p: p for p in self.parameters()}
        self._shake(keep)
        self.count += 1
        self.position += 1
        if self.damping:
            weight = 1 / self.position if self.damping == "uniform" else 1 - float(self.damping)
            move_toward(self.mean, live, weight, keep)
        if self.keeps_samples:
            self.samples = [*self.samples, copied(live, {})][-self.most_samples :]
        if self.position == self.steps:
            self._close(live, keep)
        if self.ema_decay is not None and self.count % self.teacher_every == 0:
            move_toward(self.teacher, live, 1 - self.ema_decay, keep)

    def _shake(self, keep: Tensor | None) -> None:
        """Add Langevin noise √(2·lr·τ)·ξ, with the group's learning rate at this moment."""
        if self.temperature == 0:
            return
        self.noise.begin("learner", self.count)
        for group in self.base.param_groups:
            scale = noise_scale(group["lr"], self.temperature)
            for parameter in group["params"]:
                if parameter.requires_grad:
                    noise = self.noise("normal", parameter).mul_(scale)
                    parameter.add_(noise if keep is None else noise * keep)

    def _close(self, live: Weights, keep: Tensor | None) -> None:
        if self.damping:
            move_toward(self.mean, self.backup, self.round_damping, keep)
            move_toward(live, self.mean, 1.0, keep)
        elif self.round_damping:
            move_toward(live, self.backup, self.round_damping, keep)
        self.position = 0
        self.rounds += 1
        if self.average_decay is None:
            return
        copied(live, self.average, wide=True, renew=False)
        uniform = self.average_decay == "uniform"
        weight = 1 / self.rounds if uniform else 1 - float(self.average_decay)
        move_toward(self.average, live, weight, keep)

    def state_dict(self) -> dict[str, Any]:
        """Return counters and weights, these by the number of their parameter in the optimizer.

        Weights refer to the live tensors, like any optimizer's state.
        """
        held = self.parameters(trainable=False)
        return {
            "count": self.count,
            "position": self.position,
            "rounds": self.rounds,
            "backup": by_number(self.backup if self.position else {}, held),
            "mean": by_number(self.mean if self.position else {}, held),
            "average": by_number(self.average, held),
            "teacher": by_number(self.teacher, held),
            "samples": [by_number(sample, held) for sample in self.samples],
        }

    def check_state(self, state: dict[str, Any]) -> None:
        """Raise ValueError unless the learner can go on from what `state_dict` returned."""
        kinds = dict.fromkeys(_WEIGHTS, dict) | dict.fromkeys(_COUNTERS, int) | {"samples": list}
        check_entries("learner part", state, kinds)
        check_kinds("learner part", state, kinds)
        held = self.parameters(trainable=False)
        for weights in [*(state[name] for name in _WEIGHTS), *state["samples"]]:
            check_fit(weights, held)
        if state["position"] >= self.steps:
            raise ValueError(
                f"The checkpoint was written after {state['position']} steps of a round, and the "
                f"solver's rounds have {self.steps}: build the solver as it was."
            )

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load what `state_dict` returned, copied to the parameters' devices."""
        self.check_state(state)
        held = self.parameters(trainable=False)
        self.count, self.position, self.rounds = (state[name] for name in _COUNTERS)
        self.backup, self.mean, self.average, self.teacher = (
            by_parameter(state[name], held) for name in _WEIGHTS
        )
        samples = [by_parameter(weights, held) for weights in state["samples"]]
        self.samples = samples[-self.most_samples :] if self.keeps_samples else []

    @torch.no_grad()
    def load_average(self, state: dict[str, Any] | None) -> None:
        """Load the average of what `state_dict` returned, None has none, and use it as weights."""
        average = {}
        if state is not None:
            self.check_state(state)
            average = by_parameter(state["average"], self.parameters(trainable=False))
        self.average = average
        for parameter, value in self.average.items():
            parameter.copy_(value)


def check_damping(who: str, name: str, value: Any) -> None:
    """Raise unless the value is `"uniform"` or a number in [0, 1)."""
    if value == "uniform":
        return
    if isinstance(value, str):
        raise ValueError(f"{who}: {name} must be 'uniform' or a number in [0, 1), got {value!r}.")
    check_number(who, name, value, 0.0, 1.0)
    if value == 1:
        raise ValueError(f"{who}: {name}=1 never moves; it must be below 1.")
