"""Adapters as members: a row under its own adapter is what that adapter alone gives it."""

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mixadv
from mixadv.mixtures import Adapter, Mixture, Weights
from mixadv.mixtures.mixture import combine
from tests.zoo import player

peft = pytest.importorskip("peft", reason="adapters are PEFT's")

NAMES = ("default", "second", "third")
LORA: dict[str, Any] = {"r": 2, "target_modules": ["query", "value"], "lora_dropout": 0.1}


def adapted(names: tuple[str, ...] = NAMES, **changes: Any) -> tuple[nn.Module, dict[str, Tensor]]:
    """Return a tiny classifier with adapters and heads of their own, in training mode."""
    model, batch, _ = player("bert", rows=8)
    options: dict[str, Any] = {
        **LORA,
        "init_lora_weights": False,
        "task_type": "SEQ_CLS",
        **changes,
    }
    torch.manual_seed(1)
    config = peft.LoraConfig(**options)
    found = peft.get_peft_model(model, config, adapter_name=names[0])
    for name in names[1:]:
        found.add_adapter(name, config)
    for name, parameter in found.named_parameters():
        if "modules_to_save" in name:
            parameter.data.add_(torch.randn_like(parameter), alpha=0.3)
    return found.train(), {name: value for name, value in batch.items() if name != "labels"}


def mixture(model: nn.Module) -> Mixture:
    return Mixture([Adapter(name) for name in NAMES], [1, 2, 3], model=model)


def trace(model: Any) -> Any:
    """Return what playing must leave as it is: flags, modes, hooks, the active adapter."""
    parameters = [(name, p.requires_grad) for name, p in model.named_parameters()]
    modules = [(m.training, len(m._forward_pre_hooks)) for m in model.modules()]
    active = model.active_adapter, list(model.active_adapters)
    return parameters, modules, active, torch.get_rng_state().tolist()


def counted(model: nn.Module) -> list[int]:
    """Count the passes of the encoder from here on."""
    passes: list[int] = []
    encoder: Any = model
    encoder = encoder.base_model.model.bert
    encoder.register_forward_hook(lambda *_: passes.append(1))
    return passes


def test_an_adapter_plays_alone_and_leaves_no_trace():
    model, batch = adapted()
    played, before = mixture(model), trace(model)
    with contextlib.suppress(KeyError), played.member(1):
        found = played(**batch).logits
        raise KeyError
    assert trace(model) == before
    model.eval()
    model.set_adapter("second")  # pyright: ignore[reportCallIssue]
    assert torch.equal(found, model(**batch).logits)


@pytest.mark.parametrize("seed", range(3))
def test_rows_drawn_in_one_pass_are_those_of_the_members(seed: int):
    model, batch = adapted()
    played = mixture(model)
    before, passes = trace(model), counted(model)
    once = played.predict(lambda: played(**batch), "draw", seed=seed)
    assert len(passes) == 1
    assert trace(model) == before
    each = played.each(lambda: played(**batch))
    assert len(passes) == 4
    torch.testing.assert_close(once, combine(each, played.probabilities, "draw", seed))
    assert (each[0] - each[1]).abs().max() > 1e-3  # the adapters differ


@pytest.mark.parametrize("how", [{"use_dora": True}, {"modules_to_save": ["pooler", "classifier"]}])
def test_what_peft_refuses_in_one_pass_is_drawn_member_by_member(how: dict[str, Any]):
    """It leaves its hooks behind where it refuses: the next prediction would be of their rows."""
    model, batch = adapted(**how)
    played = mixture(model)
    before = trace(model)
    found = played.predict(lambda: played(**batch), "draw", seed=3)
    assert trace(model) == before
    each = played.each(lambda: played(**batch))
    torch.testing.assert_close(found, combine(each, played.probabilities, "draw", 3))


def test_a_prediction_of_several_calls_is_drawn_member_by_member():
    """Each call's rows would be drawn from the same seed."""
    model, batch = adapted()
    played = mixture(model)

    def halves() -> Tensor:
        parts = [{n: v[rows] for n, v in batch.items()} for rows in (slice(4), slice(4, 8))]
        return torch.cat([played(**part).logits for part in parts])

    found = played.predict(halves, "draw", seed=1)
    each = played.each(halves)
    torch.testing.assert_close(found, combine(each, played.probabilities, "draw", 1))


@pytest.mark.parametrize("wrapped", [False, True])
def test_adapters_are_saved_as_peft_saves_them(wrapped: bool, tmp_path: Path):
    model, batch = adapted()
    played = mixture(model)
    before = trace(model)
    played.save_pretrained(tmp_path)
    assert trace(model) == before
    base: Any = adapted(("other",))[0] if wrapped else player("bert", rows=8).model.train()
    found = Mixture.from_pretrained(tmp_path, base)
    each = played.each(lambda: played(**batch))
    assert torch.equal(found.each(lambda: found(**batch)), each)
    assert found.probabilities.tolist() == played.probabilities.tolist()
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert sum(path.name == "adapter_model.safetensors" for path in files) == 3
    assert not any(path.suffix in (".bin", ".pt") for path in files)
    if wrapped:
        assert found.model is base
        assert base.active_adapter == "other"
    for path in tmp_path.rglob("adapter_config.json"):
        path.unlink()
    with pytest.raises(FileNotFoundError, match="not copied whole"):
        Mixture.from_pretrained(tmp_path, base)


def test_an_adapter_of_the_same_name_is_neither_written_into_nor_taken_for_it(tmp_path: Path):
    model, batch = adapted(lora_alpha=32)
    played = mixture(model)
    each = played.each(lambda: played(**batch))
    played.save_pretrained(tmp_path)
    base, _ = adapted(("default",), lora_alpha=4)
    own = Mixture([Adapter("default")], model=base)
    alone = own.each(lambda: own(**batch))
    found = Mixture.from_pretrained(tmp_path, base)
    assert torch.equal(found.each(lambda: found(**batch)), each)
    assert torch.equal(own.each(lambda: own(**batch)), alone)


def test_an_adapter_is_small_on_disk(tmp_path: Path):
    model, _ = adapted()
    Mixture([Adapter("second")], model=model).save_pretrained(tmp_path)
    size = sum(path.stat().st_size for path in tmp_path.rglob("*.safetensors"))
    whole = sum(p.numel() * p.element_size() for p in model.parameters())
    assert size < whole / 2


def test_samples_of_a_game_on_adapters_are_adapters_alone():
    """They are weights by name: those of the base are not among them."""
    model, batch, _ = player("bert", rows=8)
    model = peft.get_peft_model(model, peft.LoraConfig(**LORA, task_type="SEQ_CLS"))
    optimizer = mixadv.wrap(
        torch.optim.SGD(model.parameters(), lr=0.1), model, mixadv.MAT(samples=2, learner_steps=1)
    )
    for _ in range(2):
        optimizer.step(lambda: model(**batch))
    found = mixadv.mixtures.mixture_of(optimizer.game)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    for member in found.members:
        assert isinstance(member, Weights)
        assert set(member.values) == trained


def test_merged_adapters_are_refused():
    """PEFT would take them apart, and leave the model so."""
    model: Any = adapted()[0]
    played = mixture(model)
    model.merge_adapter(["default"])
    with pytest.raises(mixadv.GameError, match="unmerge_adapter"), played.member(1):
        pass


def test_what_has_no_such_adapter_is_refused():
    model, _ = adapted()
    with pytest.raises(ValueError, match="only 'default', 'second', 'third'"):
        Mixture([Adapter("fourth")], model=model)
    with pytest.raises(ValueError, match=r"needs a peft\.PeftModel"):
        Mixture([Adapter("default")], model=nn.Linear(1, 1))


def test_a_base_that_is_read_into_stays_in_training(tmp_path: Path):
    """PEFT puts the whole model in evaluation mode, which is the caller's."""
    model, _ = adapted()
    mixture(model).save_pretrained(tmp_path)
    base = player("bert", rows=8)[0].train()
    base.dropout.eval()
    found = Mixture.from_pretrained(tmp_path, base)
    assert found.model.training
    assert base.training
    assert base.bert.encoder.training
    assert not base.dropout.training
