"""Correction of replaced words: what is replaced, by what, how often, and what the labels are."""

import math
import pickle
from collections import Counter
from functools import cache

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from mixadv.tokens import (
    CorrectionCollator,
    Neighbours,
    WordSelection,
    WordTokenizer,
    sentence_order,
)
from mixadv.tokens.pretraining.selection import whole_words
from mixadv.tokens.reading.words import cased_like
from tests.tokenizers_zoo import FAMILIES, encoder_tokenizer, texts, unigram, word_pieces
from tests.zoo import tiny_bert

TABLE = Neighbours(
    {
        "film": ["movie", "picture", "☃"],
        "movie": ["film", "кино"],
        "story": ["tale", "история"],
        "good": ["bad", "很好"],
        "фильм": ["кино", "film"],
        "это": ["тот"],
        "फिल्म": ["चलचित्र", "कहानी"],
        "قصة": ["فيلم"],
        "电": ["影"],
        "don't": ["won't", "can't"],
        "mother-in-law": ["father-in-law"],
    }
)
EVERY = WordSelection(1.0)


@cache
def collator_of(family, **keywords):
    return CorrectionCollator(family(), TABLE, **keywords)


def features_of(tokenizer, *texts):
    columns = WordTokenizer(tokenizer)(list(texts))
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def generator_of(seed):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("family", FAMILIES)
@given(rows=st.lists(texts, min_size=1, max_size=3), seed=st.integers(0, 99))
def test_labels_are_the_original_tokens_of_whole_words_and_the_rest_stays(family, rows, seed):
    tokenizer = family()
    features = features_of(tokenizer, *rows)
    torch.manual_seed(seed)
    batch = collator_of(family)(features)
    width = max(len(f["input_ids"]) for f in features)
    assert batch["input_ids"].shape == batch["labels"].shape == (len(rows), width)
    special = set(tokenizer.all_special_ids)
    for feature, new, labels in zip(features, batch["input_ids"], batch["labels"], strict=True):
        ids, length = torch.tensor(feature["input_ids"]), len(feature["input_ids"])
        assert (labels[length:] == -100).all()
        assert (new[length:] == tokenizer.pad_token_id).all()
        new, labels = new[:length], labels[:length]
        chosen = labels != -100
        assert (labels[chosen] == ids[chosen]).all()
        assert (new[~chosen] == ids[~chosen]).all()
        assert special.isdisjoint(labels[chosen].tolist() + new[chosen].tolist())
        words = whole_words(feature["word_ids"])
        assert all(len(set(chosen[list(word)].tolist())) == 1 for word in words)
        assert not chosen[[number < 0 for number in feature["word_ids"]]].any()
        writable = [w for w in words if special.isdisjoint(ids[list(w)].tolist())]
        assert chosen.any() == bool(writable)


@pytest.mark.parametrize("family", FAMILIES)
@given(text=texts, seed=st.integers(0, 99))
def test_similar_words_are_those_of_the_table_that_have_as_many_tokens(family, text, seed):
    tokenizer, (feature,) = family(), features_of(family(), text)
    collator = collator_of(family, selection=EVERY, shares=(1.0, 0.0, 0.0))
    ids = feature["input_ids"]
    new, _ = collator.corrupt(ids, feature["word_ids"], generator_of(seed))
    assert len(new) == len(ids)
    for word in whole_words(feature["word_ids"]):
        old = tuple(ids[word.start : word.stop])
        put = tuple(new[word.start : word.stop])
        similar = collator.similar(old)
        read = "".join(tokenizer.decode(old).split())
        near = [cased_like(n, read) for n in TABLE.of(read)]
        written = {"".join(tokenizer.decode(s).split()) for s in similar}
        assert written <= set(near)
        assert all(len(s) == len(old) and s != old for s in similar)
        assert put in similar if similar else len(put) == len(old)


def test_similar_words_are_written_as_the_word_was():
    tokenizer = word_pieces(
        "film", "Film", "movie", "Movie", "tree", "##s", "MOVIE", lowercase=False
    )
    collator = CorrectionCollator(tokenizer, Neighbours({"film": ["movie", "trees", "кино"]}))
    name = tokenizer.convert_tokens_to_ids
    assert collator.similar((name("film"),)) == [(name("movie"),)]
    assert collator.similar((name("Film"),)) == [(name("Movie"),)]
    assert collator.similar((name("film"), name("##s"))) == []
    spaced = collator_of(FAMILIES[1])
    for before in ("", " "):
        ids = tuple(spaced.tokenizer(before + "film")["input_ids"])
        found = {spaced.tokenizer.decode(s) for s in spaced.similar(ids)}
        assert found <= {before + n for n in TABLE["film"]}
    assert spaced.similar(tuple(spaced.tokenizer(" film")["input_ids"])) != []
    ideographs = collator_of(unigram)  # not at the start of a text, where "▁" comes first
    ids = tuple(ideographs.tokenizer.convert_tokens_to_ids(["电", "影"]))
    assert ideographs.similar(ids[:1]) == [ids[1:]]


def plain(words):
    """A tokenizer of so many words of one token, and a table of two neighbours each."""
    names = [f"w{chr(97 + i)}" for i in range(words)]
    table = {w: [names[i - 1], names[i - 2]] for i, w in enumerate(names)}
    return word_pieces(*names), Neighbours(table)


@pytest.mark.parametrize("known", [True, False], ids=["similar", "no similar word"])
def test_chosen_words_become_similar_random_or_stay_as_the_shares_say(known):
    tokenizer, table = plain(10)
    table = table if known else Neighbours({"unheard": ["wa"]})
    collator = CorrectionCollator(tokenizer, table, selection=EVERY)
    first = tokenizer.convert_tokens_to_ids("wa")
    generator, row = generator_of(0), list(range(first, first + 10)) * 10
    ids, new = row * 100, []
    for _ in range(100):
        replaced, labels = collator.corrupt(row, range(len(row)), generator)
        assert labels == row
        new += replaced
    back = Counter((a - b) % 10 for a, b in zip(ids, new, strict=True))
    laws = {0: 0.1 + 0.1 / 10, 1: 0.4 + 0.1 / 10, 2: 0.4 + 0.1 / 10, 5: 0.1 / 10}
    if not known:
        laws = {0: 0.1 + 0.9 / 10, 1: 0.9 / 10, 2: 0.9 / 10, 5: 0.9 / 10}
    for shift, law in laws.items():
        error = math.sqrt(law * (1 - law) / len(ids))
        assert abs(back[shift] / len(ids) - law) < 4 * error


def test_random_words_are_ordinary_and_continue_words_where_the_old_tokens_did():
    pieces = ["film", "tree", "42", "##s", "##ing", "##.", ".", "[unused1]", "été"]
    tokenizer = word_pieces(*pieces)
    collator = CorrectionCollator(
        tokenizer, Neighbours({"unheard": ["film"]}), EVERY, shares=(0.0, 1.0, 0.0)
    )
    ids = tokenizer("films trees. film", add_special_tokens=False)["input_ids"]
    numbers = [0, 0, 1, 1, -1, 2]
    found = [set() for _ in ids]
    for seed in range(200):
        new, _ = collator.corrupt(ids, numbers, generator_of(seed))
        for seen, token in zip(found, tokenizer.convert_ids_to_tokens(new), strict=True):
            seen.add(token)
    begin, go_on = {"film", "tree", "42", "été"}, {"##s", "##ing"}
    assert found == [begin, go_on, begin, go_on, {"."}, begin]


def test_no_mask_token_comes_in_and_special_tokens_in_a_text_stay():
    tokenizer = encoder_tokenizer()
    (feature,) = features_of(tokenizer, "film [MASK] movie 🂡 story [SEP] film " * 20)
    collator = collator_of(encoder_tokenizer, selection=EVERY)
    new, labels = collator.corrupt(feature["input_ids"], feature["word_ids"], generator_of(0))
    for token in tokenizer.all_special_ids:
        at = [i for i, old in enumerate(feature["input_ids"]) if old == token]
        assert at == [i for i, put in enumerate(new) if put == token]
        assert all(labels[i] == -100 for i in at)
    assert unigram().mask_token is None  # and the same properties hold for it


def test_rows_on_the_left_and_other_columns_are_passed_on():
    tokenizer = encoder_tokenizer()
    features = features_of(tokenizer, "film", "a good film, a good story")
    for i, feature in enumerate(features):
        feature |= {"next_sentence_label": i, "special_tokens_mask": [0]}
    left = pickle.loads(pickle.dumps(tokenizer))
    left.padding_side = "left"
    for padded, collator in [(slice(3, None), CorrectionCollator(tokenizer, TABLE, EVERY)),
                             (slice(0, -3), CorrectionCollator(left, TABLE, EVERY))]:  # fmt: skip
        collator.pad_to_multiple_of = 8
        batch = collator(features)
        assert batch.keys() == {"input_ids", "token_type_ids", "attention_mask",
                                "next_sentence_label", "labels"}  # fmt: skip
        assert batch["next_sentence_label"].tolist() == [0, 1]
        assert batch["labels"].shape == batch["attention_mask"].shape == (2, 16)
        assert (batch["attention_mask"][0] == 0).sum() == 13
        assert (batch["attention_mask"][0, padded] == 0).all()
        film = tokenizer.convert_tokens_to_ids("film")
        assert batch["labels"][0][batch["labels"][0] != -100].tolist() == [film]
        assert batch["attention_mask"][batch["labels"] != -100].all()


def test_a_batch_is_drawn_from_the_default_generator_or_from_the_seed():
    features = features_of(encoder_tokenizer(), "a good film and a good story " * 40)
    collator = collator_of(encoder_tokenizer)
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        drawn.append([collator(features)["input_ids"].tolist() for _ in range(2)])
    assert drawn[0] == drawn[1] != drawn[2]
    assert drawn[0][0] != drawn[0][1]
    fixed = CorrectionCollator(encoder_tokenizer(), TABLE, seed=3)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    assert fixed(features)["input_ids"].equal(fixed(features)["input_ids"])
    assert torch.get_rng_state().equal(state)


def test_workers_draw_differently_and_again_the_same():
    features = features_of(encoder_tokenizer(), "a good film and a good story " * 40) * 4
    loader = DataLoader(
        features, batch_size=2, num_workers=2, collate_fn=collator_of(encoder_tokenizer)
    )
    epochs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        epochs.append([batch["labels"].tolist() for batch in loader])
    assert epochs[0] == epochs[1] != epochs[2]
    assert epochs[0][0] != epochs[0][1]


def test_a_collator_can_be_sent_to_a_process():
    features = features_of(encoder_tokenizer(), "a good film and a good story")
    sent = pickle.loads(pickle.dumps(CorrectionCollator(encoder_tokenizer(), TABLE, seed=0)))
    assert sent(features)["labels"].equal(
        CorrectionCollator(encoder_tokenizer(), TABLE, seed=0)(features)["labels"]
    )


def test_what_cannot_be_collated_is_said_with_what_to_change():
    tokenizer = encoder_tokenizer()
    collator = collator_of(encoder_tokenizer)
    with pytest.raises(ValueError, match=r"has input_ids.*WordTokenizer.*remove_unused_columns"):
        collator([tokenizer("film")])
    with pytest.raises(ValueError, match="3 input_ids and 2 word_ids"):
        collator([{"input_ids": [1, 2, 3], "word_ids": [0, 1]}])
    bare = pickle.loads(pickle.dumps(tokenizer))
    bare.pad_token = None
    with pytest.raises(ValueError, match=r"no padding token.*set tokenizer\.pad_token"):
        CorrectionCollator(bare, TABLE)
    with pytest.raises(ValueError, match="can write none of the table's 1 neighbours"):
        CorrectionCollator(word_pieces("film"), Neighbours({"film": ["кино"]}))
    with pytest.raises(ValueError, match="shares must be probabilities"):
        CorrectionCollator(tokenizer, TABLE, shares=(0.8, 0.1, 0.2))
    with pytest.raises(ValueError, match="three probabilities"):
        CorrectionCollator(tokenizer, TABLE, shares=(0.8, 0.2))
    with pytest.raises(ValueError, match="None of the tokenizer's 6 tokens is made of letters"):
        CorrectionCollator(word_pieces("."), Neighbours({"film": ["."]}))


def test_tensors_and_nones_are_rows_too():
    (feature,) = features_of(encoder_tokenizer(), "a good film and a good story")
    collator = CorrectionCollator(encoder_tokenizer(), TABLE, seed=0)
    as_tensors = {name: torch.tensor(column) for name, column in feature.items()}
    numbers = [None if number < 0 else number for number in feature["word_ids"]]
    expected = collator([feature])["labels"]
    assert collator([as_tensors])["labels"].equal(expected)
    assert collator([{**feature, "word_ids": numbers}])["labels"].equal(expected)


def untrained(tokenizer):
    torch.manual_seed(0)
    config = tiny_bert(len(tokenizer), intermediate_size=16)
    return transformers.BertForPreTraining(config)


def test_correction_and_sentence_order_train_under_trainer_and_resume_after_an_epoch(tmp_path):
    tokenizer, table = plain(10)
    label = "next_sentence_label"
    rows = sentence_order(["wa wb wc wd", "we wf wg"] * 16, label=label, generator=generator_of(0))
    columns = WordTokenizer(tokenizer)(rows["text"], rows["pair"]) | {label: rows[label]}
    data = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    arguments = transformers.TrainingArguments(
        str(tmp_path),
        max_steps=4,
        save_steps=2,  # after an epoch: within one, a batch has been drawn ahead
        per_device_train_batch_size=8,
        learning_rate=0.01,
        remove_unused_columns=False,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
    )

    def trained(checkpoint=None):
        model, collator = untrained(tokenizer), CorrectionCollator(tokenizer, table)
        trainer = transformers.Trainer(model, arguments, collator, data)
        trainer.train(resume_from_checkpoint=checkpoint)
        return model

    whole, resumed = trained(), trained(str(tmp_path / "checkpoint-2"))
    for expected, weight in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert expected.isfinite().all()
        assert expected.equal(weight)
    heads, start = whole.cls, untrained(tokenizer).cls
    assert not heads.predictions.bias.equal(start.predictions.bias)
    assert not heads.seq_relationship.weight.equal(start.seq_relationship.weight)
