"""The options that the scripts share, and their manual.

Nothing here imports torch, unless the manual is printed: a mistake is answered at once.
"""

import argparse
import textwrap
from collections.abc import Callable, Iterable
from dataclasses import fields
from glob import glob
from pathlib import Path
from typing import Any, NoReturn

from common.places import SOURCES, where
from common.results import PLAIN, Run

WIDTH = 100  # of the manual
EPILOG = """
solvers, for --solver, and what each takes besides the parameters of all:
{solvers}

parameters of all solvers but plain, for --set and --config:
{shared}

weights, for --evaluate:
  mean is kept by {means}; mixture by {mixtures}, with --set samples=R.

results:
  Each run adds one JSON line to OUTPUT/results.jsonl: its settings, the metrics of each split for
  the last weights and for the best ones, seconds and forward passes per update, optimizer steps.
  A run that has a line is not repeated. A killed run goes on from its last checkpoint when the
  same command is given again, to the same numbers. Several processes: torchrun or accelerate
  launch, before the name of this script; --batch-size is then that of each process.
"""


class Parser(argparse.ArgumentParser):
    """A parser that answers a mistake with one line.

    Attributes:
        ending: makes the end of the manual, when it is printed.
    """

    ending: Callable[[], str] | None = None

    def format_help(self) -> str:
        """Return the manual."""
        if self.ending is not None:
            self.epilog = self.ending()
        return super().format_help()

    def error(self, message: str) -> NoReturn:
        """Print the mistake and exit."""
        self.exit(2, f"{Path(self.prog).stem}: {message}\n")


class Named(argparse.Action):
    """Gathers values of the form NAME=WHERE by their names, which become parts of file names.

    A pattern such as runs/plain-0-*/last stands for the one path that it matches: behind NAME= the
    shell leaves it as it is.
    """

    def __call__(self, parser: Any, namespace: Any, values: Any, option: str | None = None) -> None:
        """Set the option, or end with what is wrong with a value."""
        found: dict[str, str] = {}
        for given in values:
            name, matching = self.split(parser, given, option)
            if name in found:
                parser.error(f"{option} {given}: {name} is the name of {found[name]} already.")
            if len(matching) > 1:
                parser.error(f"{option} {given}: {len(matching)} match, {', '.join(matching[:3])}.")
            found[name] = matching[0]
        setattr(namespace, self.dest, found)

    def split(self, parser: Parser, given: str, option: str | None) -> tuple[str, list[str]]:
        """Return the name, and what the pattern matches; itself where that is nothing."""
        name, _, path = given.partition("=")
        if not (name and path) or "/" in name:
            parser.error(f"{option} {given}: write {self.metavar}, a name without /.")
        try:
            return name, sorted(glob(path)) or [where(path)]
        except argparse.ArgumentTypeError as error:
            parser.error(f"{option} {given}: {error}")


class Members(Named):
    """Gathers all that is given under one name: NAME=WHERE several times, or a pattern."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option: str | None = None) -> None:
        """Set the option, or end with what is wrong with a value."""
        found: dict[str, list[str]] = {}
        for given in values:
            name, matching = self.split(parser, given, option)
            found.setdefault(name, []).extend(matching)
        setattr(namespace, self.dest, found)


def script(
    name: str, usage: str, manual: str, epilog: str | None = None, column: int = 24
) -> Parser:
    """Return a parser that prints a manual as it is written.

    Args:
        name: of the script.
        usage: what comes after its name.
        manual: what it does, and examples.
        epilog: the manual's end.
        column: where the help of options begins.
    """
    return Parser(
        prog=f"{name}.py",
        usage=f"%(prog)s {usage}",
        description=manual,
        epilog=epilog,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(
            prog, max_help_position=column, width=WIDTH
        ),
    )


def _epilog() -> str:
    """Return the manual's end, with the solvers and parameters that there are."""
    import mixadv
    from mixadv.players.ascent import Ascent

    shared = [f.name for f in fields(Ascent)]

    def wrapped(words: Iterable[str], indent: int) -> str:
        return textwrap.fill(
            ", ".join(words), WIDTH, initial_indent=" " * indent, subsequent_indent=" " * indent
        )

    lines = [f"  {PLAIN:8} the optimizer alone"]
    for name, solver in mixadv.SOLVERS.items():
        own = [f"{f.name}={f.default}" for f in fields(solver) if f.name not in shared]
        lines.append(f"  {name:8} {solver.summary}")
        lines += [wrapped(own, 11)] if own else []
    own = {name: {f.name for f in fields(solver)} for name, solver in mixadv.SOLVERS.items()}
    means, mixtures = (
        ", ".join(name for name in own if kept in own[name]) for kept in ("average", "samples")
    )
    return EPILOG.format(
        solvers="\n".join(lines), shared=wrapped(shared, 2), means=means, mixtures=mixtures
    )


def parser(
    name: str, manual: str, own: Callable[[Any], None], defaults: dict[str, Any]
) -> argparse.ArgumentParser:
    """Return the parser of a script.

    Args:
        name: of the script.
        manual: what it does, and examples.
        own: adds the script's own options to a group.
        defaults: of settings, where they are not those of `Run`.
    """
    parser = script(name, "[options]", manual, column=28)
    parser.ending = _epilog
    default = {f.name: f.default for f in fields(Run)} | defaults

    group = parser.add_argument_group("task and model")
    own(group)
    add = group.add_argument
    text = "a hub model or a folder with one (default: %(default)s, the embedded encoder)"
    add("--model", type=where, default=default["model"], metavar="NAME", help=text)
    _solver(parser)
    _training(parser, default)
    _evaluation(parser)
    _output(parser, name)
    return parser


def _solver(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("solver").add_argument
    text = "one run for each, and for each seed (default: plain)"
    add("--solver", nargs="+", default=[PLAIN], metavar="NAME", help=text)
    text = "parameters of the solvers, read as JSON; SOLVER.NAME=VALUE for one of several"
    add("--set", nargs="+", default=[], metavar="NAME=VALUE", help=text)
    text = "parameters in a TOML or JSON file, one table for each solver; --set goes before it"
    add("--config", type=Path, metavar="FILE", help=text)


def _training(parser: argparse.ArgumentParser, default: dict[str, Any]) -> None:
    group = parser.add_argument_group("training")
    add = group.add_argument
    text = "of the head, dropout, order and choice of rows, players (default: 0)"
    add("--seeds", nargs="+", type=int, default=[0], metavar="SEED", help=text)
    length = group.add_mutually_exclusive_group()
    text = "passes over the training rows (default: %(default)g)"
    length.add_argument("--epochs", metavar="E", type=float, default=default["epochs"], help=text)
    text = "batches to train on, in place of --epochs"
    length.add_argument("--updates", metavar="N", type=positive, default=0, help=text)
    text = "rows that a process reads at a time (default: %(default)s)"
    add("--batch-size", type=int, default=default["batch_size"], metavar="ROWS", help=text)
    text = (
        "batches whose gradients make one update (default: 1). The optimizer then steps once per "
        "update, also where the solver steps more often by itself: with mat an update is one "
        "sample of the weights, not a round of them"
    )
    add("--accumulate", type=int, default=1, metavar="BATCHES", help=text)
    text = "learning rate of AdamW after the warm-up (default: %(default)g, for the small embedded "
    text += "encoder; 2e-5 suits base-size models)"
    rate = default["learning_rate"]
    add("--lr", dest="learning_rate", type=float, default=rate, metavar="RATE", help=text)
    text = "share of the updates in which the rate rises; then it falls linearly to 0 "
    text += "(default: %(default)g)"
    add("--warmup", type=float, default=default["warmup"], metavar="SHARE", help=text)
    add(
        "--weight-decay", type=float, default=default["weight_decay"], help="(default: %(default)g)"
    )
    text = "tokens of a row; the rest is cut (default: %(default)s)"
    add("--max-length", type=int, default=default["max_length"], metavar="TOKENS", help=text)
    text = "train on N rows drawn by the seed"
    add("--limit", type=positive, default=0, metavar="N", help=text)
    text = (
        "keep N training rows, drawn by the seed, to choose on: hyper-parameters, the best weights"
    )
    add("--hold-out", type=positive, default=0, metavar="N", help=text)
    text = "play the solver every N-th update; the others are plain (default: 1)"
    add("--every", type=positive, default=1, metavar="N", help=text)
    text = (
        "share of the rows of a batch that the solver plays on; the others are plain (default: 1)"
    )
    add("--share", type=float, default=1.0, metavar="SHARE", help=text)
    text = "probability that the task loss spreads over all labels (default: 0)"
    add("--label-smoothing", type=float, default=0.0, metavar="P", help=text)
    add("--bf16", action="store_true", help="forward passes in bfloat16")
    text = (
        "before each epoch but the first, attack this share of the training rows by replacing "
        "words, and train on the perturbed copies too (A2T: 0.2)"
    )
    add("--substitute", type=float, default=0.0, metavar="SHARE", help=text)
    add("--neighbours", default="", metavar="SOURCE", help=f"of --substitute: {SOURCES}")


def _evaluation(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("evaluation").add_argument
    text = (
        "the weights that are evaluated and saved: the last; their running mean over training; or "
        "the mixture of the last R samples of them, which averages predictions (default: last)"
    )
    add("--evaluate", choices=["last", "mean", "mixture"], default="last", help=text)
    text = (
        "evaluate every N updates, and note the metrics of the best weights too: best by the first "
        "metric on the held-out rows, without --hold-out on dev"
    )
    add("--evaluate-every", type=positive, default=0, metavar="N", help=text)
    text = "rows of each split to evaluate on, drawn the same for all runs (default: all)"
    add("--evaluate-rows", type=positive, default=0, metavar="N", help=text)
    text = (
        "measure the metrics under PGD in embedding space too, in L2 balls of these radii, in "
        "token norms of the untrained encoder; on test, without one on dev"
    )
    add("--radii", nargs="+", type=float, default=[], metavar="RADIUS", help=text)
    text = "rows to attack (default: all)"
    add("--attack-rows", type=positive, default=0, metavar="N", help=text)


def _output(parser: argparse.ArgumentParser, name: str) -> None:
    add = parser.add_argument_group("output").add_argument
    text = "folder of results, checkpoints and saved models (default: %(default)s)"
    add("--output", type=Path, default=Path("runs") / name, metavar="FOLDER", help=text)
    text = "save model and tokenizer in OUTPUT/RUN/last and, with --evaluate-every, OUTPUT/RUN/best"
    add("--save", action="store_true", help=text)
    text = "write loss, payoff, radius, learning rate and metrics to OUTPUT/tensorboard"
    add("--tensorboard", action="store_true", help=text)
    text = "updates between checkpoints to go on from (default: %(default)s)"
    add("--checkpoint-every", type=positive, default=100, metavar="N", help=text)
    text = "print the table of OUTPUT/results.jsonl and stop: mean and 95 %% t-interval over seeds"
    add("--report", action="store_true", help=text)


def positive(text: str) -> int:
    """Return the number of an option."""
    if not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text}")
    return int(text)
