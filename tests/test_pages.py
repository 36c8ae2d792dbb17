"""ALL and the site are true: code runs, commands exist, tables are results, links lead on."""

import functools
import importlib
import json
import re
import shlex
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import accelerate
import lightning
import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn

import anchored
import common
import digits
import directions
import games_compared
import masked_loss
import mixadv
import mixture_cost
import mixtures
import pretrain
import rare_intents
from benchmark_parts import results as benchmark_results
from benchmark_parts.contenders import CONTENDERS
from common.language import shown
from common.results import finished
from mixadv.games import METHODS, PARTICLE_METHODS
from mixadv.neurons import NeuronAnalysis, analysis
from mixadv.round.cost import count_passes
from tests.chat_zoo import chatting, speaking
from tests.pages import ALL, FENCE, GENERATED, PAGES, ROOT, TABLES, marked
from tests.processes import one_process
from tests.sentence_zoo import PAIRS, cross_encoder, encoder, sparse_encoder
from tests.substitution_zoo import word_tokenizer
from tests.zoo import player

NUMBER = r"\d+(?:\.\d+)?"
MAKEFILE = (ROOT / "Makefile").read_text()


WITH_CODE = [
    name
    for name, text in PAGES.items()
    if name != "docs/migration.md" and any(found[1] == "python" for found in FENCE.finditer(text))
]


def blocks(text: str, *languages: str) -> Iterator[tuple[int, str]]:
    """Yield the line before each fenced block in one of the languages, and the block."""
    for found in FENCE.finditer(text):
        if found[1] in languages:
            yield text[: found.start(2)].count("\n"), found[2]


def prelude() -> dict[str, Any]:
    """Return what pages take for granted: a model, its data, a training loop."""
    model, batch, _ = player("bert", rows=8)
    tokenizer, words = word_tokenizer(), {"num_hidden_layers": 1, "hidden_dropout_prob": 0.1}
    size = transformers.BertConfig(
        vocab_size=len(tokenizer), hidden_size=12, intermediate_size=12, **words
    )
    texts = ["The film was really good", "A slow plot and a bad actor"]
    masks = transformers.DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.5, seed=0)
    masked = masks([dict(tokenizer(text)) for text in texts])
    chat_tokenizer = chatting()
    quiet: Any = {"use_cpu": True, "disable_tqdm": True, "report_to": []}
    adamw = torch.optim.AdamW(model.parameters(), lr=2e-5)
    optimizer = mixadv.wrap(adamw, model, mixadv.MAT(samples=3))
    optimizer.step(lambda: model(**batch))
    return {
        "arguments": transformers.TrainingArguments(max_steps=3, **quiet),  # resets accelerators
        "torch": torch,
        "nn": nn,
        "F": F,
        "transformers": transformers,
        "mixadv": mixadv,
        "model": model,
        "batch": batch,
        "other_batch": player("bert", rows=6, seed=1).batch,
        "loader": [batch, batch],
        "optimizer": optimizer,
        "game": optimizer.game,
        "scheduler": SimpleNamespace(step=lambda: None),
        "accelerator": accelerate.Accelerator(cpu=True),
        "device": "cpu",
        "tokenizer": tokenizer,
        "texts": texts,
        "labels": [1, 0],
        "classifier": transformers.BertForSequenceClassification(size),
        "language_model": transformers.BertForMaskedLM(size),
        "masked_loader": [masked, masked],
        "chat_model": speaking("Llama", chat_tokenizer),
        "chat_tokenizer": chat_tokenizer,
        "rows": [dict(zip(batch, row, strict=True)) for row in zip(*batch.values(), strict=True)],
    }


def sentences() -> dict[str, Any]:
    """Return what a page on sentence-transformers takes for granted."""
    import sentence_transformers as st

    quiet: Any = {"use_cpu": True, "disable_tqdm": True, "report_to": [], "max_steps": 1}
    return {
        "encoder": encoder(Path()),
        "pairs": PAIRS,
        "sentence_arguments": st.SentenceTransformerTrainingArguments("sentences", **quiet),
        "reranker": cross_encoder(Path("reranker")),
        "judged_pairs": PAIRS.add_column("label", [1.0, 0.0] * (len(PAIRS) // 2)),
        "reranker_arguments": st.CrossEncoderTrainingArguments("reranked", **quiet),
        "sparse_encoder": sparse_encoder(Path("words")),
        "sparse_arguments": st.SparseEncoderTrainingArguments("sparse", **quiet),
    }


def commands(program: str) -> list[list[str]]:
    """Return the arguments of each call of a program, in shell blocks and code spans."""
    shell = [block for _, block in blocks(ALL, "bash", "sh", "shell", "console")]
    spans = re.findall(r"`([^`\n]+)`", FENCE.sub("", ALL))
    lines = "\n".join([*shell, *spans]).replace("\\\n", " ").splitlines()
    called = [shlex.split(line, comments=True) for line in lines if f"{program} " in line]
    return [
        words[i + 1 :]
        for words in called
        for i, word in enumerate(words)
        if Path(word).name == program
    ]


@pytest.fixture
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Give a group of one process, a compiler that is quick, and a folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    with one_process(tmp_path):
        yield
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("name", WITH_CODE)
def test_every_python_block_runs_one_after_another(name: str):
    variables = {} if name == "docs/start.md" else prelude()
    if name == "docs/howto/trainer.md":
        variables |= sentences()
    for line, block in blocks(PAGES[name], "python"):
        exec(compile("\n" * line + block, name, "exec"), variables)
    assert all(p.isfinite().all() for p in variables["model"].parameters())
    if name == "docs/howto/lightning.md":
        module = variables["Classifier"](player("bert", rows=8).model)
        loop = lightning.Trainer(
            max_epochs=2, accelerator="cpu", logger=False, default_root_dir="."
        )
        with warnings.catch_warnings(action="ignore"):  # Lightning's: few workers, no logger, …
            loop.fit(module, *2 * [torch.utils.data.DataLoader(variables["rows"], 4)])
        assert module.game.learner.rounds == 2


def numbers(text: str) -> tuple[str, list[float]]:
    """Return a text without its numbers, and these."""
    return re.sub(NUMBER, "#", text), [float(found) for found in re.findall(NUMBER, text)]


def test_get_started_prints_what_it_says(capsys: pytest.CaptureFixture[str]):
    page = PAGES["docs/start.md"]
    plain = "solver = mixadv.PGD(steps=3, radius=0, step_size=0.1)"
    code = "\n".join(block for _, block in blocks(page, "python"))
    explained, printed, of_plain = (block for _, block in blocks(page, "text"))
    for program, said in (
        (code, explained + printed),
        (re.sub(r"(?m)^solver = .*$", plain, code), of_plain),
    ):
        exec(compile(program, "first.py", "exec"), {})
        words, found = numbers(capsys.readouterr().out)
        expected, close = numbers(said)
        assert words.endswith(expected)
        assert found[len(found) - len(close) :] == pytest.approx(close, rel=0.2, abs=0.05)


def test_every_make_command_is_a_target():
    targets = set(re.findall(r"^([a-z-]+):", MAKEFILE, re.MULTILINE))
    named = commands("make")
    assert named
    words = {word for words in named for word in words}
    assert {word for word in words if "=" not in word and not word.startswith("-")} <= targets


def test_every_script_called_exists_and_takes_its_arguments():
    called = [words for words in commands("python") if words[0].startswith("examples/")]
    called += [line.split() for line in re.findall(r"python (examples/.*)", MAKEFILE)]
    assert called
    for script, *arguments in called:
        assert (ROOT / script).is_file(), script
        if not arguments:
            continue
        module = importlib.import_module(Path(script).stem)
        options = module.arguments(arguments)
        if hasattr(module, "runs"):
            assert module.runs(options)


@pytest.mark.parametrize("path", TABLES, ids=str)
def test_the_tables_of_solvers_are_those_of_the_registry(path: Path):
    """`python -m tests.pages` writes them."""
    assert marked("solvers", path.read_text(encoding="utf-8")) == TABLES[path]()


def test_readme_is_of_two_screens():
    assert len(PAGES["README.md"].splitlines()) <= 200


def test_the_passes_of_ways_to_mix_are_those_counted():
    table = marked("mat", ALL)
    for line in table.splitlines()[2:]:
        code, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        solver = eval(code.split("`")[1], {"MAT": mixadv.MAT})
        p = count_passes(solver)
        counts = [p.forwards, p.delta_backwards, p.theta_backwards, p.steps]
        assert cells == [*map(str, counts), f"{p.plain_steps:.1f}"], code


@pytest.mark.parametrize("name", ["demo", "banking77", "cola", "anli", "fast", "pretrained"])
def test_measured_tables_are_those_of_the_results(name: str):
    lines = (ROOT / "examples" / "results" / f"{name}.jsonl").read_text().splitlines()
    assert common.table([json.loads(line) for line in lines]) in ALL


@pytest.mark.parametrize("name", ["equilibrium", "bounds", "attack", "attack_game", "evaluate"])
def test_tables_are_those_of_the_results(name: str):
    assert (ROOT / "examples" / "results" / f"{name}.md").read_text() in ALL


def test_the_table_of_masked_losses_is_that_of_the_results():
    lines = (ROOT / "examples" / "results" / "masked_loss.jsonl").read_text().splitlines()
    assert masked_loss.table([json.loads(line) for line in lines]) in ALL


@pytest.mark.parametrize("script", [anchored, digits, rare_intents])
def test_the_tables_of_arms_are_those_of_the_results(script: Any):
    assert script.table(list(finished(script.OUTPUT).values())) in ALL


def test_the_tables_of_mixtures_are_those_of_the_results():
    folder = ROOT / "examples" / "results" / "mixtures"
    found = list(finished(folder / "results.jsonl").values())
    assert marked("mixtures", ALL) == mixtures.table(found)
    assert marked("mixtures_paired", ALL) == mixtures.paired(found)


@pytest.mark.parametrize("objective", ["mlm", "alum", "electra", "macbert"])
def test_tables_of_pre_training_are_those_of_the_results(objective: str):
    log = ROOT / "examples" / "results" / "pretrain" / f"{objective}.json"
    table, _, _ = pretrain.table(json.loads(log.read_text())).partition("\n\n")
    assert table in ALL  # the page explains the columns in its own words


def test_the_tables_of_a_language_model_are_its_results():
    found = finished(ROOT / "examples" / "results" / "language_model.jsonl")
    assert all(table in ALL for table in shown.tables(list(found.values())).split("\n\n"))


def test_the_table_of_other_solvers_is_that_of_the_results():
    lines = (ROOT / "examples" / "results" / "games_compared.jsonl").read_text().splitlines()
    assert games_compared.table([json.loads(line) for line in lines]) in ALL


def test_the_table_of_methods_is_that_of_the_registry():
    table = marked("methods", ALL)
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]
    registry = {**METHODS, **PARTICLE_METHODS}
    assert [row[0] for row in cells] == [f"`{name}`" for name in registry]
    for (*_, bound, output, paper), method in zip(cells, registry.values(), strict=True):
        proved = getattr(method, "bound", "none")
        assert bound == ("–" if proved == "none" else proved)
        assert (output, paper) == (method.output, method.paper)


def test_the_table_of_neurons_is_that_of_the_analyses():
    folder = ROOT / "examples" / "results" / "neurons"
    names = ("before", "plain", "freelb", "words")
    found = {
        name: NeuronAnalysis(**json.loads((folder / f"{name}.json").read_text())) for name in names
    }
    assert analysis.table(found) in ALL


def anchor(heading: str) -> str:
    """Return the anchor that a heading gets: lower case, no punctuation, hyphens for spaces."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def anchors(text: str) -> set[str]:
    return {anchor(h) for h in re.findall(r"^#+ (.*)$", FENCE.sub("", text), re.MULTILINE)}


@pytest.mark.parametrize("name", PAGES)
def test_every_relative_link_and_picture_exists(name: str):
    text = re.sub(r"`[^`\n]*`", "", FENCE.sub("", PAGES[name]))
    targets = re.findall(r"\]\(([^)\s]+)[^)]*\)", text)
    targets += re.findall(r"""(?:src|srcset|href)=["']([^"']+)["']""", text)
    targets += re.findall(r"^\[[^\]]+\]:\s*(\S+)", text, re.MULTILINE)
    for target in targets:
        if re.match(r"[a-z]+:", target):
            continue
        path, _, fragment = target.partition("#")
        found = (ROOT / name).parent / path if path else ROOT / name
        assert found.exists() or found in GENERATED, target
        assert not fragment or fragment in anchors(found.read_text(encoding="utf-8")), target


def test_the_tables_of_costs_are_those_of_the_results():
    found = marked("speed", ALL)
    kept = benchmark_results.load(ROOT / "examples" / "results" / "benchmark.jsonl")
    where = {"model": "bert", "batch": 16, "length": 128, "dropout": 0.0, "device": "cpu"}
    shown = [row for row in kept if where.items() <= row.items() and row["threads"] == 1]
    usual = [row for row in shown if not CONTENDERS[row["row"]].extra]
    assert found == benchmark_results.report(usual)
    whole = ROOT / "examples" / "results" / "benchmark.md"
    assert whole.read_text().strip() == benchmark_results.report(kept)


def test_the_table_of_what_mixtures_cost_is_that_of_the_results():
    found = marked("mixture_cost", ALL)
    lines = mixture_cost.OUTPUT.read_text().splitlines()
    assert found == mixture_cost.table(map(json.loads, lines))


def test_the_table_of_directions_is_that_of_the_results():
    found = marked("directions", ALL)
    folder = ROOT / "examples" / "results" / "directions"
    assert found == directions.summary(directions.kept(folder)).strip()
