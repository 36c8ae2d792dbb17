"""Uses that work as they are: sparse and scaled embeddings, heads of one's own, several passes."""

import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

import mixadv
from mixadv.integrations.transformers import Adversarial
from mixadv.maths.divergence import symmetric_kl
from tests.zoo import PAD, player, slow_but, tiny_bert

EVERY = slow_but(["fgm", "smart", "mat"], mixadv.SOLVERS)
solvers = pytest.mark.parametrize("name", EVERY)


def trained(model: nn.Module, name: str, closure: Callable[[], Any], steps: int, **how: Any) -> Any:
    """Train a model for some steps; return the optimizer and the losses."""
    base = torch.optim.SGD(model.parameters(), lr=0.5)
    base = how.pop("base", base)
    optimizer = mixadv.wrap(base, model, mixadv.make_solver(name, **how))
    return optimizer, [float(optimizer.step(closure)) for _ in range(steps)]


@solvers
def test_a_sparse_embedding_trains_as_a_dense_one(name: str):
    class Words(nn.Module):
        def __init__(self, sparse: bool) -> None:
            super().__init__()
            self.words, self.out = nn.Embedding(30, 8, sparse=sparse), nn.Linear(8, 3)

        def forward(self, ids: Tensor) -> Tensor:
            return self.out(self.words(ids).tanh().mean(1))

    ids, labels, weights = torch.randint(0, 30, (6, 5)), torch.arange(6) % 3, []
    how: dict[str, Any] = {}
    if name in ("cat", "creat"):
        how = {"source": "words", "representation": lambda output: output.mean(1)}
    for sparse in (False, True):
        torch.manual_seed(0)
        model = Words(sparse)

        def closure(model: nn.Module = model) -> tuple[Tensor, Tensor]:
            logits = model(ids)
            return F.cross_entropy(logits, labels), logits

        trained(model, name, closure, 4, **how)
        weights.append([p.detach().clone() for p in model.parameters()])
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-4, atol=1e-5)


def test_an_embedding_that_scales_its_rows_has_its_unit():
    config = transformers.Gemma3TextConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        intermediate_size=24,
    )
    model, ids = transformers.Gemma3ForCausalLM(config).eval(), torch.randint(10, 50, (4, 7))
    game = mixadv.Game(model, mixadv.FGM(radius=0.1))
    game.backward(lambda: model(input_ids=ids, labels=ids))
    rows = model.get_input_embeddings().weight[ids].detach()
    assert game.unit == pytest.approx(float(rows.norm(dim=-1).mean()) * math.sqrt(16), rel=1e-4)


@solvers
def test_weights_that_no_pass_uses_are_left_alone(name: str):
    one = player("bert", rows=4)
    one.model.spare = nn.Linear(3, 3)
    before = one.model.spare.weight.detach().clone()
    quiet = {"learner_temperature": 0.0} if name == "mat" else {}  # its noise is on every weight
    trained(one.model, name, one.closure(), 2, **quiet)
    assert one.model.spare.weight.equal(before)


class Crf(nn.Module):
    """A conditional random field over an encoder; returns one loss per sample, and emissions."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = transformers.BertModel(tiny_bert(50, pad_token_id=PAD))
        self.emit, self.move = nn.Linear(16, 4), nn.Parameter(torch.zeros(4, 4))

    def forward(self, input_ids: Tensor, attention_mask: Tensor, tags: Tensor) -> Any:
        scores = self.emit(self.encoder(input_ids, attention_mask).last_hidden_state)
        total, path = scores[:, 0], scores[:, 0].gather(1, tags[:, :1])[:, 0]
        for i in range(1, scores.shape[1]):
            real = attention_mask[:, i]
            after = torch.logsumexp(total[:, :, None] + self.move[None], 1) + scores[:, i]
            total = torch.where(real[:, None].bool(), after, total)
            step = scores[:, i].gather(1, tags[:, i : i + 1])[:, 0]
            path = path + real * (step + self.move[tags[:, i - 1], tags[:, i]])
        return torch.logsumexp(total, 1) - path, scores


def rows() -> tuple[Tensor, Tensor, Tensor]:
    """Return ids whose first tells the label, a mask with padding, and labels."""
    ids, labels = torch.randint(10, 50, (6, 9)), torch.arange(6) % 3
    mask = torch.ones_like(ids)
    ids[::2, 6:], mask[::2, 6:] = PAD, 0
    ids[:, 0] = labels + 3
    return ids, mask, labels


@solvers
@pytest.mark.parametrize("use", ["crf", "two masks of dropout", "distillation"])
def test_the_loss_falls_and_padding_stays(name: str, use: str):
    ids, mask, labels = rows()
    batch = {"input_ids": ids, "attention_mask": mask}
    build = lambda: transformers.BertForSequenceClassification(  # noqa: E731
        tiny_bert(50, num_labels=3, pad_token_id=PAD)
    )
    teacher, model = build().eval(), Crf() if use == "crf" else build()

    def closure() -> Any:
        if use == "crf":
            return model(**batch, tags=ids % 4)
        one = model(**batch, labels=labels)
        if use == "distillation":
            with torch.no_grad():
                target = teacher(**batch).logits.softmax(-1)
            kept = F.kl_div(one.logits.log_softmax(-1), target, reduction="batchmean")
            return one.loss + kept, one.logits
        two = model(**batch, labels=labels)
        apart = symmetric_kl(one.logits, two.logits).mean()
        return (one.loss + two.loss) / 2 + apart, one.logits

    base = torch.optim.AdamW(model.parameters(), lr=3e-3)
    optimizer, losses = trained(model, name, closure, 12, base=base)
    assert sum(losses[-3:]) < sum(losses[:3])
    points = optimizer.game.strategy.points
    assert len(points) == 1 + (use == "two masks of dropout")
    assert not any(p[:, mask == 0].any() for p in points)


def test_the_trainer_of_sentence_transformers_plays():
    sentence_transformers = pytest.importorskip("sentence_transformers")
    datasets = pytest.importorskip("datasets")
    from sentence_transformers.sentence_transformer import losses, modules

    class Trainer(Adversarial, sentence_transformers.SentenceTransformerTrainer):
        """Plays on pairs."""

    folder = Path(tempfile.mkdtemp())
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(40))]
    (folder / "vocab.txt").write_text("\n".join(words))
    transformers.BertModel(tiny_bert(45, max_position_embeddings=32)).save_pretrained(folder)
    transformers.BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    pairs = {"a": [f"w{i} w{i + 1} w2" for i in range(16)], "b": [f"w{i} w2" for i in range(16)]}
    encoder = modules.Transformer(str(folder))
    model = sentence_transformers.SentenceTransformer(
        modules=[encoder, modules.Pooling(16)], device="cpu"
    )
    args = sentence_transformers.SentenceTransformerTrainingArguments(
        tempfile.mkdtemp(),
        max_steps=3,
        per_device_train_batch_size=8,
        use_cpu=True,
        disable_tqdm=True,
        report_to=[],
        save_strategy="no",
    )
    loss = losses.MultipleNegativesRankingLoss(model)
    data = datasets.Dataset.from_dict(pairs)
    trainer = Trainer(model=model, args=args, train_dataset=data, loss=loss, solver=mixadv.FreeLB())
    trainer.train()
    assert len(trainer.game.strategy.points) == 2  # a call for each text of a pair
    assert all(p.any() for p in trainer.game.strategy.points)
