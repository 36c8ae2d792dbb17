r"""Fine-tune an encoder on text classification, plainly or against an adversary.

    python examples/finetune.py --solver plain freelb mat --seeds 0 1
    python examples/finetune.py --data path/to/banking77 --shots 10 --updates 300 --solver mat
    python examples/finetune.py --model roberta-base --data rotten_tomatoes --solver smart \
        --set radius=0.1 smart.smoothness=3
    python examples/finetune.py --report

Every run adds one line to OUTPUT/results.jsonl. A run that has a line is not repeated, and a run
that was killed goes on from its last checkpoint to the same result. --report prints the table.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import mixadv
import training
from mixadv.errors import nearest

SOLVERS = ["plain", *mixadv.SOLVERS]


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    run = training.Run()
    add = parser.add_argument
    add("--solver", nargs="+", default=["plain"], metavar="NAME", help=", ".join(SOLVERS))
    text = "hyper-parameters of the solvers, read as JSON; SOLVER.NAME=VALUE for one of several"
    add("--set", nargs="+", default=[], metavar="NAME=VALUE", help=text)
    text = "a hub data set or a folder of JSON lines (default: the embedded intents)"
    add("--data", default=run.data, help=text)
    text = "a hub model or a folder (default: the embedded MiniLM)"
    add("--model", default=run.model, help=text)
    add("--seeds", nargs="+", type=int, default=[0])
    add("--shots", type=int, default=run.shots, help="training rows per class; 0 takes all")
    text = "batches to train on (default: %(default)s)"
    add("--updates", type=int, default=run.updates, help=text)
    add("--batch-size", type=int, default=run.batch_size)
    text = "peak learning rate (default: %(default)s)"
    add("--lr", type=float, default=run.learning_rate, help=text)
    add("--max-length", type=int, default=run.max_length, help="tokens per row at most")
    text = "measure accuracy under PGD at these radii, in token norms"
    add("--radii", nargs="*", type=float, default=[], help=text)
    text = "rows to attack; 0 takes the test split"
    add("--attack-rows", type=int, default=run.attack_rows, help=text)
    text = "updates between checkpoints (default: %(default)s)"
    add("--checkpoint-every", type=int, default=50, metavar="UPDATES", help=text)
    add("--output", type=Path, default=Path("runs/finetune"))
    add("--report", action="store_true", help="print the table of OUTPUT/results.jsonl and stop")
    return parser.parse_args(argv)


def parameters(settings: list[str], solver: str) -> dict[str, Any]:
    """Return the hyper-parameters that `--set` gives a solver; values are read as JSON."""
    chosen = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        owner, dot, rest = name.rpartition(".")
        if not equals:
            raise ValueError(f"--set {setting}: write NAME=VALUE or SOLVER.NAME=VALUE.")
        if dot and owner not in mixadv.SOLVERS:
            raise ValueError(
                f"--set {setting}: {owner!r} is no solver with hyper-parameters."
                f"{nearest(owner, mixadv.SOLVERS)} There are {', '.join(mixadv.SOLVERS)}."
            )
        if solver == "plain" or (dot and owner != solver):
            continue
        try:
            chosen[rest] = json.loads(value)
        except json.JSONDecodeError:
            chosen[rest] = value
    return chosen


def check(solver: str, chosen: dict[str, Any]) -> None:
    """Raise unless there is a solver of this name that takes these hyper-parameters."""
    if solver not in SOLVERS:
        raise ValueError(
            f"--solver {solver}: there is none of this name.{nearest(solver, SOLVERS)} "
            f"There are {', '.join(SOLVERS)}."
        )
    if solver == "plain":
        return
    try:
        mixadv.solver(solver, **chosen)
    except (TypeError, ValueError) as error:
        raise ValueError(f"--set: {error}") from error


def runs(options: argparse.Namespace) -> list[training.Run]:
    """Return the runs that the command line asks for, all checked before the first starts."""
    made = []
    if options.checkpoint_every < 1:
        raise ValueError(f"--checkpoint-every must be at least 1, got {options.checkpoint_every}.")
    for setting in options.set:
        if "." not in setting.partition("=")[0] and set(options.solver) == {"plain"}:
            raise ValueError(f"--set {setting}: plain has no hyper-parameters. Choose a --solver.")
    for name in options.solver:
        chosen = parameters(options.set, name)
        check(name, chosen)
        for seed in options.seeds:
            run = training.Run(
                solver=name,
                parameters=chosen,
                data=options.data,
                model=options.model,
                seed=seed,
                updates=options.updates,
                batch_size=options.batch_size,
                learning_rate=options.lr,
                shots=options.shots,
                max_length=options.max_length,
                radii=tuple(options.radii),
                attack_rows=options.attack_rows,
            )
            made.append(run)
    return made


def work(options: argparse.Namespace) -> str:
    """Run what the command line asks for; return the table."""
    if not options.report:
        results = training.run_all(runs(options), options.output, options.checkpoint_every)
        return training.table(results)
    path = options.output / "results.jsonl"
    results = training.finished(path)
    if not results:
        raise ValueError(f"{path} has no results yet: run without --report, or name --output.")
    return training.table(list(results.values()))


def main(argv: list[str] | None = None) -> int:
    """Run the command line; 2 for what it cannot run."""
    options = arguments(argv)
    return training.answer("finetune", lambda: work(options))


if __name__ == "__main__":
    sys.exit(main())
