"""Rounds of every solver against the papers' formulas, written out here in plain torch, float64."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mixadv
from tests.zoo import AROUND, WAYS, or_refused, play, stepwise

LR, DECAY = 0.1, 0.01


class Reader(nn.Module):
    """Embedding, tanh layer, mean over real tokens, linear head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.embedding = nn.Embedding(11, 4)
        self.layer = nn.Linear(4, 5)
        self.head = nn.Linear(5, 3)
        self.double()

    def forward(self, ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = torch.tanh(self.layer(self.embedding(ids)))
        real = attention_mask.unsqueeze(-1).to(hidden)
        return self.head((hidden * real).sum(1) / real.sum(1))


def batch(seed: int, rows: int, length: int) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 11, (rows, length), generator=draw)
    mask = torch.ones_like(ids)
    mask[0, -2:], mask[1, :1] = 0, 0
    return ids, mask, torch.randint(0, 3, (rows,), generator=draw)


BATCHES = [batch(0, 4, 6), batch(3, 4, 6), batch(1, 3, 5), batch(2, 5, 4)]
TABLE = 0.2 * torch.randn(11, 4, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def closure(model, solver, ids, mask, labels):
    """One loss for the batch; raw ascents need one per sample."""
    reduction = "none" if solver.normalize == "none" or solver.weighs else "mean"

    def forward():
        logits = model(ids, attention_mask=mask)
        return nn.functional.cross_entropy(logits, labels, reduction=reduction), logits

    return forward


class Given:
    """Noise that is known: it depends on player, round and the number of the draw alone."""

    def begin(self, player: str, round: int, rank: int | None = None) -> None:
        self.seed = 200 * round + 100 * (player == "learner")

    def __call__(self, kind: str, like: Tensor) -> Tensor:
        self.seed += 1
        draw = torch.Generator().manual_seed(self.seed)
        if kind == "normal":
            return torch.randn(like.shape, generator=draw, dtype=like.dtype)
        return 2 * torch.rand(like.shape, generator=draw, dtype=like.dtype) - 1


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.logsumexp(-1) - logits[..., torch.arange(len(labels)), labels]


def symmetric_kl(a: Tensor, b: Tensor) -> Tensor:
    p, q = a.softmax(-1), b.softmax(-1)
    return (p * (p.log() - q.log())).sum(-1) + (q * (q.log() - p.log())).sum(-1)


def kl(perturbed: Tensor, clean: Tensor) -> Tensor:
    p = clean.softmax(-1)
    return (p * (p.log() - perturbed.softmax(-1).log())).sum(-1)


def cosine(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(-1) / (a.square().sum(-1) * b.square().sum(-1)).sqrt()


def contrast(one: Tensor, other: Tensor, a) -> Tensor:
    """−log of the partner's share in the similarities of each view to those it is told from."""
    views, n, losses = torch.cat([one, other]), len(one), []
    for i in range(2 * n):
        pull = (cosine(views[i], views) / a.contrast_temperature).exp()
        kind = range(n, 2 * n) if i < n else range(n)
        told_from = kind if a.negatives == "cross" else [k for k in range(2 * n) if k != i]
        losses.append(-(pull[(i + n) % (2 * n)] / sum(pull[k] for k in told_from)).log())
    return sum(losses) / (2 * n)


def l2(x: Tensor) -> Tensor:
    """The norm of each sample, of `[M, B, n, D]`."""
    return x.square().sum((-2, -1), True).sqrt()


def damp(start: Tensor, samples: Sequence[Tensor], beta) -> Tensor:
    """β^K·start + (1−β)·Σ_k β^(K−k)·sample_k, or the mean of the samples."""
    if beta == "uniform":
        return sum(samples) / len(samples)
    weights = [(1 - beta) * beta ** (len(samples) - k) for k in range(1, len(samples) + 1)]
    pairs = zip(weights, samples, strict=True)
    return beta ** len(samples) * start + sum(w * sample for w, sample in pairs)


class Formulas:
    """The weights as a list of tensors, and one method per solver that plays a round with them.

    Perturbations are `[M, B, n, D]`, in units of the mean length of the first batch's real tokens.
    """

    def __init__(self, model: Reader, optimizer: type) -> None:
        self.theta = [p.detach().clone() for p in model.parameters()]
        self.teacher, self.draw, self.round, self.count = self.theta, Given(), 0, 0
        self.memory: dict[str, Any] = {}
        self.adam, self.moments = optimizer is torch.optim.AdamW, [(0.0, 0.0)] * len(self.theta)
        ids, mask, _ = BATCHES[0]
        self.unit = self.theta[0][ids].norm(dim=-1)[mask > 0].mean()

    def play(self, a: mixadv.Solver, batch: tuple[Tensor, Tensor, Tensor]) -> None:
        self.ids, mask, self.labels = batch
        self.mask = mask.unsqueeze(-1).double()
        self.theta = [p.detach().requires_grad_() for p in self.theta]
        self.draw.begin("adversary", self.round)
        getattr(self, a.name)(a)
        self.round += 1

    def predict(self, delta: Tensor | float = 0.0, theta: list[Tensor] | None = None) -> Tensor:
        E, W, b, V, c = self.theta if theta is None else theta
        hidden = torch.tanh((E[self.ids] + self.unit * delta) @ W.T + b)
        return (hidden * self.mask).sum(-2) / self.mask.sum(-2) @ V.T + c

    def represent(self, delta: Tensor | float = 0.0) -> Tensor:
        """What the layer returns at the first token."""
        E, W, b, *_ = self.theta
        return ((E[self.ids] + self.unit * delta) @ W.T + b)[..., 0, :]

    def loss(self, delta: Tensor | float = 0.0) -> Tensor:
        return cross_entropy(self.predict(delta), self.labels)

    def descend(self, objective: Tensor) -> None:
        """SGD, or AdamW (Loshchilov & Hutter 2019, Alg. 2)."""
        self.objective = objective.detach()
        drift = torch.autograd.grad(objective, self.theta)
        self.count += 1
        if self.adam:
            pairs = zip(self.moments, drift, strict=True)
            self.moments = [(0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2) for (m, v), g in pairs]
            t1, t2 = 1 - 0.9**self.count, 1 - 0.999**self.count
            drift = [(m / t1) / ((v / t2).sqrt() + 1e-8) for m, v in self.moments]
            drift = [d + DECAY * p for d, p in zip(drift, self.theta, strict=True)]
        pairs = zip(self.theta, drift, strict=True)
        self.theta = [(p - LR * d).detach().requires_grad_() for p, d in pairs]

    def project(self, delta: Tensor, a) -> Tensor:
        if a.norm == "linf":
            return delta.clamp(-a.radius, a.radius)
        return delta * (a.radius / l2(delta)).clamp(max=1)

    def start(self, a) -> Tensor:
        rows, tokens = self.ids.shape
        like = torch.empty(a.particles * rows, tokens, 4, dtype=torch.float64)
        noise = self.draw(a.start, like).unflatten(0, (a.particles, rows)) * self.mask
        size = a.radius if a.start_size is None else a.start_size
        count = 1.0 if a.norm == "linf" else (4 * self.mask.sum(1, True)).sqrt()
        return self.project(size * noise / count, a).requires_grad_()

    def move(self, delta: Tensor, gain: Tensor, a) -> Tensor:
        """One step up the gradient of each sample's own gain."""
        (g,) = torch.autograd.grad(gain.sum(), delta, retain_graph=True)
        if a.normalize == "steepest":
            g = g.sign() if a.norm == "linf" else g / l2(g)
        delta = delta.detach() + a.step_size * g
        if a.temperature:
            noise = self.draw("normal", delta.flatten(0, 1)).view_as(delta) * self.mask
            delta = delta + math.sqrt(2 * a.step_size * a.temperature) * noise
        return self.project(delta, a).requires_grad_()

    def noise(self, a) -> None:
        self.descend(self.loss(self.start(a)).mean())

    def fgm(self, a) -> None:
        delta = torch.zeros(1, *self.ids.shape, 4, dtype=torch.float64, requires_grad=True)
        (g,) = torch.autograd.grad(self.loss(delta).sum(), delta)
        self.descend(self.loss().mean() + self.loss(a.radius * g / l2(g)).mean())

    def ascend(self, gain: Callable[[Tensor], Tensor], a) -> Tensor:
        """K steps up from the random start."""
        delta = self.start(a)
        for _ in range(a.steps):
            delta = self.move(delta, gain(delta), a)
        return delta.detach()

    def pgd(self, a) -> None:
        self.descend(self.loss(self.ascend(self.loss, a)).mean())

    def group_dro(self, a) -> None:
        losses = self.loss(self.ascend(self.loss, a))[0]
        rows = [self.labels == g for g in range(3)]
        means = torch.stack([losses[own].sum() / max(int(own.sum()), 1) for own in rows])
        gains = means.detach() + a.size_adjustment / torch.tensor(a.counts).double().sqrt()
        shares = self.memory.get("group log-weights", torch.zeros(3).double()).exp()
        shares = shares * (a.mirror_step * gains).exp()
        shares = shares / shares.sum()
        self.memory = {"group log-weights": shares.log()}
        self.descend(shares @ means)

    def cvar(self, a) -> None:
        """The worst rows have 1/(αB) each until nothing is left."""
        losses, left, total = self.loss(self.ascend(self.loss, a))[0], 1.0, 0.0
        for loss in losses.sort(descending=True).values:
            weight = min(left, 1 / (a.level * len(losses)))
            total, left = total + weight * loss, left - weight
        self.descend(total)

    def chi_square(self, a) -> None:
        """w ∝ max(ℓ − η, 0), with η found by bisection."""
        losses = self.loss(self.ascend(self.loss, a))[0]
        values = losses.detach()
        low, high = values.max() - 1e3, values.max()
        for _ in range(200):
            middle = (low + high) / 2
            w = (values - middle).clamp(min=0)
            w = w / w.sum()
            inside = (len(w) * w - 1).square().mean() / 2 < a.ball
            low, high = (middle, high) if inside else (low, middle)
        self.descend(w @ losses)

    def freelb(self, a) -> None:
        delta, total = self.start(a), 0.0
        for _ in range(a.steps):
            loss = self.loss(delta)
            total = total + loss.mean() / a.steps
            delta = self.move(delta, loss, a)
        self.descend(total)

    def freeat(self, a) -> None:
        carried, total = self.memory.get("delta", [torch.empty(0)])[0], 0.0
        if carried.shape == (*self.ids.shape, 4):
            delta = self.project((carried * self.mask)[None], a).requires_grad_()
        else:
            delta = self.start(a)
        for _ in range(a.steps):
            loss = self.loss(delta)
            delta = self.move(delta, loss, a)
            self.descend(loss.mean())
            total = total + self.objective / a.steps
        self.objective = total
        if a.carry:
            self.memory["delta"] = [delta[0].detach()]

    def textat(self, a) -> None:
        table = self.memory.setdefault("table", TABLE.clone())
        own = torch.tensor([[i not in a.exclude for i in row] for row in self.ids.tolist()])
        own = own[..., None] * self.mask
        delta, eta, total = self.start(a).detach(), (table[self.ids] * own)[None], 0.0
        for t in range(a.steps):
            shrink = (a.radius / l2(delta + eta)).clamp(max=1)
            delta, eta = shrink * delta, shrink * eta
            point = (delta + eta).requires_grad_()
            loss = self.loss(point)
            total = total + loss.mean() / a.steps
            if t < a.steps - 1:
                (g,) = torch.autograd.grad(loss.sum(), point, retain_graph=True)
                delta = delta + a.step_size * g / l2(g)
                steps = g / g.norm(dim=-1, keepdim=True).where(own > 0, 1.0)
                eta = eta + a.step_size * own * steps
                lengths = eta.norm(dim=-1, keepdim=True)
                eta = eta * lengths / lengths.amax(-2, keepdim=True)
        self.descend(total)
        changed = table.clone()
        for token in range(len(table)):
            here = eta[0][(self.ids == token) & (own[..., 0] > 0)]
            if a.write == "accumulate":
                changed[token] += here.sum(0)
            elif len(here):
                changed[token] = here.mean(0)
        self.memory["table"] = changed

    def creat(self, a) -> None:
        clean = self.represent().detach()
        away = lambda delta: 1 - cosine(self.represent(delta), clean)  # noqa: E731
        delta = self.ascend(lambda d: self.loss(d) + a.deviation_weight * away(d), a)
        self.descend((self.loss().mean() + self.loss(delta).mean()) / 2)

    def cat(self, a) -> None:
        if a.shared:
            (g,) = torch.autograd.grad(self.loss().sum(), self.theta[0])
            r = a.radius * g.sign()[self.ids] * self.mask
        else:
            zero = torch.zeros(*self.ids.shape, 4, dtype=torch.float64, requires_grad=True)
            (g,) = torch.autograd.grad(self.loss(zero).sum(), zero)
            r = a.radius * g.sign()
        losses = self.loss().mean() + self.loss(r).mean()
        views = contrast(self.represent(), self.represent(r), a)
        self.descend((1 - a.contrast_weight) / 2 * losses + a.contrast_weight * views)

    def vat(self, a) -> None:
        d, clean = self.start(a), self.predict().detach()
        for _ in range(a.steps):
            (g,) = torch.autograd.grad(kl(self.predict(d), clean).sum(), d)
            d = (a.start_size * g / l2(g)).requires_grad_()
        r = a.radius * (g / l2(g))
        self.descend(self.loss().mean() + a.smoothness_weight * kl(self.predict(r), clean).mean())

    def r3f(self, a) -> None:
        smooth = symmetric_kl(self.predict(self.start(a).detach()), self.predict()).mean()
        self.descend(self.loss().mean() + a.smoothness_weight * smooth)

    def smooth(self, a) -> Tensor:
        clean = self.predict()
        delta = self.ascend(lambda d: symmetric_kl(self.predict(d), clean.detach()), a)
        smooth = symmetric_kl(self.predict(delta), clean).mean()
        return self.loss().mean() + a.smoothness_weight * smooth

    def alum(self, a) -> None:
        self.descend(self.smooth(a))

    def trades(self, a) -> None:
        clean = self.predict()
        delta = self.ascend(lambda d: kl(self.predict(d), clean.detach()), a)
        moved = kl(self.predict(delta), clean).mean()
        self.descend(self.loss().mean() + a.smoothness_weight * moved)

    def mart(self, a) -> None:
        clean, delta = self.predict(), self.ascend(self.loss, a)
        p, q = clean.softmax(-1), self.predict(delta).softmax(-1)[0]
        right = torch.eye(p.shape[-1], dtype=torch.bool)[self.labels]
        rival = q.masked_fill(right, 0).amax(-1)
        moved = (p * (p.log() - q.log())).sum(-1) * (1 - p[right])
        boosted = -q[right].log() - (1 - rival).log()
        self.descend((boosted + a.smoothness_weight * moved).mean())

    def smart(self, a) -> None:
        taught = self.predict(theta=self.teacher).detach()
        proximal = symmetric_kl(self.predict(), taught).mean()
        self.descend(self.smooth(a) + a.proximal_weight * proximal)
        if (self.round + 1) % a.teacher_every == 0:
            pairs = zip(self.theta, self.teacher, strict=True)
            self.teacher = [(1 - a.ema_decay) * p.detach() + a.ema_decay * t for p, t in pairs]

    def mat(self, a) -> None:
        delta, clean = self.start(a), self.predict().detach()
        points, gains = [delta], []
        for _ in range(a.steps):
            gain = symmetric_kl(self.predict(points[-1]), clean)
            points.append(self.move(points[-1], gain, a))
            gains.append(gain.detach())
        delta = points[-1].detach()
        if a.points == "path":
            delta = torch.cat(points).detach()
            gains = [torch.cat([*gains, gains[-1]])]
        if a.mirror_unit == "relative":
            gains = [(g - g.mean(0)) / g.std(0, correction=0) for g in gains]
        weights = (a.mirror_step * sum(gains)).softmax(0)
        if a.play_as == "mean":
            damped = damp(points[0], points[1:], a.damping).detach()
            delta = (weights[..., None, None] * damped).sum(0, keepdim=True)
            weights = torch.ones_like(weights[:1])
        backup, samples, objective = self.theta, [], 0.0
        strategy, expected, rows = delta, weights, torch.arange(len(self.ids))
        for _ in range(a.learner_steps):
            if a.play_as == "sample":
                levels = (1 + self.draw("uniform", expected[0])) / 2
                drawn = (expected.cumsum(0) <= levels).sum(0)
                delta, weights = strategy[drawn, rows][None], torch.ones_like(expected[:1])
            gap = symmetric_kl(self.predict(delta), self.predict())
            adversary = self.draw.seed
            self.draw.begin("learner", self.count)
            self.descend(self.loss().mean() + a.smoothness_weight * (weights * gap).sum(0).mean())
            objective = objective + self.objective / a.learner_steps
            scale = math.sqrt(2 * LR * a.learner_temperature)
            noisy = [(p + scale * self.draw("normal", p)).detach() for p in self.theta]
            self.draw.seed = adversary
            self.theta = [p.requires_grad_() for p in noisy]
            samples.append(noisy)
        means = [damp(*p, a.damping) for p in zip(backup, zip(*samples, strict=True), strict=True)]
        pairs = zip(backup, means, strict=True)
        self.theta = [a.round_damping * p + (1 - a.round_damping) * mean for p, mean in pairs]
        self.objective = objective


# The library against the formulas ------------------------------------------------------------

MAT = {
    "particles": 3,
    "steps": 2,
    "learner_steps": 2,
    "temperature": 0.02,
    "learner_temperature": 1e-4,
    "mirror_step": 20.0,
    "mirror_unit": "absolute",
    "radius": 0.5,
    "start_size": 0.3,
    "smoothness_weight": 1.5,
}
RELATIVE = {**MAT, "mirror_step": 1.0, "mirror_unit": "relative"}
SMART = {"steps": 2, "start_size": 0.2, "smoothness_weight": 1.5, "proximal_weight": 2.0}
LAYER = {"source": "layer"}
CAT = {"radius": 0.3, "contrast_weight": 0.4, **LAYER}
TEXTAT = {"steps": 3, "radius": 0.5, "step_size": 0.3}
FREEAT = {"steps": 2, "radius": 0.5, "step_size": 0.3}
ROWS = {"steps": 2, "start": "uniform", "start_size": 0.1, "radius": 0.4}
CASES = {
    "noise": mixadv.UniformNoise(radius=0.5),
    "fgm": mixadv.FGM(radius=0.5),
    "pgd": mixadv.PGD(steps=3, radius=0.5, step_size=0.3),
    "pgd-linf": mixadv.PGD(steps=3, radius=0.2, step_size=0.1, norm="linf"),
    "pgd-raw": mixadv.PGD(steps=3, radius=0.5, step_size=0.3, normalize="none"),
    "freelb": mixadv.FreeLB(steps=3, radius=0.5, step_size=0.3),
    "freelb-raw": mixadv.FreeLB(steps=3, radius=0.5, step_size=0.3, normalize="none"),
    "freeat": mixadv.FreeAT(**FREEAT),
    "freeat-anew": mixadv.FreeAT(**FREEAT, carry=False),
    "freeat-raw": mixadv.FreeAT(**FREEAT, normalize="none"),
    "textat": mixadv.TextAT(**TEXTAT),
    "textat-tight": mixadv.TextAT(steps=3, radius=0.1, step_size=0.3, exclude=(4, 10)),
    "textat-accumulate": mixadv.TextAT(**TEXTAT, write="accumulate", exclude=(4,)),
    "creat": mixadv.CreAT(steps=2, radius=0.5, step_size=0.3, deviation_weight=3.0, **LAYER),
    "creat-loss": mixadv.CreAT(steps=2, radius=0.5, step_size=0.3, deviation_weight=0.0, **LAYER),
    "cat": mixadv.CAT(**CAT),
    "cat-places": mixadv.CAT(**CAT, shared=False),
    "cat-cross": mixadv.CAT(**CAT, negatives="cross", contrast_temperature=0.5),
    "vat": mixadv.VAT(steps=3, start_size=0.1, radius=0.5, smoothness_weight=1.5),
    "r3f": mixadv.R3F(radius=0.5, smoothness_weight=1.5),
    "r3f-normal": mixadv.R3F(radius=0.5, start_size=0.2, start="normal"),
    "alum": mixadv.ALUM(steps=2, start_size=0.2, smoothness_weight=1.5),
    "alum-raw": mixadv.ALUM(normalize="none", norm="linf", start_size=0.1, radius=0.3),
    "trades": mixadv.TRADES(steps=2, start_size=0.2, smoothness_weight=1.5),
    "trades-raw": mixadv.TRADES(normalize="none", norm="linf", start_size=0.1, radius=0.3),
    "mart": mixadv.MART(steps=2, radius=0.5, step_size=0.3, smoothness_weight=2.0),
    "mart-normal": mixadv.MART(steps=3, norm="linf", start="normal", start_size=0.1),
    "smart": mixadv.SMART(**SMART, ema_decay=0.9),
    "smart-last": mixadv.SMART(**SMART, ema_decay=0.0, teacher_every=2),
    "smart-raw": mixadv.SMART(**SMART, ema_decay=0.9, normalize="none", norm="linf"),
    "mat-mean": mixadv.MAT(**MAT, play_as="mean", points="last", normalize="none", step_size=2.0),
    "mat-uniform": mixadv.MAT(**MAT, play_as="mean", points="last", damping="uniform"),
    "mat-relative": mixadv.MAT(**RELATIVE, play_as="ensemble", points="last"),
    "mat-sample": mixadv.MAT(**RELATIVE, play_as="sample", points="last"),
    "mat-path": mixadv.MAT(**{**RELATIVE, "particles": 1}, play_as="ensemble", points="path"),
    "mat-paths": mixadv.MAT(**RELATIVE, play_as="sample", points="path"),
    "mat-ensemble": mixadv.MAT(
        **MAT, play_as="ensemble", points="last", normalize="none", step_size=2.0
    ),
    "group_dro": mixadv.GroupDRO(
        groups=3, mirror_step=0.5, counts=(9, 4, 1), size_adjustment=0.7, **ROWS
    ),
    "cvar": mixadv.CVaR(level=0.6, **ROWS),
    "chi_square": mixadv.ChiSquare(ball=0.1, **ROWS),
    "mat-steepest": mixadv.MAT(**MAT, play_as="ensemble", points="last"),
}


def wrapped(solver: mixadv.Solver, base: type = torch.optim.SGD):
    model = Reader()
    options = {"weight_decay": DECAY} if base is torch.optim.AdamW else {}
    optimizer = mixadv.wrap(base(model.parameters(), lr=LR, **options), model, solver)
    optimizer.game.rounds.arena.noise = Given()
    if isinstance(solver, mixadv.TextAT):
        optimizer.game.rounds.memory = {"table": TABLE.clone()}
    if optimizer.game.learner is not None:
        optimizer.game.learner.noise = Given()
    return model, optimizer


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("solver", CASES.values(), ids=CASES)
def test_rounds_follow_the_formulas(solver, base):
    model, optimizer = wrapped(solver, base)
    formulas = Formulas(model, base)
    for batch in BATCHES:
        groups = batch[2] if solver.grouped else None
        objective = optimizer.step(closure(model, solver, *batch), groups=groups)
        formulas.play(solver, batch)
        torch.testing.assert_close(objective, formulas.objective, rtol=0, atol=1e-10)
        for parameter, expected in zip(model.parameters(), formulas.theta, strict=True):
            torch.testing.assert_close(parameter, expected, rtol=0, atol=1e-10)
        memory = optimizer.game.rounds.memory
        torch.testing.assert_close(memory, formulas.memory, rtol=0, atol=1e-10)


def test_every_solver_is_recomputed():
    """Those that move weights too, around solvers of this file, are in test_weights.py."""
    assert {solver.name for solver in CASES.values()} == set(mixadv.SOLVERS) - set(AROUND)


@pytest.mark.parametrize("name", mixadv.SOLVERS)
@or_refused("backward")
def test_three_doors_deliver_the_same_gradients(name):
    solver = mixadv.make_solver(name, **{"learner_steps": 1} if name == "mat" else {})

    def taken(how: str) -> list[dict[str, Tensor]]:
        model, optimizer = wrapped(solver)
        steps = stepwise(optimizer)
        for batch in BATCHES:
            play(optimizer, closure(model, solver, *batch), how)
        return steps

    step, *others = (taken(how) for how in WAYS)
    assert len(step) == len(BATCHES) * (solver.steps if name == "freeat" else 1)
    assert all(len(gradients) == 5 for gradients in step)
    torch.testing.assert_close(others, [step] * 2, rtol=0, atol=1e-14)


# Reductions ------------------------------------------------------------------------------------

NO_MAT = {"learner_steps": 1, "learner_temperature": 0.0, "damping": 0.0, "round_damping": 0.0}
PLAIN = {
    "freelb-still": mixadv.FreeLB(start="zero", step_size=0.0),
    "pgd-zero": mixadv.PGD(start="zero", steps=0),
    "smart-weightless": mixadv.SMART(smoothness_weight=0.0, proximal_weight=0.0),
    "mat-weightless": mixadv.MAT(**NO_MAT, smoothness_weight=0.0),
    "mat-zero": mixadv.MAT(**NO_MAT, start="zero", steps=0, smoothness_weight=5.0),
}
NOISE = {
    "pgd": mixadv.PGD(steps=0),
    "freelb": mixadv.FreeLB(steps=1),
}


def after(solver: mixadv.Solver | None) -> list[Tensor]:
    """The weights after training on the batches; plainly, without a solver."""
    model, optimizer = wrapped(solver or mixadv.PGD())
    for batch in BATCHES:
        if solver is not None:
            optimizer.step(closure(model, solver, *batch))
            continue
        optimizer.base.zero_grad()
        closure(model, mixadv.PGD(), *batch)()[0].backward()
        optimizer.base.step()
    return list(model.parameters())


@pytest.mark.parametrize("solver", PLAIN.values(), ids=PLAIN)
def test_without_an_adversary_it_is_plain_training(solver):
    torch.testing.assert_close(after(solver), after(None), rtol=0, atol=1e-13)


@pytest.mark.parametrize("solver", NOISE.values(), ids=NOISE)
def test_without_ascent_it_is_training_at_the_random_start(solver):
    noise = mixadv.UniformNoise(radius=solver.radius)
    torch.testing.assert_close(after(solver), after(noise), rtol=0, atol=1e-13)
