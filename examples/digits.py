r"""Adversarial training on real images in minutes: scikit-learn's handwritten digits.

1797 grey images of 8 × 8 pixels in [0, 1], a third of each digit held out, the same for all seeds;
a small convolutional network whose normalisation is part of it. Each arm trains the same number of
updates by AdamW under a rate that falls to 0 by a cosine; adversaries take K sign steps of ε/4 in
the L∞ ball, in the box. Robust accuracy is under PGD of 20 steps from 5 random starts, on all
images held out; ± is Student's 95 % interval over seeds.

    python examples/digits.py                              # all arms, 5 seeds
    python examples/digits.py --arms PGD-AT TRADES --seeds 0 1 --epochs 20
    python examples/digits.py --targeted --seeds 0         # under targeted APGD too
    python examples/digits.py --report                     # the table of what was measured

PGD climbs the cross entropy. `--targeted` adds AutoAttack's targeted APGD, of 20 steps towards each
wrong class, which finds more. Its rows are trained anew, and are in a table of their own.

What is in examples/results is an illustration at equal updates, 40 and 80 epochs: training has not
converged there (TRADES of seed 100 goes from 82.6 to 84.0 robust in 160), MAT takes smaller steps
by its damping, and no rate or weight was tuned for any arm; γ of AWP is the published one.

A run that has a line in OUTPUT is not repeated: a killed command goes on when it is given again.
"""

import argparse
import sys
from pathlib import Path

from common import arms as comparison
from common.options import positive, script

OUTPUT = Path(__file__).parent / "results" / "digits.jsonl"
NAMES = PLAIN, BASELINE, *_ = "plain", "PGD-AT", "TRADES", "MART", "TRADES+AWP", "MAT"


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = script("digits", "[options]", __doc__)
    add = parser.add_argument
    add("--epochs", type=positive, default=40, metavar="N", help="(default: %(default)s)")
    add("--radius", type=float, default=0.15, metavar="E", help="of the ball (default: 0.15)")
    add("--steps", type=positive, default=10, metavar="K", help="in training (default: 10)")
    add("--targeted", action="store_true", help="attack by torchattacks' APGDT too")
    comparison.options(parser, NAMES, OUTPUT, seeds=5)
    return parser.parse_args(argv)


if __name__ == "__main__":
    arguments()  # a mistake is answered before the imports below, which take seconds

import time
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from tqdm import tqdm

import mixadv
from common.arms import Column, Result
from common.command import entry
from mixadv.robustness import image_accuracy, pgd_attack, torchattack

RATE, BATCH = 2e-3, 64
COLUMNS = {
    "clean": Column("clean"),
    "robust": Column("robust"),
    "robust, trained on": Column("train robust"),
    "s": Column("seconds", 1, ".0f"),
}
UNDER_BOTH = {
    "clean": Column("clean"),
    "under PGD": Column("robust"),
    "robust": Column("worst"),
    "s": Column("seconds", 1, ".0f"),
}
PAIRED = ("robust", BASELINE)
INSTALL = "pip install --no-deps torchattacks==3.5.1"  # what it depends on is old or not needed
Words = dict[str, Any]

ARMS: dict[str, Callable[[Words], mixadv.Solver | None]] = {
    PLAIN: lambda words: None,
    BASELINE: lambda words: mixadv.PGD(**words),
    "TRADES": lambda words: mixadv.TRADES(**words, start_size=1e-3),
    "MART": lambda words: mixadv.MART(**words, start="normal", start_size=1e-3),
    "TRADES+AWP": lambda words: mixadv.AWP(
        solver=mixadv.TRADES(**words, start_size=1e-3), radius=0.005
    ),
    "MAT": lambda words: mixadv.MAT(
        **words, divergence="kl", smoothness_weight=6.0, start_size=1e-3, learner_steps=1
    ),
}
"""What each arm plays, given the words that all adversaries share; None is the optimizer alone."""


class Network(nn.Module):
    """Two convolutions and a head; pixels are normalised inside."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(512, 64),
            nn.ReLU(),
            nn.Linear(64, 10),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Return logits `[B, 10]` of images `[B, 1, 8, 8]`."""
        return self.layers((images - 0.3) / 0.4)


def data() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return images to train on and held out, and the labels of both."""
    pixels, labels = load_digits(return_X_y=True)
    pixels = (pixels / 16).astype(np.float32).reshape(-1, 1, 8, 8)
    parts = train_test_split(pixels, labels, test_size=1 / 3, random_state=0, stratify=labels)
    train, held_out, *answers = map(torch.from_numpy, parts)
    return train, held_out, *answers


def words_of(options: argparse.Namespace) -> Words:
    """Return the words that all adversaries share."""
    return {
        "steps": options.steps,
        "step_size": options.radius / 4,
        "radius": options.radius,
        "norm": "linf",
        "unit": "absolute",
        "box": (0.0, 1.0),
    }


def train(arm: str, seed: int, options: argparse.Namespace) -> nn.Module:
    """Return the network that an arm ends with."""
    torch.manual_seed(seed)
    model, (images, _, labels, _) = Network(), data()
    base = torch.optim.AdamW(model.parameters(), lr=RATE)
    updates = -(-len(images) // BATCH) * options.epochs
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(base, updates)
    solver = ARMS[arm](words_of(options))
    optimizer = base if solver is None else mixadv.wrap(base, model, solver, seed=seed)
    draw = torch.Generator().manual_seed(seed)
    for _ in tqdm(range(options.epochs), desc=f"{arm}, seed {seed}", disable=None, leave=False):
        for rows in torch.randperm(len(images), generator=draw).split(BATCH):
            x, y = images[rows], labels[rows]

            def closure(x: Tensor = x, y: Tensor = y) -> tuple[Tensor, ...]:
                logits = model(x)
                return F.cross_entropy(logits, y, reduction="none"), logits, y

            if solver is None:
                base.zero_grad()
                closure()[0].mean().backward()
                base.step()
            else:
                optimizer.step(closure)
            schedule.step()
    return model.eval()


def measure(model: nn.Module, options: argparse.Namespace) -> dict[str, float]:
    """Return clean and robust accuracy on the images held out.

    Under PGD alone on as many trained on, too; else under PGD and targeted APGD together.
    """
    images, held_out, labels, answers = data()
    found, radius = {}, options.radius
    attacks, parts = {"PGD": pgd_attack(model, radius=radius)}, {"": (held_out, answers)}
    if options.targeted:
        attacks["APGD-T"] = torchattack("APGDT", model, eps=radius, steps=20)
    else:
        parts["train "] = images[: len(held_out)], labels[: len(answers)]
    for name, batch in parts.items():
        accuracy = image_accuracy(model, [batch], attacks, radius=radius)
        found[f"{name}clean"] = float(accuracy.right.mean())
        found[f"{name}robust"] = float(accuracy.survived["PGD"].mean())
    return found | ({"worst": float(accuracy.robust.mean())} if options.targeted else {})


def run(arm: str, seed: int, options: argparse.Namespace) -> Result:
    """Return what an arm came to, and the seconds of one core that its training took."""
    begun = time.process_time()
    model = train(arm, seed, options)
    seconds = time.process_time() - begun
    return {"seconds": seconds} | measure(model, options)


def settings_of(arm: str, seed: int, options: argparse.Namespace) -> Result:
    """Return all that a result depends on."""
    names = ("epochs", "radius", "steps")
    played = repr(ARMS[arm](words_of(options)))
    asked = {"targeted": True} if options.targeted else {}
    settings = {"arm": arm, "seed": seed, "solver": played, **asked}
    return settings | {name: getattr(options, name) for name in names}


def table(results: list[Result]) -> str:
    """Return a table of arms, for each length of training and ball, and for one attack or two."""
    title = "ε = {radius:g} in L∞, K = {steps}, {epochs} epochs"
    kinds = {False: (":", COLUMNS), True: (", under PGD and targeted APGD:", UNDER_BOTH)}
    made = []
    for both, (end, columns) in kinds.items():
        chosen = [result for result in results if ("targeted" in result) is both]
        made.append(comparison.tables(chosen, (title + end).format_map, columns, PAIRED))
    return "\n\n".join(filter(None, made))


def work(options: argparse.Namespace) -> str:
    """Run what the command line asks for; return the table."""
    if options.targeted and find_spec("torchattacks") is None:
        raise ValueError(f"--targeted needs a package that is not installed: {INSTALL}")
    torch.set_num_threads(1)
    return table(comparison.results(options, settings_of, run))


main = entry("digits", arguments, work)

if __name__ == "__main__":
    sys.exit(main())
