"""Each objective of pre-training: its model, its rows, what is saved of it."""

from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, concatenate_datasets
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForPreTraining,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    DataCollatorWithPadding,
    ElectraConfig,
)

from common import model as finetuning
from common.pretraining import OBJECTIVES, TINY, corpus, models
from common.pretraining.corpus import Corpus
from common.pretraining.objectives import ORDER, Detection, Masked, Objective, guess
from common.results import EMBEDDED_MODEL
from common.substitution import table_of
from mixadv.tokens import (
    CorrectionCollator,
    Neighbours,
    ReplacedTokenDetection,
    WordTokenizer,
    generator_config,
    sentence_order,
    substitute_words,
)

GENERATOR = "generator"  # the folder of it in that of the model
WORDS_PER_TOKEN = 0.7  # of running English, so that few pieces are cut


@dataclass
class Task:
    """A model, what it learns, and the rows it learns from.

    Attributes:
        model: as it is trained.
        new: names of the parameters that its checkpoint lacks.
        objective: what is minimised and measured.
        train: rows of tokens.
        held_out: rows likewise.
        exported: what is fine-tuned of the model.
        tokenizer: of the model.
        besides: what continual training needs besides, by the name of its folder.
    """

    model: Any
    new: list[str]
    objective: Objective
    train: Dataset
    held_out: Dataset
    exported: Any
    tokenizer: Any
    besides: dict[str, Any] = field(default_factory=dict)

    def save(self, folder: Path) -> None:
        """Save weights and tokenizer for `from_pretrained`."""
        for thing in (self.exported, self.tokenizer):
            thing.save_pretrained(folder)
        for name, thing in self.besides.items():
            thing.save_pretrained(folder / name)


def _rows(options: Namespace, texts: Corpus, encode: Any) -> tuple[Dataset, Dataset]:
    """Return the rows to train on, augmented if that is asked for, and those to measure on."""
    train = corpus.rows(texts.train, encode)
    if options.substitute:
        draw = torch.Generator().manual_seed(options.seed)
        table = similar_words(options.neighbours)
        copies = substitute_words(texts.train, table, options.substitute, generator=draw)
        train = concatenate_datasets([train, corpus.rows(copies, encode)])
    return train, corpus.rows(texts.held_out, encode, most=options.evaluate_rows)


def _source(options: Namespace, texts: Corpus) -> models.Source:
    """Return the tokenizer and shape of the model; raise if it cannot read rows of that length."""
    source = models.find(
        options.model,
        options.from_scratch,
        options.vocabulary,
        texts.train,
        options.tokenizer,
    )
    least = source.tokenizer.num_special_tokens_to_add(pair=True) + 2
    most = min(
        source.tokenizer.model_max_length,
        getattr(source.config, "max_position_embeddings", source.tokenizer.model_max_length),
    )
    if not least <= options.length <= most:
        raise ValueError(
            f"--length must be {least} to {most} for {options.model}, got {options.length}."
        )
    return source


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
    source = _source(options, texts)
    if source.tokenizer.mask_token is None:
        raise ValueError(
            f"The tokenizer of {options.model} has no mask token: choose an encoder that was made "
            "for masked-language modelling, or --objective macbert, which masks nothing."
        )
    model, new = models.build(source, AutoModelForMaskedLM)
    train, held_out = _rows(options, texts, encoder(source.tokenizer, options.length))
    known = guess(*map(_ordinary, (train, held_out)), len(source.tokenizer))
    collator = DataCollatorForLanguageModeling(source.tokenizer)
    objective = Masked(collator, known._asdict())
    return Task(model, new, objective, train, held_out, model, source.tokenizer)


def correction(options: Namespace, texts: Corpus) -> Task:
    """Return MacBERT's: similar words to be corrected and, with a head for it, two to be ordered.

    A row is a pair of successive pieces of text, half of them swapped, for models of the kinds that
    have a head for that (BERT, ALBERT); for others it is one piece.
    """
    source = _source(options, texts)
    ordered = source.config.model_type in ("bert", "albert")
    kind = AutoModelForPreTraining if ordered else AutoModelForMaskedLM
    model, new = models.build(source, kind)
    encode = WordTokenizer(source.tokenizer, options.length)

    def cut(together: list[str]) -> dict[str, list[Any]]:
        words = int(WORDS_PER_TOKEN * options.length) // (2 if ordered else 1)
        found = [piece for text in together for piece in corpus.pieces(text, max(1, words))]
        if not ordered:
            return encode(found)
        rows = sentence_order(found, label=ORDER)
        return {**encode(rows["text"], rows["pair"]), ORDER: rows[ORDER]}

    train, held_out = _rows(options, texts, cut)
    known = guess(*map(_of_words, (train, held_out)), len(source.tokenizer))
    chance = known._asdict() | ({"order": 0.5} if ordered else {})
    collator = CorrectionCollator(source.tokenizer, similar_words(options.neighbours))
    objective = Masked(collator, chance)
    return Task(model, new, objective, train, held_out, model, source.tokenizer)


def _ordinary(rows: Dataset) -> Iterator[list[int]]:
    """Yield the tokens of each row that are not special."""
    for ids, special in zip(rows["input_ids"], rows["special_tokens_mask"], strict=True):
        yield [token for token, is_special in zip(ids, special, strict=True) if not is_special]


def _of_words(rows: Dataset) -> Iterator[list[int]]:
    """Yield the tokens of each row that belong to a word."""
    for ids, words in zip(rows["input_ids"], rows["word_ids"], strict=True):
        yield [token for token, word in zip(ids, words, strict=True) if word >= 0]


def detection(options: Namespace, texts: Corpus) -> Task:
    """Return ELECTRA's: which tokens a small generator has replaced.

    A checkpoint of this script brings its generator, of others' a new one is trained.
    """
    source = _source(options, texts)
    config = source.config
    if options.model == TINY:
        size = {**models.SIZE, "embedding_size": models.SIZE["hidden_size"]}
        config = ElectraConfig(vocab_size=config.vocab_size, **size)
    if config.model_type != "electra":
        raise ValueError(
            f"--objective electra is for tiny and for ELECTRA's models, and {options.model} is a "
            f"{config.model_type}: its embeddings are as wide as the model, too wide for a small "
            "generator that shares them."
        )
    source = source._replace(config=config)
    discriminator, new = models.build(source, AutoModelForPreTraining)
    kept = Path(source.folder or "") / GENERATOR
    if source.folder and kept.is_dir():
        generator, _ = models.build(source._replace(folder=str(kept)), AutoModelForMaskedLM)
        unknown = set()
    else:
        generator, _ = models.build(source, AutoModelForMaskedLM, generator_config(config))
        unknown = {f"generator.{name}" for name, _ in generator.named_parameters()}
    model = ReplacedTokenDetection.from_tokenizer(generator, discriminator, source.tokenizer)
    train, held_out = _rows(options, texts, encoder(source.tokenizer, options.length))
    train, held_out = (rows.remove_columns("special_tokens_mask") for rows in (train, held_out))
    objective = Detection(DataCollatorWithPadding(source.tokenizer), {"AUC": 0.5})
    unknown |= {f"discriminator.{name}" for name in new}
    new = [name for name, _ in model.named_parameters() if name in unknown]
    return Task(
        model,
        new,
        objective,
        train,
        held_out,
        discriminator,
        source.tokenizer,
        {GENERATOR: generator},
    )


def similar_words(path: str) -> Neighbours:
    """Return the table in a file, "builtin" that of the project, or one by the embedded encoder's
    own embeddings of words.
    """
    if path:
        return table_of(path)
    with finetuning.quiet():
        where = finetuning.path(EMBEDDED_MODEL)
        encoder, tokenizer = AutoModel.from_pretrained(where), AutoTokenizer.from_pretrained(where)
    return Neighbours.from_encoder(encoder, tokenizer)


TASKS = dict(zip(OBJECTIVES, (masked, masked, detection, correction), strict=True))
"""What makes the task of an objective, by its name."""
