"""Mixtures of models against single ones at equal compute, attacked as mixtures are.

    python examples/research/mixtures.py --task banking77 --data path/to/folders --seeds 0 1 2 3 4
    python examples/research/mixtures.py --report

Each is trained for as many passes as SMART takes in --epochs:

    smart           one model
    mat             one model by MAT at its defaults
    mat-3, mat-5    half of the passes: one model by MAT; the rest: cycles of a rate that starts
                    high again, at the end of which MAT's strategy becomes a member
    lora-3, lora-5  half of the passes: one model by SMART; the rest: LoRA adapters to it, by SMART,
                    each from a start and in an order of its own
    boosted-3, -5   the same half; the rest: members that start as the one before and are trained
                    against attacks of all so far (BARRE, Dbouk & Shanbhag 2022)

Accuracy is that of a member drawn for each row, of the mean of probabilities and of the vote: on
test rows, and on some of them under EoT-PGD, ARC, PGD of the best member, the worst of all attacks,
and the worst of the typos found against any member. Each seed draws rows, head and order. What has
a line of results is not done again. A second table sets each against the one model by SMART of the
same seed; a mixture classifies by its mean there.
"""

import sys
from argparse import Namespace
from pathlib import Path

import _above  # noqa: F401
import intent
from common.command import entry, refuse_mistakes
from common.options import positive, script
from common.places import where
from common.results import EMBEDDED_MODEL

TRAINED = ("smart", "mat", "mat-3", "mat-5", "lora-3", "lora-5", "boosted-3", "boosted-5")


def arguments(argv: list[str] | None = None) -> Namespace:
    """Parse the command line; raise ValueError for a task that is not there."""
    parser = script("mixtures", "[options]", __doc__)
    add = parser.add_argument
    add("--task", default="intents", metavar="NAME", help="as of intent.py (default: %(default)s)")
    add("--data", default="", metavar="SOURCE", help="as of intent.py")
    text = "a hub model or a folder with one (default: the embedded encoder)"
    add("--model", type=where, default=EMBEDDED_MODEL, metavar="NAME", help=text)
    add("--only", nargs="+", choices=TRAINED, default=TRAINED, help="(default: all)")
    add("--seeds", nargs="+", type=int, default=[0], metavar="SEED", help="(default: 0)")
    add("--shots", type=positive, default=5, help="rows of each label (default: %(default)s)")
    add("--epochs", type=float, default=12.0, help="of SMART (default: %(default)g)")
    add("--lr", type=float, default=2e-4, help="learning rate (default: %(default)g)")
    add("--adapter-lr", type=float, default=1e-3, help="that of adapters (default: %(default)g)")
    add("--rows", type=positive, default=1000, help="test rows to classify (default: %(default)s)")
    add("--attack-rows", type=positive, default=96, help="to attack (default: %(default)s)")
    add("--radius", type=float, default=0.2, help="in token norms (default: %(default)g)")
    add("--steps", type=positive, default=5, help="of ascents (default: %(default)s)")
    add("--output", type=Path, default=Path("runs/mixtures"), metavar="FOLDER")
    add("--report", action="store_true", help="print the table of OUTPUT/results.jsonl and stop")
    options = parser.parse_args(argv)
    if not options.report:
        intent.settings(task_asked(options))
    return options


def task_asked(options: Namespace) -> Namespace:
    """Return the options that name the task in intent.py."""
    return intent.arguments(["--task", options.task, "--data", options.data])


if __name__ == "__main__":
    refuse_mistakes("mixtures", arguments)  # before the imports below, which take seconds

from collections.abc import Iterable
from typing import Any

from tqdm.auto import tqdm

from common.results import append, digest, finished, over_seeds
from common.tables import markdown
from mixadv.robustness import read_rows, text_batches, token_norm
from mixing.measure import TYPOS, WAYS, Measure
from mixing.train import Bench

SHOWN = ("trained", "clean", "EoT-PGD", "ARC", "transfer", "worst of all", TYPOS)


def work(options: Namespace) -> str:
    """Train and measure what has no line yet; return the table."""
    path = options.output / "results.jsonl"
    if not options.report:
        task = intent.load(task_asked(options))
        todo = [(name, seed) for name in options.only for seed in options.seeds]
        for name, seed in tqdm(todo, desc="mixtures", disable=None):
            if (key := _key(options, name, seed)) not in finished(path):
                append(path, {"key": key, **_one(options, task, name, seed)})
    results = list(finished(path).values())
    return "\n\n".join(filter(None, [table(results), paired(results)]))


def _one(options: Namespace, task: Any, name: str, seed: int) -> dict[str, Any]:
    """Train a model or a mixture; return its line of results, without the key."""
    lengths = (options.shots, options.epochs, options.lr, options.adapter_lr)
    bench = Bench(task, options.model, seed, *lengths, options.output)
    network, tokenizer = bench.untrained
    test = task.splits["test"].shuffle(seed=seed)
    clean, attacked, trained = (
        read_rows(rows, network)
        for rows in (
            test.select(range(min(options.rows, len(test)))),
            test.select(range(min(options.attack_rows, len(test)))),
            bench.rows,
        )
    )
    batches = text_batches(
        network,
        tokenizer,
        read_rows(task.splits["test"].select(range(min(64, len(test)))), network),
    )
    how = {"radius": options.radius, "unit": token_norm(network, batches), "steps": options.steps}
    measure = Measure(tokenizer, trained, clean, attacked, seed=seed, **how)
    kind, _, count = name.partition("-")
    mixture = getattr(bench, kind)(*map(int, filter(None, [count])))
    settings = {k: v for k, v in vars(options).items() if k in SETTINGS}
    return {"task": options.task, "trained": name, "seed": seed, **settings, **measure(mixture)}


def _key(options: Namespace, name: str, seed: int) -> str:
    """Return a name that is the same for the same training and measurement."""
    settings = {setting: str(getattr(options, setting)) for setting in SETTINGS}
    return f"{options.task}-{name}-{seed}-{digest(settings)}"


SETTINGS = (
    "model",
    "shots",
    "epochs",
    "lr",
    "adapter_lr",
    "rows",
    "attack_rows",
    "radius",
    "steps",
)


def table(results: Iterable[dict[str, Any]]) -> str:
    """Return means with t-intervals over seeds."""
    found, rows = _by_seed(results), []
    for (task, method), seeds in found.items():
        for way, name in enumerate(WAYS):
            if way and "-" not in method:
                continue  # of one model all are alike
            cells = [
                over_seeds(100 * ways[shown][way] for ways in seeds.values()) for shown in SHOWN
            ]
            rows.append([task, method, len(seeds), name if "-" in method else "itself", *cells])
    return markdown(["task", "trained", "seeds", "classifies by", *(f"{s} %" for s in SHOWN)], rows)


def paired(results: Iterable[dict[str, Any]], to: str = "smart") -> str:
    """Return means of differences to one of those trained, in points, with t-intervals over seeds.

    Seeds that both have count; what shares fewer than three seeds is left out.
    """
    found, rows = _by_seed(results), []
    for (task, method), seeds in found.items():
        others = found.get((task, to), {})
        both = sorted(seeds.keys() & others.keys())
        if method == to or len(both) < 3:
            continue
        way = WAYS.index("mean")
        cells = [
            over_seeds(
                (100 * (seeds[s][shown][way] - others[s][shown][way]) for s in both), sign="+"
            )
            for shown in SHOWN[1:]
        ]
        rows.append([task, method, len(both), *cells])
    heads = ["task", "trained", "seeds", *(f"{shown} − {to}" for shown in SHOWN[1:])]
    return markdown(heads, rows) if rows else ""


def _by_seed(results: Iterable[dict[str, Any]]) -> dict[tuple[str, str], dict[int, Any]]:
    """Return accuracies by task and by what was trained, then by seed."""
    found: dict[tuple[str, str], dict[int, Any]] = {}
    for result in results:
        found.setdefault((result["task"], result["trained"]), {})[result["seed"]] = result["ways"]
    return found


main = entry("mixtures", arguments, work)


if __name__ == "__main__":
    sys.exit(main())
