"""What the scripts do with a command line: runs, results, and one line for a mistake.

What takes seconds to import is imported once the command line has been read and checked.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from common import results
from common.options import parser
from common.parameters import check_evaluation, parameters
from common.results import PLAIN, Run

if TYPE_CHECKING:
    from common.data import Task


@dataclass(frozen=True)
class Script:
    """A script: its manual, its own options, and what it trains on.

    Attributes:
        name: of the script.
        manual: what it does, and examples.
        options: adds the script's own options to a group of the parser.
        settings: returns the settings of a run that follow from the options, checked.
        load: returns the task.
        defaults: of settings, where they are not those of `Run`.
    """

    name: str
    manual: str
    options: Callable[[Any], None]
    settings: Callable[[argparse.Namespace], dict[str, Any]]
    load: Callable[[argparse.Namespace], Task]
    defaults: dict[str, Any]

    def arguments(self, argv: list[str] | None = None) -> argparse.Namespace:
        """Parse the command line."""
        return parser(self.name, self.manual, self.options, self.defaults).parse_args(argv)

    def runs(self, options: argparse.Namespace) -> list[Run]:
        """Return the runs that the command line asks for, checked as far as no data are needed."""
        names = {f.name for f in fields(Run)}
        given = {name: value for name, value in vars(options).items() if name in names}
        given |= {"radii": tuple(options.radii), **self.settings(options)}
        if options.updates:
            given["epochs"] = 0.0
        found = []
        for solver, chosen in parameters(options.solver, options.set, options.config).items():
            check_evaluation(solver, chosen, options.evaluate)
            alone = solver != PLAIN or len(options.solver) == 1
            given |= {
                "solver": solver,
                "parameters": chosen,
                "every": options.every if alone else 1,
            }
            given |= {"share": options.share if alone else 1.0}
            found += [Run(**given, seed=seed) for seed in options.seeds]
        return found

    def work(self, options: argparse.Namespace) -> str:
        """Run what the command line asks for; return the table."""
        if options.report:
            path = options.output / "results.jsonl"
            found = list(results.finished(path).values())
            if not found:
                raise ValueError(f"{path} has no results yet: run without --report, or --output.")
            return results.table(found)
        runs = self.runs(options)
        if options.save and options.evaluate == "mixture":
            raise ValueError(
                "--save saves one model, and a mixture is several: evaluate last or mean."
            )
        from common import loop

        keeping = loop.Keeping(
            options.output, options.checkpoint_every, options.save, options.tensorboard
        )
        return results.table(loop.run_all(runs, self.load(options), keeping))

    def main(self, argv: list[str] | None = None) -> int:
        """Run the command line; return 2 for what it cannot run."""
        return entry(self.name, self.arguments, self.work)(argv)


def entry(
    name: str,
    arguments: Callable[[list[str] | None], argparse.Namespace],
    work: Callable[[argparse.Namespace], str],
) -> Callable[..., int]:
    """Return the `main` of a script: it runs the command line, and returns 2 for what it cannot."""

    def main(argv: list[str] | None = None) -> int:
        options = arguments(argv)
        return answer(name, lambda: work(options))

    return main


def answer(name: str, job: Callable[[], str]) -> int:
    """Print what a job returns; for what it refuses, one line instead, and return 2."""
    try:
        text = job()
    except Exception as error:
        if not _refusal(error):
            raise
        said = " ".join([str(error), *getattr(error, "__notes__", ())])
        print(f"{name}: {' '.join(said.split())}", file=sys.stderr)
        return 2
    if _first_process():
        print(text)
    return 0


def _refusal(error: Exception) -> bool:
    """Return whether the user asked for what cannot be run: that is answered with one line."""
    if isinstance(error, (ValueError, OSError, ImportError)):
        return True
    from mixadv import GameError

    return isinstance(error, GameError)


def _first_process() -> bool:
    """Return whether this process prints; without accelerate there is no other."""
    accelerate = sys.modules.get("accelerate")
    return accelerate is None or accelerate.PartialState().is_main_process
