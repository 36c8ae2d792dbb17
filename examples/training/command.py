"""The command line that the scripts share: options, solvers and their parameters, errors."""

import argparse
import json
import sys
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import mixadv
from mixadv.errors import nearest
from training import loop, results
from training.data import Task
from training.results import Run

PLAIN = "plain"
REFUSALS = (ValueError, OSError, mixadv.GameError)
"""What a script answers with one line: the user asked for what cannot be run."""


@dataclass(frozen=True)
class Script:
    """A script: its options, and what it trains on.

    Attributes:
        name: of the script.
        text: its manual.
        add_options: of the script alone, to a parser.
        settings: returns the settings of a run, by name, that its own options give.
        load: returns the task.
        defaults: of settings, where they are not those of `Run`.
    """

    name: str
    text: str
    add_options: Callable[[Any], None]
    settings: Callable[[argparse.Namespace], dict[str, Any]]
    load: Callable[[argparse.Namespace], Task]
    defaults: dict[str, Any]

    def arguments(self, argv: list[str] | None = None) -> argparse.Namespace:
        """Parse the command line."""
        return _parser(self).parse_args(argv)

    def runs(self, options: argparse.Namespace) -> list[Run]:
        """Return the runs that the command line asks for, checked."""
        return _runs(options, self.settings(options))

    def work(self, options: argparse.Namespace) -> str:
        """Run what the command line asks for; return the table."""
        if options.report:
            path = options.output / "results.jsonl"
            found = list(results.finished(path).values())
            if not found:
                raise ValueError(f"{path} has no results yet: run without --report, or --output.")
            return results.table(found)
        if options.checkpoint_every < 1:
            raise ValueError("--checkpoint-every must be at least 1.")
        runs = self.runs(options)
        task = self.load(options)
        return results.table(loop.run_all(runs, task, options.output, options.checkpoint_every))

    def main(self, argv: list[str] | None = None) -> int:
        """Run the command line; return 2 for what it cannot run."""
        options = self.arguments(argv)
        return answer(self.name, lambda: self.work(options))


def answer(name: str, job: Callable[[], str]) -> int:
    """Print what a job returns; for what it refuses, one line instead, and return 2."""
    try:
        print(job())
    except REFUSALS as error:
        print(f"{name}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def _parser(script: Script) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"{script.name}.py",
        description=script.text,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    script.add_options(parser)
    default = {f.name: f.default for f in fields(Run)} | script.defaults
    add = parser.add_argument
    add("--data", default="", metavar="FOLDER")
    add("--model", default=default["model"])
    add("--solver", nargs="+", default=[PLAIN], metavar="NAME")
    add("--set", nargs="+", default=[], metavar="NAME=VALUE")
    add("--config", type=Path, metavar="FILE")
    add("--seeds", nargs="+", type=int, default=[0])
    add("--epochs", type=float, default=default["epochs"])
    add("--updates", type=int, default=default["updates"])
    add("--batch-size", type=int, default=default["batch_size"])
    add("--accumulate", type=int, default=1)
    add("--lr", dest="learning_rate", type=float, default=default["learning_rate"])
    add("--warmup", type=float, default=default["warmup"])
    add("--weight-decay", type=float, default=default["weight_decay"])
    add("--max-length", type=int, default=default["max_length"])
    add("--limit", type=int, default=0)
    add("--hold-out", type=int, default=0)
    add("--bf16", action="store_true")
    add("--evaluate", choices=["last", "mean", "mixture"], default="last")
    add("--evaluate-every", type=int, default=0)
    add("--radii", nargs="*", type=float, default=[])
    add("--attack-rows", type=int, default=0)
    add("--checkpoint-every", type=int, default=100, metavar="UPDATES")
    add("--output", type=Path, default=Path("runs") / script.name)
    add("--report", action="store_true")
    return parser


def _runs(options: argparse.Namespace, settings: dict[str, Any]) -> list[Run]:
    names = {f.name for f in fields(Run)}
    given = {name: value for name, value in vars(options).items() if name in names}
    made = []
    for solver in options.solver:
        chosen = _parameters(options, solver)
        _check(solver, chosen)
        made += [
            Run(**{**given, "solver": solver, "parameters": chosen, "seed": seed, **settings})
            for seed in options.seeds
        ]
    return [run for run in made]


def _parameters(options: argparse.Namespace, solver: str) -> dict[str, Any]:
    """Return the hyper-parameters that the command line gives a solver."""
    chosen = dict(_config(options.config).get(solver, {})) if options.config else {}
    for setting in options.set:
        name, equals, value = setting.partition("=")
        owner, dot, rest = name.rpartition(".")
        if not equals:
            raise ValueError(f"--set {setting}: write NAME=VALUE or SOLVER.NAME=VALUE.")
        if dot and owner not in mixadv.SOLVERS:
            raise ValueError(
                f"--set {setting}: {owner!r} is no solver with hyper-parameters."
                f"{nearest(owner, mixadv.SOLVERS)} There are {', '.join(mixadv.SOLVERS)}."
            )
        if not dot and set(options.solver) == {PLAIN}:
            raise ValueError(f"--set {setting}: plain has no hyper-parameters. Choose a --solver.")
        if solver == PLAIN or (dot and owner != solver):
            continue
        try:
            chosen[rest] = json.loads(value)
        except json.JSONDecodeError:
            chosen[rest] = value
    return chosen


def _config(path: Path) -> dict[str, Any]:
    """Return the tables of a file of hyper-parameters, one for each solver."""
    text = path.read_text()
    try:
        tables = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except ValueError as error:
        raise ValueError(f"--config {path} cannot be read: {error}") from error
    return tables


def _check(solver: str, chosen: dict[str, Any]) -> None:
    """Raise unless there is a solver of this name that takes these hyper-parameters."""
    names = [PLAIN, *mixadv.SOLVERS]
    if solver not in names:
        raise ValueError(
            f"--solver {solver}: there is none of this name.{nearest(solver, names)} "
            f"There are {', '.join(names)}."
        )
    if solver == PLAIN:
        return
    try:
        mixadv.solver(solver, **chosen)
    except (TypeError, ValueError) as error:
        raise ValueError(f"--set: {error}") from error
