"""Players with goals of their own: one δ for several calls, a payoff that is not the loss, a term
at δ = 0. Rounds are computed again in float64 by loops that know nothing of the library.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mixadv
from tests.zoo import assert_same, copies, small, wrapped

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


@pytest.mark.parametrize("sides", [("right", "right"), ("left", "right"), ("right", "left")])
@pytest.mark.parametrize("per", ["sample", "token"])
@pytest.mark.parametrize("way", ["step", "backward", "loss"])
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


@pytest.mark.parametrize("way", ["step", "backward", "loss"])
@pytest.mark.parametrize("settings", [{}, {"norm": "linf", "per": "token", "start": "normal"}])
def test_the_loss_as_payoff_is_the_game_without_one(settings: dict[str, Any], way: str):
    def trained(*, general: bool) -> Any:
        p = small()
        optimizer, closure = wrapped(p, "pgd", **settings), p.closure()
        more = {"adversary": lambda: closure()[0]} if general else {}
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
