"""The digits: real images, trained in minutes; what is told of them is what was measured."""

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch

import digits
from common.results import digest
from mixadv.robustness import image_accuracy


def test_the_script_trains_measures_and_goes_on(tmp_path: Path, capsys: Any, monkeypatch: Any):
    monkeypatch.setattr(
        digits, "data", lambda data=digits.data: [x[:96] for x in data()]
    )  # a fifteenth of it
    monkeypatch.setattr(digits, "pgd_attack", lambda model, radius: lambda x, y: x)
    output = tmp_path / "digits.jsonl"
    argv = ["--epochs", "1", "--steps", "1", "--seeds", "0", "1", "--output", str(output)]
    assert digits.main([*argv, "--arms", "plain", "PGD-AT"]) == 0
    first = output.read_text()
    assert digits.main([*argv, "--report"]) == 0
    assert digits.main(argv) == 0
    assert output.read_text().startswith(first)
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    ran = {(line["arm"], line["seed"]) for line in lines}
    assert ran == {(arm, seed) for arm in digits.ARMS for seed in (0, 1)}
    assert len(lines) == len(ran)
    table = capsys.readouterr().out
    for arm in digits.ARMS:
        assert f"| {arm} |" in table


def test_targeted_rows_are_of_their_own(tmp_path: Path, capsys: Any, monkeypatch: Any):
    """With a stand-in for torchattacks, which puts another image in the place of each."""
    asked: list[dict[str, Any]] = []

    def torchattack(name: str, model: torch.nn.Module, **settings: Any) -> Any:
        asked.append({"name": name, **settings})
        return lambda x, y: x.roll(1, 0)

    monkeypatch.setattr(digits, "data", lambda data=digits.data: [x[:96] for x in data()])
    monkeypatch.setattr(digits, "pgd_attack", lambda model, radius: lambda x, y: x)
    monkeypatch.setattr(digits, "torchattack", torchattack)
    monkeypatch.setattr(digits, "find_spec", lambda name: name)
    output = tmp_path / "digits.jsonl"
    argv = ["--epochs", "30", "--radius", "1", "--seeds", "0", "--arms", "plain"]
    argv += ["--output", str(output)]
    for more in ([], ["--targeted"], ["--targeted"]):
        assert digits.main([*argv, *more]) == 0
    plain, targeted = map(json.loads, output.read_text().splitlines())
    assert asked == [{"name": "APGDT", "eps": 1.0, "steps": 20}]
    assert (plain["clean"], plain["robust"]) == (targeted["clean"], targeted["robust"])
    assert targeted["worst"] < targeted["robust"] == targeted["clean"]  # under PGD alone
    told = capsys.readouterr().out.split("\n\n")[-2:]
    assert told[0] == "ε = 1 in L∞, K = 10, 30 epochs, under PGD and targeted APGD:"
    assert f"| {100 * targeted['robust']:.1f} | {100 * targeted['worst']:.1f} |" in told[1]


def test_a_package_that_is_not_there_is_named(tmp_path: Path, capsys: Any, monkeypatch: Any):
    monkeypatch.setattr(digits, "find_spec", lambda name: None)
    assert digits.main(["--targeted", "--output", str(tmp_path / "none.jsonl")]) == 2
    assert "pip install --no-deps torchattacks==3.5.1" in capsys.readouterr().err


def test_nothing_measured_is_told(tmp_path: Path, capsys: Any):
    assert digits.main(["--report", "--output", str(tmp_path / "none.jsonl")]) == 2
    assert "has no results yet" in capsys.readouterr().err


def test_the_data_are_images_apart():
    train, held_out, labels, answers = digits.data()
    assert [len(x) for x in (train, held_out, labels, answers)] == [1198, 599, 1198, 599]
    assert train.min() == 0
    assert train.max() == 1
    flat = {row.numpy().tobytes() for row in train}
    assert len(flat) == 1198
    assert sum(row.numpy().tobytes() in flat for row in held_out) == 0


def test_an_arm_learns_and_is_more_robust_than_plain_training():
    """In seconds: the whole is in examples/results/digits.jsonl."""
    options = digits.arguments(["--epochs", "3", "--steps", "3"])
    _, images, _, labels = digits.data()
    found = {}
    for arm in (digits.PLAIN, "TRADES"):
        model = digits.train(arm, 0, options)
        attack = digits.pgd_attack(model, radius=0.15, steps=5, restarts=1)
        accuracy = image_accuracy(model, [(images, labels)], {"PGD": attack}, radius=0.15)
        found[arm] = accuracy.clean.value, accuracy.worst.value
    assert min(clean for clean, _ in found.values()) > 0.85
    assert found["TRADES"][1] > found[digits.PLAIN][1] + 0.1


def test_what_was_measured_has_all_arms_and_seeds():
    lines = [json.loads(line) for line in digits.OUTPUT.read_text().splitlines()]
    runs = {(r["arm"], r["epochs"]): set() for r in lines}
    for r in lines:
        runs[r["arm"], r["epochs"]].add(r["seed"])
        options = Namespace(**{"targeted": False, **r})
        assert digest(digits.settings_of(r["arm"], r["seed"], options)) == r["key"]
    for arm in ("plain", "PGD-AT", "TRADES", "MAT"):
        assert runs[arm, 40] == {0, 1, 2, 3, 4}
    assert all(0 in runs[arm, epochs] for arm in digits.ARMS for epochs in (40, 80))
    assert digits.table(lines)


@pytest.mark.parametrize("arm", digits.ARMS)
def test_every_arm_plays_in_the_box(arm: str):
    options = digits.arguments([])
    solver = digits.ARMS[arm](digits.words_of(options))
    if solver is None:
        assert arm == digits.PLAIN
        return
    solver = getattr(solver, "on_inputs", solver)
    assert (solver.norm, solver.unit, solver.box) == ("linf", "absolute", (0.0, 1.0))
    assert solver.radius == options.radius
    assert isinstance(digits.Network()(torch.zeros(2, 1, 8, 8)), torch.Tensor)
