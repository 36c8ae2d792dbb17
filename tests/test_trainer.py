"""transformers.Trainer plays a game: itself at radius 0, accumulation, resuming, averages."""

import copy
import dataclasses
import functools
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy

import mixadv
from tests.zoo import (
    PAD,
    ROWS,
    assert_same,
    bart_config,
    copies,
    or_refused,
    player,
    slow_but,
    text_batch,
    without_dropout,
)

pytest.importorskip("accelerate", reason="Trainer needs accelerate")

from accelerate import ParallelismConfig
from accelerate.state import AcceleratorState, GradientState
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments

from mixadv.integrations.transformers import Adversarial, AdversarialTrainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*starts below the noise floor"),
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*is deprecated:FutureWarning"),
]


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Give each test a folder, and leave no accelerator's state to another."""
    monkeypatch.chdir(tmp_path)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


SINGLE = mixadv.MAT(learner_steps=1, learner_temperature=0.0, damping=0.0, round_damping=0.0)
EXACT = ["noise", "pgd", "creat", "r3f", "alum", "mat"]
"""Solvers that are plain training at radius 0 bit for bit."""
CLOSE = ["freelb", "textat", "vat"]
"""Those that are up to rounding."""


def at_zero(name: str) -> mixadv.Solver:
    """Return a solver at radius 0; of MAT the one whose learner is the optimizer alone."""
    return dataclasses.replace(SINGLE if name == "mat" else mixadv.make_solver(name), radius=0)


def rows_of(batch: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    return [dict(zip(batch, row, strict=True)) for row in zip(*batch.values(), strict=True)]


def settings(folder: Path, **changes: Any) -> dict[str, Any]:
    """Return what a short training takes, as arguments of a Trainer."""
    defaults = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "max_steps": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return defaults | changes


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    return TrainingArguments(**settings(folder, **changes))


def trainer_of(
    folder: Path,
    solver: mixadv.Solver | None,
    *,
    family: str = "bert",
    rows: int = 8,
    dropout: bool = True,
    given: dict[str, Any] | None = None,
    base: type[Trainer] = AdversarialTrainer,
    **changes: Any,
) -> Any:
    """Return a Trainer of a fresh tiny model, an adversarial one where there is a solver."""
    p = player(family, rows=rows)
    if not dropout:
        without_dropout(p.model)
    data = rows_of(p.batch)
    keywords = {"model": p.model, "train_dataset": data, "eval_dataset": data} | (given or {})
    if solver is not None:
        keywords["solver"] = solver
    elif base is AdversarialTrainer:
        base = Trainer
    return base(args=arguments(folder, **changes), **keywords)


def weights(trainer: Any) -> list[Tensor]:
    return copies(trainer.model.parameters())


def logged(trainer: Any, name: str = "loss") -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def trained(*given: Any, **changes: Any) -> Any:
    trainer = trainer_of(*given, **changes)
    trainer.train()
    return trainer


# Radius 0 -----------------------------------------------------------------------------------------


def share_of_items(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    """A loss as Trainer expects it of its users: a sum over the items of the accumulated batch."""
    found = F.cross_entropy(outputs.logits, labels, reduction="sum")
    return found / (len(labels) if num_items_in_batch is None else num_items_in_batch)


OWN_LOSS = {"given": {"compute_loss_func": share_of_items}}
SMOOTHED = {"label_smoothing_factor": 0.1}
PLAIN: dict[str, dict[str, Any]] = {
    "one batch": {},
    "accumulated": {"gradient_accumulation_steps": 2, "rows": 10, "max_steps": 3},
    "tokens": {"family": "llama-causal", "gradient_accumulation_steps": 3, "rows": 10},
    "label smoothing": {**SMOOTHED, "gradient_accumulation_steps": 2},
    "own loss": {**OWN_LOSS, "gradient_accumulation_steps": 2, "rows": 7},
}
"""Ways of training, with an incomplete last accumulation in some."""


@functools.cache
def plainly(way: str, optim: str = "adamw_torch") -> tuple[list[Tensor], list[float]]:
    """Return what Trainer itself comes to."""
    trainer = trained(Path("unused"), None, optim=optim, **_two_rows(way))
    return weights(trainer), logged(trainer)


def _two_rows(way: str) -> dict[str, Any]:
    return {"per_device_train_batch_size": 2, **PLAIN[way]}


@pytest.mark.parametrize(
    ("name", "way"),
    [(name, way) for name in EXACT for way in PLAIN if way == "accumulated" or name in EXACT[-2:]],
)
def test_radius_zero_is_trainer_itself_bit_for_bit(name: str, way: str, tmp_path: Path):
    trainer = trained(tmp_path, at_zero(name), optim="adamw_torch", **_two_rows(way))
    plain, losses = plainly(way)
    assert_same(weights(trainer), plain)
    assert logged(trainer) == pytest.approx(losses, rel=1e-6)


@pytest.mark.parametrize("way", ["accumulated", "tokens"])
@pytest.mark.parametrize("name", CLOSE)
def test_radius_zero_is_trainer_itself_up_to_rounding(name: str, way: str, tmp_path: Path):
    trainer = trained(tmp_path, at_zero(name), optim="sgd", **_two_rows(way))
    plain, losses = plainly(way, "sgd")
    torch.testing.assert_close(weights(trainer), plain, rtol=1e-4, atol=1e-6)
    assert logged(trainer) == pytest.approx(losses, rel=1e-6)


# Accumulation -------------------------------------------------------------------------------------


def slanted(perturbed: Tensor, clean: Tensor) -> Tensor:
    """A divergence with a gradient at δ = 0, so that an ascent needs no random start."""
    return (perturbed - 2 * clean + 0.1).square().sum(-1)


STILL = [
    dataclasses.replace(solver, start="zero", radius=0.3, unit="absolute")
    for solver in (
        mixadv.PGD(steps=2),
        mixadv.ALUM(divergence=slanted),
        dataclasses.replace(SINGLE, divergence=slanted, particles=1, temperature=0.0),
    )
]
"""Solvers that draw nothing, for comparisons across splits of a batch."""
SPLITS = {"tokens": {"family": "llama-causal"}, "label smoothing": SMOOTHED, "own loss": OWN_LOSS}
ONCE = {"optim": "sgd", "max_steps": 1, "dropout": False, "max_grad_norm": 0.0}


@pytest.mark.parametrize(
    ("solver", "way"),
    [  # a divergence is a mean over samples, the loss of a causal model one over tokens
        pytest.param(solver, way, id=f"{solver.name}-{way}")
        for solver in STILL
        for way in SPLITS
        if way != "tokens" or solver.compares is None
    ],
)
def test_accumulated_micro_batches_are_one_batch_to_learner_and_adversary(
    solver: mixadv.Solver, way: str, tmp_path: Path
):
    def train(size: int, micro: int) -> Any:
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": micro}
        return trained(tmp_path, solver, **ONCE, **options, **SPLITS[way])

    one, three = train(8, 1), train(3, 3)  # 3 + 3 + 2 rows
    torch.testing.assert_close(weights(three), weights(one), rtol=1e-4, atol=1e-6)
    assert logged(three) == pytest.approx(logged(one), rel=1e-4)


@pytest.mark.parametrize("solver", STILL, ids=lambda s: s.name)
def test_a_model_that_ignores_the_number_of_items_keeps_loss_and_divergence_in_proportion(
    solver: mixadv.Solver, tmp_path: Path
):
    """Trainer adds up the means of such a model, of which BERT is one."""

    def train(micro: int) -> list[Tensor]:
        options = {"per_device_train_batch_size": 8 // micro, "learning_rate": 0.1 / micro}
        options |= {"gradient_accumulation_steps": micro}
        return weights(trained(tmp_path, solver, **ONCE, **options))

    torch.testing.assert_close(train(2), train(1), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "solver", [mixadv.CVaR(level=1.0), STILL[0]], ids=["CVaR of all rows", "PGD"]
)
def test_losses_of_rows_in_micro_batches_are_those_of_one_batch(
    solver: mixadv.Solver, tmp_path: Path
):
    """Trainer divides none of them, and the mean over rows is the game's."""

    def train(size: int, micro: int) -> Any:
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": micro}
        given = {"compute_loss_func": loss_of_each}
        return trained(tmp_path, solver, given=given, **ONCE, **options)

    one, three = train(8, 1), train(3, 3)  # 3 + 3 + 2 rows
    torch.testing.assert_close(weights(three), weights(one), rtol=1e-4, atol=1e-6)
    assert logged(three) == pytest.approx(logged(one), rel=1e-4)


def unlabelled() -> dict[str, Any]:
    """Return data in which Trainer finds no labels to count, as of those that have another name."""
    data = [{k: v for k, v in row.items() if k != "labels"} for row in rows_of(text_batch(8))]
    return {"train_dataset": data, "eval_dataset": data}


def test_losses_of_rows_that_are_told_of_no_items_are_those_of_one_batch(tmp_path: Path):
    """Where labels have another name."""

    def each(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Tensor:
        return outputs.logits.logsumexp(-1)

    given = {"compute_loss_func": each, **unlabelled()}

    def train(micro: int) -> Any:
        options = {"per_device_train_batch_size": 8 // micro, "gradient_accumulation_steps": micro}
        return trained(tmp_path, mixadv.CVaR(level=1.0), given=given, **ONCE, **options)

    one, four = train(1), train(4)
    torch.testing.assert_close(weights(four), weights(one), rtol=1e-4, atol=1e-6)
    assert logged(four) == pytest.approx(logged(one), rel=1e-4)


def test_a_loss_that_is_told_of_no_items_keeps_loss_and_divergence_in_proportion(tmp_path: Path):
    """Where labels have another name Trainer counts nothing, and adds up what it is given."""

    def mean(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Tensor:
        assert num_items_in_batch is None
        return outputs.logits.logsumexp(-1).mean()

    given = {"compute_loss_func": mean, **unlabelled()}

    def train(micro: int) -> list[Tensor]:
        options = {"per_device_train_batch_size": 8 // micro, "learning_rate": 0.1 / micro}
        options |= {"gradient_accumulation_steps": micro}
        return weights(trained(tmp_path, STILL[1], given=given, **ONCE, **options))

    torch.testing.assert_close(train(2), train(1), rtol=1e-4, atol=1e-6)


def test_a_micro_batch_without_labels_adds_nothing_and_breaks_nothing(tmp_path: Path):
    batch = text_batch(8)
    batch["labels"] = batch["input_ids"].clone()
    batch["labels"][:4] = -100
    options: dict[str, Any] = {"family": "llama-causal", "dropout": False, "optim": "sgd"}
    options |= {"gradient_accumulation_steps": 8, "per_device_train_batch_size": 1}
    given = {"train_dataset": rows_of(batch)}
    solver = mixadv.PGD(start="zero")
    trainer = trained(tmp_path, solver, given=given, max_steps=2, **options)
    assert all(p.isfinite().all() for p in weights(trainer))
    assert all(0 < loss < 10 for loss in logged(trainer))


# Players and optimizers ---------------------------------------------------------------------------


@pytest.mark.parametrize("micro", [1, 2])
def test_one_optimizer_step_is_one_sample_of_the_learner(micro: int, tmp_path: Path):
    solver = mixadv.MAT(learner_steps=2, samples=9)
    options = {"gradient_accumulation_steps": micro, "per_device_train_batch_size": 2}
    trainer = trained(tmp_path, solver, max_steps=5, rows=12, **options)
    learner = trainer.game.learner
    assert (learner.count, learner.rounds, learner.position) == (5, 2, 1)
    assert trainer.game.round == 5 * micro
    assert len(learner.samples) == 5


class Sequential(AdversarialTrainer):
    """Rows in their order, for comparisons with a loop."""

    def _get_train_sampler(self, *_: Any) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)


@pytest.mark.parametrize("name", mixadv.SOLVERS)
@or_refused("Trainer")
def test_training_is_that_of_the_loop_written_by_hand(name: str, tmp_path: Path):
    """Also of a head, whose gradients Trainer, which zeroes its model's, would let grow."""

    def solver() -> mixadv.Solver:
        torch.manual_seed(3)
        if name == "mat":
            return mixadv.MAT(learner_temperature=0.0)  # drawn in the order of parameter groups
        head = {"head": nn.Linear(16, 4), "contrast_weight": 0.5} if name == "cat" else {}
        return mixadv.make_solver(name, **head)

    options = {**ONCE, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
    options |= {"max_steps": 3, "rows": 12, "lr_scheduler_type": "constant", "base": Sequential}
    trainer = trained(tmp_path, solver(), **options)

    p = player("bert", rows=12)
    without_dropout(p.model)
    base = torch.optim.SGD(p.model.parameters(), lr=1e-2)
    optimizer = mixadv.wrap(base, p.model, solver(), seed=42)
    batches = [p.closure(**{k: v[i : i + 2] for k, v in p.batch.items()}) for i in range(0, 12, 2)]
    share = 0.5 if name in ROWS else 1.0  # a model's own means add up, losses of rows are averaged
    for i, closure in enumerate(batches):
        (share * optimizer.game.loss(closure)).backward()
        if i % 2:
            optimizer.step()
            optimizer.zero_grad()
    assert_same(weights(trainer), [q.detach() for q in p.model.parameters()])
    if name != "cat":
        return
    head = trainer.game.solver.head
    assert_same(head.state_dict(), optimizer.game.solver.head.state_dict())
    assert all(torch.any(q.grad != 0) for q in head.parameters())


def test_accelerates_reload_leaves_schedule_and_learner_attached(tmp_path: Path):
    """`prepare` loads the optimizer's state, and a copy of its groups would be left behind."""
    seen = []

    class Watching(TrainerCallback):
        def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
            seen.append(trainer.game.optimizer.param_groups[0]["lr"])

    options = {"max_steps": 4, "learning_rate": 0.4}
    trainer = trainer_of(tmp_path, mixadv.MAT(), given={"callbacks": [Watching()]}, **options)
    trainer.train()
    assert seen == pytest.approx([0.4, 0.3, 0.2, 0.1])
    assert trainer.game.learner.count == 4
    assert isinstance(trainer.optimizer.optimizer, mixadv.GameOptimizer)


def test_the_optimizer_is_never_given_a_closure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A gradient scaler refuses one."""
    step, given = mixadv.GameOptimizer.step, []

    def noting(self: Any, closure: Any = None, **keywords: Any) -> Any:
        given.append(closure)
        return step(self, closure, **keywords)

    monkeypatch.setattr(mixadv.GameOptimizer, "step", noting)
    trained(tmp_path, mixadv.FreeLB())
    assert given == [None, None]


def pair(model: nn.Module) -> tuple[torch.optim.Optimizer, Any]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)


def test_a_given_optimizer_and_schedule_are_used(tmp_path: Path):
    p = player("bert", rows=8)
    optimizer, schedule = pair(p.model)
    given = {"model": p.model, "optimizers": (optimizer, schedule)}
    trainer = trainer_of(tmp_path, mixadv.PGD(), given=given)
    assert trainer.game.optimizer is optimizer
    trainer.train()
    assert trainer.game.round == 2
    assert optimizer.param_groups[0]["lr"] == 0.025


def test_an_optimizer_that_is_wrapped_brings_its_game(tmp_path: Path):
    p = player("bert", rows=8)
    optimizer, _ = pair(p.model)
    played = mixadv.wrap(optimizer, p.model, mixadv.FreeLB(steps=2), seed=7)
    given = {"model": p.model, "optimizers": (played, None)}
    trainer = AdversarialTrainer(args=arguments(tmp_path), train_dataset=rows_of(p.batch), **given)
    trainer.train()
    assert trainer.game is played.game
    assert played.game.round == 2
    with pytest.raises(ValueError, match="wrapped already and brings its own solver"):
        trainer_of(tmp_path, mixadv.FreeLB(), given=given)


def test_a_second_call_of_train_goes_on_with_the_same_game(tmp_path: Path):
    trainer = trained(tmp_path, mixadv.MAT())
    game = trainer.game
    trainer.train()
    assert trainer.game is game
    assert (game.round, game.learner.count) == (4, 4)


@pytest.mark.parametrize("solver", [mixadv.MAT, lambda: mixadv.CAT(head=nn.Linear(16, 4))])
def test_a_new_model_of_each_call_gets_a_new_game(solver: Callable[[], Any], tmp_path: Path):
    """As in a search for hyper-parameters; a head begins anew with the model."""
    given = {"model": None, "model_init": lambda: player("bert").model}
    trainer = trained(tmp_path, solver(), given=given)
    game, found = trainer.game, weights(trainer)
    trainer.train()
    assert trainer.game is not game
    assert trainer.game.model is trainer.model
    assert_same(weights(trainer), found)


def test_a_batch_that_is_too_large_is_found_out_and_training_starts_again(tmp_path: Path):
    class Small(AdversarialTrainer):
        def forward_pass(self, model: Any, inputs: Any, *rest: Any) -> Any:
            if len(inputs["labels"]) == 8 and self.state.global_step:
                raise RuntimeError("CUDA out of memory.")
            return super().forward_pass(model, inputs, *rest)

    options = {"auto_find_batch_size": True, "per_device_train_batch_size": 8}
    trainer = trained(tmp_path, mixadv.MAT(), base=Small, **options)
    assert trainer._train_batch_size == 7
    assert trainer.state.global_step == 2
    assert trainer.game.learner.count == 3  # one of them in the larger batch
    assert logged(trainer)[-1] < 3


CLIPPED = {"optim": "sgd", "max_steps": 1, "learning_rate": 1.0, "max_grad_norm": 1e-3}


def test_gradients_of_the_whole_round_are_clipped(tmp_path: Path):
    before = weights(trainer_of(tmp_path, None))
    trainer = trained(tmp_path, mixadv.FreeLB(), **CLIPPED)
    moves = [a - b for a, b in zip(weights(trainer), before, strict=True)]
    length = torch.stack([m.norm() for m in moves]).norm()
    assert length == pytest.approx(1e-3, rel=1e-3)
    assert logged(trainer, "grad_norm")[0] > 0.1


def test_gradients_of_a_head_are_clipped_with_the_models(tmp_path: Path):
    head = nn.Linear(16, 4)
    before = copy.deepcopy(head.state_dict())
    trained(tmp_path, mixadv.CAT(head=head, contrast_weight=0.5), **CLIPPED)
    moved = torch.stack([(v - before[n]).norm() for n, v in head.state_dict().items()]).norm()
    assert 0 < moved < 1e-3


def test_a_loss_computed_past_the_mixin_is_an_error(tmp_path: Path):
    """It would be plain training, and nobody would notice."""

    class Own(AdversarialTrainer):
        def compute_loss(self, model: Any, inputs: Any, *_: Any, **__: Any) -> Tensor:
            return model(**inputs).loss

    for micro in (1, 2):
        options = {"base": Own, "rows": 16, "gradient_accumulation_steps": micro}
        trainer = trainer_of(tmp_path, mixadv.PGD(), **options)
        with pytest.raises(mixadv.GameError, match=r"No round was played.*Override forward_pass"):
            trainer.train()


def test_a_model_in_evaluation_mode_is_played_on(tmp_path: Path):
    class WithoutDropout(AdversarialTrainer):
        def training_step(self, model: Any, *rest: Any, **more: Any) -> Tensor:
            model.eval()
            train, model.train = model.train, lambda mode=True: model
            try:
                return super().training_step(model, *rest, **more)
            finally:
                model.train = train

    assert trained(tmp_path, mixadv.PGD(), base=WithoutDropout).game.round == 2


def test_labels_that_trainer_takes_from_the_model_tell_where_predictions_count(tmp_path: Path):
    batch = text_batch(4)
    batch["labels"] = batch["input_ids"].clone()
    batch["labels"][:, :3] = -100  # the prompt
    given = {"train_dataset": rows_of(batch)}
    options = {"family": "llama-causal", "given": given, "max_steps": 1, "dropout": False}
    solver = dataclasses.replace(SINGLE, start_size=0.3, radius=None)
    payoffs = [
        logged(trained(tmp_path, solver, **options, **more), "payoff")[0]
        for more in ({}, {"label_smoothing_factor": 1e-9})
    ]
    assert payoffs[1] == pytest.approx(payoffs[0], rel=1e-4)


def test_a_schedule_begins_with_plain_training(tmp_path: Path):
    forwards = []

    class Watching(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            forwards.append(trainer.game.outcome.forwards)

    solver, schedule = mixadv.FreeLB(steps=3), mixadv.Schedule(start=2)
    given = {"schedule": schedule, "callbacks": [Watching()]}
    options = {"max_steps": 4, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
    trainer = trainer_of(tmp_path, solver, given=given, rows=16, **options)
    trainer.train()
    assert forwards == [1, 1, 3, 3]


def test_the_site_is_that_named(tmp_path: Path):
    trainer = trained(tmp_path, mixadv.PGD(), given={"site": "bert.encoder.layer.0"})
    assert trainer.game.site.names == ["bert.encoder.layer.0"]


# Ways of computing --------------------------------------------------------------------------------


def test_recomputed_activations_change_nothing(tmp_path: Path):
    solver = mixadv.FreeLB()
    plain = trained(tmp_path, solver)
    trainer = trained(tmp_path, solver, gradient_checkpointing=True)
    torch.testing.assert_close(weights(trainer), weights(plain), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", slow_but(["freelb"], ["freelb", "mat", "cat"]))
def test_a_model_that_trainer_compiles_is_played_on(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "no")  # transformers 4 sets it for all to come
    torch.compiler.reset()
    solver = SINGLE if name == "mat" else mixadv.make_solver(name)
    options = {"dropout": False, "optim": "sgd", "eval_on_start": True}
    plain = trained(tmp_path, solver, **options)
    compiled = {"torch_compile": True, "torch_compile_backend": "eager"}
    trainer = trained(tmp_path, solver, **options, **compiled)
    assert hasattr(trainer.game.model, "_orig_mod")
    torch.testing.assert_close(weights(trainer), weights(plain), rtol=1e-4, atol=1e-6)
    assert logged(trainer, "payoff") == pytest.approx(logged(plain, "payoff"), rel=1e-3)
    torch.compiler.reset()


def test_autocast_to_bf16_follows_fp32(tmp_path: Path):
    solver = mixadv.MAT()
    plain, trainer = trained(tmp_path, solver), trained(tmp_path, solver, bf16=True)
    assert logged(trainer) == pytest.approx(logged(plain), rel=1e-2)
    assert {p.dtype for p in weights(trainer)} == {torch.float32}
    assert trainer.game.strategy.points[0].dtype == torch.float32


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="loss scaling needs CUDA")
@pytest.mark.filterwarnings("ignore:In fp16 gradients")
def test_losses_are_scaled_in_fp16(tmp_path: Path):
    options = {"use_cpu": False, "max_steps": 4}
    plain = trained(tmp_path, mixadv.FreeLB(), **options)
    trainer = trained(tmp_path, mixadv.FreeLB(), fp16=True, **options)
    assert logged(trainer) == pytest.approx(logged(plain), rel=3e-2)
    assert trainer.accelerator.scaler.get_scale() > 1


# Checkpoints and evaluation -----------------------------------------------------------------------


def kept(trainer: Any) -> list[Any]:
    return [weights(trainer), trainer.optimizer.state_dict(), torch.get_rng_state()]


@pytest.mark.parametrize(
    "solver",
    [
        lambda: mixadv.MAT(learner_steps=3, samples=2, learner_temperature=1e-4),
        mixadv.TextAT,
        lambda: mixadv.CAT(head=nn.Linear(16, 4)),
        mixadv.SMART,
    ],
    ids=["mat", "textat", "cat", "smart"],
)
def test_a_resumed_run_is_the_uninterrupted_one(solver: Callable[[], Any], tmp_path: Path):
    """Within a round of MAT, and within an epoch of accumulated batches."""
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 5, "rows": 14}
    options |= {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
    torch.manual_seed(5)
    whole = trained(tmp_path, solver(), **options)
    torch.manual_seed(6)
    other = trainer_of(tmp_path, solver(), **options)
    other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert_same(kept(other), kept(whole))
    assert logged(other)[-1] == logged(whole)[-1]


BEST = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
BEST |= {"load_best_model_at_end": True}


def right(prediction: Any) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def test_evaluation_and_prediction_run_at_the_average(tmp_path: Path):
    trainer = trained(tmp_path, mixadv.MAT(learner_steps=1), max_steps=4)
    live = weights(trainer)
    found, predicted = trainer.evaluate(), trainer.predict(trainer.eval_dataset).predictions
    assert_same(weights(trainer), live)
    trainer.evaluate_average = False
    assert trainer.evaluate()["eval_loss"] != found["eval_loss"]
    with trainer.game.averaged():
        trainer.save_model(str(tmp_path / "exported"))
        assert trainer.evaluate()["eval_loss"] == found["eval_loss"]
    model = type(trainer.model).from_pretrained(tmp_path / "exported").eval()
    names = ("input_ids", "attention_mask")
    batch = {k: torch.stack([row[k] for row in trainer.eval_dataset]) for k in names}
    torch.testing.assert_close(model(**batch).logits, torch.tensor(predicted))


class Weighted(Trainer):
    """A Trainer that leaves what it does not use to the stock one, as they are often written."""

    def compute_loss(  # pyright: ignore
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, **more: Any
    ) -> Any:
        found = super().compute_loss(model, inputs, return_outputs, **more)
        return (2 * found[0], found[1]) if return_outputs else 2 * found

    def create_optimizer(self, model: nn.Module | None = None) -> Any:
        super().create_optimizer()


def test_a_trainer_may_take_the_number_of_items_among_others(tmp_path: Path):
    """And may keep the optimizer that it makes to itself."""
    made = type("Mixed", (Adversarial, Weighted), {})
    trainer = trained(tmp_path, at_zero("pgd"), base=made)
    twice, once = logged(trainer)[0], plainly("one batch")[1][0]
    assert trainer.game.round == 2
    assert twice == pytest.approx(2 * once, rel=0.2)
    assert trainer.evaluate()["eval_loss"] > 1.5 * once


def test_best_weights_of_a_plain_checkpoint_are_loaded_without_an_average(tmp_path: Path):
    """A run that began plain and was better then: what was evaluated are its live weights."""
    options = {**BEST, "lr_scheduler_type": "constant"}
    best = weights(trained(tmp_path, None, **options))
    wrong = [{**row, "labels": (row["labels"] + 1) % 3} for row in rows_of(text_batch(8))]
    given = {"train_dataset": wrong}
    trainer = trainer_of(tmp_path, mixadv.MAT(), given=given, **{**options, "max_steps": 4})
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.best_model_checkpoint.endswith("-2")
    assert_same(weights(trainer), best)
    assert not trainer.game.learner.average


@pytest.mark.parametrize("average", ["uniform", None])
def test_the_best_weights_begin_a_round_of_their_own(average: Any, tmp_path: Path):
    """The run ends within a round of the learner, at other weights than those loaded."""
    options = {**BEST, "max_steps": 5, "learning_rate": 0.5, "optim": "sgd"}
    wrong = [{**row, "labels": (row["labels"] + 1) % 3} for row in rows_of(text_batch(8))]
    solver = mixadv.MAT(learner_steps=2, learner_temperature=0.0, average=average)
    trainer = trained(tmp_path, solver, given={"train_dataset": wrong}, **options)
    assert not trainer.state.best_model_checkpoint.endswith("-5")
    best = weights(trainer)
    for group in trainer.optimizer.param_groups:
        group["lr"] = group["initial_lr"] = 0.0
    trainer.args.max_steps, trainer.args.load_best_model_at_end = 1, False
    trainer.train()
    assert_same(weights(trainer), best)


@pytest.mark.parametrize("average", [True, False])
def test_the_best_weights_are_those_that_were_evaluated_best(average: bool, tmp_path: Path):
    options = {**BEST, "learning_rate": 0.05, "max_steps": 6}
    given = {"evaluate_average": average}
    trainer = trained(tmp_path, mixadv.MAT(), given=given, **options)
    best = trainer.state.best_metric
    assert best == min(logged(trainer, "eval_loss"))
    assert trainer.evaluate()["eval_loss"] == pytest.approx(best, abs=1e-6)
    trainer.evaluate_average = False
    assert trainer.evaluate()["eval_loss"] == pytest.approx(best, abs=1e-6)


def test_what_is_saved_is_the_model_alone(tmp_path: Path):
    trainer = trained(tmp_path, mixadv.CAT(head=nn.Linear(16, 4)))
    trainer.save_model(str(tmp_path / "saved"))
    found = safetensors.torch.load_file(tmp_path / "saved" / "model.safetensors")
    assert_same(found, {n: p.detach() for n, p in trainer.model.named_parameters()})
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in trainer.model.modules())


def test_training_stops_when_the_average_gets_worse(tmp_path: Path):
    options = {**BEST, "max_steps": 9, "learning_rate": 0.05}
    wrong = [{**row, "labels": (row["labels"] + 1) % 3} for row in rows_of(text_batch(8))]
    given = {"callbacks": [EarlyStoppingCallback(2)], "eval_dataset": wrong}
    solver = mixadv.MAT(learner_steps=1, learner_temperature=0.0)
    trainer = trained(tmp_path, solver, given=given, **options)
    first, second, third = logged(trainer, "eval_loss")
    assert first < second < third
    assert trainer.state.global_step == 3
    assert trainer.evaluate()["eval_loss"] == pytest.approx(first, abs=1e-6)


def test_training_stops_early(tmp_path: Path):
    options = {**BEST, "max_steps": 9, "learning_rate": 0.0}
    given = {"callbacks": [EarlyStoppingCallback(2)], "compute_metrics": right}
    options["metric_for_best_model"] = "accuracy"
    trainer = trained(tmp_path, mixadv.MAT(learner_temperature=0.0), given=given, **options)
    assert trainer.state.global_step == 3


# Logging ------------------------------------------------------------------------------------------


def test_the_log_has_the_round_and_reads_it_only_when_trainer_logs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from mixadv.round.outcome import Outcome

    as_dict, read = Outcome.as_dict, []
    monkeypatch.setattr(Outcome, "as_dict", lambda self: read.append(1) or as_dict(self))
    trainer = trained(tmp_path, mixadv.MAT(particles=2), max_steps=4, logging_steps=2)
    assert len(read) == 2
    entry = next(e for e in trainer.state.log_history if "loss" in e)
    assert {"clean_loss", "payoff", "radius", "strategy_entropy", "nonfinite"} <= set(entry)
    assert 0 < entry["radius"] <= 0.2 + 1e-6
    assert entry["loss"] >= entry["clean_loss"] - 0.5
    json.dumps(trainer.state.log_history)
    assert "clean_loss" not in trained(tmp_path, mixadv.PGD()).state.log_history[0]
    assert "payoff" not in trainer.evaluate()


# Sequences ----------------------------------------------------------------------------------------


def test_a_sequence_to_sequence_trainer_plays_and_generates(tmp_path: Path):
    config = bart_config(1)
    config.forced_eos_token_id = 2
    batch = text_batch(8)
    batch["labels"] = batch["input_ids"][:, :5].masked_fill(batch["input_ids"][:, :5] == PAD, -100)

    class Playing(Adversarial, transformers.Seq2SeqTrainer):
        pass

    options = {"per_device_train_batch_size": 8, "learning_rate": 5e-5, "generation_max_length": 6}
    options |= {"predict_with_generate": True, "label_smoothing_factor": 0.1}
    args = transformers.Seq2SeqTrainingArguments(**settings(tmp_path, **options))
    torch.manual_seed(0)
    model = transformers.BartForConditionalGeneration(config)
    data = [{**row, "decoder_input_ids": row["labels"].clamp(min=0)} for row in rows_of(batch)]
    trainer = Playing(model=model, args=args, train_dataset=data, solver=mixadv.MAT())
    trainer.train()
    assert trainer.game.site.names == ["model.encoder.embed_tokens"]
    assert trainer.predict(data).predictions.ndim == 2
    assert logged(trainer, "payoff")[0] > 0


def test_tokens_without_a_label_are_no_aim_of_the_adversary(tmp_path: Path):
    """What follows the last labelled token cannot change its loss, so nothing moves there."""
    batch = text_batch(4)
    batch["labels"] = batch["input_ids"].clone()
    batch["labels"][:, :2] = -100  # the prompt
    batch["labels"][:, 4:] = -100
    given = {"train_dataset": rows_of(batch)}
    solver = mixadv.PGD(start="zero")
    trainer = trained(tmp_path, solver, family="llama-causal", given=given, max_steps=1)
    (delta,) = trainer.game.strategy.points
    lengths = delta[0].norm(dim=-1)
    assert (lengths[:, :3] > 0).all()
    assert (lengths[:, 3:] == 0).all()


# Refusals -----------------------------------------------------------------------------------------

AVERAGE = "MAT is evaluated at the average of its weights, which is saved with the optimizer"
STATIC = {"ddp_static_graph": True}
REFUSED: dict[str, tuple[Any, dict[str, Any], type[Exception], str]] = {
    "steps within a batch": (mixadv.FreeAT(), {}, ValueError, "FreeAT takes an optimizer step"),
    "a class": (mixadv.MAT, {}, TypeError, r"solver such as mixadv\.MAT\(\), got <class"),
    "static graph": (mixadv.FreeLB(), STATIC, ValueError, "the replicas drift apart"),
    "best without average": (mixadv.MAT(), BEST | {"save_only_model": True}, ValueError, AVERAGE),
}


def test_an_optimizer_of_another_model_is_refused(tmp_path: Path):
    other = player("bert").model
    played = mixadv.wrap(torch.optim.SGD(other.parameters(), 0.1), other, mixadv.PGD())
    given = {"model": player("bert").model, "optimizers": (played, None)}
    with pytest.raises(ValueError, match="wrapped for another model"):
        AdversarialTrainer(args=arguments(tmp_path), **given)


def test_a_mixin_that_comes_last_is_refused():
    with pytest.raises(TypeError, match=r"Adversarial before the Trainer in the bases of Wrong"):
        type("Wrong", (Trainer, Adversarial), {})


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_played_is_refused_at_construction(case: str, tmp_path: Path):
    solver, changes, kind, message = REFUSED[case]
    with pytest.raises(kind, match=message):
        trainer_of(tmp_path, solver, **changes)


def test_a_head_whose_gradients_trainer_would_not_clip_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Older versions of Trainer clip those of its model where no subclass can add others."""
    monkeypatch.delattr(Trainer, "_clip_grad_norm", raising=False)
    solver = mixadv.CAT(head=nn.Linear(16, 4))
    with pytest.raises(ValueError, match=r"CAT trains a module .* set max_grad_norm=0"):
        trainer_of(tmp_path, solver)
    assert trainer_of(tmp_path, solver, max_grad_norm=0.0).solver is solver
    assert trainer_of(tmp_path, mixadv.CAT()).args.max_grad_norm == 1.0


def test_no_solver_is_refused_with_an_example(tmp_path: Path):
    with pytest.raises(TypeError, match=r"solver such as mixadv\.FreeLB\(\), got None"):
        AdversarialTrainer(player("bert").model, arguments(tmp_path))


def test_several_devices_in_one_process_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(TrainingArguments, "n_gpu", property(lambda self: 2))
    with pytest.raises(ValueError, match=r"sees 2 GPUs .* start it with torchrun"):
        trainer_of(tmp_path, mixadv.FreeLB())


def prepared_with(monkeypatch: pytest.MonkeyPatch, flag: str, **state: Any) -> None:
    """Have Trainers believe that a backend is on, and its Accelerator has a state."""
    prepare = Trainer.create_accelerator_and_postprocess

    def prepared(self: Any) -> None:
        prepare(self)
        vars(self)[flag] = True
        if state:  # in place of one that all Accelerators share
            self.accelerator.state = SimpleNamespace(**state)

    monkeypatch.setattr(Trainer, "create_accelerator_and_postprocess", prepared)


@pytest.mark.parametrize("size", ["cp_size", "sp_size"])
def test_processes_that_share_a_text_are_refused(
    size: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    layout = ParallelismConfig(**{size: 2})
    prepared_with(monkeypatch, "is_deepspeed_enabled", parallelism_config=layout)
    with pytest.raises(ValueError, match="a part of each text: it would draw δ for that part"):
        trainer_of(tmp_path, mixadv.FreeLB())


TWICE = {"given": {"schedule": mixadv.Schedule(every=2)}, "gradient_accumulation_steps": 2}
OWN = {"given": {"optimizers": (torch.optim.SGD([nn.Parameter(torch.zeros(1))]), None)}}


@pytest.mark.parametrize(
    ("solver", "config", "changes", "why"),
    [
        (mixadv.SMART(), {}, {}, r"SMART moves the weights.*fsdp=True"),
        (mixadv.CAT(head=nn.Linear(16, 4)), {}, {}, "CAT trains a module"),
        (mixadv.SAM(), {}, {}, "SAM differentiates the weights twice.*use stage 1"),
        (mixadv.PGD(), {"zero_optimization": {"stage": 3}}, {}, "Use stage 1 or 2"),
        (
            mixadv.PGD(),
            {"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu"}}},
            {},
            "with offload_optimizer in",
        ),
        (mixadv.PGD(), {"fp16": {"enabled": True}}, {}, "not tested with fp16.*leave it out"),
        (mixadv.PGD(), {"tensor_parallel": {"autotp_size": 2}}, {}, "with tensor_parallel in"),
        (mixadv.PGD(), {}, {"torch_compile": True}, "with torch_compile"),
        (mixadv.PGD(), {}, TWICE, "leave schedule= out"),
        (mixadv.PGD(), {}, OWN, "leave optimizers= out"),
    ],
)
def test_what_deepspeed_was_not_seen_to_train_is_refused(
    solver: mixadv.Solver,
    config: dict[str, Any],
    changes: dict[str, Any],
    why: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    config = {"zero_optimization": {"stage": 2}, **config}
    stage = config["zero_optimization"]["stage"]
    plugin = SimpleNamespace(zero_stage=stage, deepspeed_config=config)
    prepared_with(monkeypatch, "is_deepspeed_enabled", deepspeed_plugin=plugin)
    with pytest.raises(ValueError, match=why):
        trainer_of(tmp_path, solver, **changes)


@pytest.mark.parametrize(
    ("plugin", "changes", "why"),
    [
        ({"fsdp_version": 1}, {}, r"FSDP1 flattens.*\{'version': 2\}"),
        ({"cpu_offload": CPUOffloadPolicy()}, {}, "leave cpu_offload out"),
        ({"activation_checkpointing": True}, {}, "set gradient_checkpointing=True"),
        (
            {},
            {"load_best_model_at_end": True, "eval_strategy": "steps", "save_strategy": "steps"},
            "evaluate_average=False",
        ),
    ],
    ids=["version", "offload", "checkpointing", "best"],
)
def test_what_was_not_seen_under_fsdp_is_refused(
    plugin: Any, changes: Any, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    usual = {"fsdp_version": 2, "cpu_offload": OffloadPolicy(), "activation_checkpointing": False}
    words = SimpleNamespace(**usual | plugin)
    prepared_with(monkeypatch, "is_fsdp_enabled", fsdp_plugin=words)
    with pytest.raises(ValueError, match=why):
        trainer_of(tmp_path, mixadv.MAT(), **changes)


def test_a_head_after_the_schedule_is_refused_at_construction(tmp_path: Path):
    p = player("bert")
    given = {"model": p.model, "optimizers": pair(p.model)}
    with pytest.raises(ValueError, match="wrap the optimizer before the scheduler is made"):
        trainer_of(tmp_path, mixadv.CAT(head=nn.Linear(16, 4)), given=given)


def test_the_game_is_there_when_training_begins(tmp_path: Path):
    trainer = trainer_of(tmp_path, mixadv.FreeLB())
    with pytest.raises(mixadv.GameError, match="made with the optimizer, when training begins"):
        _ = trainer.game
    assert "eval_loss" in trainer.evaluate()


def test_a_missing_package_is_named_with_its_extra_and_the_core_does_without():
    program = """
import sys
for name in ("transformers", "trl", "scipy", "sklearn", "matplotlib"):
    sys.modules[name] = None
import mixadv
def tried(name):
    try:
        __import__(name)
    except ImportError as error:
        print(error)
for name in ("transformers", "trl"):
    tried(f"mixadv.integrations.{name}")
tried("mixadv.robustness")
del sys.modules["scipy"]
tried("mixadv.neurons")
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    for extra in ("transformers", "trl", "robustness"):
        assert f"pip install 'mixadv[{extra}]'" in run.stdout, run.stderr
    assert "mixadv.robustness needs numpy, scipy and tqdm (import of scipy halted" in run.stdout
    needed = "numpy, scipy, scikit-learn and tqdm (No module named 'sklearn'"
    assert f"mixadv.neurons needs {needed}" in run.stdout


# Where δ may act ----------------------------------------------------------------------------------


def prompts(rows: int = 8) -> tuple[list[dict[str, Tensor]], Tensor]:
    """Return rows with a column of where δ may act, and that column: another third for each row."""
    data = rows_of(player("bert", rows=rows).batch)
    length = len(data[0]["input_ids"])
    masks = torch.stack([(torch.arange(length) % 3 == i % 3).long() for i in range(rows)])
    return [row | {"prompt_mask": mask} for row, mask in zip(data, masks, strict=True)], masks


@pytest.mark.parametrize("name", ["pgd", "freelb", "vat", "smart", "mat"])
@pytest.mark.parametrize("kind", ["list", "data set"])
def test_delta_acts_where_a_column_says(name: str, kind: str, tmp_path: Path):
    rows, masks = prompts()
    data: Any = rows
    if kind == "data set":  # from which Trainer drops the columns that no argument is named like
        datasets = pytest.importorskip("datasets")
        plain = [{key: value.tolist() for key, value in row.items()} for row in rows]
        data = datasets.Dataset.from_list([row | {"unused": 1} for row in plain])
    played = []

    class Noted(AdversarialTrainer):
        def compute_loss(self, model: Any, inputs: Any, *given: Any, **keywords: Any) -> Any:
            found = super().compute_loss(model, inputs, *given, **keywords)
            if torch.is_grad_enabled():
                assert "unused" not in inputs
                played.append((inputs["prompt_mask"], self.game.strategy.points[0]))
            return found

    given = {"train_dataset": data, "eval_dataset": data, "where": "prompt_mask"}
    trainer = trainer_of(tmp_path, mixadv.make_solver(name), base=Noted, given=given)
    trainer.train()
    assert len(played) == 2
    for mask, points in played:
        assert all((row == masks).all(1).any() for row in mask)
        assert not points[:, mask == 0].any()
        assert points[:, mask == 1].any()
    assert int(trainer.game.outcome.positions) == int(played[-1][0].sum())
    assert trainer.evaluate()["eval_loss"] > 0
    assert len(trainer.predict(data).predictions) == len(rows)


def test_a_column_of_ones_at_real_tokens_changes_nothing(tmp_path: Path):
    rows = rows_of(player("bert", rows=8).batch)
    told = [row | {"real": row["attention_mask"]} for row in rows]
    plain = trained(tmp_path, mixadv.FreeLB())
    given = {"train_dataset": told, "eval_dataset": told, "where": "real"}
    trainer = trained(tmp_path, mixadv.FreeLB(), given=given)
    assert_same(weights(trainer), weights(plain))
    assert trainer.evaluate()["eval_loss"] == plain.evaluate()["eval_loss"]


def test_where_may_be_a_function_of_the_call(tmp_path: Path):
    def first(call: Any) -> Tensor:
        return torch.arange(call.shape[1]).expand(call.shape[:2]) < 2

    trainer = trained(tmp_path, mixadv.PGD(), given={"where": first})
    [points] = trainer.game.strategy.points
    assert points[:, :, :2].any()
    assert not points[:, :, 2:].any()
    trainer.evaluate()


def test_a_column_that_is_not_there_is_said(tmp_path: Path):
    trainer = trainer_of(tmp_path, mixadv.PGD(), given={"where": "prompt_mask"})
    with pytest.raises(mixadv.GameError, match=r"'prompt_mask' names a column .* it has input_ids"):
        trainer.train()
    trainer.evaluate()  # where nothing is played


@pytest.mark.parametrize(
    ("where", "kind", "said"),
    [
        (torch.ones(4, 9), TypeError, "name of a column .* got Tensor: a mask belongs to one"),
        ("attention_mask", ValueError, "argument of the model, which would not get it"),
    ],
)
def test_where_that_is_no_column_of_the_game_is_refused(
    where: Any, kind: type[Exception], said: str, tmp_path: Path
):
    with pytest.raises(kind, match=said):
        trainer_of(tmp_path, mixadv.PGD(), given={"where": where})


def test_an_argument_that_an_adapter_hides_is_the_models_all_the_same(tmp_path: Path):
    peft = pytest.importorskip("peft", reason="adapters are PEFT's")
    for task in (None, "SEQ_CLS"):
        config = peft.LoraConfig(r=2, target_modules=["query"], task_type=task)
        given = {"model": peft.get_peft_model(player("bert").model, config)}
        for where in ("attention_mask", "token_type_ids"):
            with pytest.raises(ValueError, match="argument of the model, which would not get it"):
                trainer_of(tmp_path, mixadv.PGD(), given={**given, "where": where})


# Rows that are weighed ----------------------------------------------------------------------------


def loss_of_each(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    return F.cross_entropy(outputs.logits, labels, reduction="none")


def grouped(column: str = "group") -> list[dict[str, Any]]:
    return [row | {column: i % 2} for i, row in enumerate(rows_of(text_batch(8)))]


@pytest.mark.parametrize("kind", ["list", "data set"])
def test_groups_are_those_of_a_column_and_their_weights_are_logged(kind: str, tmp_path: Path):
    data: Any = grouped()
    if kind == "data set":  # from which Trainer drops the columns that no argument is named like
        datasets = pytest.importorskip("datasets")
        plain = [{k: torch.as_tensor(v).tolist() for k, v in row.items()} for row in data]
        data = datasets.Dataset.from_list(plain)
    told = {"train_dataset": data, "eval_dataset": data, "groups": "group"}
    given = {**told, "compute_loss_func": loss_of_each}
    trainer = trained(tmp_path, mixadv.GroupDRO(groups=2, mirror_step=1.0, steps=1), given=given)
    weights = trainer.game.state_dict()["memory"]["group log-weights"].exp()
    assert float(weights.sum()) == pytest.approx(1)
    assert logged(trainer, "worst_group")[-1] == int(weights.argmax())
    assert logged(trainer, "worst_group_weight")[-1] == pytest.approx(float(weights.max()))
    assert 0 < logged(trainer, "effective_rows")[-1] <= 4 + 1e-5
    assert logged(trainer, "radius")[-1] > 0
    assert trainer.evaluate()["eval_loss"] > 0
    assert len(trainer.predict(data).predictions) == 8


def test_rows_are_weighed_in_trainer_as_in_a_loop_by_hand(tmp_path: Path):
    data, solver = grouped(), mixadv.GroupDRO(groups=2, mirror_step=1.0)
    given = {"train_dataset": data, "groups": "group", "compute_loss_func": loss_of_each}
    options = {"given": given, "dropout": False, "optim": "sgd", "learning_rate": 0.1}
    trainer = trainer_of(
        tmp_path, solver, max_grad_norm=1e9, lr_scheduler_type="constant", **options
    )
    played: list[Any] = []
    seen = trainer.compute_loss

    def noted(model: Any, inputs: Any, *more: Any, **words: Any) -> Any:
        played.append({k: v.clone() for k, v in inputs.items()})
        return seen(model, inputs, *more, **words)

    trainer.compute_loss = noted
    trainer.train()
    assert len(played) == 2
    p = player("bert", rows=8)
    model = without_dropout(p.model)
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = mixadv.wrap(base, model, solver)
    for batch in played:
        groups = batch.pop("group")

        def closure(batch: Any = batch) -> Tensor:
            return loss_of_each(model(**batch), batch["labels"])

        optimizer.step(closure, groups=groups)
    own = [x.detach() for x in model.parameters()]
    torch.testing.assert_close([x.detach() for x in trainer.model.parameters()], own)


def test_groups_in_a_trainer_are_refused_in_words(tmp_path: Path):
    solver = mixadv.GroupDRO(groups=2)
    given: dict[str, Any] = {"train_dataset": grouped(), "compute_loss_func": loss_of_each}
    with pytest.raises(mixadv.GameError, match=r"in a Trainer groups= is the name of a column"):
        trained(tmp_path, solver, given=given)
    with pytest.raises(mixadv.GameError, match=r"groups='team' names a column that the batch lack"):
        trained(tmp_path, solver, given={**given, "groups": "team"})
    with pytest.raises(ValueError, match=r"groups='labels' is an argument of the model"):
        trained(tmp_path, solver, given={**given, "groups": "labels"})
    with pytest.raises(TypeError, match=r"groups must be the name of a column.*Tensor"):
        trained(tmp_path, solver, given={**given, "groups": torch.zeros(8)})
    given = {"train_dataset": grouped(), "groups": "group"}
    with pytest.raises(mixadv.GameError, match=r"one loss for all.*compute_loss_func=lambda"):
        trained(tmp_path, solver, given=given)
