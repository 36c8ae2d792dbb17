"""Measures of language models: attacks, judges, intervals, against loops of one row at a time."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from mixadv.robustness import (
    EmbeddingAttack,
    NoAttack,
    Prefill,
    Rewrites,
    Speaker,
    Suffixes,
    evaluate_generator,
    judged,
    lacks,
    says,
    wilson,
)
from mixadv.robustness.generation import added
from tests.chat_zoo import FAMILIES, chatting, speaking

PROMPTS = ["Why?", "What is a film about pictures?", "кино", "A well-known movie, don't you think?"]
TARGET = "Sure, the film"
NEW = 5


def ids_of(tokenizer: Any, prompt: str, begin: str = "") -> Tensor:
    """Return what a prompt is read as: written out here, with no padding."""
    text = f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n{begin}"
    return torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])[None]


def greedy(model: Any, tokenizer: Any, ids: Tensor, delta: Tensor | None = None) -> str:
    """Return the answer, a token at a time without a cache, δ at the first positions."""
    read, embedding = ids, model.get_input_embeddings()
    for _ in range(NEW):
        embedded = embedding(read).detach().clone()
        if delta is not None:
            embedded[:, : delta.shape[1]] += delta
        with torch.no_grad():
            logits = model(inputs_embeds=embedded).logits[:, -1]
        read = torch.cat([read, logits.argmax(-1, keepdim=True)], 1)
    return tokenizer.decode(read[0, ids.shape[1] :], skip_special_tokens=True)


@pytest.fixture(params=FAMILIES)
def speaker(request: pytest.FixtureRequest) -> Speaker:
    tokenizer = chatting()
    model = speaking(request.param, tokenizer)
    return Speaker(model, tokenizer, max_new_tokens=NEW, batch_size=3)


def test_answers_are_those_of_a_loop_of_single_rows(speaker: Speaker):
    model, tokenizer = speaker.model, speaker.tokenizer
    expected = [greedy(model, tokenizer, ids_of(tokenizer, p)) for p in PROMPTS]
    assert len({*expected}) > 1  # else any mistake in padding would go unseen
    assert NoAttack().answers(speaker, PROMPTS) == [[text] for text in expected]
    begun = ["Yes " + greedy(model, tokenizer, ids_of(tokenizer, p, "Yes ")) for p in PROMPTS]
    assert Prefill(["Yes "]).answers(speaker, PROMPTS) == [[text] for text in begun]


def test_answers_are_greedy_whatever_the_checkpoint_says():
    speaker = Speaker(speaking("Llama", chatting()), chatting(), max_new_tokens=NEW)
    expected = speaker.answers(PROMPTS)
    asked = speaker.model.generation_config
    asked.num_beams, asked.num_return_sequences = 4, 2
    asked.repetition_penalty, asked.no_repeat_ngram_size, asked.min_length = 1.5, 2, 40
    asked.return_dict_in_generate = True
    assert speaker.answers(PROMPTS) == expected
    assert len(EmbeddingAttack(TARGET, steps=1).answers(speaker, PROMPTS)) == len(PROMPTS)


def test_losses_are_those_of_single_rows(speaker: Speaker):
    answers = ["A film.", "No", "кино и фильм", "Bad pictures!"]
    expected = []
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        front = ids_of(speaker.tokenizer, prompt)
        whole = ids_of(speaker.tokenizer, prompt, f"{answer}<|im_end|>\n")
        with torch.no_grad():
            logs = speaker.model(input_ids=whole).logits[0].log_softmax(-1)
        places = range(front.shape[1], whole.shape[1])
        expected.append(-sum(float(logs[i - 1, whole[0, i]]) for i in places) / len(places))
    assert speaker.losses(PROMPTS, answers) == pytest.approx(expected, rel=1e-9)


def climbed(speaker: Speaker, attack: EmbeddingAttack, prompt: str, unit: float) -> Tensor:
    """Return δ of one row `[1, n, d]`: the ascent of one prompt, written out."""
    tokenizer, embedding = speaker.tokenizer, speaker.model.get_input_embeddings()
    front = ids_of(tokenizer, prompt)
    whole = ids_of(tokenizer, prompt, TARGET)
    start = len(tokenizer("<|im_start|>user\n", add_special_tokens=False)["input_ids"])
    count = len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
    at = torch.zeros(whole.shape[1], 1, dtype=torch.float64)
    at[start : start + count] = 1
    delta = torch.zeros(1, whole.shape[1], 16, dtype=torch.float64)
    for _ in range(attack.steps):
        delta.requires_grad_(True)
        logits = speaker.model(inputs_embeds=embedding(whole).detach() + delta * at).logits[0]
        logs = logits.log_softmax(-1)
        places = range(front.shape[1], whole.shape[1])
        mean = sum(logs[i - 1, whole[0, i]] for i in places) / len(places)
        [gradient] = torch.autograd.grad(mean, delta)
        length = gradient.norm(dim=-1, keepdim=True)
        step = attack.step_size or attack.radius / 4
        delta = delta.detach() + step * unit * gradient / length.clamp(min=1e-300) * at
        norms = delta.norm(dim=-1, keepdim=True)
        delta = delta * (attack.radius * unit / norms.clamp(min=1e-300)).clamp(max=1)
    return delta


def test_an_embedding_attack_is_an_ascent_of_each_row(speaker: Speaker):
    step_size = 0.7 if "Llama" in type(speaker.model).__name__ else None
    attack = EmbeddingAttack(TARGET, steps=3, radius=0.5, step_size=step_size)
    embedding: Any = speaker.model.get_input_embeddings()
    read = [i for p in PROMPTS for i in speaker.tokenizer(p, add_special_tokens=False)["input_ids"]]
    unit = float(embedding(torch.tensor(read)).detach().norm(dim=-1).mean())
    assert attack.unit(speaker, PROMPTS) == pytest.approx(unit, rel=1e-6)
    expected = []
    for prompt in PROMPTS:
        delta = climbed(speaker, attack, prompt, attack.unit(speaker, PROMPTS))
        norms = delta.norm(dim=-1)
        assert norms.max() <= 0.5 * unit * (1 + 1e-9)
        batch, found = attack.perturb(speaker, [prompt], attack.unit(speaker, PROMPTS))
        torch.testing.assert_close(found.double(), delta, rtol=1e-6, atol=1e-9)
        assert not found[~batch.where].any()
        front = ids_of(speaker.tokenizer, prompt)
        moved = delta[:, : front.shape[1]]
        expected.append([greedy(speaker.model, speaker.tokenizer, front, moved)])
    assert attack.answers(speaker, PROMPTS) == expected


def test_no_radius_is_no_attack(speaker: Speaker):
    attack = EmbeddingAttack(TARGET, steps=2, radius=0.0)
    assert attack.answers(speaker, PROMPTS) == NoAttack().answers(speaker, PROMPTS)


def test_targets_may_depend_on_prompts():
    tokenizer = chatting()
    speaker = Speaker(speaking("Llama", tokenizer), tokenizer, max_new_tokens=NEW)
    attack = EmbeddingAttack(lambda prompt: f"Of {prompt}", steps=1, radius=0.1)
    batch, _ = attack.perturb(speaker, PROMPTS[:2], 1.0)
    learned = [tokenizer.decode(row[row != -100]) for row in batch.labels]
    assert learned == [f"Of {prompt}" for prompt in PROMPTS[:2]]


def test_texts_are_tried_one_after_the_other():
    tokenizer = chatting()
    speaker = Speaker(speaking("Llama", tokenizer), tokenizer, max_new_tokens=NEW)

    def of(text: str) -> str:
        return greedy(speaker.model, tokenizer, ids_of(tokenizer, text))

    found = Suffixes(["now", "please"]).answers(speaker, PROMPTS)
    assert found == [[of(f"{p} now"), of(f"{p} please")] for p in PROMPTS]
    wordings = {p: [f"Say: {p}", f"{p}!"][: 1 + i % 2] for i, p in enumerate(PROMPTS)}
    found = Rewrites(wordings.__getitem__).answers(speaker, PROMPTS)
    assert found == [[of(text) for text in wordings[p]] for p in PROMPTS]


# The report ------------------------------------------------------------------------------------


def small_report(**settings: Any) -> Any:
    tokenizer = chatting()
    model = speaking("Llama", tokenizer)
    how = {"max_new_tokens": NEW, "batch_size": 3, **settings}
    judge = how.pop("judge", lambda prompt, answer: len(answer) % 2 == 0)
    return evaluate_generator(model, tokenizer, PROMPTS, judge, **how)


def test_the_report_counts_what_the_judge_says():
    attacks = {"prefill": Prefill(["No", "Yes"]), "suffix": Suffixes(["!"])}
    held_out = [(PROMPTS[0], "A film."), (PROMPTS[1], "A story.")]
    short = lambda prompt, answer: len(answer) < 6  # noqa: E731
    report = small_report(
        attacks=attacks, near=PROMPTS[:3], refuses=short, held_out=held_out, name="tiny"
    )
    found = report.sections["attacks"]
    assert list(found) == ["none", "prefill", "suffix", "any of them"]
    assert [found[name]["tries"] for name in found] == [1, 2, 1, 4]
    rows = []
    for name in ("none", "prefill", "suffix"):
        answers = found[name]["per row"]["answers"]
        rows.append([any(len(a) % 2 == 0 for a in said) for said in answers])
        assert found[name]["per row"]["success"] == rows[-1]
        assert found[name]["success"]["value"] == np.mean(rows[-1])
    assert found["any of them"]["per row"]["success"] == [any(x) for x in zip(*rows, strict=True)]
    refusal = report.sections["refusal"]
    assert refusal["share"]["value"] == np.mean([len(a) < 6 for a in refusal["per row"]["answers"]])
    losses = report.sections["utility"]["per row"]["losses"]
    assert report.sections["utility"]["loss"]["value"] == pytest.approx(np.mean(losses))
    assert json.loads(report.json()) == report.sections
    for text in (report.table(), report.markdown(), str(report)):
        assert all(word in text for word in ("tiny", "prefill", "near prompts", "held-out loss"))


def test_without_more_the_report_is_the_prompts_as_they_are():
    report = small_report()
    assert list(report.sections) == ["about", "attacks"]
    assert list(report.sections["attacks"]) == ["none"]


def verdict(value: Any) -> Callable[[str, str], Any]:
    return lambda prompt, answer: value


@dataclass
class Own:
    """An attack of somebody else, which returns the same for each prompt."""

    said: Any
    most: int = len(PROMPTS)

    def answers(self, speaker: Speaker, prompts: Any) -> Any:
        return [self.said for _ in prompts][: self.most]


WRONG: dict[str, tuple[Callable[[], Any], str]] = {
    "nothing": (
        lambda: small_report(judge=verdict(None)),
        r"returned nothing for the prompt 'Why\?",
    ),
    "a number": (lambda: small_report(judge=verdict(0.5)), r"returned 0\.5 for the prompt"),
    "near alone": (lambda: small_report(near=["a"]), "near= needs refuses="),
    "a name taken": (lambda: small_report(attacks={"none": NoAttack()}), "meaning of its own"),
    "no prompts": (
        lambda: evaluate_generator(nn.Linear(1, 1), chatting(), [], lacks("no")),
        "a list of at least one prompt",
    ),
    "no beginnings": (lambda: Prefill([]), "begins must be a list of texts, at least one"),
    "a text for texts": (lambda: Suffixes("now"), "suffixes must be a list of texts"),
    "no wordings": (
        lambda: small_report(attacks={"r": Rewrites(lambda prompt: [])}),
        r"of\(prompt\) must be a list of texts",
    ),
    "one prompt that is no list": (
        lambda: evaluate_generator(nn.Linear(1, 1), chatting(), "Why?", lacks("no")),
        "a list of at least one prompt, got 'Why",
    ),
    "no pairs": (lambda: small_report(held_out=["it"]), "held_out= must be a list of pairs"),
    "rows of dicts": (
        lambda: small_report(held_out=[{"prompt": "What is ice?", "answer": "Frozen water."}]),
        r"a prompt and an answer each, got \{'prompt': 'What is ice\?'.*row\[\"answer\"\]\), …\]",
    ),
    "a stream of pairs": (
        lambda: small_report(held_out=iter([("a", "b")])),
        "held_out= must be a list of pairs",
    ),
    "answers that are texts": (
        lambda: small_report(attacks={"own": Own("abc")}),
        "The attack 'own' returned .*a list of texts for each of 4 prompts",
    ),
    "no answers": (lambda: small_report(attacks={"own": Own([])}), "at least one text in each"),
    "answers to fewer": (
        lambda: small_report(attacks={"own": Own(["a"], 1)}),
        r"'own' returned \[\['a'\]\]: ",
    ),
    "a stream of prompts": (
        lambda: evaluate_generator(nn.Linear(1, 1), chatting(), iter(PROMPTS), lacks("no")),
        "a list of at least one prompt, got <",
    ),
    "prompts left out": (
        lambda: evaluate_generator(nn.Linear(1, 1), chatting(), None, lacks("no")),
        "a list of at least one prompt, got None",
    ),
    "no target": (
        lambda: small_report(attacks={"e": EmbeddingAttack(lambda prompt: "")}),
        "target must be a list of texts",
    ),
    "one near prompt": (lambda: small_report(near="Why?", refuses=lacks("no")), "near= must be a"),
    "no phrases": (says, "at least one phrase"),
    "shares": (lambda: wilson([0.5]), "interval is of Booleans"),
    "no steps": (lambda: EmbeddingAttack("a", steps=0), "steps"),
    "no rows": (lambda: Speaker(nn.Linear(1, 1), None, batch_size=0), "batch_size"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_cannot_be_measured_is_said(wrong: str):
    make, message = WRONG[wrong]
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"judge": None}, "judge must be a function"),
        ({"attacks": [NoAttack()]}, "a dict of attacks"),
        ({"attacks": {"x": print}}, r"attacks: 'x' must be an attack.*Rewrites\(function\)"),
        ({"attacks": {"x": NoAttack}}, "attacks: 'x' must be an attack"),
        ({"near": ["a"], "refuses": "sorry"}, r"refuses= must be a function .*, got 'sorry'"),
    ],
)
def test_what_is_of_another_kind_is_said_at_once(how: dict[str, Any], said: str):
    with pytest.raises(TypeError, match=said):
        small_report(**how)


def test_an_attack_of_another_kind_is_said_before_anything_is_asked():
    with pytest.raises(TypeError, match=r"Rewrites: of must be .*Rewrites\(wordings.__getitem__\)"):
        Rewrites({"a": ["b"]})  # pyright: ignore
    with pytest.raises(TypeError, match=r"target must be how the answer is to begin.*got None"):
        EmbeddingAttack(None)  # pyright: ignore


def test_a_suffix_of_messages_is_behind_what_the_user_wrote_last():
    tokenizer = chatting()
    speaker = Speaker(speaking("Llama", tokenizer), tokenizer, max_new_tokens=NEW)
    asked = [[{"role": "user", "content": p}] for p in PROMPTS]
    turns = [{"role": "user", "content": "A film?"}, {"role": "assistant", "content": "Yes."}]
    now = Suffixes(["now"])
    assert now.answers(speaker, asked) == now.answers(speaker, PROMPTS)
    longer, whole = ([[*turns, {"role": "user", "content": t}]] for t in ("Why?", "Why? now"))
    assert now.answers(speaker, longer) == NoAttack().answers(speaker, whole)
    assert longer[0][-1]["content"] == "Why?"
    for prompt in (turns[1:], [{"role": "user", "content": [{"type": "text", "text": "Why?"}]}]):
        with pytest.raises(ValueError, match="text that the user wrote last"):
            now.answers(speaker, [prompt])


def test_string_rules():
    assert says("can't", "sorry")("", "I'm SORRY.")
    assert not says("can't")("", "can")
    assert lacks("sorry")("", "Sure.")
    assert not lacks("sorry")("", "Sorry, sure.")
    assert not lacks("sorry")("", "  ")  # an answer that was cut off is no success
    assert judged(verdict(np.bool_(True)), ["a"], ["b"]) == [True]


def test_a_model_without_a_cache_is_not_attacked_at_its_first_token_alone():
    model: Any = speaking("Llama", chatting())
    ids = torch.tensor([[5, 6, 7]])
    delta = torch.zeros(1, 3, 16)
    with added(model, delta):
        model(ids)
        with pytest.raises(ValueError, match="reads the prompt again"):
            model(ids)
    with added(model, delta):
        model(ids)
        model(ids[:, :1])
    with added(model, None):
        model(ids)
        model(ids)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.booleans(), min_size=1, max_size=60), st.sampled_from([(0.95, 1.959963984540054)])
)
def test_wilson_is_its_closed_form(values: list[bool], level: tuple[float, float]):
    n, p, z = len(values), sum(values) / len(values), level[1]
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    found = wilson(values, level[0])
    assert found == pytest.approx((p, middle - half, middle + half), abs=1e-9)


# What is left behind ---------------------------------------------------------------------------


def test_the_model_is_left_as_it_was():
    tokenizer = chatting()
    model = speaking("Llama", tokenizer).train()
    model.requires_grad_(False)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.manual_seed(3)
    before = torch.get_rng_state()
    attacks = {"embedding": EmbeddingAttack(TARGET, steps=1), "prefill": Prefill(["No"])}
    evaluate_generator(
        model, tokenizer, PROMPTS[:2], lacks("no"), attacks=attacks, max_new_tokens=2
    )
    assert torch.equal(before, torch.get_rng_state())
    assert all(module.training for module in model.modules())
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in state.items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_perturbation_ends_with_an_exception():
    model: Any = speaking("Llama", chatting())
    delta = torch.ones(1, 1, 16)
    with pytest.raises(KeyError), added(model, delta):
        raise KeyError
    assert not model.get_input_embeddings()._forward_hooks


# Answers -----------------------------------------------------------------------------------------


def test_the_space_after_a_beginning_is_kept():
    """A decoder of SentencePiece strips the first one of what it reads by itself."""
    words = ["<unk>", "</s>", "▁", "▁I", "▁am", "▁not", "\n", *map(chr, range(33, 127))]
    tokenizer = transformers.LlamaTokenizer(
        vocab={w: i for i, w in enumerate(words)}, merges=[("▁", "I")], add_bos_token=False
    )
    tokenizer.pad_token = "</s>"
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}\n{% endfor %}"
    model = speaking("Llama", tokenizer).float()

    class Says(nn.Module):
        def forward(self, hidden: Tensor) -> Tensor:
            return F.one_hot(torch.full(hidden.shape[:-1], words.index("▁not")), len(words)).float()

    model.lm_head = Says()
    speaker = Speaker(model, tokenizer, max_new_tokens=2)
    assert speaker.answers(["Why?"], "I am") == ["I am not not"]
    assert speaker.answers(["Why?"]) == ["not not"]


GREEDS: dict[str, Any] = {
    "stop_strings": ["zzz"],
    "encoder_repetition_penalty": 2.0,
    "exponential_decay_length_penalty": (1, 2.0),
    "watermarking_config": {"bias": 5.0, "seeding_scheme": "lefthash"},
    "prompt_lookup_num_tokens": 2,
}


@pytest.mark.parametrize("name", GREEDS)
def test_answers_are_greedy_whatever_a_checkpoint_asks_for(name: str):
    tokenizer = chatting()
    model: Any = speaking("Llama", tokenizer)
    speaker = Speaker(model, tokenizer, max_new_tokens=NEW)
    plain = speaker.answers(PROMPTS)
    setattr(model.generation_config, name, GREEDS[name])
    assert speaker.answers(PROMPTS) == plain
    assert getattr(model.generation_config, name) == GREEDS[name]
