"""sentence-transformers' Trainer plays a game: δ in each text, similarity scores as predictions."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import mixadv
from mixadv.anchors import Anchor
from tests.test_trainer import (
    alone,  # noqa: F401
    logged,
    settings,
    weights,
)
from tests.zoo import assert_same, note_refusal, wrapped

pytest.importorskip("sentence_transformers", reason="its Trainer is what plays")

from datasets import Dataset, disable_progress_bars
from sentence_transformers import (
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer import losses

from mixadv.integrations.sentence_transformers import AdversarialSentenceTransformerTrainer
from tests.sentence_zoo import PAIRS, ROWS, encoder

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*starts below the noise floor"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

disable_progress_bars()
TRIPLETS = Dataset.from_list(
    [row | {"negative": ROWS[(i + 3) % 8]["positive"]} for i, row in enumerate(ROWS)]
)
SCORED = Dataset.from_list([row | {"label": i / 8} for i, row in enumerate(ROWS)])
TASKS: dict[str, tuple[Any, Dataset]] = {
    "ranking": (losses.MultipleNegativesRankingLoss, PAIRS),
    "hard negatives": (losses.MultipleNegativesRankingLoss, TRIPLETS),
    "scores": (losses.CosineSimilarityLoss, SCORED),
    "triplets": (losses.TripletLoss, TRIPLETS),
}
EMBEDDING: dict[str, Any] = {
    "source": "1",
    "representation": lambda found: found["sentence_embedding"],
}


def trained(
    folder: Path,
    task: str,
    solver: mixadv.Solver | None = None,
    *,
    dropout: float = 0.1,
    given: dict[str, Any] | None = None,
    **changes: Any,
) -> Any:
    """Return a Trainer that has trained, an adversarial one where there is a solver."""
    kind, data = TASKS[task]
    model = encoder(folder, dropout)
    base = SentenceTransformerTrainer if solver is None else AdversarialSentenceTransformerTrainer
    words: dict[str, Any] = {} if solver is None else {"solver": solver}
    words = {"loss": kind(model), "train_dataset": data, **words, **(given or {})}
    arguments = SentenceTransformerTrainingArguments(**settings(folder, **changes))
    trainer = base(model, arguments, **words)
    with warnings.catch_warnings(action="ignore"):  # of the model card
        trainer.train()
    return trainer


_ONE_COLUMN = "choose divergence='squared_error'"
_LABELS = "reads classes, and the scores of .* have none"
COMPARE = ("vat", "r3f", "alum", "smart", "trades", "mat")
CANNOT: dict[tuple[str, str], tuple[str, dict[str, Any] | None]] = {
    **{("freeat", task): ("one step per batch", None) for task in TASKS},
    **{(n, t): ("one for all", None) for n in ("group_dro", "cvar", "chi_square") for t in TASKS},
    **{(n, t): ("give source='1'", EMBEDDING) for n in ("creat", "cat") for t in TASKS},
    **{
        (name, task): (_ONE_COLUMN, {"divergence": "squared_error"})
        for name in COMPARE
        for task in ("scores", "triplets")
    },
    **{("mart", task): (_LABELS, None) for task in ("scores", "triplets")},
}


LONG = [pytest.param(task, marks=pytest.mark.slow) for task in TASKS if task != "ranking"]


@pytest.mark.parametrize("task", ["ranking", *LONG])
@pytest.mark.parametrize("name", mixadv.SOLVERS)
def test_every_solver_trains_or_says_what_to_change(name: str, task: str, tmp_path: Path):
    words: dict[str, Any] | None = {}
    if (name, task) in CANNOT:
        why, words = CANNOT[name, task]
        with pytest.raises(ValueError, match=why) as caught:
            trained(tmp_path, task, mixadv.make_solver(name), max_steps=1)
        note_refusal(str(caught.value), changed=words is not None)
    if words is None:
        return
    trainer = trained(tmp_path, task, mixadv.make_solver(name, **words), max_steps=1)
    assert trainer.game.round == 1
    assert logged(trainer, "radius")[0] > 0
    before = encoder(tmp_path).parameters()
    assert any(not torch.equal(a, b) for a, b in zip(weights(trainer), before, strict=True))


@pytest.mark.parametrize("task", ["ranking", *LONG])
def test_radius_zero_is_training_without_a_game(task: str, tmp_path: Path):
    plain = trained(tmp_path, task)
    trainer = trained(tmp_path, task, mixadv.PGD(radius=0))
    assert_same(weights(trainer), weights(plain))
    assert logged(trainer) == pytest.approx(logged(plain), rel=1e-6)
    divergence = "symmetric_kl" if task in ("ranking", "hard negatives") else "squared_error"
    solver = mixadv.ALUM(radius=0, divergence=divergence)
    options: dict[str, Any] = {"dropout": 0.0, "optim": "sgd"}  # where columns are merged or not
    plain, trainer = (trained(tmp_path, task, s, **options) for s in (None, solver))
    torch.testing.assert_close(weights(trainer), weights(plain), rtol=1e-4, atol=1e-6)


def test_both_texts_are_perturbed_each_by_its_own_and_padding_is_not(tmp_path: Path):
    trainer = trained(tmp_path, "ranking", mixadv.FGM(), max_steps=1)
    masks, points = [], trainer.game.strategy.points
    torch.manual_seed(trainer.args.seed)
    features, _ = trainer.collect_features(next(iter(trainer.get_train_dataloader())))
    masks = [f["attention_mask"] for f in features]
    assert len(points) == 2
    for point, mask in zip(points, masks, strict=True):
        assert point.shape[1:3] == mask.shape
        assert torch.equal(point[0].any(-1).sum(), (mask > 0).sum())


@pytest.mark.parametrize("task", TASKS)
def test_what_is_compared_is_what_the_loss_reads(task: str, tmp_path: Path):
    """Its value is computed from the scores alone, by another formula."""
    words = {"divergence": "squared_error"} if task in ("scores", "triplets") else {}
    trainer = trained(tmp_path, task, mixadv.SMART(**words), max_steps=1, dropout=0.0)
    batch = next(iter(trainer.get_train_dataloader()))
    with torch.no_grad():
        loss, found = trainer.forward_pass(trainer.model, dict(batch), None, True)
    logits, rows = found["logits"], torch.arange(4)
    if "labels" in found:
        assert logits.shape == (4, 4 * (2 if task == "hard negatives" else 1))
        torch.testing.assert_close(F.cross_entropy(logits, rows), loss)
        assert torch.equal(found["labels"], rows)
    elif task == "scores":
        torch.testing.assert_close(F.mse_loss(logits[:, 0], batch["label"].float()), loss)
    else:  # a distance in place of the cosine
        assert logits.shape == (4, 2)
        columns, _ = trainer.collect_features(batch)
        a, p, _ = (trainer.model(dict(c))["sentence_embedding"].detach() for c in columns)
        torch.testing.assert_close(logits[:, 0], F.cosine_similarity(a, p))


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"where": "anchor"}, "takes columns for texts: give where= a function of the call"),
        ({"loss": losses.CachedMultipleNegativesRankingLoss}, "use MultipleNegativesRankingLoss"),
        (
            {
                "loss": lambda m: losses.MatryoshkaLoss(
                    m, losses.CachedMultipleNegativesRankingLoss(m), [16, 8]
                )
            },
            "use MultipleNegativesRankingLoss",
        ),
        (
            {"loss": lambda m: losses.MultipleNegativesRankingLoss(m, gather_across_devices=True)},
            "gather_across_devices=True is not tested",
        ),
    ],
    ids=["where", "cached", "cached within another", "gathered"],
)
def test_what_cannot_be_played_is_refused(given: dict[str, Any], why: str, tmp_path: Path):
    with pytest.raises(ValueError, match=why):
        trained(tmp_path, "ranking", mixadv.FreeLB(), given=given)


def test_a_loss_without_scores_serves_solvers_that_need_none(tmp_path: Path):
    """Its decoder tells it from the text itself."""
    given = {"loss": losses.DenoisingAutoEncoderLoss}
    trainer = trained(tmp_path, "ranking", mixadv.FreeLB(), given=given)
    assert trainer.game.round == 2
    solver = mixadv.SMART(divergence="squared_error")
    with pytest.raises(ValueError, match=r"SMART compares.*such as mixadv\.FreeLB\(\)"):
        trained(tmp_path, "ranking", solver, given=given)


def test_texts_that_a_loss_embeds_elsewhere_are_refused(tmp_path: Path):
    """A loss of one's own, that embeds the first column alone."""

    class First(losses.MultipleNegativesRankingLoss):
        def forward(self, sentence_features: Any, labels: Any) -> torch.Tensor:
            return self.model(sentence_features[0])["sentence_embedding"].square().mean()

    with pytest.raises(mixadv.GameError, match="embeds 1 times for 2 texts: override predictions"):
        trained(tmp_path, "ranking", mixadv.SMART(), given={"loss": First})


def test_an_encoder_is_anchored_where_retrieval_reads(tmp_path: Path):
    model, texts = encoder(tmp_path, dropout=0.0), [row["anchor"] for row in ROWS]
    anchor = Anchor(model, read=lambda output: output["sentence_embedding"])
    words = model.tokenize(texts)
    target = torch.from_numpy(model.encode(texts))
    torch.testing.assert_close(anchor.embed(dict(words)), target)
    optimizer = wrapped(model, "pgd", torch.optim.Adam, lr=0.01)
    assert optimizer.step(anchor(model, dict(words))) > 0
    torch.testing.assert_close(anchor.embed(dict(words)), target)
    assert not torch.allclose(torch.from_numpy(model.encode(texts)), target, atol=1e-3)
    with pytest.raises(mixadv.GameError, match=r"output\['sentence_embedding'\]"):
        Anchor(model).embed(dict(words))
