"""TRL's SFTTrainer plays a game, by the mixin alone and with the logits that some solvers need."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import mixadv
from tests.test_trainer import (
    alone,  # noqa: F401
    logged,
    settings,
    weights,
)
from tests.zoo import PAD, assert_same, or_refused, player

pytest.importorskip("trl", reason="SFTTrainer is TRL's")
pytest.importorskip("peft", reason="adapters are PEFT's")

import peft
from datasets import Dataset, disable_progress_bars
from tokenizers import Tokenizer, models, pre_tokenizers
from trl import SFTConfig, SFTTrainer

from mixadv.integrations.transformers import Adversarial
from mixadv.integrations.trl import AdversarialSFTTrainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*starts below the noise floor"),
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*is deprecated:FutureWarning"),
]

disable_progress_bars()
DATA = Dataset.from_list(
    [{"prompt": f"w{3 + i} w{10 + i} w5", "completion": f" w{20 + i} w9 w7"} for i in range(8)]
)


class Mixed(Adversarial, SFTTrainer):
    """The mixin alone."""


def tokenizer() -> Any:
    words = {f"w{i}": i for i in range(3, 99)} | {"<s>": 0, "<pad>": PAD, "</s>": 2}
    found = Tokenizer(models.WordLevel(words, unk_token="<s>"))
    found.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {"pad_token": "<pad>", "eos_token": "</s>", "bos_token": "<s>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=found, **names)


def trained(
    folder: Path,
    base: type[SFTTrainer],
    given: dict[str, Any] | None = None,
    **changes: Any,
) -> Any:
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "bf16": False}
    trainer = base(
        args=SFTConfig(**settings(folder, **(options | changes))),
        train_dataset=DATA,
        processing_class=tokenizer(),
        **{"model": player("llama-causal").model, **(given or {})},
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize("base", [Mixed, AdversarialSFTTrainer])
def test_radius_zero_is_sft_bit_for_bit(base: type[SFTTrainer], tmp_path: Path):
    plain = trained(tmp_path, SFTTrainer)
    trainer = trained(tmp_path, base, {"solver": mixadv.PGD(radius=0)})
    assert_same(weights(trainer), weights(plain))
    assert logged(trainer) == pytest.approx(logged(plain), rel=1e-6)
    if base is AdversarialSFTTrainer:
        assert logged(trainer, "num_tokens") == logged(plain, "num_tokens")


def test_the_log_has_the_metrics_of_both(tmp_path: Path):
    """Each has an entropy: that of the tokens is SFTTrainer's."""
    trainer = trained(tmp_path, AdversarialSFTTrainer, {"solver": mixadv.FGM()})
    names = ("entropy", "strategy_entropy", "payoff", "mean_token_accuracy")
    token, strategy, payoff, _ = (logged(trainer, name)[0] for name in names)
    assert strategy == 0
    assert 4 < token < 5
    assert payoff > logged(trainer, "clean_loss")[0]


def test_a_solver_that_compares_predictions_gets_logits_and_the_same_loss(tmp_path: Path):
    solver = mixadv.MAT(
        learner_steps=1, learner_temperature=0.0, damping=0.0, round_damping=0.0, radius=0
    )
    options = {"optim": "sgd", "learning_rate": 0.1}
    plain = trained(tmp_path, SFTTrainer, **options)
    trainer = trained(tmp_path, AdversarialSFTTrainer, {"solver": solver}, **options)
    torch.testing.assert_close(weights(trainer), weights(plain), rtol=1e-4, atol=1e-6)
    solver = dataclasses.replace(solver, radius=0.5)
    trainer = trained(tmp_path, AdversarialSFTTrainer, {"solver": solver}, **options)
    assert min(logged(trainer, "payoff")) > 0


@pytest.mark.parametrize("name", mixadv.SOLVERS)
@or_refused("Trainer", "SFTTrainer")
def test_every_solver_trains(name: str, tmp_path: Path):
    given = {"solver": mixadv.make_solver(name)}
    trainer = trained(tmp_path, AdversarialSFTTrainer, given, max_steps=1)
    assert trainer.game.round == 2
    assert logged(trainer, "radius")[0] > 0
    before = player("llama-causal").model.parameters()
    assert any(not torch.equal(a, b) for a, b in zip(weights(trainer), before, strict=True))


@pytest.mark.filterwarnings("ignore:.*label_smoothing_factor.*is deprecated:FutureWarning")
def test_a_loss_of_logits_costs_no_second_pass(tmp_path: Path):
    """SFTTrainer makes one for its metrics, which would be another call at the site."""
    found = []
    for factor in (0.0, 1e-9):
        given = {"solver": mixadv.PGD(steps=1, start="zero")}
        options = {"label_smoothing_factor": factor, "max_steps": 1}
        trainer = trained(tmp_path, AdversarialSFTTrainer, given, **options)
        assert len(trainer.game.strategy.points) == 1
        found.append([trainer.game.strategy.points[0].norm(), logged(trainer, "radius")[0]])
    torch.testing.assert_close(*map(torch.tensor, found), rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    ("way", "texts"),
    [
        ({"padding_free": True, "max_length": None}, 2),
        ({"packing": True, "max_length": 16}, 4),
    ],
    ids=["padding-free", "packed"],
)
def test_texts_of_a_batch_without_padding_each_play(
    way: dict[str, Any], texts: int, tmp_path: Path
):
    """Laid end to end in one row, they are not one sample with one ball."""
    given = {"solver": mixadv.PGD(steps=1, start="zero", radius=0.05)}
    trainer = trained(tmp_path, AdversarialSFTTrainer, given, max_steps=1, **way)
    assert trainer.game.site.packed
    points = trainer.game.strategy.points[0]
    assert points.shape[:3] == (1, 1, 7 * texts)
    lengths = points.view(texts, -1).norm(dim=1)
    torch.testing.assert_close(lengths, torch.full((texts,), 0.05), rtol=1e-5, atol=0)


def test_logits_that_do_not_exist_are_refused(tmp_path: Path):
    with pytest.raises(ValueError, match=r"SMART compares logits.*loss_type='dft': choose 'nll'"):
        trained(tmp_path, AdversarialSFTTrainer, {"solver": mixadv.SMART()}, loss_type="dft")


def test_adapters_are_trained_and_nothing_else(tmp_path: Path):
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    given = {"solver": mixadv.FreeLB(radius=0.3), "peft_config": config}
    trainer = trained(tmp_path, AdversarialSFTTrainer, given)
    before = player("llama-causal").model.state_dict()
    after = trainer.model.get_base_model().state_dict()
    same = [n for n in before if n in after]
    assert len(same) > 5
    assert_same({n: after[n] for n in same}, {n: before[n] for n in same})
    lora = [p for n, p in trainer.model.named_parameters() if "lora_B" in n]
    assert lora
    assert all(bool(p.any()) for p in lora)


@pytest.mark.parametrize("asked", [None, 0.5])
def test_experts_are_balanced_as_by_sft(asked: float | None, tmp_path: Path):
    """The loss that balances them is averaged over micro-batches, the other divided by tokens."""

    def train(base: Any, solver: mixadv.Solver | None) -> Any:
        config = transformers.MixtralConfig(
            vocab_size=99,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            num_local_experts=4,
            pad_token_id=PAD,
            router_aux_loss_coef=1.0,
        )
        torch.manual_seed(0)
        given = {"model": transformers.MixtralForCausalLM(config)}
        given |= {} if solver is None else {"solver": solver}
        how: Any = {"max_steps": 1, "optim": "sgd", "learning_rate": 0.1}
        return trained(tmp_path, base, given, **how, router_aux_loss_coef=asked)

    plain = train(SFTTrainer, None)
    adversarial = train(AdversarialSFTTrainer, mixadv.ALUM(radius=0))
    ours, theirs = (t.state.log_history[0]["loss"] for t in (adversarial, plain))
    assert ours == pytest.approx(theirs, rel=1e-5)
    for own, other in zip(adversarial.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-6)
