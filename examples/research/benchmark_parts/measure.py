"""Time and memory, measured so that a noisy machine weighs little."""

import gc
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from typing import Any

import torch

import mixadv
from benchmark_parts.contenders import CONTENDERS, WARM, Player, reached
from benchmark_parts.work import Part, Setting, Work
from mixadv.round.cost import count_passes

BLOCKS = 3
"""Times that each part is measured in a round: before, between and after the halves of the rows."""
MARK = 86_028_157
"""Bytes of a block that no model has, which marks a moment among the allocator's events."""


def seconds(device: str, part: Part) -> float:
    """Return the seconds of one play: the processor's for this process, or the GPU's."""
    part.prepare()
    gc.collect()
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        part.play()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1000
    begun = time.process_time()
    part.play()
    return time.process_time() - begun


def peak(device: str, warm: Callable[[], object], play: Callable[[], object]) -> int:
    """Return the most bytes that a play holds at once above those held before it.

    On the CPU from the allocator's events; what a kernel takes elsewhere is not seen. The allocator
    tells of the end of blocks whose begin it told of: what the play replaces, such as weights whose
    `.data` is rebound, must have been made by a warm-up that it was told of.
    """
    gc.collect()
    if device == "cuda":
        warm()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        play()
        return torch.cuda.max_memory_allocated() - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        warm()
        torch.empty(MARK, dtype=torch.uint8)
        play()
    assert profile.profiler is not None
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    changes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]
    held = list(itertools.accumulate(changes[changes.index(MARK) + 1 :]))
    return max(held) + MARK  # which the first of them gave back


def floor(units: dict[str, float], counts: dict[str, int]) -> float:
    """Return the seconds of a round that costs its passes and nothing else.

    Args:
        units: seconds of each of `Work.parts`.
        counts: passes of a round, as `mixadv.round.explain` counts them, and draws of noise for θ.
    """
    theta_backward = units["S"] - units["F"] - units["O"]
    return (
        counts["forwards"] * units["F"]
        + counts["delta_backwards"] * (units["A"] - units["F"])
        + counts["branches"] * theta_backward
        + counts["steps"] * units["O"]
        + counts["draws"] * units["N"]
    )


def counted(name: str, coordinates: int) -> dict[str, int]:
    """Return the passes of a row's solver, and its draws of noise for θ."""
    solver = CONTENDERS[name].solver(coordinates)
    learner, counts = solver.learner(), count_passes(solver)
    draws = counts.steps if learner is not None and learner.temperature else 0
    return {**asdict(counts), "draws": draws}


def entered(work: Work, names: list[str], note: Callable[[str], object]) -> dict[str, Player]:
    """Return the players of the rows; their first rounds are over.

    Those that cannot be played on this work are told of and left out.
    """
    players = {}
    for name in names:
        note(f"{name}, first round")
        work.reset()
        contender = CONTENDERS[name]
        try:
            players[name] = contender.enter(work, contender.solver(work.coordinates))
        except mixadv.GameError as error:
            print(f"{name} is left out: {error}", file=sys.stderr)
    return players


def turns(rows: list[str], parts: list[str], number: int) -> list[str]:
    """Return the order of a round: rows in two halves, parts around them; every second reversed."""
    half = len(rows) // 2
    order = [*parts, *rows[:half], *parts, *rows[half:], *parts]
    return order[::-1] if number % 2 else order


def measure(
    setting: Setting, names: list[str], rounds: int, note: Callable[[str], object]
) -> Iterator[list[dict[str, Any]]]:
    """Measure rows on one setting; yield the result of each so far, after every round.

    Args:
        setting: the work.
        names: of the rows.
        rounds: in each of which all rows take their turn.
        note: told what comes next, for each play.
    """
    work = Work(setting)
    players = entered(work, names, note)
    plain = peak(setting.device, lambda: (work.step(), work.reset()), work.step)
    memory: dict[str, dict[str, Any]] = {}
    for name, player in players.items():
        note(f"{name}, memory")
        memory[name] = held(work, player)
    parts = work.parts()
    plays = {n: Part(work.reset, partial(p.play, None)) for n, p in players.items()}
    counts = {name: counted(name, work.coordinates) for name in players}
    fixed = {**asdict(setting), "torch": torch.__version__, "plain_peak": plain}
    for taken in timed(setting.device, parts, plays, rounds, note):
        units = {name: list(taken[name]) for name in parts}
        yield [
            fixed
            | {"row": name, "passes": counts[name], "seconds": list(taken[name]), "units": units}
            | memory[name]
            for name in players
        ]


def held(work: Work, player: Player) -> dict[str, Any]:
    """Return what a player holds, in bytes, and the divergence that it reaches."""

    def warm() -> None:
        work.reset()
        player.play(WARM)
        work.reset()

    most = peak(work.setting.device, warm, partial(player.play, None))
    return {"peak": most, "kept": player.kept(), "payoff": reached(work, player)}


def timed(
    device: str,
    parts: dict[str, Part],
    plays: dict[str, Part],
    rounds: int,
    note: Callable[[str], object],
) -> Iterator[dict[str, list[float]]]:
    """Yield the seconds of each part and play in the rounds so far, after every round.

    Parts are measured before, between and after the halves of the plays; their median counts.
    """
    known = {**parts, **plays}
    taken: dict[str, list[float]] = {name: [] for name in known}
    gc.collect()
    gc.freeze()  # what is here stays, and need not be looked through before each play
    try:
        for number in range(rounds):
            found: dict[str, list[float]] = {name: [] for name in known}
            for name in turns(list(plays), list(parts), number):
                note(f"{name}, round {number + 1} of {rounds}")
                found[name].append(seconds(device, known[name]))
            for name, values in found.items():
                taken[name].append(statistics.median(values))
            yield taken
    finally:
        gc.unfreeze()
