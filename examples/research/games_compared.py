"""Time and gap of mixadv, nashpy, open_spiel and HiGHS on the same random zero-sum games.

    python examples/research/games_compared.py   # half an hour; --quick takes half a minute

Each solves in a process of its own with one thread, and is stopped after a minute; they take turns,
each three times, and the median counts. Seconds are those of the processor, so that other programs
count little; imports and a first small game are not timed. Payoffs are uniform and scaled to
[0, 1]; the gap is computed here, from the strategies that were returned. What takes one game at a
time solves the games of a batch one after another. Of several attempts the seconds of the last one
count, but the minute is for all.
"""

import argparse
import sys
from pathlib import Path

import _above  # noqa: F401

RESULTS = Path(__file__).parent.parent / "results" / "games_compared.jsonl"


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small games, once, ten seconds each")
    parser.add_argument("--limit", type=float, default=60.0, help="seconds for a solver")
    parser.add_argument("--repeats", type=int, default=3, help="of which the median counts")
    parser.add_argument("--output", type=Path, default=RESULTS, help="results, as JSON lines")
    return parser.parse_args(argv)


if __name__ == "__main__":
    arguments()  # a mistake is answered before the imports below, which take seconds

import json
import math
import multiprocessing
import statistics
import time
import warnings
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import psutil
import threadpoolctl
import torch

from common.tables import markdown
from peers import CONTENDERS, Array, Contender, relative_gap

Size = tuple[int, int, int]
SIZES = [(1, 10, 10), (1, 100, 100), (1, 1000, 1000), (1000, 10, 10)]
QUICK = [(1, 4, 5), (3, 4, 4)]
MEMORY = 8 * 2**30
"""Bytes for one solver, where the system can hold it to that: vertices can be very many."""


def draw(games: int, rows: int, columns: int, seed: int = 0) -> Array:
    """Return payoffs `[games, rows, columns]`, each game from 0 to 1."""
    payoffs = np.random.default_rng(seed).random((games, rows, columns))
    payoffs -= payoffs.min((1, 2), keepdims=True)
    return payoffs / payoffs.max((1, 2), keepdims=True)


def measure(contender: Contender, payoffs: Array) -> dict[str, Any]:
    """Return the seconds of the attempts that counted and the largest gap."""
    seconds, worst = 0.0, 0.0
    for payoff in [payoffs] if contender.batches else payoffs:
        gap, last, start = math.inf, 0.0, time.process_time()
        for x, y in contender.solve(payoff):
            last, gap = time.process_time() - start, relative_gap(payoff, x, y)
            if contender.aim is None or gap <= contender.aim:
                break
            start = time.process_time()
        if not math.isfinite(gap):
            return {"failed": "finds nothing"}
        seconds, worst = seconds + last, max(worst, gap)
    return {"seconds": seconds, "gap": worst}


def work(number: int, size: Size, pipe: Connection) -> None:
    """Solve in a process of its own, and tell when it starts and what came out."""
    contender, payoffs = CONTENDERS[number], draw(*size)
    if find_spec("resource"):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nashpy's, of degenerate games: the gap tells
        measure(contender, draw(1, 2, 3))
        with threadpoolctl.threadpool_limits(1):
            torch.set_num_threads(1)
            pipe.send("ready")
            try:
                pipe.send(measure(contender, payoffs))
            except Exception as error:
                pipe.send({"failed": f"fails: {type(error).__name__}"})


def run(number: int, size: Size, limit: float) -> dict[str, Any]:
    """Return what a solver reaches within the limit, in seconds."""
    methods = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    context.set_forkserver_preload(["mixadv.games", "scipy.optimize", "nashpy", "cvxpy", "pyspiel"])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=work, args=(number, size, sender), daemon=True)
    process.start()
    sender.close()
    try:
        receiver.recv()
        return _result(receiver, psutil.Process(process.pid), limit)
    except (EOFError, psutil.NoSuchProcess):
        return {"failed": "fails: the process ended"}
    finally:
        process.kill()
        process.join()
        receiver.close()


def _result(receiver: Connection, process: psutil.Process, limit: float) -> dict[str, Any]:
    """Wait for the processor's time, and for ten times the limit on the clock at most."""
    start, deadline = sum(process.cpu_times()[:2]), time.monotonic() + 10 * limit
    while not receiver.poll(0.05):
        if sum(process.cpu_times()[:2]) - start > limit or time.monotonic() > deadline:
            return {"failed": f"not in {limit:g} s"}
    return receiver.recv()


def compare(sizes: Iterable[Size], limit: float, repeats: int) -> Iterator[dict]:
    """Yield one result for each size and solver; one that fails once is not tried again."""
    missing = {name for c in CONTENDERS for name in c.needs if find_spec(name) is None}
    chosen = [i for i, c in enumerate(CONTENDERS) if not missing.intersection(c.needs)]
    for name in sorted(missing):
        print(f"{name} is not installed: its rows are left out", file=sys.stderr)
    for size in sizes:
        measured: dict[int, list[dict[str, Any]]] = {number: [] for number in chosen}
        for turn in range(repeats):
            for number in chosen[:: 1 if turn % 2 == 0 else -1]:
                if not any("failed" in found for found in measured[number]):
                    measured[number].append(run(number, size, limit))
                    print(size, CONTENDERS[number].name, measured[number][-1], file=sys.stderr)
        for number, found in measured.items():
            settings = {"size": size, "solver": CONTENDERS[number].name}
            settings |= {"aim": CONTENDERS[number].aim, "limit": limit}
            if "failed" in found[-1]:
                yield settings | found[-1]
            else:
                seconds = [f["seconds"] for f in found]
                yield settings | {"seconds": seconds, "gap": max(f["gap"] for f in found)}


def table(results: Iterable[dict[str, Any]]) -> str:
    """Return a Markdown table: median seconds, and largest gap ÷ range, by solver and size."""
    sizes: dict[str, None] = {}
    found: dict[tuple[str, str], dict[str, str]] = {}
    for result in results:
        games, rows, columns = result["size"]
        size = f"{games} of {rows}×{columns}" if games > 1 else f"{rows}×{columns}"
        aim = f"{result['aim']:g}" if result["aim"] else "its end"
        cell = result.get("failed")
        if cell is None:
            cell = f"{statistics.median(result['seconds']):.2g} s, {result['gap']:.0e}"
        sizes[size] = None
        found.setdefault((result["solver"], aim), {})[size] = cell
    rows = [[*solver, *(cells.get(size, "") for size in sizes)] for solver, cells in found.items()]
    return markdown(["solver", "stops at", *sizes], rows)


def main(argv: list[str] | None = None) -> int:
    """Compare, keep the results and print their table."""
    options = arguments(argv)
    sizes, limit, repeats = SIZES, options.limit, options.repeats
    if options.quick:
        sizes, limit, repeats = QUICK, 10.0, 1
    results = []
    for result in compare(sizes, limit, repeats):
        results.append(json.loads(json.dumps(result)))
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text("".join(json.dumps(r) + "\n" for r in results))
    print(table(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
