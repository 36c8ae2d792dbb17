"""Three ways to a cheaper ascent, and what each reaches on a fine-tuned encoder with dropout.

Trains plainly, then lets every way play on rows not seen, in training mode, as the learner does:

- without dropout: δ is found in evaluation mode; or, to tell the mode from the mask, under another
  dropout mask than the learner's, which saves nothing.
- warm start: the ascent begins at the δ that one step reached an epoch earlier, itself begun so.
  Training in between is plain: it does not answer δ, as a game would, and so leaves more of it.
- first layer: a full pass gives p, the payoff's gradient in the output of the first layer; further
  steps climb ⟨p, first layer(embeddings + δ)⟩, which needs that layer alone (Zhang et al. 2019,
  "You Only Propagate Once", arXiv:1905.00877). Beside it: longer full steps.

Prints the symmetric KL reached and the time taken over those of one gradient step from a random
start, without the learner's clean pass, which all ways need; and what is kept of each row.

    python examples/research/ascents_tried.py --task intents
    python examples/research/ascents_tried.py --report --output examples/results/ascents_tried
"""

import argparse
import sys

import _above  # noqa: F401
from ascents_asked import asked
from common.command import entry, refuse_mistakes


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line; raise ValueError for a task that is not there."""
    return asked(argv, __doc__.splitlines()[0], "runs/ascents_tried")


if __name__ == "__main__":
    refuse_mistakes("ascents_tried", arguments)  # before the imports below, which take seconds

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

import directions
import mixadv
from common import data
from common.loop import Training
from common.tables import markdown
from directions import RADII, trained
from mixadv.maths.divergence import symmetric_kl

PAYOFF = "symmetric_kl"
Batch = dict[str, Tensor]
Way = Callable[[mixadv.Stage, Tensor | None], mixadv.Strategy]
"""`way(stage, kept)`: where the adversary ends; `kept` is the δ `[B, n, d]` of an epoch before."""


def gradient(steps: int, stride: float = 1.0) -> Way:
    """Return the ordinary ascent from a random start, in steps `stride` times as long."""
    return lambda stage, kept: warm(steps, stride=stride)(stage, None)


def elsewhere(steps: int, training: bool) -> Way:
    """Return the ordinary ascent in another mode, or in training mode under another mask."""

    def way(stage: mixadv.Stage, kept: Tensor | None) -> mixadv.Strategy:
        model = stage.arena.model
        stage.renew()
        model.train(training)
        with torch.no_grad():
            stage.clean()  # the target: no learner needs its graph
        q = gradient(steps)(stage, kept)
        model.train()
        return q

    return way


def warm(steps: int, scale: float = 1.0, stride: float = 1.0) -> Way:
    """Return the ascent from the δ kept, scaled; from a random start before there is one."""

    def way(stage: mixadv.Stage, kept: Tensor | None) -> mixadv.Strategy:
        begin = None if kept is None else lambda index, call: scale * kept
        size = stride * stage.arena.solver.step_size
        ascent = replace(stage.arena.solver, steps=steps, step_size=size)
        return stage.ascend(PAYOFF, ascent, begin=begin)

    return way


def first_layer(steps: int, inner: int) -> Way:
    """Return the ascent that follows each of its steps by inner ones through the first layer."""

    def way(stage: mixadv.Stage, kept: Tensor | None) -> mixadv.Strategy:
        ascent, pulls = stage.arena.solver, []
        q = stage.start(ascent)
        for _ in range(steps):
            with listening(stage.arena.model, lambda output: output.register_hook(pulls.append)):
                _, _, gradients = stage.payoffs(q, PAYOFF, ascent)
            q = stage.move(q, ascent, gradients)
            for _ in range(inner):
                q = stage.move(q, ascent, inner_gradients(stage, q, pulls[-1]))
        return q.detach()

    return way


def inner_gradients(stage: mixadv.Stage, q: mixadv.Strategy, pull: Tensor) -> list[Tensor]:
    """Return the gradients in δ of ⟨pull, output of the first layer⟩, of each sample its own."""
    model = stage.arena.model
    layers, outputs = layers_of(model), []

    def closure() -> Tensor:
        with listening(model, outputs.append):
            stage.goals.closure()
        return (pull * outputs[0]).flatten(1).sum(1)

    later = list(layers[1:])
    del layers[1:]
    try:
        with stage.passes.frozen():
            loss = stage.passes.run(stage.passes.at(q), closure).loss
            return stage.passes.differentiate(loss, q.points)
    finally:
        layers.extend(later)


def layers_of(model: nn.Module) -> nn.ModuleList:
    """Return the layers of an encoder."""
    return next(module for module in model.modules() if isinstance(module, nn.ModuleList))


@contextmanager
def listening(model: nn.Module, hear: Callable[[Tensor], Any]) -> Iterator[None]:
    """Call `hear` with what the first layer of an encoder returns."""

    def hook(module: nn.Module, args: Any, output: Any) -> None:
        hear(output[0] if isinstance(output, tuple) else output)

    handle = layers_of(model)[0].register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


WAYS: dict[str, Way] = {
    "gradient, K=1": gradient(1),
    "gradient, K=2": gradient(2),
    "gradient, K=3": gradient(3),
    "gradient, K=2, steps of 4 radii": gradient(2, 4.0),
    "without dropout, K=1": elsewhere(1, training=False),
    "without dropout, K=3": elsewhere(3, training=False),
    "under another mask, K=1": elsewhere(1, training=True),
    "kept δ as it is": warm(0),
    "warm start, K=1": warm(1),
    "warm start, K=2": warm(2),
    "warm start at .3 of its length, K=1": warm(1, 0.3),
    "warm start at .05 of its length, K=1": warm(1, 0.05),
    "first layer, K=1 and 3 inner": first_layer(1, 3),
    "first layer, K=2 and 3 inner": first_layer(2, 3),
    "first layer, K=2 and 1 inner": first_layer(2, 1),
}
BASELINE = next(iter(WAYS))


def game(model: nn.Module, radius: float, seed: int, batch: Batch) -> mixadv.Game:
    """Return a game whose first round, which is checked, is over."""
    solver = mixadv.ALUM(radius=radius, step_size=radius, start_size=0.05 * radius, sign="any")
    made = mixadv.Game(model, solver, seed=seed)
    with made.rounds.rehearse(lambda: model(**batch)):
        return made


def reached(played: mixadv.Game, batch: Batch, way: Way, kept: Tensor | None) -> dict[str, Any]:
    """Return where a way ends, the divergence there, and the seconds it took."""
    closure = lambda: played.model(**batch)  # noqa: E731
    with played.rounds.rehearse(closure) as stage:
        stage.clean()
        started = time.process_time()
        q = way(stage, kept).detach()
        seconds = time.process_time() - started
    with played.rounds.rehearse(closure) as stage, torch.no_grad():
        clean, moved = stage.clean(), stage.passes.run(stage.passes.at(q))
        values = symmetric_kl(moved.predictions, clean.predictions)
    return {"delta": q.points[0][0], "divergence": values.tolist(), "seconds": seconds}


def train_on(training: Training, seed: int) -> None:
    """Train for an epoch more, at the mean of the learning rate's linear decay."""
    for group in training.optimizer.param_groups:
        group["lr"] = training.run.learning_rate / 2
    epoch = range(0, len(training.rows), training.size)
    source = data.batches(data.lengths(training.rows), training.size, seed)
    for _, rows in zip(tqdm(epoch, desc="training"), source, strict=False):
        training.training_step(training.model, training.encode(training.rows[rows]))
        training.optimizer.step()
        training.optimizer.zero_grad()


def keep(training: Training, batches: list[Batch], epochs: int) -> dict[float, list[Tensor]]:
    """Return the δ that one step reaches in each epoch from that of the one before, by radius."""
    found: dict[float, list[Any]] = {radius: [None] * len(batches) for radius in RADII}
    for seed in range(1, 1 + epochs):
        for radius, kept in found.items():
            played = game(training.model.train(), radius, seed, batches[0])
            for number, batch in enumerate(batches):
                kept[number] = reached(played, batch, warm(1), kept[number])["delta"]
        train_on(training, seed)
    return found


def measure(
    model: nn.Module, batches: list[Batch], radius: float, kept: list[Tensor]
) -> Iterator[dict[str, Any]]:
    """Yield a row per way; batch by batch, in orders that are reversed."""
    played = game(model, radius, 0, batches[0])
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in WAYS}
    for number, batch in enumerate(tqdm(batches, desc=f"radius {radius:g}")):
        torch.manual_seed(number)  # the learner's mask, the same for all ways
        for name in list(WAYS)[:: 1 if number % 2 else -1]:
            found[name].append(reached(played, batch, WAYS[name], kept[number]))
    tokens = [n for batch in batches for n in batch["attention_mask"].sum(1).tolist()]
    size = statistics.fmean(tokens) * kept[0].shape[-1] * 4 / 1024
    for name, parts in found.items():
        ratios = [p["seconds"] / b["seconds"] for p, b in zip(parts, found[BASELINE], strict=True)]
        mean = statistics.fmean(x for part in parts for x in part["divergence"])
        row = {"way": name, "radius": radius, "divergence": mean, "time": statistics.median(ratios)}
        yield row | {"kept": size if name.startswith(("kept", "warm")) else 0.0}


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as Markdown: a line per way, the divergence over the baseline's."""
    base = {row["radius"]: row["divergence"] for row in rows if row["way"] == BASELINE}
    lines = []
    for name in WAYS:
        mine = [row for row in rows if row["way"] == name]
        over = [f"{row['divergence'] / base[row['radius']]:.2f}" for row in mine]
        cost = statistics.median(row["time"] for row in mine)
        lines.append([name, *over, f"{cost:.2f}", f"{mine[0]['kept']:.0f}"])
    return markdown(["way", *base, "time", "KiB kept per row"], lines) + "\n"


def work(options: argparse.Namespace) -> str:
    """Train, keep, train further, measure; write the rows and return the table."""
    if options.report:
        tasks = directions.kept(options.output)
        return "\n".join(f"**{task}**\n\n{table(rows)}" for task, rows in tasks.items())
    torch.set_num_threads(1)
    training, batches = trained(options)
    kept = keep(training, batches, epochs=2)
    rows = [row for r in RADII for row in measure(training.model, batches, r, kept[r])]
    directions.store(options, rows)
    return table(rows)


main = entry("ascents_tried", arguments, work)


if __name__ == "__main__":
    sys.exit(main())
