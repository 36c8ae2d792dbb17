"""Beyond classifiers: tags, answers, text, pairs of texts and images, with every solver."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

import mixadv
from mixadv.maths.divergence import divergence
from mixadv.solvers.base import DivergenceSolver
from tests.worlds import classified, played
from tests.zoo import (
    AROUND,
    SIZE,
    VOCABULARY,
    bart_config,
    note_refusal,
    t5_config,
    text_batch,
    without_dropout,
    wrapped,
)
from tests.zoo import (
    ROWS as WEIGHING,
)

ROWS = 4
Closure = Callable[[], Any]
Task = tuple[nn.Module, Closure]


def text(seed: int = 0) -> dict[str, Tensor]:
    batch = text_batch(ROWS, seed=seed)
    return {k: batch[k] for k in ("input_ids", "attention_mask")}


def bert(kind: str, **settings: Any) -> nn.Module:
    config = transformers.BertConfig(**{**SIZE, "num_hidden_layers": 1, **settings})
    return getattr(transformers, f"Bert{kind}")(config)


def tagging() -> Task:
    model, batch = bert("ForTokenClassification"), text()
    labels = (batch["input_ids"] % 3).masked_fill(batch["attention_mask"] == 0, -100)
    labels[:, 0] = -100  # as of special tokens and of the later pieces of a word
    return model, lambda: model(**batch, labels=labels)


def answers() -> Task:
    model, batch = bert("ForQuestionAnswering", num_labels=2), text()
    start = torch.arange(ROWS) % 3
    return model, lambda: model(**batch, start_positions=start, end_positions=start + 1)


def choices() -> Task:
    model = bert("ForMultipleChoice")
    batch = {k: torch.stack([v, text(1)[k]], 1) for k, v in text().items()}
    return model, lambda: model(**batch, labels=torch.arange(ROWS) % 2)


def masked() -> Task:
    model, batch = bert("ForMaskedLM"), text()
    labels = torch.full_like(batch["input_ids"], -100)
    labels[:, 2] = batch["input_ids"][:, 2]
    return model, lambda: model(**batch, labels=labels)


def prompted() -> tuple[dict[str, Tensor], Tensor]:
    batch = text()
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    labels[:, :3] = -100  # the prompt
    return batch, labels


def continued(model: nn.Module) -> Task:
    batch, labels = prompted()
    return model, lambda: model(**batch, labels=labels)


def llama() -> Task:
    config = transformers.LlamaConfig(**{**SIZE, "num_hidden_layers": 1}, num_key_value_heads=2)
    return continued(transformers.LlamaForCausalLM(config))


def gpt2() -> Task:
    size = {"vocab_size": VOCABULARY, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 40}
    config = transformers.GPT2Config(**size, bos_token_id=0, eos_token_id=2)
    return continued(transformers.GPT2LMHeadModel(config))


def translated(model: nn.Module) -> Task:
    labels = prompted()[1].roll(-3, 1)
    return model, lambda: model(**text(1), labels=labels)


def t5() -> Task:
    return translated(transformers.T5ForConditionalGeneration(t5_config(1)))


def bart() -> Task:
    return translated(transformers.BartForConditionalGeneration(bart_config(1)))


class Embedder(nn.Module):
    """A module of one's own around an encoder, as of sentence-transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = bert("Model")

    def forward(self, features: dict[str, Tensor]) -> Tensor:
        hidden = self.encoder(**features).last_hidden_state
        mask = features["attention_mask"][..., None]
        return F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


def towers() -> Task:
    """Two texts per sample, told apart from the others of the batch by their similarity."""
    model, one, other = Embedder(), text(), text(1)

    def closure() -> tuple[Tensor, Tensor]:
        similarity = 20 * model(one) @ model(other).T
        return F.cross_entropy(similarity, torch.arange(ROWS)), similarity

    return model, closure


def scores() -> Task:
    """Two texts per sample and how alike they are: regression."""
    model, one, other = Embedder(), text(), text(1)

    def closure() -> tuple[Tensor, Tensor]:
        score = (model(one) * model(other)).sum(-1)
        return F.mse_loss(score, torch.linspace(0, 1, ROWS)), score

    return model, closure


IMAGES = torch.randn(ROWS, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def recognised(model: nn.Module) -> Task:
    return model, lambda: model(pixel_values=IMAGES, labels=torch.arange(ROWS) % 3)


def vit() -> Task:
    size = {k: SIZE[k] for k in ("hidden_size", "num_attention_heads", "intermediate_size")}
    config = transformers.ViTConfig(
        **size, num_hidden_layers=1, image_size=16, patch_size=8, num_labels=3
    )
    return recognised(transformers.ViTForImageClassification(config))


def resnet() -> Task:
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic", num_labels=3
    )
    return recognised(transformers.ResNetForImageClassification(config))


def segmentation() -> Task:
    model, labels = nn.Conv2d(3, 3, 3, padding=1), torch.arange(256).view(1, 16, 16) % 3

    def closure() -> tuple[Tensor, Tensor]:
        logits = model(IMAGES)
        loss = F.cross_entropy(logits, labels.expand(ROWS, -1, -1))
        return loss.mean((1, 2)) if loss.dim() else loss, logits.flatten(2).mT

    return model, closure


def pooled(output: Any) -> Tensor:
    return getattr(output, "last_hidden_state", output).mean((2, 3))


OF_TEXT = [tagging, answers, choices, masked, llama, gpt2, t5, bart, towers, scores]
TASKS = {task.__name__: task for task in [*OF_TEXT, vit, resnet, segmentation]}
_TOKENS = r"TextAT .* site .* is not an embedding .* choose another solver"
_ONE_COLUMN = r"one column, of which .* is always 0. Choose divergence='squared_error'"
_REPRESENTATION = r"representation read at .* Give representation="
_LABELS = r"reads labels of classes.* return \(loss, logits \[B, C\], labels \[B\]\)"
# What a solver cannot play by its defaults, and what it says to change.
REFUSED: dict[tuple[str, str], tuple[str, dict[str, Any] | None]] = {
    **{("textat", task): (_TOKENS, None) for task in ("vit", "resnet", "segmentation")},
    **{
        (name, "scores"): (_ONE_COLUMN, {"divergence": "squared_error"})
        for name in ("vat", "r3f", "alum", "smart", "trades", "mat")
    },
    **{("mart", task): (_LABELS, None) for task in ("answers", "scores", "segmentation")},
    **{
        (name, task): (_REPRESENTATION, {"representation": pooled})
        for name in ("cat", "creat")
        for task in ("resnet", "segmentation")
    },
    **{(name, "scores"): ("one loss per sample", None) for name in WEIGHING},
}


def play(name: str, task: str, **settings: Any) -> mixadv.GameOptimizer:
    torch.manual_seed(0)
    model, closure = TASKS[task]()
    optimizer = wrapped(model.train(), mixadv.make_solver(name, **settings))
    before = [p.detach().clone() for p in model.parameters()]
    assert optimizer.step(closure).isfinite()
    assert any(not torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))
    return optimizer


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("name", mixadv.SOLVERS)
def test_every_solver_plays_every_task_or_says_what_to_change(name: str, task: str) -> None:
    settings: dict[str, Any] | None = {}
    if (name, task) in REFUSED:
        why, settings = REFUSED[name, task]
        with pytest.raises(mixadv.GameError, match=why) as caught:
            play(name, task)
        note_refusal(str(caught.value), changed=settings is not None)
    if settings is not None:
        optimizer = play(name, task, **settings)
        assert optimizer.outcome.radius > 0
        assert optimizer.outcome.nonfinite in (None, 0)


# What the adversary compares ---------------------------------------------------------------------


@pytest.mark.parametrize("task", ["tagging", "masked", "llama", "gpt2", "t5", "bart"])
def test_predictions_count_where_the_loss_reads_them(task: str) -> None:
    torch.manual_seed(0)
    model, closure = TASKS[task]()
    kept: list[Any] = []

    def remembered() -> Any:
        kept.append(closure())
        if kept[-1].logits.requires_grad:
            kept[-1].logits.retain_grad()
        return kept[-1]

    with mixadv.Game(model.eval(), mixadv.PGD(payoff="kl")).rounds.open(remembered) as update:
        (stage,) = update.stages
        counting = stage.clean().mask
    kept[-1].loss.backward()
    read = kept[-1].logits.grad.abs().sum(-1) > 0
    assert torch.equal(counting, read)
    assert 0 < int(read.sum()) < read.numel()


def test_of_an_answer_the_start_and_the_end_are_compared() -> None:
    model, closure = answers()
    game = mixadv.Game(model.eval().double(), mixadv.SMART(proximal_weight=0.0))
    with game.rounds.open(closure) as update:
        (stage,) = update.stages
        q = stage.ascend("kl", game.solver)
        found = float(stage.divergence(q, "kl").detach())
        clean, moved = closure(), []
        stage.passes.run(stage.passes.at(q), lambda: moved.append(closure()) or moved[0])
    heads = [(moved[0].start_logits, clean.start_logits), (moved[0].end_logits, clean.end_logits)]
    expected = [F.kl_div(p.log_softmax(-1), q.softmax(-1), reduction="batchmean") for p, q in heads]
    assert found == pytest.approx(float(sum(expected).detach()) / 2, rel=1e-4)
    assert all(e > 0 for e in expected)


def test_heads_given_side_by_side_are_compared_as_an_outputs_own() -> None:
    played = []
    for by_hand in (False, True):
        torch.manual_seed(0)
        model, closure = answers()

        def stacked(closure: Closure = closure) -> tuple[Tensor, Tensor]:
            output = closure()
            return output.loss, torch.stack([output.start_logits, output.end_logits], 1)

        game = mixadv.Game(without_dropout(model), mixadv.ALUM())
        game.backward(stacked if by_hand else closure)
        played.append(game.strategy.points[0])
    torch.testing.assert_close(*played, rtol=0, atol=0)


@pytest.mark.parametrize("name", mixadv.SOLVERS)
def test_each_text_of_a_pair_gets_a_perturbation_of_its_own_and_its_padding_none(name: str) -> None:
    points = play(name, "towers").game.strategy.points
    assert len(points) == 2
    assert not torch.equal(*points)
    for index, point in enumerate(points):
        padding = text(index)["attention_mask"] == 0
        assert not point[0][padding].any()
        assert point[0][~padding].any(-1).all()


def test_the_mask_is_found_in_features_given_as_one_argument() -> None:
    class Direct(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(VOCABULARY, 6)
            self.head = nn.Linear(6, 3)

        def forward(self, features: dict[str, Tensor]) -> Tensor:
            return self.head(self.words(features["input_ids"]).tanh().mean(1))

    model, batch = Direct(), text()
    game = mixadv.Game(model, mixadv.FGM())
    game.backward(classified(model, batch, labels=torch.arange(ROWS) % 3))
    padding = batch["attention_mask"] == 0
    assert not played(game)[padding].any()
    assert played(game)[~padding].any()


def test_encoders_of_which_one_must_be_chosen_are_named() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.queries, self.answers = bert("Model"), bert("Model")

    names = [f"{n}.embeddings.word_embeddings" for n in ("queries", "answers")]
    with pytest.raises(ValueError, match=rf"2 encoders.*{names[0]}.*site="):
        mixadv.Game(Two(), mixadv.PGD())
    assert mixadv.Game(Two(), mixadv.PGD(), site=names).site.names == names


def test_images_with_predictions_per_pixel_are_refused_with_the_shape_to_return() -> None:
    model = nn.Conv2d(3, 3, 3, padding=1)

    def closure() -> tuple[Tensor, Tensor]:
        logits = model(IMAGES)
        return logits.square().mean(), logits

    with pytest.raises(mixadv.GameError, match=r"\[B, C, H, W\] as logits.flatten\(2\).mT"):
        mixadv.Game(model, mixadv.ALUM()).backward(closure)


DIVERGING = [n for n, s in mixadv.SOLVERS.items() if issubclass(s, DivergenceSolver)]


@pytest.mark.parametrize("over", ["samples", "tokens"])
@pytest.mark.parametrize("name", DIVERGING)
def test_a_row_counts_once_or_by_its_tokens(name: str, over: Any) -> None:
    """Of released code the term is a mean over the tokens of the batch, of papers one over rows."""
    model, closure = tagging()
    model.double().eval()
    still = {"particles": 1, "learner_temperature": 0.0} if name == "mat" else {}
    solver = mixadv.make_solver(name, mean_over=over, **still)
    optimizer = mixadv.wrap(torch.optim.SGD(model.parameters(), lr=0.0), model, solver)
    optimizer.step(closure)
    game, embedding = optimizer.game, model.get_input_embeddings()  # pyright: ignore
    delta = game.strategy.unit * game.strategy.points[0][0]
    with torch.no_grad():
        clean = closure().logits
        with embedding.register_forward_hook(lambda module, args, output: output + delta):
            moved = closure().logits
    batch = text()
    real = batch["attention_mask"].bool()
    real[:, 0] = False
    each = divergence(solver.divergence)(moved, clean)
    rows = torch.stack([values[own].mean() for values, own in zip(each, real, strict=True)])
    expected = rows.mean() if over == "samples" else each[real].mean()
    assert optimizer.outcome.payoff == pytest.approx(expected.item(), rel=1e-3)
    assert rows.mean() != pytest.approx(each[real].mean().item(), rel=1e-2)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_sentence_transformers_play(tmp_path: Any) -> None:
    pytest.importorskip("sentence_transformers")
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer import losses, modules

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(40))]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    bert("Model", vocab_size=len(words), pad_token_id=0).save_pretrained(tmp_path)
    transformers.BertTokenizer(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
    parts = [modules.Transformer(str(tmp_path)), modules.Pooling(16)]
    model = SentenceTransformer(modules=parts, device="cpu").train()
    pairs = [model.preprocess(texts) for texts in (["w1 w2", "w3 w4 w5"], ["w1", "w9 w8"])]
    loss = losses.MultipleNegativesRankingLoss(model)
    embedding = {"source": "1", "representation": lambda out: out["sentence_embedding"]}
    for name in mixadv.SOLVERS:
        words = {"steps": 1} if name in WEIGHING else {}
        words = embedding if name in ("cat", "creat") else words
        words |= {"solver": mixadv.PGD()} if name in AROUND else {}
        optimizer = wrapped(model, mixadv.make_solver(name, **words))

        def closure(name: str = name) -> Any:
            if mixadv.SOLVERS[name]().compares is None and name not in (*WEIGHING, "mart"):
                return loss(pairs, None)
            a, b = (model(dict(features))["sentence_embedding"] for features in pairs)
            similarity = 20 * F.normalize(a) @ F.normalize(b).T
            how = "none" if name in WEIGHING else "mean"
            labels = torch.arange(2)
            value = F.cross_entropy(similarity, labels, reduction=how)
            return (value, similarity, labels) if name == "mart" else (value, similarity)

        optimizer.step(closure)
        for point, features in zip(optimizer.game.strategy.points, pairs, strict=True):
            assert not point[0][features["attention_mask"] == 0].any()
            assert point.any()
