"""A study compares like with like, survives a kill, and says what is missing."""

import importlib
import json
import os
import queue
import random
import re
import shlex
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import transformers
from accelerate.state import AcceleratorState, GradientState
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import stats

import mixadv
import study as script
from common.results import Run, append, finished
from studying import commands, pool, summary, tables, work
from studying.findings import Findings, Pair, adjusted, asked, differences
from studying.parts import Measures, Method, Subject
from studying.plan import Study
from studying.pool import side_by_side
from studying.reading import read
from studying.render import render
from tests.substitution_zoo import tiny, word_tokenizer

EXAMPLES = Path(__file__).parent.parent / "examples" / "research"
METHODS = {
    "plain": Method(),
    "longer": Method(times=3.0),
    "noise": Method("noise"),
    "freelb": Method("freelb"),
    "mat": Method("mat", {"learner_steps": 1, "samples": 2}),
}
REFERENCES = ("plain", "longer")
TASK = Subject(
    script="intent",
    epochs=2,
    learning_rates=(0.1, 0.2),
    evaluate=("test",),
    limit=32,
)
Score = Callable[[Run], float]


def build(**changes: Any) -> Study:
    """Return a study of one task, and what is changed of it."""
    given = {
        "methods": METHODS,
        "tasks": {"words": TASK},
        "seeds": (0, 1, 2),
        "references": REFERENCES,
    }
    return Study(**given | changes)


def played(study: Study, score: Score) -> dict[str, Any]:
    """Return lines of results of all runs of a study, with scores in place of training."""
    results: dict[str, Any] = {}
    while new := [r for *_, runs in study.stages(results) for r in runs if r.key not in results]:
        for run in new:
            split = "held-out" if run.hold_out else "test"
            seconds = 1.0 if run.solver == "plain" else 2.5 + 0.1 * run.seed
            last = {split: {"accuracy": score(run)}}
            results[run.key] = {"key": run.key, "last": last, "seconds_per_update": seconds}
    return results


def world(seed: int = 0, **changes: Any) -> tuple[Study, dict[str, Any], Findings]:
    """Return a study, the lines of its results, and what was found."""
    study = build(**changes)
    results = played(study, drawn(seed))
    return study, results, Findings(study, results)


def drawn(seed: int) -> Score:
    """Return scores that depend on the run alone, as if by chance."""
    return lambda run: random.Random(f"{seed}/{run.key}").uniform(0.3, 0.9)


# What is run -----------------------------------------------------------------------------------


@given(st.floats(0.5, 8), st.floats(0.5, 5))
def test_a_method_is_trained_as_often_as_it_says_and_all_else_alike(times: float, epochs: float):
    task = Subject("intent", epochs, (0.1,), ("test",), limit=8)
    study = build(methods=METHODS | {"longer": Method(times=times)}, tasks={"words": task})
    assert study.methods["longer"].cost == times
    runs = {m: study.reported("words", m, 0, {}) for m in study.methods}
    assert runs.pop("longer") == replace(runs["plain"], epochs=times * epochs)
    assert {run.epochs for run in runs.values()} == {epochs}


@given(
    st.sampled_from(sorted(mixadv.SOLVERS)),
    st.integers(1, 9),
    st.floats(0.1, 1),
    st.floats(0.5, 4),
)
def test_what_is_plain_costs_what_plain_training_does(
    name: str, every: int, share: float, times: float
):
    whole, some = Method(name), Method(name, every=every, share=share, times=times)
    played = share / every
    assert some.cost == pytest.approx(times * (whole.cost * played + 1 - played))


def test_the_cost_of_a_method_is_what_a_round_of_it_runs():
    model = torch.nn.Linear(3, 2)
    x, y = torch.randn(4, 3), torch.tensor([0, 1, 0, 1])

    def closure() -> tuple[torch.Tensor, torch.Tensor]:
        logits = model(x)
        return torch.nn.functional.cross_entropy(logits, y), logits

    solver = mixadv.make_solver("freelb", steps=2)
    optimizer = mixadv.wrap(torch.optim.SGD(model.parameters(), lr=0.1), model, solver)
    optimizer.step(closure)
    outcome = optimizer.outcome
    backwards = outcome.theta_backwards  # through one pass each, and of δ and θ at once
    assert (outcome.forwards + 2 * backwards) / 3 == Method("freelb", {"steps": 2}).cost == 2


def test_all_choose_from_the_same_rates_by_seeds_and_rows_that_are_not_reported():
    study = build(search_seeds=(7, 8), hold_out=5)
    for method in study.methods:
        search = study.search("words", method)
        assert [*search] == [0.1, 0.2]
        for rate, runs in search.items():
            kinds = [(run.learning_rate, run.seed, run.hold_out) for run in runs]
            assert kinds == [(rate, 7, 5), (rate, 8, 5)]
    results = played(study, drawn(0))
    reported = [study.reported(task, m, seed, results) for task, seed, m in study.cells()]
    assert {(run.seed, run.hold_out) for run in reported if run} == {(0, 0), (1, 0), (2, 0)}
    for seeds in ((1,), (7, 7)):
        with pytest.raises(ValueError, match="all differ: what is chosen on may not be reported"):
            build(search_seeds=seeds)


@settings(max_examples=10)  # a study is played for each
@given(st.lists(st.integers(0, 99), min_size=2, max_size=4, unique=True), st.integers(0, 40))
def test_the_rate_that_is_trained_with_is_the_best_on_held_out_rows(scores: list[int], bias: int):
    """By the mean over the seeds of the search."""
    rates = tuple(0.1 * (i + 1) for i in range(len(scores)))
    task = Subject("intent", 1.0, rates, ("test",), limit=8)
    study = build(tasks={"words": task}, search_seeds=(100, 101))
    by_rate = dict(zip(rates, scores, strict=True))
    tilt = {100: 1, 101: -1}
    results = played(
        study,
        lambda run: by_rate[run.learning_rate] + tilt.get(run.seed, 0) * bias * run.learning_rate,
    )
    best = rates[scores.index(max(scores))]
    for method in study.methods:
        assert study.chosen("words", method, results) == best
        assert study.reported("words", method, 0, results).learning_rate == best
    [key] = [run.key for run in study.search("words", "mat")[best] if run.seed == 101]
    del results[key]  # nothing before the whole search
    assert study.reported("words", "mat", 0, results) is None


def test_a_rate_is_chosen_at_the_length_that_it_is_trained_with():
    study = build()
    longer = played(study, lambda run: 0.5 + (run.learning_rate - 0.15) * (2.5 - run.epochs))
    chosen = {m: study.chosen("words", m, longer) for m in REFERENCES}
    assert chosen == {"plain": 0.2, "longer": 0.1}
    run = study.reported("words", "longer", 0, longer)
    assert (run.epochs, run.learning_rate) == (6.0, 0.1)


def test_where_texts_are_attacked_nobody_knows_the_passes(tmp_path: Path):
    words = Method(substitute=0.2, neighbours="builtin")
    study = build(methods=METHODS | {"words": words})
    results = played(study, drawn(0))
    run = study.reported("words", "words", 0, results)
    assert (run.substitute, run.neighbours) == (0.2, "builtin")
    text = render(study, results, tmp_path, "command")
    [row] = re.findall(r"^\| words \|.*$", text.split("### words")[1], re.M)[:1]
    assert row.split("|")[2].strip() == "–"


def test_a_method_begins_at_a_model_of_its_own(tmp_path: Path):
    """The run and its searches, each at that of its seed; passes before it are not known."""
    study = build(methods=METHODS | {"before": Method(model="begun/{seed}")})
    results = played(study, drawn(0))
    searched = [run for runs in study.search("words", "before").values() for run in runs]
    reported = [study.reported("words", "before", seed, results) for seed in study.seeds]
    assert len(searched) == 2
    for run in (*searched, *reported):
        assert run is not None
        assert run.model == f"begun/{run.seed}"
        like = study._run("words", "plain", run.learning_rate, run.seed, hold_out=run.hold_out)
        assert replace(run, model=study.model) == like
    assert study.methods["before"].cost is None
    compared = {pair.reference for pair in asked(study) if pair.method == "before"}
    assert compared == {*REFERENCES}, "it is no other length of plain training"
    assert "| before | – |" in render(study, results, tmp_path, "s")


def test_what_is_measured_is_told_apart_by_split_attacks_and_settings():
    tasks = [TASK, replace(TASK, evaluate=("dev", "test")), replace(TASK, attacks=("typos",))]
    studies = [build(tasks={"words": task}) for task in tasks]
    studies.append(build(measure=Measures(steps=2)))
    run = studies[0].search("words", "plain")[0.1][0]
    assert len({study.measured("words", run) for study in studies}) == 4


def test_a_line_without_a_split_that_is_asked_for_is_run_again():
    study, results, _ = world()
    more = build(tasks={"words": replace(TASK, evaluate=("test", "other"))})
    run = study.reported("words", "plain", 0, results)
    assert study.done("words", run, results)
    assert not more.done("words", run, results)
    assert Findings(more, results).official("words", "plain") == {}


# What is reported ------------------------------------------------------------------------------


@settings(max_examples=10)  # a study is played for each
@given(st.integers(0, 10**6))
def test_differences_are_those_of_a_paired_t_test(seed: int):
    study, _, findings = world(seed, pairs=(("mat", "freelb"), ("mat", "plain")))
    found = differences(findings)
    players = ("noise", "freelb", "mat")
    expected = [Pair("words", m, "plain") for m in ("longer", *players)]
    expected += [Pair("words", m, "longer") for m in players]
    assert [*found] == [*expected, Pair("words", "mat", "freelb")]  # each once
    for pair, comparison in found.items():
        a, b = ([findings.official("words", m)[s] for s in study.seeds] for m in pair[1:])
        test = stats.ttest_rel(a, b)
        assert comparison.p == pytest.approx(test.pvalue)
        assert comparison.difference == pytest.approx(
            (statistics.fmean(a) - statistics.fmean(b), *test.confidence_interval())
        )


def test_under_pgd_accuracies_in_the_largest_ball_are_compared(tmp_path: Path):
    study, results, findings = world(pairs=(("mat", "freelb"),))
    found = {}
    for task, seed, method in study.cells():
        found[method, seed] = random.Random(f"{method}{seed}").random()
        radii = {"radii": [0.0, 0.1, 0.05], "accuracy": [{"value": 2.0}] * 3}
        radii["accuracy"][1] = {"value": found[method, seed]}
        run = study.reported(task, method, seed, results)
        if method != "noise":
            results[study.measured("words", run)] = {"sections": {"radii": radii}}
    of = differences(findings, Findings.attacked)
    assert {pair.method for pair in of} == {"longer", "freelb", "mat"}  # that are known
    expected = 100 * statistics.fmean(found["mat", s] - found["plain", s] for s in study.seeds)
    assert of["words", "mat", "plain"].difference.value == pytest.approx(expected)
    pair = 100 * statistics.fmean(found["mat", s] - found["freelb", s] for s in study.seeds)
    assert f"| words | mat − freelb | PGD 0.1 | {pair:+.1f} ±" in tables.pairs(findings)


@pytest.mark.parametrize("counted", [True, False])
def test_a_model_that_always_answers_the_same_is_not_compared_under_attack(counted: bool):
    """As one that has collapsed to the most frequent label: right on its share at any radius."""
    study, results, findings = world()
    for task, seed, method in study.cells():
        run = study.reported(task, method, seed, results)
        same = (method, seed) == ("mat", 1)
        if counted:
            results[run.key]["answers"] = {"test": 1 if same else 2}
        else:
            score = 0.0 if same else 0.3 + 0.1 * seed
            results[run.key]["last"] = {"test": {"Matthews": score}}
        radii = {"radii": [0.0, 0.1, 0.05], "accuracy": [{"value": 0.5 + 0.1 * seed}] * 3}
        results[study.measured("words", run)] = {"sections": {"radii": radii}}
    assert ("words", "mat", "plain") not in differences(findings, Findings.attacked)
    assert ("words", "mat", "plain") in differences(findings)
    found = summary.verdict(findings, "plain", Findings.attacked)
    assert (len(found.comparisons), found.left_out) == (3, [("words", "mat", "plain")])
    assert not summary.verdict(findings, "plain", Findings.official).left_out


@settings(max_examples=5)
@given(st.integers(3, 12), st.floats(0.001, 0.05), st.integers(0, 10**6))
@example(5, 0.05, 0)  # where scipy knows no value far out
def test_the_smallest_difference_is_found_as_often_as_it_says(seeds: int, level: float, seed: int):
    draws = np.random.default_rng(seed).normal(summary.detectable(seeds, level), 1, (4000, seeds))
    share = float((stats.ttest_1samp(draws, 0, axis=1).pvalue < level).mean())
    assert abs(share - summary.POWER) < 0.04  # over six of its standard errors


def test_power_is_that_of_the_seeds_there_are(tmp_path: Path):
    results = played(build(seeds=(0, 1)), drawn(0))
    some = Findings(build(seeds=(0, 1, 2, 3)), results)
    [found] = summary.smallest(some)
    gaps = []
    for pair in differences(some):
        a, b = (some.official("words", m) for m in pair[1:])
        gaps.append(statistics.stdev(a[s] - b[s] for s in (0, 1)))
    assert found.seeds == 2
    assert found.spread == pytest.approx(statistics.median(gaps))
    for seeds, figure in ((2, found.family), (4, found.design)):
        assert figure == pytest.approx(found.spread * summary.detectable(seeds, 0.05 / len(gaps)))
    text = render(some.study, results, tmp_path, "s")
    assert f"| words | 2 | {found.spread:.1f} | {found.single:.1f} | {found.family:.1f} |" in text
    assert summary.smallest(Findings(build(seeds=(7, 8)), results)) == []


def test_the_correction_is_for_all_that_is_asked_for_whatever_has_run(tmp_path: Path):
    """A study whose first method looks best has not shown it by having run little else."""
    study = build()
    results = played(study, drawn(0))
    whole = Findings(study, results)
    planned = len(differences(whole))
    kept = {"plain", "mat"}
    keys = {
        run.key
        for task, seed, method in study.cells()
        if method in kept and (run := study.reported(task, method, seed, results))
    }
    keys.add(study.reported("words", "noise", 0, results).key)  # one seed of which there is no p
    for method in study.methods:
        keys |= {run.key for runs in study.search("words", method).values() for run in runs}
    some = Findings(study, {key: line for key, line in results.items() if key in keys})
    found = differences(some)
    assert 0 < len(found) < planned
    several = [pair for pair in found if pair.method != "noise"]
    smallest = min(several, key=lambda pair: found[pair].p)
    assert 0 < len(several) < len(found)
    assert all(np.isnan(adjusted(study, found)[pair]) for pair in {*found} - {*several})
    expected = min(1.0, planned * found[smallest].p)
    assert adjusted(study, found)[smallest] == pytest.approx(expected)
    text = render(study, some.results, tmp_path, "s")
    assert f"covers all {planned} comparisons of one metric that the study asks for" in text


def test_every_run_has_a_command_that_trains_the_same():
    """As the script reads it: all that the result depends on, but for where the rows come from."""
    study = read(EXAMPLES / "study" / "study.toml")
    for task, subject in study.tasks.items():
        own = importlib.import_module(subject.script).SCRIPT
        for run in study.first(task):
            words = shlex.split(commands.command(subject.script, replace(run, seed=3)))
            [found] = own.runs(own.arguments(words[2:]))
            assert found == replace(run, seed=3)


UNPINNED = {
    "temperature": 0.0,
    "particles": 1,
    "particle_batching": "loop",
    "direction": "gradient",
    "sign": None,
    "ascent_dtype": None,
    "box": None,
    "recompute": False,
    "mean_over": "samples",
    "start_size": None,
    "source": None,
    "representation": None,
    "head": None,
    "solver": None,
    "which": None,
}
"""Parameters that studies need not write out, and what they are then: a part that is not played."""
IDLE = {
    "smart-gn": {"start": "normal", "start_size": 0.05, "ema_decay": 0.99, "teacher_every": 1},
    "r-drop": {"steps": 0, "step_size": 0.1, "norm": "l2", "per": "sample", "start": "uniform"},
    "r3f": {"steps": 0, "step_size": 0.1},
    "noise": {"steps": 0, "step_size": 0.1},
    "cat": {"steps": 1, "step_size": 0.1, "start": "zero"},
}
"""Of single methods: what moves nothing, as a step where there is none, or belongs to them."""


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("study/**/study.toml")), ids=str)
def test_a_default_that_changes_changes_no_row_of_a_study(path: Path):
    """Rows are known by what the file says: what it leaves out must be as it was."""
    idle = IDLE | {f"smart-gn-{which}": IDLE["smart-gn"] for which in ("2nd", "half")}
    for shared in ("r-drop", "r3f", "noise"):
        idle[shared] |= {"normalize": "steepest", "projection": "ball", "unit": "relative"}
    for name, method in read(path).methods.items():
        known = UNPINNED | idle.get(name, {})
        parts = fields(method.played) if method.played else ()
        for part in (f for f in parts if f.init and f.name not in method.parameters):
            assert part.name in known, f"{name}: write {part.name} out"
            assert part.default == known[part.name], f"{name}: write {part.name} out, it changed"


def test_what_is_evaluated_is_shown(tmp_path: Path):
    """As what is out of scope, or other rows: not the official metric alone."""
    study = build(tasks={"words": replace(TASK, evaluate=("test", "hard"))})
    results = played(study, drawn(0))
    for line in results.values():
        if "test" in line["last"]:
            line["last"] = {
                "test": {"accuracy": 0.5, "recall": 0.25},
                "hard": {"accuracy": 0.125},
            }
    text = render(study, results, tmp_path, "s")
    assert "| method | recall, test | accuracy, hard |" in text
    assert "| freelb | 25.0 ± 0.0 | 12.5 ± 0.0 |" in text


def test_a_task_can_have_methods_of_its_own(tmp_path: Path):
    """As a regression, whose predictions word substitution cannot attack."""
    own = replace(TASK, methods=("plain", "mat"))
    study = build(tasks={"words": TASK, "numbers": own})
    assert {m for task, _, m in study.cells() if task == "numbers"} == {"plain", "mat"}
    assert {m for task, _, m in study.cells() if task == "words"} == {*METHODS}
    text = render(study, played(study, drawn(0)), tmp_path, "study.toml")
    table = text.split("### numbers")[1].split("##")[0]
    assert "| mat |" in table
    assert "freelb" not in table


def test_every_method_has_its_row_also_where_it_loses(tmp_path: Path):
    study = build()
    noise = drawn(0)  # without a spread nothing could be compared
    results = played(
        study, lambda run: (0.9 if run.solver == "plain" else 0.1) + noise(run) / 10**4
    )
    text = render(study, results, tmp_path, "study.toml")
    table = re.search(r"### words.*?\n\n(.*?)\n\n", text, re.S).group(1)
    rows = [[cell.strip() for cell in line.split("|")] for line in table.splitlines()[2:]]
    assert [row[1] for row in rows] == list(METHODS)
    costs = [["1.0", "1.0"], ["3.0", "1.0"], ["1.0", "2.5"], ["3.0", "2.5"], ["3.3", "2.5"]]
    assert [row[2:4] for row in rows] == costs
    assert table.count("**-80.0 ± 0.0**") == 2 * 3
    losers = [f"{method} on words" for method in ("noise", "freelb", "mat")]
    told = ", ".join(f"{loser} (-80.0 ± 0.0)" for loser in losers)
    assert text.count(f"below 0 for {told}.") == 2
    assert text.count(f"correction: {', '.join(losers)}.") == 2
    assert "Missing: 15 of 15 measures of robustness." in text


def test_the_report_does_not_depend_on_the_order_of_results(tmp_path: Path):
    study = build()
    results = played(study, drawn(3))
    shuffled = dict(random.Random(0).sample(list(results.items()), len(results)))
    assert render(study, results, tmp_path, "s") == render(study, shuffled, tmp_path, "s")


def test_what_is_missing_is_counted_and_nothing_is_made_up(tmp_path: Path):
    study = build()
    text = render(study, {}, tmp_path, "study.toml")
    assert "Missing: 15 of 15 runs, 15 of 15 measures of robustness." in text
    assert "No run is finished on: words." in text
    assert "### words" not in text
    assert not list(tmp_path.glob("*.png"))
    results = played(study, drawn(0))
    gone = study.reported("words", "mat", 1, results)
    del results[gone.key]
    findings = Findings(study, results)
    assert summary.missing(findings) == {"runs": 1, "measures of robustness": 15}
    assert differences(findings)["words", "mat", "plain"].seeds == (0, 2)


def test_regressions_are_trained_and_not_measured():
    study, results, _ = world()
    for line in results.values():
        line["classifies"] = False
    assert not summary.missing(Findings(study, results))


def test_a_single_seed_has_no_interval_and_no_verdict(tmp_path: Path):
    study, results, _ = world(seeds=(4,))
    text = render(study, results, tmp_path, "study.toml")
    assert "±" not in text
    assert text.count("With one seed there is no interval, and nothing is significant.") == 2
    assert not tables.power(Findings(study, results))
    assert "95 %" not in text.split("## Official metrics")[1]
    assert "none; below" not in text


def test_a_single_rate_is_searched_for_nowhere(tmp_path: Path):
    single = replace(TASK, learning_rates=(0.1,))
    for tasks in ({"words": single}, {"words": single, "more": TASK}):
        study = build(tasks=tasks)
        text = render(study, played(study, drawn(0)), tmp_path, "study.toml")
        assert "There was no search where one learning rate is given." in text
        assert ("of runs with seed 100 on" in text) == (len(tasks) == 2)
        assert re.search(r"^\| mat \| 0.1 \|", text.split("## Learning rates")[1], re.M)


# Running it ------------------------------------------------------------------------------------

WORDS = {"red": ["great", "story"], "blue": ["sluggish", "weak"]}
TOML = """
model = "{model}"
seeds = [2]
hold_out = 4
references = ["plain", "longer"]
[methods]
plain = {{}}
longer = {{ times = 2 }}
mat = {{ solver = "mat", parameters = {{ samples = 2 }} }}
[tasks.words]
script = "intent"
limit = 16
epochs = {epochs}
batch_size = 8
max_length = 16
learning_rates = [1e-2, 1e-3]
evaluate = ["test"]
attacks = ["typos"]
[tasks.words.shifted.others]
hub = ["someone/others"]
folder = "others"
split = "dev"
[measure]
rows = 4
clean_rows = 8
steps = 1
restarts = 1
radii = [0.1]
"""


@pytest.fixture(autouse=True)
def _alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Give each test its own cache of data, and run its jobs here."""
    monkeypatch.setattr(script.pool, "side_by_side", one_by_one())
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder with a tiny encoder, data sets, and a study of two methods and one task."""
    tokenizer = word_tokenizer()
    for saved in (tokenizer, tiny(transformers.BertModel, tokenizer)):
        saved.save_pretrained(tmp_path / "tiny")
    for name, splits in {"words": ("train", "test"), "others": ("dev",)}.items():
        for split in splits:
            path = tmp_path / "data" / name / f"{split}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            draw, lines = random.Random(f"{name}{split}"), []
            for _ in range(24):
                label = draw.choice(list(WORDS))
                text = " ".join([*draw.choices(["the", "was"], k=3), draw.choice(WORDS[label])])
                lines.append(json.dumps({"text": text, "label": label}) + "\n")
            path.write_text("".join(lines))
    (tmp_path / "study").mkdir()
    (tmp_path / "study" / "study.toml").write_text(TOML.format(model=tmp_path / "tiny", epochs=2))
    return tmp_path


def arguments(folder: Path) -> list[str]:
    """Return the command line of the study in a folder."""
    toml, runs = folder / "study" / "study.toml", folder / "runs"
    return [str(toml), "--data", str(folder / "data"), "--runs", str(runs), "--workers", "1"]


def report(folder: Path) -> str:
    """Return the report in a folder, without what an update took, which no two runs share."""
    text = (folder / "study" / "report.md").read_text()
    text, count = re.subn(r"(?m)^(\| [\w-]+ \| \d\.\d) \| \d+\.\d \|", r"\1 | time |", text)
    assert count == 3
    return text


def one_by_one(limit: int = 10**6) -> Callable[..., Iterator[Any]]:
    """Return a pool that runs its jobs here, and is interrupted after some."""

    def run(ready: Callable[[], Iterable[tuple[str, pool.Job]]], workers: int) -> Iterator[Any]:
        for _ in range(limit):
            job = next(iter(ready()), None)
            if job is None:
                return
            _, (function, given) = job
            yield function(*given)
        raise KeyboardInterrupt

    return run


@pytest.mark.slow
def test_a_study_runs_and_goes_on_to_the_same_report(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    assert script.main(arguments(folder)) == 0
    text = report(folder)
    assert capsys.readouterr().out == (folder / "study" / "report.md").read_text() + "\n"
    assert "Missing: nothing." in text
    for column in ("PGD 0.1", "loss increase", "others drop", "under typos", "ECE"):
        assert column in text
    lines = (folder / "study" / "results.jsonl").read_text()
    # runs of the searches, those that are reported, and what was measured
    assert len(lines.splitlines()) == 3 * (2 + 1 + 1)
    measured = [of for of in map(json.loads, lines.splitlines()) if "sections" in of]
    assert {of["sections"]["about"]["seed"] for of in measured} == {2}  # its rows, not those of all
    assert "sluggish" not in lines  # results are to be published, and the texts may not be
    for name in ("convergence.png", "gains.png", "costs.png", "attacked.png"):
        assert (folder / "study" / name).read_bytes().startswith(b"\x89PNG")

    monkeypatch.setattr(pool, "side_by_side", one_by_one(0))  # nothing is left to run
    with pytest.raises(KeyboardInterrupt):
        script.main(arguments(folder))
    assert (folder / "study" / "results.jsonl").read_text() == lines
    assert script.main([*arguments(folder), "--report"]) == 0
    assert report(folder) == text

    toml = folder / "study" / "study.toml"
    toml.with_name("other.toml").write_text(toml.read_text())
    other = [str(toml.with_name("other.toml")), *arguments(folder)[1:]]
    assert script.main(other) == 2  # the report of the first would be lost
    assert "report.md is of study.toml and would be lost" in capsys.readouterr().err

    train = folder / "data" / "words" / "train.jsonl"
    train.write_text(train.read_text() + train.read_text().splitlines()[0] + "\n")
    work.load.cache_clear()  # it is another process that finds other data
    assert script.main(arguments(folder)) == 2
    message = capsys.readouterr().err
    assert "words has {'train': 25, 'test': 24} rows, and results hold words-" in message
    train.write_text("".join(train.read_text().splitlines(keepends=True)[:24]))
    work.load.cache_clear()

    for path in (folder / "study").glob("r*"):
        path.unlink()
    (folder / "runs").rename(folder / "first")
    monkeypatch.setattr(pool, "side_by_side", one_by_one(5))
    with pytest.raises(KeyboardInterrupt):
        script.main(arguments(folder))
    monkeypatch.setattr(pool, "side_by_side", one_by_one())
    assert script.main(arguments(folder)) == 0
    assert report(folder) == text


def test_runs_that_diverge_are_named_and_stop_nothing(folder: Path):
    toml = folder / "study" / "study.toml"
    toml.write_text(toml.read_text().replace("[1e-2, 1e-3]", "[1e30]"))
    assert script.main(arguments(folder)) == 0
    text = report(folder)
    assert "Missing: nothing. Diverged, so that robustness was not measured: plain on" in text
    for method in ("plain", "longer", "mat"):
        assert f"{method} on words with seed 2" in text


@pytest.mark.slow
def test_a_study_that_is_killed_goes_on_to_the_same_report(folder: Path):
    toml = folder / "study" / "study.toml"
    toml.write_text(TOML.format(model=folder / "tiny", epochs=20))
    command = [sys.executable, str(EXAMPLES / "study.py"), *arguments(folder)]
    environment = os.environ | {"HF_DATASETS_CACHE": str(folder / "cache")}
    results = folder / "study" / "results.jsonl"

    def start() -> subprocess.Popen[bytes]:
        return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)

    whole = start()
    assert whole.wait(timeout=900) == 0
    text = report(folder)
    (folder / "runs").rename(folder / "first")
    for path in (folder / "study").glob("r*"):
        path.unlink()
    killed = start()
    deadline = time.monotonic() + 600
    while not (results.exists() and len(results.read_text().splitlines()) >= 3):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert len(results.read_text().splitlines()) < 12
    time.sleep(3)  # its workers see that it is gone
    again = start()
    assert again.wait(timeout=900) == 0
    assert report(folder) == text


@pytest.mark.parametrize("workers", [1, 2])
def test_jobs_run_side_by_side_and_those_that_follow_from_others_come_later(
    workers: int, capfd: pytest.CaptureFixture[str]
):
    known: dict[str, int] = {}

    def ready() -> Iterator[tuple[str, pool.Job]]:
        for number in range(3):
            if str(number) not in known:
                yield str(number), (divmod, (number, 1))
        if len(known) == 3:
            yield "sum", (divmod, (sum(known.values()), 1))

    for found, _ in side_by_side(ready, workers):
        known["sum" if len(known) == 3 else str(found)] = found
    assert known == {"0": 0, "1": 1, "2": 2, "sum": 3}
    said = [line.split(" ", 1)[1] for line in capfd.readouterr().err.splitlines()]
    expected = [f"{key} {what}" for key in known for what in ("has started", "is finished")]
    assert sorted(said) == sorted(expected)  # in a file too, where there is no terminal


def test_a_thread_of_a_worker_that_waits_for_the_others_leaves_them_its_core():
    """Else one worker, which takes all cores, stands almost still beside another program."""
    known: list[str] = []
    jobs = lambda: [] if known else [("asks", (os.getenv, ("OMP_WAIT_POLICY",)))]  # noqa: E731
    known.extend(side_by_side(jobs, 1))
    assert known == ["passive"]


BUSY = """
import signal, sys, time
sys.path[:0] = {paths}
from studying import pool
if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a shell's background
    list(pool.side_by_side({{"long": (time.sleep, (100,))}}.items, 1))
"""


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupt_ends_a_study_at_once_and_leaves_nothing(how: int, tmp_path: Path):
    (tmp_path / "busy.py").write_text(BUSY.format(paths=[str(EXAMPLES), str(EXAMPLES.parent)]))
    command = [sys.executable, str(tmp_path / "busy.py")]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as busy:
        assert busy.stderr.readline().endswith("long has started\n")
        time.sleep(1)  # its worker is on its way
        busy.send_signal(how)
        said = busy.stderr.read()  # its end is when worker and tracker are gone as well
        assert busy.wait(timeout=60) == -how
    assert "leaked" not in said
    assert said.count("Traceback") == (how == signal.SIGINT)


def test_a_job_that_fails_ends_the_study_and_loses_nothing_of_others():
    jobs = {"fails": (divmod, (1, 0)), "works": (time.sleep, (1,)), "later": (divmod, (3, 2))}
    results = side_by_side(jobs.items, 2)
    assert next(results) is None  # that of time.sleep
    with pytest.raises(ZeroDivisionError) as failure:
        next(results)
    assert failure.value.__notes__ == ["In fails."]


@pytest.mark.parametrize(
    ("visible", "given"), [("2,3", "3"), (None, "1"), ("GPU-a,GPU-b", "GPU-b")]
)
def test_a_worker_takes_a_gpu_of_those_that_are_allowed(
    visible: str | None, given: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    monkeypatch.setattr(signal, "signal", lambda number, action: None)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    numbers: queue.Queue[int] = queue.Queue()
    numbers.put(1)
    pool._prepare(numbers, 2, os.getppid())
    assert os.environ["CUDA_VISIBLE_DEVICES"] == given


def test_a_line_that_a_kill_has_torn_is_written_anew(tmp_path: Path):
    path = tmp_path / "results.jsonl"
    for key in "ab":
        append(path, {"key": key})
    path.write_text(path.read_text()[:-4])
    assert list(finished(path)) == ["a"]
    append(path, {"key": "c"})
    assert list(finished(path)) == ["a", "c"]
    assert len(path.read_text().splitlines()) == 2


def test_a_second_study_stays_away_from_the_results_of_one_that_runs(
    folder: Path, capsys: pytest.CaptureFixture[str]
):
    with script.alone(folder / "study" / "results.jsonl"):
        assert script.main(arguments(folder)) == 2
    assert "is being written by a study that runs already" in capsys.readouterr().err


# Mistakes --------------------------------------------------------------------------------------

MISTAKES = {
    "methods": ("[methods]", "[method]", "methods is missing, table of those .* method: there is"),
    "word": ("hold_out = 4", "held_out = 4", "held_out: there is none of this name"),
    "solver": ('solver = "mat"', 'solver = "mats"', "mats: there is none of this name"),
    "parameter": ("samples = 2", "sample = 2", "sample"),
    "plain": ("plain = {{}}", 'free = {{ solver = "freelb" }}', "methods need plain"),
    "no plain": ("plain = {{}}", 'plain = {{ solver = "freelb" }}', "methods need plain"),
    "no list": ('evaluate = ["test"]', 'evaluate = "test"', "evaluate must be a list, got 'test'"),
    "seeds": ("seeds = [2]", "seeds = 0", "seeds must be a list, got 0"),
    "no epochs": ("epochs = {epochs}\n", "", "words.epochs is missing, passes over the rows"),
    "no hold-out": ("hold_out = 4", "hold_out = 0", "hold_out must be at least 1, got 0"),
    "hold-out": ("hold_out = 4", "hold_out = 400", "words: .*400"),
    "pair": ("hold_out = 4", 'hold_out = 4\npairs = [["mat"]]', "pairs are of two methods each"),
    "pairs": ("hold_out = 4", 'hold_out = 4\npairs = [["mat", "cat"]]', "pairs: cat: there is no"),
    "table": (
        "[methods]\nplain = {{}}",
        "methods = 3\n[o]\nplain = {{}}",
        "methods must be a table, got 3",
    ),
    "method": ("plain = {{}}", "plain = 3", "methods.plain must be a table, got 3"),
    "length": ("max_length = 16", "max_length = 160", "max_length is 160, and .* reads 48 tokens"),
    "model": ('model = "{model}"', 'model = "{model}r"', "The model .*tinyr cannot be loaded"),
    "begins": (
        "plain = {{}}",
        'plain = {{}}\nw = {{ model = "./of-{{seed}}" }}',
        "methods.w: model: there is no ./of-100",
    ),
    "no radii": ("radii = [0.1]", "radii = []", "radii is empty"),
    "words": ('attacks = ["typos"]', 'attacks = ["typo"]', "--neighbours typo: there is no such"),
    "other": ('split = "dev"', 'split = "test"', "others has no split test, it has dev"),
    "anli": ('script = "intent"', 'script = "anli"', "anli needs train"),
    "one alone": ("plain = {{}}", "plain = {{}}\nw = {{ substitute = 0.2 }}", "give both or none"),
    "split": ('evaluate = ["test"]', 'evaluate = ["dev"]', "has no split dev, it has test"),
    "rates": ("[1e-2, 1e-3]", "[]", "learning_rates is empty"),
    "rates twice": ("[1e-2, 1e-3]", "[1e-2, 1e-2]", "learning_rates must all differ"),
    "itself": ("hold_out = 4", 'hold_out = 4\npairs = [["mat", "mat"]]', "which differ, got"),
    "twice": ('["plain", "longer"]', '["plain", "plain"]', "references must all differ"),
    "no task": ('script = "intent"', 'script = "glue"', "--task words: there is none of this name"),
    "rate": ("[1e-2, 1e-3]", "[-1.0]", "learning_rate must be positive, got -1.0"),
    "shifted": (
        'folder = "others"\n',
        "",
        "shifted.others.folder is missing, its folder of --data",
    ),
    "seed": ("seeds = [2]", "seeds = [100]", "must all differ"),
    "rows": ("rows = 4", "rows = 0", "measure.rows must be greater than or equal to 1, got 0"),
    "half a step": ("steps = 1", "steps = 1.5", "measure.steps must be a valid integer, got 1.5"),
    "no radius": (
        "radii = [0.1]",
        "radii = [nan]",
        "measure.radii.0 must be a finite number, got nan",
    ),
    "a share of a row": (
        "limit = 16",
        "limit = 16.0",
        "words.limit must be a valid integer, got 16.0",
    ),
    "no name": ('model = "{model}"', "model = 3", "model must be a valid string, got 3"),
    "a seed": ("seeds = [2]", 'seeds = ["a"]', "seeds.0 must be a valid integer, got 'a'"),
    "below": ("seeds = [2]", "seeds = [-1]", "seed must be at least 0, got -1"),
    "hub": ('hub = ["someone/others"]', 'hub = "others"', "hub must be a list, got 'others'"),
    "no own": (
        'evaluate = ["test"]',
        'evaluate = ["test"]\nmethods = ["mat"]',
        "words: methods need plain",
    ),
    "reference": (
        'references = ["plain", "longer"]',
        'references = ["shorter"]',
        "references: shorter: there is none of this name",
    ),
    "times": ("times = 2", "times = 0", "longer.times must be greater than 0, got 0"),
    "every": ("times = 2", "every = 2", "every and share are of what a solver plays"),
    "label smoothing": (
        "times = 2",
        "label_smoothing = 2",
        "label_smoothing must be a share in .0, 1., got 2",
    ),
    "one epoch": (
        "plain = {{}}",
        'plain = {{}}\nw = {{ substitute = 0.2, neighbours = "typos" }}\n',
        "words: substitute perturbs rows before each epoch but the first, .* epochs is 1",
    ),
    "settings": (
        "limit = 16",
        "settings = {{ limit = 16 }}",
        "words.settings: there is none of this name",
    ),
    "syntax": ("seeds = [2]", "seeds = [2", "study.toml"),
}


def test_the_manual_has_every_key_and_its_default(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        script.arguments(["--help"])
    text = capsys.readouterr().out
    for line in ("  [tasks.NAME.shifted.SET]", "  epochs   ", "  seeds = [0, 1, 2]   "):
        assert f"\n{line}" in text
    for kind in (Study, Method, Subject, Measures):
        for part in fields(kind):
            assert re.search(rf"^  {part.name}( = \S.*)?  +\w.*", text, re.M), part.name


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_answered_with_one_line(
    folder: Path, mistake: str, capsys: pytest.CaptureFixture[str]
):
    old, new, message = MISTAKES[mistake]
    assert old in TOML
    epochs = 1 if mistake == "one epoch" else 2
    text = TOML.replace(old, new, 1).format(model=folder / "tiny", epochs=epochs)
    (folder / "study" / "study.toml").write_text(text)
    assert script.main(arguments(folder)) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("study: ")
    assert re.search(message, line), line
    assert not (folder / "study" / "report.md").exists()


def test_a_shifted_set_with_other_labels_is_refused_before_the_first_run(
    folder: Path, capsys: pytest.CaptureFixture[str]
):
    path = folder / "data" / "others" / "dev.jsonl"
    path.write_text(path.read_text().replace('"blue"', '"green"'))
    assert script.main(arguments(folder)) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert re.search("others, row .*green", line), line


def test_a_model_is_measured_when_its_run_is_done(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """A run that was killed between its model and its line leaves a model that is written again."""
    study = read(folder / "study" / "study.toml")
    results: dict[str, Any] = {}
    score = drawn(0)
    for run in (r for *_, runs in study.stages({}) for r in runs):
        results[run.key] = {"key": run.key, "last": {"held-out": {"accuracy": score(run)}}}
    reported = [run for _, stated, runs in study.stages(results) if stated for run in runs]
    for run in reported:
        (folder / "runs" / run.key / "last").mkdir(parents=True, exist_ok=True)
    asked: list[str] = []

    def only_asked(
        ready: Callable[[], Iterable[tuple[str, pool.Job]]], workers: int
    ) -> Iterator[Any]:
        asked.extend(key for key, _ in ready())
        yield from ()

    monkeypatch.setattr(pool, "side_by_side", only_asked)
    monkeypatch.setattr(script, "finished", lambda path: results)
    options = script.arguments(arguments(folder))
    script.work_through(study, folder / "study" / "results.jsonl", options)
    assert set(asked) == {run.key for run in reported}
    done = reported[0]
    results[done.key] = {"key": done.key, "last": {"test": {"accuracy": 0.5}}}
    asked.clear()
    script.work_through(study, folder / "study" / "results.jsonl", options)
    assert set(asked) == {run.key for run in reported[1:]} | {study.measured("words", done)}
    assert asked[0] == study.measured("words", done), "its model could be lost meanwhile"


def test_a_study_that_is_stopped_early_compares_all_methods():
    study = build()
    results = played(study, drawn(0))
    seeds = [run.seed for _, stated, runs in study.stages(results) if stated for run in runs]
    methods = len(study.trained("words"))
    assert seeds == [0, 1] * methods + [2] * methods


def test_where_the_adversary_enters_is_compared_with_runs_of_the_study():
    """Methods of both are the same ones: a line of one study does for the other."""
    whole, where = (read(EXAMPLES / "study" / name / "study.toml") for name in ("", "where"))
    theirs = {run.key for run in whole.runs("banking77", {})}
    assert read(EXAMPLES / "study" / "glue" / "study.toml").methods == whole.methods
    shared = {*whole.methods} & {*where.methods}
    assert shared == {"plain", "plain-3x", "smart"}
    for method in shared:
        for runs in where.search("banking77", method).values():
            assert {run.key for run in runs} <= theirs


def test_there_is_no_report_without_results(folder: Path, capsys: pytest.CaptureFixture[str]):
    assert script.main([*arguments(folder), "--report"]) == 2
    assert "has no results yet" in capsys.readouterr().err
    assert script.main(["nowhere.toml"]) == 2
    assert "There is no study nowhere.toml" in capsys.readouterr().err


def test_what_needs_classes_is_not_played_on_numbers():
    """A divergence of one column is 0, and no label can be smoothed."""
    study = read(EXAMPLES / "study" / "glue" / "study.toml")
    for name in study.trained("stsb"):
        method = study.methods[name]
        assert method.label_smoothing == method.substitute == 0.0
        assert "divergence" not in method.parameters
    assert set(study.references) <= {*study.trained("stsb")}


def test_every_line_that_is_published_is_read():
    """A row whose key has changed would be trained again, and its line kept for nothing."""
    path = EXAMPLES / "study" / "study.toml"
    study, results = read(path), finished(path.parent / "results.jsonl")
    known: set[str] = set()
    for task in study.tasks:
        runs = study.runs(task, results)
        known |= {run.key for run in runs} | {study.measured(task, run) for run in runs}
    assert results.keys() <= known


@pytest.mark.slow
def test_the_study_that_is_published_can_be_read_and_its_report_follows_from_its_results(
    tmp_path: Path,
):
    path = EXAMPLES / "study" / "study.toml"
    study = read(path)
    results = finished(path.parent / "results.jsonl")
    text = render(study, results, tmp_path, script.command_of(path))
    assert text == (path.parent / "report.md").read_text()
