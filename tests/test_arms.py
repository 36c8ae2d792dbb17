"""Arms over seeds: what is run, what is kept, what is told; and the scripts made of them."""

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import anchored
import rare_intents
from common import arms
from common.arms import Column
from common.results import digest, finished
from mixadv.robustness import paired_t_test
from tests.substitution_zoo import tiny, word_tokenizer

# Runs and tables ---------------------------------------------------------------------------------


def options(output: Path, **changes: Any) -> argparse.Namespace:
    given = {"arms": ["a", "b"], "seeds": [0, 1, 2], "output": output, "report": False}
    return argparse.Namespace(**{**given, **changes})


def settings(arm: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    return {"arm": arm, "seed": seed}


VALUES = {("a", 0): 0.5, ("a", 1): 0.6, ("a", 2): 0.4, ("b", 0): 0.7, ("b", 1): 0.9, ("b", 2): 0.5}


def measure(arm: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    return {"right": VALUES[arm, seed]}


def test_a_killed_comparison_goes_on_and_repeats_nothing(tmp_path: Path):
    ran = []

    def killed(arm: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
        if len(ran) == 3:
            raise KeyboardInterrupt
        ran.append((arm, seed))
        return measure(arm, seed, options)

    asked = options(tmp_path / "lines.jsonl")
    with pytest.raises(KeyboardInterrupt):
        arms.results(asked, settings, killed)
    assert len(finished(asked.output)) == 3
    ran.clear()
    found = arms.results(asked, settings, killed)
    assert ran == [("b", 1), ("a", 2), ("b", 2)]
    assert {(r["arm"], r["seed"]): r["right"] for r in found} == VALUES
    assert arms.results(options(asked.output, report=True), settings, killed) == found
    with pytest.raises(ValueError, match="has no results yet: run without --report"):
        arms.results(options(tmp_path / "none", report=True), settings, killed)


def test_a_table_sets_arms_against_one_seed_by_seed(tmp_path: Path):
    found = arms.results(options(tmp_path / "lines"), settings, measure)
    found += [{"arm": "alone", "seed": 7, "right": 0.25}]
    text = arms.tables(found, lambda r: "All:", {"right": Column("right")}, ("right", "a"))
    a, b = ({s: 100 * v for (arm, s), v in VALUES.items() if arm == name} for name in "ab")
    over = paired_t_test(b, a)
    half = over.difference.high - over.difference.value
    rows = [[c.strip() for c in line.strip("|").split("|")] for line in text.splitlines()[2:]]
    assert rows[0] == ["arm", "right", "right, over a", "p", "seeds"]
    assert rows[3][2:] == [f"{over.difference.value:+.1f} ± {half:.1f}", f"{over.p:.2g}", "3"]
    assert rows[2][2:] == ["–", "–", "3"]
    assert rows[4] == ["alone", "25.0", "–", "–", "1"]


def test_a_difference_without_spread_has_no_interval():
    found = [{"arm": a, "seed": s, "x": x} for a, x in (("a", 0.25), ("b", 0.5)) for s in (0, 1)]
    text = arms.tables(found, lambda r: "", {"x": Column("x")}, ("x", "a"))
    assert "| b | 50.0 ± 0.0 | +25.0 | – | 2 |" in text


# The scripts -------------------------------------------------------------------------------------


class Tiny(anchored.Sentences):
    """Two words of each text are known, the others are not."""

    def __init__(self) -> None:
        torch.nn.Module.__init__(self)
        self.tokenizer = word_tokenizer()
        self.encoder = tiny(transformers.BertModel, self.tokenizer, seed=0)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    read = anchored.rows
    monkeypatch.setattr(anchored, "Sentences", Tiny)
    monkeypatch.setattr(anchored, "rows", lambda part: read(part)[: 24 if part == "train" else 130])


@pytest.mark.usefixtures("small")
def test_an_encoder_is_anchored_measured_and_told(tmp_path: Path, capsys: Any):
    output = tmp_path / "anchored.jsonl"
    argv = ["--seeds", "0", "--updates", "2", "--output", str(output)]
    assert anchored.main(argv) == 0
    lines = {r["arm"]: r for r in map(json.loads, output.read_text().splitlines())}
    assert set(lines) == set(anchored.SOLVERS)
    for line in lines.values():
        assert 0 <= line["misspelt"] <= line["clean"] + 1
        assert -1 <= line["cosine"] <= 1
    assert lines["PGD"]["cosine"] != lines["as it is"]["cosine"]
    assert anchored.main([*argv, "--report"]) == 0
    assert "| PGD |" in capsys.readouterr().out


def test_a_word_of_four_is_misspelt_and_nothing_else():
    texts = ["please set an alarm for seven tomorrow morning", "a b c", ""]
    found = anchored.misspelt(texts, seed=3)
    assert found[1:] == texts[1:]
    pairs = list(zip(texts[0].split(), found[0].split(), strict=True))
    assert sum(old != new for old, new in pairs) == 2
    assert anchored.misspelt(texts, seed=3) == found
    assert anchored.misspelt(texts, seed=4) != found


def test_rare_intents_are_rare_and_the_sampler_of_groups_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """On embeddings that tell the intents, of which a rare one has three sentences."""
    intents = torch.arange(16).repeat(24)
    draw = torch.Generator().manual_seed(0)
    clouds = torch.eye(16)[intents] + 0.1 * torch.randn(384, 16, generator=draw)
    monkeypatch.setattr(rare_intents, "embedded", lambda part: (clouds, intents))
    output = tmp_path / "rare.jsonl"
    assert rare_intents.main(["--seeds", "0", "1", "--output", str(output)]) == 0
    lines = list(map(json.loads, output.read_text().splitlines()))
    assert {r["arm"] for r in lines} == set(rare_intents.SOLVERS)
    worst = {(r["arm"], r["seed"]): r["worst group"] for r in lines}
    for seed in (0, 1):
        for arm in ("balanced", "GroupDRO"):
            assert worst[arm, seed] > worst["plain", seed] + 0.3
    assert all(r["worst intent"] <= r["worst group"] <= r["mean"] for r in lines)


def test_what_was_measured_is_what_the_script_would_measure():
    """Of each arm all seeds, under the keys that its settings have today."""
    seeds: dict[str, set[int]] = {}
    for r in finished(rare_intents.OUTPUT).values():
        own = rare_intents.settings_of(r["arm"], r["seed"], argparse.Namespace(**r))
        assert digest(own) == r["key"]
        seeds.setdefault(r["arm"], set()).add(r["seed"])
    assert seeds == {arm: {0, 1, 2, 3, 4} for arm in rare_intents.SOLVERS}
