r"""A sentence encoder that misspelt words move less, trained without labels against a frozen copy.

The embedded MiniLM reads the training sentences of the intents; each has to stay where the encoder
put it before training (FARE, `mixadv.anchors`): under δ on word embeddings (PGD), under noise of
that radius, or, a control that knows what will come, with a word of four misspelt. Measured: is the
training sentence nearest to a test sentence, in an index that is never embedded anew, one of the
same intent? Test sentences are clean, misspelt, or twins by hand: of typos (64), of words (80).

    python examples/anchored.py                            # all arms, 3 seeds of training
    python examples/anchored.py --arms PGD --radius 0.3 --part dev --seeds 100
    python examples/anchored.py --report                   # the table of what was measured

A run that has a line in OUTPUT is not repeated: a killed command goes on when it is given again.
"""

import argparse
import sys
from pathlib import Path

from common import arms
from common.options import positive, script

HERE = Path(__file__).parent
OUTPUT, INTENTS = HERE / "results" / "anchored.jsonl", HERE / "data" / "intents"
NAMES = FROZEN, *_, TOLD = "as it is", "noise", "PGD", "misspelt"


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = script("anchored", "[options]", __doc__)
    add = parser.add_argument
    text = "of 16 sentences (default: %(default)s)"
    add("--updates", type=positive, default=24, metavar="N", help=text)
    add("--rate", type=float, default=1e-4, metavar="R", help="of AdamW (default: 1e-4)")
    text = "of a sentence's ball, in lengths of a token's embedding (default: %(default)s)"
    add("--radius", type=float, default=0.1, metavar="E", help=text)
    add("--part", choices=["dev", "test"], default="test", help="to ask (default: test)")
    arms.options(parser, NAMES, OUTPUT, seeds=3)
    return parser.parse_args(argv)


if __name__ == "__main__":
    arguments()  # a mistake is answered before the imports below, which take seconds

import json
import random
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from tqdm import tqdm

import mixadv
from common.arms import Column, Result
from common.command import entry
from common.model import path
from common.results import EMBEDDED_MODEL
from mixadv.anchors import Anchor, distances
from mixadv.tokens import Typos, Words

SOLVERS: dict[str, Any] = {
    FROZEN: lambda radius: None,
    "noise": lambda radius: mixadv.UniformNoise(radius=radius),
    "PGD": lambda radius: mixadv.PGD(radius=radius, step_size=radius / 2, steps=3),
    TOLD: lambda radius: mixadv.PGD(radius=0.0, steps=0),
}


class Sentences(nn.Module):
    """The encoder: the mean over real tokens, of length 1."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = transformers.AutoModel.from_pretrained(path(EMBEDDED_MODEL))
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(path(EMBEDDED_MODEL))

    def forward(self, texts: list[str]) -> Tensor:
        """Return embeddings `[B, d]`."""
        inputs = self.tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
        real = inputs["attention_mask"][..., None]
        return F.normalize((self.encoder(**inputs).last_hidden_state * real).sum(1), dim=-1)


def rows(part: str) -> list[dict[str, str]]:
    """Return the rows of a part of the intents."""
    return [json.loads(x) for x in (INTENTS / f"{part}.jsonl").read_text("utf-8").splitlines()]


def misspelt(texts: list[str], seed: int) -> list[str]:
    """Return the texts with a quarter of their words misspelt, at least one where one can be."""
    draw, typos, found = random.Random(seed), Typos(seed=seed), []
    for words in map(Words, texts):
        places = [i for i in range(len(words)) if typos([words], [i])[0]]
        chosen = draw.sample(places, min(len(places), max(1, round(len(words) / 4))))
        found.append(words.replaced({i: draw.choice(typos([words], [i])[0]) for i in chosen}))
    return found


def train(arm: str, seed: int, options: argparse.Namespace) -> tuple[Sentences, Anchor]:
    """Return the encoder that an arm ends with, and the frozen one."""
    torch.manual_seed(seed)
    model, draw, solver = Sentences(), random.Random(seed), SOLVERS[arm](options.radius)
    anchor, texts = Anchor(model), [row["text"] for row in rows("train")]
    if solver is None:
        return model.eval(), anchor
    base = torch.optim.AdamW(model.train().parameters(), lr=options.rate)
    site = "encoder.embeddings.word_embeddings"
    optimizer = mixadv.wrap(base, model, solver, site=site, seed=seed)
    for update in tqdm(range(options.updates), desc=f"{arm}, {seed}", disable=None, leave=False):
        read = batch = draw.sample(texts, 16)
        if arm == TOLD:  # other slips than those of the queries
            read = misspelt(batch, seed=1 + seed * options.updates + update)
        target = anchor.embed(batch)
        optimizer.step(lambda read=read, target=target: distances(model(read), target))
    return model.eval(), anchor


@torch.no_grad()
def run(arm: str, seed: int, options: argparse.Namespace) -> Result:
    """Return how often the intent is found, and the cosine of misspelt with clean sentences."""
    model, anchor = train(arm, seed, options)
    index, asked, twins = rows("train"), rows(options.part), rows("adversarial")
    stored, texts = anchor.embed([row["text"] for row in index]), [row["text"] for row in asked]
    wrong = [row | {"text": t} for row, t in zip(asked, misspelt(texts, 0), strict=True)]
    kinds = {f"{k} twins": [r for r in twins if r["kind"] == k] for k in ("typo", "substitution")}
    found = {}
    for name, own in {"clean": asked, "misspelt": wrong, **kinds}.items():
        embedded = model([row["text"] for row in own])
        nearest = (embedded @ stored.T).argmax(1).tolist()
        hits = [index[i]["label"] == row["label"] for i, row in zip(nearest, own, strict=True)]
        found[name] = sum(hits) / len(hits)
        if name == "misspelt":
            found["cosine"] = float((embedded * anchor.embed(texts)).sum(1).mean())
    return found


def settings_of(arm: str, seed: int, options: argparse.Namespace) -> Result:
    """Return all that a result depends on."""
    names = ("part", "updates", "rate", "radius")
    return {"arm": arm, "seed": seed} | {name: getattr(options, name) for name in names}


def table(results: list[Result]) -> str:
    """Return a table of arms for each setting."""
    title = "Radius {radius:g}, {updates} updates at {rate:g}, {part}:".format_map
    columns = {n: Column(n) for n in ("clean", "misspelt", "typo twins", "substitution twins")}
    columns["cosine, misspelt"] = Column("cosine", 1, ".3f")
    return arms.tables(results, title, columns, ("misspelt", FROZEN))


def work(options: argparse.Namespace) -> str:
    """Run what the command line asks for; return the table."""
    return table(arms.results(options, settings_of, run))


main = entry("anchored", arguments, work)

if __name__ == "__main__":
    sys.exit(main())
