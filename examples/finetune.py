"""Fine-tune an encoder on text classification, plainly or against an adversary.

    python examples/finetune.py --solver plain freelb mat --seeds 0 1
    python examples/finetune.py --data ../data/banking77 --shots 10 --updates 300 --solver mat
    python examples/finetune.py --model roberta-base --data rotten_tomatoes --solver smart \\
        --set radius=0.1 smart.smoothness=3
    python examples/finetune.py --report

Every run adds one line to OUTPUT/results.jsonl. A run that has a line is not repeated, and a run that
was killed goes on from its last checkpoint to the same result. --report prints the table of all.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import mixadv
import training


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    run = training.Run()
    solvers = ["plain", *mixadv.SOLVERS]
    add = parser.add_argument
    add("--solver", nargs="+", default=["plain"], metavar="NAME", help=", ".join(solvers))
    add("--set", nargs="+", default=[], metavar="NAME=VALUE", help="hyper-parameters of the solvers; SOLVER.NAME=VALUE for one of several")
    add("--data", default=run.data, help="a hub data set or a folder of JSON lines (default: the embedded intents)")
    add("--model", default=run.model, help="a hub model or a folder (default: the embedded MiniLM)")
    add("--seeds", nargs="+", type=int, default=[0])
    add("--shots", type=int, default=run.shots, help="training rows per class; 0 takes all")
    add("--updates", type=int, default=run.updates, help="batches to train on (default: %(default)s)")
    add("--batch-size", type=int, default=run.batch_size)
    add("--lr", type=float, default=run.learning_rate, help="peak learning rate (default: %(default)s)")
    add("--max-length", type=int, default=run.max_length, help="tokens per row at most")
    add("--radii", nargs="*", type=float, default=[], help="measure accuracy under PGD at these radii, in token norms")
    add("--attack-rows", type=int, default=run.attack_rows, help="rows to attack; 0 takes the test split")
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
        if dot and owner not in ("plain", *mixadv.SOLVERS):
            raise ValueError(f"--set {setting}: there is no solver {owner!r}.")
        if solver == "plain" or (dot and owner != solver):
            continue
        try:
            chosen[rest] = json.loads(value)
        except json.JSONDecodeError:
            chosen[rest] = value
    return chosen


def runs(options: argparse.Namespace) -> list[training.Run]:
    """Return the runs that the command line asks for, all checked before the first starts."""
    made = []
    for name in options.solver:
        chosen = parameters(options.set, name)
        if name != "plain":
            mixadv.solver(name, **chosen)
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


def main(argv: list[str] | None = None) -> int:
    """Run the command line; 2 for what it cannot run."""
    options = arguments(argv)
    try:
        if options.report:
            results = list(training.finished(options.output / "results.jsonl").values())
        else:
            results = training.run_all(runs(options), options.output)
    except (ValueError, OSError) as error:
        print(f"finetune: {error}", file=sys.stderr)
        return 2
    print(training.table(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
