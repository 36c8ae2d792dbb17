"""Robust accuracy of images: closed forms, attacks of others, and what is no attack."""

import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mixadv.robustness import auto_attack, image_accuracy, pgd_attack, torchattack
from tests.test_box import pixels
from tests.zoo import Vision, assert_same, fingerprint

EPS = 8 / 255


def linear(rows: int = 40) -> tuple[nn.Module, Tensor, Tensor]:
    """Return a linear classifier of two classes, whose worst image is known, with a batch."""
    torch.manual_seed(0)
    images, _ = pixels(rows)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
    with torch.no_grad():
        labels = model(images).argmax(1)
    labels[::7] = 1 - labels[::7]
    return model, images, labels


def exactly_robust(model: Any, images: Tensor, labels: Tensor, radius: float) -> Tensor:
    """Each pixel goes as far against the margin as ball and box let it."""
    rows = torch.arange(len(labels))
    weight = model[1].weight
    slope = (weight[1 - labels] - weight[labels]).view_as(images)
    x = torch.where(slope > 0, images + radius, images - radius).clamp(0, 1)
    logits = model(x)
    return logits[rows, labels] > logits[rows, 1 - labels]


@pytest.mark.parametrize("radius", [0.0, EPS, 0.1])
def test_of_a_linear_classifier_it_is_exact(radius: float):
    model, images, labels = linear()
    batches = [(images[:25], labels[:25]), (images[25:], labels[25:])]
    found = image_accuracy(model, batches, radius=radius)
    expected = exactly_robust(model, images, labels, radius).numpy()
    np.testing.assert_array_equal(found.robust, expected)
    assert found.clean.value == (model(images).argmax(1) == labels).double().mean()
    assert found.worst.low <= found.worst.value == expected.mean() <= found.worst.high
    assert (found.robust.sum() == found.right.sum()) == (radius == 0)


@pytest.mark.parametrize(("norm", "radius"), [("linf", EPS), ("l2", 0.5), ("l1", 2.0)])
def test_more_restarts_find_no_less_and_stay_in_ball_and_box(norm: Any, radius: float):
    torch.manual_seed(0)
    model, (images, labels) = Vision().eval(), pixels(24)
    with torch.no_grad():
        labels = model(images).argmax(1)
    attacks = {
        f"{n}": pgd_attack(model, radius=radius, norm=norm, steps=3, restarts=n) for n in (1, 4)
    }
    found = image_accuracy(model, [(images, labels)], attacks, radius=radius, norm=norm)
    assert (found.survived["4"] <= found.survived["1"]).all()
    assert found.right.all()


@pytest.mark.parametrize("margin", [1.0, 20.0, 400.0])
def test_a_sure_model_is_no_more_robust_than_an_unsure_one(margin: float):
    """The gradient p − 1 of its loss would round to 0, and no step go anywhere."""
    model, images, labels = linear()
    with torch.no_grad():
        largest = model(images).diff(dim=1).abs().max()
        for parameter in model.parameters():
            parameter.mul_(margin / largest)
        labels = model(images).argmax(1)
    expected = exactly_robust(model, images, labels, 0.1).numpy()
    assert 0 < expected.sum() < len(expected)
    found = image_accuracy(model, [(images, labels)], radius=0.1)
    np.testing.assert_array_equal(found.robust, expected)


@pytest.mark.filterwarnings("ignore:PGD starts below the noise floor")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_images_of_half_precision_are_attacked_up_to_its_rounding(dtype: torch.dtype, norm: Any):
    torch.manual_seed(0)
    model, (images, labels) = nn.Sequential(nn.Flatten(), nn.Linear(64, 2)), pixels()
    attack = pgd_attack(model.to(dtype), radius=EPS, norm=norm, steps=3, restarts=1)
    batch = (images.to(dtype), labels % 2)
    assert image_accuracy(model, [batch], {"PGD": attack}, radius=EPS, norm=norm).right.shape == (
        6,
    )


def test_a_box_in_units_of_a_normalisation_holds_what_is_at_its_ends():
    """Its ends are fractions, which images hold in fp32 alone."""
    images, labels = pixels()
    images[:, :, 0, 0], images[:, :, 0, 1] = 0, 1
    ends = (0 - 0.1307) / 0.3081, (1 - 0.1307) / 0.3081
    found = image_accuracy(Vision(), [((images - 0.1307) / 0.3081, labels)], radius=EPS, box=ends)
    assert len(found.right) == 6


class Positioned(nn.Module):
    """A model of patches, whose positions are an embedding: no input of it."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.positions = nn.Conv2d(1, 8, 4, 4), nn.Embedding(4, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        patches = self.patch(x).flatten(2).transpose(1, 2)
        return self.head((patches + self.positions(torch.arange(4))).tanh().mean(1))


def test_images_are_attacked_where_they_enter_and_not_at_an_embedding():
    images, labels = pixels()
    assert len(image_accuracy(Positioned(), [(images, labels)], radius=EPS).robust) == 6


def test_the_model_is_left_as_it_was():
    torch.manual_seed(0)
    model, (images, labels) = Vision().train(), pixels()
    before = fingerprint(model)
    image_accuracy(model, [(images, labels)], radius=EPS)
    assert_same(fingerprint(model), before)


def test_a_frozen_model_is_measured():
    model, images, labels = linear()
    expected = image_accuracy(model, [(images, labels)], radius=EPS).robust
    found = image_accuracy(model.requires_grad_(False), [(images, labels)], radius=EPS).robust
    np.testing.assert_array_equal(found, expected)
    assert not any(p.requires_grad for p in model.parameters())


def test_an_image_counts_once_under_several_attacks():
    model, images, labels = linear(8)

    def lose(which: int) -> Any:
        def play(x: Tensor, y: Tensor) -> Tensor:
            moved = x.clone()
            moved[which] = 1 - moved[which]
            return moved

        return play

    attacks = {"one": lose(1), "two": lose(2), "one again": lose(1)}
    found = image_accuracy(model, [(images, labels)], attacks, radius=1.0)
    lost = found.right & ~found.robust
    assert set(np.flatnonzero(lost)) <= {1, 2}
    assert (found.survived["one"] == found.survived["one again"]).all()


# Attacks of others ---------------------------------------------------------------------------


class Borrowed:
    """A stand-in for a class of torchattacks, and for AutoAttack."""

    def __init__(self, model: nn.Module, eps: float = 0.0, **words: Any) -> None:
        self.model, self.eps, self.words = model, eps, words

    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        assert self.model(images).shape == (len(images), 3)
        return (images + self.eps).clamp(0, 1)

    def run_standard_evaluation(self, images: Tensor, labels: Tensor, bs: int) -> Tensor:
        assert bs == len(images)
        assert self.words["norm"] == "L2"
        assert self.words["device"] == torch.device("cpu")
        return images


def test_attacks_of_torchattacks_are_run_and_counted(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "torchattacks", SimpleNamespace(PGD=Borrowed))
    model, (images, labels) = Vision(), pixels()

    class Output(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return SimpleNamespace(logits=model(x))

    theirs = torchattack("PGD", Output(), eps=EPS)
    found = image_accuracy(model, [(images, labels)], {"theirs": theirs}, radius=EPS)
    expected = (model.eval()((images + EPS).clamp(0, 1)).argmax(1) == labels).numpy()
    np.testing.assert_array_equal(found.survived["theirs"], expected & found.right)
    with pytest.raises(ValueError, match="no attack 'PDG'"):
        torchattack("PDG", model)


def test_an_attack_that_puts_the_model_back_into_training_is_judged_in_evaluation(
    monkeypatch: pytest.MonkeyPatch,
):
    """torchattacks puts back the mode that the model had when the attack was made."""

    class Restoring(Borrowed):
        def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
            found = super().__call__(images, labels)
            self.model.train(self.model.training)
            return found

    monkeypatch.setitem(sys.modules, "torchattacks", SimpleNamespace(PGD=Restoring))
    model, (images, _) = Vision(), pixels()
    labels = model.eval()(images).argmax(1)
    model.train().normalise.eval()
    before = fingerprint(model)
    theirs = torchattack("PGD", model)
    found = image_accuracy(model, [(images, labels)], {"theirs": theirs}, radius=0.0)
    assert found.robust.all()
    assert_same(fingerprint(model), before)
    assert not model.normalise.training


def test_autoattack_is_run_in_its_words(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "autoattack", SimpleNamespace(AutoAttack=Borrowed))
    model, (images, labels) = Vision(), pixels()
    theirs = auto_attack(model, radius=0.5, norm="l2")
    found = image_accuracy(model, [(images, labels)], {"A": theirs}, radius=0.5, norm="l2")
    np.testing.assert_array_equal(found.robust, found.right)


def test_what_is_not_installed_is_told(monkeypatch: pytest.MonkeyPatch):
    for name in ("torchattacks", "autoattack"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match="pip install torchattacks"):
        torchattack("PGD", Vision())
    with pytest.raises(ImportError, match=r"pip install git\+https"):
        auto_attack(Vision(), radius=EPS)


@pytest.mark.filterwarnings("error")
def test_an_attack_that_returns_what_requires_gradients_is_not_warned_of():
    """As APGD of torchattacks does."""
    model, (images, labels) = Vision(), pixels()
    attack = lambda x, y: x.clone().requires_grad_()  # noqa: E731
    found = image_accuracy(model, [(images, labels)], {"it": attack}, radius=EPS)
    np.testing.assert_array_equal(found.robust, found.right)


# What is refused -----------------------------------------------------------------------------

WRONG: dict[str, tuple[Any, str]] = {
    "too far": (lambda x, y: (x + 2 * EPS).clamp(0, 1), "'it' moved an image by .* give it the"),
    "out of the box": (lambda x, y: x - EPS, "'it' left the box"),
    "infinite": (lambda x, y: x.index_fill(3, torch.tensor([0]), torch.inf), "moved an image by"),
    "nan": (lambda x, y: x * torch.nan, "'it' moved an image by nan"),
    "of another shape": (lambda x, y: x[:1], r"'it' must return \[6, 1, 8, 8\]"),
    "nothing": (lambda x, y: None, "got NoneType"),
}


@pytest.mark.parametrize("why", WRONG)
def test_an_attack_that_is_none_does_not_count(why: str):
    attack, said = WRONG[why]
    images, labels = pixels()
    with pytest.raises(ValueError, match=said):
        image_accuracy(Vision(), [(images, labels)], {"it": attack}, radius=EPS)


def test_what_cannot_be_measured_is_refused():
    model, (images, labels) = Vision(), pixels()
    with pytest.raises(ValueError, match="normalise inside"):
        image_accuracy(model, [(2 * images, labels)], radius=EPS)
    with pytest.raises(ValueError, match="batches are empty"):
        image_accuracy(model, [], radius=EPS)
    with pytest.raises(ValueError, match=r"labels of shape \[5\]"):
        image_accuracy(model, [(images, labels[1:])], radius=EPS)
    with pytest.raises(ValueError, match=r"logits \[B, C\]"):
        image_accuracy(nn.Identity(), [(images, labels)], radius=EPS)
    for wrong in (torch.full_like(labels, -100), labels + 3):
        with pytest.raises(ValueError, match="labels must be numbers from 0 to 2"):
            image_accuracy(model, [(images, wrong)], radius=EPS)
    one = nn.Sequential(nn.Flatten(), nn.Linear(64, 1))
    with pytest.raises(ValueError, match="logits are of one class"):
        image_accuracy(one, [(images, 0 * labels)], radius=EPS)
    with pytest.raises(ValueError, match="restarts"):
        pgd_attack(model, radius=EPS, restarts=0)


def test_what_is_given_in_another_form_is_told_which_to_write():
    model, (images, labels) = Vision(), pixels()
    attack: Any = pgd_attack(model, radius=EPS, steps=1, restarts=1)
    with pytest.raises(TypeError, match=r'by name, got list: write \{"PGD": attack\}'):
        image_accuracy(model, [(images, labels)], [attack], radius=EPS)  # pyright: ignore
    with pytest.raises(TypeError, match="'PGD' must be a function"):
        image_accuracy(model, [(images, labels)], {"PGD": 3}, radius=EPS)  # pyright: ignore
    for wrong in ((images, labels), (images[:2], labels[:2]), [{"images": images}]):
        with pytest.raises(
            TypeError, match=r"pair of tensors .* give batches as \[\(images, labels"
        ):
            image_accuracy(model, wrong, radius=EPS)  # pyright: ignore
    with pytest.raises(TypeError, match=r"torch.uint8: give images.float\(\) / 255"):
        image_accuracy(model, [((255 * images).byte(), labels)], radius=EPS)
    for wrong in (labels.float(), labels > 0):
        with pytest.raises(TypeError, match=r"whole numbers.*labels.long\(\)"):
            image_accuracy(model, [(images, wrong)], radius=EPS)
    with pytest.raises(ValueError, match=r"'it' returned torch\.int64"):
        image_accuracy(model, [(images, labels)], {"it": lambda x, y: x.long()}, radius=EPS)
    with pytest.raises(TypeError, match="radius must be a number, got None"):
        pgd_attack(model, radius=None)  # pyright: ignore


def test_labels_of_fewer_bits_are_measured_alike():
    model, images, labels = linear(8)
    expected = image_accuracy(model, [(images, labels)], radius=EPS).robust
    found = image_accuracy(model, [(images, labels.to(torch.int32))], radius=EPS).robust
    np.testing.assert_array_equal(found, expected)
