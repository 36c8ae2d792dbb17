"""Two processes that are killed and go on, against two that nobody interrupts.

    python -m tests.killed --solver mat --kills 20

Both processes train replicas of a tiny model and save what they are every few rounds. At a random
moment one of them ends itself by SIGKILL, wherever it is: in a pass, in an all-reduce, in the
middle of a file. Then both begin anew from the last round that both have saved. After so many
deaths they go a little further, and must be what an uninterrupted run is, bit for bit.
"""

import argparse
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import threading
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

import mixadv
from tests.processes import CLASSES, LENGTH, WAIT, WORDS, closure, replicated, start
from tests.zoo import moving_inputs

EVERY = 3
"""Rounds from one checkpoint to the next."""
FURTHER = 7
"""Rounds after the last death; no multiple of the rounds between checkpoints."""
ENDLESS = 10**9
LIFE = 0.5
"""The longest that a process lives after its first round, in seconds."""


def batch(rank: int, number: int) -> tuple[Tensor, Tensor]:
    """Return the rows of a process in a round."""
    draw = torch.Generator().manual_seed(2 * number + rank)
    ids = torch.randint(0, WORDS, (4, LENGTH), generator=draw)
    return ids, torch.randint(0, CLASSES, (4,), generator=draw)


def live(rank: int, name: str, folder: Path, begun: int, until: int, life: float | None) -> None:
    """Be one of the processes, from a round on, until another or until it ends itself."""
    if until == ENDLESS:  # who survives the other has an error to tell, and it is expected
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=WAIT)
    with moving_inputs(name):
        model = replicated()
        optimizer = start(model, mixadv.make_solver(name))
        torch.manual_seed(rank)
        if begun:
            state = torch.load(saved(folder, begun, rank), weights_only=True)
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            torch.set_rng_state(state["random"])
        for number in range(begun, until):
            optimizer.step(closure(model, *batch(rank, number)))
            if number == begun and life is not None:
                threading.Timer(life, os.kill, (os.getpid(), signal.SIGKILL)).start()
            if (number + 1) % EVERY == 0 or number + 1 == until:
                state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
                torch.save({**state, "random": torch.get_rng_state()}, folder / f"new.{rank}")
                (folder / f"new.{rank}").replace(saved(folder, number + 1, rank))
    dist.barrier()
    dist.destroy_process_group()


def saved(folder: Path, number: int, rank: int) -> Path:
    """Return where a process saves what it is after so many rounds."""
    return folder / f"{number}.rank{rank}"


def last(folder: Path) -> int:
    """Return the last round that both processes have saved, 0 where there is none."""
    rounds = [{int(f.stem) for f in folder.glob(f"*.rank{rank}")} for rank in range(2)]
    return max(rounds[0] & rounds[1], default=0)


def run(name: str, folder: Path, until: int, lives: list[float | None]) -> list[int | None]:
    """Run both processes once; return how they ended. The death of one is the other's too."""
    folder.mkdir(exist_ok=True)
    (folder / "store").unlink(missing_ok=True)
    spawn, begun = multiprocessing.get_context("fork"), last(folder)
    how = [(rank, name, folder, begun, until, life) for rank, life in enumerate(lives)]
    both: list[BaseProcess] = [spawn.Process(target=live, args=words) for words in how]
    for process in both:
        process.start()
    while any(p.is_alive() for p in both) and not any(p.exitcode for p in both):
        time.sleep(0.01)
    for process in both:
        process.kill()
        process.join()
    return [p.exitcode for p in both]


def survived(name: str, kills: int, folder: Path, draw: random.Random, bar: Any) -> int:
    """Kill a run so many times, let it end, and return how many rounds it came to.

    Raises:
        AssertionError: where it ended in another way, or is not what an uninterrupted one is.
    """
    for _ in range(kills):
        lives: list[float | None] = [None, None]
        victim = draw.randrange(2)
        lives[victim] = draw.uniform(0, LIFE)
        ends = run(name, folder / "killed", ENDLESS, lives)
        assert ends[victim] == -signal.SIGKILL, f"processes ended with {ends}"
        bar.update()
    until = last(folder / "killed") + FURTHER
    for which in ("killed", "whole"):
        ends = run(name, folder / which, until, [None, None])
        assert ends == [0, 0], f"the {which} run ended with {ends}"
    for rank in range(2):
        pair = [torch.load(saved(folder / w, until, rank)) for w in ("killed", "whole")]
        assert_same(*pair)
    return until


def assert_same(one: Any, other: Any) -> None:
    """Assert that two states are equal, bit for bit, and their order too."""
    if isinstance(one, dict):
        assert list(one) == list(other)
        one, other = list(one.values()), list(other.values())
    if isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for pair in zip(one, other, strict=True):
            assert_same(*pair)
    elif isinstance(one, Tensor):
        assert torch.equal(one, other)
    else:
        assert one == other


def main(argv: list[str] | None = None) -> int:
    """Print a line for each solver; return 1 where a run is not what it should be."""
    parser = argparse.ArgumentParser(prog="python -m tests.killed", description=__doc__)
    parser.add_argument("--solver", nargs="+", choices=mixadv.SOLVERS, default=["mat"])
    parser.add_argument("--kills", type=int, default=20, help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    options = parser.parse_args(argv)
    if options.kills < 1:
        parser.error(f"--kills must be at least 1, got {options.kills}")
    failed = False
    with tqdm(total=options.kills * len(options.solver), disable=None, leave=False) as bar:
        for name in options.solver:
            bar.set_description(name)
            with tempfile.TemporaryDirectory() as folder:
                try:
                    draw = random.Random(options.seed)
                    rounds = survived(name, options.kills, Path(folder), draw, bar)
                    said = f"{options.kills} kills, {rounds} rounds, equal to an uninterrupted run"
                except AssertionError as error:
                    failed, said = True, f"FAILED: {error}"
            bar.clear()
            print(f"{name}: {said}", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
