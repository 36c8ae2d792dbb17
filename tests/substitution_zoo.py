"""Small classifiers, encoders and tokenizers that read texts, built in code."""

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import tokenizers
import torch
import transformers
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput

from tests.zoo import tiny_bert

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
TABLE = {
    "good": ["fine", "great", "nice"],
    "bad": ["poor", "weak"],
    "film": ["movie", "picture"],
    "plot": ["story"],
    "actor": ["player", "performer", "star"],
    "slow": ["sluggish"],
}
VOCABULARY = (*TABLE, *itertools.chain(*TABLE.values()), "the", "was", "and", "really", "end")


@functools.cache
def word_tokenizer() -> Any:
    """Return a fast tokenizer with one token for each word of the vocabulary."""
    words = {word: i for i, word in enumerate((*SPECIAL, *VOCABULARY))}
    return _fast(tokenizers.models.WordLevel(words, unk_token="[UNK]"))


@functools.cache
def piece_tokenizer() -> Any:
    """Return a fast WordPiece tokenizer: long words are of several pieces."""
    pieces = [*VOCABULARY, *"abcdefghijklmnopqrstuvwxyz0123456789.,!'-", "won", "act"]
    pieces += [f"##{c}" for c in "abcdefghijklmnopqrstuvwxyz0123456789"] + ["##der", "##ful"]
    numbers = {piece: i for i, piece in enumerate(dict.fromkeys((*SPECIAL, *pieces)))}
    return _fast(tokenizers.models.WordPiece(numbers, unk_token="[UNK]"))


def _fast(model: Any) -> Any:
    backend = tokenizers.Tokenizer(model)
    backend.normalizer = tokenizers.normalizers.Lowercase()
    backend.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


class BagOfWords(nn.Module):
    """Adds up what each token says for each label; counts the texts that it reads."""

    def __init__(self, weights: Tensor) -> None:
        super().__init__()
        self.table = nn.Embedding.from_pretrained(weights, freeze=False)
        self.dropout = nn.Dropout(0.5)
        self.texts = 0

    def get_input_embeddings(self) -> nn.Module:
        return self.table

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **_: Any) -> Any:
        self.texts += len(input_ids)
        said = self.dropout(self.table(input_ids))
        return SequenceClassifierOutput(logits=(said * attention_mask.unsqueeze(-1)).sum(1))


def bag_of_words(seed: int, labels: int = 2) -> BagOfWords:
    """Return a random bag-of-words model of the vocabulary; special tokens say nothing."""
    draw = torch.Generator().manual_seed(seed)
    weights = torch.randn(len(SPECIAL) + len(VOCABULARY), labels, generator=draw)
    weights[: len(SPECIAL)] = 0
    return BagOfWords(weights)


def tiny(kind: Any, tokenizer: Any, seed: int = 0, **more: Any) -> Any:
    """Return a tiny BERT with a head, in training mode, with dropout."""
    torch.manual_seed(seed)
    more = {"max_position_embeddings": 48, "initializer_range": 0.5, **more}
    config = tiny_bert(len(tokenizer), **more)
    return kind(config).train()


def predicted(model: Any, tokenizer: Any, text: Any) -> int:
    """Return the label that a model predicts of one text, read alone."""
    pair = (text,) if isinstance(text, str) else text
    encoding = tokenizer(*pair, return_tensors="pt", truncation=True, max_length=48)
    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    with torch.no_grad():
        label = int(model(**encoding).logits.argmax())
    for module, mode in modes:
        module.training = mode
    return label


def mean_state(encoder: Any, tokenizer: Any, text: str) -> Tensor:
    """Return the mean last state of one text's tokens, read alone."""
    encoder.eval()
    with torch.no_grad():
        return encoder(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0)


def combinations(words: Sequence[str], table: dict[str, list[str]]) -> list[tuple[str, ...]]:
    """Return every text that the table can make of words."""
    return list(itertools.product(*[[word, *table.get(word, [])] for word in words]))
