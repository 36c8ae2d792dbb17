"""A mixture on disk: what is read is what was written, whole or not at all, and never a pickle."""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import mixadv
from mixadv.mixtures import Dropout, Member, Mixture, mixture_of
from tests.test_mixtures import KINDS, Net, X, three


def saved(mixture: Mixture, folder: Path) -> Path:
    mixture.save_pretrained(folder)
    return folder


def predictions(mixture: Mixture) -> torch.Tensor:
    return mixture.each(lambda: mixture(X))


def index(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "mixture.json").read_text())


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_read_is_what_was_written(kind: str, tmp_path: Path):
    mixture = three(kind)
    weights = {name: value.clone() for name, value in mixture.state_dict().items()}
    base = Net()
    state = torch.get_rng_state()
    found = Mixture.from_pretrained(saved(mixture, tmp_path / "new" / "one"), model=base)
    torch.testing.assert_close(found.probabilities, mixture.probabilities, rtol=1e-15, atol=0)
    assert torch.equal(predictions(found), predictions(mixture))
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(weights[n], v) for n, v in mixture.state_dict().items())
    assert all(torch.equal(v, Net().state_dict()[n]) for n, v in base.state_dict().items())
    suffixes = {path.suffix for path in tmp_path.rglob("*") if path.is_file()}
    assert suffixes <= {".json", ".safetensors"}


def test_models_of_different_shapes_are_read_into_models_that_are_given(tmp_path: Path):
    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x)

    mixture = Mixture([Net(1), Wide()], [1, 3])
    saved(mixture, tmp_path)
    found = Mixture.from_pretrained(tmp_path, models=[Net(5), Wide()])
    assert torch.equal(predictions(found), predictions(mixture))
    with pytest.raises(ValueError, match="another shape"):
        Mixture.from_pretrained(tmp_path, Net())
    with pytest.raises(ValueError, match="2 whole models, and 1 were given"):
        Mixture.from_pretrained(tmp_path, models=[Net()])


@given(st.lists(st.floats(0, 1e3), min_size=1, max_size=5).filter(lambda v: sum(v) > 1e-3))
def test_probabilities_survive(values: list[float]):
    model = nn.Linear(1, 1)
    mixture = Mixture([{} for _ in values], values, model=model)
    with tempfile.TemporaryDirectory() as folder:
        mixture.save_pretrained(folder)
        found = Mixture.from_pretrained(folder, model).probabilities
    torch.testing.assert_close(found, mixture.probabilities, rtol=1e-14, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int64])
def test_weights_that_share_memory_are_written_and_keep_their_dtype(dtype: Any, tmp_path: Path):
    """The format refuses tensors that share memory, and state_dict() has those of tied weights."""
    model = nn.Module()
    value = torch.arange(6).reshape(2, 3).to(dtype)
    for name in ("a", "b"):
        model.register_buffer(name, torch.zeros(3, 2, dtype=dtype))
    mixture = Mixture([{"a": value.T, "b": value.T}], model=model)
    found = Mixture.from_pretrained(saved(mixture, tmp_path), model)
    with found.member(0) as module:
        assert module.a.dtype == dtype
        assert torch.equal(module.a, value.T)
        assert torch.equal(module.b, value.T)


def test_a_save_that_is_killed_leaves_the_mixture_that_was_there(tmp_path: Path, monkeypatch: Any):
    before = predictions(three("weights"))
    saved(three("weights"), tmp_path)
    files = sorted(tmp_path.rglob("*"))
    calls: list[int] = []

    def killed(*args: Any) -> None:
        calls.append(1)
        if len(calls) > 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(safetensors.torch, "save_file", killed)
    with pytest.raises(KeyboardInterrupt):
        three("models").save_pretrained(tmp_path)
    monkeypatch.undo()
    assert sorted(tmp_path.rglob("*")) == files
    assert torch.equal(predictions(Mixture.from_pretrained(tmp_path, Net())), before)


def test_a_second_save_replaces_the_first_and_nothing_else(tmp_path: Path):
    (tmp_path / "config.json").write_text("{}")
    saved(three("weights"), tmp_path)
    first = index(tmp_path)["folder"]
    saved(three("masks"), tmp_path)
    assert not (tmp_path / first).exists()
    assert (tmp_path / "config.json").exists()
    assert len(list(tmp_path.iterdir())) == 3
    found = Mixture.from_pretrained(tmp_path, Net())
    assert isinstance(found.members[2], Dropout)
    assert found.members[2].seed == 2


def broken(folder: Path, how: str) -> None:
    path, text = folder / "mixture.json", index(folder)
    member = folder / text["folder"] / "1.safetensors"
    match how:
        case "none":
            path.unlink()
        case "no json":
            path.write_text("{")
        case "foreign":
            path.write_text('{"model_type": "bert"}')
        case "later":
            path.write_text(json.dumps(text | {"version": 2}))
        case "counts":
            path.write_text(json.dumps(text | {"probabilities": [1.0]}))
        case "kind":
            path.write_text(json.dumps(text | {"members": [{"kind": "pickle"}] * 3}))
        case "outside":
            path.write_text(json.dumps(text | {"folder": "../elsewhere"}))
        case "missing":
            member.unlink()
        case "cut":
            member.write_bytes(member.read_bytes()[:-7])
        case "other":
            safetensors.torch.save_file({"x": X}, member)


@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        ("none", FileNotFoundError, "has no mixture.json"),
        ("no json", ValueError, "is no JSON"),
        ("foreign", ValueError, "is not of mixture.save_pretrained"),
        ("later", ValueError, "version 2"),
        ("counts", ValueError, "as many probabilities"),
        ("kind", ValueError, "a known kind"),
        ("outside", ValueError, "needs a folder"),
        ("missing", FileNotFoundError, "not copied whole"),
        ("cut", ValueError, "cut short"),
        ("other", ValueError, "no tensor of this name"),
    ],
)
def test_files_that_are_no_mixture_are_refused(how: str, error: Any, message: str, tmp_path: Path):
    saved(three("weights"), tmp_path)
    broken(tmp_path, how)
    with pytest.raises(error, match=message):
        Mixture.from_pretrained(tmp_path, Net())


def test_what_is_missing_is_asked_for(tmp_path: Path, monkeypatch: Any):
    saved(three("weights"), tmp_path)
    with pytest.raises(ValueError, match=r"from_pretrained\(folder, model\)"):
        Mixture.from_pretrained(tmp_path)

    class Own(Member):
        def playing(self, model: nn.Module) -> Any:
            raise NotImplementedError

    with pytest.raises(TypeError, match="only its own code can save"):
        Mixture([Own()], model=Net()).save_pretrained(tmp_path)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ImportError, match=r"pip install 'mixadv\[transformers\]'"):
        three("weights").save_pretrained(tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_samples_of_a_compiled_model_are_read_into_the_bare_one(tmp_path: Path):
    torch.manual_seed(0)
    bare, x = nn.Linear(3, 2), torch.randn(4, 3)
    model = torch.compile(bare, backend="eager")
    base = torch.optim.SGD(bare.parameters(), lr=0.1)
    optimizer = mixadv.wrap(base, model, mixadv.MAT(samples=2), site="input")

    def closure() -> tuple[Tensor, Tensor]:
        logits = model(x)
        return nn.functional.cross_entropy(logits, torch.arange(4) % 2), logits

    optimizer.step(closure)
    made = mixture_of(optimizer.game)
    made.save_pretrained(tmp_path)
    found = Mixture.from_pretrained(tmp_path, bare)
    assert torch.equal(found.each(lambda: found(x)), made.each(lambda: made(x)))
