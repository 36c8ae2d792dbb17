"""What is said of predictions: accuracy, loss, calibration."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import mixadv
from mixadv.robustness import Batch, accuracy_drop, expected_calibration_error, predict

seeds = st.integers(0, 10**6)


def batches_of(model, x, y, size=4, start=0):
    def batch(rows):
        def closure():
            logits = model(x[rows])
            return F.cross_entropy(logits, y[rows], reduction="none"), logits

        return Batch(closure, y[rows], [start + row for row in rows])

    return [batch(list(range(i, min(i + size, len(x))))) for i in range(0, len(x), size)]


def test_the_calibration_error_is_that_computed_by_hand():
    """Of two bins (0, 0.5] holds the first row, which is timid, and (0.5, 1] four bold ones."""
    probabilities = [[0.5, 0.5], [0.6, 0.4], [0.2, 0.8], [0.9, 0.1], [0.05, 0.95]]
    labels = [0, 0, 0, 0, 1]
    first = abs(1 - 0.5)
    second = abs(3 / 4 - (0.6 + 0.8 + 0.9 + 0.95) / 4)
    wanted = first / 5 + second * 4 / 5
    assert expected_calibration_error(probabilities, labels, bins=2) == pytest.approx(wanted)


def test_with_one_bin_it_is_mean_confidence_against_accuracy():
    probabilities = np.random.default_rng(0).dirichlet([1, 1, 1], size=50)
    labels = np.random.default_rng(1).integers(0, 3, 50)
    accuracy = (probabilities.argmax(-1) == labels).mean()
    wanted = abs(accuracy - probabilities.max(-1).mean())
    assert expected_calibration_error(probabilities, labels, bins=1) == pytest.approx(wanted)


def test_probabilities_that_are_right_as_often_as_they_say_have_no_error():
    """Labels are drawn from the predictions themselves; what is left is noise, of 1/√n a bin."""
    random, rows = np.random.default_rng(0), 60_000
    probabilities = random.dirichlet([0.5, 0.5, 0.5], size=rows)
    labels = (probabilities.cumsum(-1) < random.random((rows, 1))).sum(-1)
    assert expected_calibration_error(probabilities, labels) < 0.01
    bold = probabilities**3 / (probabilities**3).sum(-1, keepdims=True)
    gap = bold.max(-1).mean() - probabilities.max(-1).mean()
    assert expected_calibration_error(bold, labels) == pytest.approx(gap, abs=0.01)


@given(seeds, st.integers(2, 5), st.integers(1, 40), st.integers(1, 20))
def test_the_error_is_a_mean_of_differences_of_shares(seed, classes, rows, bins):
    random = np.random.default_rng(seed)
    probabilities = random.dirichlet([1.0] * classes, size=rows)
    labels = random.integers(0, classes, rows)
    found = expected_calibration_error(probabilities, labels, bins)
    confidence, correct = probabilities.max(-1), probabilities.argmax(-1) == labels
    assert abs(correct.mean() - confidence.mean()) - 1e-12 <= found <= 1
    order = random.permutation(rows)
    assert expected_calibration_error(probabilities[order], labels[order], bins) == pytest.approx(
        found, abs=1e-12
    )
    assert found == pytest.approx(
        sum(
            abs((correct[inside] - confidence[inside]).sum()) / rows
            for b in range(bins)
            if (inside := (confidence > b / bins) & (confidence <= (b + 1) / bins)).any()
        ),
        abs=1e-12,
    )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (([0.5, 0.5], [0, 1]), r"got \[2\] and \[2\]"),
        (([[0.5, 0.5]], [0, 1]), r"got \[1, 2\] and \[2\]"),
        ((np.zeros((0, 2)), []), "at least one row"),
        (([[0.5, 0.5]], [0], 0), "bins must be at least 1"),
    ],
)
def test_what_has_no_calibration_is_refused(arguments, said):
    with pytest.raises(ValueError, match=said):
        expected_calibration_error(*arguments)


# Predictions -----------------------------------------------------------------------------------


@given(seeds, st.integers(1, 9))
def test_predictions_do_not_depend_on_batches_or_their_order(seed, size):
    random = torch.Generator().manual_seed(seed)
    model, x = nn.Linear(4, 3).double(), torch.randn(9, 4, generator=random, dtype=torch.double)
    y = torch.randint(3, (9,), generator=random)
    whole = predict(model, batches_of(model, x, y, 9))
    parts = predict(model, batches_of(model, x, y, size)[::-1])
    logits = model(x).detach()
    assert torch.from_numpy(whole.probabilities).allclose(logits.softmax(-1))
    assert (whole.labels == y.numpy()).all()
    assert (whole.correct == (logits.argmax(-1) == y).numpy()).all()
    assert whole.loss.value == pytest.approx(float(F.cross_entropy(logits, y)))
    assert whole.accuracy.value == whole.correct.mean()
    for name in ("probabilities", "labels", "losses", "correct"):
        assert getattr(parts, name) == pytest.approx(getattr(whole, name))


def test_a_shift_costs_the_difference_of_accuracies():
    model, x = nn.Linear(2, 2), torch.randn(300, 2)
    right = model(x).argmax(-1)
    wrong = torch.cat([right[:200], 1 - right[200:]])
    clean = predict(model, batches_of(model, x, right, 50))
    shifted = predict(model, batches_of(model, x, wrong, 50))
    found = accuracy_drop(clean, shifted)
    assert found.value == pytest.approx(1 / 3)
    assert found.low == pytest.approx(1 / 3 - 1.96 * (2 / 9 / 300) ** 0.5, abs=0.01)
    assert accuracy_drop(clean, clean).value == 0


def test_the_mixture_of_learner_samples_can_predict():
    model, x, y = nn.Linear(2, 2), torch.randn(8, 2), torch.randint(2, (8,))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    optimizer = mixadv.wrap(optimizer, model, mixadv.MAT(samples=3))
    for _ in range(4):
        optimizer.step(lambda: (F.cross_entropy(logits := model(x), y), logits))
    before = copy.deepcopy(model.state_dict())
    found = predict(model, batches_of(model, x, y), mixture=optimizer.game)
    each = [
        torch.func.functional_call(model, sample, x).softmax(-1)
        for sample in optimizer.game.learner_samples
    ]
    mean = torch.stack(each).mean(0).detach()
    assert torch.from_numpy(found.probabilities).float().allclose(mean, atol=1e-6)
    wanted = -mean.gather(1, y[:, None])[:, 0].log()
    assert torch.from_numpy(found.losses).float().allclose(wanted, atol=1e-5)
    assert all(model.state_dict()[name].equal(value) for name, value in before.items())


def test_closures_and_rows_that_do_not_fit_are_refused():
    model, x, y = nn.Linear(2, 2), torch.randn(4, 2), torch.zeros(4, dtype=torch.long)
    rows = [0, 1, 2, 3]

    def closure(reduction="none"):
        return F.cross_entropy(model(x), y, reduction=reduction), model(x)

    def refused(said, *batches):
        with pytest.raises(ValueError, match=said):
            predict(model, batches)

    refused("the batches are empty")
    refused(r"one loss per sample \[4\]", Batch(lambda: closure("mean"), y, rows))
    refused(r"logits \[4, C\], got \[4\] and \[4, 2, 1\]", _with_third(closure, y, rows))
    refused(
        "from 0 to 1, the model's classes; got 0 to 2",
        Batch(closure, y + y.new([0, 0, 0, 2]), rows),
    )
    refused(r"labels of shape \[3\]", Batch(closure, y[:3], rows))
    refused("Row 1 is in the batches twice", Batch(closure, y, [0, 1, 1, 3]))


def _with_third(closure, y, rows):
    return Batch(lambda: (closure()[0], closure()[1][..., None]), y, rows)
