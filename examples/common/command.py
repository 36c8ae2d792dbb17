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
from common.parameters import check, parameters
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
        """Return the runs that the command line asks for, checked as far as no data are read."""
        names = {f.name for f in fields(Run)}
        given = {name: value for name, value in vars(options).items() if name in names}
        given |= {"radii": tuple(options.radii), **self.settings(options)}
        if options.updates:
            given["epochs"] = 0.0
        found = []
        chosen = parameters(options.solver, options.set, options.config)
        for solver, own in chosen.items():
            alone = solver != PLAIN or len(options.solver) == 1
            given |= {"solver": solver, "parameters": own}
            given |= {"every": options.every if alone else 1}
            given |= {"share": options.share if alone else 1.0}
            found += [Run(**given, seed=seed) for seed in options.seeds]
        check(chosen, options.config, options.evaluate)  # last: it imports what takes seconds
        return found

    def work(self, options: argparse.Namespace) -> str:
        """Run what the command line asks for; return the table."""
        if options.report:
            path = options.output / "results.jsonl"
            found = list(results.finished(path).values())
            if not found:
                raise ValueError(f"{path} has no results yet: run without --report, or --output.")
            return results.table(found)
        if options.save and options.evaluate == "mixture":
            raise ValueError(
                "--save saves one model, and a mixture is several: evaluate last or mean."
            )
        runs = self.runs(options)
        from common import loop

        keeping = loop.Keeping(
            options.output, options.checkpoint_every, options.save, options.tensorboard
        )
        return results.table(loop.run_all(runs, self.load(options), keeping))

    def main(self, argv: list[str] | None = None) -> int:
        """Run the command line; return 2 for what it cannot run."""
        return entry(self.name, self.arguments, self.work)(argv)


Arguments = Callable[[list[str] | None], argparse.Namespace]
"""Parses a command line, this process's own for None; raises ValueError for what cannot be run."""


def refuse_mistakes(name: str, arguments: Arguments) -> None:
    """Answer a command line that cannot be run, and end; called above imports that take seconds."""
    try:
        arguments(None)
    except (ValueError, OSError) as error:
        sys.exit(_refuse(name, error))


def entry(
    name: str, arguments: Arguments, work: Callable[[argparse.Namespace], str]
) -> Callable[..., int]:
    """Return the `main` of a script: it runs the command line, and returns 2 for what it cannot."""

    def main(argv: list[str] | None = None) -> int:
        return answer(name, lambda: work(arguments(argv)))

    return main


def answer(name: str, job: Callable[[], str]) -> int:
    """Print what a job returns; for what it refuses, one line instead, and return 2."""
    try:
        text = job()
    except Exception as error:
        if not _refusal(error):
            raise
        return _refuse(name, error)
    if _first_process():
        print(text)
    return 0


def _refuse(name: str, error: Exception) -> int:
    """Say in one line what cannot be run; return the status of that."""
    said = " ".join([str(error), *getattr(error, "__notes__", ())])
    print(f"{name}: {' '.join(said.split())}", file=sys.stderr)
    return 2


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
