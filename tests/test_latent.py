"""Any hidden layer may be the site: gradients, radii and objectives there, by hooks of our own."""

from contextlib import contextmanager
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import mixadv
from mixadv.maths.contrastive import nt_xent
from mixadv.maths.divergence import kl, symmetric_kl
from mixadv.model.site import first_of
from tests.worlds import added
from tests.zoo import AROUND, Player, player, wrapped

LAYERS = {
    "bert": ["bert.encoder.layer.1"],
    "distilbert": ["distilbert.transformer.layer.0"],
    "deberta": ["deberta.encoder.layer.0"],
    "modernbert": ["model.layers.0"],
    "gpt2": ["transformer.h.0"],
    "llama": ["model.layers.0"],
    "t5": ["transformer.encoder.block.0"],
    "bart": ["model.encoder.layers.1"],
}
SEVERAL = {
    "bert": ["bert.embeddings.word_embeddings", "bert.encoder.layer.0"],
    "bart": ["model.encoder.layers.0", "model.encoder.layers.1"],
}
SITES = [*LAYERS.items(), *SEVERAL.items()]
each_site = pytest.mark.parametrize(("family", "site"), SITES, ids=lambda x: str(x))


class Read(NamedTuple):
    losses: Tensor
    logits: Tensor
    hidden: Tensor | None = None


def model_of(family: str, rows: int = 5) -> Player:
    one = player(family, rows=rows)
    one.model.double()
    return one


def read(one: Player) -> Read:
    """One pass, its dropout always the same."""
    torch.manual_seed(3)
    inputs = {name: value for name, value in one.batch.items() if name != "labels"}
    logits = one.model(**inputs).logits
    return Read(F.cross_entropy(logits, one.batch["labels"], reduction="none"), logits)


def moved(one: Player, site: list[str], deltas: list[Tensor]):
    """Add to the output of each module of the site."""
    return added(*zip(map(one.model.get_submodule, site), deltas, strict=True))


@contextmanager
def outputs(one: Player, site: list[str]):
    """Collect what each module of the site returns."""
    kept: dict[str, Tensor] = {}
    hooks = [
        one.model.get_submodule(name).register_forward_hook(
            lambda *call, n=name: kept.__setitem__(n, first_of(call[2]))
        )
        for name in site
    ]
    yield kept
    for hook in hooks:
        hook.remove()


def deltas_of(game: mixadv.Game) -> list[Tensor]:
    """Return what was added to the output of each module."""
    q = game.strategy
    return [unit * points[0] for unit, points in zip(q.units, q.points, strict=True)]


def named(site: list[str]):
    return site if len(site) > 1 else site[0]


# The adversary ------------------------------------------------------------------------------------


@each_site
def test_the_gradient_at_a_layer_is_that_of_finite_differences(family, site):
    """Of each sample's own loss; one raw step from zero is the gradient itself."""
    one, fp32 = model_of(family), family in ("llama", "t5")  # whose norms compute in fp32
    size, tolerance = (1e-3, 1e-3) if fp32 else (1e-6, 1e-8)
    words = {"start": "zero", "radius": None, "normalize": "none", "unit": "absolute"}
    game = mixadv.Game(one.model, mixadv.PGD(steps=1, step_size=1.0, **words), named(site))
    game.backward(lambda: read(one)[:2])
    slopes = [points[0] for points in game.strategy.points]
    mask = one.batch["attention_mask"][..., None].double()
    draw = torch.Generator().manual_seed(0)
    for _ in range(4):
        ways = [mask * torch.randn(s.shape, generator=draw, dtype=s.dtype) for s in slopes]
        losses = []
        for sign in (1, -1):
            with torch.no_grad(), moved(one, site, [sign * size * way for way in ways]):
                losses.append(read(one).losses)
        expected = (losses[0] - losses[1]) / (2 * size)
        found = sum((s * w).flatten(1).sum(1) for s, w in zip(slopes, ways, strict=True))
        torch.testing.assert_close(found, expected, rtol=5e-3 if fp32 else 1e-5, atol=tolerance)
    assert all(slope.any() for slope in slopes)


@each_site
def test_the_radius_is_in_units_of_what_the_layer_returns(family, site):
    """Of the mean length of a real token there, and at each of several layers."""
    one = model_of(family)
    one.model.eval()
    real = one.batch["attention_mask"] > 0
    with torch.no_grad(), outputs(one, site) as clean:
        read(one)
    units = {name: float(hidden.norm(dim=-1)[real].mean()) for name, hidden in clean.items()}
    solver = mixadv.PGD(steps=1, radius=0.3, step_size=9.0)
    game = mixadv.Game(one.model, solver, named(site))
    game.backward(lambda: read(one)[:2])
    assert game.unit == pytest.approx(units if len(site) > 1 else units[site[0]])
    for delta, unit in zip(deltas_of(game), units.values(), strict=True):
        lengths = delta.flatten(1).norm(dim=1)
        torch.testing.assert_close(lengths, torch.full_like(lengths, 0.3 * unit))
        assert not delta[~real].any()


# The learner --------------------------------------------------------------------------------------

PLAIN = {"learner_steps": 1, "learner_temperature": 0.0, "damping": 0.0, "average": None}
SOLVERS = {
    "noise": mixadv.UniformNoise(),
    "fgm": mixadv.FGM(),
    "pgd": mixadv.PGD(),
    "freeat": mixadv.FreeAT(steps=1),
    "freelb": mixadv.FreeLB(steps=1),
    "creat": mixadv.CreAT(steps=2),
    "cat": mixadv.CAT(contrast_weight=0.2),
    "vat": mixadv.VAT(),
    "r3f": mixadv.R3F(),
    "alum": mixadv.ALUM(steps=2),
    "smart": mixadv.SMART(proximal_weight=0.0),
    "trades": mixadv.TRADES(steps=2),
    "mat": mixadv.MAT(play_as="mean", round_damping=0.0, **PLAIN),
    "group_dro": mixadv.GroupDRO(steps=1),
    "cvar": mixadv.CVaR(steps=1, level=1e-9),
    "chi_square": mixadv.ChiSquare(steps=1, ball=0.01),
}
AT = ("noise", "pgd", "freeat", "freelb", "group_dro")


def objective(name: str, clean: Read, at: Read) -> Tensor:
    """What each solver minimises, given where its adversary plays."""
    loss, moved = clean.losses.mean(), at.losses.mean()
    if name in AT:
        return moved
    if name == "cvar":
        return at.losses.max()
    if name == "chi_square":
        return moved + 0.02**0.5 * at.losses.std(unbiased=False)
    if name == "fgm":
        return loss + moved
    if name == "creat":
        return (loss + moved) / 2
    if name == "cat":
        return 0.8 * (loss + moved) / 2 + 0.2 * nt_xent(clean.hidden, at.hidden)
    if name == "vat":
        return loss + kl(at.logits, clean.logits.detach()).mean()
    if name == "trades":
        return loss + SOLVERS[name].smoothness_weight * kl(at.logits, clean.logits).mean()
    return loss + symmetric_kl(at.logits, clean.logits).mean()


def test_every_solver_but_those_of_tokens_and_labels_is_tried():
    assert {*SOLVERS, "textat", "mart", *AROUND} == set(mixadv.SOLVERS)  # weights are no layer


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize(
    ("family", "site"),
    [("bert", LAYERS["bert"]), ("bert", SEVERAL["bert"]), ("bart", LAYERS["bart"])],
    ids=lambda x: str(x),
)
def test_the_learner_gets_the_gradient_at_the_perturbed_layer(family, site, name):
    one, found = model_of(family), []
    optimizer = wrapped(one.model, SOLVERS[name], lr=0.0, site=named(site))
    optimizer.base.register_step_pre_hook(
        lambda *_: found.extend(None if p.grad is None else p.grad.clone() for p in weights)
    )
    weights = list(one.model.parameters())
    total = optimizer.step(lambda: read(one)[:2])
    deltas = deltas_of(optimizer.game)
    assert all(delta.any() for delta in deltas)

    source = {"bert": "bert", "bart": "model"}[family]
    first = "last_hidden_state" if family == "bert" else "encoder_last_hidden_state"
    hidden: list[Tensor] = []
    hook = one.model.get_submodule(source).register_forward_hook(
        lambda *call: hidden.append(call[2][first][:, 0])
    )
    clean = read(one)
    with moved(one, site, deltas):
        at = read(one)
    hook.remove()
    expected = objective(name, clean._replace(hidden=hidden[0]), at._replace(hidden=hidden[1]))
    torch.testing.assert_close(total, expected.detach(), rtol=1e-9, atol=1e-12)
    gradients = torch.autograd.grad(expected, weights, allow_unused=True)
    torch.testing.assert_close(found, list(gradients), rtol=1e-8, atol=1e-10)


def test_layers_below_the_site_are_as_in_a_clean_pass():
    one = model_of("bert")
    one.model.eval()
    below = "bert.encoder.layer.0"
    with outputs(one, [below]) as clean:
        read(one)
    seen = []

    def closure():
        with outputs(one, [below]) as kept:
            result = read(one)[:2]
        seen.append(kept[below].detach())
        return result

    mixadv.Game(one.model, mixadv.PGD(), "bert.encoder.layer.1").backward(closure)
    assert len(seen) > 4
    for hidden in seen:
        torch.testing.assert_close(hidden, clean[below].detach(), rtol=0, atol=0)
