"""The script that analyses neurons: models side by side, once each, from a folder or the hub."""

import json
import random
from pathlib import Path

import datasets
import pytest
import torch
import transformers

import neurons
from common import data
from tests.tokenizers_zoo import word_pieces

VOCABULARY = {"DET": ["the", "a"], "NOUN": ["film", "plot", "actor"], "ADJ": ["good", "bad"]}


def sentences(count, seed):
    draw = random.Random(seed)
    tags = [draw.choices(list(VOCABULARY), k=draw.randint(2, 6)) for _ in range(count)]
    return [{"tokens": [draw.choice(VOCABULARY[t]) for t in own], "upos": own} for own in tags]


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def folder(tmp_path):
    rare = {"tokens": ["oh"], "upos": ["INTJ"]}  # unseen in train
    for split, rows in (("train", sentences(60, 0)), ("dev", [*[rare] * 30, *sentences(60, 1)])):
        write(tmp_path / "data" / f"{split}.jsonl", rows)
    return tmp_path / "data"


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """Return the folder of a tiny RoBERTa with a head, which has no pooler."""
    path = str(tmp_path_factory.mktemp("models") / "tiny")
    tokenizer = word_pieces(*(word for own in VOCABULARY.values() for word in own))
    tokenizer.save_pretrained(path)
    torch.manual_seed(0)
    config = transformers.RobertaConfig(
        vocab_size=len(tokenizer), hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=8, max_position_embeddings=40, pad_token_id=0,
    )  # fmt: skip
    transformers.RobertaForSequenceClassification(config).save_pretrained(path)
    return path


def run(folder, output, *models, more=()):
    words = ("--tokens", "150", "--draws", "1", "--penalty", "0.01")
    return neurons.main(
        ["--data", str(folder), "--output", str(output), "--model", *models, *words, *more]
    )


def test_models_are_compared_and_analysed_once(folder, classifier, tmp_path, monkeypatch, capsys):
    output = tmp_path / "out"
    both = (f"plain={classifier}", f"freelb={classifier}")
    assert run(folder, output, *both) == 0
    text = capsys.readouterr().out
    assert "| plain |" in text
    assert "| freelb |" in text
    assert "| NOUN |" in text
    assert "INTJ" not in text
    assert {path.name for path in output.glob("*.png")} == {
        "plain.png", "freelb.png", "layers.png", "tags.png",
    }  # fmt: skip
    assert len(list(output.glob("*.json"))) == 2
    with monkeypatch.context() as patch:
        patch.setattr(neurons, "analyse_neurons", None)
        assert run(folder, output, *both) == 0
    assert capsys.readouterr().out == text
    assert run(folder, output, both[0], more=("--tolerance", "0.1")) == 0
    assert len(list(output.glob("*.json"))) == 3


def test_words_that_activations_tell_apart_are_told_apart(folder, classifier, tmp_path):
    pattern = classifier.replace("tiny", "t*")  # behind NAME= the shell leaves it as it is
    assert run(folder, tmp_path / "out", f"tiny={pattern}") == 0
    [file] = (tmp_path / "out").glob("tiny-*.json")
    found = json.loads(file.read_text())["found"]
    assert found["accuracy"]["all"] > 0.9
    assert all(100 < words <= 150 for words in found["words"])


def test_tags_of_the_hub_are_numbers_with_names(folder, classifier, tmp_path, monkeypatch):
    names = ["NOUN", "DET", "ADJ"]
    kind = {
        "tokens": datasets.List(datasets.Value("string")),
        "upos": datasets.List(datasets.ClassLabel(names=names)),
    }
    rows = {
        split: datasets.Dataset.from_list(sentences(60, seed), features=datasets.Features(kind))
        for seed, split in enumerate(("train", "validation"))
    }
    asked = []

    def load_dataset(*name):
        asked.append(name)
        return rows

    monkeypatch.setattr(data.datasets, "load_dataset", load_dataset)
    found = neurons.load_data("universal_dependencies:en_ewt")
    assert asked == [("universal_dependencies", "en_ewt")]
    own = sentences(60, 1)
    assert found["dev"] == ([row["tokens"] for row in own], [row["upos"] for row in own])


@pytest.mark.parametrize(
    ("models", "message"),
    [
        (["runs/last"], "--model runs/last: write NAME=FOLDER"),
        (["a/b=runs/last"], "--model a/b=runs/last: write NAME=FOLDER, a name without /"),
        (["a=b", "a=c"], "--model a=c: a is the name of b already"),
    ],
)
def test_models_that_cannot_be_named_are_refused(folder, tmp_path, capsys, models, message):
    with pytest.raises(SystemExit, match="2"):
        run(folder, tmp_path / "out", *models)
    assert message in capsys.readouterr().err


def test_a_pattern_that_could_be_several_models_is_refused(folder, tmp_path, capsys):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    with pytest.raises(SystemExit, match="2"):
        run(folder, tmp_path / "out", f"tiny={tmp_path}/[ab]")
    assert f"[ab]: 2 match, {tmp_path}/a, {tmp_path}/b." in capsys.readouterr().err


def test_a_model_that_cannot_be_loaded_is_refused(folder, tmp_path, capsys):
    assert run(folder, tmp_path / "out", "a=missing/folder") == 2
    assert "The model missing/folder cannot be loaded" in capsys.readouterr().err


def test_data_that_cannot_be_read_are_refused(folder, classifier, tmp_path, capsys):
    def refused(where):
        assert run(where, tmp_path / "out", f"tiny={classifier}") == 2
        return capsys.readouterr().err

    assert "There is no folder nowhere; a hub data set is given as" in refused("nowhere")
    write(folder / "dev.jsonl", [{"tokens": ["a"], "tag": ["DET"]}])
    assert "dev has no column 'upos': tokens, tag." in refused(folder)
    write(folder / "dev.jsonl", [{"tokens": ["a", "film"], "upos": ["DET"]}])
    assert "Sentence 0 has 2 words and 1 tags" in refused(folder)
    Path(folder / "dev.jsonl").unlink()
    assert "has no dev, it has train." in refused(folder)
