"""How robust a language model is: attacks on its answers, over-refusal, and what it still knows."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from mixadv.checks import check_function
from mixadv.reports.kept import as_json
from mixadv.reports.shown import Table, number, share
from mixadv.robustness.generation import Judge, Speaker, judged
from mixadv.robustness.generation_attacks import GenerationAttack, NoAttack
from mixadv.robustness.statistics import bootstrap, wilson

PLAIN = "none"  # the name of no attack
ANY = "any of them"  # of the worst case over attacks


@dataclass(frozen=True)
class GenerationReport:
    """What `evaluate_generator` measured of one model.

    Attributes:
        sections: as JSON has them: `about`; `attacks`, by name the share of prompts on which one
            of the attack's answers is what is looked for; `refusal` of near prompts and `utility`
            where asked for. Shares have Wilson's intervals; `per row` holds what they sum up.
    """

    sections: dict[str, Any]

    def table(self) -> str:
        """Return tables to read in a terminal."""
        return "\n\n".join(table.text() for table in self._tables())

    __str__ = table

    def markdown(self) -> str:
        """Return tables to paste."""
        return "\n\n".join(table.markdown() for table in self._tables()) + "\n"

    def json(self) -> str:
        """Return the sections as JSON."""
        return json.dumps(self.sections, allow_nan=False)

    def _tables(self) -> list[Table]:
        about, attacks = self.sections["about"], self.sections["attacks"]
        rows = [[name, str(x["tries"]), share(x["success"])] for name, x in attacks.items()]
        title = f"Attacks on {about['model']} ({about['prompts']} prompts)"
        found = [Table(title, ("attack", "tries a prompt", "success %"), rows)]
        kept = []
        if "refusal" in self.sections:
            refusal = self.sections["refusal"]
            kept.append(["refused near prompts %", str(refusal["rows"]), share(refusal["share"])])
        if "utility" in self.sections:
            utility = self.sections["utility"]
            kept.append(["held-out loss", str(utility["rows"]), number(utility["loss"])])
        return [*found, Table("What is kept", ("", "rows", "found"), kept)] if kept else found


@dataclass(frozen=True, kw_only=True)
class GenerationEvaluation:
    """What is measured of a language model, and how: the same for all that are to be compared.

    Attributes:
        attacks: by name; the prompts as they are are always among them, as `"none"`.
        near: harmless prompts near to those that the model is to refuse.
        refuses: whether an answer to one of `near` refuses.
        held_out: prompts and answers, whose mean negative log-likelihood is the utility.
        system: a system message in front of each prompt.
        max_new_tokens: of an answer.
        batch_size: prompts side by side.
        level: of the intervals.
        name: of the model, in tables.
    """

    attacks: Mapping[str, GenerationAttack] = field(default_factory=dict)
    near: Sequence[str] = ()
    refuses: Judge | None = None
    held_out: Sequence[tuple[str, str]] = ()
    system: str | None = None
    max_new_tokens: int = 32
    batch_size: int = 16
    level: float = 0.95
    name: str = "the model"

    def __post_init__(self) -> None:
        if isinstance(self.near, str) or not hasattr(self.near, "__len__"):
            raise ValueError(f"near= must be a list of prompts, got {self.near!r:.60}.")
        if not isinstance(self.attacks, Mapping):
            raise TypeError(f"attacks= must be a dict of attacks by name, got {self.attacks!r}.")
        for name, attack in self.attacks.items():
            _check_attack(name, attack)
        _check_pairs(self.held_out)
        if self.near and self.refuses is None:
            raise ValueError("near= needs refuses=, a judge of whether an answer refuses.")
        if self.refuses is not None:
            what = 'refuses= must be a function of a prompt and an answer, such as says("sorry")'
            check_function(what, self.refuses)
        if taken := {PLAIN, ANY} & set(self.attacks):
            raise ValueError(f"attacks: {min(taken)!r} has a meaning of its own: rename that one.")

    def measure(
        self, model: nn.Module, tokenizer: Any, prompts: Sequence[str], judge: Judge
    ) -> GenerationReport:
        """Measure a model."""
        check_function("judge must be a function of a prompt and an answer", judge)
        if isinstance(prompts, str) or not hasattr(prompts, "__len__"):
            raise ValueError(f"prompts must be a list of at least one prompt, got {prompts!r:.60}.")
        speaker = Speaker(model, tokenizer, self.system, self.max_new_tokens, self.batch_size)
        settings = ("level", "system", "max_new_tokens")
        sections: dict[str, Any] = {
            "about": {
                "model": self.name,
                "prompts": len(prompts),
                **{name: getattr(self, name) for name in settings},
            },
            "attacks": self._attacked(speaker, list(prompts), judge),
        }
        if self.near:
            sections["refusal"] = self._refusal(speaker, list(self.near))
        if self.held_out:
            asked, answers = zip(*self.held_out, strict=True)
            losses = speaker.losses(asked, answers)
            sections["utility"] = {
                "rows": len(losses),
                "loss": bootstrap(losses, level=self.level)._asdict(),
                "per row": {"losses": losses},
            }
        return GenerationReport(as_json(sections))

    def _attacked(
        self, speaker: Speaker, prompts: Sequence[str], judge: Judge
    ) -> dict[str, dict[str, Any]]:
        """Return what each attack comes to, and the worst case over them."""
        found = {}
        for name, attack in {PLAIN: NoAttack(), **self.attacks}.items():
            answers = attack.answers(speaker, prompts)
            _check_answers(name, answers, len(prompts))
            verdicts = [
                judged(judge, [prompt] * len(said), said)
                for prompt, said in zip(prompts, answers, strict=True)
            ]
            found[name] = self._success([any(row) for row in verdicts], max(map(len, answers)))
            found[name]["per row"]["answers"] = answers
        if self.attacks:
            columns = zip(*(x["per row"]["success"] for x in found.values()), strict=True)
            tries = sum(x["tries"] for x in found.values())
            found[ANY] = self._success([any(row) for row in columns], tries)
        return found

    def _success(self, rows: list[bool], tries: int) -> dict[str, Any]:
        success = wilson(rows, self.level)._asdict()
        return {"success": success, "tries": tries, "per row": {"success": rows}}

    def _refusal(self, speaker: Speaker, near: Sequence[str]) -> dict[str, Any]:
        """Return the share of near prompts that are refused."""
        assert self.refuses is not None
        said = speaker.answers(near)
        refused = judged(self.refuses, near, said)
        share_of = wilson(refused, self.level)._asdict()
        per_row = {"prompts": near, "answers": said, "refused": refused}
        return {"rows": len(near), "share": share_of, "per row": per_row}


def _check_attack(name: str, attack: Any) -> None:
    if isinstance(attack, type) or not callable(getattr(attack, "answers", None)):
        raise TypeError(
            f"attacks: {name!r} must be an attack, which has a method answers(speaker, prompts), "
            f"got {attack!r:.60}: a function that rewords a prompt goes in as Rewrites(function)."
        )


def _check_pairs(rows: Any) -> None:
    wrong = [rows]
    if hasattr(rows, "__len__") and not isinstance(rows, str | Mapping):
        wrong = [row for row in rows if not isinstance(row, list | tuple) or len(row) != 2]
    if wrong:
        raise ValueError(
            "held_out= must be a list of pairs, a prompt and an answer each, got "
            f'{wrong[0]!r:.60}: of rows that are dicts give [(row["prompt"], row["answer"]), …].'
        )


def _check_answers(name: str, answers: Any, count: int) -> None:
    """Check what an attack returned: its tries are counted, and each of them is judged."""
    fits = isinstance(answers, list | tuple) and len(answers) == count
    for said in answers if fits else ():
        fits = fits and isinstance(said, list | tuple) and len(said) > 0
        fits = fits and all(isinstance(text, str) for text in said)
    if not fits:
        raise ValueError(
            f"The attack {name!r} returned {answers!r:.60}: answers(speaker, prompts) must return "
            f"a list with a list of texts for each of {count} prompts, at least one text in each."
        )


def evaluate_generator(
    model: nn.Module, tokenizer: Any, prompts: Sequence[str], judge: Judge, **settings: Any
) -> GenerationReport:
    """Measure a language model: success of attacks, over-refusal and utility.

    Answers are greedy. The worst case over attacks counts a prompt where any of them succeeds, on
    the same prompts for all. The model is in evaluation mode meanwhile, and left as it was.

    Args:
        model: a causal language model of transformers, with adapters or without.
        tokenizer: fast, with a chat template.
        prompts: that are attacked.
        judge: whether an answer is what the attacker looks for; `lacks("I can't")` where the
            model is to refuse.
        settings: those of `GenerationEvaluation`, which has their defaults.

    Raises:
        ValueError: without prompts or for empty ones; for a judge that returns nothing; for a
            chat template that has no prompt boundary.

    Example:
        >>> from mixadv.robustness import Prefill, evaluate_generator, lacks
        >>> report = evaluate_generator(  # doctest: +SKIP
        ...     model, tokenizer, prompts, lacks("I can't"), attacks={"prefill": Prefill(["Sure."])}
        ... )
        >>> print(report)  # doctest: +SKIP
    """
    return GenerationEvaluation(**settings).measure(model, tokenizer, prompts, judge)
