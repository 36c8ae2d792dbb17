"""A mixture is loaded onto the base that it was saved with, or it is said which part differs."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mixadv
from mixadv.mixtures import Adapter, Dropout, Mixture, mixture_of
from tests.test_mixtures import Net, X, three
from tests.zoo import player

OTHER = "not the base that the members of"
HEAD = ("layers.3.weight", "layers.3.bias")


def heads(base: nn.Module) -> Mixture:
    """Two heads on one body."""
    random = torch.Generator().manual_seed(0)
    shapes = {name: base.get_parameter(name).shape for name in HEAD}
    members = [{n: torch.randn(s, generator=random) for n, s in shapes.items()} for _ in range(2)]
    return Mixture(members, model=base)


def digests(folder: Path) -> dict[str, str]:
    return json.loads((folder / "mixture.json").read_text())["base"]


def nudged(model: nn.Module, name: str) -> nn.Module:
    """Return the model with one number of one tensor changed by the least there is."""
    value = model.state_dict()[name].view(-1)
    value[-1] = torch.nextafter(value[-1], torch.tensor(torch.inf))
    return model


def retrained(model: nn.Module) -> nn.Module:
    loss = nn.functional.cross_entropy(model(X), torch.arange(5) % 4)
    loss.backward()
    torch.optim.SGD(model.parameters(), lr=1e-3).step()
    return model.requires_grad_(False)


def test_the_digest_is_that_of_format_shape_and_bytes(tmp_path: Path):
    base = Net(1)
    heads(base).save_pretrained(tmp_path)
    expected = {}
    for name in ("layers.0.weight", "layers.0.bias"):
        array = base.state_dict()[name].numpy()
        whole = hashlib.sha256(array.tobytes()).hexdigest()
        expected[name] = f"{array.dtype} {list(array.shape)} {whole[:16]}"
    assert digests(tmp_path) == expected


@pytest.mark.parametrize(
    ("other", "differ"),
    [
        (lambda: Net(2), "2 of the 2"),  # initialised anew
        (lambda: retrained(Net(1)), "2 of the 2"),
        (lambda: nudged(Net(1), "layers.0.bias"), "1 of the 2"),
        (lambda: Net(1).bfloat16(), r"float32 \[8, 3\] \w+, and is bfloat16 \[8, 3\]"),
        (lambda: nn.Linear(3, 4), "is missing"),
    ],
)
def test_heads_are_not_loaded_onto_another_body(
    other: Callable[[], nn.Module], differ: str, tmp_path: Path
):
    heads(Net(1)).save_pretrained(tmp_path)
    base = other()
    with pytest.raises(ValueError, match=f"{OTHER} .*{differ}.*check_base=False"):
        Mixture.from_pretrained(tmp_path, base)


@pytest.mark.parametrize("name", HEAD)
def test_what_all_members_bring_along_may_be_anything(name: str, tmp_path: Path):
    """A head is initialised anew in each program, and each member has its own."""
    mixture = heads(Net(1))
    mixture.save_pretrained(tmp_path)
    found = Mixture.from_pretrained(tmp_path, nudged(Net(1), name))
    assert torch.equal(found.each(lambda: found(X)), mixture.each(lambda: mixture(X)))


def test_one_member_that_takes_all_from_the_base_asks_for_all_of_it(tmp_path: Path):
    base = Net(1)
    members = heads(base).members
    for number, plain in enumerate(({}, Dropout(3))):
        folder = tmp_path / str(number)
        Mixture([*members, plain], model=base).save_pretrained(folder)
        assert digests(folder).keys() == base.state_dict().keys()
        with pytest.raises(ValueError, match="1 of the 4"):
            Mixture.from_pretrained(folder, nudged(Net(1), HEAD[0]))


@pytest.mark.parametrize("kind", ["weights", "models"])
def test_members_that_have_all_weights_ask_for_nothing(kind: str, tmp_path: Path):
    three(kind).save_pretrained(tmp_path)
    assert digests(tmp_path) == {}


def test_a_folder_without_digests_is_loaded_as_before(tmp_path: Path):
    heads(Net(1)).save_pretrained(tmp_path)
    path = tmp_path / "mixture.json"
    index = json.loads(path.read_text())
    del index["base"]
    path.write_text(json.dumps(index))
    assert len(Mixture.from_pretrained(tmp_path, Net(2))) == 2


def test_another_number_format_is_accepted_where_asked(tmp_path: Path):
    mixture = heads(Net(1))
    mixture.save_pretrained(tmp_path)
    found = Mixture.from_pretrained(tmp_path, Net(1).double(), check_base=False)
    each = found.each(lambda: found(X.double()))
    torch.testing.assert_close(each, mixture.each(lambda: mixture(X)).double())


def test_tied_weights_that_a_member_names_once_are_brought_along(tmp_path: Path):
    """Samples of a game have each parameter once, and a model's state has both of its names."""

    def tied() -> nn.Module:
        model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))
        model[2].weight = model[0].weight
        return model

    model = tied()
    Mixture([{"0.weight": torch.ones(3, 3)}], model=model).save_pretrained(tmp_path)
    assert digests(tmp_path).keys() == {"0.bias", "2.bias"}


class Strange(nn.Module):
    """A body with tensors of every kind, in which a head is."""

    def __init__(self, device: str = "cpu") -> None:
        super().__init__()
        self.head = nn.Linear(2, 2)
        self.other = nn.Linear(2, 2, device=device)
        torch.manual_seed(0)
        wave = torch.randn(4, dtype=torch.cfloat)
        self.register_buffer("wave", wave.conj())
        self.register_buffer("negative", wave.conj().imag)
        self.register_buffer("sparse", torch.eye(3).to_sparse())
        self.register_buffer("scalar", torch.tensor(True))
        self.register_buffer("nothing", torch.empty(0, 3))
        self.register_buffer("step", torch.tensor(3), persistent=False)


def test_tensors_whose_bytes_are_not_here_are_left_out_and_asked_for_in_words(tmp_path: Path):
    def saved(model: nn.Module) -> set[str]:
        torch.manual_seed(0)
        members = [{"head.weight": torch.randn(2, 2), "head.bias": torch.randn(2)}]
        Mixture(members, model=model).save_pretrained(tmp_path)
        return {*digests(tmp_path)}

    everywhere = {"wave", "negative", "scalar", "nothing"}
    assert saved(Strange("meta")) == everywhere
    torch.manual_seed(1)
    model = Strange()
    assert saved(model) == everywhere | {"other.weight", "other.bias"}
    Mixture.from_pretrained(tmp_path, model)
    with pytest.raises(ValueError, match=r"whose bytes are not here.*check_base=False"):
        Mixture.from_pretrained(tmp_path, Strange("meta"))


def test_checkpointing_leaves_no_trace_in_names(tmp_path: Path):
    wrapper = torch.distributed.algorithms._checkpoint.checkpoint_wrapper
    model = Net(1)
    model.layers[0] = wrapper.checkpoint_wrapper(model.layers[0])
    heads(model).save_pretrained(tmp_path)
    assert digests(tmp_path).keys() == {"layers.0.weight", "layers.0.bias"}
    Mixture.from_pretrained(tmp_path, Net(1))


# Of PEFT ----------------------------------------------------------------------------------------


def adapted(names: tuple[str, ...] = ("default", "second"), **changes: Any) -> Any:
    """Return a tiny classifier with adapters that have heads of their own, and its inputs."""
    peft = pytest.importorskip("peft", reason="adapters are PEFT's")
    model, batch, _ = player("bert", rows=8)
    options = {"r": 2, "target_modules": ["query", "value"], "task_type": "SEQ_CLS", **changes}
    torch.manual_seed(1)
    found = peft.get_peft_model(model, peft.LoraConfig(**options), adapter_name=names[0])
    for name in names[1:]:
        found.add_adapter(name, peft.LoraConfig(**options))
    return found, {name: value for name, value in batch.items() if name != "labels"}


def base(change: str = "") -> nn.Module:
    """Return the classifier, with a parameter whose name ends so changed."""
    model = player("bert", rows=8).model
    changed = [p for name, p in model.named_parameters() if change and name.endswith(change)]
    for parameter in changed:
        parameter.data += 0.5
    return model


QUERY = "layer.0.attention.self.query.weight"


@pytest.mark.parametrize("wrapped", [False, True])
def test_adapters_are_not_loaded_onto_another_encoder(wrapped: bool, tmp_path: Path):
    """The head, which each adapter has for itself, may be another one."""
    model, batch = adapted()
    played = Mixture([Adapter("default"), Adapter("second")], model=model)
    played.save_pretrained(tmp_path)

    def onto(change: str) -> Any:
        peft = pytest.importorskip("peft")
        if not wrapped:
            return base(change)
        config = peft.LoraConfig(r=3, target_modules=["key"], task_type="SEQ_CLS")
        return peft.get_peft_model(base(change), config, adapter_name="another")

    found = Mixture.from_pretrained(tmp_path, onto("classifier.weight"))
    assert torch.equal(found.each(lambda: found(**batch)), played.each(lambda: played(**batch)))
    other = onto(QUERY)
    names = [name for name, _ in other.named_parameters()]
    with pytest.raises(ValueError, match=f"{OTHER} .*1 of the .*query.weight"):
        Mixture.from_pretrained(tmp_path, other)
    assert names == [name for name, _ in other.named_parameters()]  # it is left as it was


KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("LoraConfig", {"r": 2, "target_modules": ["query"]}),
    "embedding": ("LoraConfig", {"r": 2, "target_modules": ["word_embeddings", "query"]}),
    "tokens": ("LoraConfig", {"r": 2, "target_modules": ["query"], "trainable_token_indices": [1]}),
    "dora": ("LoraConfig", {"r": 2, "target_modules": ["query"], "use_dora": True}),
    "ia3": ("IA3Config", {"target_modules": ["query"], "feedforward_modules": []}),
    "norms": ("LNTuningConfig", {"target_modules": ["LayerNorm"]}),
    "prompt": ("PromptTuningConfig", {"num_virtual_tokens": 2}),
}


@pytest.mark.filterwarnings("ignore:Unsupported layer type")  # PEFT's, of LayerNorm
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_adapter_finds_its_base(kind: str, tmp_path: Path):
    peft = pytest.importorskip("peft")
    name, options = KINDS[kind]
    config = getattr(peft, name)(task_type="SEQ_CLS", **options)
    torch.manual_seed(1)
    model = peft.get_peft_model(base(), config)
    _, batch = adapted(("default",))
    played = Mixture([Adapter("default")], model=model)
    played.save_pretrained(tmp_path)
    found = Mixture.from_pretrained(tmp_path, base())
    assert torch.equal(found.each(lambda: found(**batch)), played.each(lambda: played(**batch)))
    with pytest.raises(ValueError, match=f"{OTHER} .*1 of the .*position_embeddings"):
        Mixture.from_pretrained(tmp_path, base("position_embeddings.weight"))


def test_adapters_that_do_not_play_are_not_asked_for(tmp_path: Path):
    """Weights and dropout masks are played under the adapters that are active."""
    model, _ = adapted(("default", "scratch"))
    model.set_adapter("default")
    name = next(n for n, _ in model.named_parameters() if n.endswith("lora_A.default.weight"))
    value = model.state_dict()[name] + 1
    for number, member in enumerate(({name: value}, Dropout(3))):
        folder = tmp_path / str(number)
        Mixture([member], model=model).save_pretrained(folder)
        assert not [n for n in digests(folder) if "scratch" in n]


def test_an_adapter_with_biases_of_its_own_brings_them_along(tmp_path: Path):
    """PEFT trains those of the base, and saves them with the adapter."""
    model, batch = adapted(("default",), bias="all")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter += 0.1
    played = Mixture([Adapter("default")], model=model)
    played.save_pretrained(tmp_path)
    found = Mixture.from_pretrained(tmp_path, base())
    assert torch.equal(found.each(lambda: found(**batch)), played.each(lambda: played(**batch)))


def test_samples_of_a_game_on_an_adapter_ask_for_the_encoder_not_for_the_head(tmp_path: Path):
    model, batch = adapted(("default",))
    labels = torch.arange(8) % 3
    optimizer = mixadv.wrap(
        torch.optim.SGD(model.parameters(), lr=0.1), model, mixadv.MAT(samples=2, learner_steps=1)
    )

    def closure() -> tuple[Tensor, Tensor]:
        logits = model(**batch).logits
        return nn.functional.cross_entropy(logits, labels), logits

    for _ in range(2):
        optimizer.step(closure)
    made = mixture_of(optimizer.game)
    made.save_pretrained(tmp_path)

    def fresh(change: str) -> Any:
        peft = pytest.importorskip("peft")
        options = {"r": 2, "target_modules": ["query", "value"], "task_type": "SEQ_CLS"}
        return peft.get_peft_model(base(change), peft.LoraConfig(**options))

    found = Mixture.from_pretrained(tmp_path, fresh("classifier.weight"))
    assert torch.equal(found.each(lambda: found(**batch)), made.each(lambda: made(**batch)))
    with pytest.raises(ValueError, match=OTHER):
        Mixture.from_pretrained(tmp_path, fresh(QUERY))
