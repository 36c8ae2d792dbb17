"""A chat trainer plays a loop's own rounds, says what its adversary does, and refuses none."""

import copy
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.distributed as dist
import transformers

import mixadv
from mixadv.integrations.chat import AdversarialChatTrainer, ChatCollator
from mixadv.tokens import ChatBatch, answer_losses, continuous_at, latent_at, latent_dpo
from tests.chat_zoo import chatting, speaking
from tests.scripts import own_start  # noqa: F401

ROWS = [
    {"prompt": "What is a film?", "chosen": "I would rather not.", "rejected": "A story."},
    {"prompt": "Why? Is it good?", "chosen": "No.", "rejected": "It is a very good film, indeed."},
    {"prompt": "Which one?", "chosen": "None.", "rejected": "That one."},
    {"prompt": "And now?", "chosen": "Nothing.", "rejected": "We go."},
]
OTHERS = [
    {"prompt": "What is ice?", "chosen": "Frozen water."},
    {"prompt": "What is snow?", "chosen": "Ice that falls."},
    {"prompt": "What is rain?", "chosen": "Water."},
]
SOLVER = mixadv.PGD(steps=2, step_size=0.05, radius=0.1, per="token", start="zero")


def trainer(folder: Path, model: Any, tokenizer: Any, **changes: Any) -> AdversarialChatTrainer:
    """Return a trainer by plain SGD, which reads rows in their order."""
    how = {"max_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 0.1}
    how |= changes.pop("how", {})
    arguments = transformers.TrainingArguments(
        str(folder), optim="sgd", lr_scheduler_type="constant", max_grad_norm=0, use_cpu=True,
        train_sampling_strategy="sequential", report_to="none", disable_tqdm=True, save_steps=1,
        **how,
    )  # fmt: skip
    given = {"train_dataset": ROWS, "retain_dataset": OTHERS, "solver": SOLVER, **changes}
    return AdversarialChatTrainer(model, arguments, processing_class=tokenizer, **given)


@pytest.mark.parametrize("goals", [continuous_at, latent_at])
@pytest.mark.parametrize("parts", [1, 2])
def test_trainer_plays_the_rounds_of_a_loop(goals: Any, parts: int, tmp_path: Path):
    tokenizer = chatting()
    model = speaking("Llama", tokenizer)
    other = copy.deepcopy(model)
    how = {"per_device_train_batch_size": 2 // parts, "gradient_accumulation_steps": parts}
    trainer(tmp_path, model, tokenizer, goals=goals, how=how).train()

    by_hand(tokenizer, other, goals, 2 // parts, parts)
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)


def test_prompts_are_rewritten_in_both_answers():
    collate = ChatCollator(chatting(), rewrites=lambda prompt: [prompt.upper()], share=1.0)
    found = collate(ROWS)
    for name in ("chosen", "rejected"):
        batch = ChatBatch(**found[name])
        told = [
            collate.tokenizer.decode(ids[at])
            for ids, at in zip(batch.input_ids, batch.where, strict=True)
        ]
        assert told == [row["prompt"].upper() for row in ROWS]


def test_first_step_tells_what_the_adversary_does(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    tokenizer = chatting()
    model = speaking("Qwen2", tokenizer)
    made = trainer(tmp_path, model, tokenizer)
    with caplog.at_level(logging.WARNING):
        made.train()
    [told] = [record.getMessage() for record in caplog.records if "first step" in record.message]
    places = ChatBatch(**ChatCollator(tokenizer)(ROWS[:2])["chosen"]).where.sum(1)
    assert f"in 2 of 2 rows, at {places.min()} to {places.max()} tokens of each" in told
    assert "radius 0.1 per token" in told
    before, after = (float(word.strip(".")) for word in told.split("from ")[1].split(" to "))
    assert after > before


def messages_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if "first step" in r.getMessage()]


def test_first_step_is_told_once_with_the_rows_of_all_processes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    tokenizer = chatting()
    made = trainer(tmp_path, speaking("Llama", tokenizer), tokenizer, how={"max_steps": 1})
    seen = []

    def gather(mine: torch.Tensor) -> torch.Tensor:
        """Return what processes would: another one has three rows, one of them without δ."""
        seen.append(mine)
        other = torch.tensor([3, 2, 0, 0, 40, 3 * -1.0, 3 * 2.0])
        return torch.cat([mine, other.to(mine)])

    monkeypatch.setattr(made.accelerator, "gather", gather)
    with caplog.at_level(logging.WARNING):
        made.train()
    [told], [mine] = messages_of(caplog), seen
    assert "in 4 of 5 rows, at 0 to 40 tokens" in told
    before, after = (float(word.strip(".")) for word in told.split("from ")[1].split(" to "))
    assert before == pytest.approx((float(mine[5]) - 3) / 5, rel=1e-3)
    assert after == pytest.approx((float(mine[6]) + 6) / 5, rel=1e-3)

    other = trainer(tmp_path, speaking("Llama", tokenizer), tokenizer, how={"max_steps": 1})
    monkeypatch.setattr(other, "is_world_process_zero", lambda: False)
    caplog.clear()
    other.train()
    assert messages_of(caplog) == []


def test_long_answers_are_cut_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    tokenizer = chatting()
    collate = ChatCollator(tokenizer)
    rows = [{**ROWS[i], "others": OTHERS[i % 3]} for i in range(4)]
    batches = [ChatBatch(**batch) for batch in collate(rows).values()]
    length = 1 + max(int((b.labels >= 0).int().argmax(1).max()) for b in batches)
    longer = [int((b.attention_mask[:2].sum(1) > length).sum()) for b in batches]
    assert all(longer)
    how = {"logging_steps": 1, "max_steps": 1}
    made = trainer(tmp_path, speaking("Llama", tokenizer), tokenizer, max_length=length, how=how)
    with caplog.at_level(logging.WARNING):
        made.train()
    assert f"{sum(longer)} answers were cut at max_length." in messages_of(caplog)[0]
    assert made.state.log_history[0]["cut_answers"] == sum(longer)
    found = ChatCollator(tokenizer, max_length=length)(rows)
    assert int(found["cut"][:2].sum()) == sum(longer)
    assert found["chosen"]["input_ids"].shape[1] == length


def test_a_prompt_without_room_for_its_answer_is_refused(tmp_path: Path):
    tokenizer = chatting()
    made = trainer(tmp_path, speaking("Llama", tokenizer), tokenizer, max_length=9)
    with pytest.raises(ValueError, match="max_length=9 leaves nothing of an answer"):
        made.train()


def by_hand(tokenizer: Any, model: Any, goals: Any, size: int, parts: int) -> None:
    """Train a model by a loop: two updates on two rows each."""
    optimizer = mixadv.wrap(torch.optim.SGD(model.parameters(), lr=0.1), model, SOLVER, seed=42)
    collate = ChatCollator(tokenizer)
    for update in range(2):
        for part in range(parts):
            at = range(2 * update + size * part, 2 * update + size * (part + 1))
            batch = collate([{**ROWS[i], "others": OTHERS[i % 3]} for i in at])
            chats = [ChatBatch(**batch[name]) for name in ("chosen", "rejected", "others")]
            (optimizer.game.loss(**goals(model, *chats)) / parts).backward()
        optimizer.step()
        optimizer.zero_grad()


@contextmanager
def told_first() -> Iterator[list[str]]:
    """Give what is logged of the first step."""
    told: list[str] = []

    class Noting(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            told.append(record.getMessage())

    handler, log = Noting(), logging.getLogger("mixadv.integrations.chat")
    log.addHandler(handler)
    yield told
    log.removeHandler(handler)


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    where = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    os.environ |= {name: str(value) for name, value in where.items()}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": os.environ["TEST_PORT"]}
    tokenizer = chatting()
    model, alone = speaking("Llama", tokenizer), speaking("Llama", tokenizer)
    how = {"per_device_train_batch_size": 1, "ddp_find_unused_parameters": False}
    with told_first() as told:
        trainer(Path(folder), model, tokenizer, how=how).train()
    assert dist.get_world_size() == 2
    assert [text.split(" an adversary in ")[1][:16] for text in told] == ["2 of 2 rows, at "][rank:]
    by_hand(tokenizer, alone, continuous_at, 2, 1)
    for mine, expected in zip(model.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-8, atol=1e-11)
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TEST_PORT", str(20000 + os.getpid() % 20000))
    torch.multiprocessing.spawn(work, (str(tmp_path),), nprocs=2)


@pytest.mark.slow
def test_a_model_that_trainer_compiles_is_played_on(tmp_path: Path):
    tokenizer = chatting()
    model, other = speaking("Llama", tokenizer), speaking("Llama", tokenizer)
    how = {"torch_compile": True, "torch_compile_backend": "eager"}
    trainer(tmp_path / "compiled", model, tokenizer, how=how).train()
    trainer(tmp_path / "plain", other, tokenizer).train()
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.filterwarnings("ignore:PGD starts below the noise floor")  # of bf16
@pytest.mark.parametrize("goals", [continuous_at, latent_dpo])
def test_adapters_alone_are_trained(goals: Any, tmp_path: Path):
    tokenizer = chatting()
    targets = ["q_proj", "v_proj"]
    model = peft.get_peft_model(
        speaking("Llama", tokenizer), peft.LoraConfig(target_modules=targets)
    )
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer(tmp_path, model, tokenizer, how={"bf16": True}, goals=goals).train()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved
    assert all("lora_" in name for name in moved)


def test_evaluation_is_the_loss_of_chosen_answers(tmp_path: Path):
    tokenizer = chatting()
    model = speaking("Llama", tokenizer)
    made = trainer(tmp_path, model, tokenizer, eval_dataset=ROWS)
    found = made.evaluate()["eval_loss"]
    chosen = ChatBatch(**ChatCollator(tokenizer)(ROWS)["chosen"])
    with torch.no_grad():
        each = answer_losses(model(**chosen.inputs).logits, chosen.labels)
    assert found == pytest.approx(float(each.mean()), rel=1e-6)


def test_killed_and_resumed_as_uninterrupted(tmp_path: Path):
    tokenizer = chatting()
    whole, halves = speaking("Llama", tokenizer), speaking("Llama", tokenizer)
    trainer(tmp_path / "whole", whole, tokenizer).train()
    trainer(tmp_path / "halves", halves, tokenizer, how={"max_steps": 1}).train()
    last = str(tmp_path / "halves" / "checkpoint-1")
    trainer(tmp_path / "halves", halves, tokenizer).train(resume_from_checkpoint=last)
    for mine, theirs in zip(whole.parameters(), halves.parameters(), strict=True):
        assert torch.equal(mine, theirs)


WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no rows": ({"train_dataset": []}, ValueError, "no rows with an adversary"),
    "no rejected answer": (
        {"train_dataset": [{"prompt": "Why?", "chosen": "So."}]},
        ValueError,
        "has no 'rejected', it has prompt, chosen",
    ),
    "nothing retained": ({"retain_dataset": []}, ValueError, "leave it out to retain nothing"),
    "a stream to retain": ({"retain_dataset": iter([])}, ValueError, "whose length is known"),
    "texts to retain": ({"retain_dataset": [{"text": "Ice"}]}, ValueError, "has no 'prompt'"),
    "goals": ({"goals": "lat"}, TypeError, "goals must be a function"),
    "where": ({"where": "where"}, ValueError, "leave where= out"),
    "groups": ({"groups": "group"}, ValueError, "without groups="),
    "a loss": ({"compute_loss_func": print}, ValueError, "without compute_loss_func="),
    "smoothing": ({"how": {"label_smoothing_factor": 0.1}}, ValueError, "without label smoothing"),
    "no tokens": ({"max_length": 1}, ValueError, "max_length must be at least 2"),
    "a length beside a collator": (
        {"max_length": 9, "data_collator": ChatCollator(None)},
        ValueError,
        r"max_length is the collator's: ChatCollator\(tokenizer, max_length=",
    ),
    "no solver": ({"solver": None}, TypeError, "solver"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_trained_on_is_refused_at_once(name: str, tmp_path: Path):
    tokenizer = chatting()
    changes, kind, words = WRONG[name]
    with pytest.raises(kind, match=words):
        trainer(tmp_path, speaking("Llama", tokenizer), tokenizer, **changes)


class OtherPrompts(ChatCollator):
    """Writes rejected answers behind prompts that the chosen ones do not follow."""

    def __call__(self, rows: Any) -> dict[str, Any]:
        found = super().__call__(rows)
        ids, where = (found["rejected"][name] for name in ("input_ids", "where"))
        found["rejected"]["input_ids"] = torch.where(where, ids.roll(1, 0), ids)
        return found


def test_prompts_that_differ_are_refused_behind_what_is_told_first(tmp_path: Path):
    """To tell the payoff, the adversary's calls alone are checked: the round checks all."""
    tokenizer = chatting()
    model, collate = speaking("Llama", tokenizer), OtherPrompts(tokenizer)
    with pytest.raises(mixadv.GameError, match="reads other tokens"):
        trainer(tmp_path, model, tokenizer, data_collator=collate).train()


def test_rows_laid_end_to_end_are_refused(tmp_path: Path):
    """Nothing says there where the answers to one prompt are, of which the players want two."""
    tokenizer = chatting()
    model = speaking("Llama", tokenizer)
    flat = transformers.DataCollatorWithFlattening(return_flash_attn_kwargs=True)
    collate = lambda rows: flat([{"input_ids": [1, 2]} for _ in rows])  # noqa: E731
    made = trainer(tmp_path, model, tokenizer, data_collator=collate)
    with pytest.raises(ValueError, match=r"batches of chosen and rejected.*got .*position_ids"):
        made.train()


@pytest.mark.parametrize("name", ["packing", "padding_free"])
def test_packing_that_arguments_ask_for_is_refused(name: str, tmp_path: Path):
    tokenizer = chatting()
    made = trainer(tmp_path, speaking("Llama", tokenizer), tokenizer)
    setattr(made.args, name, True)  # as those of TRL's trainers have them
    with pytest.raises(ValueError, match=f"{name}=True.*side by side.*max_length="):
        AdversarialChatTrainer(
            made.model, made.args, train_dataset=ROWS, processing_class=tokenizer, solver=SOLVER
        )


def test_a_later_row_without_a_column_is_said(tmp_path: Path):
    tokenizer = chatting()
    rows = [ROWS[0], {"prompt": "Why?", "chosen": "So."}]
    with pytest.raises(ValueError, match="Row 1 has no 'rejected', it has prompt, chosen"):
        trainer(tmp_path, speaking("Llama", tokenizer), tokenizer, train_dataset=rows).train()


def test_goals_without_an_adversary_are_refused(tmp_path: Path):
    tokenizer = chatting()
    model = speaking("Llama", tokenizer)

    def learner_alone(model: Any, *batches: Any) -> dict[str, Any]:
        return {
            "closure": lambda: answer_losses(model(**batches[0].inputs).logits, batches[0].labels)
        }

    with pytest.raises(TypeError, match="a dict of closure, adversary, where"):
        trainer(tmp_path, model, tokenizer, goals=learner_alone).train()


def test_a_tokenizer_without_chats_is_refused(tmp_path: Path):
    tokenizer = chatting()
    model = speaking("Llama", tokenizer)
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        trainer(tmp_path, model, tokenizer).train()


@pytest.mark.parametrize("workers", [0, 1])
def test_each_epoch_goes_on_with_the_rows_beside(workers: int, tmp_path: Path):
    """More rows to retain than rows with an adversary: all of them are read, each in its turn."""
    tokenizer, epochs = chatting(), 3
    others = [{"prompt": f"What is {n}?", "chosen": f"It is {n}."} for n in range(10)]
    how = {"max_steps": -1, "num_train_epochs": epochs, "dataloader_num_workers": workers}
    how |= {"dataloader_persistent_workers": bool(workers)}
    seen: list[str] = []

    def goals(model: Any, chosen: Any, rejected: Any, besides: ChatBatch) -> Any:
        if model.training:
            told = zip(besides.input_ids, besides.where, strict=True)
            seen.extend(tokenizer.decode(ids[at]) for ids, at in told)
        return continuous_at(model, chosen, rejected, besides)

    made = trainer(tmp_path, speaking("Llama", tokenizer), tokenizer, goals=goals, how=how,
                   retain_dataset=others)  # fmt: skip
    made.train()
    assert seen == [others[n % 10]["prompt"] for n in range(epochs * len(ROWS))]


def test_what_is_evaluated_is_not_rewritten(tmp_path: Path):
    tokenizer = chatting()
    model = speaking("Llama", tokenizer)
    collate = ChatCollator(tokenizer, rewrites=lambda prompt: [prompt.upper()], share=0.5)
    made = trainer(tmp_path, model, tokenizer, data_collator=collate, eval_dataset=ROWS)
    plain = trainer(tmp_path, model, tokenizer, eval_dataset=ROWS).evaluate()["eval_loss"]
    assert [made.evaluate()["eval_loss"] for _ in range(3)] == [plain] * 3
    assert made.predict(ROWS).metrics["test_loss"] == plain
    assert made.data_collator is collate


def test_rows_that_nobody_can_write_are_refused(tmp_path: Path):
    tokenizer = chatting()
    with pytest.raises(ValueError, match="a tokenizer writes: processing_class="):
        trainer(tmp_path, speaking("Llama", tokenizer), None)
