"""Rounds of every solver against the papers' formulas, written out here in plain torch, float64."""

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

import mixadv

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


BATCHES = [batch(0, 4, 6), batch(1, 3, 5), batch(2, 5, 4)]


def closure(model, solver, ids, mask, labels):
    """One loss for the batch; raw ascents need one per sample."""
    reduction = "none" if solver.normalize == "none" else "mean"

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

    def pgd(self, a) -> None:
        delta = self.start(a)
        for _ in range(a.steps):
            delta = self.move(delta, self.loss(delta), a)
        self.descend(self.loss(delta.detach()).mean())

    def freelb(self, a) -> None:
        delta, total = self.start(a), 0.0
        for _ in range(a.steps):
            loss = self.loss(delta)
            total = total + loss.mean() / a.steps
            delta = self.move(delta, loss, a)
        self.descend(total)

    def smart(self, a) -> None:
        delta, clean = self.start(a), self.predict()
        for _ in range(a.steps):
            delta = self.move(delta, symmetric_kl(self.predict(delta), clean.detach()), a)
        smooth = symmetric_kl(self.predict(delta.detach()), clean).mean()
        proximal = symmetric_kl(clean, self.predict(theta=self.teacher).detach()).mean()
        self.descend(self.loss().mean() + a.smoothness * smooth + a.proximal * proximal)
        if (self.round + 1) % a.inner_steps == 0:
            pairs = zip(self.theta, self.teacher, strict=True)
            self.teacher = [(1 - a.momentum) * p.detach() + a.momentum * t for p, t in pairs]

    def mat(self, a) -> None:
        delta, clean = self.start(a), self.predict().detach()
        points, gains = [delta], torch.zeros(a.particles, len(self.ids), dtype=torch.float64)
        for _ in range(a.steps):
            gain = symmetric_kl(self.predict(points[-1]), clean)
            points.append(self.move(points[-1], gain, a))
            gains = gains + gain.detach()
        weights = (a.mirror_step * gains).softmax(0)
        delta = points[-1].detach()
        if a.play_as == "mean":
            damped = damp(points[0], points[1:], a.damping).detach()
            delta = (weights[..., None, None] * damped).sum(0, keepdim=True)
            weights = torch.ones_like(weights[:1])
        backup, samples, objective = self.theta, [], 0.0
        for _ in range(a.learner_steps):
            gap = symmetric_kl(self.predict(delta), self.predict())
            self.draw.begin("learner", self.count)
            self.descend(self.loss().mean() + a.smoothness * (weights * gap).sum(0).mean())
            objective = objective + self.objective / a.learner_steps
            scale = math.sqrt(2 * LR * a.learner_temperature)
            noisy = [(p + scale * self.draw("normal", p)).detach() for p in self.theta]
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
    "radius": 0.5,
    "start_size": 0.3,
    "smoothness": 1.5,
}
SMART = {"steps": 2, "start_size": 0.2, "smoothness": 1.5, "proximal": 2.0}
CASES = {
    "noise": mixadv.UniformNoise(radius=0.5),
    "fgm": mixadv.FGM(radius=0.5),
    "pgd": mixadv.PGD(steps=3, radius=0.5, step_size=0.3),
    "pgd-linf": mixadv.PGD(steps=3, radius=0.2, step_size=0.1, norm="linf"),
    "pgd-raw": mixadv.PGD(steps=3, radius=0.5, step_size=0.3, normalize="none"),
    "freelb": mixadv.FreeLB(steps=3, radius=0.5, step_size=0.3),
    "freelb-raw": mixadv.FreeLB(steps=3, radius=0.5, step_size=0.3, normalize="none"),
    "smart": mixadv.SMART(**SMART, momentum=0.9),
    "smart-last": mixadv.SMART(**SMART, momentum=0.0, inner_steps=2),
    "smart-raw": mixadv.SMART(**SMART, momentum=0.9, normalize="none", norm="linf"),
    "mat-mean": mixadv.MAT(**MAT, normalize="none", step_size=2.0),
    "mat-uniform": mixadv.MAT(**MAT, damping="uniform"),
    "mat-ensemble": mixadv.MAT(**MAT, play_as="ensemble", normalize="none", step_size=2.0),
    "mat-steepest": mixadv.MAT(**MAT, play_as="ensemble"),
}


def wrapped(solver: mixadv.Solver, base: type = torch.optim.SGD):
    model = Reader()
    options = {"weight_decay": DECAY} if base is torch.optim.AdamW else {}
    optimizer = mixadv.wrap(base(model.parameters(), lr=LR, **options), model, solver)
    optimizer.game.noise = Given()
    if optimizer.game.learner is not None:
        optimizer.game.learner.noise = Given()
    return model, optimizer


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("solver", CASES.values(), ids=CASES)
def test_rounds_follow_the_formulas(solver, base):
    model, optimizer = wrapped(solver, base)
    formulas = Formulas(model, base)
    for batch in BATCHES:
        objective = optimizer.step(closure(model, solver, *batch))
        formulas.play(solver, batch)
        torch.testing.assert_close(objective, formulas.objective, rtol=0, atol=1e-10)
        for parameter, expected in zip(model.parameters(), formulas.theta, strict=True):
            torch.testing.assert_close(parameter, expected, rtol=0, atol=1e-10)


def test_every_solver_is_recomputed():
    assert {solver.name for solver in CASES.values()} == set(mixadv.SOLVERS)


@pytest.mark.parametrize("name", mixadv.SOLVERS)
def test_three_doors_deliver_the_same_gradients(name):
    one_step = {"learner_steps": 1} if hasattr(mixadv.SOLVERS[name], "learner_steps") else {}

    def gradients(play) -> list[Tensor]:
        solver = mixadv.solver(name, **one_step)
        model, optimizer = wrapped(solver)
        seen = []
        optimizer.base.register_step_pre_hook(
            lambda *_: seen.extend(p.grad.clone() for p in model.parameters())
        )
        for batch in BATCHES:
            optimizer.zero_grad()
            play(optimizer, closure(model, solver, *batch))
        return seen

    def backward(optimizer, forward):
        optimizer.game.backward(forward)
        optimizer.step()

    def loss(optimizer, forward):
        optimizer.game.loss(forward).backward()
        optimizer.step()

    step = gradients(lambda optimizer, forward: optimizer.step(forward))
    assert len(step) == 5 * len(BATCHES)
    torch.testing.assert_close(gradients(backward), step, rtol=0, atol=1e-14)
    torch.testing.assert_close(gradients(loss), step, rtol=0, atol=1e-14)


# Reductions ------------------------------------------------------------------------------------

NO_MAT = {"learner_steps": 1, "learner_temperature": 0.0, "damping": 0.0, "round_damping": 0.0}
PLAIN = {
    "freelb-still": mixadv.FreeLB(start="zero", step_size=0.0),
    "pgd-zero": mixadv.PGD(start="zero", steps=0),
    "smart-weightless": mixadv.SMART(smoothness=0.0, proximal=0.0),
    "mat-weightless": mixadv.MAT(**NO_MAT, smoothness=0.0),
    "mat-zero": mixadv.MAT(**NO_MAT, start="zero", steps=0, smoothness=5.0),
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
