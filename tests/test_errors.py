"""What a user meets who asks for what cannot be played: what, why, what to change; no harm done."""

import functools
import itertools
import re
from collections.abc import Callable
from dataclasses import fields
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD
from torch.utils.checkpoint import checkpoint

import mixadv
from mixadv import (
    ALUM,
    CAT,
    FGM,
    MAT,
    PGD,
    R3F,
    SMART,
    VAT,
    CreAT,
    FreeAT,
    FreeLB,
    Game,
    GameError,
    Step,
    TextAT,
    UniformNoise,
    make_solver,
    wrap,
)
from mixadv.maths.divergence import symmetric_kl
from tests.processes import one_process
from tests.zoo import CANNOT, WAYS, Player, assert_same, fingerprint, player, small, wrapped

NAN, INF = float("nan"), float("inf")


def words(*expected: str) -> str:
    """Return a pattern that finds all the words, in any order; in one text, a bar parts them."""
    apart = " | ".join(expected).split(" | ")
    return "(?s)" + "".join(f"(?=.*{re.escape(word)})" for word in apart)


# At construction -----------------------------------------------------------------------------

# By error: what is built, and words of what is said.
Refusals = dict[type[Exception], dict[str, tuple[Any, ...]]]


def cases(refusals: Refusals) -> list[Any]:
    """Return each case with its error."""
    return [
        pytest.param(error, build, words(expected), id=why)
        for error, rows in refusals.items()
        for why, (build, expected) in rows.items()
    ]


VALUES: Refusals = {
    ValueError: {
        "negative radius": (lambda: PGD(radius=-0.5), "PGD | radius | -0.5"),
        "NaN radius": (lambda: PGD(radius=NAN), "radius | nan | finite"),
        "infinite radius": (lambda: FGM(radius=INF), "FGM | radius | inf"),
        "huge radius": (lambda: PGD(radius=10**400), "radius | finite"),
        "negative steps": (lambda: SMART(steps=-1), "SMART | steps | -1"),
        "no pass": (lambda: FreeLB(steps=0), "FreeLB | steps | passes | 0"),
        "two FGM steps": (lambda: make_solver("fgm", steps=2), "FGM | 'steps' | radius"),
        "step size": (lambda: MAT(step_size=-1.0), "step_size | -1.0"),
        "start size": (lambda: MAT(start_size=INF), "start_size | inf"),
        "temperature": (lambda: MAT(temperature=-1e-3), "temperature | -0.001"),
        "no particles": (lambda: MAT(particles=0), "particles | 0"),
        "norm": (lambda: PGD(norm="l_2"), "norm='l_2' | 'l2' | 'linf' | mean"),
        "norm as a number": (lambda: PGD(norm=2), "norm=2 | 'l2'"),
        "group": (lambda: PGD(per="tokens"), "per='tokens' | Did you mean 'token'?"),
        "start": (lambda: PGD(start="zeros"), "start='zeros' | Did you mean 'zero'?"),
        "particle_batching": (
            lambda: MAT(particle_batching="vmaps"),
            "particle_batching='vmaps' | 'vmap'?",
        ),
        "sphere": (lambda: PGD(radius=None, projection="sphere"), "sphere | None"),
        "divergence": (
            lambda: SMART(divergence="symetric_kl"),
            "divergence | 'symetric_kl' | Did you mean 'symmetric_kl'? | callable",
        ),
        "payoff": (lambda: PGD(payoff="Loss"), "payoff | 'Loss' | 'loss' | 'kl'"),
        "a list as divergence": (lambda: MAT(divergence=["kl"]), "['kl'] | 'kl'"),
        "zero start": (
            lambda: SMART(start="zero"),
            "start='zero' | zero gradient | 'uniform' or 'normal'",
        ),
        "vanishing proximal term": (
            lambda: SMART(ema_decay=0.0, teacher_every=1),
            "ema_decay=0 | teacher_every=1 | proximal_weight=0",
        ),
        "momentum": (lambda: SMART(ema_decay=1.5), "ema_decay | between 0 and 1 | 1.5"),
        "inner steps": (lambda: SMART(teacher_every=0), "teacher_every | 0"),
        "smoothness_weight": (lambda: MAT(smoothness_weight=-1.0), "smoothness | -1.0"),
        "mirror step": (lambda: MAT(mirror_step=NAN), "mirror_step | nan"),
        "damping": (lambda: MAT(damping=1.0), "damping | 1"),
        "damping by name": (lambda: MAT(damping="unifrom"), "'unifrom' | 'uniform'"),
        "between rounds": (lambda: MAT(round_damping=2), "round_damping | 2"),
        "average": (lambda: MAT(average=-0.1), "average | -0.1"),
        "learner steps": (lambda: MAT(learner_steps=0), "learner_steps | 0"),
        "samples": (lambda: MAT(samples=-1), "samples | -1"),
        "play": (lambda: MAT(play_as="means"), "play_as='means' | 'mean' | 'ensemble'"),
        "points": (lambda: MAT(points="all"), "points='all' | 'last' | 'path'"),
        "mirror unit": (lambda: MAT(mirror_unit="token"), "mirror_unit='token' | 'relative'"),
        "no replay": (lambda: FreeAT(steps=0), "FreeAT | steps | replays | 0"),
        "no pass over tokens": (lambda: TextAT(steps=0), "TextAT | steps | 0"),
        "writing": (lambda: TextAT(write="sum"), "write='sum' | 'mean' | 'accumulate'"),
        "deviation_weight": (lambda: CreAT(deviation_weight=-1), "CreAT | deviation | -1"),
        "CAT standing still": (lambda: CAT(step_size=0), "step_size=0 | radius"),
        "a token's δ per sample": (
            lambda: CAT(norm="l2"),
            "norm='l2', per='sample' | per='token' | shared=False",
        ),
        "contrast_weight": (lambda: CAT(contrast_weight=1.5), "contrast | between 0 and 1 | 1.5"),
        "contrast temperature": (
            lambda: CAT(contrast_temperature=0),
            "CAT | contrast_temperature | positive",
        ),
        "negatives": (lambda: CAT(negatives="al"), "'al' | 'all' | 'cross'"),
        "no power iteration": (lambda: VAT(steps=0), "VAT | steps | power | 0"),
        "VAT standing still": (lambda: VAT(step_size=0), "step_size=0 | radius"),
        "VAT from zero": (lambda: VAT(start="zero"), "zero gradient | 'normal'"),
        "smoothness of noise": (lambda: R3F(smoothness_weight=-1), "R3F | smoothness | -1"),
        "ALUM's divergence": (lambda: ALUM(divergence="k1"), "'k1' | 'kl'"),
        "solver": (lambda: make_solver("freelp"), "'freelp' | Did you mean 'freelb'? | mat"),
        "solver as a class": (lambda: make_solver(PGD), "PGD | pgd"),
        "parameter": (
            lambda: make_solver("pgd", raduis=1),
            "PGD | 'raduis' | Did you mean 'radius'? | step_size",
        ),
    },
    TypeError: {
        "text radius": (lambda: PGD(radius="0.1"), "radius | '0.1' | number"),
        "tensor radius": (lambda: PGD(radius=torch.ones(())), "radius | number"),
        "half a step": (lambda: PGD(steps=1.5), "steps | 1.5 | integer"),
        "steps as a flag": (lambda: PGD(steps=True), "steps | True"),
        "noise with steps": (lambda: UniformNoise(**{"steps": 1}), "UniformNoise | 'steps'"),
        "pure particles": (lambda: PGD(particles=2), "PGD | particles"),
        "fresh dropout": (lambda: PGD(fresh_dropout="no"), "fresh_dropout | 'no'"),
        "carrying": (lambda: FreeAT(carry=1), "FreeAT | carry | True or False | 1"),
        "sharing": (lambda: CAT(shared=None), "CAT | shared | True or False | None"),
        "excluded tokens": (lambda: TextAT(exclude=[0]), "exclude | tuple | [0]"),
        "SAM of other packages": (
            lambda: mixadv.SAM(small().model.parameters(), SGD, rho=0.05, lr=0.1),
            "no optimizer | mixadv.wrap(torch.optim.SGD(model.parameters(), lr=…), model, "
            "mixadv.SAM(radius=0.05))",
        ),
        "a solver inside, by place": (lambda: mixadv.AWP(mixadv.PGD()), "AWP(solver=…)"),
        "adaptive SAM": (lambda: mixadv.SAM(adaptive=True), "'adaptive' | 'mixadv.ASAM'"),
        "β of TRADES": (lambda: mixadv.TRADES(beta=6.0), "'beta' | 'smoothness_weight'"),
        "β of MART": (lambda: mixadv.MART(beta=6.0), "'beta' | 'smoothness_weight'"),
        "by place": (lambda: PGD(0.1), "PGD | by name | mixadv.PGD(radius=0.1)"),
        "source": (lambda: CreAT(source=3), "CreAT | source | name | 3"),
        "representation": (lambda: CAT(representation=3), "CAT | representation | 3"),
        "two CAT steps": (lambda: CAT(**{"steps": 2}), "CAT | 'steps'"),
        "head": (lambda: CAT(head=len), "CAT | head | torch.nn.Module"),
        "R3F with steps": (lambda: R3F(**{"steps": 1}), "R3F | 'steps'"),
    },
}


@pytest.mark.parametrize(("error", "build", "said"), cases(VALUES))
def test_a_value_that_cannot_be_meant_is_refused_at_once(error: Any, build: Any, said: str):
    with pytest.raises(error, match=said):
        build()


JUNK = [None, True, -1, 0, 2, 10**400, 0.5, -0.5, NAN, INF, 1j, "", "kl", b"l2", [], ["kl"], {}]
JUNK += [set(), object(), torch.ones(2), print]


@pytest.mark.parametrize("name", mixadv.SOLVERS)
def test_any_value_is_taken_or_refused_by_name(name: str):
    taken = [f for f in fields(mixadv.SOLVERS[name]) if f.init]
    for parameter, value in itertools.product(taken, JUNK):
        try:
            built = make_solver(name, **{parameter.name: value})
        except (TypeError, ValueError) as error:
            assert re.search(f"{parameter.name}|payoff|divergence", str(error))  # noqa: PT017
        else:
            assert getattr(built, parameter.name) is value
            repr(built)


class TwoEmbeddings(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(3, 2), nn.Embedding(3, 2)


WRAP = "mixadv.wrap(optimizer, model, solver)"


def refused_arguments() -> Refusals:
    other, two = nn.Linear(2, 2), TwoEmbeddings()
    head = CAT(head=other)
    return {
        ValueError: {
            "another model's optimizer": (
                lambda m, o: wrap(SGD(other.parameters()), m, PGD()),
                "2 parameters | none of the | Small | build it from",
            ),
            "bare game for MAT": (lambda m, o: Game(m, MAT()), f"MAT | {WRAP}"),
            "bare game for FreeAT": (lambda m, o: Game(m, FreeAT()), f"FreeAT | {WRAP}"),
            "bare game for a head": (lambda m, o: Game(m, head), f"CAT trains head= | {WRAP}"),
            "source's name": (
                lambda m, o: wrap(o, m, CreAT(source="hiden")),
                "source | 'hiden' | Did you mean 'hidden'",
            ),
            "bare game for SMART": (lambda m, o: Game(m, SMART()), "SMART | wrap"),
            "site's name": (
                lambda m, o: Game(m, PGD(), "embeding"),
                "'embeding' | Did you mean 'embedding'",
            ),
            "no site": (lambda m, o: Game(m, PGD(), []), "site=[]"),
            "foreign site": (lambda m, o: Game(m, PGD(), other), "Linear | not part"),
            "two embeddings": (
                lambda m, o: Game(two, PGD()),
                "2 embeddings | 'words' | 'places' | site=",
            ),
        },
        TypeError: {
            "DataParallel": (
                lambda m, o: wrap(o, nn.DataParallel(m), PGD()),
                "DataParallel | replicas | DistributedDataParallel",
            ),
            "not a model": (lambda m, o: wrap(o, m.forward, PGD()), "model | method"),
            "not an optimizer": (lambda m, o: wrap(m, o, PGD()), "optimizer | Small"),
            "a solver's class": (lambda m, o: wrap(o, m, MAT), "mixadv.MAT()"),
            "a solver's number": (lambda m, o: wrap(o, m, 3), "solver | 3"),
            "wrapped twice": (lambda m, o: wrap(wrap(o, m, PGD()), m, PGD()), ".base"),
            "seed": (lambda m, o: wrap(o, m, PGD(), seed=0.5), "seed | 0.5"),
            "site's type": (lambda m, o: Game(m, PGD(), 3), "site | 3"),
        },
    }


@pytest.mark.parametrize(("error", "build", "said"), cases(refused_arguments()))
def test_what_cannot_be_wrapped_is_refused_at_once(error: Any, build: Any, said: str):
    model = small().model
    base = SGD(model.parameters(), lr=0.1)
    found = fingerprint(model, base)
    with pytest.raises(error, match=said):
        build(model, base)
    assert_same(fingerprint(model, base), found)


# In the first round --------------------------------------------------------------------------


class Setting:
    """A model, a batch, and what of them a case changes."""

    def __init__(self) -> None:
        self.player: Player = small()
        self.model: Any = self.player.model
        self.good = self.player.closure()
        self.labels = self.player.batch["labels"]
        self.calls = itertools.count(1)
        self.game: Any = None

    def returns(self, change: Callable[[Tensor, Tensor], Any]) -> Callable[[], Any]:
        return lambda: change(*self.good())


def play(optimizer: mixadv.GameOptimizer, how: str) -> Callable[[Any], Any]:
    return optimizer.step if how == "step" else getattr(optimizer.game, how)


def calls_backward(s: Setting) -> Callable[[], Any]:
    def closure() -> Any:
        loss, logits = s.good()
        loss.backward(retain_graph=True)
        return loss, logits

    return closure


def grows(s: Setting) -> Callable[[], Any]:
    def closure() -> Any:
        rows = slice(0, 6 - next(s.calls) % 2)
        return s.player.closure(ids=s.player.batch["ids"][rows], labels=s.labels[rows])()

    return closure


def frozen(s: Setting) -> Callable[[], Any]:
    s.model.requires_grad_(False)
    return s.good


def plays(s: Setting) -> Callable[[], Any]:
    return lambda: s.game.loss(s.good)


def unsteady(s: Setting) -> Callable[[], Any]:
    return s.returns(lambda loss, _: loss * next(s.calls))


def own_loss(s: Setting) -> Callable[[], Any]:
    return s.returns(lambda *_: s.model.head.bias.sum())


def skips_the_site(s: Setting) -> Callable[[], Any]:
    weight = s.model.embedding.weight

    def closure() -> Tensor:
        x = F.embedding(s.player.batch["ids"], weight).sum(1)
        return F.cross_entropy(s.model.head(torch.tanh(s.model.hidden(x))), s.labels)

    return closure


def gives(change: Callable[[Tensor, Tensor], Any]) -> Callable[[Setting], Callable[[], Any]]:
    """Return what makes a closure of what it gives in place of loss and logits."""
    return lambda s: s.returns(change)


def good(s: Setting) -> Callable[[], Any]:
    return s.good


column = gives(lambda loss, logits: (loss, logits[:, :1]))
UNIFORM = "raw gradient | reduction='none'"
RAW = PGD(normalize="none")
SUM = PGD(payoff=lambda perturbed, clean: (perturbed - clean).square().sum())
FIRST = CAT(representation=lambda output: output[:, 0])
CUT = CreAT(representation=lambda output: output.detach())
# The solver, what makes the closure, and words of what is said.
CLOSURES: dict[str, tuple[mixadv.Solver, Callable[[Setting], Callable[[], Any]], str]] = {
    "nothing": (PGD(), lambda s: lambda: s.good() and None, "nothing | None | scalar loss"),
    "a number": (PGD(), gives(lambda a, b: float(a.detach())), "float | loss"),
    "an empty tuple": (PGD(), gives(lambda a, b: ()), "tuple | loss"),
    "no loss": (PGD(), gives(lambda a, b: {"logits": b}), "dict | 'logits'"),
    "logits for a loss": (PGD(), gives(lambda a, b: b), "[6, 3] | scalar loss"),
    "labels for a loss": (PGD(), lambda s: lambda: s.good() and s.labels, "torch.int64 | [6]"),
    "no predictions": (SMART(), gives(lambda a, b: a), "compares predictions | (loss, logits)"),
    "more axes": (SMART(), gives(lambda a, b: (a, b[:, None, None])), "[B, C] | [6, 1, 1, 3]"),
    "one column": (SMART(), column, "one column | 'symmetric_kl' | divergence='squared_error'"),
    "one value": (SUM, good, "divergence | [] | [6, 3] | one value per prediction"),
    "backward": (PGD(), calls_backward, "closure | calls backward | returns the loss"),
    "backward once": (
        PGD(),
        gives(lambda a, b: (a.backward(), a)[1]),
        "closure | calls backward | returns the loss",
    ),
    "not repeatable": (PGD(), unsteady, "same random state | several times"),
    "another batch each time": (PGD(), grows, "several times"),
    "infinite": (PGD(), gives(lambda a, b: a / 0), "inf | before any adversary | labels"),
    "no_grad": (PGD(), lambda s: torch.no_grad()(s.good), "loss | no_grad"),
    "detached": (PGD(), gives(lambda a, b: a.detach()), "loss | detached"),
    "frozen parameters": (PGD(), frozen, "does not depend | parameters are frozen"),
    "a loss of its own": (PGD(), own_loss, "no gradient with respect to δ | embedding"),
    "the site is never called": (PGD(), skips_the_site, "'embedding' | not called | site="),
    "a game within the game": (PGD(), plays, "must not play a round itself | forward pass"),
    "raw gradients of one number": (RAW, good, f"PGD | {UNIFORM} | [B] | normalize='steepest'"),
    "none to smooth": (R3F(), gives(lambda a, b: a), "compares predictions | (loss, logits)"),
    "one column to smooth": (VAT(), column, "one column | 'kl' | divergence='squared_error'"),
    "no representation": (FIRST, good, "representation | 'Small' | [B, d] | [6] | representation="),
    "never computed": (CreAT(source="unused"), good, "'unused' | not called | source="),
    "a detached representation": (CUT, good, "representation | does not depend on δ | source="),
    "raw gradients along the ascent": (FreeLB(normalize="none"), good, f"FreeLB | {UNIFORM}"),
}


CALLS = [(why, how) for why in CLOSURES for how in WAYS]
# There a closure that plays means what torch means by closures.
CALLS.remove(("a game within the game", "step"))


@pytest.mark.parametrize("earlier", [False, True], ids=["no gradients", "earlier gradients"])
@pytest.mark.parametrize(("why", "how"), CALLS)
def test_a_closure_that_cannot_be_played_is_refused_in_the_first_round(
    why: str, how: str, earlier: bool
):
    solver, change, said = CLOSURES[why]
    setting = Setting()
    if earlier:
        setting.good()[0].backward()
    optimizer = wrapped(setting.player, solver)
    setting.game = optimizer.game
    closure = change(setting)
    found = fingerprint(setting.model, optimizer)
    with pytest.raises(GameError, match=words(said)):
        play(optimizer, how)(closure)
    assert_same(fingerprint(setting.model, optimizer), found)


ELSEWHERE = ("Trainer", "SFTTrainer", "loss of shards")  # tested with what they are about


@pytest.mark.parametrize(("name", "word"), [c for c in CANNOT if c[1] not in ELSEWHERE])
def test_what_a_solver_cannot_play_leaves_no_trace(name: str, word: str):
    p, site, how = small(), None, word if word in ("backward", "loss") else "step"
    if word == "hidden layer":
        site = "dropout"
    elif word == "vision":
        p = player("vision", rows=4)
    elif word == "reentrant":
        hidden = p.model.hidden
        hidden.forward = functools.partial(checkpoint, hidden.forward, use_reentrant=True)
    optimizer = wrapped(p, name, site=site)
    found = fingerprint(p.model)
    with pytest.raises(GameError, match=CANNOT[name, word]):
        play(optimizer, how)(p.closure())
    assert_same(fingerprint(p.model), found)
    assert (optimizer.game.round, optimizer.game.rounds.memory) == (0, {})


class Unnamed(mixadv.Solver):
    """Plays what it is told; a subclass that adds no hyper-parameter needs no decorator."""

    name: ClassVar[str] = "unnamed"
    moves: ClassVar[Callable[[mixadv.Stage], Any]]

    def play(self, stage: mixadv.Stage) -> Any:
        yield from type(self).moves(stage)


MOVES: dict[str, tuple[Callable[[mixadv.Stage], Any], str]] = {
    "nothing": (lambda s: (), "Unnamed.play | without a Step | Step(objective)"),
    "no step": (lambda s: (s.loss(),), "without a Step | Step(objective)"),
    "a number": (lambda s: (Step(1.0),), "Unnamed.play | 1.0 | 0-d tensor"),
    "losses": (lambda s: (Step(s.clean().predictions),), "Unnamed.play | [6, 3] | 0-d tensor"),
    "a constant": (lambda s: (Step(s.loss().detach()),), "does not depend on any parameter"),
}


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("why", MOVES)
def test_a_solver_that_does_not_play_by_the_rules_is_told_so(
    why: str, how: str, monkeypatch: pytest.MonkeyPatch
):
    moves, said = MOVES[why]
    monkeypatch.setattr(Unnamed, "moves", staticmethod(moves), raising=False)
    player = small()
    optimizer = wrapped(player, Unnamed())
    found = fingerprint(player.model)
    with pytest.raises(GameError, match=words(said)):
        play(optimizer, how)(player.closure())
    left = fingerprint(player.model)
    if (why, how) == ("no step", "backward"):  # whose pass has delivered its gradient by then
        del left["gradients"], found["gradients"]
    if (why, how) == ("no step", "step"):
        optimizer.zero_grad()
        left["gradients"] = fingerprint(player.model)["gradients"]
    assert_same(left, found)
    assert optimizer.game.round == 0


SITES: dict[str, tuple[Any, str]] = {
    "never called": ("unused", "'unused' | not called | site= | 'embedding'"),
    "the model's own input of ids": ("input", "own input | 'ids' | site="),
    "no floating-point output": (lambda m: m.count, "torch.int64 | floating-point | site="),
}


class Counting(nn.Module):
    def forward(self, ids: Tensor) -> Tensor:
        return ids.sum(1)


@pytest.mark.parametrize("why", SITES)
def test_a_site_where_nothing_can_be_added_is_refused_in_the_first_round(why: str):
    player = small()
    model = player.model
    model.count = Counting()
    site, expected = SITES[why]
    game = Game(model, PGD(), site(model) if callable(site) else site)
    found = fingerprint(model)

    def closure() -> Any:
        model.count(player.batch["ids"])
        return player.closure()()

    with pytest.raises(GameError, match=words(expected)):
        game.backward(closure)
    assert_same(fingerprint(model), found)


@pytest.mark.parametrize("how", WAYS)
def test_a_later_closure_whose_batch_changes_within_the_round_is_refused(how: str):
    setting = Setting()
    optimizer = wrapped(setting.player, PGD())
    play(optimizer, how)(setting.good)
    optimizer.zero_grad()
    found = fingerprint(setting.model, optimizer)
    with pytest.raises(GameError, match=words("[6, 5, 6]", "[5, 5, 6]", "repeatable")):
        play(optimizer, how)(grows(setting))
    assert_same(fingerprint(setting.model, optimizer), found)
    with pytest.raises(GameError, match=words("'embedding'", "not called", "site=")):
        play(optimizer, how)(skips_the_site(setting))
    assert_same(fingerprint(setting.model, optimizer), found)


def test_any_round_can_be_checked_as_the_first_one_is():
    setting = Setting()
    game = Game(setting.model, PGD())
    game.backward(setting.good)
    game.backward(unsteady(setting))
    with pytest.raises(GameError, match="several times"):
        game.backward(unsteady(setting), check=True)


def test_a_radius_below_the_noise_floor_is_warned_of():
    player = small()
    player.model.float()
    optimizer = wrapped(player, PGD(radius=1e-9))
    with pytest.warns(UserWarning, match=words("noise floor", "1e-09", "rounding", "Enlarge")):
        optimizer.step(player.closure())
    optimizer.step(player.closure())  # once


@pytest.mark.parametrize("name", mixadv.SOLVERS)
def test_a_head_that_starts_at_zero_is_warned_of_and_trained(name: str):
    player = small()
    nn.init.zeros_(player.model.head.weight)
    optimizer = wrapped(player, name)
    with pytest.warns(UserWarning, match=words("gradient", "exactly zero", "start at zero")):
        optimizer.step(player.closure())
    assert player.model.head.weight.any()
    optimizer.step(player.closure())  # once, and of nothing else
    assert optimizer.outcome.payoff != 0 or name in ("noise", "r3f")


def test_evaluation_asks_for_what_it_needs():
    player = small()
    with pytest.raises(GameError, match=words("PGD", "average", "average='uniform'")):
        mixadv.Game(player.model, PGD()).averaged().__enter__()
    optimizer = wrapped(player, MAT(learner_steps=2))
    game = optimizer.game
    with pytest.raises(GameError, match=words("samples", "samples=8")):
        _ = game.learner_samples
    optimizer.step(player.closure())
    for use in (lambda: game.averaged().__enter__(), lambda: game.load_state_dict({})):
        with pytest.raises(GameError, match=words("between rounds")):
            game.backward(lambda use=use: (use(), player.closure()())[1])


def test_a_mean_is_not_taken_of_particles_that_share_no_rows():
    strategy = mixadv.Strategy([torch.zeros(2, 5, 1)], log_weights=torch.zeros(2, 3))
    with pytest.raises(mixadv.GameError, match=words("3 predictions", "5 rows", "ensemble")):
        strategy.mean()


# Closures and batches that would be silently wrong ---------------------------------------------


@pytest.mark.parametrize("to_none", [True, False])
@pytest.mark.parametrize("whose", ["optimizer", "model"])
@pytest.mark.parametrize("name", ["fgm", "freelb"])
def test_a_closure_that_zeroes_gradients_is_refused(name: str, whose: str, to_none: bool):
    """The habit from LBFGS; it would wipe the gradients of the earlier passes of the round."""
    player = small()
    optimizer = wrapped(player, name)
    owner = optimizer if whose == "optimizer" else player.model

    def closure() -> Any:
        owner.zero_grad(set_to_none=to_none)
        return player.closure()()

    for way in ("step", "backward"):
        with pytest.raises(GameError, match=words("closure", "zero_grad", "round does")):
            play(optimizer, way)(closure)
        optimizer.zero_grad()
    earlier = small()
    game = Game(earlier.model, PGD())
    earlier.closure()()[0].backward()
    found = fingerprint(earlier.model)
    with pytest.raises(GameError, match="zero_grad"):
        game.backward(lambda: (earlier.model.zero_grad(), earlier.closure()())[1])
    assert_same(fingerprint(earlier.model), found)


@pytest.mark.parametrize("kind", ["symmetric_kl", symmetric_kl])
@pytest.mark.parametrize("start", [{"start": "zero"}, {"start_size": 0.0}])
@pytest.mark.parametrize("build", [SMART, MAT, ALUM, VAT])
def test_an_ascent_that_could_never_leave_zero_is_refused(build: Any, start: Any, kind: Any):
    with pytest.raises(ValueError, match="zero gradient"):
        build(divergence=kind, **start, temperature=0.0)
    build(divergence=kind, **start, temperature=0.1)


@pytest.mark.parametrize("build", [SMART, MAT, ALUM, VAT, R3F])
def test_detached_predictions_are_refused_where_they_are_compared(build: Any):
    setting = Setting()
    optimizer = wrapped(setting.player, build())
    with pytest.raises(GameError, match=words("predictions", "do not depend on δ", "detached")):
        optimizer.step(setting.returns(lambda a, b: (a, b.detach())))


def test_a_loss_of_one_number_in_brackets_is_one_for_the_batch():
    """As replicas return it: not one loss per sample."""
    seen = []
    for shape in ((), (1,)):
        player = small()
        game = Game(player.model, PGD(steps=2, temperature=0.0))
        game.backward(lambda p=player, s=shape: (lambda a, b: (a.reshape(s), b))(*p.closure()()))
        seen.append([game.strategy.points, game.outcome.payoff])
    assert_same(*seen)
    raw = Game(player.model, PGD(normalize="none"))
    with pytest.raises(GameError, match="raw gradient"):
        raw.backward(lambda: (lambda a, b: (a.reshape(1), b))(*player.closure()()))


def test_predictions_per_token_are_averaged_over_the_real_ones_without_a_mask_too():
    """The site knows padding by `padding_idx`; more of it changes nothing."""
    torch.manual_seed(0)
    words_, head = nn.Embedding(12, 6, padding_idx=0).double(), nn.Linear(6, 3).double()
    model = nn.Sequential(words_, head)
    ids = torch.randint(1, 12, (4, 5))
    payoffs = []
    for pads in (0, 7):
        padded = F.pad(ids, (0, pads))
        labels = F.pad(ids % 3, (0, pads), value=-100)

        def closure(padded: Tensor = padded, labels: Tensor = labels) -> Any:
            logits = model(padded)
            return F.cross_entropy(logits.flatten(0, 1), labels.flatten()), logits

        with Game(model, PGD(payoff="js")).rounds.open(closure) as update:
            (stage,) = update.stages
            delta = F.pad(torch.ones(4, 5, 6).double(), (0, 0, 0, pads))
            q = mixadv.Strategy([delta[None]])
            payoffs.append(float(stage.divergence(q, "js").detach()))
    assert payoffs[0] == pytest.approx(payoffs[1], rel=1e-12)
    assert payoffs[0] > 0


def test_batches_may_call_the_site_more_or_less_often():
    """Documents in chunks: what must not change is the number within a round."""
    player = small()
    game = Game(player.model, mixadv.FreeLB())
    for chunks in (1, 2, 1):

        def closure(chunks: int = chunks) -> Any:
            losses = [player.closure()()[0] for _ in range(chunks)]
            return torch.stack(losses).mean()

        game.backward(closure)
        assert len(game.strategy.points) == chunks


def test_static_graphs_are_refused(tmp_path: Any):
    with one_process(tmp_path):
        parallel = nn.parallel.DistributedDataParallel(small().model, static_graph=True)
        with pytest.raises(ValueError, match=r"static_graph=True.*drift apart"):
            Game(parallel, PGD())
