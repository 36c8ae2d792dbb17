"""Each sample plays its own game: its δ is what it would be if the sample were alone.

Whatever the layout of rows, tokens and padding, for every solver, norm, sign and way of playing.
"""

from dataclasses import fields
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import mixadv
from mixadv.maths.geometry import NORMS, PERS
from mixadv.round.cost import count_passes
from tests.zoo import ASCENDING

WORDS, WIDTH, PAD, LONGEST = 14, 4, 0, 4


class Reads(nn.Module):
    """A model that looks words up and reads each sample by itself; subclasses lay samples out."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, WIDTH, padding_idx=PAD)
        self.hidden = nn.Linear(WIDTH, 6)
        self.pooled, self.out = nn.Identity(), nn.Linear(6, 3)

    def see(self, embedded: Tensor) -> Tensor:
        """Return the states of embedded words. The gradient at padding, where all is 0, is NaN."""
        return torch.tanh(self.hidden(embedded) + embedded.square().sum(-1, keepdim=True).sqrt())

    def read(self, embedded: Tensor, real: Tensor) -> Tensor:
        """Return the state `[B, 6]` of embedded words `[B, n, d]`."""
        return torch.where(real[..., None], self.see(embedded), 0.0).sum(1)


class First(Reads):
    """The batch comes first: `[B, n, d]`, with a mask."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.out(self.pooled(self.read(self.words(input_ids), attention_mask > 0)))


class Second(Reads):
    """The batch comes second: `[n, B, d]`, with a mask."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        embedded = self.words(input_ids.T).transpose(0, 1)
        return self.out(self.pooled(self.read(embedded, attention_mask > 0)))


class Graphs(Reads):
    """Nodes of all samples lie in one batch, `[R, d]`, in any order, with a map."""

    def forward(self, nodes: Tensor, batch: Tensor) -> Tensor:
        hidden = self.see(self.words(nodes))
        pooled = hidden.new_zeros(int(batch.max()) + 1, 6).index_add(0, batch, hidden)
        return self.out(self.pooled(pooled))


class Choices(Reads):
    """A sample is three texts to choose from, `[B, 3, n]`."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = First()
        self.words = self.encoder.words
        self.score = nn.Linear(3, 1)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        texts = self.encoder(
            input_ids=input_ids.flatten(0, 1), attention_mask=attention_mask.flatten(0, 1)
        )
        return self.pooled(self.score(texts).view(-1, 3))


class Sample(NamedTuple):
    """One sample: its words, and its label."""

    words: list[list[int]]  # several texts where it is a choice
    label: int


class Laid(NamedTuple):
    """Samples laid out for a model, and where each word at the site `[B, n]` or `[R]` is from."""

    inputs: dict[str, Tensor]
    labels: Tensor
    samples: Tensor
    places: Tensor  # within the sample
    real: Tensor


def padded(texts: list[list[int]], length: int) -> tuple[Tensor, Tensor]:
    """Return ids and mask."""
    ids = torch.tensor([text + [PAD] * (length - len(text)) for text in texts])
    real = torch.tensor([[1] * len(text) + [0] * (length - len(text)) for text in texts])
    return ids, real


def lay(layout: str, samples: list[Sample], which: list[int], order: list[int]) -> Laid:
    """Lay out some of the samples; `order` is that of the nodes of graphs."""
    chosen = [samples[i] for i in which]
    labels = torch.tensor([sample.label for sample in chosen])
    rows = [(i, c, text) for i in which for c, text in enumerate(samples[i].words)]
    if layout == "graphs":
        nodes = [(i, k, word) for i, _, text in rows for k, word in enumerate(text)]
        nodes.sort(key=lambda node: order[(node[0] * LONGEST + node[1]) % len(order)])
        samples, places, ids = torch.tensor(nodes).T
        inputs = {"nodes": ids, "batch": torch.tensor([which.index(i) for i, *_ in nodes])}
        return Laid(inputs, labels, samples, places, torch.ones_like(ids) > 0)
    ids, real = padded([text for *_, text in rows], max(len(text) for *_, text in rows))
    places = torch.arange(ids.shape[1]) + LONGEST * torch.tensor([[c] for _, c, _ in rows])
    samples = torch.tensor([[i] for i, *_ in rows]).expand_as(ids)
    inputs = {"input_ids": ids, "attention_mask": real}
    if layout == "choices":
        inputs = {name: value.unflatten(0, (-1, 3)) for name, value in inputs.items()}
    return Laid(inputs, labels, samples, places, real > 0)


MODELS: dict[str, type[Reads]] = {
    "first": First,
    "second": Second,
    "graphs": Graphs,
    "choices": Choices,
}


class Own:
    """Draws that depend on sample, place, coordinate and turn alone."""

    def __init__(self, laid: Laid, which: list[int]) -> None:
        self.laid, self.which = laid, which
        self.begin("of the check before", 0)

    def begin(self, player: str, round: int, rank: int | None = None) -> None:
        self.draw = torch.Generator().manual_seed(round)

    def __call__(self, kind: str, like: Tensor) -> Tensor:
        size = (3, 5, 3 * LONGEST, WIDTH)
        table = torch.randn(size, generator=self.draw).clamp(-1, 1).to(like.dtype)
        if like.shape == (len(self.which),):  # one for each sample
            return table[0, self.which, 0, 0]
        every = table[:, self.laid.samples, self.laid.places]
        return every[: len(like) // len(self.laid.samples)].flatten(0, 1)


class Played(NamedTuple):
    """What came of a round: the particles `[M, B, n, d]`, their weights `[M, B]`, the outcome."""

    points: Tensor
    weights: Tensor
    outcome: mixadv.Outcome


def play(solver: mixadv.Solver, layout: str, laid: Laid, which: list[int], how: str) -> Played:
    """Play a round on samples that are laid out, with a closure that returns this or that."""
    torch.manual_seed(0)
    model = MODELS[layout]().double()

    def closure() -> Any:
        logits = model(**laid.inputs)
        labels = laid.labels.repeat(len(logits) // len(laid.labels))  # of stacked copies
        losses = F.cross_entropy(logits, labels, reduction="none")
        return {"each": (losses, logits), "mean": (losses.mean(), logits), "losses": losses}[how]

    base = torch.optim.SGD(model.parameters(), lr=0.0)
    site = "encoder.words" if layout == "choices" else "words"
    optimizer = mixadv.wrap(base, model, solver, site=site)
    optimizer.game.rounds.arena.noise = Own(laid, which)
    optimizer.step(closure)
    strategy = optimizer.game.strategy
    return Played(strategy.points[0], strategy.weights, optimizer.outcome)


@st.composite
def batches(draw: Any, layout: str) -> tuple[list[Sample], list[int]]:
    """Draw samples of other lengths, and an order of nodes."""
    texts = 3 if layout == "choices" else 1
    samples = []
    for _ in range(draw(st.integers(2, 4))):
        words = draw(st.permutations(range(1, WORDS)))
        lengths = [draw(st.integers(1, LONGEST)) for _ in range(texts)]
        cut = [words[LONGEST * c : LONGEST * c + n] for c, n in enumerate(lengths)]
        samples.append(Sample(cut, draw(st.integers(0, 2))))
    return samples, draw(st.permutations(range(4 * LONGEST)))


FIXED: dict[str, dict[str, Any]] = {  # what reads a representation; CAT shares δ over a batch
    "creat": {"source": "pooled", "representation": lambda x: x},
    "cat": {"source": "pooled", "representation": lambda x: x, "shared": False},
}
DRAWN: dict[str, Any] = {
    "norm": st.sampled_from(NORMS),
    "per": st.sampled_from(PERS),
    "normalize": st.sampled_from(["steepest", "norm", "none"]),
    "projection": st.sampled_from(["ball", "sphere"]),
    "sign": st.sampled_from([None, "any", "boundary"]),
    "direction": st.sampled_from(["gradient", "gauss_newton"]),
    "payoff": st.sampled_from(["loss", "kl"]),
    "divergence": st.sampled_from(["kl", "symmetric_kl", "js", "bernoulli"]),
    "temperature": st.sampled_from([0.0, 0.01]),
    "particles": st.sampled_from([1, 3]),
    "play_as": st.sampled_from(["mean", "ensemble", "sample"]),
    "mirror_unit": st.sampled_from(["relative", "absolute"]),
    "points": st.sampled_from(["last", "path"]),
    "particle_batching": st.sampled_from(["loop", "vmap", "stack", "auto"]),
}


def drawn(name: str, data: st.DataObject) -> mixadv.Solver:
    """Draw the settings of a solver."""
    known = {f.name for f in fields(mixadv.SOLVERS[name]) if f.init}
    known -= set() if "particles" in known else {"particle_batching"}
    how = {word: data.draw(DRAWN[word], word) for word in DRAWN if word in known}
    try:
        return mixadv.make_solver(name, radius=0.5, unit="absolute", **how, **FIXED.get(name, {}))
    except ValueError:  # these settings do not go together
        reject()


@pytest.mark.parametrize("layout", MODELS)
@pytest.mark.parametrize("name", ASCENDING)
@given(st.data())
@settings(max_examples=4, suppress_health_check=[HealthCheck.filter_too_much])
def test_what_a_sample_is_moved_by_is_its_own(name: str, layout: str, data: st.DataObject):
    solver = drawn(name, data)
    samples, order = data.draw(batches(layout))
    how = data.draw(st.sampled_from(["each", "mean", "losses"]))
    if how == "losses" and solver.compares is not None:
        how = "mean"
    if how == "mean" and solver.gain == "loss" and solver.normalize == "none":
        how = "each"
    if how == "mean" and solver.weighs:
        how = "each"
    alone = data.draw(st.integers(0, len(samples) - 1))
    many = max(solver.particles, count_passes(solver).particles)
    stacks = many > 1 and solver.particle_batching == "stack"
    found = []
    for which in ([*range(len(samples))], [alone]):
        laid = lay(layout, samples, which, order)
        if layout == "graphs" and (name == "textat" or stacks):
            with pytest.raises(mixadv.GameError, match=r"TextAT keeps|batching='stack'"):
                play(solver, layout, laid, which, how)
            return
        played = play(solver, layout, laid, which, how)
        assert not played.points[:, ~laid.real].any()
        assert not played.outcome.nonfinite
        found.append((played.points[:, laid.real & (laid.samples == alone)], played))
    (whole, batch), (single, one) = found
    assert whole.any() or solver.radius == 0
    torch.testing.assert_close(whole, single, rtol=1e-6, atol=1e-9)
    if len(batch.weights) > 1:
        torch.testing.assert_close(batch.weights[:, [alone]], one.weights, rtol=1e-6, atol=1e-9)


def test_a_shared_delta_is_one_for_each_word_where_the_gradient_of_padding_is_not_finite():
    samples = [Sample([[1, 2, 3]], 0), Sample([[3]], 1), Sample([[2, 4]], 2)]
    laid = lay("first", samples, [0, 1, 2], [0])
    played = play(
        mixadv.CAT(source="pooled", representation=lambda x: x), "first", laid, [0], "each"
    )
    points, ids = played.points[0], laid.inputs["input_ids"]
    assert not played.outcome.nonfinite
    assert not points[~laid.real].any()
    for word in (2, 3):
        one, other = points[ids == word]
        assert one.any()
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("layout", ["choices", "graphs"])
def test_how_far_a_row_is_driven_counts_for_its_own_sample(layout: str):
    """The payoff of CreAT with representations of rows is that with their sum for each sample."""
    samples = [Sample([[1, 2], [3], [4, 5]], 0), Sample([[6], [7], [8]], 1)]
    laid = lay(layout, samples, [0, 1], [5, 3, 1, 0, 2, 4])
    rows = "encoder.out" if layout == "choices" else "hidden"
    solver = mixadv.CreAT(source=rows, representation=lambda x: x, radius=0.5, unit="absolute")
    each, mean = (play(solver, layout, laid, [0, 1], how).points for how in ("each", "mean"))
    assert each.any()
    torch.testing.assert_close(each, mean)
