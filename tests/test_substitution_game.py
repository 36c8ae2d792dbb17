"""Word substitution as a finite game: mixtures against pure strategies, and the exact solution."""

import json
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from scipy.optimize import linprog
from transformers import BertForSequenceClassification

import attack_game
import mixadv
from mixadv.tokens import (
    SimilarWords,
    SubstitutionGame,
    dropout_masks,
    learner_samples,
    single_substitutions,
    solve_games,
    substitution_game,
)
from tests.substitution_zoo import TABLE, word_tokenizer
from tests.zoo import tiny_bert

TEXT = "The good film and the plot"
LABELS = {0: "negative", 1: "positive"}
TEXTS = single_substitutions(TEXT, SimilarWords(TABLE))


def classifier(seed: int, dropout: float = 0.0) -> Any:
    torch.manual_seed(seed)
    size = {"hidden_size": 8, "intermediate_size": 8, "max_position_embeddings": 128}
    words = {"id2label": LABELS, "initializer_range": 1.0, "hidden_dropout_prob": dropout}
    config = tiny_bert(len(word_tokenizer()), **size, **words)
    return BertForSequenceClassification(config)


@st.composite
def payoffs(draw: Any, learners: int | None = None) -> torch.Tensor:
    m = learners or draw(st.integers(1, 6))
    n, seed = draw(st.integers(1, 12)), draw(st.integers(0, 10**6))
    return torch.rand(m, n, generator=torch.Generator().manual_seed(seed)).round(decimals=2)


def game(payoff: torch.Tensor) -> SubstitutionGame:
    return SubstitutionGame(tuple(f"text {j}" for j in range(payoff.shape[1])), payoff)


def value(payoff: np.ndarray) -> float:
    """Return the value by linear programming: max v with Ay ≥ v, from the adversary's side."""
    m, n = payoff.shape
    found = linprog(
        np.r_[np.zeros(n), -1], A_ub=np.c_[-payoff, np.ones(m)], b_ub=np.zeros(m),
        A_eq=[np.r_[np.ones(n), 0]], b_eq=[1], bounds=[(0, None)] * n + [(None, None)],
    )  # fmt: skip
    assert found.status == 0
    return -found.fun


# Mixtures --------------------------------------------------------------------------------------


@given(payoffs())
@settings(max_examples=25)
def test_mixtures_are_no_worse_than_pure_strategies_and_bracket_the_value(payoff: torch.Tensor):
    found, exact = game(payoff).solve(), value(payoff.double().numpy())
    assert found.guaranteed >= found.pure_adversary_value - 1e-12
    assert found.worst <= found.pure_learner_value + 1e-12
    assert found.guaranteed <= exact + 1e-9
    assert found.worst >= exact - 1e-9
    assert found.gap <= 1e-6
    for weights in (found.learner, found.adversary):
        assert weights.min() >= 0
        assert weights.sum().item() == pytest.approx(1)


@given(payoffs())
@settings(max_examples=25)
def test_what_is_reported_is_what_the_weights_do(payoff: torch.Tensor):
    found, a = game(payoff).solve(), payoff.double().numpy()
    x, y = found.learner.numpy(), found.adversary.numpy()
    assert found.worst == pytest.approx(max(x @ a[:, j] for j in range(a.shape[1])))
    assert found.guaranteed == pytest.approx(min(a[i] @ y for i in range(len(a))))
    assert found.value == pytest.approx(x @ a @ y)
    assert found.gap == pytest.approx(found.worst - found.guaranteed)
    assert found.pure_adversary_value == pytest.approx(
        max(a[:, j].min() for j in range(a.shape[1]))
    )
    assert found.pure_learner_value == pytest.approx(min(a[i].max() for i in range(len(a))))


@given(payoffs(2))
@settings(max_examples=25)
def test_the_exploitability_of_a_pair_is_its_gap(payoff: torch.Tensor):
    """However few steps are played, no mixture is worse than a pure strategy."""
    found = game(payoff).solve(steps=1)
    assert found.gap >= value(payoff.double().numpy()) - found.guaranteed - 1e-9
    assert found.guaranteed >= found.pure_adversary_value - 1e-12
    assert found.worst <= found.pure_learner_value + 1e-12


@given(st.lists(payoffs(3), min_size=2, max_size=5))
@settings(max_examples=15)
def test_games_of_different_widths_are_solved_together_as_alone(several: list[torch.Tensor]):
    together = solve_games([game(payoff) for payoff in several])
    for payoff, found in zip(several, together, strict=True):
        assert len(found.adversary) == payoff.shape[1]
        assert found.adversary.sum().item() == pytest.approx(1)
        assert found.value == pytest.approx(value(payoff.double().numpy()), abs=1e-6)


def test_matching_pennies_wants_both_to_mix():
    found = game(torch.eye(2)).solve()
    assert found.learner.tolist() == pytest.approx([0.5, 0.5], abs=1e-5)
    assert found.guaranteed == pytest.approx(0.5)
    assert found.pure_adversary_value == 0
    assert found.pure_learner_value == 1


# The matrix ------------------------------------------------------------------------------------


def test_the_columns_are_the_text_and_single_substitutions():
    assert TEXTS[0] == TEXT
    expected = {TEXT.replace(old, new) for old, news in TABLE.items() for new in news} - {TEXT}
    assert set(TEXTS[1:]) == expected
    few = single_substitutions(TEXT, SimilarWords(TABLE), max_texts=4)
    assert len(few) == 4
    assert few[0] == TEXT
    assert set(few) <= set(TEXTS)
    assert few == single_substitutions(TEXT, SimilarWords(TABLE), max_texts=4)
    kept = single_substitutions(TEXT, SimilarWords(TABLE), protected=frozenset({"film"}))
    assert set(kept) == {t for t in TEXTS if "film" in t}


@pytest.mark.parametrize("column", [0, 1])
def test_of_a_pair_one_text_changes(column: int):
    pair = ("the good plot", "a good film")
    texts = single_substitutions(pair, SimilarWords(TABLE), column=column)
    assert len(texts) > 1
    assert all(text[1 - column] == pair[1 - column] for text in texts)


def test_entries_are_the_errors_of_each_learner_at_each_text():
    models, texts = (
        [classifier(s) for s in range(3)],
        single_substitutions(TEXT, SimilarWords(TABLE)),
    )
    found = substitution_game(models, word_tokenizer(), texts, 1, batch_size=2)
    for i, model in enumerate(models):
        for j, text in enumerate(TEXTS):
            inputs = word_tokenizer()(text, return_tensors="pt")
            with torch.no_grad():
                logits = model.eval()(**inputs).logits[0]
            wrong = logits.double().exp()[0] / logits.double().exp().sum()
            assert found.payoff[i, j].item() == pytest.approx(wrong.item(), abs=1e-6)


def test_a_dropout_row_is_one_function_of_the_text_whatever_is_read_beside_it():
    learners, words = dropout_masks(classifier(0, dropout=0.3), [0, 1]), word_tokenizer()
    whole = substitution_game(learners, words, TEXTS, 0).payoff
    alone = substitution_game(learners, words, TEXTS, 0, batch_size=1).payoff
    torch.testing.assert_close(alone, whole)
    backwards = substitution_game(learners, words, TEXTS[::-1], 0).payoff
    torch.testing.assert_close(backwards, whole.flip(1))
    assert (whole[0] - whole[1]).abs().max() > 1e-3


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_dropout_row_reads_no_padding(side: str, monkeypatch: pytest.MonkeyPatch):
    words, learners = word_tokenizer(), dropout_masks(classifier(0, dropout=0.3), [0])
    monkeypatch.setattr(words, "padding_side", side)
    alone = substitution_game(learners, words, ("the film",), 0).payoff[0, 0]
    beside = substitution_game(learners, words, ("the film", f"{TEXT} {TEXT}"), 0).payoff[0, 0]
    assert alone == pytest.approx(beside.item(), abs=1e-9)


def test_learners_that_are_functions_are_cut_as_models_are(monkeypatch: pytest.MonkeyPatch):
    words, model = word_tokenizer(), classifier(0)
    monkeypatch.setattr(words, "model_max_length", int(1e30))
    long = " ".join([TEXT] * 60)
    found = substitution_game(dropout_masks(model, [0]), words, (long, f"{long} movie"), 0)
    assert found.payoff[0, 0] == found.payoff[0, 1]  # what differs lies beyond


def test_the_rows_of_mat_are_the_samples_that_it_keeps():
    model, words = classifier(0), word_tokenizer()
    base = torch.optim.SGD(model.parameters(), lr=0.5)
    optimizer = mixadv.wrap(base, model, mixadv.MAT(samples=3))
    batch = {**words([TEXT, "the plot"], padding=True, return_tensors="pt")}
    for _ in range(3):
        optimizer.step(lambda: model(**batch, labels=torch.tensor([0, 1])))
    found = substitution_game(learner_samples(optimizer.game), words, TEXTS, 0).payoff
    inputs = words(list(TEXTS), padding=True, return_tensors="pt")
    mixed = optimizer.game.mixture(lambda: model.eval()(**inputs))
    torch.testing.assert_close(1 - found.mean(0), mixed.double().exp()[:, 0], atol=1e-6, rtol=0)
    assert len(found) == 3
    with pytest.raises(mixadv.GameError):
        learner_samples(mixadv.Game(model, mixadv.PGD()))


def test_models_and_random_state_are_left_as_they_were():
    model = classifier(0, dropout=0.3).train()
    model.dropout.eval()
    state = torch.get_rng_state()
    substitution_game([model, *dropout_masks(model, [0])], word_tokenizer(), (TEXT,), 0)
    assert torch.equal(state, torch.get_rng_state())
    assert model.training
    assert not model.dropout.training
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_wrong_games_are_refused():
    model = classifier(0)
    with pytest.raises(ValueError, match=r"label must be 0 to 1, a learner's, got 2"):
        substitution_game([model], word_tokenizer(), (TEXT,), 2)
    with pytest.raises(ValueError, match="rows and columns, got 0 and 1"):
        substitution_game([], word_tokenizer(), (TEXT,), 0)
    with pytest.raises(ValueError, match=r"each of the 1 texts, got shape \[2, 3\]"):
        SubstitutionGame(("a",), torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"2 games with \[1, 2\] learners"):
        solve_games([game(torch.zeros(1, 2)), game(torch.zeros(2, 2))])
    with pytest.raises(ValueError, match="max_texts must be at least 1, got 0"):
        single_substitutions(TEXT, SimilarWords(TABLE), max_texts=0)
    with pytest.raises(ValueError, match="got 0 games"):
        solve_games([])


# The script ------------------------------------------------------------------------------------


def models(folder: Path, seeds: range) -> list[str]:
    """Save tiny classifiers; return their folders."""
    for seed in seeds:
        classifier(seed, dropout=0.2).save_pretrained(folder / f"model{seed}")
        word_tokenizer().save_pretrained(folder / f"model{seed}")
    return [str(folder / f"model{seed}") for seed in seeds]


def arguments(folder: Path) -> list[str]:
    """Write a task and a table; return what names them."""
    (folder / "sst2").mkdir(parents=True)
    rows = [{"sentence": TEXT, "label": 1}, {"sentence": "a slow plot", "label": 0}] * 2
    for split in ("train", "dev"):
        (folder / "sst2" / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    lines = [json.dumps({"word": w, "neighbors": n}) for w, n in TABLE.items()]
    (folder / "table.jsonl").write_text("\n".join(lines))
    return ["--task", "sst2", "--data", str(folder), "--neighbours", str(folder / "table.jsonl")]


@pytest.mark.parametrize("more", [[], ["--dropout", "3"]])
def test_the_script_solves_a_game_for_each_text(more: list[str], tmp_path: Path, capsys: Any):
    names, file = models(tmp_path, range(2)), tmp_path / "games.jsonl"
    given = ["--model", *names, *more, "--output", str(file)]
    assert attack_game.main([*arguments(tmp_path / "data"), *given]) == 0
    lines = capsys.readouterr().out.strip().splitlines()
    head, _, *rows = (line for line in lines if line.startswith("|"))
    assert "columns: texts that the adversary chooses from" in "".join(lines)
    assert len(rows) == (2 if more else 1)
    assert head.count("|") == rows[0].count("|")
    for line in map(json.loads, file.read_text().splitlines()):
        exact = value(np.array(line["payoff"]))
        assert line["guaranteed"] >= line["pure_adversary_value"] - 1e-9
        assert line["worst"] <= line["pure_learner_value"] + 1e-9
        assert line["guaranteed"] - 1e-5 <= exact <= line["worst"] + 1e-5  # written rounded
        assert line["gap"] < 1e-3


def test_the_script_trains_mat_for_its_samples(tmp_path: Path, capsys: Any, monkeypatch: Any):
    (name,) = models(tmp_path, range(1))
    monkeypatch.setattr(attack_game, "EMBEDDED_MODEL", name)
    monkeypatch.chdir(tmp_path)
    given = [*arguments(tmp_path / "data"), "--mat", "3", "--updates", "2"]
    assert attack_game.main(given) == 0
    assert "| 3 samples of MAT | 4 |" in capsys.readouterr().out


def test_the_script_answers_mistakes_with_one_line(tmp_path: Path, capsys: Any):
    (name,), task = models(tmp_path, range(1)), arguments(tmp_path / "data")
    capsys.readouterr()  # what saving the model shows
    for named, answer in {
        (): "Name the learners",
        ("--model", name): "One checkpoint is one row",
        ("--model", name, "--neighbours", "nowhere"): "there is no such file",
    }.items():
        assert attack_game.main([*task, *named]) == 2
        printed = capsys.readouterr()
        assert printed.out == ""
        assert answer in printed.err
        assert printed.err.count("\n") == 1
