"""What happens to θ after a step: noise, damping, average, samples, teacher. Each is optional.

A round of the learner is K samples of θ (Langevin: the wrapped optimizer's step plus noise):

    θ^{k+1} = step(θ^k) + √(2·lr·τ)·ξ                      ξ ~ N(0, I)
    θ̄ ← β·θ̄ + (1−β)·θ^{k+1},   θ̄ = θ_t at the start       (or the uniform mean of the samples)
    θ_{t+1} = β'·θ_t + (1−β')·θ̄                            after K samples

with θ_t a true copy taken before the first step of the round, and only trainable parameters
touched: `state_dict()` is an alias of the live weights, and averaging it corrupts integer buffers.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from mixadv.checks import check_entries, check_kinds, check_number
from mixadv.errors import GameError
from mixadv.maths.langevin import noise_scale
from mixadv.model.modules import weak_hook
from mixadv.model.replay import Noise

Damping = float | Literal["uniform"]


Weights = dict[Tensor, Tensor]  # by parameter


class Learner:
    """The learner's moves, run by hooks around the base optimizer's step, whoever calls it.

    What is kept of the weights is kept by parameter, so that layers may be frozen, thawed or added
    in training. Means are kept in at least fp32: bf16 would round a small step of an average away.

    Args:
        steps: K, samples of a round.
        temperature: τ; the law of θ is the Gibbs measure for plain SGD only.
        damping: β within a round: 0 keeps the last sample, `"uniform"` the mean of the samples.
        round_damping: β' between rounds.
        average: None, `"uniform"`, or the decay of an exponential average over closed rounds.
        samples: R, how many of the last samples to keep.
        ema_decay: of the teacher `θ̃ ← (1−ema_decay)·θ + ema_decay·θ̃`; None keeps no teacher.
        teacher_every: samples between two updates of the teacher.
    """

    def __init__(
        self,
        *,
        steps: int = 1,
        temperature: float = 0.0,
        damping: Damping = 0.0,
        round_damping: float = 0.0,
        average: Damping | None = None,
        samples: int = 0,
        ema_decay: float | None = None,
        teacher_every: int = 1,
    ) -> None:
        self.steps = steps
        self.temperature = temperature
        self.damping = damping
        self.round_damping = round_damping
        self.average_decay = average
        self.ema_decay = ema_decay
        self.teacher_every = teacher_every
        self.samples: deque[Weights] = deque(maxlen=samples)
        self.swapped = False
        self.depth = 0  # of steps within steps
        self.opened = False  # a round since the last step
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
        self.samples.clear()

    def bind(self, base: Optimizer, seed: int) -> None:
        """Register the moves around the steps of the base optimizer."""
        self.base = base
        self.noise = Noise(seed)
        self.handles = [
            base.register_step_pre_hook(weak_hook(self._enter)),
            base.register_step_post_hook(weak_hook(self._leave)),
        ]

    def __getstate__(self) -> dict[str, Any]:
        # Hooks hold functions, which do not pickle; the optimizer that loads them binds anew.
        return {name: value for name, value in self.__dict__.items() if name != "handles"}

    def parameters(self, trainable: bool = True) -> list[Tensor]:
        """Return the parameters of the base optimizer, in its order."""
        held = [p for group in self.base.param_groups for p in group["params"]]
        return [p for p in held if p.requires_grad or not trainable]

    @torch.no_grad()
    def abandon(self) -> None:
        """Give up the open round: back to θ_t, where a copy of it is kept."""
        if self.position:
            for parameter, value in self.backup.items():
                parameter.copy_(value)
        for _ in range(min(self.position, len(self.samples))):
            self.samples.pop()
        self.count -= self.position
        self.position = self.depth = 0

    @torch.no_grad()
    def teacher_weights(self) -> Weights:
        """Return the teacher's weights; at first a copy of the learner's."""
        _copy(self.parameters(), self.teacher, wide=True, renew=False)
        return self.teacher

    # Around a step ---------------------------------------------------------------------------

    # An optimizer whose step calls that of its parent class runs its hooks twice, and one whose
    # step fails does not leave; after a round has been opened, a step that enters is a new one.

    def _enter(self) -> None:
        if self.opened:
            self.depth, self.opened = 0, False
        if self.depth == 0:
            self._before()
        self.depth += 1

    def _leave(self) -> None:
        if self.depth == 0:
            return
        self.depth -= 1
        if self.depth == 0:
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
            _copy(self.parameters(), self.backup)
            if self.damping:
                _copy(self.parameters(), self.mean, wide=True)

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
            _toward(self.mean, live, weight, keep)
        if self.samples.maxlen:
            self.samples.append(_copy(live, {}))
        if self.position == self.steps:
            self._close(live, keep)
        if self.ema_decay is not None and self.count % self.teacher_every == 0:
            _toward(self.teacher, live, 1 - self.ema_decay, keep)

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
            _toward(self.mean, self.backup, self.round_damping, keep)
            _toward(live, self.mean, 1.0, keep)
        elif self.round_damping:
            _toward(live, self.backup, self.round_damping, keep)
        self.position = 0
        self.rounds += 1
        if self.average_decay is None:
            return
        _copy(live, self.average, wide=True, renew=False)
        uniform = self.average_decay == "uniform"
        weight = 1 / self.rounds if uniform else 1 - float(self.average_decay)
        _toward(self.average, live, weight, keep)

    # State -----------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return counters and weights, these by the number of their parameter in the optimizer.

        Weights refer to the live tensors, like any optimizer's state.
        """
        numbers = {id(p): i for i, p in enumerate(self.parameters(trainable=False))}

        def numbered(weights: Weights) -> dict[int, Tensor]:
            return {numbers[id(p)]: w for p, w in weights.items() if id(p) in numbers}

        return {
            "count": self.count,
            "position": self.position,
            "rounds": self.rounds,
            "backup": numbered(self.backup if self.position else {}),
            "mean": numbered(self.mean if self.position else {}),
            "average": numbered(self.average),
            "teacher": numbered(self.teacher),
            "samples": [numbered(sample) for sample in self.samples],
        }

    def read_state(self, state: dict[str, Any]) -> dict[str, Any]:
        """Return what `state_dict` returned as attributes, copied to the parameters' devices.

        Raises:
            ValueError: if it belongs to another model.
        """
        held = self.parameters(trainable=False)
        weights = dict.fromkeys(("backup", "mean", "average", "teacher"), dict)
        counters = dict.fromkeys(("count", "position", "rounds"), int)
        kinds = {**weights, **counters, "samples": list}
        check_entries("learner part", state, kinds)
        check_kinds("learner part", state, kinds)

        def mine(weights: dict[int, Tensor]) -> Weights:
            check_kinds("learner part", {"a sample": weights}, {"a sample": dict})
            shapes = dict(enumerate(p.shape for p in held))
            for number, weight in weights.items():
                if shapes.get(number) != getattr(weight, "shape", ()):
                    raise ValueError(
                        f"The checkpoint's learner part holds {weight!s:.40} for parameter "
                        f"{number!r}, which the optimizer does not have, or has in another shape: "
                        "it belongs to another model."
                    )
            return {held[i]: w.detach().to(held[i].device, copy=True) for i, w in weights.items()}

        loaded = {k: mine(state[k]) for k in weights}
        samples = [mine(sample) for sample in state["samples"]]
        counted = {k: state[k] for k in counters}
        if counted["position"] >= self.steps:
            raise ValueError(
                f"The checkpoint was written after {counted['position']} steps of a round, and the "
                f"solver's rounds have {self.steps}: build the solver as it was."
            )
        return {**counted, **loaded, "samples": deque(samples, maxlen=self.samples.maxlen)}


def check_damping(who: str, name: str, value: Any) -> None:
    """Raise unless the value is `"uniform"` or a number in [0, 1)."""
    if value == "uniform":
        return
    if isinstance(value, str):
        raise ValueError(f"{who}: {name} must be 'uniform' or a number in [0, 1), got {value!r}.")
    check_number(who, name, value, 0.0, 1.0)
    if value == 1:
        raise ValueError(f"{who}: {name}=1 never moves; it must be below 1.")


def _copy(
    parameters: Iterable[Tensor], into: Weights, wide: bool = False, renew: bool = True
) -> Weights:
    """Copy parameters, in at least fp32 if `wide`; those already copied only if `renew`."""
    for parameter in parameters:
        if parameter not in into:
            dtype = torch.promote_types(parameter.dtype, torch.float32) if wide else parameter.dtype
            into[parameter] = parameter.detach().to(dtype, copy=True)
        elif renew:
            into[parameter].copy_(parameter)
    return into


def _toward(live: Weights, goal: Weights, weight: float, keep: Tensor | None) -> None:
    """Move each live tensor by `weight` of its way to the goal, in place; not where keep is 0."""
    common = [p for p in live if p in goal]
    moving = [live[p].detach() for p in common]
    goals = [goal[p].detach().to(live[p].dtype) for p in common]
    if keep is not None:
        for x, g in zip(moving, goals, strict=True):
            x.lerp_(g, (weight * keep).to(x.dtype).reshape(()))
    elif weight == 1.0:
        for x, g in zip(moving, goals, strict=True):  # sharded weights have no copy of many
            x.copy_(g)
    elif weight:
        torch._foreach_lerp_(moving, goals, weight)  # pyright: ignore
