"""Jobs side by side, one on each core or GPU."""

import gc
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from typing import Any

import torch

Job = tuple[Callable[..., Any], tuple[Any, ...]]
"""A function and its arguments."""


def devices() -> int:
    """Return how many jobs can run side by side: one on each GPU, without one on each core."""
    return torch.cuda.device_count() or len(os.sched_getaffinity(0))


def machine() -> str:
    """Return the machine in words."""
    count = len(os.sched_getaffinity(0))
    cores = f"{count} core{'s' if count > 1 else ''}"
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return ", ".join([*gpus, cores, f"torch {torch.__version__}"])


def side_by_side(ready: Callable[[], Iterable[tuple[str, Job]]], workers: int) -> Iterator[Any]:
    """Yield the results of jobs as they come.

    Args:
        ready: returns the jobs that can be started, by key, in order; asked again after each
            result, since one may make others possible. It leaves out those whose results were
            yielded.
        workers: jobs at a time.

    Raises:
        Exception: that of the first job that failed, with a note of its key, after the others that
            ran were yielded.
    """
    _set_environment()
    context = multiprocessing.get_context("spawn")  # a GPU does not survive a fork
    numbers = context.Queue()
    for number in range(workers):
        numbers.put(number)
    running: dict[Future[Any], str] = {}
    failures: list[BaseException] = []
    with ProcessPoolExecutor(workers, context, _prepare, (numbers, workers, os.getpid())) as pool:
        try:
            while True:
                for key, (function, arguments) in ready() if not failures else ():
                    if len(running) == workers:
                        break
                    if key not in running.values():
                        _say(f"{key} has started")
                        running[pool.submit(_run, function, arguments)] = key
                if not running:
                    break
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    key = running.pop(future)
                    if error := future.exception():
                        _say(f"{key} has failed")
                        error.add_note(f"In {key}.")
                        failures.append(error)
                    else:
                        _say(f"{key} is finished")
                        yield future.result()
        except BaseException:  # as an interrupt: without this it would wait for the jobs that run
            for process in multiprocessing.active_children():
                process.terminate()
            raise
    if failures:
        raise failures[0]


def _set_environment() -> None:
    """Set what workers and the process that cleans up after a kill read when they start.

    By default a thread of OpenMP that waits for the others keeps its core busy. Where cores are
    shared, as with a second program, the others then wait for theirs: updates took ten times as
    long with two threads as with one. The semaphores of a killed study are removed; it need not be
    said that they were there.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    given, quiet = os.environ.get("PYTHONWARNINGS", ""), "ignore:resource_tracker:UserWarning"
    if quiet not in given:
        os.environ["PYTHONWARNINGS"] = f"{given},{quiet}".lstrip(",")


def _say(text: str) -> None:
    """Note what happens in a terminal or a file, at once."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def _run(function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    """Run a job; free its model, which lies in cycles that are rarely looked for."""
    try:
        return function(*arguments)
    finally:
        gc.collect()


def _prepare(numbers: Any, workers: int, parent: int) -> None:
    """Give a worker its share of the machine; end it with its parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent, interrupted too, ends this
    number = numbers.get()
    if count := torch.cuda.device_count():
        visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(count)))
        os.environ["CUDA_VISIBLE_DEVICES"] = visible.split(",")[number % count]
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // workers))

    def watch() -> None:
        # A parent that was killed starts its jobs again: two of one would write one checkpoint.
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
