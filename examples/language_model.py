r"""Adversarial training of a small language model, on two harmless stand-ins.

trigger: a sequence of words is planted that makes the model say one fixed sentence; then it is to
be removed by training that never shows it. Arms: plain fine-tuning, noise at the embeddings,
untargeted latent adversarial training (LAT) at the embeddings and in a layer, targeted LAT, which
knows the sentence, its losses without an adversary (away), and DPO for both players in a layer
(dpo). Measured over updates: how often the sentence comes, or its subject in other words, the
held-out loss.

policy: the model is to decline one topic, cooking with garlic. Arms: plain fine-tuning (sft),
ContinuousAT, targeted LAT, MixAT, and a mixture of two adapters by ContinuousAT that share its
updates (adapters), of which one is drawn for each answer. Measured: success of attacks that
training does not see, refusals of near topics, the held-out loss, and what 50 plain updates on
other questions undo. --gcg 20 adds suffixes that nanogcg searches for on the trained model
(pip install --no-deps nanogcg==0.3.0), at 32 forwards a step for each prompt.

The model is SmolLM2-135M-Instruct with LoRA adapters; python examples/smollm2.py fetches it. An
update of 4 rows takes about 2.5 seconds of one CPU core without an adversary, 10 with 3 steps of
ascent, 20 with two answers. bfloat16 (--dtype) is faster where the processor has instructions for
it, and much slower where it has none; small radii are noise in it, which the first round warns of.
Each run adds one JSON line to OUTPUT/results.jsonl, and one that has a line is not repeated.
ContinuousAT is called CAT by its authors; `mixadv.CAT` and --solver cat of the other scripts are
contrastive adversarial training.

    python examples/smollm2.py
    python examples/language_model.py trigger --seeds 0 1 2
    python examples/language_model.py policy --arms sft continuous-at --seeds 0
    python examples/language_model.py --report
    python examples/language_model.py --report --output examples/results/language_model.jsonl
"""

import sys
from argparse import Namespace
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

from common.language import EXPERIMENTS as NAMES
from common.language import OWN, Setting
from common.options import positive, script


def arguments(argv: list[str] | None = None) -> Namespace:
    """Parse the command line."""
    parser = script("language_model", "[trigger|policy] [options]", __doc__)
    add = parser.add_argument
    add("experiment", nargs="?", choices=NAMES, help="which; without one both")
    add("--arms", nargs="+", default=[], metavar="NAME", help="how it is trained (default: all)")
    add("--seeds", nargs="+", type=int, default=[0], metavar="N", help="(default: 0)")
    texts = {
        "model": "smollm2 or a folder (default: %(default)s)",
        "updates": "of each run (default: %(default)s)",
        "batch_size": "rows of an update (default: %(default)s)",
        "learning_rate": "of the adapters (default: %(default)g)",
        "rank": "of the adapters (default: %(default)s)",
        "measure_every": "updates (default: %(default)s)",
        "steps": "of the ascent (default: %(default)s)",
        "radius": "of each token's ball, in mean token norms (default: %(default)g)",
        "dtype": "of weights and passes; bfloat16 rounds small radii off (default: %(default)s)",
        "gcg": "steps of nanogcg's search for suffixes, in policy (default: %(default)s, none)",
    }
    kinds: dict[str, Callable[[str], Any]] = {
        "model": str,
        "dtype": str,
        "learning_rate": float,
        "radius": float,
    }
    choices = {"dtype": ("float32", "bfloat16")}
    for f in fields(Setting):
        if f.name not in OWN:
            kind = kinds.get(f.name, positive)
            option = f"--{f.name.replace('_', '-')}"
            of = {"choices": choices[f.name]} if f.name in choices else {"metavar": "X"}
            add(option, type=kind, default=f.default, help=texts[f.name], **of)
    text = "of results, adapters, picture; to --report a .jsonl too (default: %(default)s)"
    add("--output", type=Path, default=Path("runs/language_model"), metavar="FOLDER", help=text)
    add("--report", action="store_true", help="show what there is, and draw the curves")
    return parser.parse_args(argv)


if __name__ == "__main__":
    arguments()  # a mistake is answered before the imports below, which take seconds

from common.command import entry
from common.language import policy, shown, trigger
from common.language.training import RESULTS, once
from common.parameters import known
from common.results import finished

EXPERIMENTS: dict[str, Any] = dict(zip(NAMES, (trigger, policy), strict=True))


def settings(options: Namespace) -> list[Setting]:
    """Return the runs that the command line asks for, a seed after the other."""
    chosen = [options.experiment] if options.experiment else list(EXPERIMENTS)
    arms = {name: options.arms or list(EXPERIMENTS[name].ARMS) for name in chosen}
    for name, wanted in arms.items():
        for arm in wanted:
            known("--arms", arm, EXPERIMENTS[name].ARMS, f", of {name}")
    more = {f.name: getattr(options, f.name) for f in fields(Setting) if f.name not in OWN}
    return [
        Setting(name, arm, seed, **more)
        for seed in options.seeds
        for name, wanted in arms.items()
        for arm in wanted
    ]


def places(options: Namespace) -> tuple[Path, Path]:
    """Return where results are, and the picture: in the folder, or beside a file to report."""
    if options.output.suffix != ".jsonl":
        return options.output / RESULTS, options.output / "trigger.png"
    if not options.report:
        raise ValueError(f"--output {options.output} is a file: runs need a folder, or --report.")
    return options.output, options.output.with_suffix(".png")


def work(options: Namespace) -> str:
    """Run what the command line asks for; return the tables."""
    path, picture = places(options)
    if options.report:
        results = list(finished(path).values())
        if not results:
            raise ValueError(f"{path} has no results yet: run without --report, or --output.")
    else:
        wanted = settings(options)
        results = once(
            wanted, options.output, lambda s: EXPERIMENTS[s.experiment].run(s, options.output)
        )
    triggers = [r for r in results if r["experiment"] == "trigger"]
    if triggers:
        shown.draw(triggers, picture)
    return shown.tables(results)


main = entry("language_model", arguments, work)

if __name__ == "__main__":
    sys.exit(main())
