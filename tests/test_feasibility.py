"""Whatever the gradient, δ stays in its ball and off padding; each sample plays its own game."""

from contextlib import contextmanager
from dataclasses import fields
from inspect import signature

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, reject
from hypothesis import strategies as st
from torch import nn

import mixadv
from mixadv.model import site
from mixadv.model.noise import Noise
from mixadv.model.visits import Call
from mixadv.players.ascent import Ascent
from mixadv.players.opening import opening
from tests.worlds import gradients
from tests.zoo import ASCENDING, stepwise, wrapped
from tests.zoo import ROWS as WEIGHING

ORDER = {"l1": 1, "l2": 2, "linf": float("inf")}
ROWS = 6
MASK = torch.tensor([[1] * n + [0] * (5 - n) for n in (5, 3, 4, 1, 5, 2)])
# What makes each sample's game its own: by default samples share FreeAT's weights and tokens' δ.
APART = {
    "carry": False,
    "shared": False,
    "contrast_weight": 0.0,
    "deviation_weight": 0.0,  # a distance that the loss is weighed against
}
ALIKE = {"level": 1.0, "ball": 0.0}  # all rows count the same
# What makes the learner take a plain step.
PLAIN = {
    **APART,
    "proximal_weight": 0.0,
    "learner_steps": 1,
    "learner_temperature": 0.0,
    "damping": 0.0,
    "round_damping": 0.0,
    "average": None,
}
# Solvers whose `steps` count passes, the first of which is no move.
PASSES = ("freeat", "freelb", "textat")
STILL = ("noise", "r3f")  # make no move


class Tokens(nn.Module):
    """A classifier whose pads count for nothing, unless a δ moves them."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.embed = nn.Embedding(11, 4)
        self.hidden = nn.Linear(4, 5)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(5, 3)
        self.fault = lambda x: x

    def forward(self, input_ids, attention_mask):
        x = self.fault(self.embed(input_ids))
        pad = torch.tanh(self.hidden(self.embed.weight[0]))
        read = (torch.tanh(self.hidden(x)) - pad).sum(1) / attention_mask.sum(1, keepdim=True)
        return self.head(self.dropout(read))


class GivenNoise:
    """The same draws for a row, whatever batch it comes in and however far it is padded."""

    def __init__(self, rows):
        self.rows = rows

    def begin(self, player, round, rank=None):
        self.count = 0

    def __call__(self, kind, like):
        self.count += 1
        generator = torch.Generator().manual_seed(self.count)
        if like.dim() == 1:  # of each sample
            return 2 * torch.rand(ROWS, generator=generator, dtype=like.dtype)[self.rows] - 1
        size = (3, ROWS, 9, like.shape[-1])
        normal = torch.randn(size, generator=generator, dtype=like.dtype)
        drawn = normal if kind == "normal" else normal.tanh()
        particles = len(like) // len(self.rows)
        return drawn[:particles, self.rows, : like.shape[1]].flatten(0, 1)


def mixed(name):
    """Return whether a solver takes several particles."""
    return "particles" in signature(mixadv.SOLVERS[name]).parameters


def build(name, **parameters):
    """Build a solver with those of the parameters that it has."""
    known = {f.name for f in fields(mixadv.SOLVERS[name]) if f.init}
    parameters = {"shared": False, **parameters}  # which few sets of the adversary allow
    return mixadv.make_solver(name, **{k: v for k, v in parameters.items() if k in known})


def batch(rows=range(ROWS), length=5):
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 11, (ROWS, 5), generator=draw) * MASK
    labels = torch.randint(0, 3, (ROWS,), generator=draw)
    rows = list(rows)
    ids, mask = (F.pad(x, (0, length - 5))[rows] for x in (ids, MASK))
    return ids, mask, labels[rows]


def forward(model, ids, mask, labels, scale=1.0, reduction="none"):
    def closure():
        logits = model(ids, attention_mask=mask)
        return scale * F.cross_entropy(logits, labels, reduction=reduction), logits

    return closure


def lengths(delta, norm, per):
    flat = delta.detach().double().flatten(0, -2 if per == "token" else 0).flatten(1)
    return torch.linalg.vector_norm(flat, ORDER[norm], dim=1)


@contextmanager
def added_at_site():
    """Collect every δ that is added to the site's output."""
    seen, add = [], site.add

    def record(output, delta):
        seen.append(delta.detach().clone())
        return add(output, delta)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(site, "add", record)
        yield seen


def assert_inside(delta, mask, radius, norm, per):
    assert delta.isfinite().all()
    assert not delta[(mask == 0).expand(delta.shape[:-1])].any()
    assert (lengths(delta, norm, per) <= radius * (1 + 1e-6)).all()


words = {
    "norm": st.sampled_from(["l1", "l2", "linf"]),
    "per": st.sampled_from(["sample", "token"]),
    "normalize": st.sampled_from(["steepest", "norm", "none"]),
    "projection": st.sampled_from(["ball", "sphere"]),
    "start": st.sampled_from(["zero", "uniform", "normal"]),
    "start_size": st.sampled_from([None, 0.01, 5.0]),
    "radius": st.sampled_from([0.0, 0.3, 2.0]),
    "temperature": st.sampled_from([0.0, 0.1, 100.0]),
    "particles": st.integers(1, 3),
}
sizes = st.sampled_from([0.0, 0.1, 1e10])
dtypes = st.sampled_from([torch.float32, torch.float64, torch.bfloat16])
nan, inf = float("nan"), float("inf")
scales = st.tuples(*3 * [st.sampled_from([0.0, 1e-30, 1.0, 1e30, nan, inf])])


@given(st.builds(Ascent, step_size=sizes, **words), dtypes, st.tuples(scales, scales))
@example(Ascent(step_size=1e10, normalize="none"), torch.float32, [(1.0, 1e30, 1.0)])
def test_any_gradient_leaves_delta_in_its_ball_and_off_padding(ascent, dtype, gradients):
    mask = torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    call = Call(torch.Size([3, 3, 2]), dtype, torch.device("cpu"), mask[..., None])
    noise = Noise(0)
    noise.begin("adversary", 0)
    q = opening(ascent, noise, [call], lambda site: 1.0)
    for scale in (None, *gradients):
        if scale is not None:
            gradient = torch.randn_like(q.points[0]) * torch.tensor(scale).view(3, 1, 1)
            q, _ = q.move([gradient], lambda index, *move: ascent.move(*move), noise)
        assert q.points[0].dtype == torch.promote_types(dtype, torch.float32)
        for point in q.points[0]:
            assert_inside(point, mask, ascent.radius, ascent.norm, ascent.per)


@pytest.mark.filterwarnings("ignore:.*noise floor")
@pytest.mark.parametrize("name", ASCENDING)
@given(parameters=st.fixed_dictionaries(words), dtype=dtypes)
def test_every_pass_of_every_solver_stays_in_the_ball(name, parameters, dtype):
    if not mixed(name):
        parameters = {**parameters, "particles": 1}
    if name == "vat":  # whose power iteration probes in between
        parameters = {**parameters, "steps": 2}
    try:
        solver = build(name, **parameters)
    except ValueError:
        reject()
    torch.manual_seed(0)
    model, (ids, mask, labels) = Tokens().to(dtype), batch()
    token = model.embed.weight[ids].detach().float().norm(dim=-1)
    unit = float((token * mask).sum() / mask.sum())
    optimizer = wrapped(model, solver)
    closure = forward(model, ids, mask, labels)
    optimizer.step(closure)  # the first round adds probes besides
    with added_at_site() as seen:
        optimizer.step(closure)
    assert seen
    for delta in seen:
        assert_inside(delta, mask, solver.radius * unit, solver.norm, solver.per)


ONE_MOVE = {name: {"steps": 1} for name in ASCENDING}
ONE_MOVE |= {name: {"steps": 0} for name in STILL} | {name: {"steps": 2} for name in PASSES}
ONE_MOVE |= {"freeat": {"steps": 1, "carry": True}}  # carries on what it moved to
ONE_MOVE |= {"cat, δ shared by the places of a token": {"steps": 1, "shared": True}}


@pytest.mark.parametrize("value", [nan, inf])
@pytest.mark.parametrize("case", ONE_MOVE)
def test_nonfinite_gradient_costs_only_its_own_sample(case, value):
    """The others play what they play in a batch without it; it plays δ = 0, and is counted."""
    name, _, _ = case.partition(",")
    solver = build(name, **{**PLAIN, "unit": "absolute", **ONE_MOVE[case]})

    def play(rows, faulty=()):
        torch.manual_seed(0)
        model, (ids, mask, labels) = Tokens().double(), batch(rows)

        def spoil(x):
            if x.requires_grad and faulty:
                spoiled = torch.zeros_like(x)
                spoiled[faulty, 0, 0] = value
                x.register_hook(lambda g: g + spoiled)
            return x

        model.fault = spoil
        optimizer = wrapped(model, solver)
        optimizer.game.rounds.arena.noise = GivenNoise(rows)
        optimizer.step(forward(model, ids, mask, labels))
        kept = optimizer.game.rounds.memory.get("delta")  # FreeAT's next point
        moved = kept[0] if kept else optimizer.game.strategy.points[0][0]
        return moved, optimizer.outcome.nonfinite

    whole = [0, 2, 3, 5]
    (clean, none), (spoiled, counted) = play(whole), play(list(range(ROWS)), [1, 4])
    assert clean.any()
    torch.testing.assert_close(spoiled[whole], clean, rtol=1e-9, atol=1e-12)
    if name in STILL:
        assert counted is None
        return
    assert not spoiled[[1, 4]].any()
    assert (int(none), int(counted)) == (0, 2)


@pytest.mark.parametrize("name", ["pgd", "creat", "vat", "alum", "smart", "mat"])
def test_overflow_under_perturbation_does_not_reach_the_weights(name):
    """A sample whose payoff is NaN wherever δ ≠ 0 is played at δ = 0, where its loss is finite."""
    model, (ids, mask, labels) = Tokens().double(), batch()

    def overflow(x):
        moved = (x != model.embed.weight[ids]).flatten(1).any(1)
        return x * torch.where(moved & (torch.arange(ROWS) == 2), torch.nan, 1.0)[:, None, None]

    solver = build(name, steps=1, particles=1 + mixed(name), **PLAIN)
    optimizer = wrapped(model, solver)
    optimizer.step(forward(model, ids, mask, labels))
    model.fault = overflow
    assert optimizer.step(forward(model, ids, mask, labels)).isfinite()
    assert all(p.isfinite().all() for p in model.parameters())


class Drawing(torch.optim.SGD):
    """An optimizer that draws random numbers itself, as for stochastic rounding."""

    def step(self, closure=None):
        super().step(closure)
        with torch.no_grad():
            for p in self.param_groups[0]["params"]:
                p.add_(1e-3 * torch.randn_like(p))


def train(solver=None, dtype=torch.float32, times=1.0):
    """Train a few steps with dropout; return the weights and where the random state ended."""
    torch.manual_seed(0)
    model, (ids, mask, labels) = Tokens(dropout=0.3).to(dtype), batch()
    optimizer = Drawing(model.parameters(), lr=0.1, momentum=0.9)
    closure = forward(model, ids, mask, labels, times)
    if solver is not None:
        optimizer = mixadv.wrap(optimizer, model, solver)
    for _ in range(4):
        if solver is not None:
            optimizer.step(closure)
            continue
        optimizer.zero_grad()
        closure()[0].mean().backward()
        optimizer.step()
    return [*model.state_dict().values(), torch.get_rng_state()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", [n for n in ASCENDING if n != "mart"])  # of another loss
def test_radius_zero_is_plain_training(name, dtype):
    times = 2.0 if name == "fgm" else 1.0  # its clean and its adversarial loss coincide
    plain = train(dtype=dtype, times=times)
    steps = {"steps": 1} if name == "freeat" else {}  # as many updates
    played = train(build(name, radius=0.0, **PLAIN, **steps, **ALIKE), dtype)
    # Else gradients are sums over passes, or of two that cancel up to rounding.
    exact = name not in ("fgm", "freelb", "textat", "creat", "cat", "vat", "trades", *WEIGHING)
    if exact or dtype == torch.float64:
        tolerance = {"rtol": 0, "atol": 0} if exact else {"rtol": 1e-9, "atol": 1e-11}
        torch.testing.assert_close(played, plain, **tolerance)


def play(solver, parts, scale=1.0, reduction="none", length=5, boost=1.0):
    """Play a batch in parts; return δ of each row and the gradient of the batch's mean loss.

    Losses are multiplied by `boost` on their way to backward, as loss scaling does.
    """
    torch.manual_seed(0)
    model = Tokens().double()
    optimizer = wrapped(model, solver, lr=0.0)
    played = torch.empty(solver.particles, ROWS, length, 4, dtype=torch.float64)
    total = [torch.zeros_like(p) for p in model.parameters()]
    for rows in parts:
        ids, mask, labels = batch(rows, length)
        share = boost * len(rows) / ROWS
        optimizer.game.rounds.arena.noise, optimizer.game.rounds.memory = GivenNoise(rows), {}
        closure = forward(model, ids, mask, labels, scale, reduction)
        if solver.replays_batch:  # a loop can neither split its round nor scale its loss
            taken = stepwise(optimizer)
            optimizer.step(closure)
            found = [sum(step[n] for step in taken) for n, _ in model.named_parameters()]
            weight = len(rows) / ROWS
        else:
            optimizer.game.backward(closure, lambda loss, by=share: (by * loss).backward())
            found, weight = gradients(model), 1 / boost
        total = [t + weight * g for t, g in zip(total, found, strict=True)]
        played[:, rows] = optimizer.game.strategy.points[0]
    return played, total


WHOLE = [list(range(ROWS))]


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("scale", [1e-6, 1e6])
@pytest.mark.parametrize("name", ASCENDING)
def test_normalised_ascent_ignores_the_scale_of_the_loss(name, scale, reduction):
    solver = build(name, play_as="ensemble", deviation_weight=0.0)
    one, other = (play(solver, WHOLE, s, reduction)[0] for s in (1.0, scale))
    torch.testing.assert_close(other, one, rtol=1e-9, atol=1e-12)


ASCENTS = {
    "normalised": {"normalize": "steepest"},
    "normalised, one loss per batch": {"normalize": "steepest", "reduction": "mean"},
    "raw": {"normalize": "none", "step_size": 0.5},
    "Langevin": {"normalize": "none", "step_size": 0.5, "temperature": 0.01},
}
ascents = pytest.mark.parametrize("words", ASCENTS.values(), ids=ASCENTS)


@pytest.mark.parametrize("parts", [[[0], [1, 2, 3], [4, 5]], [[5, 2, 0, 4, 1, 3]]], ids=str)
@ascents
@pytest.mark.parametrize("name", ASCENDING)
def test_play_ignores_how_the_batch_is_split_and_ordered(name, words, parts):
    extra = {"particles": 3, "play_as": "ensemble"} if mixed(name) else {}
    solver = build(name, unit="absolute", **words, **extra, **APART, **ALIKE)
    reduction = words.get("reduction", "none")
    whole = play(solver, WHOLE, reduction=reduction)
    split = play(solver, parts, reduction=reduction, boost=1024.0)
    assert whole[0].any()
    torch.testing.assert_close(split, whole, rtol=1e-9, atol=1e-12)


@ascents
@pytest.mark.parametrize("name", ASCENDING)
def test_pads_at_the_end_change_nothing(name, words):
    solver = build(name, **words)
    short, long = (play(solver, WHOLE, length=n) for n in (5, 8))
    assert not long[0][:, :, 5:].any()
    torch.testing.assert_close(long[0][:, :, :5], short[0], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(long[1], short[1], rtol=1e-9, atol=1e-12)
