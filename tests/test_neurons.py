"""Neurons that know tags: planted ones are found, controls stay at chance, words are read right."""

import copy
import itertools
import json
import math
import random
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression

from mixadv.neurons import Activations, NeuronAnalysis, activations, analyse_neurons
from mixadv.neurons.analyse import smallest
from mixadv.neurons.analysis import compare, counts, draw, table
from mixadv.neurons.probe import Probe, before, claims, rank
from tests.tokenizers_zoo import byte_level, word_pieces
from tests.zoo import player

LAYERS, HIDDEN, TAGS = 3, 20, 4
PLANTED = [1, 22, 23, 58]  # the neuron of each tag: one of layer 0, two of layer 1, one of layer 2
seeds = st.integers(0, 2**32 - 1)


def planted(words, seed):
    """Return activations whose tag is that of the highest planted neuron, nearly always."""
    draw = np.random.default_rng(seed)
    values = draw.normal(size=(words, LAYERS * HIDDEN)).astype(np.float32)
    noise = 0.2 * draw.normal(size=(words, TAGS))
    tags = (values[:, PLANTED] + noise).argmax(1)
    types = tuple(f"w{i}" for i in draw.integers(0, 50, words))
    return Activations(values, tags, ("A", "B", "C", "D"), types, LAYERS, HIDDEN)


@pytest.fixture(scope="module")
def train():
    return planted(600, 0)


@pytest.fixture(scope="module")
def held_out():
    return planted(800, 1)


@pytest.fixture(scope="module")
def found(train, held_out):
    return analyse_neurons(train, held_out, tolerance=0.02, draws=4)


# The analysis ----------------------------------------------------------------------------------


def test_planted_neurons_are_ranked_first_and_are_the_smallest_set(found):
    assert sorted(found.ranking[:4]) == PLANTED
    assert found.neurons == 4
    assert sorted(found.smallest_set) == PLANTED
    assert found.converged


def test_the_smallest_set_is_as_good_as_all_and_random_ones_are_not(found):
    assert found.accuracy["all"] > 0.8
    assert found.accuracy["top"] >= found.accuracy["all"] - 0.02
    assert max(found.random) < found.accuracy["all"] - 0.2
    assert found.accuracy["last"] < found.accuracy["majority"] + 0.05


def test_counts_by_layer_and_tag_are_those_planted(found):
    assert found.per_layer == [1, 2, 1]
    assert sum(found.per_layer) == found.neurons
    assert found.per_tag == dict.fromkeys("ABCD", 1)


def test_curves_end_at_all_neurons_and_pass_through_the_smallest_set(found):
    assert found.sizes == [1, 2, 4, 8, 16, 32, 60]
    assert found.top_curve[2] == found.accuracy["top"]
    ends = [found.top_curve[-1], *(curve[-1] for curve in found.random_curves)]
    assert ends == [found.accuracy["all"]] * 5


def test_shuffled_tags_stay_at_chance(train, held_out, found):
    # Whatever is predicted, shuffled tags match with the share of the predicted one, at most.
    shares = np.bincount(held_out.tags) / len(held_out)
    error = math.sqrt(0.25 / len(held_out))
    assert shares.min() - 3 * error < found.accuracy["shuffled"] < shares.max() + 3 * error


def test_a_control_task_can_only_be_memorised(train, found):
    # Activations do not tell the words here, so a control task is as hopeless as shuffled tags.
    shares = np.bincount(train.tags) / len(train)
    assert found.accuracy["control"] < shares.max() + 0.1
    assert found.selectivity == found.accuracy["all"] - found.accuracy["control"]
    values = np.eye(50, dtype=np.float32)[[int(word[1:]) for word in train.words]]
    telling = replace(train, values=values, layers=1, hidden=50)
    memorised = analyse_neurons(telling, telling, penalty=1e-4, draws=1)
    assert memorised.accuracy["control"] == 1
    assert memorised.selectivity < -0.4


def test_an_analysis_is_the_same_again_and_in_json(train, held_out, found):
    assert analyse_neurons(train, held_out, tolerance=0.02, draws=4) == found
    assert NeuronAnalysis(**json.loads(json.dumps(found.as_dict()))) == found


def test_the_penalty_is_chosen_without_the_held_out_words(train, found):
    other = analyse_neurons(train, planted(100, 7), draws=1)
    assert (other.penalty, other.ranking) == (found.penalty, found.ranking)


def test_scale_and_shift_of_neurons_do_not_matter(train, held_out, found):
    scale = np.float32(2) ** np.arange(-30, 30)
    moved = [replace(part, values=part.values * scale + scale) for part in (train, held_out)]
    assert rank_of(moved[0])[:4].tolist() == rank_of(train)[:4].tolist()
    again = analyse_neurons(*moved, tolerance=0.02, draws=4)
    assert (again.neurons, again.per_layer) == (found.neurons, found.per_layer)


def test_permuted_neurons_have_a_permuted_ranking(train):
    order = np.random.default_rng(0).permutation(LAYERS * HIDDEN)
    moved = replace(train, values=train.values[:, order])
    assert order[rank_of(moved)[:4]].tolist() == rank_of(train)[:4].tolist()


def test_a_neuron_and_its_copy_share_the_weight(train):
    values = train.values.copy()
    values[:, 0] = 100 * values[:, PLANTED[0]]
    weights = Probe.fit(values, train.tags, TAGS, penalty=0.02, tolerance=1e-9).weights
    np.testing.assert_allclose(weights[:, 0], weights[:, PLANTED[0]], atol=2e-3)
    assert np.abs(weights[:, 0]).max() > 0.1


def rank_of(part):
    return rank(Probe.fit(part.values, part.tags, TAGS, penalty=0.02, tolerance=1e-7).weights)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=30), st.integers(1, 9))
def test_the_smallest_size_is_enough_and_one_less_is_not_if_scores_rise(scores, enough):
    scores = [*sorted(scores), 9]
    sizes = [k for k in (1, 2, 4, 8, 16) if k < len(scores)]
    k = smallest(lambda k: scores[k - 1], sizes, len(scores), enough)
    assert scores[k - 1] >= enough
    assert k == 1 or scores[k - 2] < enough


# The ranking -----------------------------------------------------------------------------------


@given(seeds, st.integers(1, 5), st.integers(1, 12))
def test_neurons_are_those_that_cover_the_mass_as_its_share_rises(seed, classes, neurons):
    draw = np.random.default_rng(seed)
    weights = draw.normal(size=(classes, neurons)) * (draw.random((classes, neurons)) < 0.7)
    order = rank(weights).tolist()
    assert sorted(order) == list(range(neurons))
    entered = []
    for share in np.linspace(0, 1, 401)[1:-1]:  # by the definition, class by class
        covering = set()
        for row in np.abs(weights):
            mass = 0.0
            for d in np.argsort(-row, kind="stable"):
                if row[d] == 0 or mass >= share * row.sum() - 1e-12:
                    break
                covering.add(int(d))
                mass += row[d]
        entered.append(covering)
    for small, large in itertools.pairwise(entered):
        assert small <= large
    for covering in entered:
        assert set(order[: len(covering)]) == covering


@given(seeds, st.integers(1, 5), st.integers(1, 12))
def test_every_neuron_of_the_first_has_a_class_that_brought_it_in(seed, classes, neurons):
    weights = np.random.default_rng(seed).normal(size=(classes, neurons))
    order = rank(weights)
    for k in range(1, neurons + 1):
        owned = claims(weights, order[:k])
        assert owned.any(0).all()
        assert owned.sum() >= k


@given(seeds, st.integers(1, 5), st.integers(1, 12))
def test_the_ranking_does_not_change_with_the_scale_of_a_class(seed, classes, neurons):
    weights = np.random.default_rng(seed).normal(size=(classes, neurons))
    scaled = weights * 2.0 ** np.arange(-3, classes - 3)[:, None]
    np.testing.assert_array_equal(rank(weights), rank(scaled))
    np.testing.assert_array_equal(before(weights), before(-scaled))


def test_neurons_without_weight_come_last():
    weights = np.zeros((3, 5))
    weights[0, 3], weights[1, 1] = 1, -2
    assert rank(weights).tolist() == [1, 3, 0, 2, 4]
    assert not claims(weights, rank(weights))[:, 2:].any()


# The probe -------------------------------------------------------------------------------------


def test_the_probe_minimises_what_scikit_learn_does(train):
    penalty, ratio = 0.01, 0.3
    probe = Probe.fit(
        train.values, train.tags, TAGS, penalty=penalty, l1_ratio=ratio, tolerance=1e-10
    )
    x = probe.scaler.transform(train.values)
    c = 1 / (penalty * len(train))
    peer = LogisticRegression(
        solver="saga", C=c, l1_ratio=ratio, tol=1e-6, max_iter=5000, random_state=0
    )
    peer.fit(x, train.tags)
    np.testing.assert_allclose(probe.weights, peer.coef_, atol=2e-3)
    assert ((probe.weights == 0) == (np.abs(peer.coef_) < 1e-3)).mean() > 0.97
    assert (probe.predict(train.values) == peer.predict(x)).mean() > 0.995


def test_a_probe_that_ran_out_of_steps_says_so(train):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        probe = Probe.fit(train.values, train.tags, TAGS, max_steps=2)
    assert not probe.converged


def test_a_constant_neuron_has_no_weight(train):
    values = train.values.copy()
    values[:, 5] = 3.0
    probe = Probe.fit(values, train.tags, TAGS)
    assert np.isfinite(probe.weights).all()
    assert not probe.weights[:, 5].any()


# Reading words ---------------------------------------------------------------------------------

WORDS = ["good", "film", "filming", "un", "fil", "a", "bad", "ming"]
SENTENCES = [["a", "good", "filming"], ["bad"], ["film", "a", "un", "filming", "good", "bad"]]
NUMBERED = [[f"T{i % 3}" for i, _ in enumerate(words)] for words in SENTENCES]


@pytest.fixture(scope="module")
def tokenizer():
    return word_pieces("good", "film", "##ing", "un", "a", "bad")


@pytest.fixture(scope="module")
def bert():
    size = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.BertConfig(**size, vocab_size=11, intermediate_size=8, num_labels=3)
    return transformers.BertForSequenceClassification(config).train()


def by_hand(model, tokenizer, words):
    """Return the mean state of each word's tokens, a sentence at a time."""
    encoding = tokenizer([words], is_split_into_words=True, return_tensors="pt")
    model.eval()
    with torch.no_grad():
        states = model.bert(**encoding, output_hidden_states=True).hidden_states
    states = torch.cat(states, -1)[0]
    owners = encoding.word_ids(0)
    rows = [[t for t, at in enumerate(owners) if at == i] for i in range(len(words))]
    return torch.stack([states[own].mean(0) for own in rows]).numpy()


def test_words_have_the_states_of_their_sentence_alone_though_it_is_padded_on_the_left(tokenizer):
    """GPT-2 counts positions from the start of the row, padding and all."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=len(tokenizer), n_embd=8, n_layer=1, n_head=2)
    model, left = transformers.GPT2Model(config), copy.deepcopy(tokenizer)
    left.padding_side = "left"
    one, together = (activations(model, left, SENTENCES, NUMBERED, batch_size=n) for n in (1, 32))
    assert one.values == pytest.approx(together.values, abs=1e-5)


@pytest.mark.parametrize("batch_size", [1, 2, 32])
def test_words_have_the_mean_of_their_tokens_whatever_the_batch(bert, tokenizer, batch_size):
    read = activations(bert, tokenizer, SENTENCES, NUMBERED, batch_size=batch_size)
    expected = np.concatenate([by_hand(bert, tokenizer, words) for words in SENTENCES])
    np.testing.assert_allclose(read.values, expected, atol=1e-5)
    assert read.words == tuple(itertools.chain(*SENTENCES))
    assert [read.names[i] for i in read.tags] == list(itertools.chain(*NUMBERED))
    assert (read.layers, read.hidden, read.values.dtype) == (3, 8, np.float32)


def test_a_model_without_a_head_is_read_alike(bert, tokenizer):
    with_head = activations(bert, tokenizer, SENTENCES, NUMBERED)
    without = activations(bert.bert, tokenizer, SENTENCES, NUMBERED)
    np.testing.assert_array_equal(with_head.values, without.values)


def test_reading_leaves_the_model_as_it_was(bert, tokenizer):
    bert.train()
    bert.bert.encoder.eval()
    modes = [part.training for part in bert.modules()]
    weights = {name: tensor.clone() for name, tensor in bert.state_dict().items()}
    state = torch.get_rng_state()
    activations(bert, tokenizer, SENTENCES, NUMBERED)
    assert [part.training for part in bert.modules()] == modes
    assert all(torch.equal(weights[name], tensor) for name, tensor in bert.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in bert.parameters())


@pytest.mark.parametrize("side", ["right", "left"])
def test_words_that_are_cut_are_left_out_with_their_tags(bert, side):
    tokenizer = word_pieces("good", "film", "##ing", "un", "a", "bad")
    tokenizer.truncation_side = side
    sentences, tags = [["a", "filming", "good"], ["filming", "bad"]], [["1", "2", "3"], ["4", "5"]]
    read = activations(bert, tokenizer, sentences, tags, max_length=3)
    partly = activations(bert, tokenizer, sentences[:1], tags[:1], max_length=2)
    kept = {  # of "a film|ing good" and "film|ing bad", three tokens are read
        "right": (("a", "filming", "filming", "bad"), ["1", "2", "4", "5"]),
        "left": (("filming", "good", "filming", "bad"), ["2", "3", "4", "5"]),
    }[side]
    assert (read.words, [read.names[i] for i in read.tags]) == kept
    assert partly.words == (("a",) if side == "right" else ("good",))  # of filming a part is read


def test_sentences_are_taken_whole_and_drawn_by_the_seed(bert, tokenizer):
    sentences = [[word] * 3 for word in WORDS]
    tags = [["A", "B", "C"] for _ in sentences]
    read = [
        activations(bert, tokenizer, sentences, tags, max_tokens=8, seed=seed).words
        for seed in (None, 0, 0, 1, 2)
    ]
    assert read[0] == tuple(["good"] * 3 + ["film"] * 3)
    assert all(len(words) == 6 for words in read)
    assert read[1] == read[2]
    assert len(set(read)) > 2


def test_words_without_tokens_are_left_out(bert, tokenizer):
    read = activations(bert, tokenizer, [["a", "\u200b", "", "bad"]], [["1", "2", "3", "4"]])
    assert (read.words, read.names) == (("a", "bad"), ("1", "4"))


@pytest.mark.parametrize("family", ["roberta", "gpt2", "bart"])
def test_models_of_other_families_are_read(family):
    tokenizer, model = byte_level(), player(family).model
    model.resize_token_embeddings(len(tokenizer))
    sentences = [["The", "film", "was", "good", ","], ["don't", "think", "?"]]
    read = activations(model, tokenizer, sentences, [["A"] * 5, ["B"] * 3])
    alone = activations(model, tokenizer, sentences[1:], [["B"] * 3])
    np.testing.assert_allclose(read.values[5:], alone.values, atol=1e-5)
    assert len(read) == 8


# What is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sentences", "tags", "message"),
    [
        ([], [], "no sentences"),
        ([["a"]], [], "1 sentences need as many lists of tags, not 0"),
        ([["a"], ["a", "bad"]], [["X"], ["X"]], "Sentence 1 has 2 words and 1 tags.*'a bad'"),
        ([["a"] * 9], [["X"] * 9], "max_tokens is 5, and the first sentence has 9 words"),
        ([["\u200b"]], [["X"]], "no token in any word"),
    ],
)
def test_sentences_that_cannot_be_read_are_refused(bert, tokenizer, sentences, tags, message):
    with pytest.raises(ValueError, match=message):
        activations(bert, tokenizer, sentences, tags, max_tokens=5)


def test_text_that_is_not_split_is_refused(bert, tokenizer):
    with pytest.raises(TypeError, match="lists of strings, got 'a bad'"):
        activations(bert, tokenizer, ["a bad"], ["DT JJ"])


def test_a_slow_tokenizer_is_refused(bert):
    class Slow:
        is_fast = False

    with pytest.raises(TypeError, match=r"Slow does not tell .* use the fast tokenizer"):
        activations(bert, Slow(), SENTENCES, NUMBERED)


def test_a_model_without_hidden_states_is_refused(tokenizer):
    class Bare(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = torch.nn.Embedding(11, 4)

        def forward(self, input_ids, **_):
            return self.embedding(input_ids)

    with pytest.raises(TypeError, match="Bare does not return hidden states"):
        activations(Bare(), tokenizer, SENTENCES, NUMBERED)


def test_values_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"2 words and 3 × 4 neurons need values \(2, 12\)"):
        Activations(np.zeros((2, 11)), np.zeros(2, int), ("A",), ("a", "b"), 3, 4)


def test_activations_of_a_model_that_diverged_are_refused():
    values = np.zeros((2, 12), np.float32)
    values[1, 3] = math.nan
    with pytest.raises(ValueError, match="1 activations are not finite: the model has diverged"):
        Activations(values, np.zeros(2, int), ("A",), ("a", "b"), 3, 4)


def test_a_table_says_where_a_probe_did_not_converge(found):
    assert "not converged" not in found.table()
    assert "of 60, not converged |" in replace(found, converged=False).table()


@pytest.mark.parametrize(
    ("change", "settings", "said"),
    [
        *((None, {"tolerance": x}, "tolerance is a share") for x in (-0.1, 1.0, math.nan)),
        (None, {"draws": 0}, "draws must be at least 1, got 0"),
        (None, {"penalty": -1.0}, "penalty must be at least 0"),
        (
            lambda t, h: (t, replace(h, names=("A", "B", "C", "Z"))),
            {},
            "tags that training lacks: Z",
        ),
        (lambda t, h: (t.with_tags(["B"]), h), {}, "All training words have the tag 'B'"),
        (lambda t, h: (t, h.with_tags(["other"])), {}, "held_out has no words"),
        (
            lambda t, h: (t, replace(h, values=h.values[:, :HIDDEN], layers=1)),
            {},
            "3 × 20 neurons and held_out 1 × 20",
        ),
    ],
)
def test_what_cannot_be_analysed_is_refused(train, held_out, change, settings, said):
    parts = change(train, held_out) if change else (train, held_out)
    with pytest.raises(ValueError, match=said):
        analyse_neurons(*parts, **settings)


def test_tags_are_matched_by_name(train, held_out, found):
    order = random.Random(0).sample(held_out.names, TAGS)
    assert analyse_neurons(train, held_out.with_tags(order), tolerance=0.02, draws=4) == found


# Tables and pictures ---------------------------------------------------------------------------


def test_tables_have_a_row_for_each_model_layer_and_tag(found):
    lines = table({"plain": found, "freelb": found}).splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| plain", "| freelb"]
    assert "| 4 of 60 |" in lines[2]
    rows = counts({"plain": found, "freelb": found}).splitlines()
    assert rows[0] == "| neurons | plain | freelb |"
    assert rows[3] == "| layer 1 | 2 | 2 |"
    assert rows[-1] == "| D | 1 | 1 |"
    assert found.table().splitlines()[2].startswith("| model | 4 of 60 | ")
    assert table({"a|b": found}).splitlines()[2].startswith("| a\\|b | 4 of 60 | ")


def test_pictures_are_written(found, tmp_path):
    draw(found, tmp_path / "one.png")
    compare({"plain": found, "freelb": found}, "layer", tmp_path / "layers.png")
    compare({"plain": found, "freelb": found}, "tag", tmp_path / "tags.png")
    for name in ("one", "layers", "tags"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
