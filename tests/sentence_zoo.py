"""A tiny encoder of sentences and its pairs, for sentence-transformers."""

import functools
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

from tests.substitution_zoo import word_tokenizer

WORDS = ("film", "plot", "actor", "day")
ROWS = [
    {"anchor": f"the {noun} was {word}", "positive": f"a really {word} {noun} it was"[: 12 + 6 * i]}
    for i, noun in enumerate(WORDS)
    for word in ("good", "bad")
]
PAIRS = Dataset.from_list(ROWS)


@functools.cache
def saved() -> Any:
    """Return what a tiny encoder is made of."""
    tokenizer = word_tokenizer()
    size = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    config = transformers.BertConfig(vocab_size=len(tokenizer), num_hidden_layers=1, **size)
    return tokenizer, config


def encoder(folder: Path, dropout: float = 0.1) -> SentenceTransformer:
    tokenizer, config = saved()
    torch.manual_seed(0)
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = dropout
    transformers.BertModel(config).save_pretrained(folder / "encoder")
    tokenizer.save_pretrained(folder / "encoder")
    modules = [Transformer(str(folder / "encoder")), Pooling(16)]
    return SentenceTransformer(modules=modules, device="cpu")
