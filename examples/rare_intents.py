r"""Intents with few examples: plain training against adversaries that weigh rows or groups.

The embedded MiniLM, frozen, embeds the sentences of 16 intents; a linear classifier is trained on
24 sentences of each common intent and 3 of each rare one. Which eight are rare, and which of their
sentences are left, is drawn by the seed. Groups are the common and the rare. GroupDRO and the
control `balanced` read as many rare rows as common ones in a batch, the others as they come.

    python examples/rare_intents.py                     # all arms, 5 seeds, in seconds
    python examples/rare_intents.py --part dev --seeds 100 101 102 103
    python examples/rare_intents.py --report            # the table of what was measured

A run that has a line in OUTPUT is not repeated: a killed command goes on when it is given again.
"""

import argparse
import sys
from pathlib import Path

from common import arms
from common.options import positive, script

OUTPUT = Path(__file__).parent / "results" / "rare_intents.jsonl"
NAMES = PLAIN, *_ = "plain", "balanced", "GroupDRO", "GroupDRO, sizes", "CVaR", "ChiSquare"


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = script("rare_intents", "[options]", __doc__)
    text = "of 32 sentences (default: %(default)s)"
    parser.add_argument("--updates", type=positive, default=100, metavar="N", help=text)
    text = "to ask (default: test)"
    parser.add_argument("--part", choices=["dev", "test"], default="test", help=text)
    arms.options(parser, NAMES, OUTPUT, seeds=5)
    return parser.parse_args(argv)


if __name__ == "__main__":
    arguments()  # a mistake is answered before the imports below, which take seconds

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mixadv
from anchored import Sentences, rows
from common.arms import Column, Result
from common.command import entry
from mixadv.robustness import accuracy_by_group

INTENTS, KEPT = 16, (24, 3)
MEAN = mixadv.CVaR(level=1.0)  # of all rows: plain training
SIZES = {"counts": tuple(count * INTENTS // 2 for count in KEPT), "size_adjustment": 10.0}
SOLVERS: dict[str, mixadv.Solver] = {
    PLAIN: MEAN,
    "balanced": MEAN,
    "GroupDRO": mixadv.GroupDRO(groups=2, mirror_step=0.1),
    "GroupDRO, sizes": mixadv.GroupDRO(groups=2, mirror_step=0.1, **SIZES),
    "CVaR": mixadv.CVaR(level=0.7),
    "ChiSquare": mixadv.ChiSquare(ball=0.5),
}


@functools.cache
def embedded(part: str) -> tuple[Tensor, Tensor]:
    """Return the embeddings `[N, d]` of a part of the intents, and the intents' numbers."""
    own, names = rows(part), sorted({row["label"] for row in rows("train")})
    with torch.no_grad():
        found = Sentences().eval()([row["text"] for row in own])
    return found, torch.tensor([names.index(row["label"]) for row in own])


def run(arm: str, seed: int, options: argparse.Namespace) -> Result:
    """Return the accuracy of an arm: of all, of the worse group, and of the worst intent."""
    (x, y), draw = embedded("train"), torch.Generator().manual_seed(seed)
    rare, solver = torch.randperm(INTENTS, generator=draw)[: INTENTS // 2], SOLVERS[arm]
    order = torch.randperm(len(y), generator=draw)
    kept = [order[y[order] == i][: KEPT[int(i in rare)]] for i in range(INTENTS)]
    x, y = x[torch.cat(kept)], y[torch.cat(kept)]
    torch.manual_seed(seed)
    group, model = torch.isin(y, rare).long(), nn.Linear(x.shape[1], INTENTS)
    optimizer = mixadv.wrap(torch.optim.AdamW(model.parameters(), lr=0.02), model, solver)
    often = (
        1 / group.bincount()[group] if solver.grouped or arm == "balanced" else torch.ones(len(y))
    )
    for _ in range(options.updates):
        batch = often.multinomial(32, generator=draw)

        def closure(batch: Tensor = batch) -> Tensor:
            return F.cross_entropy(model(x[batch]), y[batch], reduction="none")

        optimizer.step(closure, groups=group[batch] if solver.grouped else None)
    asked, answers = embedded(options.part)
    right = (model(asked).argmax(1) == answers).tolist()
    parts = {"group": torch.isin(answers, rare), "intent": answers}
    by = {name: accuracy_by_group(right, [*map(str, p.tolist())]) for name, p in parts.items()}
    worst = {f"worst {n}": x["groups"][x["worst"]]["accuracy"]["value"] for n, x in by.items()}
    return {"mean": sum(right) / len(right), **worst}


def settings_of(arm: str, seed: int, options: argparse.Namespace) -> Result:
    """Return all that a result depends on."""
    played = {"solver": repr(SOLVERS[arm]), "updates": options.updates, "part": options.part}
    return {"arm": arm, "seed": seed, **played}


def table(results: list[Result]) -> str:
    """Return a table of arms for each setting."""
    columns = {name: Column(name) for name in ("mean", "worst group", "worst intent")}
    title = "{updates} updates, {part}:".format_map
    return arms.tables(results, title, columns, ("worst group", PLAIN))


def work(options: argparse.Namespace) -> str:
    """Run what the command line asks for; return the table."""
    return table(arms.results(options, settings_of, run))


main = entry("rare_intents", arguments, work)

if __name__ == "__main__":
    sys.exit(main())
