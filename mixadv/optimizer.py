"""The wrapped optimizer: a real `torch.optim.Optimizer` whose step plays a round."""

import warnings
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mixadv.checks import check_entries
from mixadv.errors import GameError
from mixadv.game import Game
from mixadv.model import parallel
from mixadv.model.closure import Closure
from mixadv.round import validate
from mixadv.round.outcome import Outcome
from mixadv.round.probing import plays_itself
from mixadv.round.schedule import Schedule
from mixadv.solvers.base import Solver

STATE_KEY = "mixadv"

_PLAIN = (
    "The optimizer steps before its game has played a round: the gradients are those of a plain "
    "loss. Give step() a closure, or make them with game.backward or game.loss; to train plainly "
    "at first, wrap with schedule=mixadv.Schedule(start=...)."
)

_NO_ROUND = "step() without a closure plays no round of {}=: give one."
_PLAYED = "The closure plays its round itself, where step has no use for {0}=: give {0}= there."

_DRIFTING = (
    "The processes had the same weights before this step, and have others each after it: gradients "
    "are not averaged. Call the model that is in DistributedDataParallel in the closure; where a "
    "framework hides it, as Lightning does, use game.loss or game.backward with the framework's "
    "backward."
)


def wrap(
    optimizer: Optimizer,
    model: nn.Module,
    solver: Solver | str,
    *,
    site: Any = None,
    seed: int = 0,
    schedule: Schedule | None = None,
) -> "GameOptimizer":
    """Wrap an optimizer so that its steps play a game on the model.

    Args:
        optimizer: any `torch.optim.Optimizer` that does not need a closure itself.
        model: the module that closures call; it may be wrapped in DistributedDataParallel.
        solver: how a round is played, e.g. `mixadv.MAT()`, or "mat" for its defaults.
        site: where δ acts; None finds the input embedding that the encoder calls.
        seed: of the players' draws.
        schedule: when the adversary plays; None is always.

    Raises:
        TypeError, ValueError: for arguments that cannot be played with, and why.

    Example:
        >>> import mixadv
        >>> model = nn.Linear(2, 3)
        >>> x, y = torch.eye(2), torch.tensor([0, 2])
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> optimizer = mixadv.wrap(optimizer, model, mixadv.PGD(steps=2))
        >>> loss = optimizer.step(lambda: nn.functional.cross_entropy(model(x), y))
        >>> optimizer.outcome.forwards, optimizer.outcome.delta_backwards
        (3, 2)
    """
    validate.check_base_optimizer(optimizer)
    game = Game(model, solver, site, seed=seed, schedule=schedule, optimizer=optimizer)
    return GameOptimizer(optimizer, game)


def _given(**of_round: Any) -> str | None:
    """Return the name of the first that is not None."""
    return next((name for name, value in of_round.items() if value is not None), None)


def _of_base(name: str) -> property:
    """Return a property that is the base's own, live also after it loads a checkpoint."""

    def put(self: "GameOptimizer", value: Any) -> None:
        setattr(self.base, name, value)

    return property(lambda self: getattr(self.base, name), put, doc=f"The base's {name}.")


class GameOptimizer(Optimizer):
    """Plays a round per step. Built by `wrap`.

    `step(closure)`:

    1. zeroes the gradients,
    2. plays a round on the batch of the closure; at each of its optimizer steps
    3. steps the base optimizer, whose hooks make the learner's moves (noise, damping, averages),
    4. zeroes the gradients, forgets the clean pass and takes a new dropout mask,
    5. returns the objective averaged over the round's steps, detached; `outcome` has the rest.

    Clip gradients in `optimizer.base.register_step_pre_hook`, which runs before each such step.

    `step()` is the base step with the learner's moves, for loops where `game.backward` or
    `game.loss` has made the gradients. Everything else is the base optimizer's: parameter groups,
    state, defaults.
    """

    # Never advertised, whatever the base says: GradScaler would hand its scale to this object.
    _step_supports_amp_scaling = False

    def __init__(self, base: Optimizer, game: Game) -> None:
        # Not Optimizer.__init__: it assigns `state` and `param_groups`, which are the base's here.
        self.base = base
        self.game = game
        self._closure_plays: bool | None = None
        self._compared = False  # with other processes
        self._make_hooks()

    def _make_hooks(self) -> None:
        for what in ("step", "state_dict", "load_state_dict"):
            for when in ("pre", "post"):
                setattr(self, f"_optimizer_{what}_{when}_hooks", OrderedDict())
        self._warned_capturable_if_run_uncaptured = True
        self._patch_step_function()

    @property
    def outcome(self) -> Outcome | None:
        """What the last round came to; None before the first."""
        return self.game.outcome

    param_groups: Any = _of_base("param_groups")
    state: Any = _of_base("state")
    defaults: Any = _of_base("defaults")

    def __getattr__(self, name: str) -> Any:
        # Methods of particular bases, such as train() and eval() of schedule-free ones.
        if name.startswith("_") or name in ("base", "grad_scale", "found_inf"):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self.base, name)

    def __repr__(self) -> str:
        return f"GameOptimizer({self.game.solver!r}\n{self.base!r})"

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group to the base."""
        self.base.add_param_group(param_group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients of the base's parameters."""
        self.base.zero_grad(set_to_none)

    def step(  # pyright: ignore
        self,
        closure: Closure | Sequence[Closure] | None = None,
        *,
        check: bool = False,
        where: Any = None,
        adversary: Any = None,
        retain: Any = None,
        groups: Any = None,
    ) -> Any:
        """Play a round and step; see the class.

        Args:
            closure: runs the forward pass and returns the loss, or loss and predictions; never
                calls backward. A list has one for each micro-batch of an update: a round on each,
                their objectives averaged; other arguments are lists then. None steps the base.
            check: validate this round as the first one is.
            where: where δ may act, for this round; see `Game.backward`.
            adversary: returns what the adversary maximises; see `Game`.
            retain: returns what the learner minimises too, at δ = 0.
            groups: the group of each row, a LongTensor `[B]`, for a solver that weighs groups.

        Returns:
            The round's objective, 0-d and detached; None without a closure.
        """
        asked = _given(where=where, adversary=adversary, retain=retain, groups=groups)
        asked = asked if check is False else "check"
        if closure is None:
            if asked:
                raise GameError(_NO_ROUND.format(asked))
            if self.game.round == 0:
                warnings.warn(_PLAIN, stacklevel=2)
            self.base.step()
            return None
        goals = (closure, check, where, adversary, retain, groups)
        with torch.enable_grad():
            if not callable(closure) and isinstance(closure, Sequence):
                return self._round(*goals)
            result = None if asked and self._closure_plays else self._played_by(closure)
            if not self._closure_plays:
                return self._round(*goals)
            if asked:
                raise GameError(_PLAYED.format(asked))
            self.base.step()
            return result

    def _played_by(self, closure: Closure) -> Any:
        """Return what a closure returns that plays its rounds itself; find out whether it does."""
        if self._closure_plays is None:
            result, self._closure_plays = plays_itself(self.game.rounds, closure)
            return result
        if not self._closure_plays:
            return None
        rounds, result = self.game.round, closure()
        if result is not None and self.game.round == rounds:
            raise GameError(
                "This closure returned a loss and played no round, where earlier ones "
                "played theirs themselves or did nothing: call game.loss in it, or wrap "
                "another optimizer for steps that play."
            )
        return result

    def _round(self, *goals: Any) -> Tensor:
        """Play a round and step, on the arguments of `Rounds.open`."""
        game = self.game
        alike = not self._compared and parallel.replicas_alike(game.rounds.arena.parameters())
        self._compared = True
        try:
            with game.rounds.open(*goals) as update:
                self.base.zero_grad()
                total, steps = torch.zeros(()), 0
                for objective in update.turns(None):
                    total = total.to(objective) + objective
                    self.base.step()
                    self.base.zero_grad()
                    update.renew()
                    steps += 1
                ending = game.rounds.finish(update, total, steps)
        except BaseException:
            if game.learner is not None:
                game.learner.abandon()
            raise
        if alike and not parallel.replicas_alike(game.rounds.arena.parameters()):
            warnings.warn(_DRIFTING, stacklevel=4)
        return ending.objective

    def state_dict(self) -> dict[str, Any]:
        """Return the base's state and, under "mixadv", that of the game and the learner."""
        for hook in self._optimizer_state_dict_pre_hooks.values():
            hook(self)
        learner = self.game.learner
        state = {
            **self.base.state_dict(),
            STATE_KEY: {
                "game": self.game.state_dict(),
                "learner": None if learner is None else learner.state_dict(),
            },
        }
        for hook in self._optimizer_state_dict_post_hooks.values():
            changed = hook(self, state)
            state = state if changed is None else changed
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state; that of the base alone is continued with a fresh adversary."""
        state = dict(state_dict)
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            changed = hook(self, state)
            state = state if changed is None else changed
        ours = state.pop(STATE_KEY, None)
        learner = self.game.learner
        if ours is not None:
            check_entries("entry 'mixadv'", ours, ("game", "learner"))
            self.game.rounds.check_state(ours["game"])
            if (ours["learner"] is None) != (learner is None):
                raise ValueError(
                    f"The checkpoint was written {'without' if learner else 'with'} a learner part "
                    f"and {type(self.game.solver).__name__} has {'one' if learner else 'none'}: "
                    "build the solver as it was, or drop the checkpoint's 'mixadv' entry to start "
                    "afresh."
                )
            if learner is not None:
                learner.check_state(ours["learner"])
        elif self.game.solver.modules():  # which a plain optimizer did not train
            own, groups = self.base.state_dict()["param_groups"], state["param_groups"]
            state["param_groups"] = [*groups, *own[len(groups) :]]
        self.base.load_state_dict(state)
        fresh = {"seed": self.game.rounds.arena.seed, "round": 0, "unit": None}
        self.game.load_state_dict(fresh if ours is None else ours["game"])
        if learner is not None:
            learner.reset()
            if ours is not None:
                learner.load_state_dict(ours["learner"])
        for hook in self._optimizer_load_state_dict_post_hooks.values():
            hook(self)

    def __getstate__(self) -> dict[str, Any]:
        kept = ("base", "game", "_closure_plays", "_compared")
        return {name: self.__dict__[name] for name in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._make_hooks()
