"""Tiny models of every family, built in code, with batches to train them on."""

import contextlib
import copy
import functools
import gc
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

import mixadv

VOCABULARY = 99
PAD = 1
LABELS = 3


class Player(NamedTuple):
    """A model with a batch: `closure(model)` is what a game is given."""

    model: nn.Module
    batch: dict[str, Tensor]
    forward: Callable[[nn.Module, dict[str, Tensor]], Any]

    def closure(self, **changes: Tensor) -> Callable[[], Any]:
        return lambda: self.forward(self.model, {**self.batch, **changes})


SIZE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 40,
    "pad_token_id": PAD,
    "num_labels": LABELS,
}
_DROPOUT = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
SEQ2SEQ = {
    "vocab_size": VOCABULARY,
    "d_model": 16,
    "pad_token_id": PAD,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "num_labels": LABELS,
}


def tiny_bert(words: int, **changes: Any) -> transformers.BertConfig:
    """Return the size of a BERT of one layer."""
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return transformers.BertConfig(
        **{"vocab_size": words, "intermediate_size": 24, **size, **changes}
    )


def _bert() -> nn.Module:
    config = transformers.BertConfig(**SIZE, **_DROPOUT)
    return transformers.BertForSequenceClassification(config)


def _roberta() -> nn.Module:
    config = transformers.RobertaConfig(**SIZE, **_DROPOUT)
    return transformers.RobertaForSequenceClassification(config)


def _distilbert() -> nn.Module:
    config = transformers.DistilBertConfig(
        vocab_size=VOCABULARY,
        dim=16,
        n_layers=2,
        n_heads=2,
        hidden_dim=24,
        max_position_embeddings=40,
        pad_token_id=PAD,
        num_labels=LABELS,
    )
    return transformers.DistilBertForSequenceClassification(config)


def _deberta() -> nn.Module:
    config = transformers.DebertaV2Config(
        **SIZE, **_DROPOUT, relative_attention=True, position_buckets=8, pos_att_type="p2c|c2p"
    )
    return transformers.DebertaV2ForSequenceClassification(config)


def _electra() -> nn.Module:
    config = transformers.ElectraConfig(**SIZE, **_DROPOUT, embedding_size=12)
    return transformers.ElectraForSequenceClassification(config)


def _albert() -> nn.Module:
    config = transformers.AlbertConfig(**SIZE, **_DROPOUT, embedding_size=12)
    return transformers.AlbertForSequenceClassification(config)


def _modernbert() -> nn.Module:
    config = transformers.ModernBertConfig(
        **SIZE,
        bos_token_id=0,
        eos_token_id=2,
        cls_token_id=0,
        sep_token_id=2,
        embedding_dropout=0.1,
        mlp_dropout=0.1,
        attn_implementation="sdpa",
    )
    return transformers.ModernBertForSequenceClassification(config)


def _gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=16,
        n_layer=2,
        n_head=2,
        n_positions=40,
        pad_token_id=PAD,
        bos_token_id=0,
        eos_token_id=2,
        num_labels=LABELS,
    )
    return transformers.GPT2ForSequenceClassification(config)


def _llama(causal: bool = False) -> nn.Module:
    config = transformers.LlamaConfig(
        **SIZE, num_key_value_heads=2, attention_dropout=0.1, bos_token_id=0, eos_token_id=2
    )
    if causal:
        return transformers.LlamaForCausalLM(config)
    return transformers.LlamaForSequenceClassification(config)


def t5_config(layers: int) -> transformers.T5Config:
    """Return the size of a tiny T5."""
    return transformers.T5Config(**SEQ2SEQ, d_kv=8, d_ff=24, num_layers=layers, num_heads=2)


def bart_config(layers: int) -> transformers.BartConfig:
    """Return the size of a tiny BART."""
    return transformers.BartConfig(
        **SEQ2SEQ,
        encoder_layers=layers,
        decoder_layers=layers,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=24,
        decoder_ffn_dim=24,
        max_position_embeddings=40,
        bos_token_id=0,
    )


def _t5() -> nn.Module:
    return transformers.T5ForSequenceClassification(t5_config(2))


def _bart() -> nn.Module:
    return transformers.BartForSequenceClassification(bart_config(2))


class Vision(nn.Module):
    """Convolution, BatchNorm, dropout and a head; returns plain logits."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(1, 8, 3, padding=1)
        self.normalise = nn.BatchNorm2d(8)
        self.dropout = nn.Dropout(0.1)
        self.head = nn.Linear(8 * 8 * 8, LABELS)

    def forward(self, images: Tensor) -> Tensor:
        x = torch.relu(self.normalise(self.convolution(images)))
        return self.head(self.dropout(x.flatten(1)))


class Small(nn.Module):
    """Embedding, dropout, BatchNorm and a head; returns logits. One layer is never used."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(12, 6, padding_idx=0)
        self.dropout = nn.Dropout(0.2)
        self.hidden = nn.Linear(6, 5)
        self.normalise = nn.BatchNorm1d(5)
        self.head = nn.Linear(5, LABELS)
        self.unused = nn.Linear(2, 2)

    def forward(self, ids: Tensor) -> Tensor:
        real = (ids != 0).unsqueeze(-1)
        x = (self.dropout(self.embedding(ids)) * real).sum(1) / real.sum(1)
        return self.head(self.normalise(torch.tanh(self.hidden(x))))


TRANSFORMERS: dict[str, Callable[[], nn.Module]] = {
    "bert": _bert,
    "roberta": _roberta,
    "distilbert": _distilbert,
    "deberta": _deberta,
    "electra": _electra,
    "albert": _albert,
    "modernbert": _modernbert,
    "gpt2": _gpt2,
    "llama": _llama,
    "t5": _t5,
    "bart": _bart,
}
FAMILIES = [*TRANSFORMERS, "llama-causal", "vision"]
ROWS = {n: mixadv.make_solver(n, steps=1) for n, s in mixadv.SOLVERS.items() if s().weighs}
"""Solvers that weigh rows, here with a δ that takes a step."""
AROUND = {
    solver.name: replace(solver, solver=mixadv.PGD())
    for solver in map(mixadv.make_solver, mixadv.SOLVERS)
    if solver.on_inputs is not solver
}
"""Solvers that move the weights, here around one that moves inputs."""
ASCENDING = [name for name in mixadv.SOLVERS if name not in AROUND]
"""Solvers whose words are those of their own ascent of δ; of the others it is the inner one's."""
MOVING = ROWS | AROUND
"""Solvers whose δ sits out by default, here with one."""
# ALUM's round, with steps and without; rows as group DRO weighs them; weights as AWP moves them
TWINS = {"trades", "r3f", "cvar", "chi_square", "sam", "asam"}
USUAL = ("freelb", "smart", "mat")  # one of each kind: the loss, a divergence, mixed


def slow_but(usual: Iterable[str], names: Iterable[str]) -> list[Any]:
    """Return names to test; those that are not of the usual are slow tests."""
    return [_test(name, usual=name in usual) for name in names]


def pairs(families: Iterable[str]) -> list[Any]:
    """Return each family with each solver; BERT plays all, the others' unusual ones are slow."""
    return [
        _test(family, name, usual=family == "bert" or name in USUAL)
        for family in families
        for name in mixadv.SOLVERS
    ]


def _test(*values: str, usual: bool) -> Any:
    marks = () if usual else pytest.mark.slow
    return pytest.param(*values, marks=marks, id="-".join(values))


def text_batch(rows: int, length: int = 9, side: str = "right", seed: int = 0) -> dict[str, Tensor]:
    """Return ids, mask and learnable labels; half of the rows are padded on one side.

    Every row ends with the end token (T5 and BART pool there), and its first token tells its label.
    """
    draw = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, LABELS, (rows,), generator=draw)
    ids = torch.randint(10, VOCABULARY, (rows, length), generator=draw)
    mask = torch.ones_like(ids)
    for row in range(rows):
        real = length - (row % 2) * 3
        part = slice(0, real) if side == "right" else slice(length - real, length)
        kept = ids[row, part].clone()
        kept[0], kept[-1] = 3 + labels[row], 2
        ids[row], mask[row] = PAD, 0
        ids[row, part], mask[row, part] = kept, 1
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def player(family: str, rows: int = 32, side: str = "right", seed: int = 0) -> Player:
    """Return a fresh model of a family, in training mode, with a batch of `rows` rows."""
    torch.manual_seed(seed)
    if family == "vision":
        draw = torch.Generator().manual_seed(seed)
        labels = torch.randint(0, LABELS, (rows,), generator=draw)
        images = torch.randn(rows, 1, 8, 8, generator=draw) + 0.5 * labels.view(-1, 1, 1, 1)
        batch = {"images": images, "labels": labels}

        def seen(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
            logits = model(batch["images"])
            return F.cross_entropy(logits, batch["labels"]), logits

        return Player(Vision().train(), batch, seen)
    batch = text_batch(rows, side=side, seed=seed)
    if family == "llama-causal":
        batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        model = _llama(causal=True)
    else:
        model = TRANSFORMERS[family]()
    return Player(model.train(), batch, lambda model, batch: model(**batch))


def small(rows: int = 6, seed: int = 0, reduction: str = "mean") -> Player:
    """Return a `Small` model in float64 and training mode; its closure returns (loss, logits)."""
    torch.manual_seed(seed)
    ids, labels = torch.randint(1, 12, (rows, 5)), torch.randint(0, LABELS, (rows,))
    ids[::2, 3:] = 0

    def seen(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        logits = model(batch["ids"])
        return F.cross_entropy(logits, batch["labels"], reduction=reduction), logits

    return Player(Small().double().train(), {"ids": ids, "labels": labels}, seen)


_STEPS = r"FreeAT takes an optimizer step after each of its passes.*call optimizer\.step\(closure\)"
_TOKENS = r"TextAT keeps a perturbation for each token, and the site .* is not an embedding"
_IN_TRAINER = r"FreeAT takes an optimizer step.*Trainer takes one step per batch: write a loop"
_SHARDED = r"fully_shard.*use game\.backward"
_TWICE = r"CAT differentiates the clean pass twice.*checkpointing.*: set use_reentrant=False"
_ROWS = r"the closure returned one loss for all: return one loss per sample"
# What a solver cannot play, by its name and a word for the way, the site or the model, and what it
# says instead.
CANNOT: dict[tuple[str, str], str] = {
    ("freeat", "backward"): _STEPS,
    ("freeat", "loss"): _STEPS,
    ("freeat", "Trainer"): _IN_TRAINER,
    **{
        (name, "loss of shards"): _SHARDED
        for name in ("fgm", "freelb", "textat", "recomputed", *AROUND)
    },
    ("textat", "hidden layer"): _TOKENS,
    ("textat", "vision"): _TOKENS,
    ("cat", "reentrant"): _TWICE,
    **{(name, "SFTTrainer"): _ROWS for name in ROWS},
}

REFUSED: dict[str, str] = {}
"""The reasons of tests that passed by being refused, as they run."""
CHANGED: set[str] = set()
"""Those of them that went on to play, with the change that the reason names."""


def note_refusal(reason: str, changed: bool = False) -> None:
    """Note that the test that runs passes by being refused, or plays what the reason names."""
    test = os.environ["PYTEST_CURRENT_TEST"].rpartition(" ")[0]
    REFUSED[test] = reason
    if changed:
        CHANGED.add(test)


def or_refused(*words: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorate a test of a solver: what it cannot play is refused instead, with the reason.

    The test takes a `solver`, or its `name`. What it plays is said by its other arguments, and by
    `words`, as `CANNOT` has them.
    """

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(test)
        def run(**arguments: Any) -> None:
            name = arguments.get("name") or arguments["solver"].name
            said = [*words, *(v for v in arguments.values() if isinstance(v, str))]
            reasons = [CANNOT[name, word] for word in said if (name, word) in CANNOT]
            if not reasons:
                test(**arguments)
                return
            with pytest.raises((mixadv.GameError, ValueError), match=reasons[0]) as caught:
                test(**arguments)
            note_refusal(str(caught.value))

        return run

    return decorate


def stepwise(optimizer: mixadv.GameOptimizer) -> list[dict[str, Tensor]]:
    """Return a list that fills with the gradients of each optimizer step, by parameter name."""
    seen: list[dict[str, Tensor]] = []

    def note(*_: Any) -> None:
        named = optimizer.game.model.named_parameters()
        seen.append({n: p.grad.clone() for n, p in named if p.grad is not None})

    optimizer.base.register_step_pre_hook(note)
    return seen


def fingerprint(model: nn.Module, optimizer: Any = None) -> dict[str, Any]:
    """Return copies of all that a refused or interrupted round must leave as it found it."""
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return {
        "identities": [id(t) for t in (*model.parameters(), *model.buffers())],
        "weights": {n: p.detach().clone() for n, p in parameters.items()},
        "gradients": {n: copy.deepcopy(p.grad) for n, p in parameters.items()},
        "requires_grad": {n: p.requires_grad for n, p in parameters.items()},
        "modes": {n: m.training for n, m in modules.items()},
        "buffers": {n: b.clone() for n, b in model.named_buffers()},
        "hooks": {n: [len(getattr(m, h)) for h in hooks] for n, m in modules.items()},
        "random": torch.get_rng_state(),
        "grad mode": torch.is_grad_enabled(),
        "optimizer": None if optimizer is None else copy.deepcopy(optimizer.state_dict()),
    }


def assert_same(one: Any, other: Any) -> None:
    """Assert that two nested structures of tensors and numbers agree bit for bit."""
    if not _equal(one, other):  # a tenth of the time of what follows, which says where
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


def _equal(one: Any, other: Any) -> bool:
    """Return whether two structures are equal; False where this cannot tell."""
    if type(one) is not type(other):
        return False
    if type(one) in (Tensor, nn.Parameter):
        told = one.dtype, one.device, one.layout, torch.strided
        return told == (other.dtype, other.device, other.layout, one.layout) and one.equal(other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_equal(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(_equal, one, other))
    return isinstance(one, (bool, int, float)) and one == other


def without_dropout(model: nn.Module) -> nn.Module:
    """Set every dropout probability to zero, in training mode."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("dropout", "dropout_prob", "attention_dropout", "activation_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
        if hasattr(module, "layerdrop"):
            module.layerdrop = 0.0
    return model


@contextlib.contextmanager
def moving_inputs(test: str) -> Iterator[None]:
    """In a test named after a solver whose δ sits out by default, play both its adversaries.

    Of one that weighs rows, δ takes a step, and cross-entropies stay one per sample; one that moves
    the weights is put around PGD.
    """
    named = {*re.findall(r"[a-z_0-9]+", test)}
    average = F.cross_entropy

    def each(*arguments: Any, reduction: str = "mean", **words: Any) -> Tensor:
        reduction = "none" if reduction == "mean" else reduction
        return average(*arguments, reduction=reduction, **words)

    with contextlib.ExitStack() as stack:
        if not named.isdisjoint(ROWS):
            stack.enter_context(mock.patch.object(F, "cross_entropy", each))
            for name in ROWS:
                defaults: Any = mixadv.SOLVERS[name].__init__.__kwdefaults__
                stack.enter_context(mock.patch.dict(defaults, steps=1))
        for name in named.intersection(AROUND):
            defaults = mixadv.SOLVERS[name].__init__.__kwdefaults__
            stack.enter_context(mock.patch.dict(defaults, solver=mixadv.PGD()))
        yield


WAYS = ("step", "backward", "loss")


def varied(solver: mixadv.Solver, **words: Any) -> mixadv.Solver:
    """Return a solver that ascends in other words; of one around another, the inner one does."""
    if solver.on_inputs is solver:
        return replace(solver, **words)
    return replace(solver, solver=replace(solver.on_inputs, **words))


def _named(name: str, **words: Any) -> mixadv.Solver:
    if name in AROUND:
        return varied(AROUND[name] if words else mixadv.make_solver(name), **words)
    return mixadv.make_solver(name, **words)


def wrapped(
    player: Player | nn.Module,
    solver: str | mixadv.Solver = "pgd",
    base: Callable[..., torch.optim.Optimizer] = torch.optim.SGD,
    *,
    lr: float = 0.1,
    site: Any = None,
    schedule: mixadv.Schedule | None = None,
    **settings: Any,
) -> mixadv.GameOptimizer:
    """Return the optimizer of a game; `settings` are those of a solver that is named."""
    model = player.model if isinstance(player, Player) else player
    made = solver if isinstance(solver, mixadv.Solver) else _named(solver, **settings)
    return mixadv.wrap(base(model.parameters(), lr=lr), model, made, site=site, schedule=schedule)


def play(optimizer: mixadv.GameOptimizer, closure: Callable[[], Any], how: str = "step") -> Tensor:
    """Play a round in one of the three ways, step, and return the objective."""
    if how == "step":
        return optimizer.step(closure)
    if how == "loss":
        objective = optimizer.game.loss(closure)
        objective.backward()
    else:
        objective = optimizer.game.backward(closure).objective
    optimizer.step()
    optimizer.zero_grad()
    return objective.detach()


def copies(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Return detached copies, such as of weights that go on to move."""
    return [t.detach().clone() for t in tensors]


class BrokenError(Exception):
    """What tests raise in the middle of a round."""


class Fault:
    """Raises at its n-th call; `None` never raises, and counts."""

    def __init__(self, at: int | None = None, error: type[BaseException] = BrokenError) -> None:
        self.at, self.error, self.calls = at, error, 0

    def __call__(self, *_: Any) -> None:
        self.calls += 1
        if self.calls == self.at:
            raise self.error


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Do without the garbage collector, so that what lives on is held by a cycle."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def overflow(module: nn.Module, args: tuple[Tensor]) -> None:
    """Make the gradient of the second sample infinite: a hook that goes before a module."""
    if args[0].requires_grad:
        infinite = torch.zeros_like(args[0])
        infinite[1, 0, 0] = torch.inf
        args[0].register_hook(lambda gradient: gradient + infinite)


def hooks(model: nn.Module) -> list[Any]:
    """Return the library's hooks on a model, not those of transformers or of a test."""
    held = [{**m._forward_hooks, **m._forward_pre_hooks}.values() for m in model.modules()]
    return [hook for group in held for hook in group if "mixadv" in hook.__module__]
