"""Rounds, one after another: opening and closing them, and what is kept from one to the next."""

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import NoneType
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from mixadv.checks import check_entries, check_flag, check_kinds
from mixadv.errors import GameError
from mixadv.model import parallel
from mixadv.model.closure import Closure
from mixadv.model.masks import Where
from mixadv.model.modules import weak_hook
from mixadv.model.private_torch import version
from mixadv.players.strategy import Strategy
from mixadv.round import validate
from mixadv.round.arena import Arena, Memory
from mixadv.round.first_round import calibrate
from mixadv.round.goals import Goals
from mixadv.round.outcome import Outcome
from mixadv.round.retained import retaining
from mixadv.round.schedule import Schedule
from mixadv.round.stage import Stage
from mixadv.round.weighing import check_groups
from mixadv.solvers.play import Step

_KINDS = {
    "round": int,
    "updates": int,
    "unit": (float, dict, NoneType),
    "memory": dict,
    "modules": dict,
}


class Rounds:
    """Plays the rounds of a game."""

    def __init__(self, arena: Arena, schedule: Schedule) -> None:
        self.arena = arena
        self.schedule = schedule
        self.memory: Memory = {}  # what the solver keeps from round to round
        self.round = 0  # rounds played
        self.updates = 0  # the same, with those of micro-batches of one optimizer step as one
        self.outcome: Outcome | None = None  # of the last round
        self.strategy: Strategy | None = None  # the adversary's in it
        self.probing: ExitStack | None = None  # holds gradients back until a closure plays itself
        self.busy = False  # a round is open
        self._others: dict[str, int] = {}  # versions of weights that the optimizer does not hold
        self._stepped = True  # since the last round
        self._watch(arena.optimizer)

    @contextmanager
    def open(
        self,
        closure: Closure,
        check: bool = False,
        where: Where = None,
        adversary: Closure | None = None,
        retain: Closure | None = None,
        groups: Tensor | None = None,
    ) -> Iterator[Stage]:
        """Open a round on closures, in which δ acts `where` it may and rows are of `groups`.

        After an exception buffers, random state, hooks and flags are as they were before.
        """
        arena = self.arena
        if arena.learner is not None and arena.learner.swapped:
            raise GameError("A round within game.averaged() would be undone at its end.")
        if self.probing:
            self.probing.close()
        check_groups(groups, arena.solver)
        stage = self._begin(Goals(closure, adversary, retain, groups), check, where)
        try:
            if arena.learner is not None:
                arena.learner.open_round()
                self._check_others()
        except BaseException:
            self._close(stage)
            raise
        found = self.updates, self._stepped
        try:
            self.updates, self._stepped = self.updates + self._stepped, arena.optimizer is None
            yield stage
        except BaseException:
            stage.passes.undo()
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
    def rehearse(
        self, closure: Closure, where: Where = None, adversary: Closure | None = None
    ) -> Iterator[Stage]:
        """Open the round to come, with its draws, and leave nothing of it.

        Whatever happens, buffers, random state, hooks and what the solver keeps are as they were.
        If the game was not checked yet it is now, and the unit is measured.
        """
        stage = self._begin(Goals(closure, adversary), check=False, where=where)
        try:
            yield stage
            self._learn_buffers(stage)
        finally:
            stage.passes.undo()
            self._close(stage)

    def _begin(self, goals: Goals, check: bool, where: Where) -> Stage:
        validate.check_goals(goals, self.arena.solver, where)
        check_flag("Game", "check", check)
        if self.busy:
            raise GameError(
                "A closure must not play a round itself: it runs the forward pass and returns the "
                "loss (game.loss and game.backward call it)."
            )
        self.arena.site.where = where
        if check or not self.arena.calibration.checked:
            self._calibrate(goals)
        stage = Stage(self.arena, goals, self.memory)
        self.arena.noise.begin("adversary", self.round, parallel.rank())
        self.busy = True
        return stage

    def _calibrate(self, goals: Goals) -> None:
        model, solver = self.arena.model, self.arena.solver
        if self.arena.optimizer is not None:
            validate.check_held(model, solver, self.arena.optimizer)
        self.busy = True
        try:
            with parallel.local(model):
                calibration = calibrate(self.arena, goals, self.memory)
        except BaseException:
            self.arena.site.where = None
            raise
        finally:
            self.busy = False
        if calibration.leaf_backward:
            validate.check_reentrant(model, solver)
        self.arena.calibration = calibration
        self.memory = calibration.begin(self.memory)

    def _check_others(self) -> None:
        """Check that nothing else trains the model, of which the learner keeps no weights."""
        arena, learner = self.arena, self.arena.learner
        if learner is None or not learner.keeps_weights:
            return
        held = {id(p) for p in learner.parameters()}
        others = {n: p for n, p in arena.model.named_parameters() if p.requires_grad}
        now = {name: version(p) for name, p in others.items() if id(p) not in held}
        changed = [name for name, v in now.items() if self._others.get(name, v) != v]
        self._others = now
        if changed:
            raise GameError(
                f"{len(changed)} weights, {changed[0]} among them, were changed since the last "
                f"round and are not in the wrapped optimizer: what {type(arena.solver).__name__} "
                "keeps of the weights (an average, a teacher, samples) would mix old ones with "
                "new ones. Wrap one optimizer that holds them all, in several parameter groups."
            )

    def _learn_buffers(self, stage: Stage) -> None:
        buffers = stage.passes.replay.buffers
        if not buffers.known:
            self.arena.stateful[self.arena.modes] = buffers.changed()

    def _close(self, stage: Stage) -> None:
        stage.passes.close()
        self.arena.site.where = None
        stage.played = None  # its start may refer to the stage: a cycle that would hold δ
        self.busy = False

    def objectives(self, stage: Stage) -> Iterator[tuple[Tensor, bool]]:
        """Yield the objectives of a round, each with whether an optimizer step follows it."""
        solver, passes = self.arena.solver, stage.passes
        play = self.schedule.moves(solver, stage, self.updates - 1)
        stepped = False
        try:
            for move in retaining(stage, play, solver):
                stepped = isinstance(move, Step)
                objective = move.objective if isinstance(move, Step) else move
                validate.check_objective(objective, solver)
                for part, last in passes.cut.parts(objective, stepped, passes.run):
                    validate.check_depends(part)
                    yield part, last
        finally:
            play.close()
        if not stepped:
            raise GameError(
                f"{type(solver).__name__}.play ended without a Step: the last pass before an "
                "optimizer step is yielded as Step(objective)."
            )

    def finish(self, stage: Stage, objective: Tensor, steps: int) -> Outcome:
        """Note and return what a round came to, with the sum of its objectives, detached."""
        q, solver = stage.played, self.arena.solver
        radius = entropy = weights = None
        if q is not None:
            q = q.detach()
            radius = q.length(solver.norm, solver.per)
            entropy = q.entropy().mean().detach()
            weights = "sample" if q.log_weights.shape[1] > 1 else "batch"
        fallen = torch.stack([x.sum() for x in stage.fallen]).sum() if stage.fallen else None
        self.strategy = q
        self.outcome = Outcome(
            objective=objective / steps,
            clean_loss=stage.clean_loss,
            retained=stage.retained,
            payoff=stage.payoff,
            radius=radius,
            entropy=entropy,
            effective_particles=None if entropy is None else entropy.exp(),
            positions=None if q is None else q.positions(),
            nonfinite=fallen,
            forwards=stage.passes.forwards,
            delta_backwards=stage.delta_backwards,
            theta_backwards=stage.passes.theta_backwards,
            steps=steps,
            weights=weights,
            general_sum=stage.goals.general_sum,
            worst_group=None if stage.weights is None else stage.weights.worst_group,
            worst_group_weight=None if stage.weights is None else stage.weights.worst_group_weight,
            effective_rows=None if stage.weights is None else stage.weights.effective_rows,
        )
        return self.outcome

    def state_dict(self) -> dict[str, Any]:
        """Return what resuming needs; tensors refer to the live ones."""
        modules = self.arena.solver.modules()
        return {
            "seed": self.arena.seed,
            "round": self.round,
            "updates": self.updates,
            "unit": self.arena.calibration.unit,
            "memory": self.memory,
            "modules": {name: m.state_dict() for name, m in modules.items()},
        }

    def check_state(self, state: Any) -> None:
        """Raise ValueError unless a game can go on from the state."""
        check_entries("game", state, ("seed", "round", "unit"))
        check_kinds("game", {"memory": {}, "modules": {}, "updates": 0, **state}, _KINDS)
        validate.check_seed(state["seed"])
        validate.check_units(state["unit"], self.arena.site.names, self.arena.solver)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load what `state_dict` returned."""
        if self.busy:
            raise GameError("load_state_dict within a round: load between rounds.")
        self.check_state(state)
        arena = self.arena
        for name, module in arena.solver.modules().items():
            if name in state.get("modules", {}):
                module.load_state_dict(state["modules"][name])
        self.round = state["round"]
        self.updates, self._stepped = state.get("updates", self.round), True
        self.memory = copy.deepcopy(state.get("memory", {}))
        arena.calibrate(unit=state["unit"])
        arena.reseed(state["seed"])
        self.outcome = self.strategy = None

    def _watch(self, optimizer: Optimizer | None) -> None:
        """Notice the steps of an optimizer, which end an update."""
        watched = [] if optimizer is None else [optimizer]
        self._watching = [o.register_step_post_hook(weak_hook(self._note_step)) for o in watched]

    def _note_step(self) -> None:
        self._stepped = True

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_watching": []}  # hooks do not pickle

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._watch(self.arena.optimizer)
        if self.arena.learner is not None:
            assert self.arena.optimizer is not None
            self.arena.learner.bind(self.arena.optimizer, self.arena.seed)

    def close(self) -> None:
        """Remove every hook that was placed on model and optimizer."""
        arena = self.arena
        arena.site.close()
        if arena.representation is not None:
            arena.representation.close()
        if arena.learner is not None:
            arena.learner.unbind()
        for handle in self._watching:
            handle.remove()
