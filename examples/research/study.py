r"""Compare methods on tasks over seeds, with plain training that is as long and that is longer.

A study is a TOML file: methods, tasks, seeds. All methods take the same number of updates, those
with `times` more or fewer: plain training that costs as much as an adversary is a method too. Every
method chooses its learning rate from the same few, by a run with each seed of the search on
training rows held out for it, none of which is reported; then it is trained with every seed. Each
run adds a line to results.jsonl, beside the study; what has a line is not run again, so that a
killed study goes on when the same command comes again. At the end report.md is written, with tables
and pictures.

    python examples/research/study.py examples/research/study/study.toml
    python examples/research/study.py examples/research/study/study.toml --data FOLDER --workers 2
    python examples/research/study.py examples/research/study/study.toml --report
"""

import sys
from argparse import ArgumentTypeError, Namespace
from pathlib import Path

import _above  # noqa: F401
from common.command import answer, refuse_mistakes
from common.options import positive, script
from common.places import a_folder, where


def ending() -> str:
    """Return the end of the manual: the keys of a study."""
    from studying.reading import keys

    return keys()


def arguments(argv: list[str] | None = None) -> Namespace:
    """Parse the command line; raise ValueError for a study or data that are not there."""
    parser = script("study", "STUDY [options]", __doc__)
    parser.ending = ending
    add = parser.add_argument
    add("study", type=Path, metavar="STUDY", help="a TOML file; results are written beside it")
    text = "in place of the hub: a folder with a folder for each data set, as for the other scripts"
    add("--data", default="", metavar="FOLDER", help=text)
    text = "jobs at a time (default: one on each GPU, without one on each core)"
    add("--workers", type=positive, metavar="N", help=text)
    text = "folder of checkpoints and models (default: %(default)s)"
    add("--runs", type=Path, default=Path("runs/study"), metavar="FOLDER", help=text)
    add("--report", action="store_true", help="write report.md of the results that there are")
    options = parser.parse_args(argv)
    if not options.study.is_file():
        raise ValueError(f"There is no study {options.study}.")
    if options.data and not options.report:
        a_folder(options.data)
    return options


if __name__ == "__main__":
    refuse_mistakes("study", arguments)  # before the imports below, which take seconds

import fcntl
import re
import shutil
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager

from common import loop, model
from common.results import append, finished
from common.substitution import candidates
from mixadv.robustness import data
from studying import pool
from studying.measure import measure, other
from studying.plan import Results, Study, measurable
from studying.reading import read
from studying.render import render
from studying.work import load, sizes, train


def check(study: Study, options: Namespace, results: Results) -> None:
    """Raise before the first job for what a later one would miss, and for results of other data."""
    for method, way in study.methods.items():
        for seed in (*study.search_seeds, *study.seeds) if way.model else ():
            try:
                where(way.begins(study.model, seed))
            except ArgumentTypeError as error:
                raise ValueError(f"methods.{method}: model: {error}") from None
    for name, subject in study.tasks.items():
        task = load(subject.script, subject.name or name, options.data, subject.train)
        now = sizes(task)
        for run in study.runs(name, results):
            then = results.get(run.key, {}).get("sizes", now)
            if then != now:
                raise ValueError(
                    f"{name} has {now} rows, and results hold {run.key} of {then}: for other data "
                    "give the study a folder of its own."
                )
        for split in subject.evaluate:
            if split not in task.splits:
                raise ValueError(f"{name} has no split {split}, it has {', '.join(task.splits)}.")
        runs = study.first(name)
        for run in runs:
            try:
                loop.check(run, task)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
        network, _ = model.load(runs[0], task)
        for of, at in subject.shifted.items():
            data.read_rows(other(of, at, options.data), network, name=of)
        for source in subject.attacks:
            candidates(source)


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Keep a second study away from the same results."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{path} is being written by a study that runs already.") from None
        yield


def work_through(study: Study, path: Path, options: Namespace) -> None:
    """Train and measure what has no line yet."""
    results = finished(path)
    lost: set[str] = set()

    def ready() -> Iterator[tuple[str, pool.Job]]:
        for task, reported, runs in study.stages(results):
            subject = study.tasks[task]
            for run in runs:
                if not study.done(task, run, results):
                    given = (run, subject.script, options.data, subject.evaluate, options.runs)
                    yield run.key, (train, given)
                    continue
                # Before the next is trained: a model that is lost costs no more than its own run.
                key = study.measured(task, run)
                if not reported or key in results or not measurable(results[run.key]):
                    continue
                if (options.runs / run.key / "last").is_dir():
                    asked = (subject, study.model, study.measure)
                    yield key, (measure, (run, key, *asked, options.data, options.runs))
                else:
                    lost.add(run.key)

    with closing(pool.side_by_side(ready, options.workers or pool.devices())) as found:
        for result in found:
            result["machine"] = pool.machine()
            append(path, result)
            results[result["key"]] = result
            shutil.rmtree(options.runs / f"{result['key']}.checkpoints", ignore_errors=True)
    if lost:
        print(
            f"study: {len(lost)} models to measure are not in {options.runs}: to train them again, "
            f"remove their lines from {path}, such as that of {min(lost)}.",
            file=sys.stderr,
        )


def run(options: Namespace) -> str:
    """Run what the study asks for; return its report."""
    study = read(options.study)
    folder = options.study.parent
    path = folder / "results.jsonl"
    keep(folder / "report.md", options.study.name)
    if not options.report:
        with alone(path):
            check(study, options, finished(path))
            work_through(study, path, options)
    results = finished(path)
    if not results:
        raise ValueError(f"{path} has no results yet: run without --report.")
    return render(study, results, folder, command_of(options.study))


def keep(report: Path, name: str) -> None:
    """Raise if there is a report that is not of the study of this name."""
    text = report.read_text() if report.exists() else ""
    of = re.search(r"study\.py (?:[^`]*/)?([^`/]+)`", text)
    if of and of[1] != name:
        raise ValueError(f"{report} is of {of[1]} and would be lost: give {name} its own folder.")


def command_of(path: Path) -> str:
    """Return the command that runs the study of a file, from the root of the repository."""
    root = Path(__file__).absolute().parents[2]
    inside = path.absolute().is_relative_to(root)
    name = path.absolute().relative_to(root) if inside else path.name
    return f"python examples/research/study.py {name}"


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return 2 for what it cannot run."""

    def job() -> str:
        try:
            return run(arguments(argv))
        except BrokenProcessPool as error:
            raise ValueError(
                "A job was killed, perhaps for want of memory: take fewer --workers. What is "
                "finished is kept; the same command goes on."
            ) from error

    return answer("study", job)


if __name__ == "__main__":
    sys.exit(main())
