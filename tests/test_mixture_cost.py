"""The cost of mixtures: sizes are those of the tensors, and times are over the model's own."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from datasets import Dataset

import mixture_cost
from benchmark_parts.work import load
from common.data import Task
from mixing.accuracy import accuracies
from tests.substitution_zoo import tiny, word_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`")  # PEFT asks for it
pytest.importorskip("peft", reason="adapters are PEFT's")


def test_megabytes_are_those_of_what_members_hold():
    model = load("tiny", dropout=0.0)
    whole = sum(tensor.nbytes for tensor in model.state_dict().values()) / 1e6
    adapter = (model.config.num_hidden_layers * 2 * 2 * 64 * mixture_cost.RANK + 64 * 2 + 2) * 4e-6
    for kind, each in {"whole weights": whole, "LoRA adapters": adapter}.items():
        one, three = (mixture_cost.megabytes(mixture_cost.KINDS[kind](model, m)) for m in (1, 3))
        assert each < (three - one) / 2 < 1.05 * each + 0.01  # names, settings, PEFT's model card


def test_the_members_of_a_kind_are_as_many_as_asked_and_leave_the_model_alone():
    model = load("tiny", dropout=0.0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for make in mixture_cost.KINDS.values():
        assert len(make(model, 3)) == 3
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_the_script_writes_a_row_for_each_mixture(tmp_path: Path, capsys: Any):
    where = ["--output", str(tmp_path / "new" / "cost.jsonl")]
    size = ["--model", "tiny", "--rows", "2", "--tokens", "3", "--rounds", "2"]
    assert mixture_cost.main([*where, *size, "--members", "1", "2"]) == 0
    printed = capsys.readouterr().out
    found = [json.loads(line) for line in Path(where[1]).read_text().splitlines()]
    assert [(row["of"], row["members"]) for row in found] == [
        (kind, members) for kind in mixture_cost.KINDS for members in (1, 2)
    ]
    assert mixture_cost.main([*where, "--report"]) == 0
    assert capsys.readouterr().out == printed
    assert mixture_cost.main(["--report", "--output", str(tmp_path / "none")]) == 2


def test_the_table_divides_by_the_model_in_the_same_round():
    row = {"model": "tiny", "rows": 2, "tokens": 3, "of": "whole weights", "members": 2}
    row |= {"megabytes": 1.25, "alone": [1.0, 2.0], "mean": [2.0, 6.0], "draw": [1.0, 2.0]}
    expected = "| 2 | whole weights | 1.2 | 2.50 [2.00, 3.00] | 1.00 [1.00, 1.00] | 1.00 "
    table = mixture_cost.table([{**row, "vote": [1.0, 2.0]}])
    assert table.splitlines()[2].startswith(expected)
    assert "750.0 ms a row" in table


def test_accuracy_is_that_of_disjoint_mixtures_by_hand():
    random = torch.Generator().manual_seed(0)
    each = torch.randn(5, 40, 3, generator=random).softmax(-1)
    labels = torch.randint(3, (40,), generator=random)
    right = each.argmax(-1) == labels
    for members, mixtures in {1: 5, 2: 2, 4: 1, 5: 1}.items():
        found = accuracies(each, labels, members)
        for number in range(mixtures):
            own = slice(number * members, (number + 1) * members)
            votes = torch.stack([(each[own].argmax(-1) == c).sum(0) for c in range(3)], -1)
            expected = {
                "mean": each[own].mean(0).argmax(-1) == labels,
                "draw": right[own],
                "vote": votes.argmax(-1) == labels,
            }
            for way, hits in expected.items():
                assert found[way][number] == pytest.approx(hits.double().mean().item())
        assert all(len(values) == mixtures for values in found.values())
        if members == 1:
            assert found["mean"] == found["draw"] == found["vote"]


def test_accuracy_stands_beside_the_cost_and_neither_is_lost(
    tmp_path: Path, capsys: Any, monkeypatch: Any
):
    """A tiny encoder that learns to tell two words apart, which the test rows have too."""
    tokenizer = word_tokenizer()
    encoder = tiny(transformers.BertModel, tokenizer, max_position_embeddings=64)
    for saved in (tokenizer, encoder):
        saved.save_pretrained(tmp_path / "tiny")
    words = ("good", "bad")
    rows = Dataset.from_dict({"text": [words[i % 2] for i in range(32)], "label": [0, 1] * 16})
    task = Task("words", rows, {"test": rows}, words, lambda *_: {})
    real = mixture_cost.measure_accuracy
    monkeypatch.setattr(
        mixture_cost, "measure_accuracy", lambda o: real(o, task, str(tmp_path / "tiny"))
    )
    where = ["--output", str(tmp_path / "cost.jsonl"), "--members", "1", "2"]
    how = [*where, "--accuracy", "--epochs", "20", "--lr", "0.03"]
    assert mixture_cost.main(how) == 2
    assert "has no cost yet" in capsys.readouterr().err
    cost = [*where, "--model", "tiny", "--rows", "2", "--tokens", "3", "--rounds", "2"]
    assert mixture_cost.main(cost) == 0
    capsys.readouterr()
    assert mixture_cost.main(how) == 0
    printed = capsys.readouterr().out
    assert "| 100.0 [100.0, 100.0] | 100.0 [100.0, 100.0] |" in printed
    assert "Right: of 32 test rows of words, by 2 adapters, each trained on 32 rows" in printed
    assert "| – | – | – |" in printed  # whole weights are not trained
    assert mixture_cost.main([*where, "--report"]) == 0
    assert capsys.readouterr().out == printed
    assert mixture_cost.main(cost) == 0  # measured anew
    assert "| 100.0 [100.0, 100.0] |" in capsys.readouterr().out
