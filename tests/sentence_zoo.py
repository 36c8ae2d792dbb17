"""Tiny encoders of sentences, of pairs, sparse ones, and their data, for sentence-transformers."""

import functools
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset
from sentence_transformers import CrossEncoder, SentenceTransformer, SparseEncoder
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from sentence_transformers.sparse_encoder.modules import (
    MLMTransformer,
    SparseAutoEncoder,
    SpladePooling,
)

from tests.substitution_zoo import word_tokenizer

WORDS = ("film", "plot", "actor", "day")
ROWS = [
    {"anchor": f"the {noun} was {word}", "positive": f"a really {word} {noun} it was"[: 12 + 6 * i]}
    for i, noun in enumerate(WORDS)
    for word in ("good", "bad")
]
PAIRS = Dataset.from_list(ROWS)
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


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


def cross_encoder(folder: Path, labels: int = 1) -> CrossEncoder:
    tokenizer, config = saved()
    torch.manual_seed(0)
    apart = {"initializer_range": 0.5, "num_labels": labels, **NO_DROPOUT}  # its scores differ
    config = type(config)(**{**config.to_dict(), **apart})
    transformers.BertForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return CrossEncoder(str(folder), device="cpu", num_labels=labels)


def sparse_encoder(folder: Path, coded: bool = False) -> SparseEncoder:
    """Return one that scores words, or one that codes embeddings again."""
    tokenizer, config = saved()
    torch.manual_seed(0)
    config = type(config)(**{**config.to_dict(), **NO_DROPOUT})
    kind = transformers.BertModel if coded else transformers.BertForMaskedLM
    kind(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    coder = SparseAutoEncoder(16, hidden_dim=32, k=4, k_aux=8)
    modules = [Transformer(str(folder)), Pooling(16), coder]
    if not coded:
        modules = [MLMTransformer(str(folder)), SpladePooling("max")]
    return SparseEncoder(modules=modules, device="cpu")
