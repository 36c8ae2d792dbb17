"""ContinuousAT and targeted LAT: one full step of each, computed again by hand in float64."""

import copy
import functools
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import mixadv
from mixadv.tokens import (
    ChatBatch,
    capo,
    chat_batch,
    continuous_at,
    latent_at,
    latent_dpo,
    preference_batches,
    rewritten,
)
from tests.chat_zoo import FAMILIES, chatting, speaking

ROWS = [
    {"prompt": "What is a film?", "chosen": "I would rather not.", "rejected": "A story."},
    {"prompt": "Why? Is it good?", "chosen": "No.", "rejected": "It is a very good film, indeed."},
]
RATE, RADIUS, STEPS = 0.05, 0.3, 2
LAYERS = (None, "model.layers.0")
PADDED = (0, 0, -100, False)  # what fills ids, mask, labels and places
LEARNERS = {
    "continuous_at": continuous_at,
    "latent_at": latent_at,
    "capo": lambda model, *batches: capo(model, *batches, reference=left(model)),
    "latent_dpo": lambda model, *batches: latent_dpo(model, *batches, reference=left(model)),
}


class Told:
    """A batch read through embeddings, with δ of its own; losses written out token by token."""

    def __init__(self, model: Any, batch: ChatBatch, site: str) -> None:
        self.model, self.batch, self.site = model, batch, site

    def log_p(self, delta: Tensor | None) -> list[Tensor]:
        """Return the log-probabilities of each row's answer."""
        module = self.model.get_submodule(self.site)
        add = lambda module, args, output: output if delta is None else output + delta  # noqa: E731
        handle = module.register_forward_hook(add)
        logits = self.model(**self.batch.inputs).logits
        handle.remove()
        logs, found = logits.log_softmax(-1), []
        for row, ids in enumerate(self.batch.labels):
            places = [i for i in range(1, len(ids)) if ids[i] >= 0]
            found.append(torch.stack([logs[row, i - 1, ids[i]] for i in places]))
        return found


def cross_entropy(log_p: list[Tensor]) -> Tensor:
    return torch.stack([-row.mean() for row in log_p])


def unlikely(log_p: list[Tensor]) -> Tensor:
    rows = []
    for row in log_p:
        kept = [-torch.log(1 - x.exp()) if x >= -5 else 0 * x for x in row]
        rows.append(torch.stack(kept).mean())
    return torch.stack(rows)


def floor(losses: Tensor, at: float) -> Tensor:
    return torch.stack([x if x > at else at + 1e-3 * (x - at) for x in losses])


def left(model: nn.Module) -> nn.Module:
    """Return another model, as the one that is not to be left."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.9)
    return other


Read = list[Tensor]  # log-probabilities of each row's answer


def margin(good: Read, bad: Read) -> Tensor:
    return torch.stack([a.mean() - b.mean() for a, b in zip(good, bad, strict=True)])


def odds(good: Read, bad: Read, known: tuple[Read, Read]) -> Tensor:
    """Return β·h with sums over tokens."""
    pairs = zip(good, bad, *known, strict=True)
    return torch.stack([0.3 * ((a.sum() - c.sum()) - (b.sum() - d.sum())) for a, b, c, d in pairs])


PAYOFF: dict[str, Callable[[Read, Read, tuple[Read, Read]], Tensor]] = {
    "continuous_at": lambda good, bad, known: -cross_entropy(bad),
    "capo": lambda good, bad, known: -cross_entropy(bad),
    "latent_at": lambda good, bad, known: -0.5 * cross_entropy(bad) - 0.5 * unlikely(good),
    "latent_dpo": lambda good, bad, known: -torch.log1p(odds(good, bad, known).exp()),
}
LOSS: dict[str, Callable[[Read, Read, tuple[Read, Read]], Tensor]] = {
    "continuous_at": lambda good, bad, known: (
        0.5 * floor(-cross_entropy(bad), -5.0) + 0.5 * floor(cross_entropy(good), 0.5)
    ),
    "latent_at": lambda good, bad, known: 0.5 * cross_entropy(good) + 0.5 * unlikely(bad),
    "capo": lambda good, bad, known: (margin(good, bad) - margin(*known) - 2) ** 2,
    "latent_dpo": lambda good, bad, known: torch.log1p((-odds(good, bad, known)).exp()),
}
UTILITY = {"continuous_at": 1.0, "latent_at": 1.5, "capo": 1.0, "latent_dpo": 1.0}


def by_hand(name: str, model: Any, batches: tuple[ChatBatch, ...], site: str) -> Tensor:
    """Take the step on a model; return δ."""
    chosen, rejected, others = (Told(model, batch, site) for batch in batches)
    with torch.no_grad():
        known = tuple(Told(left(model), batch, site).log_p(None) for batch in batches[:2])
    where = batches[1].where[..., None].double()
    seen: list[Tensor] = []
    handle = model.get_submodule(site).register_forward_hook(lambda m, a, out: seen.append(out))
    chosen.log_p(None)
    handle.remove()
    unit = seen[0].detach()[batches[0].where].norm(dim=-1).mean()
    delta = torch.zeros_like(seen[0]).detach()
    for _ in range(STEPS):
        delta.requires_grad_(True)
        gain = PAYOFF[name](chosen.log_p(delta), rejected.log_p(delta), known).sum()
        [gradient] = torch.autograd.grad(gain, delta)
        gradient = gradient * where
        length = gradient.norm(dim=-1, keepdim=True).clamp(min=1e-300)
        delta = delta.detach() + RADIUS / STEPS * 1.5 * unit * gradient / length
        size = delta.norm(dim=-1, keepdim=True).clamp(min=1e-300)
        delta = delta * (RADIUS * unit / size).clamp(max=1)
    loss = LOSS[name](chosen.log_p(delta), rejected.log_p(delta), known).mean()
    loss = loss + UTILITY[name] * cross_entropy(others.log_p(None)).mean()
    model.zero_grad()
    loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= RATE * parameter.grad
    return delta


@functools.cache
def learned(family: str) -> tuple[nn.Module, tuple[ChatBatch, ...]]:
    """Return a model that has begun to learn both answers: some tokens are likely, some are not."""
    tokenizer = chatting()
    model = speaking(family, tokenizer)
    others = chat_batch(tokenizer, ["Say it."], ["A film about pictures."])
    batches = (*preference_batches(tokenizer, ROWS), others)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(25):
        optimizer.zero_grad()
        for batch in batches[:2]:
            logits: Any = model(**batch.inputs).logits
            F.cross_entropy(logits[:, :-1].mT, batch.labels[:, 1:]).backward()
        optimizer.step()
    return model, batches


def scene(family: str) -> tuple[nn.Module, tuple[ChatBatch, ...]]:
    model, batches = learned(family)
    return copy.deepcopy(model), batches


@pytest.mark.parametrize(
    ("name", "family", "site"),
    [("continuous_at", family, None) for family in FAMILIES]
    + [("capo", "Llama", None), ("latent_dpo", "Mistral", None)]
    + [(name, "Llama", site) for name in ("latent_at", "latent_dpo") for site in LAYERS],
)
def test_a_step_is_that_of_the_equations(name: str, family: str, site: str | None):
    model, batches = scene(family)
    own = {"GPT2": "transformer.wte"}.get(family, "model.embed_tokens")
    expected = copy.deepcopy(model)
    answers = [unlikely(Told(model, batch, site or own).log_p(None)) for batch in batches]
    assert all(losses.any() for losses in answers[:2])  # not all tokens are hopeless
    solver = mixadv.PGD(
        steps=STEPS, radius=RADIUS, step_size=1.5 * RADIUS / STEPS, per="token", start="zero"
    )
    optimizer = mixadv.wrap(torch.optim.SGD(model.parameters(), lr=RATE), model, solver, site=site)
    optimizer.step(**LEARNERS[name](model, *batches))
    delta = by_hand(name, expected, batches, site or own)
    game = optimizer.game
    played = game.strategy.points[0][0] * game.unit
    assert not played[~batches[0].where].any()
    torch.testing.assert_close(played.double(), delta, rtol=1e-6, atol=1e-9)
    for key, value in expected.named_parameters():
        torch.testing.assert_close(model.get_parameter(key), value, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", LEARNERS)
def test_without_other_rows_nothing_is_retained(name: str):
    model, (chosen, rejected, _) = scene("Llama")
    goals = LEARNERS[name](model, chosen, rejected)
    assert set(goals) == {"closure", "adversary", "where"}


@pytest.mark.parametrize("goals", [capo, latent_dpo])
def test_adapters_that_are_off_are_the_reference(goals: Any):
    model, (chosen, rejected, _) = scene("Llama")
    adapted: Any = peft.get_peft_model(
        copy.deepcopy(model), peft.LoraConfig(target_modules=["q_proj"])
    )
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.3)
    how = ({}, {"reference": model}, {"reference": adapted})
    own, given, same = (goals(adapted, chosen, rejected, **h)["closure"]() for h in how)
    torch.testing.assert_close(own, given, rtol=1e-10, atol=0)
    assert (own - same).abs().min() > 1e-3


@pytest.mark.parametrize("goals", [capo, latent_dpo])
def test_what_is_frozen_in_an_adapter_stays_so_when_it_is_put_on_again(goals: Any):
    model, (chosen, rejected, _) = scene("Llama")
    adapted: Any = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    for name, parameter in adapted.named_parameters():
        if "lora_A" in name:
            parameter.requires_grad_(False)
    before = {name: p.requires_grad for name, p in adapted.named_parameters()}
    goals(adapted, chosen, rejected)["closure"]()
    assert {name: p.requires_grad for name, p in adapted.named_parameters()} == before


@pytest.mark.parametrize("more", ["the embedding", "biases"])
def test_weights_that_train_beside_adapters_leave_no_reference(more: str):
    """Without its adapters such a model is another one after each step."""
    model, (chosen, rejected, _) = scene("Qwen2")
    bias: Any = "all" if more == "biases" else "none"
    config = peft.LoraConfig(target_modules=["q_proj"], bias=bias)
    adapted: Any = peft.get_peft_model(copy.deepcopy(model), config)
    if more == "the embedding":
        adapted.get_input_embeddings().weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"no adapter's train too, .* among them: without"):
        capo(adapted, chosen, rejected)
    capo(adapted, chosen, rejected, reference=model)["closure"]()


ADAPTERS: dict[str, Any] = {
    "saved modules": lambda: peft.LoraConfig(
        target_modules=["q_proj"], modules_to_save=["lm_head"]
    ),
    "AdaLoRA": lambda: peft.AdaLoraConfig(target_modules=["q_proj"], total_step=10),
    "adaption prompt": lambda: peft.AdaptionPromptConfig(
        adapter_layers=1, adapter_len=2, task_type="CAUSAL_LM"
    ),
    "(IA)³": lambda: peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[]),
    "prompt tuning": lambda: peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"),
}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_whatever_peft_switches_off_leaves_the_reference(kind: str):
    model, (chosen, rejected, _) = scene("Llama")
    adapted: Any = peft.get_peft_model(copy.deepcopy(model), ADAPTERS[kind]())
    assert any(p.requires_grad for p in adapted.parameters())
    capo(adapted, chosen, rejected)  # reads it


@pytest.mark.parametrize("goals", [continuous_at, latent_at, capo, latent_dpo])
@pytest.mark.parametrize("name", ["chosen", "rejected", "others"])
def test_rows_that_are_no_batch_are_refused(goals: Any, name: str):
    batch = chat_batch(chatting(), ["Why?"], ["So."])
    batches = {"chosen": batch, "rejected": batch, "others": batch, name: [{"prompt": "Why?"}]}
    said = rf"{goals.__name__}: {name} must be a ChatBatch, got \[{{'prompt'.*preference_batches\("
    with pytest.raises(TypeError, match=said):
        goals(torch.nn.Linear(1, 1), **batches)


@pytest.mark.parametrize("goals", [capo, latent_dpo])
def test_no_reference_is_guessed(goals: Any):
    model, (chosen, rejected, _) = scene("Llama")
    with pytest.raises(ValueError, match=r"reference=copy.deepcopy\(model\)"):
        goals(model, chosen, rejected)
    with pytest.raises(ValueError, match="above 0"):
        goals(model, chosen, rejected, reference=model, beta=0)


def test_where_nothing_is_preferred_yet_both_players_stand_at_log_two():
    """h is 0 at a model that is its own reference, and δ = 0; what one gains the other loses."""
    model, (chosen, rejected, _) = scene("Llama")
    goals = latent_dpo(model, chosen, rejected, reference=model)
    expected = torch.full((2,), 2.0, dtype=torch.float64).log()
    for name, sign in (("closure", 1), ("adversary", -1)):
        torch.testing.assert_close(sign * goals[name](), expected, rtol=1e-10, atol=0)
    optimizer = mixadv.wrap(
        torch.optim.SGD(model.parameters(), lr=0.0), model, mixadv.PGD(steps=3, per="token")
    )
    optimizer.step(**goals)
    assert optimizer.outcome.payoff > -expected[0]
    assert optimizer.outcome.objective > expected[0]


@given(share=st.floats(0, 1), seed=st.integers(0, 2**31))
def test_a_share_of_prompts_is_rewritten(share: float, seed: int):
    rows = [{"prompt": f"{i}", "chosen": "So."} for i in range(200)]
    ways = {row["prompt"]: [f"{row['prompt']}!", f"{row['prompt']}?"] for row in rows}
    source = torch.Generator().manual_seed(seed)
    found = rewritten(rows, ways.__getitem__, share, source)
    changed = [(old["prompt"], new["prompt"]) for old, new in zip(rows, found, strict=True)]
    assert all(new == old or new in ways[old] for old, new in changed)
    count = sum(new != old for old, new in changed)
    assert abs(count - 200 * share) <= 6 * (200 * share * (1 - share)) ** 0.5 + 1e-9
    assert all(new["chosen"] == "So." for new in found)
    assert rewritten(rows, lambda prompt: [], 1.0) == rows


def test_one_wording_is_not_read_by_its_letters():
    with pytest.raises(ValueError, match="a list of texts, and returned 'WHY'"):
        rewritten([{"prompt": "why"}], str.upper, 1.0)


def test_messages_are_not_rewritten():
    with pytest.raises(ValueError, match=r"Row 0 .* not a text"):
        rewritten([{"prompt": [{"role": "user", "content": "Why?"}]}], lambda prompt: [])


@pytest.mark.parametrize("name", PAYOFF)
def test_prompts_at_other_places_meet_the_same_delta(name: str):
    """Padded on the left a prompt lies elsewhere before another answer: one mask would be wrong."""
    found = []
    for way in ("right", "left", "longer"):
        model, (*_, others) = scene("Llama")
        side = "left" if way == "left" else "right"
        chosen, rejected = preference_batches(chatting(), ROWS, padding_side=side)
        assert torch.equal(chosen.where, rejected.where) == (side == "right")
        if way == "longer":
            rejected = ChatBatch(
                *(F.pad(x, (0, 1), value=v) for x, v in zip(rejected, PADDED, strict=True))
            )
        solver = mixadv.PGD(steps=STEPS, radius=RADIUS, per="token", start="zero")
        optimizer = mixadv.wrap(torch.optim.SGD(model.parameters(), lr=RATE), model, solver)
        optimizer.step(**LEARNERS[name](model, chosen, rejected, others))
        found.append([p.detach() for p in model.parameters()])
    for other in found[1:]:
        for mine, theirs in zip(found[0], other, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)  # rotations are of fp32


SOLVERS = {
    "": ("noise", "fgm", "pgd", "freelb", "textat", "cat", "awp"),
    "compares predictions": ("r3f", "alum", "smart", "trades", "mart", "mat"),
    "takes no adversary=": ("freeat", "creat", "vat", "group_dro", "cvar", "chi_square"),
    "nobody moves them": ("sam", "asam"),
}


def refusal(solver: mixadv.Solver) -> str:
    """Return what a solver says to the goals of ContinuousAT; nothing where it plays them."""
    tokenizer = chatting()
    model = speaking("Llama", tokenizer)
    optimizer = mixadv.wrap(torch.optim.SGD(model.parameters(), RATE), model, solver)
    try:
        optimizer.step(**continuous_at(model, *preference_batches(tokenizer, ROWS)))
    except mixadv.GameError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("said", SOLVERS)
def test_goals_are_played_by_the_solvers_that_the_page_names(said: str):
    assert sorted(name for names in SOLVERS.values() for name in names) == sorted(mixadv.SOLVERS)
    for name in SOLVERS[said]:
        found = refusal(mixadv.SOLVERS[name]())
        assert said in found if said else not found, name


@pytest.mark.parametrize(
    ("goals", "calls"), [(continuous_at, 13), (latent_at, 23), (capo, 15), (latent_dpo, 25)]
)
def test_a_goal_that_reads_two_answers_calls_the_model_twice(goals: Any, calls: int):
    """The page has these counts beside those of `explain`."""
    tokenizer = chatting()
    lora = peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(speaking("Llama", tokenizer), lora)
    batches = [*preference_batches(tokenizer, ROWS), chat_batch(tokenizer, ["Why?"], ["So."])]
    solver = mixadv.PGD(steps=10, step_size=0.02, radius=0.05, per="token", start="zero")
    optimizer = mixadv.wrap(torch.optim.SGD(model.parameters(), RATE), model, solver)
    optimizer.step(**goals(model, *batches))  # the first round has checks besides
    read: list[Any] = []
    model.register_forward_hook(lambda *call: read.append(0))
    asked = goals(model, *batches)
    optimizer.step(**asked)
    assert len(read) == calls
    told = str(optimizer.game.explain(**asked))
    assert "12 forwards" in told
    assert "about 8.7 plain steps" in told


def test_prompts_that_differ_are_refused():
    model, (chosen, rejected, _) = scene("Llama")
    other = chosen._replace(input_ids=chosen.input_ids + chosen.where.long())
    optimizer = mixadv.wrap(
        torch.optim.SGD(model.parameters(), lr=RATE), model, mixadv.PGD(per="token")
    )
    with pytest.raises(mixadv.GameError, match="row 0"):
        optimizer.step(**continuous_at(model, other, rejected))
