"""Each objective of pre-training: its model, its rows, what is saved of it."""

from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import AutoModelForMaskedLM, DataCollatorForLanguageModeling

from pretraining import corpus, models
from pretraining.corpus import Corpus
from pretraining.objectives import Masked, Objective, guess


@dataclass
class Task:
    """A model, what it learns, and the rows it learns from.

    Attributes:
        model: as it is trained.
        new: names of the parameters that its checkpoint lacks.
        objective: what is minimised and measured.
        train: rows of tokens.
        held_out: rows likewise.
        saved: what is saved of the model, and the tokenizer.
    """

    model: Any
    new: list[str]
    objective: Objective
    train: Dataset
    held_out: Dataset
    saved: tuple[Any, ...]

    def save(self, folder: Path) -> None:
        """Save weights and tokenizer for `from_pretrained`."""
        for thing in self.saved:
            thing.save_pretrained(folder)


def _rows(options: Namespace, texts: Corpus, encode: Any) -> tuple[Dataset, Dataset]:
    """Return the rows to train on and those to measure on."""
    return (
        corpus.rows(texts.train, encode),
        corpus.rows(texts.held_out, encode, most=options.evaluate_rows),
    )


def encoder(tokenizer: Any, length: int) -> Any:
    """Return what cuts texts into rows of tokens."""

    def encode(texts: list[str]) -> dict[str, list[Any]]:
        found = tokenizer(
            texts,
            truncation=True,
            max_length=length,
            return_overflowing_tokens=True,
            return_special_tokens_mask=True,
            verbose=False,
        )
        found.pop("overflow_to_sample_mapping", None)
        return dict(found)

    return encode


def masked(options: Namespace, texts: Corpus) -> Task:
    """Return masked-language modelling: 15 % of the tokens, 80/10/10 as in BERT."""
    source = models.find(options.model, options.from_scratch, options.vocabulary, texts.train)
    if source.tokenizer.mask_token is None:
        raise ValueError(
            f"The tokenizer of {options.model} has no mask token: choose an encoder that was made "
            "for masked-language modelling, or --objective macbert, which masks nothing."
        )
    model, new = models.build(source, AutoModelForMaskedLM)
    train, held_out = _rows(options, texts, encoder(source.tokenizer, options.length))
    known = guess(train, held_out, len(source.tokenizer), source.tokenizer.all_special_ids)
    collator = DataCollatorForLanguageModeling(source.tokenizer)
    objective = Masked(collator, known._asdict())
    return Task(model, new, objective, train, held_out, (model, source.tokenizer))


OBJECTIVES = {"mlm": masked, "alum": masked}
"""What makes the task of an objective, by its name."""

SOLVER = {"alum": "alum"}
"""Who plays where an objective names its adversary."""
