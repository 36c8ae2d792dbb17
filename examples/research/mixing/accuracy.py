"""How accurate mixtures of few and of many adapters are on rows that they were not trained on."""

from functools import partial
from typing import Any

import peft
import torch
from accelerate.utils import set_seed
from datasets import Dataset
from torch import Tensor
from tqdm.auto import tqdm

from common import data, model
from common.data import Task
from common.results import Run
from mixadv.mixtures import Adapter, Mixture
from mixing.measure import right

BATCH = 16  # rows
LENGTH = 64  # tokens


def trained(
    task: Task, name: str, members: int, epochs: int, rate: float, config: peft.LoraConfig
) -> tuple[Mixture, model.Encoder]:
    """Return adapters to a pretrained encoder, and what encodes texts for them.

    Each is trained by AdamW on all rows, in an order and from a start of its own.
    """
    set_seed(0)
    network, tokenizer = model.load(Run(task.name, model=name, max_length=LENGTH), task)
    encode = model.Encoder(tokenizer, LENGTH, False, "cpu")
    names = [f"member {number}" for number in range(members)]
    adapted: Any = peft.get_peft_model(network, config, names[0])
    for other in names[1:]:
        adapted.add_adapter(other, config)
    for number, own in enumerate(tqdm(names, desc="members", leave=False, disable=None)):
        set_seed(number)
        adapted.set_adapter(own)
        _fit(adapted.train(), encode, task.train, epochs, rate, seed=number)
    return Mixture([Adapter(own) for own in names], model=adapted), encode


def accuracies(each: Tensor, labels: Tensor, members: int) -> dict[str, list[float]]:
    """Return the accuracy of mixtures of so many members, by the way they classify.

    Args:
        each: the probabilities that each of all members gives, `[M, N, C]`.
        labels: `[N]`.
        members: of a mixture. The first ones make one, the next ones another; a rest makes none.

    Returns:
        One number for each mixture; of a draw, the accuracy that is expected.
    """
    shares = torch.full((members,), 1 / members, dtype=torch.float64)
    mixtures = each.double().split(members)[: len(each) // members]
    found = torch.stack([right(own, shares, labels).mean(0) for own in mixtures])
    return dict(zip(("draw", "mean", "vote"), found.T.tolist(), strict=True))


def predictions(mixture: Mixture, encode: model.Encoder, rows: Dataset) -> tuple[Tensor, Tensor]:
    """Return what each member gives `[M, N, C]`, and the labels `[N]`."""
    each, labels = [], []
    for start in range(0, len(rows), 2 * BATCH):
        batch = encode(rows[start : start + 2 * BATCH])
        labels.append(batch.pop("labels"))
        each.append(mixture.each(partial(mixture, **batch)))
    return torch.cat(each, 1), torch.cat(labels)


def _fit(
    network: Any, encode: model.Encoder, rows: Dataset, epochs: int, rate: float, seed: int
) -> None:
    """Train the active adapter and its head; the rate falls linearly to 0."""
    optimizer = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], lr=rate)
    lengths = data.lengths(rows)
    batches = [b for number in range(epochs) for b in data.epoch(lengths, BATCH, seed, number)]
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, len(batches))
    for places in batches:
        network(**encode(rows[places])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
