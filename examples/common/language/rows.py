"""The rows of the experiments: plain questions, a topic to decline, and what is near to it."""

import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

FOLDER = Path(__file__).parents[2] / "data" / "chat"
SYSTEM = "Answer briefly."

Row = dict[str, Any]
T = TypeVar("T")


def read(name: str, split: str) -> list[Row]:
    """Return the rows of a set: questions, garlic or near; train or held_out."""
    text = (FOLDER / f"{name}.{split}.jsonl").read_text("utf-8")
    return [json.loads(line) for line in text.splitlines()]


def column(rows: Sequence[Row], name: str) -> list[Any]:
    """Return what the rows have under a name."""
    return [row[name] for row in rows]


def batches(rows: Sequence[T], size: int, seed: int) -> Iterator[list[T]]:
    """Yield batches without end, each epoch in an order of its own; none is smaller."""
    draw = random.Random(seed)
    while True:
        order = draw.sample(rows, len(rows))
        for start in range(0, len(order) - size + 1, size):
            yield order[start : start + size]
