"""Long runs: nothing is held that a step before it did not hold."""

import pytest
import torch

from tests import soak
from tests.soak import LINUX, SOLVERS, Run, memory
from tests.zoo import slow_but

WARM_UP = 12  # fills what is kept: samples, the table of hooks, torch's own caches


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


def assert_memory_is_flat(run: Run, steps: int) -> None:
    """Assert that steps take no memory from the system; a leak takes some each time.

    The allocator takes half a megabyte now and then, and keeps it for later.
    """
    for _ in range(4):
        used = memory()
        run.train(steps)
        grown = max(now - then for now, then in zip(memory(), used, strict=True))
        if grown < 500 * steps:  # a tensor takes more than 500 bytes
            return
    raise AssertionError(f"{grown} bytes more after {steps} steps, four times")


pytestmark = pytest.mark.skipif(not LINUX, reason="reads Linux's /proc and glibc's mallinfo2")


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
    run.train(1000)
    assert_nothing_is_held(run, 1000)
    assert_memory_is_flat(run, 1000)


@pytest.mark.slow
def test_memory_that_each_step_takes_is_found():
    """Also where the heap has gaps that take the tensors in, as after many other tests."""
    gaps = [torch.zeros(100) for _ in range(20_000)]
    del gaps[::2]
    run, held = Run("fgm"), []
    close = run.train

    def train(steps: int) -> None:
        close(steps)
        held.extend(torch.zeros(64) for _ in range(steps))

    run.train = train  # type: ignore[method-assign]
    run.train(400)  # fills what the allocator has left over
    with pytest.raises(AssertionError, match="bytes more after 400 steps, four times"):
        assert_memory_is_flat(run, 400)


@pytest.mark.slow
def test_a_soak_has_a_row_for_each_solver(capsys: pytest.CaptureFixture[str]):
    assert soak.main(["--rounds", "300", "--solver", "pgd", "mat"]) == 0
    header, _, *rows = capsys.readouterr().out.splitlines()
    assert "memory" in header
    assert [row.split(" | ")[0] for row in rows] == ["| pgd", "| mat"]
    assert all(row.endswith("| flat |") for row in rows)


@pytest.mark.slow
def test_a_soak_tells_of_a_tensor_that_is_held_from_each_round(monkeypatch: pytest.MonkeyPatch):
    held: list[object] = []
    close = soak.Run.train

    def train(run: Run, steps: int) -> None:
        close(run, steps)
        held.append(run.optimizer.outcome)

    monkeypatch.setattr(soak.Run, "train", train)
    grown = soak.soaked("fgm", 100)
    assert {"tensors", "bytes in tensors"} <= {*soak.leaks(grown)}
