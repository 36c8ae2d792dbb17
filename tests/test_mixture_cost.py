"""The cost of mixtures: sizes are those of the tensors, and times are over the model's own."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import mixture_cost
from benchmark_parts.work import load

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
