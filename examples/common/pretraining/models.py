"""Models to pre-train: a tiny one built here, or a checkpoint and its tokenizer."""

import copy
from pathlib import Path
from typing import Any, NamedTuple

from transformers import AutoConfig, AutoTokenizer, BertConfig

from common import model as finetuning
from common.model import quiet
from common.pretraining import TINY
from common.results import EMBEDDED_MODEL

SIZE = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
SIZE |= {"intermediate_size": 512, "max_position_embeddings": 512}


class Source(NamedTuple):
    """Where a model comes from.

    Attributes:
        tokenizer: of the model.
        config: its shape.
        folder: of its weights; None for random ones.
    """

    tokenizer: Any
    config: Any
    folder: str | None


def find(
    name: str, from_scratch: bool, vocabulary: int, texts: list[str], shared: str = ""
) -> Source:
    """Return the tokenizer and shape of a model.

    Args:
        name: "tiny", "minilm" for the embedded encoder, a hub model or a folder.
        from_scratch: whether its weights are drawn anew.
        vocabulary: size of the tokenizer of "tiny", learned on the texts.
        texts: to train on.
        shared: a model whose tokenizer "tiny" takes in place of learning one.

    Raises:
        ValueError: if there is no such model.
    """
    where = finetuning.path(EMBEDDED_MODEL if name == TINY else name)
    if Path(where).is_dir() and not (Path(where) / "config.json").is_file():
        raise ValueError(f"The folder {name} holds no model: it has no config.json.")
    try:
        with quiet():
            if name == TINY:
                like = AutoTokenizer.from_pretrained(finetuning.path(shared) if shared else where)
                tokenizer = like if shared else _learned(like, vocabulary, texts)
                config = BertConfig(vocab_size=len(tokenizer), **SIZE)
                return Source(tokenizer, config, None)
            tokenizer = AutoTokenizer.from_pretrained(where)
            config = AutoConfig.from_pretrained(where)
    except (OSError, ValueError) as error:
        raise ValueError(f"The model {name} cannot be loaded: {error}") from error
    return Source(tokenizer, config, None if from_scratch else where)


def build(source: Source, kind: Any, config: Any = None) -> tuple[Any, list[str]]:
    """Return a model of a kind, and the names of the parameters that its checkpoint lacks.

    Args:
        source: as `find` returns it.
        kind: an Auto class of transformers.
        config: another shape than the source's, of random weights.

    Raises:
        ValueError: if the model has no such head.
    """
    try:
        with quiet():
            if source.folder is None or config is not None:
                built = kind.from_config(copy.deepcopy(config or source.config))
                return built, [name for name, _ in built.named_parameters()]
            built, info = kind.from_pretrained(source.folder, output_loading_info=True)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{type(source.config).__name__} has no model for {kind.__name__}: {error}"
        ) from error
    missing = set(info["missing_keys"])
    return built, [name for name, _ in built.named_parameters() if name in missing]


def _learned(like: Any, vocabulary: int, texts: list[str]) -> Any:
    """Return a tokenizer of the texts, the same for the same texts.

    Ties between pairs of pieces are broken by the numbers of the pieces, and those that are met
    inside words would be numbered in the order of a hash table, which differs from process to
    process. They are named beforehand, in order, as if they were special.
    """
    read = like.backend_tokenizer
    words = (
        word
        for text in texts
        for word, _ in read.pre_tokenizer.pre_tokenize_str(read.normalizer.normalize_str(text))
    )
    inside = [f"##{letter}" for letter in sorted({letter for word in words for letter in word[1:]})]
    made = like.train_new_from_iterator(
        texts, vocabulary, new_special_tokens=inside, show_progress=False
    )
    return type(like)(vocab=made.get_vocab(), model_max_length=like.model_max_length)
