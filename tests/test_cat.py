"""CAT: one perturbation of the word embedding matrix, a contrastive loss, and its projection."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import SGD, AdamW

import mixadv
from mixadv.maths.contrastive import nt_xent
from tests.worlds import assert_resumes, classified, gradients, hidden_at, played
from tests.zoo import assert_same, player, small, without_dropout, wrapped

ENCODERS = ["bert", "roberta", "distilbert", "deberta", "electra", "albert", "modernbert"]
DECODERS = ["gpt2", "llama"]
RADIUS = 0.02


class Pairs(nn.Module):
    """Reads two texts with one embedding, as a bi-encoder does; returns logits."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(8, 4)
        self.join = nn.Linear(8, 5)
        self.head = nn.Linear(5, 3)

    def forward(self, one: Tensor, other: Tensor) -> Tensor:
        both = torch.cat([self.words(one).mean(1), self.words(other).mean(1).tanh()], 1)
        return self.head(torch.tanh(self.join(both)))


def pairs():
    torch.manual_seed(0)
    model, draw = Pairs().double(), torch.Generator().manual_seed(1)
    one, other = (torch.randint(0, 8, (6, n), generator=draw) for n in (3, 5))
    return model, classified(model, one, other, labels=torch.arange(6) % 3)


def by_hand(model, closure, source: nn.Module, name: str, solver) -> tuple[Tensor, list]:
    """Objective and gradients, with V + ε·sign(∂ℓ/∂V) for the embedding matrix V."""
    V = dict(model.named_parameters())[name]
    kept = []

    def views(module, args, output):
        first = output if isinstance(output, Tensor) else output[0]
        kept.append(first[:, 0] if first.dim() == 3 else first)

    def loss(matrix):
        torch.manual_seed(3)
        holder = nn.Module()
        holder.model, holder.forward = model, closure
        result = functional_call(holder, {f"model.{name}": matrix}, ())
        return result[0] if isinstance(result, tuple) else getattr(result, "loss", result)

    hook = source.register_forward_hook(views)
    clean = loss(V)
    (slope,) = torch.autograd.grad(clean, V, retain_graph=True)
    perturbed = loss(V + solver.radius * slope.sign())
    hook.remove()
    contrast = nt_xent(*kept, solver.contrast_temperature, solver.negatives)
    objective = (1 - solver.contrast_weight) / 2 * (
        clean + perturbed
    ) + solver.contrast_weight * contrast
    objective.backward()
    return objective.detach(), gradients(model)


def assert_played_by_hand(model, closure, source: str, name: str, **words) -> None:
    solver = mixadv.CAT(radius=RADIUS, unit="absolute", source=source, **words)
    torch.manual_seed(3)
    outcome = mixadv.Game(model, solver).backward(closure)
    found = gradients(model)
    objective, expected = by_hand(model, closure, model.get_submodule(source), name, solver)
    torch.testing.assert_close(outcome.objective, objective, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)


# The perturbation ---------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [*ENCODERS, *DECODERS])
def test_the_embedding_matrix_itself_is_perturbed(family):
    """With dropout on, tokens repeated within and across samples, and padding."""
    one = player(family, rows=5)
    one.model.double()
    one.batch["input_ids"].clamp_(max=15)
    embedding = one.model.get_input_embeddings().weight
    name = next(n for n, p in one.model.named_parameters() if p is embedding)
    assert_played_by_hand(one.model, one.closure(), one.model.base_model_prefix, name)


@pytest.mark.parametrize("negatives", ["all", "cross"])
@pytest.mark.parametrize("contrast", [0.0, 0.3, 1.0])
def test_weights_and_negatives_are_those_asked_for(contrast, negatives):
    one = small()
    words = {"contrast_weight": contrast, "negatives": negatives, "contrast_temperature": 0.5}
    assert_played_by_hand(one.model, one.closure(), "hidden", "embedding.weight", **words)


def test_a_token_read_in_two_calls_of_the_embedding_has_one_perturbation():
    model, closure = pairs()
    assert_played_by_hand(model, closure, "join", "words.weight")


@pytest.mark.parametrize("shape", [(6,), (6, 2, 3)])
def test_ids_of_any_shape_are_shared(shape):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(4, 3), nn.Tanh(), nn.Flatten(), nn.LazyLinear(2)).double()
    ids, labels = torch.randint(0, 4, shape), torch.arange(6) % 2
    model(ids)
    assert_played_by_hand(model, lambda: F.cross_entropy(model(ids), labels), "2", "0.weight")


def test_padding_has_no_say_in_the_perturbation_of_a_real_token_with_its_id():
    """Models that pad with their end token; this one even reads padding, with a weight."""

    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.head = nn.Embedding(4, 5), nn.Linear(5, 3)

        def forward(self, ids: Tensor, attention_mask: Tensor) -> Tensor:
            return self.head((self.words(ids) * (9 - 8 * attention_mask)[..., None]).sum(1))

    torch.manual_seed(0)
    model, ids = Reader().double(), torch.tensor([[1, 0, 2], [3, 2, 2], [1, 3, 2]])
    mask, labels = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 1, 0]]), torch.arange(3)
    words = {"radius": RADIUS, "unit": "absolute", "source": "head"}
    game = mixadv.Game(model, mixadv.CAT(**words))
    game.backward(lambda: F.cross_entropy(model(ids, mask), labels))
    embedded = model.words(ids).detach().requires_grad_()
    logits = model.head((embedded * (9 - 8 * mask)[..., None]).sum(1))
    (slope,) = torch.autograd.grad(F.cross_entropy(logits, labels), embedded)
    places = (ids == 2) & (mask > 0)
    expected = RADIUS * slope[places].sum(0).sign()
    assert not torch.equal(expected, RADIUS * slope[ids == 2].sum(0).sign())
    found = game.strategy.points[0][0]
    torch.testing.assert_close(found[places], expected.expand(2, -1))
    assert not found[mask == 0].any()


def test_two_embeddings_of_one_size_have_perturbations_of_their_own():
    """The rows of one say nothing about the rows of the other."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"one": nn.Embedding(5, 4), "other": nn.Embedding(5, 4)}).double()
    ids, labels = torch.randint(0, 5, (2, 6, 3)), torch.arange(6) % 4

    def closure():
        logits = model["one"](ids[0]).mean(1) - model["other"](ids[1]).mean(1).square()
        return F.cross_entropy(logits, labels)

    slopes = torch.autograd.grad(closure(), list(model.parameters()))
    words = {"radius": RADIUS, "unit": "absolute", "contrast_weight": 0.0, "source": "one"}
    game = mixadv.Game(model, mixadv.CAT(**words), site=["one", "other"])
    game.backward(closure)
    for call, slope in enumerate(slopes):
        torch.testing.assert_close(game.strategy.points[call][0], RADIUS * slope.sign()[ids[call]])


def test_without_sharing_each_place_has_a_perturbation_of_its_own():
    one = small()
    without_dropout(one.model)
    ids, places = one.batch["ids"], []
    for shared in (True, False):
        words = {"radius": RADIUS, "unit": "absolute", "source": "hidden", "shared": shared}
        game = mixadv.Game(one.model, mixadv.CAT(**words))
        game.backward(one.closure())
        delta = game.strategy.points[0][0]
        assert not delta[ids == 0].any()
        assert (delta[ids != 0].abs() == RADIUS).all()
        places.append({i: delta[ids == i].unique(dim=0) for i in range(1, 12) if (ids == i).any()})
    assert all(len(rows) == 1 for rows in places[0].values())
    assert any(len(rows) > 1 for rows in places[1].values())


SHARED = {"shared": True, "source": "hidden"}


@pytest.mark.parametrize("norm", ["l1", "l2", "linf"])
@pytest.mark.parametrize("per", ["sample", "token"])
@pytest.mark.parametrize("normalize", ["steepest", "norm", "none"])
def test_a_shared_perturbation_is_shared_or_refused(norm, per, normalize):
    words = {"norm": norm, "per": per, "normalize": normalize, **SHARED}
    if per == "sample" and (norm, normalize) != ("linf", "steepest"):
        with pytest.raises(ValueError, match=f"'{norm}'.*normalize='{normalize}'.*shared=False"):
            mixadv.CAT(**words)
        return
    one = small(reduction="none")
    without_dropout(one.model)
    game = mixadv.Game(one.model, mixadv.CAT(**words))
    game.backward(one.closure())
    ids, delta = one.batch["ids"], played(game)
    for token in range(1, 12):
        places = delta[ids == token]
        torch.testing.assert_close(places, places[:1].expand_as(places))
    assert delta[ids != 0].any(1).all()


# The head -----------------------------------------------------------------------------------------


def projected(seed=0, base=SGD, **words):
    """A model, a head and their wrapped optimizer."""
    one = small(seed=seed)
    head = nn.Linear(5, 4).double()
    solver = mixadv.CAT(source="hidden", head=head, **words)
    return one, head, wrapped(one.model, solver, base, lr=0.05)


def test_the_loss_is_that_of_the_projected_views():
    one, head, optimizer = projected(contrast_weight=1.0)
    torch.manual_seed(3)
    outcome = optimizer.game.backward(one.closure())
    found = [head.weight.grad.clone(), one.model.hidden.weight.grad.clone()]
    one.model.zero_grad()
    head.zero_grad()
    delta = optimizer.game.unit * played(optimizer.game)
    loss = nt_xent(*map(head, hidden_at(one, 0, delta)))
    loss.backward()
    torch.testing.assert_close(outcome.objective, loss.detach())
    torch.testing.assert_close(found, [head.weight.grad, one.model.hidden.weight.grad])


def test_a_head_is_one_group_of_the_optimizer_and_trained():
    one, head, optimizer = projected()
    groups = optimizer.param_groups
    assert [len(g["params"]) for g in groups] == [len(list(one.model.parameters())), 2]
    assert {id(p) for p in groups[1]["params"]} == {id(p) for p in head.parameters()}
    assert groups[1]["lr"] == groups[0]["lr"]
    before = head.weight.detach().clone()
    optimizer.step(one.closure())
    assert not torch.equal(head.weight, before)
    assert all(p.grad is None for p in head.parameters())


def test_a_head_that_the_optimizer_holds_already_is_not_added_again():
    one, head = small(), nn.Linear(5, 4).double()
    base = SGD([*one.model.parameters(), *head.parameters()], lr=0.05)
    mixadv.wrap(base, one.model, mixadv.CAT(head=head))
    assert len(base.param_groups) == 1


def test_without_a_head_nothing_is_added():
    assert mixadv.CAT().head is None
    one = small()
    optimizer = wrapped(one.model, mixadv.CAT())
    assert len(optimizer.param_groups) == 1
    assert optimizer.game.state_dict()["modules"] == {}


def test_a_round_with_a_head_is_explained_and_the_head_left_alone():
    one, head = small(), nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4)).double()
    optimizer = wrapped(one.model, mixadv.CAT(source="hidden", head=head))
    before = copy.deepcopy(head.state_dict())
    told = optimizer.game.explain(one.closure()).passes
    assert told == mixadv.Game(one.model, mixadv.CAT(source="hidden")).explain().passes
    assert_same(head.state_dict(), before)
    optimizer.step(one.closure())
    outcome = optimizer.outcome
    counted = (outcome.forwards, outcome.delta_backwards, outcome.theta_backwards)
    assert counted == (told.forwards, told.delta_backwards, told.theta_backwards)


def test_a_head_without_an_optimizer_is_refused():
    solver = mixadv.CAT(head=nn.Linear(5, 4))
    with pytest.raises(
        ValueError, match=r"CAT trains head=, which needs the optimizer: use mixadv"
    ):
        mixadv.Game(small().model, solver)


def test_a_head_that_is_no_module_is_refused():
    with pytest.raises(TypeError, match=r"head must be a torch\.nn\.Module or None, got 5"):
        mixadv.CAT(head=5)


def test_a_head_is_saved_and_restored_with_its_game(tmp_path):
    """A run that is resumed with another head at first is the run that was not interrupted."""
    heads = []

    def build(seed):
        one, head, optimizer = projected(seed, AdamW)
        assert not heads or not torch.equal(head.weight, heads[0].weight)
        heads.append(head)
        return one, optimizer

    assert_resumes(build, tmp_path, before=2, after=1)
    assert_same(heads[1].state_dict(), heads[0].state_dict())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_has_a_head_of_its_own(copied):
    one, head, optimizer = projected()
    optimizer.step(one.closure())
    twin = copied(optimizer)
    before = head.weight.detach().clone()
    twin.step(one._replace(model=twin.game.model).closure())
    assert torch.equal(head.weight, before)
    moved = twin.game.solver.head.weight
    assert not torch.equal(moved, before)
    assert any(p is moved for p in twin.param_groups[1]["params"])
