"""Long runs: nothing is held that a step before it did not hold."""

import ctypes
import gc
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim import AdamW

import mixadv
from tests.zoo import CANNOT, WAYS, play, slow_but, small, wrapped

WARM_UP = 12  # fills what is kept: samples, the table of hooks, torch's own caches
SOLVERS: dict[str, dict[str, Any]] = {name: {} for name in mixadv.SOLVERS}
SOLVERS["mat"] = {"samples": 2, "particles": 2, "average": "uniform"}
SOLVERS["freeat"] = {"carry": True}


class Run:
    def __init__(self, name: str) -> None:
        self.player = small()
        solver = mixadv.make_solver(name, **SOLVERS[name])
        self.optimizer = wrapped(self.player.model, solver, AdamW, lr=1e-3)

    def train(self, steps: int) -> None:
        """Train by each way in turn; whole rounds of the learner in each."""
        ways = [w for w in WAYS if (self.optimizer.game.solver.name, w) not in CANNOT]
        for way in ways:
            for _ in range(2 * math.ceil(steps / len(ways) / 2)):
                play(self.optimizer, self.player.closure(), way)

    def footprint(self) -> dict[str, int]:
        """Return counts of what could grow."""
        gc.collect()
        objects = gc.get_objects()
        tensors = [x for x in objects if issubclass(type(x), torch.Tensor)]
        hooks = [
            len(value)
            for holder in (
                *self.player.model.modules(),
                self.optimizer.base,
                self.optimizer,
                *tensors,
            )
            for name, value in vars(holder).items()
            if name.endswith("_hooks") and value is not None
        ]
        return {
            "objects": len(objects),
            "tensors": len(tensors),
            "bytes in tensors": sum(x.untyped_storage().nbytes() for x in tensors),
            "hooks": sum(hooks),
            "files": len(os.listdir("/proc/self/fd")),
        }


def resident() -> int:
    """Return the bytes of memory in use, without what the allocator keeps for later."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def assert_nothing_is_held(run: Run, steps: int) -> None:
    """Assert that steps leave what they found; an object held per step would show each time.

    Objects of the process's other users come and go: caches, what earlier tests have left.
    """
    run.footprint()  # which itself makes a few objects once
    for _ in range(4):
        before = run.footprint()
        run.train(steps)
        after = run.footprint()
        grown = after.pop("objects") - before.pop("objects")
        assert after == before
        if grown <= 10:
            return
    raise AssertionError(f"{grown} objects more after {steps} steps, four times")


pytestmark = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's /proc")


USUAL = ("mat",)  # it keeps the most; the others are slow tests


@pytest.mark.parametrize("name", slow_but(USUAL, SOLVERS))
def test_fifty_steps_hold_no_more_than_twelve(name: str):
    run = Run(name)
    run.train(WARM_UP)
    assert_nothing_is_held(run, 50)


@pytest.mark.slow
@pytest.mark.parametrize("name", SOLVERS)
def test_two_thousand_steps_hold_no_more_than_one_thousand(name: str):
    run = Run(name)
    run.train(1000)  # the allocator takes half a megabyte along the way, once
    run.footprint()
    used = resident()
    assert_nothing_is_held(run, 1000)
    assert resident() - used < 1000 * 500  # a tensor takes more than 500 bytes
