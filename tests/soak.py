"""Long runs of every solver, and what they hold: a table by `python -m tests.soak`.

After a warm-up, each tenth of the rounds ends with a look at what could grow: tensors and the bytes
in them, hooks, open files, all objects of the process, and its memory. A run of ten thousand rounds
holds what one of a thousand did, or it is a leak.
"""

import argparse
import ctypes
import gc
import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.optim import AdamW
from tqdm import tqdm

import mixadv
from tests.zoo import CANNOT, WAYS, moving_inputs, play, small, wrapped

LINUX = Path("/proc/self/statm").exists() and hasattr(ctypes.CDLL(None), "mallinfo2")
"""Whether the system tells what is looked at: Linux with glibc 2.33 or later."""

SOLVERS: dict[str, dict[str, Any]] = {name: {} for name in mixadv.SOLVERS}
SOLVERS["mat"] = {"samples": 2, "particles": 2, "average": "uniform"}
SOLVERS["freeat"] = {"carry": True}
EXACT = ("tensors", "bytes in tensors", "hooks", "files")
OBJECTS, MEMORY = 10, 512 * 1024
"""How much the process itself may grow: caches fill, the allocator keeps what it has taken."""


class Run:
    """A solver on a tiny model."""

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


class Allocations(ctypes.Structure):
    """What glibc's mallinfo2 tells of the allocator, in bytes."""

    _fields_ = [
        ("arena_to_hblks", 4 * ctypes.c_size_t),
        ("hblkhd", ctypes.c_size_t),
        ("usmblks_and_fsmblks", 2 * ctypes.c_size_t),
        ("uordblks", ctypes.c_size_t),
        ("fordblks_and_keepcost", 2 * ctypes.c_size_t),
    ]


def memory() -> tuple[int, int]:
    """Return the bytes that the process occupies, and those that malloc has given out.

    Small tensors that leak may lie in gaps of a heap that is there; then only the second grows.
    The first has no part of what the allocator keeps for later, and all that is not malloc's.
    """
    libc = ctypes.CDLL("libc.so.6")
    libc.malloc_trim(0)
    libc.mallinfo2.restype = Allocations
    told = libc.mallinfo2()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE"), told.uordblks + told.hblkhd


def soaked(name: str, rounds: int, note: Callable[[], object] = lambda: None) -> dict[str, int]:
    """Return by how much a solver's footprint grew from the second tenth of its rounds to the last.

    Objects and memory are those at the least of the last three looks: other users of the process,
    such as the allocator, come and go.
    """
    looks = []
    with moving_inputs(name):
        run = Run(name)
        run.footprint()  # which itself makes a few objects once
        for _ in range(10):
            run.train(rounds // 10)
            occupied, given = memory()
            looks.append({**run.footprint(), "memory": occupied, "allocations": given})
            note()
    first, *_, last = looks[1:]
    grown = {what: last[what] - first[what] for what in EXACT}
    for what in ("objects", "memory", "allocations"):
        grown[what] = min(look[what] for look in looks[-3:]) - first[what]
    return grown


def leaks(grown: dict[str, int]) -> list[str]:
    """Return what grew more than it may."""
    most = {**dict.fromkeys(EXACT, 0), "objects": OBJECTS}
    most |= {"memory": MEMORY, "allocations": MEMORY}
    return [what for what, value in grown.items() if value > most[what]]


def main(argv: list[str] | None = None) -> int:
    """Print a row for each solver; return 1 where one holds more and more."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--rounds", type=int, default=10_000, help="(default: %(default)s)")
    parser.add_argument("--solver", nargs="+", choices=SOLVERS, default=list(SOLVERS))
    options = parser.parse_args(argv)
    if options.rounds < 10:
        parser.error(f"--rounds must be at least 10, a look at each tenth, got {options.rounds}")
    torch.set_num_threads(1)
    leaking = False
    print("| solver | rounds | ms a round | tensors | hooks | files | objects | memory, KiB | |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |", flush=True)
    with tqdm(total=10 * len(options.solver), disable=None, leave=False) as bar:
        for name in options.solver:
            bar.set_description(name)
            begun = time.process_time()
            grown = soaked(name, options.rounds, bar.update)
            each = 1000 * (time.process_time() - begun) / options.rounds
            found = leaks(grown)
            leaking |= bool(found)
            cells = [f"+{grown[what]}" for what in ("tensors", "hooks", "files", "objects")]
            verdict = f"**grows: {', '.join(found)}**" if found else "flat"
            cells += [f"{grown['memory'] / 1024:+.0f}", verdict]
            bar.clear()
            print(f"| {name} | {options.rounds} | {each:.1f} | {' | '.join(cells)} |", flush=True)
    return int(leaking)


if __name__ == "__main__":
    sys.exit(main())
