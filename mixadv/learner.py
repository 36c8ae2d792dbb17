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
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from mixadv.ascent import check_integer, check_number
from mixadv.langevin import noise_scale
from mixadv.replay import Noise

Damping = float | Literal["uniform"]


class Learner:
    """The learner's moves, run by hooks around the base optimizer's step, whoever calls it.

    Args:
        steps: K, samples of a round.
        temperature: τ; the law of θ is the Gibbs measure for plain SGD only.
        damping: β within a round: 0 keeps the last sample, `"uniform"` the mean of the samples.
        round_damping: β' between rounds.
        average: None, `"uniform"`, or the decay of an exponential average over closed rounds.
        samples: R, how many of the last samples to keep.
        momentum: of the teacher `θ̃ ← (1−momentum)·θ + momentum·θ̃`; None keeps no teacher.
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
        momentum: float | None = None,
        teacher_every: int = 1,
    ) -> None:
        self.steps = steps
        self.temperature = temperature
        self.damping = damping
        self.round_damping = round_damping
        self.average_decay = average
        self.momentum = momentum
        self.teacher_every = teacher_every
        self.count = 0  # samples drawn since the start of training
        self.position = 0  # samples drawn in the round that is open
        self.rounds = 0  # closed rounds
        self.backup: list[Tensor] = []
        self.mean: list[Tensor] = []
        self.average: list[Tensor] = []
        self.teacher: list[Tensor] = []
        self.samples: deque[list[Tensor]] = deque(maxlen=samples)

    def bind(self, base: Optimizer, seed: int) -> None:
        """Register the moves around the steps of the base optimizer."""
        self.base = base
        self.noise = Noise(seed)
        self.handles = [
            base.register_step_pre_hook(lambda *_: self._before()),
            base.register_step_post_hook(lambda *_: self._after()),
        ]

    def parameters(self) -> list[Tensor]:
        """Return the trainable parameters of the base optimizer, in its order."""
        groups = self.base.param_groups
        return [p for group in groups for p in group["params"] if p.requires_grad]

    def __getstate__(self) -> dict[str, Any]:
        # Hooks hold functions, which do not pickle; the optimizer that loads them binds anew.
        return {name: value for name, value in self.__dict__.items() if name != "handles"}

    def abandon(self) -> None:
        """Give up the open round: the next sample starts a new one at the live weights."""
        self.position = 0

    @torch.no_grad()
    def teacher_weights(self) -> list[Tensor]:
        """Return the teacher's weights; at first a copy of the learner's."""
        if not self.teacher:
            self.teacher = [p.detach().clone() for p in self.parameters()]
        return self.teacher

    # Around a step ---------------------------------------------------------------------------

    @torch.no_grad()
    def _before(self) -> None:
        if self.momentum is not None:
            self.teacher_weights()
        if self.position == 0 and (self.damping or self.round_damping):
            self.backup = _copies(self.parameters(), into=self.backup)
            if self.damping:
                self.mean = _copies(self.backup, into=self.mean)

    @torch.no_grad()
    def _after(self) -> None:
        # A fused optimizer under loss scaling is called on overflow too, and skips on the device.
        skipped = getattr(self.base, "found_inf", None)
        keep = None if skipped is None else 1 - skipped
        parameters = self.parameters()
        self._shake(keep)
        self.count += 1
        self.position += 1
        if self.damping == "uniform":
            _toward(self.mean, parameters, 1 / self.position, keep)
        elif self.damping:
            _toward(self.mean, parameters, 1 - float(self.damping), keep)
        if self.samples.maxlen:
            self.samples.append(_copies(parameters))
        if self.position == self.steps:
            self._close(parameters, keep)
        if self.momentum is not None and self.count % self.teacher_every == 0:
            _toward(self.teacher, parameters, 1 - self.momentum, keep)

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

    def _close(self, parameters: list[Tensor], keep: Tensor | None) -> None:
        if self.damping:
            _toward(parameters, self.mean, 1.0, keep)
        if self.round_damping:
            _toward(parameters, self.backup, self.round_damping, keep)
        self.position = 0
        self.rounds += 1
        if self.average_decay is None:
            return
        if not self.average:
            self.average = _copies(parameters, wide=True)
        elif self.average_decay == "uniform":
            _toward(self.average, parameters, 1 / self.rounds, keep)
        else:
            _toward(self.average, parameters, 1 - float(self.average_decay), keep)

    # State -----------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return counters and weights, referring to the live tensors like any optimizer's state."""
        return {
            "count": self.count,
            "position": self.position,
            "rounds": self.rounds,
            "backup": self.backup if self.position else [],
            "mean": self.mean if self.position else [],
            "average": self.average,
            "teacher": self.teacher,
            "samples": list(self.samples),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load what `state_dict` returned, as copies on the parameters' devices."""
        like = self.parameters()

        def copies(tensors: list[Tensor]) -> list[Tensor]:
            if len(tensors) not in (0, len(like)):
                raise ValueError(
                    f"The checkpoint holds {len(tensors)} learner weights, the optimizer trains "
                    f"{len(like)}: it belongs to another model, or other parameters are frozen."
                )
            pairs = zip(tensors, like, strict=False)
            return [t.detach().to(p.device, copy=True) for t, p in pairs]

        loaded = {k: copies(state[k]) for k in ("backup", "mean", "average", "teacher")}
        samples = [copies(sample) for sample in state["samples"]]
        self.count, self.position = state["count"], state["position"]
        self.rounds = state["rounds"]
        for name, tensors in loaded.items():
            setattr(self, name, tensors)
        self.samples = deque(samples, maxlen=self.samples.maxlen)


def check_damping(who: str, name: str, value: Any) -> None:
    """Raise unless the value is `"uniform"` or a number in [0, 1)."""
    if value == "uniform":
        return
    if isinstance(value, str):
        raise ValueError(f"{who}: {name} must be 'uniform' or a number in [0, 1), got {value!r}.")
    check_number(who, name, value, 0.0, 1.0)
    if value == 1:
        raise ValueError(f"{who}: {name}=1 never moves; it must be below 1.")


def check_count(who: str, name: str, value: Any) -> None:
    """Raise unless the value is a whole number of at least 1."""
    check_integer(who, name, value, 1)


def _copies(
    tensors: list[Tensor], into: list[Tensor] | None = None, wide: bool = False
) -> list[Tensor]:
    """Return copies, written into earlier ones where there are; `wide` in at least fp32."""
    if into and [t.shape for t in into] == [t.shape for t in tensors]:
        torch._foreach_copy_(into, tensors)  # pyright: ignore
        return into
    dtypes = [torch.promote_types(t.dtype, torch.float32) if wide else t.dtype for t in tensors]
    return [t.detach().to(d, copy=True) for t, d in zip(tensors, dtypes, strict=True)]


def _toward(live: list[Tensor], goal: list[Tensor], weight: float, keep: Tensor | None) -> None:
    """Move each live tensor by `weight` of its way to the goal, in place; not where keep is 0."""
    goal = [g.to(x.dtype) for g, x in zip(goal, live, strict=True)]
    if keep is None and weight == 1.0:
        torch._foreach_copy_(live, goal)  # pyright: ignore
    elif keep is None:
        torch._foreach_lerp_(live, goal, weight)  # pyright: ignore
    else:
        for x, g in zip(live, goal, strict=True):
            x.lerp_(g, (weight * keep).to(x.dtype).reshape(()))
