"""Attacks of mixtures: worst perturbations known by brute force, and what each attack must find."""

import contextlib
import itertools
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import mixadv
from mixadv.maths import geometry
from mixadv.mixtures import Dropout, Mixture
from mixadv.players.ascent import Ascent
from mixadv.robustness import Batch, evaluate, mixture_accuracy, read_rows, text_batches
from mixadv.robustness.mixture_attacks import arc, drawn, expected, of_mean, pgd
from mixadv.robustness.mixture_play import CHOSEN, CLIMBED, JUDGED, playing
from tests.substitution_zoo import word_tokenizer
from tests.test_evaluate import classifier, rows_of
from tests.test_mixtures import KINDS, X, three
from tests.zoo import assert_same, fingerprint

ROWS, EPSILON = 6, 0.6
NORMS = ("l2", "linf")
seeds = st.integers(0, 10**6)
few = settings(max_examples=settings.default.max_examples // 3)


def linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    model = nn.Linear(weight.shape[1], len(weight)).double()
    with torch.no_grad():
        model.weight.copy_(weight)
        model.bias.copy_(bias)
    return model


def batch_of(mixture: Mixture, x: Tensor, y: Tensor) -> Batch:
    def closure() -> tuple[Tensor, Tensor]:
        logits = mixture(x)
        return F.cross_entropy(logits, y, reduction="none"), logits

    return Batch(closure, y, list(range(len(y))))


class World:
    """Linear members, and rows that their mean classifies right."""

    def __init__(self, seed: int, members: int, classes: int = 2, width: int = 2) -> None:
        random = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=random, dtype=torch.double)

        self.w, self.b = draw(members, classes, width), draw(members, classes) / 2
        self.x = draw(ROWS, width)
        self.y = self.logits(self.x).sum(0).argmax(-1)
        shares = torch.rand(members, generator=random)
        pairs = zip(self.w, self.b, strict=True)
        self.mixture = Mixture([linear(w, b) for w, b in pairs], shares)
        self.batch = batch_of(self.mixture, self.x, self.y)

    def logits(self, x: Tensor) -> Tensor:
        """`[M, ..., C]`, by hand."""
        return torch.einsum("mcd,...d->m...c", self.w, x) + self.b.view(
            len(self.b), *[1] * (x.dim() - 1), -1
        )

    def expected(self, x: Tensor, y: Tensor) -> Tensor:
        right = self.logits(x).argmax(-1) == y
        return torch.einsum("m,m...->...", self.mixture.probabilities, right.double())

    def lowest(self, norm: str, points: int = 101) -> Tensor:
        """The least expected accuracy of each row, over a grid in the ball."""
        axis = torch.linspace(-1, 1, points, dtype=torch.double)
        grid = torch.cartesian_prod(axis, axis)
        grid = EPSILON * (grid[grid.norm(dim=1) <= 1] if norm == "l2" else grid)
        return self.expected(self.x[:, None] + grid, self.y[:, None]).amin(1)

    def distances(self, norm: str) -> Tensor:
        """How far each member's nearest boundary is, `[M, N]`: not positive where it is wrong."""
        logits = self.logits(self.x)
        own = logits.gather(-1, self.y.expand(len(logits), -1)[..., None])
        slopes = self.w[:, self.y][:, :, None] - self.w[:, None]
        dual = slopes.norm(dim=-1) if norm == "l2" else slopes.abs().sum(-1)
        distances = (own - logits) / dual
        return distances.scatter(-1, self.y.expand(len(logits), -1)[..., None], torch.inf).amin(-1)

    def attacked(self, norm, attack, steps=10, **changes):
        """Return δ `[N, d]` of an attack."""
        ascent = Ascent(steps=steps, radius=EPSILON, norm=norm, unit="absolute")
        with playing(self.mixture, None, 1, 0) as play:
            return attack(play(self.batch), ascent, drawn, **changes).points[0][0]


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("members", [1, 2, 3])
def test_arc_finds_the_worst_perturbation_of_linear_members(members: int, norm: str):
    """Of one or two members in every row; of three in nearly every one, and never by much."""
    missed, gaps = 0, []
    for seed in range(6):
        world = World(seed, members)
        delta = world.attacked(norm, arc, classes=2)
        assert (geometry.norms(delta, norm) <= EPSILON * (1 + 1e-9)).all()
        gap = world.expected(world.x + delta, world.y) - world.lowest(norm)
        missed += int((gap > 1e-9).sum())
        gaps.append(gap.mean())
    assert missed <= (2 if members > 2 else 0)
    assert torch.stack(gaps).mean() <= 0.02


@pytest.mark.parametrize("norm", NORMS)
@few
@given(seed=seeds, members=st.integers(1, 4), classes=st.integers(2, 4))
def test_arc_breaks_what_can_be_broken(seed: int, members: int, classes: int, norm: str):
    """Where all linear members are right and one can be broken, expected accuracy falls."""
    world = World(seed, members, classes, width=5)
    delta = world.attacked(norm, arc, steps=1, classes=classes)
    after = world.expected(world.x + delta, world.y)
    distances = world.distances(norm)
    all_right = (distances > 0).all(0)
    breakable = all_right & (distances < 0.99 * EPSILON).any(0)
    assert (after[breakable] < 1 - 1e-9).all()
    unbreakable = all_right & (distances > 1.01 * EPSILON).all(0)
    assert (after[unbreakable] == 1).all()


@pytest.mark.parametrize("norm", NORMS)
def test_arc_is_not_weaker_than_eot_on_linear_members(norm: str):
    found: dict[str, list[Tensor]] = {"arc": [], "eot": []}
    for seed in range(6):
        world = World(seed, 2)
        deltas = {
            "arc": world.attacked(norm, arc, classes=2),
            "eot": world.attacked(norm, pgd, weigh=expected, restarts=1),
        }
        for name, delta in deltas.items():
            found[name].append(world.expected(world.x + delta, world.y))
    ours, theirs = (torch.cat(found[name]) for name in ("arc", "eot"))
    assert (ours <= theirs + 1e-9).all()
    assert ours.mean() < theirs.mean() - 0.01


def planted(kind: str) -> tuple[Mixture, Batch]:
    """A row that two members get right; the second's boundary is within the ball of radius 1.

    "drowned": the first cannot be broken, and pulls the other way; the second is so sure of itself
    that its loss has no gradient. "cancelled": gradients of the losses cancel at δ = 0.
    """
    scores = [(1.0, 2.0), (-200.0, 160.0)] if kind == "drowned" else [(1.0, 0.5), (-1.0, 0.5)]
    mixture = Mixture(
        [linear(torch.tensor([[w, 0], [-w, 0]]), torch.tensor([b, -b])) for w, b in scores]
    )
    x = torch.zeros(4, 2, dtype=torch.double)
    return mixture, batch_of(mixture, x, torch.zeros(4, dtype=torch.long))


@few
@given(seeds, st.integers(1, 4))
def test_some_threshold_is_as_robust_as_the_draw(seed: int, members: int):
    """Against every threshold there is, at the worst of all perturbations tried."""
    world = World(seed, members)
    found = mixture_accuracy(world.mixture, [world.batch], radius=EPSILON, unit=1.0, steps=2)
    threshold, right = found.thresholded(world.y)
    worst = found.under()["worst of all"][:, 0]
    labels = world.y.numpy()
    ones = np.where(labels == 1, worst, 1 - worst)  # the share that answers 1 at the worst
    best = max(((ones > t + 1e-9) == labels).mean() for t in np.linspace(0, 1, 1001))
    assert right.mean() >= max(best, worst.mean() - 1e-9)
    assert np.array_equal(right, (ones > threshold + 1e-9) == labels)


def test_the_vote_can_be_less_robust_than_the_draw():
    """Two of three members are wrong about one row, none about the other."""
    members = [linear(torch.zeros(2, 2), torch.tensor([0.0, b]).double()) for b in (-9, -9, 9)]
    with torch.no_grad():
        for member in members:
            member.weight[1] = torch.tensor([-20.0, 1e-3])  # the second row's
    mixture = Mixture(members)
    x, y = torch.tensor([[0.0, 0.0], [1.0, 0.0]]).double(), torch.tensor([1, 0])
    batch = batch_of(mixture, x, y)
    found = mixture_accuracy(mixture, [batch], radius=0.1, unit=1.0, steps=2)
    drawn_by, _, vote = found.under()["worst of all"].mean(0)
    assert (drawn_by, vote) == (pytest.approx(2 / 3), 0.5)
    threshold, right = found.thresholded(y)
    assert threshold < 1 / 3
    assert right.all()
    with pytest.raises(ValueError, match="labels must be 0 or 1 for each of 2 rows"):
        found.thresholded([1, 2])


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("kind", ["drowned", "cancelled"])
def test_a_mixture_that_eot_believes_is_broken_by_arc(kind: str, norm: str):
    mixture, batch = planted(kind)
    restarts = 1 if kind == "drowned" else 0
    found = mixture_accuracy(mixture, [batch], radius=1.0, norm=norm, unit=1.0, restarts=restarts)
    under = found.under()
    assert (under["EoT-PGD"][:, 0] == 1).all()
    assert (under["ARC"][:, 0] == 0.5).all()
    assert (under["worst of all"][:, 0] == 0.5).all()


@pytest.mark.parametrize("norm", NORMS)
def test_each_member_alone_is_right_up_to_its_margin(norm: str):
    world = World(3, 3)
    found = mixture_accuracy(world.mixture, [world.batch], radius=EPSILON, norm=norm, unit=1.0)
    distances = world.distances(norm)
    wanted = torch.stack([(distances > d).double().mean(1) for d in (0, EPSILON)], 1)
    assert found.alone().mean(0) == pytest.approx(wanted.numpy())


@pytest.mark.parametrize("norm", NORMS)
def test_the_mean_and_the_vote_are_attacked_as_hard_as_they_can_be(norm: str):
    """Brute force over a grid: nearly every row that can be broken is, and no other."""
    lowest, found = [], []
    axis = torch.linspace(-EPSILON, EPSILON, 101, dtype=torch.double)
    grid = torch.cartesian_prod(axis, axis)
    grid = grid[grid.norm(dim=1) <= EPSILON] if norm == "l2" else grid
    for seed in range(3):
        world = World(seed, 3)
        measured = mixture_accuracy(
            world.mixture, [world.batch], radius=EPSILON, norm=norm, steps=5, unit=1.0
        )
        found.append(torch.from_numpy(measured.under()["worst of all"][:, 1:]))
        logits = world.logits(world.x[:, None] + grid)
        shares = world.mixture.probabilities.view(-1, 1, 1, 1)
        votes = F.one_hot(logits.argmax(-1), 2)
        each = [(shares * p).sum(0).argmax(-1) for p in (logits.softmax(-1), votes)]
        lowest.append(torch.stack([(p == world.y[:, None]).all(1) for p in each], 1).double())
    gap = torch.cat(found) - torch.cat(lowest)
    assert (gap >= 0).double().mean() >= 0.97  # between points of the grid there may be worse
    assert gap.mean() <= 0.03


@given(seeds, st.integers(1, 4))
def test_the_gradient_of_the_mean_is_that_of_its_cross_entropy(seed: int, members: int):
    random = torch.Generator().manual_seed(seed)
    logits = torch.randn(members, 5, 3, generator=random, dtype=torch.double, requires_grad=True)
    weights = torch.rand(members, generator=random, dtype=torch.double)
    weights = weights / weights.sum()
    mean = (weights[:, None, None] * logits.softmax(-1)).sum(0)
    [whole] = torch.autograd.grad(-mean[:, 0].log().sum(), logits)
    losses = -logits.log_softmax(-1)[..., 0]
    [slopes] = torch.autograd.grad(losses.sum(), logits)
    torch.testing.assert_close(of_mean(losses.detach(), weights)[..., None] * slopes, whole)


LABELS = torch.tensor([0, 1, 2, 3, 0])


@few
@given(st.sampled_from(["models", "weights"]), st.floats(0, 2), st.sampled_from(NORMS))
def test_no_attack_raises_what_it_is_to_lower(kind: str, radius: float, norm: str):
    mixture = three(kind)
    found = mixture_accuracy(
        mixture, [batch_of(mixture, X, LABELS)], radius=radius, norm=norm, steps=2, unit=1.0
    )
    under = found.under()
    assert (under["EoT-PGD"][:, 0] <= under["none"][:, 0] + 1e-9).all()
    assert (under["ARC"][:, 0] <= under["none"][:, 0] + 1e-9).all()
    assert (under["PGD of the mean"][:, 1] <= under["none"][:, 1]).all()
    assert (under["ARC of the vote"][:, 2] <= under["none"][:, 2]).all()
    assert all((under["worst of all"] <= rows + 1e-6).all() for rows in under.values())
    each = mixture.each(lambda: mixture(X))
    clean = mixture.probabilities @ (each.argmax(-1) == LABELS).double()
    assert under["none"][:, 0] == pytest.approx(clean.numpy())
    if radius == 0:
        assert all((rows == under["none"]).all() for rows in under.values())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("breaks", [False, True])
def test_an_attack_leaves_no_trace(kind: str, breaks: bool):
    mixture = three(kind)
    mixture.model.layers[0].bias.requires_grad_(False)
    before, members = fingerprint(mixture), [*mixture.members]
    batch, calls = batch_of(mixture, X, LABELS), 0

    def closure() -> tuple[Tensor, Tensor]:
        nonlocal calls
        calls += 1
        if breaks and calls == 60:
            raise KeyError
        return batch.closure()

    with contextlib.suppress(KeyError):
        mixture_accuracy(
            mixture, [batch._replace(closure=closure)], radius=1.0, steps=2, draws=2, unit=1.0
        )
    assert calls >= 60
    assert_same(fingerprint(mixture), before)
    assert mixture.members == members


def test_a_frozen_mixture_is_attacked_as_one_that_learns():
    found = []
    for frozen in (False, True):
        mixture = three("models").requires_grad_(not frozen)
        batch = batch_of(mixture, X, LABELS)
        found.append(mixture_accuracy(mixture, [batch], radius=1.0, steps=3, unit=1.0).rows)
        assert all(p.requires_grad != frozen for p in mixture.parameters())
    assert (found[0] == found[1]).all()


def test_rows_are_attacked_alike_in_any_order_of_batches():
    mixture, found = three("weights"), []  # a row's mask depends on its place in the batch
    for groups in ([[0, 1, 2, 3, 4]], [[3, 4], [0, 1, 2]]):
        batches = [batch_of(mixture, X[g], LABELS[g])._replace(rows=g) for g in groups]
        found.append(mixture_accuracy(mixture, batches, radius=1.0, steps=3, unit=1.0))
    assert (found[0].rows == found[1].rows).all()


class Dropped(nn.Module):
    """Right where the kept coordinates of the input say so."""

    def __init__(self) -> None:
        super().__init__()
        self.drop, self.head = nn.Dropout(0.5), nn.Linear(3, 2, bias=False)
        with torch.no_grad():
            self.head.weight.copy_(torch.tensor([[1.0, 0.8, -0.5], [0.0, 0.0, 0.0]]))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(x))


def test_masks_are_judged_on_fresh_draws_by_brute_force_over_all():
    mixture = Mixture([Dropout(0)], model=Dropped())
    x = torch.tensor([[1.0, 1.0, 1.0], [-1.0, 1.0, 1.0], [0.3, -1.0, 1.0]])
    batch = batch_of(mixture, x, torch.zeros(3, dtype=torch.long))
    with playing(mixture, None, 300, seed=0) as play:
        made = play(batch)
        found = drawn(made.logits(made.zero, JUDGED), made.weights, batch.labels)
    masks = torch.tensor([*itertools.product((0.0, 1.0), repeat=3)])
    scores = (masks[:, None] * x) @ torch.tensor([1.0, 0.8, -0.5])
    exact = (scores >= 0).double().mean(0)
    assert found.numpy() == pytest.approx(exact.numpy(), abs=0.1)


def test_no_mask_judges_what_it_has_chosen():
    mixture = three("masks")
    with playing(mixture, None, 4, seed=3) as play:
        made = play(batch_of(mixture, X, LABELS))
        draws = [set(made.drawn(which)) for which in (CHOSEN, JUDGED, CLIMBED, CLIMBED + 1)]
        assert [len(d) for d in draws] == [12] * 4
        assert not any(a & b for a, b in itertools.combinations(draws, 2))
        zero = made.zero
        one, other = made.logits(zero, CHOSEN), made.logits(zero, JUDGED)
        assert torch.equal(one, made.logits(zero, CHOSEN))
        assert not torch.equal(one, other)
    fixed = three("models")
    with playing(fixed, None, 4, seed=3) as play:
        assert len(play(batch_of(fixed, X, LABELS)).drawn(CHOSEN)) == 3


class Tokens(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embedding = nn.Embedding(20, 6)
        self.hidden, self.head = nn.Linear(6, 16), nn.Linear(16, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        mask = attention_mask[..., None].float()
        hidden = (2 * self.hidden(self.embedding(input_ids))).tanh() * mask
        return self.head(hidden.sum(1) / mask.sum(1))


@pytest.mark.parametrize("site", [None, "embedding", "hidden"])
def test_padding_changes_nothing_at_any_site(site: str | None):
    random = torch.Generator().manual_seed(0)
    ids, y = torch.randint(1, 20, (ROWS, 5), generator=random), torch.arange(ROWS) % 3
    found = []
    for pads in (0, 3):
        mixture = Mixture([Tokens(1), Tokens(2), Tokens(3)])
        words = F.pad(ids, (0, pads)), F.pad(torch.ones_like(ids), (0, pads))

        def closure(mixture=mixture, words=words) -> tuple[Tensor, Tensor]:
            logits = mixture(input_ids=words[0], attention_mask=words[1])
            return F.cross_entropy(logits, y, reduction="none"), logits

        batch = Batch(closure, y, [*range(ROWS)])
        found.append(
            mixture_accuracy(mixture, [batch], radius=2.0, restarts=0, steps=3, site=site, unit=1.0)
        )
    assert (found[0].rows == found[1].rows).all()
    under = found[0].under()
    assert under["ARC"][:, 0].mean() < under["none"][:, 0].mean()


def test_the_unit_is_the_mean_norm_of_a_token_of_the_first_member():
    mixture = Mixture([Tokens(1), Tokens(2)])
    ids = torch.arange(1, 13).view(4, 3)

    def closure() -> tuple[Tensor, Tensor]:
        logits = mixture(input_ids=ids, attention_mask=torch.ones_like(ids))
        return F.cross_entropy(logits, torch.tensor([0, 1, 2, 0]), reduction="none"), logits

    batch = Batch(closure, torch.tensor([0, 1, 2, 0]), [0, 1, 2, 3])
    unit = float(mixture.model.embedding(ids).detach().norm(dim=-1).mean())
    given, own = (
        mixture_accuracy(mixture, [batch], radius=r, unit=u, steps=2)
        for r, u in ((0.5 * unit, 1.0), (0.5, None))
    )
    assert np.array_equal(given.rows, own.rows)


def refused(**changes):
    mixture = three("models")
    batch = batch_of(mixture, X, LABELS)
    settings = {"radius": 1.0, "unit": 1.0, **changes}
    return mixture_accuracy(
        settings.pop("mixture", mixture), settings.pop("batches", [batch]), **settings
    )


def of_two_shapes() -> dict:
    class Net(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.first, self.head = nn.Linear(3, width), nn.Linear(width, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.first(x))

    mixture = Mixture([Net(4), Net(5)])
    return {"mixture": mixture, "batches": [batch_of(mixture, X, LABELS)], "site": "first"}


def without_logits() -> dict:
    mixture = three("models")
    batch = Batch(lambda: mixture(X).logsumexp(-1), LABELS, [*range(5)])
    return {"mixture": mixture, "batches": [batch]}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"mixture": nn.Linear(3, 4)}, TypeError, "must be a mixadv.mixtures.Mixture"),
        ({"norm": "l3"}, ValueError, "'l1', 'l2', 'linf'"),
        ({"radius": -1.0}, ValueError, "radius"),
        ({"steps": 0}, ValueError, "steps"),
        ({"restarts": -1}, ValueError, "restarts"),
        ({"draws": 0}, ValueError, "draws"),
        ({"classes": 1}, ValueError, "classes"),
        ({"site": "layers.0", "unit": None}, ValueError, "unit=1.0"),
        ({"batches": []}, ValueError, "no rows"),
        (of_two_shapes(), ValueError, "they differ at the site"),
        (without_logits(), ValueError, "not losses alone"),
    ],
)
def test_what_cannot_be_attacked_is_refused_in_words(changes, error, message: str):
    with pytest.raises(error, match=message):
        refused(**changes)


@pytest.mark.parametrize("kind", ["models", "weights"])
def test_a_first_member_without_a_gradient_is_not_said_to_be_all_there_is(kind: str):
    """The first round of a game warns that no ascent moves, which of the mixture is not true."""
    world = World(3, 2)
    still = linear(torch.zeros(2, 2), torch.zeros(2)).state_dict()
    moving = linear(world.w[1], world.b[1]).state_dict()
    mixture = Mixture([still, moving], model=linear(world.w[0], world.b[0]))
    if kind == "models":
        mixture = Mixture(
            [linear(torch.zeros(2, 2), torch.zeros(2)), linear(world.w[1], world.b[1])]
        )
    labels = (world.x @ world.w[1].T + world.b[1]).argmax(-1)
    found = mixture_accuracy(mixture, [batch_of(mixture, world.x, labels)], radius=9.0, unit=1.0)
    assert not found.right[:, 1:3, 1].any()  # EoT-PGD and ARC break the member that moves


def test_where_no_member_has_a_gradient_it_is_said():
    still = [linear(torch.zeros(2, 2), torch.tensor([1.0, b])) for b in (0.0, 2.0)]
    mixture = Mixture(still)
    batches = [batch_of(mixture, torch.eye(2).double(), torch.tensor([0, 1]))]
    with pytest.warns(UserWarning, match="exactly zero for every member"):
        mixture_accuracy(mixture, batches, radius=1.0, unit=1.0)


def test_a_member_in_play_is_not_attacked():
    mixture = three("models")
    with pytest.raises(mixadv.GameError, match="in play"), mixture.member(0):
        mixture_accuracy(mixture, [batch_of(mixture, X, LABELS)], radius=1.0, unit=1.0)


# In a report ------------------------------------------------------------------------------------


def reported(model, mixture, **changes):
    settings = {"radii": (0.3, 1.0), "steps": 2, "restarts": 1, "increase_radius": None}
    settings |= {"progress": False, "rows": 34, "mixture": mixture, **changes}
    return evaluate(model, word_tokenizer(), rows_of(0), **settings)


@pytest.fixture(scope="module")
def report():
    """Return the report of a model and a mixture of it."""
    model, mixture = texts_mixture()
    before = fingerprint(model)
    made = reported(model, mixture)
    assert_same(fingerprint(model), before)
    return made


@pytest.mark.parametrize("radii", [(), (0,)])
def test_a_report_without_radii_can_be_read(radii: tuple[float, ...]):
    model, mixture = texts_mixture()
    report = reported(model, mixture, radii=radii)
    assert "attacks made for it" not in str(report) + report.markdown()


def texts_mixture() -> tuple[nn.Module, Mixture]:
    model = classifier(0)
    members = [{}, classifier(1).state_dict(), classifier(2).state_dict()]
    return model, Mixture(members, [2, 1, 1], model=model)


def test_a_report_of_a_mixture_is_what_is_measured_of_its_rows(report):
    model, mixture = texts_mixture()
    section, about = report.sections["mixture"], report.sections["about"]
    rows = read_rows(rows_of(0), model).take(about["attacked"][:32])
    batches = [
        batch._replace(rows=[about["attacked"][i] for i in batch.rows])
        for batch in text_batches(mixture, word_tokenizer(), rows)
    ]
    found = mixture_accuracy(mixture, batches, radius=1.0, unit=about["unit"], steps=2)
    assert section["radii"] == [0.3, 1.0]
    assert np.array_equal(section["per row"][1]["right"][:32], found.right)
    right = np.array(section["per row"][1]["right"])
    expected = (right @ mixture.probabilities.numpy()).mean(0)
    under = section["accuracy"][1]
    assert under["none"][0]["value"] == pytest.approx(expected[0])
    assert under["ARC"][0]["value"] == pytest.approx(expected[2])
    assert under["transfer"][0]["value"] == pytest.approx(expected[4 + section["best"][1]])
    assert under["worst of all"][0]["value"] <= under["ARC"][0]["value"]
    tables = report.table()
    for word in ("worst of all", "a member drawn", "vote", "Members alone"):
        assert word in tables
    loaded = type(report)(json.loads(report.json()))
    assert loaded.markdown() == report.markdown()


def test_the_model_beside_a_mixture_stands_under_each_of_its_attacks(report):
    """PGD of the model alone says nothing of what ARC would have made of it."""
    model, mixture = texts_mixture()
    alone = reported(model, Mixture([model]))
    beside = report.sections["beside"]
    assert beside == alone.sections["mixture"]
    assert "beside" not in alone.sections
    assert "beside" not in reported(mixture, None, radii=(1.0,)).sections
    under = beside["accuracy"][1]
    assert under["ARC"][0]["value"] <= under["none"][0]["value"]
    assert list(under) == list(report.sections["mixture"]["accuracy"][1])
    [table] = [t for t in report.markdown().split("\n\n") if "worst of all" in t]
    rows = [line.strip("| ").split(" | ") for line in table.splitlines() if "worst of all" in line]
    assert "the model" in table
    for row, found in zip(rows, beside["accuracy"], strict=True):
        assert row[-1].split()[0] == f"{100 * found['worst of all'][0]['value']:.1f}"


def test_a_report_of_a_mixture_goes_on_where_it_was_killed(tmp_path):
    model, mixture = texts_mixture()
    whole = reported(model, mixture, radii=(1.0,))
    calls = 0

    def killing(*_) -> None:
        nonlocal calls
        calls += 1
        if calls == 350:
            raise KeyboardInterrupt

    handle = model.register_forward_pre_hook(killing)
    with pytest.raises(KeyboardInterrupt):
        reported(model, mixture, folder=tmp_path, radii=(1.0,))
    first = calls
    again = reported(model, mixture, folder=tmp_path, radii=(1.0,))
    assert again == whole
    total = calls - first
    calls = 10_000
    assert reported(model, mixture, folder=tmp_path, radii=(1.0,)) == whole
    assert calls == 10_000
    other = Mixture(mixture.members, [1, 1, 1], model=model)
    changed = reported(
        model, other, folder=tmp_path, radii=(1.0,)
    )  # other probabilities are another mixture
    assert changed.sections["mixture"] != whole.sections["mixture"]  # and is not read from there
    assert calls - 10_000 > total / 2
    handle.remove()


def test_what_is_no_mixture_is_not_reported():
    with pytest.raises(TypeError, match="must be a mixadv"):
        reported(classifier(0), [classifier(1)])
