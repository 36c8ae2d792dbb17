"""The command line of directions.py and ascents_tried.py, and the task that it names."""

import argparse
from pathlib import Path
from types import ModuleType

import intent
from common.tasks import script_of


def asked(argv: list[str] | None, about: str, output: str) -> argparse.Namespace:
    """Parse the command line of a script: what it is about, and where its rows go.

    Raises:
        ValueError: if there is no such task.
    """
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--task", default="intents", help="of examples/intent.py or glue.py")
    parser.add_argument("--data", default="", help="a folder with the task, as for those")
    parser.add_argument("--updates", type=int, default=80)
    parser.add_argument("--limit", type=int, default=0, help="training rows; 0 takes all")
    parser.add_argument("--shots", type=int, default=0, help="training rows of each label")
    parser.add_argument("--lr", type=float, default=4e-4)
    parser.add_argument("--rows", type=int, default=128, help="held out, to play on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path(output))
    parser.add_argument("--report", action="store_true", help="what there is in OUTPUT")
    options = parser.parse_args(argv)
    if not options.report:
        script, given = task_asked(options)
        script.settings(given)
    return options


def task_asked(options: argparse.Namespace) -> tuple[ModuleType, argparse.Namespace]:
    """Return the script of the task, and the options that name it there."""
    script = script_of(options.task)
    given = ["--task", options.task] if options.task != intent.EMBEDDED else []
    given += ["--data", options.data] if options.data else []
    return script, script.arguments(given)
