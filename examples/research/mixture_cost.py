"""What a mixture costs: on disk, and in time to predict, whole weights against LoRA adapters.

Mixtures of several sizes predict one batch in each way (mean, draw, vote), in turn with the model
alone, in an order that every round reverses. Times of the processor are over that of the model
alone in the same round: medians over rounds, and [least, most]. Megabytes are those of the folder
that `Mixture.save_pretrained` writes, without the model that the members change. No member is
trained for that: time and size do not depend on it.

With --accuracy as many adapters as the largest mixture has are trained on the embedded intents,
each in an order and from a start of its own. Accuracy is that on the test rows: means over disjoint
mixtures of these adapters, and [least, most]. Of a draw it is the expected one.

    python examples/research/mixture_cost.py               # three minutes, 3 GB of memory
    python examples/research/mixture_cost.py --accuracy    # trains and adds these columns
    python examples/research/mixture_cost.py --report      # the table of what was measured
"""

import argparse
import sys
from pathlib import Path

import _above  # noqa: F401
from benchmark_parts import EMBEDDED, MODELS
from common.options import positive, script

OUTPUT = Path(__file__).parent.parent / "results" / "mixture_cost.jsonl"


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = script("mixture_cost", "[options]", __doc__)
    add = parser.add_argument
    sizes = [1, 2, 4, 8]
    add(
        "--members", nargs="+", type=positive, default=sizes, metavar="M", help="(default: 1 2 4 8)"
    )
    add("--model", choices=[*MODELS, EMBEDDED], default=EMBEDDED, help="(default: %(default)s)")
    add("--rows", type=positive, default=32, metavar="B", help="of the batch (default: 32)")
    add("--tokens", type=positive, default=24, metavar="N", help="of a row (default: 24)")
    add("--rounds", type=positive, default=5, metavar="N", help="(default: %(default)s)")
    add("--accuracy", action="store_true", help="train, and measure accuracy instead of the cost")
    add("--epochs", type=positive, default=8, metavar="N", help="of a member (default: 8)")
    add("--lr", type=float, default=1e-3, help="of a member's AdamW (default: %(default)g)")
    add("--output", type=Path, default=OUTPUT, metavar="FILE", help="(default: examples/results)")
    add("--report", action="store_true", help="measure nothing, print the table")
    return parser.parse_args(argv)


if __name__ == "__main__":
    arguments()  # a mistake is answered before the imports below, which take seconds

import copy
import json
import statistics
from collections.abc import Iterable
from functools import partial
from tempfile import TemporaryDirectory
from typing import Any

import peft
import torch
from tqdm import tqdm

import intent
from benchmark_parts.measure import timed
from benchmark_parts.results import Spread, ratio
from benchmark_parts.work import Part, load
from common.results import EMBEDDED_MODEL
from common.tables import markdown
from mixadv.mixtures import Adapter, Mixture
from mixing.accuracy import accuracies, predictions, trained

WAYS = ("mean", "draw", "vote")
RANK = 8
"""Of the adapters, on queries and values; the head of each member is its own."""
LORA: dict[str, Any] = {"task_type": "SEQ_CLS", "r": RANK, "target_modules": ["query", "value"]}
HEAD = ["members", "of", "MB", *WAYS]
ADAPTERS = "LoRA adapters"
Result = dict[str, Any]


def of_weights(model: Any, members: int) -> Mixture:
    """Return a mixture of whole weights."""
    return Mixture([copy.deepcopy(model.state_dict()) for _ in range(members)], model=model)


def of_adapters(model: Any, members: int) -> Mixture:
    """Return a mixture of adapters."""
    config = peft.LoraConfig(**LORA, init_lora_weights=False)
    names = [f"member {number}" for number in range(members)]
    adapted = peft.get_peft_model(copy.deepcopy(model), config, adapter_name=names[0])
    for name in names[1:]:
        adapted.add_adapter(name, config)
    return Mixture([Adapter(name) for name in names], model=adapted)


KINDS = {"whole weights": of_weights, ADAPTERS: of_adapters}


def megabytes(mixture: Mixture) -> float:
    """Return the size of a saved mixture."""
    with TemporaryDirectory() as folder:
        mixture.save_pretrained(folder)
        return sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file()) / 1e6


def measure(options: argparse.Namespace) -> list[Result]:
    """Return for each mixture its size and the seconds of each way, beside the model's."""
    torch.manual_seed(0)
    model = load(options.model, dropout=0.0).eval()
    ids = torch.randint(5, model.config.vocab_size, (options.rows, options.tokens))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def alone() -> None:
        with torch.no_grad():
            model(**batch)

    rows: dict[tuple[str, int], Mixture] = {}
    plays = {"alone": alone}
    for kind, make in KINDS.items():
        for members in options.members:
            mixture = rows[kind, members] = make(model, members)
            for way in WAYS:
                predict = partial(mixture.predict, partial(mixture, **batch), way)
                plays[f"{kind}, {members}, {way}"] = predict
    for play in plays.values():
        play()
    parts = {name: Part(lambda: None, play) for name, play in plays.items()}
    with tqdm(total=options.rounds * len(parts), disable=None, leave=False) as bar:
        *_, taken = timed("cpu", {}, parts, options.rounds, lambda text: bar.update())
    fixed = {"model": options.model, "rows": options.rows, "tokens": options.tokens}
    return [
        fixed
        | {"of": kind, "members": members, "megabytes": megabytes(mixture)}
        | {"alone": taken["alone"]}
        | {way: taken[f"{kind}, {members}, {way}"] for way in WAYS}
        for (kind, members), mixture in rows.items()
    ]


def measure_accuracy(options: argparse.Namespace, task: Any = None, name: str = "") -> list[Result]:
    """Return for each size the accuracies of mixtures of adapters, in each way.

    Args:
        options: how many members, and how they are trained.
        task: what they learn; None is the embedded intents.
        name: of the encoder; "" is the embedded one.
    """
    task = task or intent.load(intent.arguments(["--task", "intents"]))
    how = max(options.members), options.epochs, options.lr, peft.LoraConfig(**LORA)
    mixture, encode = trained(task, name or EMBEDDED_MODEL, *how)
    each, labels = predictions(mixture, encode, task.splits["test"])
    about = {"task": task.name, "trained": len(task.train), "tested": len(labels)}
    about |= {"adapters": len(mixture), "epochs": options.epochs, "lr": options.lr}
    return [
        {"of": ADAPTERS, "members": members, "about": about}
        | {"accuracy": accuracies(each, labels, members)}
        for members in options.members
    ]


def table(results: Iterable[Result]) -> str:
    """Return a Markdown table, and what to know of it."""
    results = list(results)
    costs = [found for found in results if "megabytes" in found]
    right = {(r["of"], r["members"]): r["accuracy"] for r in results if "accuracy" in r}
    rows = []
    for found in costs:
        over: list[Spread] = [ratio(found[way], found["alone"]) for way in WAYS]
        cells = [found["members"], found["of"], f"{found['megabytes']:.1f}", *over]
        own = right.get((found["of"], found["members"]))
        rows.append(cells + [shown(own[way]) if own else "–" for way in WAYS if right])
    first = costs[0]
    each = 1000 * statistics.median(first["alone"]) / first["rows"]
    notes = [
        f"{first['model']}, {first['rows']} rows of {first['tokens']} tokens, one thread, "
        f"{len(first['alone'])} rounds; the model alone takes {each:.1f} ms a row."
    ]
    if about := next((r["about"] for r in results if "about" in r), None):
        notes.append(
            f"Right: of {about['tested']} test rows of {about['task']}, by {about['adapters']} "
            f"adapters, each trained on {about['trained']} rows for {about['epochs']} epochs."
        )
    head = HEAD + [f"{way} right %" for way in WAYS if right]
    return "\n\n".join([markdown(head, rows), *notes])


def shown(accuracies: list[float]) -> str:
    """Return the mean, and the least and the most where there are several, in per cent."""
    mean, *ends = (100 * x for x in (statistics.mean(accuracies), min(accuracies), max(accuracies)))
    return f"{mean:.1f}" + f" [{ends[0]:.1f}, {ends[1]:.1f}]" * (len(accuracies) > 1)


def kept(path: Path) -> list[Result]:
    """Return the results in a file; none if there is no such file."""
    return [*map(json.loads, path.read_text().splitlines())] if path.is_file() else []


def main(argv: list[str] | None = None) -> int:
    """Measure, keep the results and print their table."""
    options = arguments(argv)
    torch.set_num_threads(1)
    path, found = options.output, kept(options.output)
    costs = [result for result in found if "megabytes" in result]
    if options.accuracy and not costs:
        print(f"mixture_cost: {path} has no cost yet: leave --accuracy out first.", file=sys.stderr)
        return 2
    if not options.report:
        if options.accuracy:
            found = [*costs, *measure_accuracy(options)]
        else:
            found = [*measure(options), *(result for result in found if "accuracy" in result)]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(result) + "\n" for result in found))
    if not found:
        print(f"mixture_cost: there is no {path}: leave --report out.", file=sys.stderr)
        return 2
    print(table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
