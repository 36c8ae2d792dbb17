"""Mixtures and single models are trained for equally long, and a line that is there stays."""

from pathlib import Path

import numpy as np
import pytest
import transformers
from scipy import stats

import mixtures
from common.results import finished
from mixing import train
from mixing.measure import TYPOS, WAYS
from tests.scripts import own_start  # noqa: F401
from tests.substitution_zoo import tiny, word_tokenizer

SIZES = ["--shots=2", "--epochs=3", "--rows=12", "--attack-rows=6", "--steps=1"]


def command(folder: Path) -> list[str]:
    """Return the options of a comparison of a tiny encoder; it is made if it is not there."""
    if not (folder / "tiny").exists():
        tokenizer = word_tokenizer()
        encoder = tiny(transformers.BertModel, tokenizer, max_position_embeddings=64)
        for saved in (tokenizer, encoder):
            saved.save_pretrained(folder / "tiny")
    return ["--model", str(folder / "tiny"), "--output", str(folder / "out"), *SIZES]


@pytest.mark.slow
def test_what_has_a_line_is_not_trained_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    assert mixtures.main(command(tmp_path)) == 0
    first = capsys.readouterr().out
    lines = finished(tmp_path / "out" / "results.jsonl")
    assert [line["trained"] for line in lines.values()] == list(mixtures.TRAINED)
    for line in lines.values():
        members = int(line["trained"].partition("-")[2] or 1)
        assert len(line["alone"]) == members
        assert all(len(found) == len(WAYS) for found in line["ways"].values())
        drawn = {name: found[0] for name, found in line["ways"].items()}
        assert drawn["worst of all"] <= min(drawn["EoT-PGD"], drawn["ARC"], drawn["transfer"])
        if members == 1:
            assert all(len(set(found)) == 1 for found in line["ways"].values())

    monkeypatch.setattr(train.Bench, "_fit", None)
    assert mixtures.main(command(tmp_path)) == 0
    assert capsys.readouterr().out == first


def test_everything_is_trained_for_as_many_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """In plain steps: a round of MAT, two steps, is not divided; other lengths are rounded."""
    spent, fit = [], train.Bench._fit

    def counted(bench, network, steps, rate, solver, order=0, **others):
        member = train._boosting(order) if solver.name == "pgd" else train.COST[solver.name]
        spent[-1] += member * steps
        return fit(bench, network, 1, rate, solver, order, **others)

    def measured(self, mixture):
        return {"ways": {}, "alone": [0.0] * len(mixture)}

    def started(*arguments):
        spent.append(0.0)
        return one(*arguments)

    one = mixtures._one
    monkeypatch.setattr(train.Bench, "_fit", counted)
    monkeypatch.setattr(mixtures.Measure, "__call__", measured)
    monkeypatch.setattr(mixtures, "_one", started)
    monkeypatch.setattr(mixtures, "table", lambda results: "")
    monkeypatch.setattr(Path, "exists", lambda path: path.suffix != ".pt" and path.is_dir())
    assert mixtures.main(command(tmp_path)) == 0
    assert len(spent) == len(mixtures.TRAINED)
    assert spent == pytest.approx([spent[0]] * len(spent))


def test_a_line_is_of_its_settings(tmp_path: Path):
    options = command(tmp_path)
    one, other = (
        mixtures._key(mixtures.arguments([*options, "--radius", radius]), "smart", 0)
        for radius in ("0.1", "0.2")
    )
    assert one != other


def test_differences_are_of_the_same_seeds():
    """Seeds that one of two lacks would compare different rows; scipy's paired interval agrees."""
    draw = np.random.default_rng(0)

    def line(trained: str, seed: int) -> dict:
        ways = {name: draw.random(3).tolist() for name in (*mixtures.SHOWN, TYPOS)}
        return {"task": "t", "trained": trained, "seed": seed, "ways": ways}

    lines = [line("smart", s) for s in (0, 1, 2, 3)] + [line("mat-3", s) for s in (4, 2, 0, 1)]
    lines += [line("lora-3", 3)]
    head, _, *rows = mixtures.paired(lines).splitlines()
    at = [cell.strip() for cell in head.strip("|").split("|")].index("ARC − smart")
    [cells] = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    one, other = (
        np.array(
            [
                x["ways"]["ARC"][1]
                for s in (0, 1, 2)
                for x in lines
                if x["trained"] == name and x["seed"] == s
            ]
        )
        for name in ("mat-3", "smart")
    )
    low, high = stats.ttest_rel(one, other).confidence_interval()
    assert cells[:3] == ["t", "mat-3", "3"]
    assert cells[at] == f"{50 * (low + high):+.1f} ± {50 * (high - low):.1f}"
    assert mixtures.paired(lines[:1]) == ""
