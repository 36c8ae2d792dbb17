"""What the rounds of a game share: the model, where δ acts on it, and what was measured there."""

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from mixadv.errors import GameError
from mixadv.model import parallel, walk
from mixadv.model.compiled_site import place
from mixadv.model.displaced import Displaced
from mixadv.model.modules import is_input, unwrap
from mixadv.model.noise import Noise
from mixadv.model.replay import Slot
from mixadv.model.representation import Representation
from mixadv.model.scaling import KEY, Scaling
from mixadv.model.site import Site
from mixadv.players.learner import Learner
from mixadv.round.goals import Goals
from mixadv.solvers.base import Solver
from mixadv.solvers.weights import WeightsSolver

Memory = dict[str, Any]
"""What a solver keeps from round to round, by name: tensors, or lists of them."""

Modes = tuple[bool, ...]
"""Which modules are in training mode."""

Units = float | dict[str, float]
"""A length at the site; of a site of several modules one at each, by its name."""


@dataclass(frozen=True)
class Calibration:
    """What the first round finds out, and later ones go by."""

    checked: bool = False
    unit: Units | None = None  # mean L2 norm of a real token's output at the site
    leaf_backward: bool = False  # reentrant checkpoints allow only a plain backward to leaves
    scaling: Scaling | None = None  # of payoffs in fp16, None where none are
    scale: Tensor | None = None  # of fp16 to begin with; see `mixadv.model.scaling`
    stackable: frozenset[Modes] = frozenset()  # modes in which copies of the batch can be stacked
    outside: bool = True  # the closure's graph may end in more than the model
    unlabelled: bool = False  # predictions per token, and the loss alone tells which of them count

    def begin(self, memory: Memory) -> Memory:
        """Return what the solver keeps, with the scale of fp16 where it has none yet."""
        return memory if self.scale is None else {KEY: self.scale, **memory}

    def length(self, site: str) -> float:
        """Return the unit at a module of the site, 1 where none was measured."""
        unit = self.unit.get(site) if isinstance(self.unit, dict) else self.unit
        return unit or 1.0


@dataclass
class Arena:
    """Where rounds are played."""

    model: nn.Module  # what closures call
    solver: Solver
    site: Site
    seed: int = 0  # of both players' draws
    optimizer: Optimizer | None = None  # the base, where the game knows it
    learner: Learner | None = None  # where the solver says what happens to θ after a step
    representation: Representation | None = None  # where the solver compares representations
    weights: WeightsSolver | None = None  # whose adversary moves the weights, around the solver
    calibration: Calibration = Calibration()
    stateful: dict[Modes, list[Slot]] = field(default_factory=dict)  # buffers that passes change
    away: Displaced = field(default_factory=Displaced)  # weights, while an adversary moves them

    def __post_init__(self) -> None:
        self.reseed(self.seed)

    def apart(self) -> "Arena":
        """Return the same with draws of its own, which begin as those of the round do."""
        other = copy.copy(self)
        other.noise = copy.copy(self.noise)
        return other

    def reseed(self, seed: int) -> None:
        """Draw for both players from another seed."""
        self.seed, self.noise = seed, Noise(seed)
        if self.learner is not None:
            self.learner.reseed(seed)

    def calibrate(self, unit: Units | None) -> None:
        """Take the unit over from a checkpoint; where it holds none, the next round measures it.

        One number is that of all modules of the site.
        """
        checked = self.calibration.checked and unit is not None
        self.calibration = replace(self.calibration, unit=unit, checked=checked)

    def follow(self, model: nn.Module) -> None:
        """Play on what the model was wrapped in since the game was made, by `torch.compile` say."""
        if model is self.model:
            return
        targets = [name if is_input(name) else module for name, module in self.site.targets]
        names, unit = self.site.names, self.calibration.unit
        self.site.close()
        self.model, self.site = model, place(model, targets, self.solver.perturbs)
        if isinstance(unit, dict):  # a module that has several names may be found by another one
            renamed = zip(names, self.site.names, strict=True)
            unit = {new: unit[old] for old, new in renamed if old in unit}
            self.calibration = replace(self.calibration, unit=unit)
        if self.representation is not None:
            self.representation.close()
            self.representation = Representation(model, self.representation.source)

    def scale(self, site: str) -> float:
        """Return the length at a module of the site of one unit of the solver's radius."""
        return 1.0 if self.solver.unit == "absolute" else self.calibration.length(site)

    @property
    def modes(self) -> Modes:
        """Which modules are in training mode."""
        return modes_of(walk.modules(self.model))

    def parameters(self, modules: Sequence[nn.Module] | None = None) -> list[Tensor]:
        """Return the parameters of the model, and those the optimizer trains besides.

        `modules` are those of the model, where they are known.
        """
        parallel.reshard(self.model)
        own = walk.parameters(modules or walk.modules(self.model))
        known = {id(p) for p in own}
        groups = [] if self.optimizer is None else self.optimizer.param_groups
        return own + [p for g in groups for p in g["params"] if id(p) not in known]

    def trained(self, parameters: Iterable[Tensor]) -> list[Tensor]:
        """Return the parameters that the learner moves; of no optimizer known, all it may."""
        groups = [] if self.optimizer is None else self.optimizer.param_groups
        held = {id(p) for g in groups for p in g["params"]}
        return [
            p for p in parameters if p.requires_grad and (self.optimizer is None or id(p) in held)
        ]

    def displaced(self, parameters: Iterable[Tensor]) -> list[Tensor]:
        """Return the parameters that an adversary of weights moves, of those that are trained.

        Args:
            parameters: those there are.

        Raises:
            GameError: if there are none.
        """
        assert self.weights is not None
        names = walk.names(unwrap(self.model))
        trained = self.trained(parameters)
        if not trained:
            raise GameError(
                f"{type(self.weights).__name__} has no weight to move: none is trained. Set "
                "requires_grad, and give the optimizer the weights of this model."
            )
        moved = [p for p in trained if self.weights.moves(names.get(id(p), ""), p)]
        if not moved:
            who, rule = type(self.weights).__name__, self.weights.which
            raise GameError(
                f"{who} has no weight to move: of the {len(trained)} that are trained, "
                f"{'its own rule' if rule is None else 'which='} chooses none. Write "
                f"{who}(which=lambda name, weight: True) for all of them, or choose by their "
                f"names, {[names.get(id(p), '') for p in trained][:6]}."
            )
        return moved

    def besides(self, goals: Goals, value: Tensor, known: Iterable[Tensor]) -> list[Tensor]:
        """Return what `leaves_besides` does, [] where there is nothing to look for.

        That is where an optimizer is wrapped, which tells what is trained, and the closure of the
        first round had nothing else: a look takes a millisecond or two.
        """
        others = self.optimizer is None or goals.general_sum or goals.retain is not None
        return leaves_besides(value, known) if others or self.calibration.outside else []

    def named(self, weights: dict[Tensor, Tensor]) -> dict[str, Tensor]:
        """Return learner weights by the bare model's parameter names, in their number format."""
        parallel.reshard(self.model)
        named = unwrap(self.model).named_parameters()
        return {name: weights[p].to(p.dtype) for name, p in named if p in weights}


def modes_of(modules: Iterable[nn.Module]) -> Modes:
    """Return which modules are in training mode."""
    return tuple(m.training for m in modules)


def leaves_besides(value: Tensor, known: Iterable[Tensor]) -> list[Tensor]:
    """Return the leaves that a backward would reach, but for those that are known.

    What is trained outside of the model, such as a head that the closure calls, is found in the
    graph alone; within a reentrant checkpoint it is not.
    """
    found: list[Tensor] = []
    seen, ahead, told = set(), [value.grad_fn], {id(x) for x in known}
    while ahead:
        node: Any = ahead.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if type(node).__name__ == "AccumulateGrad" and id(node.variable) not in told:
            found.append(node.variable)
        ahead += [before for before, _ in node.next_functions]
    return found


def train(optimizer: Optimizer, module: nn.Module) -> None:
    """Add the parameters of a module that the optimizer does not hold yet."""
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    new = [p for p in module.parameters() if id(p) not in held]
    if new:
        optimizer.add_param_group({"params": new})
