"""Two processes that are killed go on as if nothing had been: `python -m tests.killed` for long."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests import killed

ROOT = Path(__file__).parent.parent
KILLS = 3


@pytest.mark.slow
def test_two_processes_killed_at_random_moments_are_two_that_never_were():
    words = ["--kills", str(KILLS), "--solver", "mat", "textat"]
    command = [sys.executable, "-m", "tests.killed", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert [line.split(":")[0] for line in lines] == ["mat", "textat"]
    assert all("equal to an uninterrupted run" in line for line in lines)


def test_states_that_differ_in_one_number_are_not_the_same():
    state = {"model": {"w": torch.ones(2)}, "optimizer": {"round": 3, "groups": [{"lr": 0.1}]}}
    killed.assert_same(state, {**state, "model": {"w": torch.ones(2)}})
    for other in (
        {**state, "model": {"w": torch.tensor([1.0, 1.0 + 1e-7])}},
        {**state, "optimizer": {"round": 4, "groups": [{"lr": 0.1}]}},
        {"model": state["model"]},
    ):
        with pytest.raises(AssertionError):
            killed.assert_same(state, other)


def test_a_run_goes_on_from_the_last_round_that_both_have_saved(tmp_path: Path):
    assert killed.last(tmp_path) == 0
    for name in ("3.rank0", "3.rank1", "6.rank0", "6.rank1", "9.rank0", "new.1"):
        (tmp_path / name).touch()
    assert killed.last(tmp_path) == 6
