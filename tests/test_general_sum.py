"""Players with goals of their own: one δ for several calls, a payoff that is not the loss, a term
at δ = 0. Rounds are computed again in float64 by loops that know nothing of the library.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mixadv
from mixadv.model.closure import parse_output
from mixadv.model.modules import functional
from mixadv.model.places import placed
from mixadv.model.visits import Call
from tests.zoo import (
    AROUND,
    FAMILIES,
    WAYS,
    BrokenError,
    Fault,
    Player,
    assert_same,
    copies,
    fingerprint,
    player,
    slow_but,
    small,
    stepwise,
    wrapped,
)

WORDS, SIZE = 13, 4
RATE = 0.3
PROMPTS = [[3, 4, 5], [6, 7], [8, 9, 10, 11]]
ANSWERS = {"chosen": [[2, 12], [4], [5, 6, 7]], "rejected": [[9], [10, 11, 2], [12, 3]]}
OTHERS = [[2, 3, 4], [5, 6, 7, 8]]


class Speaker(nn.Module):
    """Foretells the next token from the mean of what it has read; padding is no part of it."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, SIZE)
        self.hidden, self.head = nn.Linear(SIZE, 5), nn.Linear(5, WORDS)
        self.dropout = nn.Dropout(dropout)
        self.double()

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.speak(self.words(input_ids), attention_mask)

    def speak(self, embedded: Tensor, mask: Tensor) -> Tensor:
        real = mask[..., None].to(embedded)
        read = (embedded * real).cumsum(1) / real.cumsum(1).clamp(min=1)
        return self.head(self.dropout(torch.tanh(self.hidden(read))))


class Text(NamedTuple):
    """Prompts with answers: `[B, n]` each."""

    ids: Tensor
    mask: Tensor
    prompt: Tensor  # 1 there
    answer: Tensor

    def losses(self, logits: Tensor) -> Tensor:
        """Return the loss of each row's answer, `[B]`."""
        told = F.cross_entropy(logits[:, :-1].mT, self.ids[:, 1:], reduction="none")
        answer = self.answer[:, 1:]
        return (told * answer).sum(1) / answer.sum(1)


def text(answers: list[list[int]], side: str = "right", prompts: Any = PROMPTS) -> Text:
    length = max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True))
    rows = []
    for prompt, answer in zip(prompts, answers, strict=True):
        pad = [0] * (length - len(prompt) - len(answer))
        parts = [(prompt, 1, 0), (answer, 0, 1)]
        parts = [*parts, (pad, 0, 0)] if side == "right" else [(pad, 0, 0), *parts]
        ids = [i for part, *_ in parts for i in part]
        marks = [(p, a) for part, p, a in parts for _ in part]
        rows.append((ids, [p + a for p, a in marks], *zip(*marks, strict=True)))
    return Text(*map(torch.tensor, zip(*rows, strict=True)))


class World(NamedTuple):
    """A model with the closures of both players and where δ acts."""

    model: Speaker
    chosen: Text
    rejected: Text
    others: Text

    def closure(self) -> tuple[Tensor, Tensor]:
        good = self.model(self.chosen.ids, self.chosen.mask)
        bad = self.model(self.rejected.ids, self.rejected.mask)
        return self.learners(good, bad), last_of(self.chosen, good)

    def adversary(self) -> Tensor:
        return -self.rejected.losses(self.model(self.rejected.ids, self.rejected.mask))

    def retain(self) -> Tensor:
        return self.others.losses(self.model(self.others.ids, self.others.mask)).mean()

    def learners(self, good: Tensor, bad: Tensor) -> Tensor:
        return self.chosen.losses(good).mean() - 0.2 * self.rejected.losses(bad).mean()

    @property
    def where(self) -> dict[str, Any]:
        pair = [self.chosen.prompt, self.rejected.prompt]
        return {"closure": pair, "adversary": self.rejected.prompt}

    @property
    def goals(self) -> dict[str, Any]:
        return {"adversary": self.adversary, "retain": self.retain, "where": self.where}


def last_of(one: Text, logits: Tensor) -> Tensor:
    """Return the predictions at the last token of each row's answer, `[B, C]`."""
    last = (one.answer * torch.arange(one.ids.shape[1])).argmax(1)
    return logits[torch.arange(len(last)), last]


def world(chosen: str = "right", rejected: str = "right", dropout: float = 0.0) -> World:
    torch.manual_seed(0)
    model = Speaker(dropout)
    texts = text(ANSWERS["chosen"], chosen), text(ANSWERS["rejected"], rejected)
    return World(model, *texts, text(OTHERS, prompts=[[1], [2]]))


# By hand -----------------------------------------------------------------------------------------

Delta = list[list[Tensor]]
"""δ of the i-th token of each row's prompt."""


def spoken(model: Speaker, one: Text, delta: Delta | None) -> Tensor:
    """Return the logits of texts whose prompts are moved by δ."""
    rows = []
    for b, ids in enumerate(one.ids):
        places = one.prompt[b].nonzero().flatten().tolist()
        embedded = [model.words.weight[i] for i in ids]
        for i, place in enumerate(places if delta is not None else []):
            embedded[place] = embedded[place] + delta[b][i]
        rows.append(torch.stack(embedded))
    return model.speak(torch.stack(rows), one.mask)


def zeros() -> Delta:
    return [[torch.zeros(SIZE, dtype=torch.float64) for _ in prompt] for prompt in PROMPTS]


def leaves(delta: Delta) -> Delta:
    return [[d.detach().requires_grad_() for d in row] for row in delta]


def slope(w: World, delta: Delta) -> tuple[Tensor, Delta]:
    """Return the adversary's payoff of each row, and its gradient."""
    delta = leaves(delta)
    payoffs = -w.rejected.losses(spoken(w.model, w.rejected, delta))
    flat = torch.autograd.grad(payoffs.sum(), [d for row in delta for d in row])
    found = iter(flat)
    return payoffs.detach(), [[next(found) for _ in row] for row in delta]


def climbed(delta: Delta, gradient: Delta, step: float, radius: float, per: str) -> Delta:
    """Return δ after a step of steepest ascent in an L2 ball."""
    moved = []
    for row, slopes in zip(delta, gradient, strict=True):
        groups = [[i] for i in range(len(row))] if per == "token" else [[*range(len(row))]]
        new = [*row]
        for group in groups:
            length = torch.cat([slopes[i] for i in group]).norm()
            for i in group:
                new[i] = row[i] + step * slopes[i] / length
            far = torch.cat([new[i] for i in group]).norm()
            for i in group:
                new[i] = new[i] * min(1.0, radius / float(far))
        moved.append(new)
    return moved


def pgd(w: World, per: str) -> Tensor:
    delta = zeros()
    for _ in range(3):
        delta = climbed(delta, slope(w, delta)[1], 0.3, 0.7, per)
    return under(w, leaves(delta))


def fgm(w: World, per: str) -> Tensor:
    gradient = slope(w, zeros())[1]
    return under(w, None) + under(w, climbed(zeros(), gradient, 0.7, 0.7, per))


def freelb(w: World, per: str) -> Tensor:
    delta, total = zeros(), under(w, zeros()) / 3
    for _ in range(2):
        delta = climbed(delta, slope(w, delta)[1], 0.3, 0.7, per)
        total = total + under(w, delta) / 3
    return total


def mat(w: World, per: str) -> Tensor:
    """Return the learner's objective against an ensemble of two particles after two steps."""
    first = w.chosen.ids.shape
    drawn = known(torch.empty(2 * len(PROMPTS), first[1], SIZE, dtype=torch.float64))
    drawn = drawn.unflatten(0, (2, -1)) * w.chosen.prompt[..., None]
    particles, earned = [], torch.zeros(2, len(PROMPTS), dtype=torch.float64)
    for m in range(2):
        start = [row[marks > 0] for row, marks in zip(drawn[m], w.chosen.prompt, strict=True)]
        scaled = [0.5 * row / (row.numel() if per == "sample" else SIZE) ** 0.5 for row in start]
        delta = climbed([[*row] for row in scaled], zeros_like(scaled), 0.0, 0.7, per)
        for _ in range(2):
            payoffs, gradient = slope(w, delta)
            earned[m] += 0.5 * payoffs
            delta = climbed(delta, gradient, 0.3, 0.7, per)
        particles.append(delta)
    weights = earned.softmax(0)
    clean = last_of(w.chosen, spoken(w.model, w.chosen, None))
    apart = [
        (last_of(w.chosen, spoken(w.model, w.chosen, delta)) - clean).square().sum(-1)
        for delta in particles
    ]
    return under(w, None) + 2.0 * (weights * torch.stack(apart)).sum(0).mean()


def zeros_like(rows: list[Tensor]) -> Delta:
    return [[torch.ones_like(d) for d in row] for row in rows]


def under(w: World, delta: Delta | None) -> Tensor:
    """Return what the learner minimises under δ."""
    return w.learners(spoken(w.model, w.chosen, delta), spoken(w.model, w.rejected, delta))


def known(like: Tensor) -> Tensor:
    """Return a draw that is known."""
    return torch.linspace(-1, 2, like.numel(), dtype=like.dtype).cos().view_as(like)


class Known:
    """Noise that is known."""

    def begin(self, player: str, round: int, rank: int | None = None) -> None: ...

    def __call__(self, kind: str, like: Tensor) -> Tensor:
        return known(like)


ASCENT = {"step_size": 0.3, "radius": 0.7, "unit": "absolute"}
MAT = {
    **ASCENT,
    "start_size": 0.5,
    "steps": 2,
    "temperature": 0.0,
    "mirror_step": 0.5,
    "mirror_unit": "absolute",
    "play_as": "ensemble",
    "learner_steps": 1,
    "learner_temperature": 0.0,
    "damping": 0.0,
    "round_damping": 0.0,
    "average": None,
    "smoothness_weight": 2.0,
    "divergence": "squared_error",
}
BY_HAND: dict[str, tuple[Callable[[World, str], Tensor], dict[str, Any]]] = {
    "pgd": (pgd, {**ASCENT, "steps": 3, "start": "zero"}),
    "fgm": (fgm, {"radius": 0.7, "unit": "absolute"}),
    "freelb": (freelb, {**ASCENT, "steps": 3, "start": "zero"}),
    "mat": (mat, MAT),
}


SIDES = [("left", "right"), pytest.param(("right", "right"), marks=pytest.mark.slow)]
SIDES += [pytest.param(("right", "left"), marks=pytest.mark.slow)]


@pytest.mark.parametrize("sides", SIDES)
@pytest.mark.parametrize("per", ["sample", "token"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", BY_HAND)
def test_a_step_is_that_of_a_loop_by_hand(name: str, way: str, per: str, sides: tuple[str, str]):
    w, other = world(*sides), world(*sides)
    by_hand, words = BY_HAND[name]
    optimizer = wrapped(w.model, name, lr=RATE, per=per, **words)
    optimizer.game.rounds.arena.noise = Known()
    played(optimizer, w, way)

    objective = by_hand(other, per) + other.retain()
    objective.backward()
    with torch.no_grad():
        for parameter in other.model.parameters():
            parameter -= RATE * parameter.grad
    torch.testing.assert_close(w.model.state_dict(), other.model.state_dict(), rtol=0, atol=1e-12)
    outcome = optimizer.game.outcome
    torch.testing.assert_close(outcome.objective, objective.detach())
    assert outcome.general_sum


def played(optimizer: mixadv.GameOptimizer, w: World, way: str, **changes: Any) -> None:
    """Play a round in one of the three ways, and step."""
    goals = {**w.goals, **changes}
    if way == "step":
        optimizer.step(w.closure, **goals)
        return
    if way == "loss":
        optimizer.game.loss(w.closure, **goals).backward()
    else:
        optimizer.game.backward(w.closure, **goals)
    optimizer.step()
    optimizer.zero_grad()


# The game as it was ------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("settings", [{}, {"norm": "linf", "per": "token", "start": "normal"}])
def test_the_loss_as_payoff_is_the_game_without_one(settings: dict[str, Any], way: str):
    assert_unchanged(small, way, **settings)


@pytest.mark.parametrize("family", slow_but(["bert", "t5", "llama-causal", "vision"], FAMILIES))
def test_the_loss_as_payoff_changes_nothing_in_any_family(family: str):
    assert_unchanged(lambda: player(family, rows=4), "loss")


@pytest.mark.parametrize("reentrant", [False, True])
def test_the_loss_as_payoff_changes_nothing_under_checkpoints(reentrant: bool):
    def made() -> Player:
        p = player("llama-causal", rows=4)
        words = {"gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
        p.model.gradient_checkpointing_enable(**words)
        return p

    assert_unchanged(made, "backward")


def assert_unchanged(made: Callable[[], Player], way: str, **settings: Any) -> None:
    """Assert that training is that without an adversary whose payoff is the loss, bit for bit."""

    def trained(*, general: bool) -> Any:
        p = made()
        optimizer, closure = wrapped(p, "pgd", **settings), p.closure()
        more = {"adversary": lambda: parse_output(closure()).loss} if general else {}
        for _ in range(3):
            if way == "step":
                optimizer.step(closure, **more)
                continue
            if way == "loss":
                optimizer.game.loss(closure, **more).backward()
            else:
                optimizer.game.backward(closure, **more)
            optimizer.step()
            optimizer.zero_grad()
        return copies(p.model.parameters()), torch.get_rng_state(), optimizer.outcome.objective

    assert_same(trained(general=True), trained(general=False))


# One δ -------------------------------------------------------------------------------------------


def moves(w: World, closure: Callable[[], Any]) -> tuple[Callable[[], Any], list[Any]]:
    """Return a closure, and what fills with the δ that each of its calls met, `[B, n, d]`."""
    met: list[Any] = []
    own = w.model.speak

    def speak(embedded: Tensor, mask: Tensor) -> Tensor:
        met[-1] = (embedded - met[-1]).detach()
        return own(embedded, mask)

    def run() -> Any:
        def note(module: nn.Module, args: Any) -> None:
            met.append(w.model.words.weight[args[0]].detach())

        hook = w.model.words.register_forward_pre_hook(note)
        w.model.speak = speak
        try:
            return closure()
        finally:
            hook.remove()
            del w.model.speak

    return run, met


SHARING = ["noise", "fgm", "pgd", "freelb", "textat", "r3f", "alum", "smart", "mat"]


@pytest.mark.parametrize("per", ["token", "sample"])
@pytest.mark.parametrize("name", SHARING)
def test_all_calls_meet_one_delta_on_prompts_and_in_the_ball(name: str, per: str):
    if name == "textat" and per == "token":
        pytest.skip("its ball is that of a sample")
    w = world("right", "left")
    settings = {"proximal_weight": 0.0} if name == "smart" else {}
    settings |= {} if name == "textat" else {"per": per}
    optimizer = wrapped(w.model, name, radius=0.4, unit="absolute", **settings)
    optimizer.step(w.closure, **w.goals)  # the first round has passes of its own
    closure, met = moves(w, w.closure)
    retain, kept = moves(w, w.retain)
    adversary, paid = moves(w, w.adversary)
    optimizer.step(closure, adversary=adversary, retain=retain, where=w.where)
    assert all(bool((delta == 0).all()) for delta in kept)
    assert len(kept) == optimizer.outcome.steps
    pairs = list(zip(met[::2], met[1::2], strict=True))  # chosen and rejected
    assert any(bool(one.any()) for one, _ in pairs)
    for one, other in [*pairs, *((None, delta) for delta in paid)]:
        for b, prompt in enumerate(PROMPTS):
            marks = w.rejected.prompt[b] > 0
            second = other[b][marks]
            assert len(second) == len(prompt)
            assert not other[b][~marks].any()
            if one is not None:
                marks = w.chosen.prompt[b] > 0
                torch.testing.assert_close(one[b][marks], second, rtol=0, atol=1e-12)
                assert not one[b][~marks].any()
            lengths = second.norm(dim=-1) if per == "token" else second.norm()
            assert bool((lengths <= 0.4 + 1e-12).all())


def test_rows_one_above_the_other_meet_the_same_delta():
    w = world()
    joined = [torch.cat(pair) for pair in zip(w.chosen, padded(w.rejected, w.chosen), strict=True)]
    both = Text(*joined)

    def concatenated() -> Tensor:
        good, bad = w.model(both.ids, both.mask).chunk(2)
        return w.learners(good, bad[:, : w.rejected.ids.shape[1]])

    def separate() -> Tensor:
        return w.closure()[0]

    found = []
    for closure, prompt in ((concatenated, both.prompt), (separate, w.where["closure"])):
        w.model.load_state_dict(world().model.state_dict())
        where = {"closure": prompt, "adversary": w.rejected.prompt}
        optimizer = wrapped(w.model, "pgd", radius=0.5, start="zero")
        optimizer.step(closure, adversary=w.adversary, where=where)
        found.append(copies(w.model.parameters()))
        optimizer.game.close()
    torch.testing.assert_close(*found, rtol=0, atol=1e-12)


def padded(one: Text, like: Text) -> Text:
    """Return texts padded to the length of others."""
    more = like.ids.shape[1] - one.ids.shape[1]
    assert more >= 0
    return Text(*(F.pad(x, (0, more)) for x in one))


@pytest.mark.parametrize("sides", [("right", "right"), ("left", "left")])
def test_where_as_a_function_of_the_call_is_the_masks(sides: tuple[str, str]):
    def trained(how: str) -> list[Tensor]:
        w = world(*sides)
        texts = {one.ids.shape: one.prompt for one in (w.chosen, w.rejected)}
        where = w.where if how == "masks" else lambda call: texts[call.ids.shape]
        optimizer = wrapped(w.model, "pgd")
        optimizer.step(w.closure, adversary=w.adversary, where=where)
        return copies(w.model.parameters())

    assert_same(trained("masks"), trained("function"))


def test_members_of_a_mixture_meet_one_delta_without_where():
    """As a member that is added to a mixture trains: the adversary is paid by all of them."""
    p = small(reduction="none")
    p.model.eval()
    other = {t: t.detach() + 0.1 for n, t in p.model.named_parameters() if "head" in n}
    members = [functional(p.model, weights, p.closure()) for weights in ({}, other)]
    met: list[Tensor] = []
    p.model.hidden.register_forward_pre_hook(lambda module, args: met.append(args[0].detach()))

    def attack() -> Tensor:
        return 0.3 * members[0]()[0] + 0.7 * members[1]()[0]

    optimizer = wrapped(p, "pgd", steps=2)
    optimizer.step(p.closure(), adversary=attack)
    met.clear()
    optimizer.step(p.closure(), adversary=attack)
    assert len(met) == 5
    torch.testing.assert_close(met[0], met[1])
    torch.testing.assert_close(met[2], met[3])
    assert not torch.allclose(met[1], met[2])


@pytest.mark.parametrize("sides", [("right", "right"), ("right", "left")])
def test_a_compiled_model_plays_the_same(sides: tuple[str, str]):
    def trained(compiled: bool) -> list[Tensor]:
        torch.compiler.reset()
        w = world(*sides)
        model: Any = torch.compile(w.model, backend="eager") if compiled else w.model
        optimizer = wrapped(model, "pgd")
        for _ in range(2):
            optimizer.step(w._replace(model=model).closure, **w._replace(model=model).goals)
        return copies(w.model.parameters())

    assert_same(trained(True), trained(False))


# The optimizer's side ----------------------------------------------------------------------------


def gradient(w: World, goals: dict[str, Any], times: int = 1, scale: float = 1.0) -> list[Tensor]:
    game = mixadv.Game(w.model, mixadv.PGD(start="zero"))
    for _ in range(times):
        game.backward(w.closure, lambda loss: (scale * loss).backward(), **goals)
    game.close()
    found = copies(p.grad for p in w.model.parameters())
    w.model.zero_grad()
    return found


def test_micro_batches_accumulate_and_losses_scale():
    w = world()
    whole = gradient(w, w.goals)
    torch.testing.assert_close(gradient(w, w.goals, times=2, scale=0.5), whole)
    torch.testing.assert_close(gradient(w, w.goals, scale=4.0), [4 * g for g in whole])


def test_one_mask_for_both_players_is_not_that_of_other_rows():
    """What is retained has other shapes, and no δ."""
    found = []
    for where in ("mask", "each"):
        w = world()
        mask = w.rejected.prompt
        only = {"closure": mask, "adversary": mask}
        game = mixadv.Game(w.model, mixadv.PGD(steps=2, radius=0.5, unit="absolute"))
        game.backward(
            w.adversary,
            adversary=w.adversary,
            retain=w.retain,
            where=mask if where == "mask" else only,
        )
        found.append([p.grad.clone() for p in w.model.parameters() if p.grad is not None])
    assert_same(*found)


def test_what_is_retained_is_added_in_every_step_of_the_learner():
    def seen(*, retains: bool) -> list[dict[str, Tensor]]:
        w = world()
        optimizer = wrapped(w.model, "mat", lr=0.0, learner_steps=3, learner_temperature=0.0)
        found = stepwise(optimizer)
        retain = w.retain if retains else None
        optimizer.step(w.closure, adversary=w.adversary, where=w.where, retain=retain)
        assert (optimizer.outcome.retained is None) != retains
        return found

    w = world()
    w.retain().backward()
    own = {n: p.grad for n, p in w.model.named_parameters()}
    pairs = list(zip(seen(retains=True), seen(retains=False), strict=True))
    assert len(pairs) == 3
    for both, alone in pairs:
        torch.testing.assert_close(both, {n: g + own[n] for n, g in alone.items()})


@pytest.mark.parametrize("name", mixadv.SOLVERS)
def test_every_solver_retains(name: str):
    p, q = small(), small()
    settings = {"proximal_weight": 0.0} if name == "smart" else {}

    def keep() -> Tensor:  # which calls no site
        return p.model.head.weight.square().sum()

    # Of weights that move at radius 0: what is retained is ascended too.
    solver = replace(AROUND[name], radius=0.0) if name in AROUND else name
    alone, both = wrapped(q, solver, lr=0.0, **settings), wrapped(p, solver, lr=0.0, **settings)
    first, second = stepwise(alone), stepwise(both)
    torch.manual_seed(5)
    alone.step(q.closure())
    torch.manual_seed(5)
    both.step(p.closure(), retain=keep)
    for one, other in zip(first, second, strict=True):
        torch.testing.assert_close(other["hidden.weight"], one["hidden.weight"])
        more = 2 * p.model.head.weight.detach()
        torch.testing.assert_close(other["head.weight"], one["head.weight"] + more)


def test_a_scaler_scales_what_is_retained_too():
    def trained(scaler: torch.amp.GradScaler) -> list[Tensor]:
        w = world()
        w.model.float()
        optimizer = wrapped(w.model, "pgd", start="zero")
        optimizer.game.backward(w.closure, lambda x: scaler.scale(x).backward(), **w.goals)
        scaler.step(optimizer)
        scaler.update()
        return copies(w.model.parameters())

    scalers = (torch.amp.GradScaler("cpu", enabled=on) for on in (True, False))
    torch.testing.assert_close(*map(trained, scalers))


@pytest.mark.parametrize("name", SHARING)
@pytest.mark.parametrize("retains", [True, False])
def test_passes_are_as_explained(name: str, retains: bool):
    w = world(dropout=0.2)
    settings = {"proximal_weight": 0.0} if name == "smart" else {}
    optimizer = wrapped(w.model, name, **settings)
    goals = {**w.goals, "retain": w.retain if retains else None}
    told = optimizer.game.explain(w.closure, **goals)
    optimizer.step(w.closure, **goals)
    optimizer.step(w.closure, **goals)
    outcome = optimizer.outcome
    for count in ("forwards", "delta_backwards", "theta_backwards", "steps"):
        assert getattr(told.passes, count) == getattr(outcome, count), count
    assert "general-sum" in str(told)
    assert told.positions[0] == 2 * sum(map(len, PROMPTS))


@pytest.mark.parametrize("name", ["pgd", "freelb", "mat"])
def test_random_state_and_buffers_end_as_after_the_closure(name: str):
    w, plain = world(dropout=0.3), world(dropout=0.3)
    optimizer = wrapped(w.model, name, **({"learner_steps": 1} if name == "mat" else {}))
    torch.manual_seed(7)
    optimizer.step(w.closure, **w.goals)
    after = torch.get_rng_state()
    torch.manual_seed(7)
    plain.closure()
    assert_same(after, torch.get_rng_state())


@pytest.mark.parametrize(
    ("whose", "at"), [("closure", 1), ("adversary", 1), ("adversary", 3), ("retain", 1)]
)
@pytest.mark.parametrize("name", ["pgd", "mat"])
def test_a_round_that_breaks_leaves_all_as_it_was(name: str, whose: str, at: int):
    w = world(dropout=0.3)
    settings = {"particles": 3} if name == "mat" else {}
    optimizer = wrapped(w.model, name, **settings)
    optimizer.step(w.closure, **w.goals)
    goals: dict[str, Any] = {"closure": w.closure, **w.goals}
    fault, own = Fault(at), goals[whose]

    def breaking() -> Any:
        fault()
        return own()

    before = fingerprint(w.model, optimizer)
    with pytest.raises(BrokenError):
        optimizer.step(**{**goals, whose: breaking})
    after = fingerprint(w.model, optimizer)
    for part in set(before) - {"gradients", "optimizer"}:
        assert_same(after[part], before[part])
    optimizer.step(**goals)


# Certificates ------------------------------------------------------------------------------------


def test_exploitability_is_regret_under_the_adversarys_own_payoff():
    w = world()
    game = mixadv.Game(w.model, mixadv.PGD(steps=1, radius=0.5, start="zero", unit="absolute"))
    words = {"adversary": w.adversary, "where": w.where}
    found = mixadv.equilibrium.exploitability(game, w.closure, restarts=2, **words)
    assert "in the adversary's own payoff" in str(found)
    delta = climbed(zeros(), slope(w, zeros())[1], 0.05, 0.5, "sample")
    torch.testing.assert_close(found.played, slope(w, delta)[0])
    for _ in range(60):
        delta = climbed(delta, slope(w, delta)[1], 0.05, 0.5, "sample")
    best = slope(w, delta)[0]
    assert bool((found.reached <= best + 1e-4).all())
    torch.testing.assert_close(found.reached, best, rtol=1e-2, atol=1e-2)


def test_a_targeted_attack_reaches_its_target():
    torch.manual_seed(0)
    model, x, y = nn.Linear(4, 3).double(), torch.randn(6, 4).double(), torch.tensor([0, 1, 2] * 2)
    target = (y + 1) % 3

    def closure() -> tuple[Tensor, Tensor]:
        logits = model(x)
        return F.cross_entropy(logits, y), logits

    def towards() -> Tensor:
        return -F.cross_entropy(model(x), target, reduction="none")

    solver = mixadv.PGD(steps=20, radius=5.0, step_size=1.0, unit="absolute")
    found = mixadv.attack(model, solver, closure, adversary=towards)
    assert found.predictions.argmax(1).tolist() == target.tolist()


# Errors ------------------------------------------------------------------------------------------


def other_prompt(w: World) -> dict[str, Any]:
    ids = w.rejected.ids.clone()
    ids[1, 1] = 12
    return {"rejected": w.rejected._replace(ids=ids)}


def shorter(w: World) -> dict[str, Any]:
    prompt = w.rejected.prompt.clone()
    prompt[2, 3] = 0
    return {"rejected": w.rejected._replace(prompt=prompt)}


def empty_row(w: World) -> dict[str, Any]:
    pair = [t._replace(prompt=t.prompt * torch.tensor([[1], [0], [1]])) for t in w[1:3]]
    return {"chosen": pair[0], "rejected": pair[1]}


def fewer_rows(w: World) -> dict[str, Any]:
    return {"rejected": Text(*(x[:2] for x in w.rejected))}


WRONG: dict[str, tuple[Callable[[World], dict[str, Any]], str]] = {
    "other prompt": (other_prompt, r"Row 1 of a call in closure reads other tokens.* position 1"),
    "shorter": (
        shorter,
        r"3 positions of row 2 in the first call of adversary=, and on 4 of row 2",
    ),
    "empty row": (empty_row, r"δ may act nowhere in 1 of 3 rows \(1\).*no adversary"),
    "rows": (fewer_rows, r"2 rows is to act on 3 rows .* fewest rows first"),
}


@pytest.mark.parametrize("name", WRONG)
def test_calls_that_do_not_agree_are_refused_by_row_and_position(name: str):
    change, said = WRONG[name]
    w = world()
    w = w._replace(**change(w))
    optimizer = wrapped(w.model, "pgd")
    before = fingerprint(w.model, optimizer)
    with pytest.raises(mixadv.GameError, match=said):
        optimizer.step(w.closure, **w.goals)
    assert_same(fingerprint(w.model, optimizer), before)


def test_checked_again_where_asked():
    w = world()
    optimizer = wrapped(w.model, "pgd")
    optimizer.step(w.closure, **w.goals)
    other = w._replace(**other_prompt(w))
    optimizer.step(other.closure, **other.goals)  # later rounds read nothing from the device
    with pytest.raises(mixadv.GameError, match="reads other tokens"):
        optimizer.step(other.closure, check=True, **other.goals)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"adversary": 3}, "adversary must be a function that returns what it maximises"),
        ({"retain": 3}, "retain must be a function that returns a loss"),
        ({"where": {"closure": None}}, "plays 'adversary' and 'closure': give one for each"),
        ({"where": None}, "one δ acts on the same positions of each.*where="),
        ({"adversary": lambda: torch.zeros(3).double()}, "site .* was not called"),
    ],
)
def test_wrong_goals_are_refused(words: dict[str, Any], said: str):
    w = world()
    with pytest.raises((TypeError, ValueError, mixadv.GameError), match=said):
        wrapped(w.model, "pgd").step(w.closure, **{**w.goals, **words})


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_a_payoff_that_is_not_finite_is_refused(value: float):
    """Each δ would fall back to 0: training without an adversary, and without a word."""
    w = world()
    with pytest.raises(mixadv.GameError, match=rf"adversary= returned {value} at δ = 0"):
        wrapped(w.model, "pgd").step(
            w.closure, **{**w.goals, "adversary": lambda: w.adversary() + value}
        )


def test_noise_is_looked_for_in_what_the_adversary_is_paid():
    """A learner's loss past its floor hardly moves, and says nothing of what the adversary sees."""
    w = world()
    flat = lambda: 1e-17 * w.closure()[0] + 1  # noqa: E731
    wrapped(w.model, "pgd").step(flat, **w.goals)


def test_what_is_retained_without_weights_is_refused_by_name():
    w = world()
    goals = {**w.goals, "retain": lambda: w.retain().detach()}
    with pytest.raises(mixadv.GameError, match="retain= returned a loss that no weight leads to"):
        wrapped(w.model, "pgd").step(w.closure, **goals)


def test_goals_without_a_closure_are_refused():
    w = world()
    optimizer = wrapped(w.model, "pgd")
    for goals in ({"adversary": w.adversary}, {"retain": w.closure}):
        with pytest.raises(mixadv.GameError, match="step\\(\\) without a closure plays no round"):
            optimizer.step(**goals)


@pytest.mark.parametrize("marked", [True, False])
def test_positions_that_only_another_call_has_are_left_alone(marked: bool):
    delta = torch.tensor([[[1.0], [2.0]]])
    masks = (torch.ones(1, 2, 1), torch.ones(1, 4, 1)) if marked else (None, None)
    longer = Call(torch.Size([1, 4, 1]), delta.dtype, delta.device, masks[1])
    assert placed(delta, masks[0], longer).flatten().tolist() == [1, 2, 0, 0]


def test_a_payoff_that_does_not_depend_on_delta_is_refused():
    w = world()
    detached = {**w.goals, "adversary": lambda: w.adversary().detach()}
    with pytest.raises(mixadv.GameError, match="adversary's payoff has no gradient"):
        wrapped(w.model, "pgd").step(w.closure, **detached)


@pytest.mark.parametrize("name", ["vat", "freeat", "creat"])
def test_solvers_whose_payoff_is_their_own_say_which_take_another(name: str):
    w = world()
    said = "takes no adversary= with a payoff of its own: .*Those that do are .*PGD.*MAT"
    with pytest.raises(mixadv.GameError, match=said):
        wrapped(w.model, name).step(w.closure, **w.goals)


def test_particles_are_weighed_for_the_samples_of_both():
    w = world()

    def halves() -> Tensor:
        return w.adversary()[:2]

    optimizer = wrapped(w.model, "mat")
    with pytest.raises(mixadv.GameError, match=r"payoff for each of 2 samples.* closure has 3"):
        optimizer.step(w.closure, adversary=halves, where=w.where)
