"""Rounds, one after another: opening and closing them, and what is kept from one to the next."""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from types import NoneType
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from mixadv.checks import check_entries, check_flag, check_kinds
from mixadv.errors import GameError
from mixadv.model import parallel
from mixadv.model.closure import Closure
from mixadv.model.masks import Where
from mixadv.model.modules import weak_hook
from mixadv.model.private_torch import version
from mixadv.round import validate
from mixadv.round.arena import Arena, Memory
from mixadv.round.ending import Ending
from mixadv.round.first_plain import calibrate_plain
from mixadv.round.first_round import calibrate
from mixadv.round.goals import Goals, micro_batches
from mixadv.round.outcome import Outcome
from mixadv.round.schedule import Schedule
from mixadv.round.stage import Stage
from mixadv.round.update import Update
from mixadv.round.weighing import check_groups
from mixadv.solvers.play import Moves, Play
from mixadv.solvers.weights import WeightsSolver

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
        self.ending: Ending | None = None  # of the last round
        self.probing: ExitStack | None = None  # holds gradients back until a closure plays itself
        self.busy = False  # a round is open
        self._others: dict[str, int] = {}  # versions of weights that the optimizer does not hold
        self._stepped = True  # since the last round
        self._watch(arena.optimizer)

    @contextmanager
    def open(
        self,
        closure: Closure | Sequence[Closure],
        check: bool = False,
        where: Any = None,
        adversary: Any = None,
        retain: Any = None,
        groups: Any = None,
    ) -> Iterator[Update]:
        """Open a round on closures, in which δ acts `where` it may; on a list, a round for each.

        After an exception weights that were displaced, buffers, random state, hooks and flags are
        as they were before.
        """
        arena = self.arena
        first = self._asked_to_check(check)
        micro = micro_batches(closure, adversary, retain, where, groups)
        for goals in micro:
            check_groups(goals.groups, arena.solver)
        stages = self._begin(micro, check)
        found = self.updates, self._stepped
        updates = self.updates + self._stepped
        try:
            if arena.learner is not None:
                arena.learner.open_round()
                self._check_others()
            update = Update(arena, stages, *self._players(updates - 1), first)
        except BaseException:
            self._close(stages)
            raise
        self.updates, self._stepped = updates, arena.optimizer is None
        try:
            yield update
        except BaseException:
            update.close()
            for stage in reversed(stages):
                stage.passes.undo()
            self.updates, self._stepped = found
            raise
        else:
            update.close()
            self._learn_buffers(stages[0])
            self.memory = stages[0].memory
            update.renew()
            self.round += len(stages)
        finally:
            self._close(stages)

    def _asked_to_check(self, check: bool) -> bool:
        """Return whether the round to open is checked as the first one is."""
        check_flag("Game", "check", check)
        learner = self.arena.learner
        if learner is not None and learner.swapped:
            raise GameError("A round within game.averaged() would be undone at its end.")
        if self.probing:
            self.probing.close()
        return check or not self.arena.calibration.checked

    def _players(self, update: int) -> tuple[Callable[[Moves], Play], WeightsSolver | None]:
        """Return what plays on the inputs in an update, and who on the weights."""
        schedule, arena = self.schedule, self.arena
        weights = schedule.weights(arena.weights, update)
        if arena.weights is not None:  # whose radius the schedule's is
            schedule = replace(schedule, radius=None)
        return partial(schedule.moves, arena.solver, update=update), weights

    @contextmanager
    def rehearse(
        self, closure: Closure, where: Where = None, adversary: Closure | None = None
    ) -> Iterator[Stage]:
        """Open the round to come, with its draws, and leave nothing of it.

        Whatever happens, buffers, random state, hooks and what the solver keeps are as they were.
        If the game was not checked yet it is now, and the unit is measured.
        """
        (stage,) = self._begin([Goals(closure, adversary, where=where)], check=False)
        try:
            yield stage
            self._learn_buffers(stage)
        finally:
            stage.passes.undo()
            self._close([stage])

    def _begin(self, micro: list[Goals], check: bool) -> list[Stage]:
        for goals in micro:
            validate.check_goals(goals, self.arena.solver)
        if self.busy:
            raise GameError(
                "A closure must not play a round itself: it runs the forward pass and returns the "
                "loss (game.loss and game.backward call it)."
            )
        self.arena.site.where = micro[0].where
        if check or not self.arena.calibration.checked:
            self._calibrate(micro[0])
        memory, stages = dict(self.memory), []
        for number, goals in enumerate(micro):
            arena = self.arena.apart() if number else self.arena
            arena.noise.begin("adversary", self.round + number, parallel.rank())
            stages.append(Stage(arena, goals, memory))
        self.busy = True
        return stages

    def _calibrate(self, goals: Goals) -> None:
        model, solver = self.arena.model, self.arena.solver
        if self.arena.optimizer is not None:
            validate.check_held(model, solver, self.arena.optimizer)
        self.busy = True
        try:
            with parallel.local(model):
                checked = calibrate if solver.perturbs else calibrate_plain
                calibration = checked(self.arena, goals, self.memory)
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

    def _close(self, stages: list[Stage]) -> None:
        self.arena.site.where = None
        for stage in stages:
            stage.passes.close()
            stage.played = None  # its start may refer to the stage: a cycle that would hold δ
        self.busy = False

    def finish(self, update: Update, objective: Tensor, steps: int) -> Ending:
        """Note and return what a round came to, with the sum of its objectives, detached."""
        self.ending = Ending(update, objective, steps)
        return self.ending

    @property
    def outcome(self) -> Outcome | None:
        """What the last round came to."""
        return None if self.ending is None else self.ending.outcome

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
        own, saved = self.arena.solver.modules(), state.get("modules", {})
        for name in own.keys() & saved.keys():
            shapes, found = (
                {k: getattr(v, "shape", None) for k, v in dict(w or {}).items()}
                for w in (own[name].state_dict(), saved[name])
            )
            if shapes != found:
                raise ValueError(
                    f"The checkpoint's {name} has other weights than the solver's, "
                    f"{found} in place of {shapes}: build the solver as it was."
                )

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
        self.ending = None

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
