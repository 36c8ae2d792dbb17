"""Chats become ids, labels and the places of what the user wrote, by the tokenizer's template."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from mixadv.tokens import answer_losses, chat_batch, preference_batches, shortened
from mixadv.tokens.chat_games import floored, unlikelihood
from tests.chat_zoo import TEMPLATES, chatting, speaking
from tests.test_game import no_reads
from tests.tokenizers_zoo import texts

said = texts.map(str.strip).filter(bool)
sides = st.sampled_from(["left", "right"])


def messages(prompt: str, answer: str) -> list[dict[str, str]]:
    roles = (("user", prompt), ("assistant", answer))
    return [{"role": role, "content": content} for role, content in roles]


@pytest.mark.parametrize("template", TEMPLATES)
@settings(max_examples=12, deadline=None)
@given(st.lists(st.tuples(said, said), min_size=1, max_size=4), sides)
def test_a_row_is_what_the_template_writes(template: str, rows: list[tuple[str, str]], side: str):
    tokenizer = chatting(template)
    prompts, answers = map(list, zip(*rows, strict=True))
    batch = chat_batch(tokenizer, prompts, answers, padding_side=side)
    for i, (prompt, answer) in enumerate(rows):
        real = batch.attention_mask[i] > 0
        whole = tokenizer.apply_chat_template(messages(prompt, answer), tokenize=False)
        assert tokenizer.decode(batch.input_ids[i][real]) == whole
        assert tokenizer.decode(batch.input_ids[i][batch.where[i]]).strip() == prompt
        learned = batch.labels[i] != -100
        assert torch.equal(batch.labels[i][learned], batch.input_ids[i][learned])
        front = tokenizer.apply_chat_template(
            messages(prompt, answer)[:1], tokenize=False, add_generation_prompt=True
        )
        assert front + tokenizer.decode(batch.labels[i][learned]) == whole
        padding = ~real
        assert not (padding & (batch.where[i] | learned)).any()
        assert padding.sort(descending=side == "left").values.equal(padding)


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_both_answers_follow_the_same_prompt(template: str, side: str):
    rows = [
        {"prompt": "What is a film?", "chosen": "A story.", "rejected": "I would rather not say."},
        {"prompt": "user", "chosen": "A word of the template, user.", "rejected": "user"},
    ]
    tokenizer = chatting(template)
    both = preference_batches(tokenizer, rows, padding_side=side)
    assert both[0].where.shape == both[1].where.shape
    for i, row in enumerate(rows):
        of_prompt = [batch.input_ids[i][batch.where[i]] for batch in both]
        assert torch.equal(*of_prompt)
        assert tokenizer.decode(of_prompt[0]).strip() == row["prompt"]
    right = preference_batches(tokenizer, rows)
    assert torch.equal(right[0].where, right[1].where)  # one mask serves both


def test_turns_before_the_last_are_not_perturbed():
    tokenizer = chatting()
    talk = [*messages("Is it good?", "Very."), {"role": "user", "content": "Is it good?"}]
    batch = chat_batch(tokenizer, [talk], system="ignored: these are messages")
    first = tokenizer.decode(batch.input_ids[0][: int(batch.where[0].int().argmax())])
    assert tokenizer.decode(batch.input_ids[0][batch.where[0]]) == "Is it good?"
    assert first.count("Is it good?") == 1
    assert "ignored" not in first
    assert (batch.labels == -100).all()


def test_an_answer_to_be_gone_on_with_has_no_end():
    tokenizer = chatting()
    batch = chat_batch(tokenizer, ["Why?"], ["Sure, I"], complete=False, system="Be brief.")
    text = tokenizer.decode(batch.input_ids[0])
    assert text.endswith("<|im_start|>assistant\nSure, I")
    assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>")


def test_a_tokenizer_without_padding_pads_with_the_end_of_text():
    tokenizer = chatting()
    tokenizer.pad_token = None
    batch = chat_batch(tokenizer, ["Why?", "Why is it so?"], padding_side="left")
    assert batch.input_ids[0, 0] == tokenizer.eos_token_id
    assert batch.attention_mask[0, 0] == 0


ROLE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
WRONG: dict[str, tuple[str, dict[str, Any], str]] = {
    "no generation prompt like the turn": (
        ROLE + "{% if add_generation_prompt %}Bot says: {% endif %}",
        {"answers": ["Yes."]},
        "no prompt boundary: what it writes for a prompt ends in",
    ),
    "a prompt that its end changes": (
        "{{ messages | length }}" + ROLE,
        {"answers": ["Yes."]},
        "no prompt boundary: what it writes for a prompt ends in",
    ),
    "words left out": ("{{ messages[0].role }}:", {}, "user's text cannot be told from"),
    "a role refused": ("gemma", {"system": "Be brief."}, "refuses these messages: System role"),
    "no template": ("", {}, "has no chat template: set tokenizer.chat_template"),
    "no prompts": ("chatml", {"prompts": []}, "a list of at least one prompt"),
    "one prompt that is no list": ("chatml", {"prompts": "Why?"}, "a list of at least one prompt"),
    "an empty prompt": ("chatml", {"prompts": ["Why?", " \n"]}, "Prompt 1 is empty"),
    "nobody asks": ("chatml", {"prompts": [messages("a", "b")[1:]]}, "Prompt 0 is empty"),
    "answers that are too few": ("chatml", {"answers": []}, "1 prompts and 0 answers"),
    "an answer that is none": (
        "chatml",
        {"answers": [None]},
        r"answer to 'Why is that\?' must be a text, or its message",
    ),
    "an answer without text": ("chatml", {"answers": [" "]}, "is empty: nothing is to be learned"),
    "messages to be gone on with": (
        "chatml",
        {"answers": [messages("a", "b")[1:]], "complete": False},
        "must be a text, where complete=False",
    ),
    "an answer of several turns": (
        "chatml",
        {"answers": [[*messages("a", "b")[1:], *messages("c", "d")]]},
        r"one message of the assistant, not of \['assistant', 'user', 'assistant'\]: what came",
    ),
    "an answer that brings its prompt": (
        "mistral",
        {"answers": [messages("Why is that?", "So.")]},
        r"one message of the assistant, not of \['user', 'assistant'\]",
    ),
    "no message at all": ("chatml", {"answers": [[]]}, r"not of \[\]: give a text, or"),
    "a message of nobody": ("chatml", {"answers": [[{"content": "So."}]]}, "give a text, or"),
    "one answer that is no list": ("chatml", {"answers": "Y"}, "must be a list of answers"),
    "a prompt that is none": ("chatml", {"prompts": [None]}, "Prompt 0 must be a text or a list"),
    "a side": ("chatml", {"padding_side": "up"}, "'left' or 'right', got 'up'"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_cannot_be_written_is_said(wrong: str):
    template, how, message = WRONG[wrong]
    with pytest.raises(ValueError, match=message):
        chat_batch(chatting(template), **{"prompts": ["Why is that?"], **how})


def test_a_row_without_a_column_is_said():
    row = {"prompt": "a", "chosen": "b"}
    with pytest.raises(ValueError, match=r"Row 1 has no 'rejected', it has prompt, chosen"):
        preference_batches(chatting(), [{**row, "rejected": "c"}, row])


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(said, said), min_size=1, max_size=3), st.integers(0, 30))
def test_what_is_too_long_loses_the_end_of_its_answer(rows: list[tuple[str, str]], room: int):
    """Never the prompt: δ has the same places, and both answers go on to agree there."""
    pairs = [{"prompt": p, "chosen": a, "rejected": f"{a} {a}"} for p, a in rows]
    for batch in preference_batches(chatting(), pairs):
        prompts = (batch.labels >= 0).int().argmax(1)
        length = int(prompts.max()) + 1 + room
        found, cut = shortened(batch, length)
        assert found.input_ids.shape[1] <= length
        assert torch.equal(cut, batch.attention_mask.sum(1) > length)
        before, after = (zip(*chats, strict=True) for chats in (batch, found))
        for whole, part, tokens in zip(before, after, prompts, strict=True):
            size = min(length, len(whole[0]))
            for mine, all_of_it in zip(part, whole, strict=True):
                assert torch.equal(mine, all_of_it[:size])
            assert torch.equal(part[3].nonzero(), whole[3].nonzero())
            assert (part[2] >= 0).any()
            assert not (part[2][:tokens] >= 0).any()


TOO_SHORT: dict[str, tuple[dict[str, Any], int, str]] = {
    "no room for an answer": (
        {"answers": ["No.", "Yes."]},
        30,
        r"Row 1 of the batch has a prompt of \d+ tokens, and max_length=30 leaves nothing",
    ),
    "a prompt alone": ({}, 30, r"Row 1 of the batch .* leaves nothing of an answer"),
    "padding on the left": ({"padding_side": "left"}, 9, "have them padded there, 'right'"),
    "no tokens": ({}, 0, "max_length must be at least 1"),
}


@pytest.mark.parametrize("wrong", TOO_SHORT)
def test_no_prompt_is_cut(wrong: str):
    how, length, message = TOO_SHORT[wrong]
    prompts = ["a", "Why is that so, and since when, and for how long?"]
    batch = chat_batch(chatting(), prompts, **how)
    with pytest.raises(ValueError, match=message):
        shortened(batch, length)


# Losses of answers -----------------------------------------------------------------------------


def by_hand(logits: Tensor, labels: Tensor, of: Any) -> list[float]:
    """Return the mean over each row's answer, token by token."""
    found = []
    for row, ids in zip(logits.double(), labels, strict=True):
        terms = [
            of(float(row[i - 1].softmax(-1)[ids[i]])) for i in range(1, len(ids)) if ids[i] >= 0
        ]
        found.append(sum(terms) / max(1, len(terms)))
    return found


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 4), st.integers(2, 6), st.integers(2, 5))
def test_losses_are_those_of_a_loop(seed: int, rows: int, length: int, words: int):
    draw = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(rows, length, words, dtype=torch.float64, generator=draw)
    labels = torch.randint(-1, words, (rows, length), generator=draw)
    labels[labels < 0] = -100
    log = lambda p: float(torch.tensor(p, dtype=torch.float64).log())  # noqa: E731
    expected = by_hand(logits, labels, lambda p: -log(p))
    torch.testing.assert_close(answer_losses(logits, labels).tolist(), expected)
    dropped = by_hand(logits, labels, lambda p: 0.0 if log(p) < -5 else -log(1 - p))
    torch.testing.assert_close(unlikelihood(logits, labels).tolist(), dropped)


@pytest.mark.parametrize("loss", [answer_losses, unlikelihood])
def test_losses_of_answers_are_not_waited_for(loss: Any, monkeypatch: pytest.MonkeyPatch):
    """How many tokens answers have is known to the device alone, in each pass of a round."""
    logits = torch.randn(2, 4, 5, requires_grad=True)
    labels = torch.tensor([[-100, -100, 1, 2], [-100, 3, -100, -100]])
    with no_reads(monkeypatch):
        loss(logits, labels).sum().backward()


@pytest.mark.parametrize("loss", [answer_losses, unlikelihood])
def test_what_is_not_an_answer_does_not_count(loss: Any):
    """A row of padding alone attends to nothing, and gives no number."""
    logits = torch.randn(2, 4, 5)
    labels = torch.tensor([[-100, -100, -100, 2], [-100, 3, -100, -100]])
    expected = loss(logits, labels)
    spoilt = logits.clone()
    spoilt[0, :2] = torch.nan
    spoilt[1, 1:] = torch.inf
    spoilt.requires_grad_()
    found = loss(spoilt, labels)
    assert torch.equal(found, expected)
    found.sum().backward()
    assert spoilt.grad.isfinite().all()
    assert not spoilt.grad[0, :2].any()


def test_a_loss_of_a_likely_token_is_exact_and_finite():
    logits = torch.tensor([[[40.0, 0.0], [0.0, 0.0]]], requires_grad=True)
    loss = unlikelihood(logits, torch.tensor([[-100, 0]]))
    torch.testing.assert_close(loss, torch.tensor([40.0]))
    loss.sum().backward()
    torch.testing.assert_close(logits.grad[0, 0], torch.tensor([1.0, -1.0]))


def test_a_loss_below_its_floor_falls_on_slowly():
    losses = torch.tensor([-7.0, -5.0, 1.0], requires_grad=True)
    found = floored(losses, -5.0)
    found.sum().backward()
    torch.testing.assert_close(found, torch.tensor([-5.002, -5.0, 1.0]))
    torch.testing.assert_close(losses.grad, torch.tensor([1e-3, 1e-3, 1.0]))


def test_half_precision_is_widened_for_the_sum():
    torch.manual_seed(0)
    logits = torch.randn(2, 9, 50).bfloat16()
    labels = torch.randint(50, (2, 9))
    wide = F.cross_entropy(logits[:, :-1].float().mT, labels[:, 1:], reduction="none").mean(1)
    torch.testing.assert_close(answer_losses(logits, labels), wide)


def merging() -> Any:
    """Return a tokenizer that reads line breaks side by side as one token, as Qwen's does."""
    inner = Tokenizer(models.BPE())
    breaks = pre_tokenizers.Split(Regex(r"\s*[\r\n]+|[^\r\n]+"), "isolated")
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.pre_tokenizer = pre_tokenizers.Sequence([breaks, whole])
    inner.decoder = decoders.ByteLevel()
    words = ["<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    how = {"vocab_size": 300, "initial_alphabet": alphabet, "show_progress": False}
    inner.train_from_iterator(
        ["a\n\nb\n\nc"] * 20, trainers.BpeTrainer(special_tokens=words, **how)
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|im_end|>")
    tokenizer.chat_template = TEMPLATES["chatml"][0]
    return tokenizer


@pytest.mark.parametrize("begin", ["", "\n", "\n\n"])
def test_what_a_tokenizer_would_merge_is_read_apart(begin: str):
    """As the model itself would write it: the prompt's ids are those of the prompt alone."""
    tokenizer = merging()
    batch = chat_batch(tokenizer, ["Why?"], [f"{begin}So."])
    alone = chat_batch(tokenizer, ["Why?"])
    size = alone.input_ids.shape[1]
    assert torch.equal(batch.input_ids[:, :size], alone.input_ids)
    assert tokenizer.decode(batch.input_ids[0, size:]).startswith(f"{begin}So.")
    assert torch.equal(batch.where[:, :size], alone.where)
    assert not batch.where[:, size:].any()


def test_a_row_does_not_depend_on_the_length_of_those_beside_it():
    """Padding on the left would shift the positions of a model that counts them (GPT-2)."""
    tokenizer = chatting()
    tokenizer.padding_side = "left"
    model: Any = speaking("GPT2", tokenizer)
    short, long = ("a", "b"), ("A film about pictures?", "It is one.")
    found = []
    for rows in ([short], [short, long]):
        batch = chat_batch(tokenizer, *(list(x) for x in zip(*rows, strict=True)))
        found.append(answer_losses(model(**batch.inputs).logits, batch.labels)[0])
    torch.testing.assert_close(found[0], found[1])
