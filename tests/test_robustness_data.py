"""Rows are read from what people have, and what a model cannot be measured on is said at once."""

import gzip
import json
import math
from types import SimpleNamespace

import datasets
import pytest
import torch
import torch.nn.functional as F
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import tests.tokenizers_zoo as zoo
from mixadv.robustness import DataError, Rows, predict, read_rows, text_batches
from tests.zoo import tiny_bert

NAMES = ["entailment", "neutral", "contradiction"]
ROWS = [
    {"premise": "A man sleeps.", "hypothesis": "He rests.", "label": 0},
    {"premise": "It rains.", "hypothesis": "It is dry.", "label": 2},
    {"premise": "She sings.", "hypothesis": "She sings well.", "label": -1},
    {"premise": "Dogs bark.", "hypothesis": "They are old.", "label": 1},
]
WANTED = Rows(
    texts=[(row["premise"], row["hypothesis"]) for row in ROWS if row["label"] >= 0],
    labels=[0, 2, 1],
    name="set",
)


def classifier(names=NAMES, **config):
    model = nn.Linear(1, 1)
    label2id = {name: i for i, name in enumerate(names)}
    model.config = SimpleNamespace(num_labels=len(names), label2id=label2id)
    vars(model.config).update(config)
    return model


def lines(path, rows, opened=open):
    with opened(path, "wt", encoding="utf-8") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))
    return path


def as_file(rows, folder):
    return str(lines(folder / "set.jsonl", rows))


def as_packed_file(rows, folder):
    return lines(folder / "set.jsonl.gz", rows, gzip.open)


def as_dataset(rows, folder):
    return datasets.Dataset.from_list(rows)


def as_rows(rows, folder):
    return list(rows)


def as_columns(rows, folder):
    return {column: [row[column] for row in rows] for column in rows[0]}


SOURCES = [as_file, as_packed_file, as_dataset, as_rows, as_columns]


@pytest.mark.parametrize("source", SOURCES)
def test_rows_are_the_same_whatever_they_are_read_from(source, tmp_path):
    assert read_rows(source(ROWS, tmp_path), classifier(), name="set") == WANTED


@pytest.mark.parametrize("source", SOURCES)
def test_labels_are_numbers_or_names_of_the_models(source, tmp_path):
    named = [{**row, "label": NAMES[row["label"]].title()} for row in ROWS if row["label"] >= 0]
    assert read_rows(source(named, tmp_path), classifier(), name="set") == WANTED


def test_rows_without_a_gold_label_are_left_out_among_names_too():
    rows = [{"text": "a", "label": "neutral"}, {"text": "b", "label": -1}]
    assert read_rows(rows, classifier()).texts == ["a"]


def test_numbers_of_a_data_set_with_names_in_another_order_are_read_as_its_names():
    """Public models of MNLI number its labels differently; nothing else would show it."""
    order = ["contradiction", "entailment", "neutral"]
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=order)}
    )
    made = datasets.Dataset.from_dict({"text": list("abcd"), "label": [0, 1, 2, -1]}, features)
    for how in (None, "torch", "numpy"):
        assert read_rows(made.with_format(how), classifier()).labels == [2, 0, 1]
    assert read_rows(made, classifier(["LABEL_0", "LABEL_1", "LABEL_2"])).labels == [0, 1, 2]


@pytest.mark.parametrize(
    ("columns", "found"),
    [
        (["sentence"], "sentence"),
        (["question", "sentence"], ("question", "sentence")),
        (["sentence1", "sentence2", "idx"], ("sentence1", "sentence2")),
        (["question1", "question2"], ("question1", "question2")),
        (["text", "pair"], ("text", "pair")),
        (["premise", "text"], "text"),
    ],
)
def test_the_usual_columns_are_found(columns, found):
    rows = [{column: f"a {column}" for column in columns} | {"label": 1}]
    wanted = f"a {found}" if isinstance(found, str) else tuple(f"a {c}" for c in found)
    assert read_rows(rows, classifier()).texts == [wanted]


def test_columns_can_be_named():
    rows = [{"text": "x", "body": "b", "title": "t", "gold": 2, "label": 0}]
    assert read_rows(rows, classifier(), text="body", label="gold") == Rows(["b"], [2], "rows")
    assert read_rows(rows, classifier(), text=("title", "body")).texts == [("t", "b")]


@pytest.mark.parametrize("first", [0, 1])
def test_an_unlabelled_row_says_nothing_of_how_the_others_are_labelled(first):
    unlabelled = {"text": "a", "label": -1}
    for label, number in (("neutral", 1), (2, 2)):
        rows = [{"text": "b", "label": label}]
        rows.insert(first, unlabelled)
        assert read_rows(rows, classifier()) == Rows(["b"], [number], "rows")


def row(**changes):
    return [{"text": "fine", "label": 0}, {"text": "bad", "label": 1} | changes]


MODELS = {
    "one": (classifier(["score"]), "predicts a number"),
    "regression": (classifier(problem_type="regression"), "predicts a number"),
    "multi": (classifier(problem_type="multi_label_classification"), "several labels"),
    "no config": (nn.Linear(1, 1), "Linear has no config.num_labels"),
}


@pytest.mark.parametrize(("model", "said"), MODELS.values(), ids=MODELS)
def test_models_that_do_not_choose_one_class_are_refused(model, said):
    with pytest.raises(DataError, match=said):
        read_rows(row(), model)


REFUSED = {
    "empty": ([], {}, "set holds no rows"),
    "no such column": (row(), {"label": "gold"}, "no column 'gold', it has text, label"),
    "no such text": (row(), {"text": "body"}, "no column 'body', it has text, label"),
    "no usual text": ([{"body": "x", "label": 0}], {}, "it has body, label: name one"),
    "not a string": (row(text=None), {}, "set, row 2: text is None, not a string"),
    "a name": (row(label="happy"), {}, "set, row 2: label is 'happy', and in row 1 it is 0"),
    "a list": (row(label=[0, 1]), {}, r"set, row 2: label is \[0, 1\], which the model"),
    "a share": (row(label=0.5), {}, "set, row 2: label is 0.5, which"),
    "a truth": (row(label=True), {}, "set, row 2: label is True, which"),
    "too large": (row(label=3), {}, "label is 3, .* 0 entailment, 1 neutral, 2 contradiction"),
    "below": (row(label=-2), {}, "label is -2"),
    "unknown name": (
        [{"text": "x", "label": "happy"}],
        {},
        "set, row 1: label is 'happy', .* 0 entailment, 1 neutral, 2 contradiction",
    ),
    "no gold": ([{"text": "x", "label": -1}], {}, "no gold labels: 'label' is -1 in all"),
    "lacking": ([*row(), {"text": "x"}], {}, "set, row 3 has no 'label', it has text"),
    "no dict": ([*row(), "x"], {}, "set, row 3 is 'x', not a dict"),
    "ragged": ({"text": ["a", "b"], "label": [0]}, {}, "different lengths.*'text': 2"),
    "splits": (datasets.DatasetDict({"dev": as_dataset(ROWS, None)}), {}, "splits dev: give one"),
    "a number": (7, {}, "not from int"),
    "no file": ("/no/such/file.jsonl", {}, "There is no file /no/such/file.jsonl"),
    "three texts": (row(), {"text": ("a", "b", "c")}, "one column or two"),
}


@pytest.mark.parametrize(("source", "words", "said"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_measured_on_is_said_in_one_line(source, words, said):
    with pytest.raises(DataError, match=said) as caught:
        read_rows(source, classifier(), name="set", **words)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"text": "a", "label": 0}\n{"text": \n', "bad.jsonl, line 2 is not JSON"),
        (b'{"text": "\xff", "label": 0}\n', "bad.jsonl cannot be read"),
        (b"[1, 2]\n", "bad.jsonl, row 1 is .1, 2., not a dict"),
        (b"\n", "bad.jsonl holds no rows"),
    ],
)
def test_files_that_are_not_json_lines_are_named(content, said, tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=said):
        read_rows(path, classifier())


def test_a_file_that_is_not_packed_but_named_so_is_refused(tmp_path):
    lines(tmp_path / "rows.jsonl.gz", row())
    with pytest.raises(DataError, match=r"rows\.jsonl\.gz cannot be read"):
        read_rows(tmp_path / "rows.jsonl.gz", classifier())


def test_labels_without_names_go_by_the_names_that_transformers_gives():
    model = classifier(label2id=None)
    assert read_rows(row(label="LABEL_2")[1:], model).labels == [2]


# Batches ---------------------------------------------------------------------------------------

words = ["a", "fine", "film", "and", "bad", "long", "story", "he", "rests", "she", "sings"]


def reader(length=40):
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "max_position_embeddings": length}
    config = tiny_bert(16, **sizes, num_labels=3, initializer_range=1.0)
    return transformers.BertForSequenceClassification(config).double()


sentences = st.lists(st.sampled_from(words), min_size=1, max_size=9).map(" ".join)
sets = st.lists(st.tuples(sentences, st.integers(0, 2)), min_size=1, max_size=9)


@settings(max_examples=12)
@given(sets, st.integers(1, 5))
def test_each_row_is_predicted_once_as_it_is_alone(rows, size):
    """Whatever rows it is padded with, and in the order of the data set."""
    model, tokenizer = reader(), zoo.word_pieces(*words)
    made = Rows([text for text, _ in rows], [label for _, label in rows])
    batches = text_batches(model, tokenizer, made, batch_size=size)
    assert sorted(place for batch in batches for place in batch.rows) == list(range(len(rows)))
    assert all(len(batch.rows) == size for batch in batches[:-1])
    found = predict(model, batches)
    model.eval()
    for i, (text, label) in enumerate(rows):
        logits = model(**tokenizer(text, return_tensors="pt")).logits.detach()
        loss = F.cross_entropy(logits, torch.tensor([label]))
        assert found.labels[i] == label
        assert found.losses[i] == pytest.approx(float(loss))
        assert torch.from_numpy(found.probabilities[i]).allclose(logits.softmax(-1))


def test_the_longest_texts_come_first_and_rows_of_a_length_together():
    texts = ["a", "a fine film", "a fine", "a fine film and story", "bad"]
    rows = Rows(texts, [0] * 5)
    batches = text_batches(reader(), zoo.word_pieces(*words), rows, batch_size=2)
    assert [batch.rows for batch in batches] == [[3, 1], [2, 4], [0]]


@pytest.mark.parametrize(
    ("family", "most"), [("bert", 14), ("roberta", 13), ("xlm-roberta", 13), ("mpnet", 12)]
)
def test_texts_are_cut_to_what_a_model_reads_where_positions_count_from_the_padding(family, most):
    """RoBERTa's 514 positions read 512 tokens, which not every tokenizer says."""
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 8, "vocab_size": 16, "max_position_embeddings": 14}
    config = transformers.AutoConfig.for_model(family, **sizes, pad_token_id=0)
    model = transformers.AutoModelForSequenceClassification.from_config(config)
    rows = Rows([" ".join(words * 3)], [0])
    predict(model, text_batches(model, zoo.word_pieces(*words), rows))
    ids = torch.full((1, most + 1), 5)
    model(ids[:, :most])
    with pytest.raises((IndexError, RuntimeError)):
        model(ids)


def test_texts_are_not_cut_for_a_model_that_reads_any_length():
    """XLNet's max_position_embeddings are -1."""
    config = transformers.XLNetConfig(vocab_size=16, d_model=8, n_layer=1, n_head=2, d_inner=8)
    model = transformers.XLNetForSequenceClassification(config)
    assert config.max_position_embeddings == -1
    text = " ".join(words * 3)
    [batch] = text_batches(model, zoo.word_pieces(*words), Rows([text], [0]))
    ids = zoo.word_pieces(*words)(text, return_tensors="pt").input_ids
    model.eval()
    assert torch.allclose(batch.closure()[1], model(ids).logits)


SMALL = {"vocab_size": 16, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
PADDED = {
    "gpt2": {"vocab_size": 16, "n_embd": 8, "n_layer": 1, "n_head": 2},
    "bert": SMALL | {"intermediate_size": 8},
    "llama": SMALL | {"intermediate_size": 8},
    "xlnet": {"vocab_size": 16, "d_model": 8, "n_layer": 1, "n_head": 2, "d_inner": 8},
}


@pytest.mark.parametrize("family", PADDED)
def test_a_row_does_not_depend_on_the_longest_of_its_batch_though_it_is_padded_on_the_left(family):
    """Where positions count from the start of the row, padding there would shift them."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **PADDED[family], pad_token_id=0)
    config.initializer_range = 1.0
    model = transformers.AutoModelForSequenceClassification.from_config(config).double()
    tokenizer = zoo.word_pieces(*words)
    tokenizer.padding_side = "left"
    rows = Rows([" ".join(words[:n]) for n in (1, 4, 9)], [0, 1, 0])
    one, together = (
        predict(model, text_batches(model, tokenizer, rows, batch_size=n)) for n in (1, 3)
    )
    assert one.losses == pytest.approx(together.losses, abs=1e-6)  # RoPE is in fp32
    assert tokenizer.padding_side == "left"


def test_pairs_are_read_as_pairs_and_cut_to_what_the_model_reads():
    model, tokenizer = reader(length=12).eval(), zoo.word_pieces(*words)
    first, second = "a fine film", " ".join(words * 3)
    for most in (None, 9):
        [batch] = text_batches(model, tokenizer, Rows([(first, second)], [0]), max_length=most)
        encoding = tokenizer(
            first, second, return_tensors="pt", truncation=True, max_length=most or 12
        )
        assert batch.closure()[1].equal(model(**encoding).logits)


def test_a_sure_prediction_has_a_loss_above_zero_in_fp32():
    model = reader().float().eval()
    with torch.no_grad():
        model.classifier.weight.zero_()
        model.classifier.bias.copy_(torch.tensor([25.0, 0.0, 0.0]))
    rows = Rows(["a fine film"], [0])
    [batch] = text_batches(model, zoo.word_pieces(*words), rows)
    with torch.no_grad():
        losses, logits = batch.closure()
    assert float(F.cross_entropy(logits, batch.labels)) == 0
    assert float(losses) == pytest.approx(2 * math.exp(-25), rel=1e-3, abs=0)


def test_batches_need_a_size():
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        text_batches(reader(), zoo.word_pieces(*words), Rows(["a"], [0]), batch_size=0)


def test_texts_without_a_token_are_named():
    bare, model = zoo.word_pieces("fine", "film"), classifier()
    for texts in ([""], ["fine film", "fine", " "]):
        with pytest.raises(DataError, match=f"set, row {len(texts)}: .* no token in {texts[-1]!r}"):
            text_batches(model, bare, Rows(texts, [0] * len(texts), "set"), batch_size=2)
