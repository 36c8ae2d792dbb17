"""Which words of a row are chosen, and rows of tokens that know their words."""

import math
from itertools import chain, pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mixadv.tokens import WordSelection, WordTokenizer, sentence_order
from mixadv.tokens.pretraining.selection import whole_words
from mixadv.tokens.reading.words import Words
from tests.tokenizers_zoo import FAMILIES, byte_level, encoder_tokenizer, texts


def row_of(lengths, gaps=()):
    """Words of so many tokens, a token of no word before those named."""
    ids = []
    for number, length in enumerate(lengths):
        ids += [-1] * (number in gaps) + [number] * length
    return whole_words(ids)


rows = st.builds(
    row_of,
    st.integers(0, 60).flatmap(
        lambda n: st.lists(st.integers(1, 6), min_size=n, max_size=n)
    ),  # long ones often
    st.sets(st.integers(0, 60), max_size=9),
)


def many(selection, words, count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [selection(words, generator) for _ in range(count)]


@given(rows, st.floats(0.01, 1.0) | st.sampled_from([0.15, 0.5, 0.9, 1.0]), st.integers(0, 999))
def test_ngrams_are_neighbouring_words_each_once_within_the_budget(words, fraction, seed):
    (ngrams,) = many(WordSelection(fraction), words, 1, seed)
    chosen = list(chain(*ngrams))
    assert len(set(chosen)) == len(chosen)
    assert set(chosen) <= set(words)
    assert all(1 <= len(ngram) <= 4 for ngram in ngrams)
    assert all(a.stop == b.start for ngram in ngrams for a, b in pairwise(ngram))
    assert bool(chosen) == bool(words)
    if words:
        budget = fraction * sum(map(len, words))
        assert sum(map(len, chosen)) < budget + max(map(len, words))
    if fraction == 1:
        assert set(chosen) == set(words)


@pytest.mark.parametrize("lengths", [[1] * 101, [1, 2, 3, 5] * 30, [7] * 11, [1, 9] * 12])
def test_the_expected_rate_is_exactly_the_fraction(lengths):
    words, count = row_of(lengths, gaps=range(0, 99, 6)), 1500
    found = torch.tensor(
        [float(sum(map(len, chain(*n)))) for n in many(WordSelection(), words, count)]
    )
    error = found.std() / math.sqrt(count)
    assert abs(found.mean() - 0.15 * sum(lengths)) < 4 * error


def test_lengths_of_ngrams_follow_their_law():
    # budget 15: the first 3 n-grams have at most 12 words, and are as long as drawn
    first = [
        len(n) for ngrams in many(WordSelection(), row_of([1] * 100), 2000) for n in ngrams[:3]
    ]
    for length, law in enumerate((0.4, 0.3, 0.2, 0.1), start=1):
        error = math.sqrt(law * (1 - law) / len(first))
        assert abs(first.count(length) / len(first) - law) < 4 * error


def test_an_ngram_ends_with_the_budget_and_where_there_is_no_room():
    fours = WordSelection(lengths=(0, 0, 0, 1))
    (ngrams,) = many(fours, row_of([1] * 100), 1)
    assert [len(n) for n in ngrams] == [4, 4, 4, 3]
    (ngrams,) = many(fours, row_of([1] * 100, gaps=range(0, 100, 2)), 1)
    assert [len(n) for n in ngrams] == [2] * 7 + [1]
    (ngrams,) = many(WordSelection(1.0, (0, 0, 0, 1)), row_of([1] * 6), 1)
    assert sorted(len(n) for n in ngrams)[-1] == 4


@pytest.mark.parametrize("words", [row_of([1] * 20), row_of([4, 4, 4], gaps=range(3))])
def test_words_of_one_length_are_chosen_alike(words):
    count = 4000
    chosen = list(chain(*chain(*many(WordSelection(lengths=(1.0,)), words, count))))
    law = len(chosen) / count / len(words)
    for word in words:
        assert abs(chosen.count(word) / count - law) < 4 * math.sqrt(law * (1 - law) / count)


def test_of_a_row_too_short_for_the_budget_one_word_is_chosen_uniformly():
    count = 4000
    chosen = list(chain(*chain(*many(WordSelection(lengths=(1.0,)), row_of([2, 2]), count))))
    assert len(chosen) == count
    assert abs(chosen.count(range(0, 2)) - count / 2) < 4 * math.sqrt(count / 4)


@pytest.mark.parametrize("wrong", [{"fraction": 0}, {"fraction": 15}, {"fraction": math.nan},
                                   {"lengths": (0.4, 0.3)}, {"lengths": ()},
                                   {"lengths": (1.5, -0.5)}])  # fmt: skip
def test_wrong_probabilities_are_refused(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be"):
        WordSelection(**wrong)


@pytest.mark.parametrize("family", FAMILIES)
@given(text=texts, pair=st.none() | texts)
def test_every_token_knows_the_word_that_it_lies_in(family, text, pair):
    tokenizer = family()
    rows = WordTokenizer(tokenizer)([text], None if pair is None else [pair])
    encoded = tokenizer([text], None if pair is None else [pair], return_offsets_mapping=True)
    assert rows["input_ids"] == encoded["input_ids"]
    numbers, before, met = rows["word_ids"][0], 0, set()
    for which, segment in enumerate([text] if pair is None else [text, pair]):
        spans = Words(segment).spans
        shared = {}  # the word that each word is counted with
        for i, sequence in enumerate(encoded.sequence_ids(0)):
            begin, end = encoded["offset_mapping"][0][i]
            inside = [k for k, (b, e) in enumerate(spans) if b < end and begin < e]
            if sequence is None or (sequence == which and not inside):
                assert numbers[i] == -1
            elif sequence == which:
                lead = shared.get(inside[0], inside[0])
                shared |= dict.fromkeys(inside, lead)
                assert numbers[i] == before + lead
                met.add(numbers[i])
        before += len(spans)
    assert len(whole_words(numbers)) == len(met)  # the tokens of a word lie together


def test_apostrophes_hyphens_and_shared_tokens_part_no_word():
    tokenizer = encoder_tokenizer()
    (numbers,) = WordTokenizer(tokenizer)(["Don't, mother-in-law!"])["word_ids"]
    assert numbers == [-1, 0, 0, 0, -1, 1, 1, 1, 1, 1, -1, -1]
    ids = byte_level()("电影")["input_ids"]
    assert len(ids) == 1  # two ideographs, and one token
    assert WordTokenizer(byte_level())(["电影"])["word_ids"] == [[0]]
    segmented = WordTokenizer(tokenizer, spans=lambda text: [(0, 2), (2, 3)])(["电影好"])
    assert segmented["word_ids"] == [[-1, 0, 0, 1, -1]]


@given(st.integers(4, 20))
def test_a_word_that_is_cut_off_is_none(longest):
    rows = WordTokenizer(encoder_tokenizer(), longest)(
        ["electroencephalography " * 9], ["good " * 9]
    )
    whole = len(
        encoder_tokenizer()("electroencephalography", add_special_tokens=False)["input_ids"]
    )
    numbers = rows["word_ids"][0]
    assert len(numbers) == longest
    sizes = {numbers[w.start]: len(w) for w in whole_words(numbers)}
    assert all(size == (whole if number < 9 else 1) for number, size in sizes.items())


def test_rows_of_nothing_are_rows():
    tokenize = WordTokenizer(encoder_tokenizer())
    assert tokenize([""])["word_ids"] == [[-1, -1]]
    assert tokenize(["", "…"], ["", "good"])["word_ids"] == [[-1] * 3, [-1, -1, -1, 0, -1]]
    with pytest.raises(TypeError, match="a list of texts, got the text 'film'"):
        tokenize("film")
    with pytest.raises(TypeError, match="use the fast tokenizer"):
        WordTokenizer(object())


@given(st.lists(st.text(max_size=3), max_size=9), st.integers(0, 99))
def test_segments_are_paired_in_order_or_swapped_as_the_label_says(segments, seed):
    generator = torch.Generator().manual_seed(seed)
    rows = sentence_order(segments, label="next_sentence_label", generator=generator)
    pairs = zip(rows["text"], rows["pair"], rows["next_sentence_label"], strict=True)
    found = [(b, a) if swapped else (a, b) for a, b, swapped in pairs]
    assert list(chain(*found)) == segments[: len(segments) // 2 * 2]


def test_half_of_the_pairs_are_swapped():
    rows = sentence_order(["a", "b"] * 4000, generator=torch.Generator().manual_seed(0))
    assert abs(sum(rows["sentence_order_label"]) - 2000) < 4 * math.sqrt(1000)
    assert set(zip(rows["text"], rows["sentence_order_label"], strict=True)) == {("a", 0), ("b", 1)}
