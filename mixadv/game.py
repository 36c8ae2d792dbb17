"""The game: model, site and solver, and the state of both players."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import NoneType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mixadv.checks import check_entries, check_flag, check_kinds
from mixadv.errors import GameError
from mixadv.model import parallel, scaling
from mixadv.model.closure import Closure, parse_output
from mixadv.model.compiled_site import place
from mixadv.model.contexts import no_grad
from mixadv.model.modules import INPUT, functional, weak_hook
from mixadv.model.replay import Noise, Slot
from mixadv.model.representation import Representation
from mixadv.players.strategy import Strategy
from mixadv.round import first_round, validate
from mixadv.round.carried import Carried
from mixadv.round.cost import ascends, passes, recomputes
from mixadv.round.explain import Explanation, explain
from mixadv.round.outcome import Outcome
from mixadv.round.schedule import Schedule
from mixadv.round.stage import Stage
from mixadv.solvers.base import Solver
from mixadv.solvers.play import Step

_KINDS = {  # of what a game saves
    "round": int,
    "updates": int,
    "unit": (float, NoneType),
    "memory": dict,
    "modules": dict,
}


class Game:
    """Plays a solver's rounds on a model.

    Args:
        model: the module that closures call.
        solver: how a round is played.
        site: where δ acts; see `mixadv.model.site.Site`.
        seed: of the players' draws.
        schedule: when the adversary plays; None is always.
        optimizer: needed by solvers with a learner part; `mixadv.wrap` gives it.

    Example:
        >>> import mixadv
        >>> model = nn.Linear(2, 3)
        >>> x, y = torch.eye(2), torch.tensor([0, 2])
        >>> game = mixadv.Game(model, mixadv.FreeLB(steps=2))
        >>> outcome = game.backward(lambda: nn.functional.cross_entropy(model(x), y))
        >>> outcome.forwards, model.weight.grad.shape
        (2, torch.Size([3, 2]))
    """

    def __init__(
        self,
        model: nn.Module,
        solver: Solver,
        site: Any = None,
        *,
        seed: int = 0,
        schedule: Schedule | None = None,
        optimizer: Optimizer | None = None,
    ) -> None:
        validate.check_game_arguments(model, solver, optimizer, seed)
        if schedule is not None and not isinstance(schedule, Schedule):
            raise TypeError(f"schedule must be a mixadv.Schedule or None, got {schedule!r}.")
        if solver.ascent_dtype is not None and not ascends(solver):
            raise ValueError(
                f"{type(solver).__name__} finds δ in the learner's own passes, and ascent_dtype= "
                "acts on others: leave it out, or put autocast around the round."
            )
        if solver.recompute and not recomputes(solver):
            raise ValueError(
                f"{type(solver).__name__} keeps the graph of one pass at a time as it is: leave "
                "recompute=True out."
            )
        self.model = model
        self.solver = solver
        self.site = place(model, site)
        self.seed = seed
        self.noise = Noise(seed)
        self.optimizer = optimizer
        self.learner = solver.learner()
        self.representation = Representation(model, reads) if (reads := solver.reads) else None
        self.memory: dict[str, Any] = {}
        for module in solver.modules().values():
            assert optimizer is not None
            _train(optimizer, module)
        if self.learner is not None:
            assert optimizer is not None
            self.learner.bind(optimizer, seed)
        self.schedule = schedule or Schedule()
        self.round = 0
        self.updates = 0  # rounds, those of micro-batches of one optimizer step as one
        self._stepped = True  # since the last round
        self.watch(optimizer)
        self.unit: float | None = None
        self.outcome: Outcome | None = None
        self.strategy: Strategy | None = None
        self.leaf_backward = False
        self.scaling: scaling.Scaling | None = None  # of payoffs in fp16
        self.probing: ExitStack | None = None  # holds a closure's gradients back until it plays
        self._checked = False
        self._busy = False
        self.stackable: set[tuple[bool, ...]] = set()  # modes in which copies can be stacked
        self._stateful: dict[tuple[bool, ...], list[Slot]] = {}

    # Playing ---------------------------------------------------------------------------------

    def backward(
        self,
        closure: Closure,
        backward: Callable[[Tensor], object] | None = None,
        *,
        check: bool = False,
    ) -> Outcome:
        """Play a round up to the optimizer step; gradients are in `.grad` as after a backward.

        Args:
            closure: runs the forward pass and returns the loss, or loss and predictions.
            backward: called with each objective in place of its `.backward()`
                (`accelerator.backward`, `lambda loss: scaler.scale(loss).backward()`).
            check: validate this round as the first one is.

        A loss that the closure divides itself leaves a divergence undivided: where micro-batches
        are accumulated, divide in `backward`, `lambda loss: (loss / 4).backward()`.

        Raises:
            GameError: if the round cannot be played. Weights are as before; gradients that were
                delivered before it broke stay added.
        """
        self._refuse_replays()
        if backward is not None:
            validate.check_function("backward must be a function of a loss", backward)
        with torch.enable_grad(), self.stage(closure, check) as stage:
            total = torch.zeros(())
            for objective, last in self.plays(stage):
                stage.deliver(objective, backward)
                total = total.to(objective) + objective.detach()
                if last:
                    break
            return self.finish(stage, total, 1)

    def loss(self, closure: Closure, *, check: bool = False) -> Tensor:
        """Play a round and return a loss whose backward delivers the round's whole gradient.

        Its value is the round's objective. Earlier passes are differentiated here and their
        gradients ride along, so accumulation, loss scaling and DDP act on it as on any loss. With
        gradients disabled this is the plain loss.
        """
        if not torch.is_grad_enabled():
            validate.check_closure(closure)
            return parse_output(closure()).objective
        self._refuse_replays()
        with self.stage(closure, check) as stage:
            carried = Carried(stage)
            for objective, last in self.plays(stage):
                if last:
                    result = carried.attach(objective)
                    self.finish(stage, result.detach(), 1)
                    return result
                carried.add(objective)
        raise AssertionError("unreachable: plays() ends with a step or raises")

    def _refuse_replays(self) -> None:
        if self.solver.replays_batch:
            raise GameError(
                f"{type(self.solver).__name__} takes an optimizer step after each of its passes "
                "over one batch, which a loop that owns the step cannot: call "
                "optimizer.step(closure) of the wrapped optimizer."
            )

    @contextmanager
    def stage(self, closure: Closure, check: bool = False) -> Iterator[Stage]:
        """Open a round on a closure.

        After an exception buffers, random state, hooks and flags are as they were before.
        """
        if self.learner is not None and self.learner.swapped:
            raise GameError("A round within game.averaged() would be undone at its end.")
        if self.probing:
            self.probing.close()
        stage = self._open(closure, check)
        if self.learner is not None:
            self.learner.open_round()
        found = self.updates, self._stepped
        try:
            self.updates, self._stepped = self.updates + self._stepped, self.optimizer is None
            yield stage
        except BaseException:
            self._undo(stage)
            self.updates, self._stepped = found
            raise
        else:
            self._learn_buffers(stage)
            self.memory = stage.memory
            stage.renew()
            self.round += 1
        finally:
            self._close(stage)

    @contextmanager
    def rehearsal(self, closure: Closure) -> Iterator[Stage]:
        """Open the round to come, with its draws, and leave nothing of it.

        Whatever happens, buffers, random state, hooks and what the solver keeps are as they were.
        If the game was not checked yet it is now, and the unit is measured.
        """
        stage = self._open(closure, check=False)
        try:
            yield stage
            self._learn_buffers(stage)
        finally:
            self._undo(stage)
            self._close(stage)

    def _open(self, closure: Closure, check: bool) -> Stage:
        validate.check_closure(closure)
        check_flag("Game", "check", check)
        if self._busy:
            raise GameError(
                "A closure must not play a round itself: it runs the forward pass and returns the "
                "loss (game.loss and game.backward call it)."
            )
        if check or not self._checked:
            self._busy = True
            try:
                with parallel.local(self.model):
                    first_round.check(self, closure)
            finally:
                self._busy = False
            if self.leaf_backward:
                counted = passes(self.solver)
                validate.check_reentrant(
                    self.model, self.solver, counted.branches, counted.theta_backwards
                )
            self._checked = True
        stage = Stage(self, closure)
        self.noise.begin("adversary", self.round, parallel.rank())
        self._busy = True
        return stage

    def _undo(self, stage: Stage) -> None:
        stage.replay.undo()
        self.site.forget(stage.passes)

    def _close(self, stage: Stage) -> None:
        stage.passes.clear()
        stage.played = None  # its start may refer to the stage: a cycle that would hold δ
        self.site.detach()
        self._busy = False

    def plays(self, stage: Stage) -> Iterator[tuple[Tensor, bool]]:
        """Yield the objectives of a round, each with whether an optimizer step follows it."""
        play = self.schedule.moves(self.solver, stage, self.updates - 1)
        stepped = False
        try:
            for move in play:
                stepped = isinstance(move, Step)
                objective = move.objective if isinstance(move, Step) else move
                validate.check_objective(objective, self.solver)
                for part, last in stage.cut.parts(objective, stepped, stage.run):
                    validate.check_depends(part)
                    yield part, last
        finally:
            play.close()
        if not stepped:
            raise GameError(
                f"{type(self.solver).__name__}.play ended without a Step: the last pass before an "
                "optimizer step is yielded as Step(objective)."
            )

    def finish(self, stage: Stage, objective: Tensor, steps: int) -> Outcome:
        """Record and return what the round came to."""
        q = None if stage.played is None else stage.played.settled()
        radius = entropy = weights = None
        if q is not None and q.points:
            radius = q.length(self.solver.norm, self.solver.per)
            entropy = q.entropy().mean().detach()
            weights = "sample" if q.log_weights.shape[1] > 1 else "batch"
        self.strategy = q
        self.outcome = Outcome(
            objective=objective / steps,
            clean_loss=stage.clean_loss,
            payoff=stage.payoff,
            radius=radius,
            entropy=entropy,
            nonfinite=torch.stack([x.sum() for x in stage.fallen]).sum() if stage.fallen else None,
            forwards=stage.forwards,
            delta_backwards=stage.delta_backwards,
            theta_backwards=stage.theta_backwards,
            steps=steps,
            weights=weights,
        )
        return self.outcome

    # Evaluation ------------------------------------------------------------------------------

    def explain(self, closure: Closure | None = None) -> Explanation:
        """Return what a round will do: site, unit, absolute radius, passes and their cost.

        Args:
            closure: measures the unit by one forward pass that leaves no trace, of several
                processes on this one; without it, the unit is estimated from the rows of the
                embedding until the first round is played.
        """
        if closure is not None:
            validate.check_closure(closure)
        return explain(self, closure)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Swap in the running average of θ over closed rounds, for evaluation.

        Before a round has closed, evaluation runs at the weights there are.
        """
        learner = self.learner
        if learner is None or learner.average_decay is None:
            raise GameError(
                f"{type(self.solver).__name__} keeps no average of θ: build the solver with "
                "average='uniform', or evaluate the weights as they are."
            )
        if self._busy:
            raise GameError("averaged() swaps weights: use it between rounds, not within one.")
        with learner.averaged(self.model):
            yield

    @property
    def learner_samples(self) -> list[dict[str, Tensor]]:
        """The last R samples of θ by parameter name, oldest first."""
        return [self.named(sample) for sample in self._samples()]

    def mixture(self, forward: Callable[[], Any]) -> Tensor:
        """Return the log-probabilities of the mixture of the kept learner samples, `[B, C]`.

        Args:
            forward: runs the model and returns logits or an output that holds them.
        """
        probabilities = []
        with no_grad():
            for sample in self._samples():
                result = functional(self.model, sample, forward)()
                logits = result if isinstance(result, Tensor) else result.logits
                wide = torch.promote_types(logits.dtype, torch.float32)
                probabilities.append(logits.to(wide).log_softmax(-1))
        return torch.stack(probabilities).logsumexp(0) - math.log(len(probabilities))

    def teacher(self) -> dict[str, Tensor]:
        """Return the teacher's weights by parameter name."""
        assert self.learner is not None
        return self.named(self.learner.teacher_weights())

    def named(self, weights: dict[Tensor, Tensor]) -> dict[str, Tensor]:
        """Return learner weights by the names of the model's parameters, in their number format."""
        parallel.reshard(self.model)
        named = self.model.named_parameters()
        return {name: weights[p].to(p.dtype) for name, p in named if p in weights}

    def _samples(self) -> list[dict[Tensor, Tensor]]:
        kept = [] if self.learner is None else [*self.learner.samples]
        if not kept:
            raise GameError(
                "The game keeps no samples of θ yet: build the solver with samples=8 and play at "
                f"least one round ({type(self.solver).__name__} so far played {self.round})."
            )
        return kept

    # State -----------------------------------------------------------------------------------

    def parameters(self) -> list[Tensor]:
        """Return the parameters of the model, and those the optimizer trains besides."""
        parallel.reshard(self.model)
        own: list[Tensor] = list(self.model.parameters())
        known = {id(p) for p in own}
        groups = [] if self.optimizer is None else self.optimizer.param_groups
        return own + [p for g in groups for p in g["params"] if id(p) not in known]

    @property
    def scale(self) -> float:
        """Length at the site of one unit of the solver's radius."""
        return 1.0 if self.solver.unit == "absolute" or self.unit is None else self.unit

    def state_dict(self) -> dict[str, Any]:
        """Return what resuming needs: seed and round of the draws, the unit, what the solver keeps.

        Tensors refer to the live ones, like those of any state dict.
        """
        return {
            "seed": self.seed,
            "round": self.round,
            "updates": self.updates,
            "unit": self.unit,
            "memory": self.memory,
            "modules": {name: m.state_dict() for name, m in self.solver.modules().items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load what `state_dict` returned."""
        if self._busy:
            raise GameError("load_state_dict within a round: load between rounds.")
        self.check_state(state)
        for name, module in self.solver.modules().items():
            if name in state.get("modules", {}):
                module.load_state_dict(state["modules"][name])
        self.seed, self.round, self.unit = state["seed"], state["round"], state["unit"]
        self.updates, self._stepped = state.get("updates", self.round), True
        self.memory = copy.deepcopy(state.get("memory", {}))
        self.outcome = self.strategy = None
        self._checked = self._checked and self.unit is not None  # else it is measured anew
        self.noise = Noise(self.seed)
        if self.learner is not None:
            self.learner.reseed(self.seed)

    def follow(self, model: nn.Module) -> None:
        """Play on what the model was wrapped in since the game was made, by `torch.compile` say.

        Args:
            model: the wrapper, which closures call from now on; around the very modules of before.
        """
        if model is self.model:
            return
        targets = [INPUT if name == INPUT else module for name, module in self.site.targets]
        self.site.close()
        self.model, self.site = model, place(model, targets)
        if self.representation is not None:
            self.representation.close()
            self.representation = Representation(model, self.representation.source)

    def check_state(self, state: Any) -> None:
        """Raise ValueError unless a game can go on from the state."""
        check_entries("game", state, ("seed", "round", "unit"))
        check_kinds("game", {"memory": {}, "modules": {}, "updates": 0, **state}, _KINDS)
        validate.check_seed(state["seed"])

    def watch(self, optimizer: Optimizer | None) -> None:
        """Notice the steps of an optimizer, which end an update."""
        self._watching = []
        if optimizer is not None:
            self._watching.append(optimizer.register_step_post_hook(weak_hook(self._note_step)))

    def _note_step(self) -> None:
        self._stepped = True

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_watching": []}  # hooks do not pickle

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.watch(self.optimizer)
        if self.learner is not None:
            assert self.optimizer is not None
            self.learner.bind(self.optimizer, self.seed)

    def close(self) -> None:
        """Remove every hook the game has placed on model and optimizer."""
        self.site.close()
        if self.representation is not None:
            self.representation.close()
        for handle in self._watching:
            handle.remove()
        if self.learner is not None:
            self.learner.unbind()

    def stateful_buffers(self) -> list[Slot] | None:
        """Return the buffers known to change in a forward pass; None while that is not known."""
        return self._stateful.get(self.modes())

    def _learn_buffers(self, stage: Stage) -> None:
        if not stage.replay.buffers.known:
            self._stateful[self.modes()] = stage.replay.buffers.changed()

    def modes(self) -> tuple[bool, ...]:
        """Return which modules are in training mode."""
        return tuple(m.training for m in self.model.modules())


def _train(optimizer: Optimizer, module: nn.Module) -> None:
    """Add the parameters of a module that the optimizer does not hold yet."""
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    new = [p for p in module.parameters() if id(p) not in held]
    if new:
        optimizer.add_param_group({"params": new})
