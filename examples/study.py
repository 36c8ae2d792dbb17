r"""Compare methods on tasks over seeds, at equal epochs and at equal compute.

A study is a TOML file: methods, tasks, seeds. Every method chooses its learning rate from the same
few, by one run each on training rows held out for it, with a seed that is not reported; then it is
trained with every seed, at two budgets: equal epochs, and equal compute, where every method gets
the same number of passes. Each run adds a line to results.jsonl, beside the study; what has a line
is not run again, so that a killed study goes on when the same command comes again. At the end
report.md is written, with tables and pictures.

    python examples/study.py examples/study/study.toml
    python examples/study.py examples/study/study.toml --data path/to/folders --workers 2
    python examples/study.py examples/study/study.toml --report
"""

import argparse
import sys
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

import transformers
from tqdm.auto import tqdm

from studying import pool
from studying.measure import measure
from studying.plan import MEASURED, Study
from studying.reading import read
from studying.render import render
from studying.work import train
from training import command
from training.options import Parser, positive
from training.results import append, finished


def arguments(argv: list[str] | None = None) -> Namespace:
    """Parse the command line."""
    parser = Parser(
        prog="study.py",
        usage="%(prog)s STUDY [options]",
        description=__doc__,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, width=100),
    )
    add = parser.add_argument
    add("study", type=Path, metavar="STUDY", help="a TOML file; results are written beside it")
    text = "in place of the hub: a folder with a folder for each data set, as for the other scripts"
    add("--data", default="", metavar="FOLDER", help=text)
    text = "jobs at a time (default: one on each GPU, without one on each core)"
    add("--workers", type=positive, default=pool.devices(), metavar="N", help=text)
    text = "folder of checkpoints and models (default: %(default)s)"
    add("--runs", type=Path, default=Path("runs/study"), metavar="FOLDER", help=text)
    add("--report", action="store_true", help="write report.md of the results that there are")
    return parser.parse_args(argv)


def work_through(study: Study, path: Path, options: Namespace) -> None:
    """Train and measure what has no line yet."""
    results = finished(path)
    bar = tqdm(desc=options.study.stem, unit="job", disable=None)

    def ready() -> Iterator[tuple[str, pool.Job]]:
        for budget, runs in study.stages(results):
            for run in runs:
                if run.key not in results:
                    subject = study.tasks[run.task]
                    given = (run, subject.script, options.data, subject.evaluate, options.runs)
                    yield run.key, (train, given)
            for run in runs if budget in MEASURED else ():
                key = study.measured(run)
                saved = (options.runs / run.key / "last").is_dir()
                if run.key in results and key not in results and saved:
                    subject = study.tasks[run.task]
                    given = (run, key, subject, study.measure, options.data, options.runs)
                    yield key, (measure, given)

    for result in pool.side_by_side(ready, options.workers):
        result["machine"] = pool.machine()
        append(path, result)
        results[result["key"]] = result
        bar.update()
    bar.close()


def run(options: Namespace) -> str:
    """Run what the study asks for; return its report."""
    transformers.utils.logging.disable_progress_bar()
    study = read(options.study)
    folder = options.study.parent
    path = folder / "results.jsonl"
    if not options.report:
        work_through(study, path, options)
    results = finished(path)
    if not results:
        raise ValueError(f"{path} has no results yet: run without --report.")
    return render(study, results, folder, options.study.name)


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return 2 for what it cannot run."""
    options = arguments(argv)
    return command.answer("study", lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
