"""Checks at construction, and of what a solver yields; those that need a batch: `first_round`."""

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from mixadv.checks import check_function, check_kinds
from mixadv.errors import GameError
from mixadv.model import parallel
from mixadv.round.cost import ascends, count_passes, recomputes
from mixadv.round.goals import Goals
from mixadv.round.schedule import Schedule
from mixadv.solvers import SOLVERS, make_solver
from mixadv.solvers.base import Solver
from mixadv.solvers.weights import WeightsSolver


def check_seed(seed: Any) -> None:
    """Raise TypeError unless the seed is an integer."""
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed must be an integer, got {seed!r}.")


def check_units(unit: Any, names: Sequence[str], solver: Solver) -> None:
    """Raise ValueError unless a checkpoint's units are those of the modules of a site."""
    if not isinstance(unit, Mapping):
        return
    check_kinds("game", unit, dict.fromkeys(unit, float))
    lacking = solver.unit == "relative" and {*names} - {*unit}
    if lacking or {*unit} - {*names}:
        raise ValueError(
            f"The checkpoint's game has units at the modules {[*unit]}, and δ acts at {[*names]}: "
            "make the game with the same site=."
        )


def check_game_arguments(
    model: Any, solver: Any, site: Any, optimizer: Any, seed: Any, schedule: Any
) -> None:
    """Check the arguments of a game."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}.")
    check_solver(solver)
    check_seed(seed)
    if schedule is not None and not isinstance(schedule, Schedule):
        raise TypeError(f"schedule must be a mixadv.Schedule or None, got {schedule!r}.")
    if solver.ascent_dtype is not None and not ascends(solver):
        raise ValueError(
            f"{type(solver).__name__} finds δ in the learner's own passes, and ascent_dtype= acts "
            "on others: leave it out, or put autocast around the round."
        )
    if solver.recompute and not recomputes(solver):
        raise ValueError(
            f"{type(solver).__name__} keeps the graph of one pass at a time as it is: leave "
            "recompute=True out."
        )
    if any(isinstance(m, nn.DataParallel) for m in model.modules()):
        raise TypeError(
            "The model is wrapped in torch.nn.DataParallel, whose replicas would not receive δ. "
            "Use DistributedDataParallel (one process per device), or the bare model."
        )
    if any(isinstance(m, DistributedDataParallel) and m.static_graph for m in model.modules()):
        raise ValueError(
            "The model is in DistributedDataParallel(static_graph=True), which expects one forward "
            "and backward per step; under a round its replicas drift apart. Leave it out."
        )
    check_spread(model)
    if isinstance(solver, WeightsSolver) and not solver.shared and parallel.sharded(model):
        raise ValueError(
            f"{type(solver).__name__}: shared=False has each process displace the weights by "
            "itself, and those that fully_shard has spread have one gradient and one value: "
            "leave shared=True."
        )
    if site is not None and not solver.on_inputs.perturbs:
        who = type(solver).__name__
        raise ValueError(
            f"{who} moves the weights alone, and site= says where inputs are moved: leave it out, "
            f"or have both moved, {who}(solver=mixadv.PGD())."
        )
    check_trained(model, solver, optimizer)


def check_trained(model: nn.Module, solver: Solver, optimizer: Any) -> None:
    """Check that an optimizer trains what a solver needs trained."""
    learner, besides = solver.learner(), solver.modules()
    if besides and parallel.world_size() > 1:
        raise ValueError(
            f"{type(solver).__name__}: gradients of {', '.join(besides)}= would not be averaged "
            "over the processes. Leave it out where several train."
        )
    if optimizer is None:
        if learner is not None or besides:
            why = "moves the weights after a step" if learner else f"trains {', '.join(besides)}="
            why = "steps within a batch" if solver.replays_batch else why
            then = "step(closure)" if solver.replays_batch else "game"
            raise ValueError(
                f"{type(solver).__name__} {why}, which needs the optimizer: use "
                f"mixadv.wrap(optimizer, model, solver) and its .{then}."
            )
        return
    if besides and any("initial_lr" in group for group in optimizer.param_groups):
        raise ValueError(
            f"{type(solver).__name__} adds {', '.join(besides)}= to the optimizer, whose learning "
            "rate is scheduled already: wrap the optimizer before the scheduler is made."
        )
    check_base_optimizer(optimizer)
    check_held(model, solver, optimizer)


def check_held(model: nn.Module, solver: Solver, optimizer: Any) -> None:
    """Check that an optimizer holds the weights of a model, not copies as DeepSpeed gives it."""
    learner = solver.learner()
    parallel.reshard(model)  # which lists gathered weights else
    own = {id(p) for p in model.parameters()}
    held = [p for g in optimizer.param_groups for p in g["params"]]
    if not any(id(p) in own for p in held):
        raise ValueError(
            f"The optimizer holds {len(held)} parameters and none of the {len(own)} of this "
            f"{type(model).__name__}: build it from the parameters of the model that is trained. "
            "(DeepSpeed gives an optimizer flat copies of them: there use a solver that does not "
            "move the weights, such as mixadv.FreeLB(), by mixadv.Game alone.)"
        )
    outside = [p for p in held if id(p) not in own and p.requires_grad]
    if outside and learner is not None and (learner.ema_decay is not None or learner.keeps_samples):
        raise ValueError(
            f"The optimizer trains {len(outside)} parameters that are not part of the model, and "
            f"{type(solver).__name__} runs the model with other weights (a teacher, or samples), "
            "which would leave them out. Give the game a module that holds them all."
        )


def solver_of(value: Any) -> Solver:
    """Return a solver: itself, or that of a registered name at its defaults."""
    solver = make_solver(value) if isinstance(value, str) else value
    check_solver(solver)
    return solver


def check_solver(solver: Any) -> None:
    """Check that a solver is one, built."""
    if not isinstance(solver, Solver):
        built = f"mixadv.{solver.__name__}()" if inspect.isclass(solver) else "mixadv.FreeLB()"
        raise TypeError(f"solver must be a solver such as {built}, got {solver!r}.")


def check_spread(model: nn.Module) -> None:
    """Check how weights are spread over processes."""
    if any(type(m).__name__ == "DeepSpeedEngine" for m in model.modules()):
        raise TypeError(
            "A backward through DeepSpeed's engine reduces gradients, the adversary's too: give "
            "the game engine.module and call that in the closure, then "
            "engine.backward(game.loss(closure)) and engine.step()."
        )
    if any(hasattr(p, "ds_id") for p in model.parameters()):
        raise ValueError(
            "The weights are partitioned by DeepSpeed ZeRO-3, which counts each backward through "
            "its engine as one of training: a round would train on wrong gradients. Use stage 1 or "
            "2, or shard with torch.distributed.fsdp.fully_shard."
        )
    old = "FullyShardedDataParallel"
    if any(type(m).__name__ == old for m in model.modules()):
        raise TypeError(
            f"The model is wrapped in {old}, which flattens the weights that a round handles one "
            "by one. Shard it with torch.distributed.fsdp.fully_shard."
        )
    if foreign := parallel.foreign(model):
        raise ValueError(
            f"{len(foreign)} weights are DTensors that fully_shard did not make, as under tensor "
            "parallelism, where processes share a batch: each would draw another δ for it. Use "
            "DistributedDataParallel or fully_shard."
        )


def check_closure(value: Any) -> None:
    """Check that a closure can be called."""
    check_function(
        "closure must be a function that runs the forward pass and returns the loss", value
    )


def check_goals(goals: Goals, solver: Solver) -> None:
    """Check the closures of a round, and whether the solver plays them."""
    where = goals.where
    check_closure(goals.closure)
    for name in ("adversary", "retain"):
        if getattr(goals, name) is not None:
            what = "returns what it maximises" if name == "adversary" else "returns a loss"
            check_function(f"{name} must be a function that {what}", getattr(goals, name))
    if isinstance(where, Mapping):
        names = {"closure", *(["adversary"] if goals.general_sum else [])}
        if {*where} != names:
            raise ValueError(
                f"where= has masks for {', '.join(map(repr, where)) or 'nothing'}, and this round "
                f"plays {' and '.join(map(repr, sorted(names)))}: give one for each."
            )
    if not solver.perturbs and not (where is None and goals.adversary is None):
        word = "where" if goals.adversary is None else "adversary"
        raise GameError(
            f"{word}= is for an adversary on inputs, and in this game nobody moves them: leave it "
            "out, or have them moved too, mixadv.SAM(solver=mixadv.PGD())."
        )
    if not goals.general_sum:
        return
    who, curved = type(solver).__name__, solver.leaps or solver.sign == "boundary"
    reason = "direction= and sign= follow its divergence" if curved else solver.own_payoff
    if reason:
        others = ", ".join(cls.__name__ for cls in SOLVERS.values() if not cls.own_payoff)
        raise GameError(
            f"{who} takes no adversary= with a payoff of its own: {reason}. Those that do are "
            f"{others}; direction= and sign= are to be left as they are."
        )


def check_base_optimizer(optimizer: Any) -> None:
    """Check that an optimizer can be wrapped."""
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}."
        )
    if hasattr(optimizer, "game"):
        raise TypeError("The optimizer is wrapped already: wrap its .base.")
    if not hasattr(optimizer, "_optimizer_step_post_hooks"):  # as Accelerate's
        raise TypeError(
            f"{type(optimizer).__name__} was prepared around another optimizer: wrap that one "
            "first, and have the wrapped one prepared, as by accelerator.prepare(model, wrapped)."
        )
    if _asks_for_closure(optimizer):
        raise TypeError(
            f"{type(optimizer).__name__} runs the model between the two halves of its step, and a "
            "round does too: they cannot be nested. Wrap the optimizer that it is built around."
        )
    asked = inspect.signature(type(optimizer).step).parameters.get("closure")
    if asked is not None and asked.default is asked.empty:
        raise TypeError(
            f"{type(optimizer).__name__} evaluates its closure several times per step, and a round "
            "does too: they cannot be nested. Wrap a first-order optimizer such as AdamW or SGD."
        )


def _asks_for_closure(optimizer: Optimizer) -> bool:
    """Return whether a step without a closure would fail, as those of published SAM do.

    Its signature does not say so: they assert it, in a step of two halves. It cannot be tried, for
    another optimizer would step.
    """
    halves = hasattr(optimizer, "first_step") and hasattr(optimizer, "second_step")
    return halves or _asserts_closure(type(optimizer).step)


@lru_cache
def _asserts_closure(step: Callable[..., Any]) -> bool:
    try:
        source = inspect.getsource(step)
    except (OSError, TypeError):  # no source, as in a notebook that is gone
        return False
    asserts = r"assert closure\b|if (closure is None|not closure):\s+raise"
    return re.search(asserts, source) is not None


def check_reentrant(model: nn.Module, solver: Solver) -> None:
    """Check that replicas can train a model with reentrant checkpoints."""
    counts = count_passes(solver)
    replicated = any(isinstance(m, DistributedDataParallel) for m in model.modules())
    if replicated and counts.branches > counts.theta_backwards:
        raise GameError(
            f"A backward of {type(solver).__name__} runs through several passes, for each of which "
            "reentrant checkpointing would have DistributedDataParallel reduce a gradient anew: "
            "set use_reentrant=False."
        )


def check_objective(value: Any, solver: Solver) -> None:
    """Check what a solver's play yields."""
    if not isinstance(value, Tensor) or value.dim():
        tensor = isinstance(value, Tensor)
        what = f"a tensor of shape {list(value.shape)}" if tensor else repr(value)
        raise GameError(f"{type(solver).__name__}.play yielded {what}, not a 0-d tensor.")
    check_depends(value)


def check_depends(loss: Tensor) -> None:
    """Check that a loss can be differentiated."""
    if not loss.requires_grad:
        raise GameError(
            "The loss does not depend on any parameter that requires grad: the closure ran under "
            "no_grad, detached its loss, or all parameters are frozen."
        )
