"""Which solver works with which way of training: a table that is written by the tests that ran.

    python -m tests.matrix [WORD ...]

runs for each cell the tests that prove it, and writes `tests/matrix.md` and its copy in docs/. A
way is registered by one line in `WAYS`; a cell is ✔ if its tests passed, – where they passed by
being refused, with the reason that the user reads (`tests.zoo.or_refused` notes it), and ✔ with the
reason where they went on with the change that it names. After words, only ways with one of them in
their names are run. Rows that were not run, or whose tests were all skipped since a package is not
installed, stay as they were written.
"""

import re
import sys
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from itertools import chain
from pathlib import Path

import pytest

import mixadv
from tests.zoo import CHANGED, REFUSED, TRANSFORMERS

ROOT = Path(__file__).parent.parent
TABLE = ROOT / "tests" / "matrix.md"
PAGE = ROOT / "docs" / "howto" / "ways.md"
OTHERS = ("gpt2", "llama", "t5", "bart")
ENCODERS = [family for family in TRANSFORMERS if family not in OTHERS]
Cell = tuple[str, str]  # its mark, and the reason where there is one
MARKED = re.compile(r"(?<=<!-- ways -->\n).*?(?=<!-- /ways -->)", re.DOTALL)

HALVES = "test_zoo.py::test_every_solver_halves_the_loss_and_perturbs_every_sample"
DOORS = "test_recomputation.py::test_three_doors_deliver_the_same_gradients"
CHECKPOINTED = "test_checkpointing.py::test_checkpointed_rounds_equal_plain_ones"
AUTOCAST = "gradients_under_autocast_are_those_of_full_precision_within_rounding"
FITS = "a_batch_that_does_not_fit_is_freed_and_played_in_smaller_parts"
INTERRUPTED = "test_an_interrupted_round_leaves_no_trace"
COMPILED = "compiled_rounds_equal_plain_ones_and_compile_no_more"

TWO = "test_two_processes"
SHARDED = "test_trainer_sharded.py::test_every_solver_on_two_processes"
ZERO = "test_trainer_deepspeed.py::test_two_processes"
TRAINS = "test_sentence_transformers.py::test_every_solver_trains_or_says_what_to_change"
LOSSES = "test_sentence_losses.py::test_each_solver_trains_each_loss_or_says_what_to_write"
SCALED = "test_a_scaled_gradient_is_that_of_full_precision_within_rounding"
OVERFLOWS = "test_a_step_that_overflows_is_left_out_and_nothing_else"
BY_HAND = "test_training_is_that_of_the_loop_written_by_hand"
AUTOMATIC = "test_automatic_optimization_clips_accumulates_and_schedules"
MANUAL = "test_manual_optimization_plays_the_same_rounds"
BYTES = "test_a_base_of_bytes_that_lets_gradients_through_is_played_on"


def tasks(*names: str) -> list[str]:
    """Return the tests of kinds of models and data."""
    test = "test_tasks.py::test_every_solver_plays_every_task_or_says_what_to_change"
    return [f"{test}[{{solver}}-{name}]" for name in names]


# What a way is called, and the tests that prove it; * stands for parameters besides the solver.
WAYS: dict[str, list[str]] = {
    "`optimizer.step(closure)`": [f"{HALVES}[bert-{{solver}}]"],
    "`game.backward(closure)`": [f"{DOORS}[{{solver}}]"],
    "`game.loss(closure)`": [f"{DOORS}[{{solver}}]"],
    "gradient accumulation": ["test_game.py::test_micro_batches_accumulate[{solver}]"],
    "transformers' Trainer": [f"test_trainer.py::{BY_HAND}[{{solver}}]"],
    "TRL's SFTTrainer": ["test_trl.py::test_every_solver_trains[{solver}]"],
    "Accelerate": ["test_accelerate.py::test_prepared_it_accumulates_and_schedules[{solver}-*]"],
    "Lightning, automatic": [f"test_lightning.py::{AUTOMATIC}[{{solver}}]"],
    "Lightning, manual: `game.backward`": [f"test_lightning.py::{MANUAL}[{{solver}}-backward]"],
    "Lightning, manual: `step(closure)`": [f"test_lightning.py::{MANUAL}[{{solver}}-step]"],
    "DDP, `step(closure)`": [f"test_distributed.py::{TWO}[step: {{solver}}]"],
    "DDP, `game.loss`": [f"test_distributed.py::{TWO}[loss: {{solver}}]"],
    "FSDP2, `step(closure)`": [f"test_sharded.py::{TWO}[step: {{solver}}]"],
    "FSDP2, `game.loss`": [f"test_sharded.py::{TWO}[loss: {{solver}}]"],
    "FSDP2 by Accelerate, `step(closure)`": [f"{SHARDED}[step: {{solver}}]"],
    "FSDP2 by Accelerate, `game.backward`": [f"{SHARDED}[backward: {{solver}}]"],
    "FSDP2 by Trainer's `fsdp=`": [f"{SHARDED}[trainer: {{solver}}]"],
    "DeepSpeed ZeRO 1, `game.loss`": [f"test_deepspeed.py::{TWO}[stage 1: {{solver}}]"],
    "DeepSpeed ZeRO 2, `game.loss`": [f"test_deepspeed.py::{TWO}[stage 2: {{solver}}]"],
    "DeepSpeed ZeRO 1 by Trainer": [f"{ZERO}[stage 1: {{solver}}]"],
    "DeepSpeed ZeRO 2 by Trainer": [f"{ZERO}[stage 2: {{solver}}]"],
    "tensor parallelism": ["test_sharded.py::test_tensor_parallelism_is_refused[{solver}]"],
    "sentence-transformers, rankings": [f"{TRAINS}[{{solver}}-ranking]"],
    "sentence-transformers, scores": [f"{TRAINS}[{{solver}}-scores]"],
    "sentence-transformers, sparse encoders": [f"{LOSSES}[{{solver}}-sparse SpladeLoss]"],
    "sentence-transformers, cross-encoders": [f"{LOSSES}[{{solver}}-pair BinaryCrossEntropyLoss]"],
    "bf16 autocast": [f"test_precision.py::test_{AUTOCAST}[{{solver}}]"],
    "fp16 autocast, GradScaler": [
        f"test_fp16.py::{test}[{{solver}}-*-cpu]" for test in (SCALED, OVERFLOWS)
    ],
    "LoRA": ["test_peft.py::test_adapters_alone_are_trained[{solver}-*]"],
    "LoRA on a quantised base": [f"test_peft.py::{BYTES}[{{solver}}]"],
    "`torch.compile`": [f"test_compile.py::test_{COMPILED}[{{solver}}]"],
    "gradient checkpointing": [f"{CHECKPOINTED}[{{solver}}-non-reentrant]"],
    "reentrant checkpointing": [f"{CHECKPOINTED}[{{solver}}-reentrant]"],
    "dropout": [
        "test_precision.py::test_passes_between_two_steps_share_a_dropout_mask[{solver}-*]"
    ],
    "BatchNorm": ["test_game.py::test_a_round_leaves_what_one_forward_leaves[{solver}-*]"],
    "frozen embedding": [
        "test_site.py::test_a_frozen_embedding_is_perturbed_and_stays_frozen[{solver}]"
    ],
    "a hidden layer as the site": [
        "test_site.py::test_no_solver_perturbs_padding_of_a_hidden_layer[{solver}-*]"
    ],
    "`mixadv.Schedule`": ["test_schedule.py::test_every_solver_follows_a_schedule[{solver}]"],
    "a checkpoint resumed": ["test_resume.py::test_resumed_is_uninterrupted[{solver}-step]"],
    "an interrupt, then more": [f"test_interruptions.py::{INTERRUPTED}[{{solver}}-*-step-*]"],
    "out of memory, then less": [f"test_faults.py::test_{FITS}[{{solver}}-step-*]"],
    "encoders (7 families)": [f"{HALVES}[{f}-{{solver}}]" for f in ENCODERS],
    "decoders (GPT-2, Llama)": [f"{HALVES}[{f}-{{solver}}]" for f in ("gpt2", "llama")],
    "encoder–decoders (T5, BART)": [f"{HALVES}[{f}-{{solver}}]" for f in ("t5", "bart")],
    "causal LM, prompts masked": tasks("llama", "gpt2"),
    "sequence to sequence": tasks("t5", "bart"),
    "masked LM": tasks("masked"),
    "token classification": tasks("tagging"),
    "question answering": tasks("answers"),
    "multiple choice": tasks("choices"),
    "pairs in an encoder called twice": tasks("towers"),
    "similarity scores, regression": tasks("scores"),
    "images: ViT": tasks("vit"),
    "images: ResNet": tasks("resnet"),
    "pixels": tasks("segmentation"),
}


def matches(test: str, pattern: str) -> bool:
    """Return whether a test is one of those that a pattern means."""
    (function, _, given), (wanted, _, parameters) = test.partition("["), pattern.partition("[")
    return function == f"tests/{wanted}" and fnmatchcase(given, parameters)


def proofs(way: str, solver: str, collected: list[str]) -> list[str]:
    """Return the collected tests that prove a cell; each of its patterns has to find one."""
    patterns = [pattern.replace("{solver}", solver) for pattern in WAYS[way]]
    found = [[t for t in collected if matches(t, pattern)] for pattern in patterns]
    return list(chain(*found)) if all(found) else []


class Recorder:
    """Notes what was collected, what of the ways that are asked for was skipped and what passed."""

    def __init__(self, words: Sequence[str] = ()) -> None:
        self.ways = [way for way in WAYS if not words or any(word in way for word in words)]
        self.collected: list[str] = []
        self.proofs: dict[str, dict[str, list[str]]] = {}  # by way and solver
        self.passed: set[str] = set()
        self.failed: set[str] = set()
        self.skipped: set[str] = set()

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        self.collected = [item.nodeid for item in items]
        self.proofs = {
            way: {solver: proofs(way, solver, self.collected) for solver in mixadv.SOLVERS}
            for way in WAYS
        }
        wanted = self.tests(self.ways)
        items[:] = [item for item in items if item.nodeid in wanted]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" and report.passed:
            self.passed.add(report.nodeid)
        elif report.skipped:
            self.skipped.add(report.nodeid)
        elif not report.passed:
            self.failed.add(report.nodeid)

    def tests(self, ways: Iterable[str] = WAYS) -> set[str]:
        """Return the collected tests that prove a cell of some ways."""
        return {t for way in ways for cell in self.proofs[way].values() for t in cell}

    def ran(self, way: str) -> bool:
        """Return whether a way was asked for and not skipped as a whole."""
        tests = self.tests([way])
        return way in self.ways and not (tests and self.skipped.issuperset(tests))


def verdict(tests: list[str], seen: Recorder) -> Cell:
    """Return what a cell shows."""
    if not tests or not seen.passed.issuperset(tests) or seen.failed.intersection(tests):
        raise SystemExit(f"no verdict without tests that pass: {tests or 'none was collected'}")
    said = {REFUSED.get(test) for test in tests}
    if len(said) > 1:
        raise SystemExit(f"one cell with several verdicts, make a way of each: {tests}")
    (said_so,) = said
    if said_so is None:
        return "✔", ""
    return "✔" if CHANGED.issuperset(tests) else "–", in_general(said_so)


def in_general(reason: str) -> str:
    """Return what was said of one solver, module and shape as it is said of others."""
    names = "|".join(solver.__name__ for solver in mixadv.SOLVERS.values())
    for said, general in (
        (rf"^({names})\b(?= (compares|differentiates|moves|reads a|weighs))", "This solver"),
        (r"(by|of which) '\w+',? ?(?=which|is always)", r"\1 the default divergence, "),
        (r"\bsite \['[\w.]+'\]", "site"),
        (r" at '\w+'(?= must)", ""),
        (r", got \[[\d, ]+\]", ""),
    ):
        reason = re.sub(said, general, reason)
    return reason.replace("divergence, is", "divergence is")


def written(text: str) -> dict[str, dict[str, Cell]]:
    """Return the cells of a table, by way and solver."""
    reasons: dict[str, str] = {"": ""} | dict(re.findall(r"^(\d+)\. (.*)$", text, re.MULTILINE))
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    rows = [[cell.strip() for cell in line[1:-1].split("|")] for line in lines]
    (_, *solvers), *body = rows
    return {
        way: {s: (c[0], reasons[c[1:]]) for s, c in zip(solvers, cells, strict=True)}
        for way, *cells in body
    }


def table(seen: Recorder, before: dict[str, dict[str, Cell]]) -> str:
    """Return the table in Markdown, with the reasons of what is refused.

    Rows that were not run are taken from that `before`.
    """
    reasons: list[str] = [""]
    lines = [f"| | {' | '.join(mixadv.SOLVERS)} |", "|---" * (len(mixadv.SOLVERS) + 1) + "|"]
    for way in WAYS:
        cells = before.get(way, {})
        if seen.ran(way):
            cells = {s: verdict(tests, seen) for s, tests in seen.proofs[way].items()}
        if silent := mixadv.SOLVERS.keys() - cells:
            raise SystemExit(f"{way}: neither run nor written before: {', '.join(sorted(silent))}")
        shown = []
        for mark, reason in (cells[s] for s in mixadv.SOLVERS):
            if reason not in reasons:
                reasons.append(reason)
            shown.append(f"{mark}{reasons.index(reason) or ''}")
        lines.append(f"| {way} | {' | '.join(shown)} |")
    lines += [
        "",
        f"✔ tested, –n refused with reason n, ✔n plays with the change named in n; "
        f"{len(seen.tests()):,} tests check this table.",
        "",
    ]
    lines += [f"{n}. {reason}" for n, reason in enumerate(reasons) if n]
    return "\n".join(lines) + "\n"


def main(words: Sequence[str] = ()) -> None:
    """Run the tests of all cells, or of some ways; write the table, here and in docs/."""
    files = {f"tests/{pattern.partition('::')[0]}" for way in WAYS.values() for pattern in way}
    seen = Recorder(words)
    # The assertions of what is imported here already are not rewritten; which is no matter.
    options = ["-q", "-W", "ignore::pytest.PytestAssertRewriteWarning", "-p", "no:cacheprovider"]
    pytest.main([*options, "-m", "slow or not slow", *sorted(files)], plugins=[seen])
    TABLE.write_text(table(seen, written(TABLE.read_text())))
    PAGE.write_text(MARKED.sub(lambda _: TABLE.read_text(), PAGE.read_text()))


if __name__ == "__main__":
    main(sys.argv[1:])
