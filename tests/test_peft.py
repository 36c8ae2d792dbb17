"""Adapters: they alone are trained, and the adversary acts through the frozen model."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mixadv
from tests.test_trainer import alone, trained  # noqa: F401
from tests.zoo import Player, assert_same, player, wrapped

peft = pytest.importorskip("peft", reason="adapters are PEFT's")

pytestmark = pytest.mark.filterwarnings("ignore:.*starts below the noise floor")

TARGETS = {"bert": ["query", "value"], "llama-causal": ["q_proj", "v_proj"]}


def adapted(family: str, **changes: Any) -> Player:
    """Return a tiny model with adapters that are not at zero, in training mode."""
    p = player(family, rows=8)
    options: dict[str, Any] = {"r": 2, "target_modules": TARGETS[family], "lora_dropout": 0.1}
    options |= {"init_lora_weights": False, **changes}
    torch.manual_seed(1)
    model = peft.get_peft_model(p.model, peft.LoraConfig(**options))
    return p._replace(model=model.train())


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def moved(model: nn.Module, before: dict[str, Tensor]) -> set[str]:
    return {n for n, value in model.state_dict().items() if not torch.equal(value, before[n])}


def adapters(model: nn.Module) -> set[str]:
    return {n for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("family", TARGETS)
@pytest.mark.parametrize("name", mixadv.SOLVERS)
def test_adapters_alone_are_trained(name: str, family: str):
    """Noise, teacher and averages too leave the frozen weights alone."""
    p = adapted(family)
    before, trainable = state(p.model), adapters(p.model)
    changes = {"learner_temperature": 1e-4} if name == "mat" else {}
    optimizer = wrapped(p.model, mixadv.make_solver(name, **changes), lr=0.5)  # of frozen ones too
    for _ in range(2):
        optimizer.step(p.closure())
    assert trainable
    assert moved(p.model, before) == trainable
    learner = optimizer.game.learner
    if name == "mat":
        assert set(optimizer.game.rounds.arena.named(learner.average)) == trainable
    if name == "smart":
        assert set(optimizer.game.teacher()) == trainable


@pytest.mark.parametrize("family", TARGETS)
def test_the_payoff_grows_with_the_radius(family: str):
    """The embedding is frozen, where an adversary on its weights would do nothing."""
    payoffs = []
    for radius in (0.0, 0.1, 0.4):
        p = adapted(family, lora_dropout=0.0)
        solver = mixadv.PGD(start="zero", steps=3, radius=radius, step_size=0.2)
        outcome = mixadv.Game(p.model, solver).backward(p.closure())
        payoffs.append(float(outcome.payoff))
        assert all(q.grad is None for q in p.model.parameters() if not q.requires_grad)
    assert payoffs[0] < payoffs[1] < payoffs[2]


def test_an_adapter_around_the_embedding_is_in_front_of_the_adversary():
    p = adapted("bert", target_modules=["word_embeddings"])
    optimizer = wrapped(p.model, mixadv.TextAT(), lr=0.5)
    before = state(p.model)
    optimizer.step(p.closure())
    assert moved(p.model, before) == adapters(p.model)
    assert optimizer.game.site.names[0].endswith("word_embeddings")


def test_trainer_trains_adapters_and_they_can_be_saved(tmp_path: Path):
    p = adapted("bert", task_type="SEQ_CLS")
    before, trainable = state(p.model), adapters(p.model)
    given = {"model": p.model}
    trainer = trained(tmp_path, mixadv.MAT(learner_steps=1), given=given)
    assert moved(p.model, before) == trainable
    with trainer.game.averaged():
        trainer.save_model(str(tmp_path / "adapter"))
        averaged = state(p.model)
    files = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert "adapter_model.safetensors" in files
    assert "model.safetensors" not in files
    loaded = peft.PeftModel.from_pretrained(player("bert").model, tmp_path / "adapter")
    assert_same({n: loaded.state_dict()[n] for n in trainable}, {n: averaged[n] for n in trainable})


PROMPTS = {"prompt": peft.PromptTuningConfig, "prefix": peft.PrefixTuningConfig}


@pytest.mark.parametrize("family", TARGETS)
@pytest.mark.parametrize("kind", PROMPTS)
def test_virtual_tokens_neither_move_nor_count(kind: str, family: str):
    p, task = player(family, rows=8), {"bert": "SEQ_CLS", "llama-causal": "CAUSAL_LM"}[family]
    config = PROMPTS[kind](task_type=task, num_virtual_tokens=3)
    model = peft.get_peft_model(p.model, config).train()
    p = p._replace(model=model)
    game = mixadv.Game(model, mixadv.PGD(payoff="kl", start_size=0.3))
    game.backward(p.closure())
    (delta,) = game.strategy.points
    lengths, real = delta[0].norm(dim=-1), p.batch["attention_mask"] > 0
    assert lengths.shape == real.shape
    assert (lengths[real] > 0).all()
    assert not lengths[~real].any()
    with game.rounds.open(p.closure()) as update:
        (stage,) = update.stages
        mask = stage.clean().mask
    if family == "llama-causal":
        labelled = (p.batch["labels"] >= 0)[:, 1:]
        assert mask[:, -labelled.shape[1] - 1 : -1].equal(labelled)
        # The last virtual token foretells the first.
        assert mask.sum() <= labelled.sum() + len(mask)


@pytest.mark.parametrize("average", [True, False])
def test_the_best_adapters_are_those_that_were_evaluated_best(average: bool, tmp_path: Path):
    steps = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    options = {**steps, "load_best_model_at_end": True, "learning_rate": 0.1, "max_steps": 4}
    given = {"model": adapted("bert", task_type="SEQ_CLS").model, "evaluate_average": average}
    trainer = trained(tmp_path, mixadv.MAT(), given=given, **options)
    trainer.evaluate_average = False
    found = trainer.evaluate()["eval_loss"]
    assert found == pytest.approx(trainer.state.best_metric, abs=1e-6)


class Quantised(nn.Module):
    """A linear layer whose frozen weight is bytes, as those of 8-bit base models."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach()
        scale = weight.abs().amax() / 127
        self.weight = nn.Parameter((weight / scale + 128).round().byte(), requires_grad=False)
        self.bias = nn.Parameter(linear.bias.detach().clone(), requires_grad=False)
        self.register_buffer("scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, (self.weight.to(x.dtype) - 128) * self.scale, self.bias)


@pytest.mark.parametrize("name", mixadv.SOLVERS)
def test_a_base_of_bytes_that_lets_gradients_through_is_played_on(name: str):
    p = adapted("bert")
    for layer in p.model.base_model.model.bert.encoder.layer:
        layer.intermediate.dense = Quantised(layer.intermediate.dense)
    before, trainable = state(p.model), adapters(p.model)
    optimizer = wrapped(p.model, mixadv.make_solver(name), lr=0.5)
    for _ in range(2):
        optimizer.step(p.closure())
    assert moved(p.model, before) == trainable


def test_a_base_that_lets_no_gradient_through_is_refused():
    """Kernels for inference alone have no backward."""
    p = adapted("bert", target_modules=["pooler.dense"])
    encoder = p.model.base_model.model.bert.encoder
    encoder.forward = torch.no_grad()(encoder.forward)
    with pytest.raises(mixadv.GameError, match="no gradient with respect to δ"):
        mixadv.Game(p.model, mixadv.PGD()).backward(p.closure())
