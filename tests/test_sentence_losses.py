"""Each loss of sentence-transformers plays with each solver, or says why not and what to write."""

import copy
import dataclasses
import random
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import mixadv
from tests.processes import one_process
from tests.test_trainer import (
    alone,  # noqa: F401
    logged,
    settings,
    weights,
)
from tests.zoo import assert_same, note_refusal

pytest.importorskip("sentence_transformers", reason="its losses are what is played")

import sentence_transformers as st
from datasets import Dataset, disable_progress_bars
from sentence_transformers.cross_encoder import losses as of_pairs
from sentence_transformers.sentence_transformer import losses
from sentence_transformers.sparse_encoder import losses as sparse

from mixadv.integrations.cross_encoder import AdversarialCrossEncoderTrainer
from mixadv.integrations.sentence_transformers import (
    AdversarialSentenceTransformerTrainer,
    AdversarialSparseEncoderTrainer,
)
from tests.sentence_zoo import PAIRS, ROWS, cross_encoder, encoder, saved, sparse_encoder

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*starts below the noise floor"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

disable_progress_bars()


def rows_with(label: Callable[[int], Any], rows: list[dict[str, Any]] = ROWS) -> Dataset:
    return Dataset.from_list([row | {"label": label(i)} for i, row in enumerate(rows)])


THREE = [row | {"negative": ROWS[(i + 3) % 8]["positive"]} for i, row in enumerate(ROWS)]
TEXTS = [{"text": row["anchor"]} for row in ROWS]
LISTS = [
    {
        "query": row["anchor"],
        "docs": [ROWS[(i + j) % 8]["positive"] for j in range(3 - i % 2)],
        "labels": [1.0, 0.0, 0.5][: 3 - i % 2],
    }
    for i, row in enumerate(ROWS)
]
TRIPLETS, TEXT, LIST = map(Dataset.from_list, (THREE, TEXTS, LISTS))
YES, CLASS, SCORE = (
    rows_with(lambda i: i % 2),
    rows_with(lambda i: i % 3),
    rows_with(lambda i: i / 8),
)
REAL, GROUPED = rows_with(lambda i: float(i % 2)), rows_with(lambda i: i % 2, TEXTS)
MARGIN, TEACHER = rows_with(lambda i: i / 8, THREE), rows_with(lambda i: [i / 8, 1.0], THREE)
TARGET = rows_with(lambda i: [(i + j) / 20 for j in range(16)], TEXTS)
COPIES = [
    {"one": r["anchor"], "other": r["anchor" if i % 2 else "positive"]} for i, r in enumerate(ROWS)
]
SAME = rows_with(lambda i: i % 2, COPIES)


def wide(i: int) -> list[float]:
    return [(i + j) / 20 for j in range(len(saved()[0]))]


KINDS: dict[str, tuple[Any, Any, Any, Any]] = {
    "sentence": (
        lambda folder: encoder(folder, dropout=0.0),
        st.SentenceTransformerTrainer,
        AdversarialSentenceTransformerTrainer,
        st.SentenceTransformerTrainingArguments,
    ),
    "sparse": (
        sparse_encoder,
        st.SparseEncoderTrainer,
        AdversarialSparseEncoderTrainer,
        st.SparseEncoderTrainingArguments,
    ),
    "coded": (
        lambda folder: sparse_encoder(folder, coded=True),
        st.SparseEncoderTrainer,
        AdversarialSparseEncoderTrainer,
        st.SparseEncoderTrainingArguments,
    ),
    "pair": (
        cross_encoder,
        st.CrossEncoderTrainer,
        AdversarialCrossEncoderTrainer,
        st.CrossEncoderTrainingArguments,
    ),
    "classes": (
        lambda folder: cross_encoder(folder, labels=3),
        st.CrossEncoderTrainer,
        AdversarialCrossEncoderTrainer,
        st.CrossEncoderTrainingArguments,
    ),
}
"""An encoder, the Trainer of its kind, that plays or not, and its arguments."""


class Case(NamedTuple):
    """A loss and what it takes.

    Attributes:
        make: gives the loss of a model.
        data: to train on.
        suits: a divergence of its scores; None where it has none that can be compared.
        classes: whether its scores have labels.
        trains: whether it trains weights beside the model's.
        refused: what is said in place of playing it, with any solver.
        kind: of encoder.
    """

    make: Callable[[Any], nn.Module]
    data: Dataset
    suits: str | None = "squared_error"
    classes: bool = False
    trains: bool = False
    refused: str = ""
    kind: str = "sentence"


RANKING = losses.MultipleNegativesRankingLoss


def guided(model: Any) -> nn.Module:
    return losses.GISTEmbedLoss(model, copy.deepcopy(model).requires_grad_(False))


def splade(inner: Callable[[Any], nn.Module]) -> Callable[[Any], nn.Module]:
    weighed = {"document_regularizer_weight": 3e-3, "query_regularizer_weight": 5e-3}
    return lambda model: sparse.SpladeLoss(model, inner(model), **weighed)


SENTENCE = {
    "AdaptiveLayerLoss": Case(lambda m: losses.AdaptiveLayerLoss(m, RANKING(m)), PAIRS, "kl"),
    "AnglELoss": Case(losses.AnglELoss, SCORE),
    "BatchAllTripletLoss": Case(losses.BatchAllTripletLoss, GROUPED),
    "BatchHardSoftMarginTripletLoss": Case(losses.BatchHardSoftMarginTripletLoss, GROUPED),
    "BatchHardTripletLoss": Case(losses.BatchHardTripletLoss, GROUPED),
    "BatchSemiHardTripletLoss": Case(losses.BatchSemiHardTripletLoss, GROUPED),
    "CachedGISTEmbedLoss": Case(
        lambda m: losses.CachedGISTEmbedLoss(m, copy.deepcopy(m)),
        PAIRS,
        refused="use GISTEmbedLoss",
    ),
    "CachedMultipleNegativesRankingLoss": Case(
        losses.CachedMultipleNegativesRankingLoss,
        PAIRS,
        refused="use MultipleNegativesRankingLoss",
    ),
    "CachedMultipleNegativesSymmetricRankingLoss": Case(
        losses.CachedMultipleNegativesSymmetricRankingLoss,
        PAIRS,
        refused="use MultipleNegativesSymmetricRankingLoss",
    ),
    "CoSENTLoss": Case(losses.CoSENTLoss, SCORE),
    "ContrastiveLoss": Case(losses.ContrastiveLoss, YES),
    "ContrastiveTensionLoss": Case(losses.ContrastiveTensionLoss, SAME, None, trains=True),
    "ContrastiveTensionLossInBatchNegatives": Case(
        losses.ContrastiveTensionLossInBatchNegatives, TEXT, None, trains=True
    ),
    "CosineSimilarityLoss": Case(losses.CosineSimilarityLoss, SCORE),
    "DenoisingAutoEncoderLoss": Case(losses.DenoisingAutoEncoderLoss, PAIRS, None, trains=True),
    "DistillKLDivLoss": Case(losses.DistillKLDivLoss, TEACHER, "kl"),
    "EmbedDistillLoss": Case(losses.EmbedDistillLoss, TARGET),
    "GISTEmbedLoss": Case(guided, PAIRS),
    "GlobalOrthogonalRegularizationLoss": Case(losses.GlobalOrthogonalRegularizationLoss, PAIRS),
    "MSELoss": Case(losses.MSELoss, TARGET),
    "MarginMSELoss": Case(losses.MarginMSELoss, MARGIN),
    "Matryoshka2dLoss": Case(
        lambda m: losses.Matryoshka2dLoss(m, RANKING(m), [16, 8, 4]), PAIRS, "kl"
    ),
    "MatryoshkaLoss": Case(lambda m: losses.MatryoshkaLoss(m, RANKING(m), [16, 8]), PAIRS, "kl"),
    "MegaBatchMarginLoss": Case(
        losses.MegaBatchMarginLoss, PAIRS, refused="use_mini_batched_version=False"
    ),
    "MegaBatchMarginLoss whole": Case(
        lambda m: losses.MegaBatchMarginLoss(m, use_mini_batched_version=False), PAIRS
    ),
    "MultipleNegativesRankingLoss": Case(RANKING, TRIPLETS, "kl", classes=True),
    "MultipleNegativesSymmetricRankingLoss": Case(
        losses.MultipleNegativesSymmetricRankingLoss, PAIRS, "kl", classes=True
    ),
    "OnlineContrastiveLoss": Case(losses.OnlineContrastiveLoss, YES),
    "SoftmaxLoss": Case(
        lambda m: losses.SoftmaxLoss(m, 16, 3), CLASS, "kl", classes=True, trains=True
    ),
    "TripletLoss": Case(losses.TripletLoss, TRIPLETS),
}

SPARSE = {
    "CSRLoss": Case(sparse.CSRLoss, PAIRS, "kl", classes=True, kind="coded"),
    "CachedSpladeLoss": Case(
        lambda m: sparse.CachedSpladeLoss(m, sparse.SparseMultipleNegativesRankingLoss(m), 3e-3),
        PAIRS,
        refused="use SpladeLoss",
        kind="sparse",
    ),
    "SparseAnglELoss": Case(splade(sparse.SparseAnglELoss), SCORE, kind="sparse"),
    "SparseCoSENTLoss": Case(splade(sparse.SparseCoSENTLoss), SCORE, kind="sparse"),
    "SparseCosineSimilarityLoss": Case(
        splade(sparse.SparseCosineSimilarityLoss), SCORE, kind="sparse"
    ),
    "SparseDistillKLDivLoss": Case(
        splade(sparse.SparseDistillKLDivLoss), TEACHER, "kl", kind="sparse"
    ),
    "SparseMSELoss": Case(sparse.SparseMSELoss, rows_with(wide, TEXTS), kind="sparse"),
    "SparseMarginMSELoss": Case(splade(sparse.SparseMarginMSELoss), MARGIN, kind="sparse"),
    "SparseTripletLoss": Case(splade(sparse.SparseTripletLoss), TRIPLETS, kind="sparse"),
    "SpladeLoss": Case(
        splade(sparse.SparseMultipleNegativesRankingLoss), PAIRS, "kl", classes=True, kind="sparse"
    ),
}

PAIRED = {
    "BinaryCrossEntropyLoss": Case(of_pairs.BinaryCrossEntropyLoss, REAL, "bernoulli", kind="pair"),
    "CachedMultipleNegativesRankingLoss": Case(
        of_pairs.CachedMultipleNegativesRankingLoss,
        PAIRS,
        refused="use MultipleNegativesRankingLoss",
        kind="pair",
    ),
    "CrossEntropyLoss": Case(of_pairs.CrossEntropyLoss, CLASS, "kl", classes=True, kind="classes"),
    "MSELoss": Case(of_pairs.MSELoss, REAL, kind="pair"),
    "MarginMSELoss": Case(of_pairs.MarginMSELoss, MARGIN, kind="pair"),
    "MultipleNegativesRankingLoss": Case(
        of_pairs.MultipleNegativesRankingLoss, PAIRS, "kl", classes=True, kind="pair"
    ),
    **{
        kind.__name__: Case(lambda m, of=kind: of(m, mini_batch_size=-1), LIST, kind="pair")
        for kind in (
            *(of_pairs.ADRMSELoss, of_pairs.LambdaLoss, of_pairs.ListMLELoss),
            *(of_pairs.ListNetLoss, of_pairs.PListMLELoss, of_pairs.RankNetLoss),
        )
    },
}

CASES = {
    **{f"{name}": case for name, case in SENTENCE.items()},
    **{f"sparse {name}": case for name, case in SPARSE.items()},
    **{f"pair {name}": case for name, case in PAIRED.items()},
}
PLAYED = {name: case for name, case in CASES.items() if not case.refused}
FAST = {*SENTENCE, "sparse SpladeLoss", "pair CrossEntropyLoss", "pair LambdaLoss"}
SOME = [
    pytest.param(name, marks=[] if name in FAST else pytest.mark.slow, id=name) for name in PLAYED
]


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """Return a function that gives a model of a kind, always of the same weights."""
    folder = tmp_path_factory.mktemp("encoders")
    made: dict[str, Any] = {}

    def copied(kind: str) -> Any:
        if kind not in made:
            made[kind] = KINDS[kind][0](folder / kind)
        return copy.deepcopy(made[kind])

    return copied


def trainer_of(case: Case, model: Any, solver: mixadv.Solver | None = None, **changes: Any) -> Any:
    """Return a Trainer whose step of 1 is the gradient."""
    _, plain, playing, arguments = KINDS[case.kind]
    torch.manual_seed(0)
    words = {} if solver is None else {"solver": solver}
    exact = {"optim": "sgd", "learning_rate": 1.0, "lr_scheduler_type": "constant"}
    how = settings(Path("out"), **{"max_steps": 1, "max_grad_norm": 0.0, **exact, **changes})
    base = plain if solver is None else playing
    return base(model, arguments(**how), train_dataset=case.data, loss=case.make(model), **words)


def trained(*given: Any, **changes: Any) -> Any:
    trainer = trainer_of(*given, **changes)
    with warnings.catch_warnings(action="ignore"):  # of the model card
        trainer.train()
    return trainer


def solver_for(case: Case, **words: Any) -> mixadv.Solver:
    """Return the solver that asks most of a loss: for its scores, where it has some."""
    if case.suits is None:
        return mixadv.PGD(**words)
    return mixadv.ALUM(divergence=case.suits, **words)


def test_no_loss_is_forgotten():
    # Those that others hold, as these do in the table.
    parts = {"FlopsLoss", "CSRReconstructionLoss", "SparseMultipleNegativesRankingLoss"}
    for module, table in ((losses, SENTENCE), (sparse, SPARSE), (of_pairs, PAIRED)):
        assert {n for n in module.__all__ if n.endswith("Loss")} - parts <= {*table}


@pytest.mark.parametrize("name", SOME)
def test_at_radius_zero_each_loss_has_its_plain_gradient(name: str, build: Any):
    case = CASES[name]
    plain = trained(case, build(case.kind))
    played = trained(case, build(case.kind), solver_for(case, radius=0))
    assert played.game.round == 1
    before = list(build(case.kind).parameters())
    assert any(not torch.equal(a, b) for a, b in zip(weights(plain), before, strict=True))
    torch.testing.assert_close(weights(played), weights(plain), rtol=1e-4, atol=1e-5)
    assert logged(played) == pytest.approx(logged(plain), rel=1e-4)


@pytest.mark.parametrize("name", SOME)
def test_each_loss_is_played_at_the_radius_asked_for(name: str, build: Any):
    case = CASES[name]
    trainer = trained(case, build(case.kind), solver_for(case, radius=0.1), learning_rate=1e-2)
    assert 0.9 * 0.1 < logged(trainer, "radius")[0] <= 0.1 * (1 + 1e-5)
    assert logged(trainer, "payoff")[0] > 0
    assert all(w.isfinite().all() for w in weights(trainer))


def reason(case: Case, solver: type[mixadv.Solver], words: dict[str, Any]) -> str:
    """Return why a solver of these words cannot play a loss, if it cannot."""
    made = mixadv.make_solver(solver.name, **words)
    compares = made.compares is not None
    learner = made.learner()
    embeds = case.kind in ("sentence", "sparse", "coded")
    if made.replays_batch:
        return "takes one step per batch"
    if made.weighs:
        return "return one for all"
    if case.refused:
        return case.refused
    if embeds and made.reads is not None and not words:
        return "give source="
    if compares and case.suits is None:
        return "choose a solver that needs the loss alone"
    if case.trains and learner is not None and learner.ema_decay is not None:
        return "leaves the weights to the optimizer"
    if made.reads_labels and not case.classes:
        return "reads (classes|one class for each row)"
    if compares and not words and case.suits != "kl":
        return f"choose divergence='{case.suits}'"
    return ""


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("solver", mixadv.SOLVERS)
def test_each_solver_trains_each_loss_or_says_what_to_write(name: str, solver: str, build: Any):
    """What is advised is written, until it trains or another solver is advised."""
    case, words, said = CASES[name], {}, ""
    while why := reason(case, mixadv.SOLVERS[solver], words):
        with pytest.raises(ValueError, match=why) as caught:
            trainer_of(case, build(case.kind), mixadv.make_solver(solver, **words))
        said = str(caught.value)
        if advised := re.search(r"choose divergence='(\w+)'", said):
            words = {"divergence": advised[1]}
        elif advised := re.search(r"give source='(\d)'", said):
            read = {"representation": lambda found: found["sentence_embedding"]}
            words = {"source": advised[1], **read}
        else:
            note_refusal(said)
            return
    if said:
        note_refusal(said, changed=True)
    made = mixadv.make_solver(solver, **words)
    trainer = trained(case, build(case.kind), made, learning_rate=1e-2)
    assert trainer.game.round == 1
    assert all(w.isfinite().all() for w in weights(trainer))


def ranked(logits: Tensor) -> Tensor:
    return F.cross_entropy(logits, torch.arange(len(logits)))


def distilled(logits: Tensor, batch: Any) -> Tensor:
    teacher = batch["label"].log_softmax(-1)
    return F.kl_div(logits.log_softmax(-1), teacher, reduction="batchmean", log_target=True)


VALUES: dict[str, tuple[Case, Callable[[list[Tensor], Any], Tensor]]] = {
    "dimensions": (SENTENCE["MatryoshkaLoss"], lambda found, _: sum(map(ranked, found))),
    "layers": (
        SENTENCE["AdaptiveLayerLoss"]._replace(
            make=lambda m: losses.AdaptiveLayerLoss(m, RANKING(m), -1, kl_temperature=0)
        ),
        lambda found, _: sum(map(ranked, found)),
    ),
    "both": (
        SENTENCE["Matryoshka2dLoss"]._replace(
            make=lambda m: losses.Matryoshka2dLoss(
                m, RANKING(m), [16, 8], n_dims_per_step=-1, kl_temperature=0
            )
        ),
        lambda found, _: sum(map(ranked, found)),
    ),
    "classes": (
        SENTENCE["SoftmaxLoss"],
        lambda found, batch: F.cross_entropy(found[0], batch["label"]),
    ),
    "teacher": (SENTENCE["DistillKLDivLoss"], lambda found, batch: distilled(found[0], batch)),
    "embeddings": (
        SENTENCE["MSELoss"],
        lambda found, batch: F.mse_loss(found[0], batch["label"]),
    ),
    "pairs": (
        PAIRED["BinaryCrossEntropyLoss"],
        lambda found, b: F.binary_cross_entropy_with_logits(found[0][:, 0], b["label"].float()),
    ),
    "classes of pairs": (
        PAIRED["CrossEntropyLoss"],
        lambda found, batch: F.cross_entropy(found[0], batch["label"]),
    ),
    "candidates of pairs": (
        PAIRED["MultipleNegativesRankingLoss"],
        lambda found, _: F.cross_entropy(found[0], torch.zeros(4, dtype=torch.long)),
    ),
}
"""Losses as functions of the predictions that solvers compare, one tensor for each head."""


@pytest.mark.parametrize("name", VALUES)
def test_the_loss_is_a_function_of_what_is_compared(name: str, build: Any):
    case, value = VALUES[name]
    trainer = trainer_of(case, build(case.kind), solver_for(case))
    batch = next(iter(trainer.get_train_dataloader()))
    with torch.no_grad():
        loss, found = trainer.forward_pass(trainer.model, dict(batch), None, True)
    assert not trainer.model._forward_hooks
    heads = [logits for key, logits in found.items() if key.endswith("logits")]
    assert len(heads) == {"dimensions": 2, "layers": 2, "both": 4}.get(name, 1)
    torch.testing.assert_close(value(heads, batch), loss)


@pytest.mark.parametrize(
    "solver",
    [
        pytest.param(name, marks=[] if name in ("mart", "mat") else pytest.mark.slow)
        for name in mixadv.SOLVERS
        if name not in ("freeat", "group_dro", "cvar", "chi_square", "creat", "cat")
    ],
)
def test_a_last_batch_of_one_pair_is_worth_nothing(solver: str, build: Any):
    """It has no candidate but the right one: a loss of 0, and no gradient, as without a game."""
    made = mixadv.make_solver(solver)
    if solver == "mat":
        made = dataclasses.replace(made, learner_temperature=0.0, damping=0.0, round_damping=0.0)
    case = SENTENCE["MultipleNegativesRankingLoss"]._replace(data=Dataset.from_list(ROWS[:5]))
    last = trained(case, build("sentence"), made, max_steps=2)
    whole = trained(case, build("sentence"), made, max_steps=1)
    assert logged(last)[1] == pytest.approx(0, abs=1e-6)
    assert logged(last)[0] > 0.5
    torch.testing.assert_close(weights(last), weights(whole), rtol=0, atol=1e-6)


def test_the_guide_of_a_loss_stays_where_it_is(build: Any):
    """The Trainer gives it to the optimizer, and MAT's noise would move it."""
    case = SENTENCE["GISTEmbedLoss"]
    loose = case._replace(make=lambda m: losses.GISTEmbedLoss(m, copy.deepcopy(m)))
    solver = mixadv.MAT(divergence="squared_error")
    with pytest.raises(ValueError, match=r"guide\.requires_grad_\(False\)"):
        trainer_of(loose, build("sentence"), solver)
    trainer = trained(case, build("sentence"), solver, learning_rate=1e-2)
    guide = list(trainer.loss.guide.parameters())
    assert all(map(torch.equal, guide, build("sentence").parameters()))


@pytest.mark.parametrize(
    ("case", "solver", "why", "changes"),
    [
        (
            SENTENCE["MatryoshkaLoss"],
            mixadv.PGD(),
            "leave torch_compile out",
            {"torch_compile": True},
        ),
        (
            PAIRED["LambdaLoss"]._replace(make=of_pairs.LambdaLoss),
            mixadv.SMART(divergence="squared_error"),
            "give it mini_batch_size=-1",
            {},
        ),
    ],
    ids=["compiled", "in parts"],
)
def test_what_cannot_be_played_is_refused(
    case: Case, solver: mixadv.Solver, why: str, changes: dict[str, Any], build: Any
):
    with pytest.raises(ValueError, match=why):
        trainer_of(case, build(case.kind), solver, **changes)


def test_scores_of_calls_that_differ_in_size_are_refused(build: Any):
    class Uneven(of_pairs.MSELoss):
        def forward(self, inputs: Any, labels: Tensor, **words: Any) -> Tensor:
            parts = [[x[:1] for x in (*inputs, labels)], [x[1:] for x in (*inputs, labels)]]
            found = [super(Uneven, self).forward(texts, y) for *texts, y in parts]
            return torch.stack(found).mean()

    case = PAIRED["MSELoss"]._replace(make=Uneven)
    with pytest.raises(mixadv.GameError, match=r"asks the model for those of \[1, 3\] pairs"):
        trained(case, build("pair"), mixadv.ALUM(divergence="squared_error"))


@pytest.mark.parametrize("name", ["MatryoshkaLoss", "AdaptiveLayerLoss"])
def test_a_replica_of_the_model_gives_the_same_scores(name: str, build: Any, tmp_path: Path):
    """There the loss replaces the forward of the replica, not of the model within."""
    case = SENTENCE[name]
    trainer = trainer_of(case, build(case.kind), solver_for(case))
    batch, found = next(iter(trainer.get_train_dataloader())), []
    with one_process(tmp_path), torch.no_grad():
        for model in (trainer.model, DistributedDataParallel(trainer.model)):
            trainer.model_wrapped = model
            random.seed(0)  # which layers
            found.append(trainer.forward_pass(model, dict(batch), None, True))
    assert len(found[0][1]) == 2
    assert_same(found[0], found[1])
