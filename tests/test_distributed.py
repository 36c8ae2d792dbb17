"""Replicas in DistributedDataParallel: two processes train as one, whatever the solver."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

import mixadv
from mixadv.model.noise import Noise
from mixadv.round.cost import count_passes
from tests.processes import (
    CLASSES,
    SOLVERS,
    Net,
    Verdict,
    assert_equal_on_all,
    batches,
    by_name,
    closure,
    found,
    judge,
    play,
    refusal,
    replicated,
    start,
    times,
    verdicts_of,
    ways,
)
from tests.zoo import AROUND, TWINS, without_dropout, wrapped

ROWS = 4
# They compare the rows of a process with each other.
DEPENDS_ON_THE_SPLIT = {"cat", "cvar", "chi_square"}


def train(
    solver: mixadv.Solver, way: str, rank: int, rounds: int = 3, micro: int = 1, **how: Any
) -> mixadv.GameOptimizer:
    model = replicated(**how)
    optimizer = start(model, solver)
    torch.manual_seed(100 + rank)
    rows = list(batches(rank, rounds * micro))
    for r in range(rounds):
        play(optimizer, way, *[closure(model, *b) for b in rows[r * micro : (r + 1) * micro]])
    return optimizer


# Cases ---------------------------------------------------------------------------------------


def replicas_stay_equal(rank: int, name: str, way: str, rounds: int = 2, **how: Any) -> str | None:
    solver = SOLVERS[name]
    if reason := refusal(solver, way, lambda: train(solver, way, rank, rounds, **how)):
        return reason
    for micro in [1, 2] if way in ("backward", "loss") else [1]:
        optimizer = train(solver, way, rank, rounds, micro, **how)
        kept = found(optimizer)
        assert all(x.isfinite().all() for x in kept)
        assert_equal_on_all(kept)
        assert optimizer.game.strategy is not None
        mine = optimizer.game.strategy.points[0]
        others = mine.clone()
        dist.broadcast(others, 0)
        assert rank == 0 or not torch.equal(others, mine), "adversaries share their draws"
    return None


class SampleNoise(Noise):
    """Draws for the rows of all processes, of which each takes its own."""

    def __init__(self, mine: slice, rows: int) -> None:
        super().__init__(0)
        self.mine, self.rows = mine, rows

    def begin(self, player: str, round: int, rank: int | None = None) -> None:
        super().begin(player, round)

    def __call__(self, kind: str, like: Tensor) -> Tensor:
        particles = len(like) // (self.mine.stop - self.mine.start)
        size = (particles, self.rows, *like.shape[1:])
        drawn = super().__call__(kind, like.new_empty(size).flatten(0, 1))
        return drawn.view(size)[:, self.mine].flatten(0, 1)


def weights_after(model: nn.Module, solver: mixadv.Solver, way: str, mine: slice) -> list[Tensor]:
    optimizer = wrapped(without_dropout(model), solver)
    optimizer.game.rounds.arena.noise = SampleNoise(mine, 2 * ROWS)
    for ids, labels in batches(7, 3, 2 * ROWS):
        play(optimizer, way, closure(model, ids[mine], labels[mine]))
    return found(optimizer)


def split_makes_no_difference(rank: int, name: str) -> None:
    for way in ways(SOLVERS[name]):
        mine = slice(rank * ROWS, (rank + 1) * ROWS)
        two = weights_after(replicated(), SOLVERS[name], way, mine)
        one = weights_after(Net(), SOLVERS[name], way, slice(0, 2 * ROWS))
        torch.testing.assert_close(two, one, rtol=1e-9, atol=1e-12)


def only_the_contrast_depends_on_the_split(rank: int) -> None:
    mine = slice(rank * ROWS, (rank + 1) * ROWS)
    for contrast in (0.0, 0.1):
        # With shared=True a token's places in the batch of a process share one perturbation.
        solver = mixadv.CAT(contrast_weight=contrast, shared=False)
        two = weights_after(replicated(), solver, "step", mine)
        one = weights_after(Net(), solver, "step", slice(0, 2 * ROWS))
        pairs = zip(two, one, strict=True)
        same = all(torch.allclose(a, b, rtol=1e-9, atol=1e-12) for a, b in pairs)
        assert same == (contrast == 0)


def groups_are_those_of_all_processes(rank: int) -> None:
    """Weights of groups move by the rows of both processes, which train as one on them all.

    A process may lack a group, and the processes may have other numbers of its rows each.
    """
    mine, every = slice(rank * ROWS, (rank + 1) * ROWS), slice(0, 2 * ROWS)
    groups = torch.tensor([0, 0, 1, 0, 2, 1, 2, 2])
    for way, steps in (("step", 0), ("loss", 1), ("backward", 1)):
        solver, found = mixadv.GroupDRO(groups=3, mirror_step=0.5, steps=steps), []
        for model, rows in ((replicated(), mine), (Net(), every)):
            optimizer = wrapped(without_dropout(model), solver)
            game, how, objectives = optimizer.game, {"groups": groups[rows]}, []
            for ids, labels in batches(7, 3, 2 * ROWS):
                run = one_loss_each(model, ids[rows], labels[rows])
                if way == "step":
                    objectives.append(optimizer.step(run, **how))
                    continue
                played = getattr(game, way)(run, **how)
                if way == "loss":
                    played.backward()
                objectives.append(game.outcome.objective)
                optimizer.step()
                optimizer.zero_grad()
            memory = game.state_dict()["memory"]["group log-weights"]
            weights = [p.detach() for p in game.model.parameters()]
            found.append([*weights, memory, *objectives])
        torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-12)
        assert_equal_on_all(found[0])


def one_loss_each(model: nn.Module, ids: Tensor, labels: Tensor) -> Any:
    return lambda: F.cross_entropy(model(ids), labels, reduction="none")


def goals_of_their_own(rank: int, name: str) -> None:
    """Three closures, one of them at δ = 0: two processes train as one, by one all-reduce."""
    mine, every = slice(rank * ROWS, (rank + 1) * ROWS), slice(0, 2 * ROWS)
    reduced: list[Any] = []

    def count(_, bucket):
        reduced.append(bucket)
        return allreduce_hook(dist.group.WORLD, bucket)

    def trained(model: nn.Module, rows: slice, way: str) -> list[Tensor]:
        optimizer = wrapped(without_dropout(model), SOLVERS[name])
        optimizer.game.rounds.arena.noise = SampleNoise(rows, 2 * ROWS)
        own, others = batches(7, 3, 2 * ROWS), batches(8, 3, 2 * ROWS)
        for (ids, labels), (kept, answers) in zip(own, others, strict=True):
            plain = closure(model, ids[rows], labels[rows])
            target = (labels[rows] + 1) % CLASSES

            def towards(plain: Any = plain, target: Tensor = target) -> Tensor:
                return -F.cross_entropy(plain()[1], target, reduction="none")

            goals = {
                "adversary": towards,
                "retain": closure(model, kept[rows], answers[rows]),
            }
            reduced.clear()
            if way == "step":
                optimizer.step(plain, **goals)
                assert len(reduced) == optimizer.outcome.steps or rows == every
                continue
            optimizer.game.loss(plain, **goals).backward()
            assert len(reduced) == 1 or rows == every
            optimizer.step()
            optimizer.zero_grad()
        return found(optimizer)

    for way in ("step", "loss"):
        model = replicated()
        model.register_comm_hook(None, count)
        pairs = trained(model, mine, way), trained(Net(), every, way)
        torch.testing.assert_close(*pairs, rtol=1e-9, atol=1e-12)


def one_all_reduce_per_step(rank: int, name: str, **how: Any) -> None:
    for way in ways(SOLVERS[name], every=True):
        for micro in [1, 2] if way in ("backward", "loss") else [1]:
            model, reduced = replicated(**how), []

            def count(_, bucket, reduced=reduced):
                reduced.append(bucket)
                return allreduce_hook(dist.group.WORLD, bucket)

            model.register_comm_hook(None, count)
            optimizer = start(model, SOLVERS[name])
            for rows in zip(*[batches(rank + i, 2) for i in range(micro)], strict=True):
                reduced.clear()
                play(optimizer, way, *[closure(model, *r) for r in rows])
                steps = optimizer.outcome.steps if way == "step" else 1
                assert len(reduced) == steps, (way, micro)


def collectives_of_a_round(rank: int, name: str) -> None:
    calls: list[int] = []
    reduce, model = dist.all_reduce, replicated()
    optimizer = start(model, SOLVERS[name])
    dist.all_reduce = lambda *args, **more: calls.append(1) or reduce(*args, **more)
    try:
        for number, rows in enumerate(batches(rank, 3)):
            calls.clear()
            optimizer.step(closure(model, *rows))
            arena = optimizer.game.rounds.arena  # gradients of weights that move are averaged
            weights = len(arena.displaced(arena.parameters())) if name in AROUND else 0
            assert len(calls) == 2 * (name == "textat") + weights + (number == 0)  # the unit
    finally:
        dist.all_reduce = reduce


def nobody_waits(rank: int, name: str) -> None:
    """One process meets a loss that is not finite, the other does not."""
    for way in ways(SOLVERS[name]):
        model = replicated()
        optimizer = start(model, SOLVERS[name])
        for number, (ids, labels) in enumerate(batches(rank, 3)):
            factor = torch.nan if number == 1 and rank == 0 else 1.0
            play(optimizer, way, times(factor, closure(model, ids, labels)))
        kept = found(optimizer)
        assert not kept[0].isfinite().all()
        assert_equal_on_all(kept)
        if name == "textat":
            assert optimizer.game.rounds.memory["table"].isfinite().all()


def checkpoints_change_nothing(rank: int, name: str, reentrant: bool) -> None:
    solver = SOLVERS[name]
    counted = count_passes(solver)
    for way in ways(solver):
        plain = found(train(solver, way, rank))
        two_in_one = counted.branches > counted.theta_backwards
        by_itself = way in ("loss", "closure") and counted.theta_backwards > counted.steps
        if reentrant and (two_in_one or by_itself):
            with pytest.raises(mixadv.GameError, match=r"use_reentrant=False"):
                train(solver, way, rank, reentrant=reentrant)
            continue
        recomputed = found(train(solver, way, rank, reentrant=reentrant))
        torch.testing.assert_close(recomputed, plain, rtol=1e-9, atol=1e-12)


def resumed(rank: int, name: str) -> None:
    solver = SOLVERS[name]
    model = replicated()
    optimizer = start(model, solver)
    rows = list(batches(rank, 4))
    for r in rows[:2]:
        optimizer.step(closure(model, *r))
    state: list[Any] = [model.state_dict(), optimizer.state_dict(), torch.get_rng_state()]
    every = [None, None]
    dist.all_gather_object(every, state[:2])
    if name != "freeat":  # which carries δ of its own rows
        torch.testing.assert_close(every[0], every[1], rtol=0, atol=0)
    weights, ours = every[rank if name == "freeat" else 0]
    for r in rows[2:]:
        optimizer.step(closure(model, *r))
    again = replicated()
    other = start(again, solver)
    again.load_state_dict(weights)
    other.load_state_dict(ours)
    torch.set_rng_state(state[2])
    for r in rows[2:]:
        other.step(closure(again, *r))
    torch.testing.assert_close(found(other), found(optimizer), rtol=0, atol=0)


def heads_of_cat_are_refused(rank: int) -> None:
    with pytest.raises(ValueError, match=r"gradients of head= would not be averaged"):
        train(replace(SOLVERS["cat"], head=nn.Linear(6, 2)), "step", rank)


def a_model_out_of_its_wrapper_is_warned_of(rank: int) -> None:
    model = replicated()
    optimizer = start(model, mixadv.PGD())
    with pytest.warns(UserWarning, match=r"gradients are not averaged.*game\.backward"):
        optimizer.step(closure(model.module, *next(batches(rank, 1))))


# Tests ---------------------------------------------------------------------------------------


def by_solver(case: Any, **words: Any) -> dict[str, Any]:
    return by_name(case, case.__name__, **words)


def replicated_by(way: str, **words: Any) -> dict[str, Any]:
    return by_name(replicas_stay_equal, way, way=way, **words)


# What a round keeps, and how its steps and graphs follow each other, differs by these; all solvers
# are counted where a layer is unused, and resumed on one process.
KINDS = ("freelb", "textat", "freeat", "smart", "mat", "awp", "ensemble", "recomputed")
ROUNDS = [name for name in SOLVERS if name not in TWINS]  # that are not those of another
PER_SAMPLE = [name for name in ROUNDS if name not in DEPENDS_ON_THE_SPLIT]
CASES: dict[str, Any] = {
    **replicated_by("step"),
    **replicated_by("loss"),
    **by_name(split_makes_no_difference, "split", PER_SAMPLE),
    **by_name(goals_of_their_own, "goals of their own", ["pgd", "freelb", "mat"]),
    "split: groups": groups_are_those_of_all_processes,
    "split: cat": only_the_contrast_depends_on_the_split,
    **by_solver(one_all_reduce_per_step, names=KINDS),
    **by_solver(collectives_of_a_round, names=ROUNDS),
    # MART reads labels from the loss, and here not from the logits that it was computed from.
    **by_solver(nobody_waits, names=[name for name in ROUNDS if name != "mart"]),
    **by_solver(resumed, names=KINDS),
    "heads of CAT are refused": heads_of_cat_are_refused,
    "a model out of its wrapper is warned of": a_model_out_of_its_wrapper_is_warned_of,
}
UNUSED = replicated_by("step", unused=True)
UNUSED |= by_solver(one_all_reduce_per_step, unused=True)
LONG = replicated_by("step", rounds=50) | replicated_by("loss", rounds=50)
KEPT = by_solver(checkpoints_change_nothing, reentrant=False)
REENTRANT = by_solver(checkpoints_change_nothing, reentrant=True)
SLOW: dict[str, Any] = {
    **{f"50 steps, {n}": c for n, c in LONG.items()},
    **{f"unused, {n}": c for n, c in UNUSED.items()},
    **{f"checkpointed, {n}": c for n, c in KEPT.items()},
    **{f"reentrant, {n}": c for n, c in REENTRANT.items()},
}
FEW = ("freelb", "smart", "mat")
CASES |= {n: c for n, c in SLOW.items() if n[:2] != "50" and n.split(": ")[1] in FEW}


verdicts = verdicts_of(CASES, "distributed")


@pytest.mark.parametrize("case", CASES)
def test_two_processes(case: str, verdicts: dict[str, Verdict]):
    verdicts[case].hold()


@pytest.mark.slow
def test_two_processes_for_long_and_with_checkpoints(tmp_path: Any):
    for verdict in judge(SLOW, tmp_path).values():
        verdict.hold()
