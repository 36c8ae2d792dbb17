"""What the rounds of a game share: the model, where δ acts on it, and what was measured there."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from mixadv.model import parallel
from mixadv.model.compiled_site import place
from mixadv.model.modules import is_input
from mixadv.model.replay import Noise, Slot
from mixadv.model.representation import Representation
from mixadv.model.scaling import KEY, Scaling
from mixadv.model.site import Site
from mixadv.players.learner import Learner
from mixadv.solvers.base import Solver

Memory = dict[str, Any]
"""What a solver keeps from round to round, by name: tensors, or lists of them."""

Modes = tuple[bool, ...]
"""Which modules are in training mode."""


@dataclass(frozen=True)
class Calibration:
    """What the first round finds out, and later ones go by.

    Attributes:
        checked: the first round has been checked.
        unit: mean L2 norm of a real token's output at the site.
        leaf_backward: reentrant checkpoints allow only a plain backward to leaves.
        scaling: how payoffs in fp16 are scaled, None where none are.
        scale: the scale of fp16 to begin with; see `mixadv.model.scaling`.
        stackable: modes in which copies of the batch can be stacked.
    """

    checked: bool = False
    unit: float | None = None
    leaf_backward: bool = False
    scaling: Scaling | None = None
    scale: Tensor | None = None
    stackable: frozenset[Modes] = frozenset()

    def begin(self, memory: Memory) -> Memory:
        """Return what the solver keeps, with the scale of fp16 where it has none yet."""
        return memory if self.scale is None else {KEY: self.scale, **memory}


@dataclass
class Arena:
    """Where rounds are played.

    Attributes:
        model: what closures call.
        solver: how rounds are played.
        site: where δ acts.
        seed: of the players' draws.
        noise: the adversary's draws.
        optimizer: the base optimizer, where the game knows it.
        learner: what happens to θ after a step, where the solver says something of it.
        representation: reads it from the model, where the solver compares representations.
        calibration: what the first round found out.
        stateful: the buffers that change in a forward pass, by modes.
    """

    model: nn.Module
    solver: Solver
    site: Site
    seed: int = 0
    optimizer: Optimizer | None = None
    learner: Learner | None = None
    representation: Representation | None = None
    calibration: Calibration = Calibration()
    stateful: dict[Modes, list[Slot]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.reseed(self.seed)

    def reseed(self, seed: int) -> None:
        """Draw for both players from another seed."""
        self.seed, self.noise = seed, Noise(seed)
        if self.learner is not None:
            self.learner.reseed(seed)

    def calibrate(self, unit: float | None) -> None:
        """Take the unit over from a checkpoint; where it holds none, the next round measures it."""
        checked = self.calibration.checked and unit is not None
        self.calibration = replace(self.calibration, unit=unit, checked=checked)

    def follow(self, model: nn.Module) -> None:
        """Play on what the model was wrapped in since the game was made, by `torch.compile` say.

        Args:
            model: the wrapper, which closures call from now on; around the very modules of before.
        """
        if model is self.model:
            return
        targets = [name if is_input(name) else module for name, module in self.site.targets]
        self.site.close()
        self.model, self.site = model, place(model, targets)
        if self.representation is not None:
            self.representation.close()
            self.representation = Representation(model, self.representation.source)

    @property
    def scale(self) -> float:
        """Length at the site of one unit of the solver's radius."""
        unit = self.calibration.unit
        return 1.0 if self.solver.unit == "absolute" or unit is None else unit

    @property
    def modes(self) -> Modes:
        """Which modules are in training mode."""
        return tuple(m.training for m in self.model.modules())

    def parameters(self) -> list[Tensor]:
        """Return the parameters of the model, and those the optimizer trains besides."""
        parallel.reshard(self.model)
        own: list[Tensor] = list(self.model.parameters())
        known = {id(p) for p in own}
        groups = [] if self.optimizer is None else self.optimizer.param_groups
        return own + [p for g in groups for p in g["params"] if id(p) not in known]

    def named(self, weights: dict[Tensor, Tensor]) -> dict[str, Tensor]:
        """Return learner weights by the names of the model's parameters, in their number format."""
        parallel.reshard(self.model)
        named = self.model.named_parameters()
        return {name: weights[p].to(p.dtype) for name, p in named if p in weights}
