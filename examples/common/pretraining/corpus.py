"""Running text to pre-train on: read from many places, split, cut into rows of tokens."""

from itertools import pairwise
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, NamedTuple

from datasets import Dataset

from common import data
from common.pretraining import PYDOC
from mixadv.robustness.data import DataError
from mixadv.tokens import Words

EVERY = 10  # each tenth document is held out where a corpus has no split for it
TOGETHER = 64  # paragraphs that are read as one text


class Corpus(NamedTuple):
    """Paragraphs to train on, and others to measure on, in their order.

    Attributes:
        train: texts.
        held_out: texts of the dev split, or each tenth document of a corpus without one.
    """

    train: list[str]
    held_out: list[str]


def read(source: str, split: str = "dev") -> Corpus:
    """Return the corpus of a source.

    Args:
        source: "pydoc" for the manual that each Python installation carries; a text file, with
            empty lines between paragraphs; JSON lines with a `text` in each; a folder of such
            splits; or the name of a hub data set, as NAME or NAME:CONFIGURATION.
        split: which to hold out, where the source has several.

    Raises:
        DataError: if the source cannot be read or holds no text.
    """
    splits = {
        name: [text for text in texts if text.strip()] for name, texts in _splits(source).items()
    }
    for name, texts in splits.items():
        if not texts:
            raise DataError(f"{source} holds no text in {name}: it is empty, or only spaces.")
    if len(splits) == 1:
        texts = next(iter(splits.values()))
        if len(texts) < EVERY:
            raise DataError(
                f"{source} holds {len(texts)} paragraphs, and every {EVERY}th is held out: "
                "separate them by empty lines, or give a folder with train and dev."
            )
        held = texts[EVERY - 1 :: EVERY]
        return Corpus([t for i, t in enumerate(texts, 1) if i % EVERY], held)
    if "train" not in splits or split not in splits:
        raise DataError(f"{source} has the splits {', '.join(splits)}: train and {split} are used.")
    return Corpus(splits["train"], splits[split])


def _splits(source: str) -> dict[str, list[str]]:
    """Return paragraphs by the name of the split."""
    if source == PYDOC:
        return {"train": list(topics.values())}
    path = Path(source).expanduser()
    if path.is_dir():
        return {name: _texts(rows, source) for name, rows in data.from_folder(path).items()}
    if path.is_file() and ".jsonl" in path.suffixes:
        return {"train": _texts(data.from_file(path), source)}
    if path.is_file():
        try:
            return {"train": path.read_text("utf-8").split("\n\n")}
        except UnicodeDecodeError as error:
            raise DataError(f"{source} is no text in UTF-8: {error}.") from error
    found = data.from_hub(*source.split(":", 1))
    return {name: _texts(rows, source) for name, rows in found.items()}


def _texts(rows: Dataset, source: str) -> list[str]:
    if "text" not in rows.column_names:
        raise DataError(f"{source} has no column 'text', it has {', '.join(rows.column_names)}.")
    return [text or "" for text in rows["text"]]


def rows(texts: list[str], encode: Any, most: int = 0) -> Dataset:
    """Return the texts as rows of tokens.

    Paragraphs that follow each other are read as one text and cut where a row is full, so that
    little is padded.

    Args:
        texts: paragraphs.
        encode: takes a list of texts; returns columns of lists, several rows for a long text.
        most: rows wanted, evenly spaced; 0 for all.

    Raises:
        DataError: if there is not text enough for a row.
    """
    together = [
        "\n".join(texts[start : start + TOGETHER]) for start in range(0, len(texts), TOGETHER)
    ]
    whole = Dataset.from_dict({"text": together})
    found = whole.map(lambda batch: encode(batch["text"]), batched=True, remove_columns=["text"])
    if len(found) == 0:
        raise DataError(f"{len(texts)} paragraphs are too short for a row: give more text.")
    if 0 < most < len(found):
        found = found.select([i * len(found) // most for i in range(most)])
    return found


def pieces(text: str, words: int) -> list[str]:
    """Return a text cut into pieces of as many words, each up to the first word of the next.

    Example:
        >>> pieces("One, two; three.", 2)
        ['One, two; ', 'three.']
    """
    begins = [begin for begin, _ in Words(text).spans][::words]
    return [text[a:b] for a, b in pairwise([*begins, len(text)])]
