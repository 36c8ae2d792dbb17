r"""Play word substitution as a finite game, row by row of a test set, and solve it for mixtures.

Rows of a game are samples of the learner: several checkpoints, one checkpoint with several dropout
masks, or the samples that MAT keeps in a short training of its own. Columns are a text and what
replacing one of its words makes of it; the payoff is the probability of a wrong answer. The table
has means over the texts of what each player's best pure strategy and its mixture guarantee, the
duality gap, and the value by linear programming for comparison.

    python examples/research/attack_game.py --model runs/glue/sst2-*/last --task sst2
    python examples/research/attack_game.py --model runs/intent/intents-plain-*/last --dropout 8
    python examples/research/attack_game.py --mat 8 --updates 60 --neighbours typos
"""

import sys
from argparse import Namespace
from pathlib import Path

import _above  # noqa: F401
import intent
from common.command import entry, refuse_mistakes
from common.options import positive, script
from common.places import SOURCES, check_words, where
from common.tasks import script_of


def arguments(argv: list[str] | None = None) -> Namespace:
    """Parse the command line; raise ValueError for learners, a task or words that are not there."""
    parser = script("attack_game", "[options]", __doc__)
    add = parser.add_argument
    text = "fine-tuned classifiers, folders or hub names: a row each, or with --dropout a game each"
    add("--model", nargs="+", type=where, default=[], metavar="FOLDER", help=text)
    text = "rows are N dropout masks of each --model"
    add("--dropout", type=positive, default=0, metavar="N", help=text)
    text = "rows are the last N samples of MAT, trained on the task's training rows"
    add("--mat", type=positive, default=0, metavar="N", help=text)
    text = "of MAT's training (default: %(default)s)"
    add("--updates", type=positive, default=100, metavar="N", help=text)
    text = "a task of glue.py or intent.py (default: intents, the embedded set)"
    add("--task", default=intent.EMBEDDED, metavar="NAME", help=text)
    add("--data", default="", metavar="FOLDER", help="of the task, as for its script")
    add("--split", default="", metavar="NAME", help="whose rows are played (default: test, dev)")
    add("--rows", type=positive, default=50, metavar="N", help="(default: %(default)s)")
    add("--columns", type=positive, default=32, metavar="N", help="(default: %(default)s)")
    text = f"{SOURCES} (default: %(default)s)"
    add("--neighbours", default="builtin", metavar="SOURCE", help=text)
    add("--limit", type=positive, default=0, metavar="N", help="training rows of MAT")
    text = "add a JSON line per game to a file"
    add("--output", type=Path, metavar="FILE", help=text)
    options = parser.parse_args(argv)
    script_of(options.task).settings(options)
    check_words(options.neighbours)
    if not (options.mat or options.model):
        raise ValueError("Name the learners: --model FOLDER ..., or --mat N.")
    if len(options.model) == 1 and not (options.mat or options.dropout):
        raise ValueError("One checkpoint is one row: give several, or --dropout N.")
    return options


if __name__ == "__main__":
    refuse_mistakes("attack_game", arguments)  # before the imports below, which take seconds

import json
import shutil
from typing import Any

import numpy as np
from tqdm.auto import tqdm

import attack
from common.data import Task
from common.loop import Keeping, Training
from common.results import EMBEDDED_MODEL, Run
from common.substitution import candidates
from common.tables import markdown
from mixadv.tokens import (
    dropout_masks,
    learner_samples,
    single_substitutions,
    solve_games,
    substitution_game,
)
from mixadv.tokens.substitution.game import Classifier, Equilibrium, SubstitutionGame
from theory import oracles

NAMES = ("pure_adversary_value", "guaranteed", "value", "worst", "pure_learner_value")
HEAD = (
    "learners", "texts", "columns", "adversary: best single", "mixture", "value by LP",
    "learner: mixture", "best row", "largest gap", "helps adversary, %", "helps learner, %",
)  # fmt: skip
LENGTH = 128  # tokens of a text; the rest is cut, as in training
READ = """\
columns: texts that the adversary chooses from, the original among them, fewest to most.
Values are probabilities of a wrong answer, means over the texts: what the adversary is sure of with
one text and with its mixture, the value of the game, the most that the learner's mixture and its
best row lose. helps: games in which a mixture is worth more than the best single choice."""
ALONE = (
    "texts have one column, the original: no word of theirs has a candidate, and all five values "
    "of their games are equal. Another --neighbours, as typos, has candidates for more words."
)
HELPS = 0.001  # in probability, from which a mixture is said to help


def learners(options: Namespace, task: Task) -> dict[str, tuple[list[Classifier], Any]]:
    """Return the rows of the games and their tokenizer, by name."""
    if options.mat:
        run = Run(
            task=task.name, model=EMBEDDED_MODEL, solver="mat", epochs=0.0, limit=options.limit,
            parameters={"samples": options.mat}, updates=options.updates,
        )  # fmt: skip
        training = Training(run, task, Keeping(Path("runs/attack_game")))
        training.complete()
        shutil.rmtree(training.checkpoints)
        assert training.game is not None
        rows = learner_samples(training.game)
        return {f"{len(rows)} samples of MAT": (rows, training.tokenizer)}
    loaded = (attack.load_victim(name, task.labels or ()) for name in options.model)
    found = [(victim.cpu(), tokenizer) for victim, tokenizer in loaded]
    if options.dropout:
        return {
            f"{options.dropout} dropout masks of {name}": (
                dropout_masks(victim, range(options.dropout)),
                tokenizer,
            )
            for name, (victim, tokenizer) in zip(options.model, found, strict=True)
        }
    vocabularies = {json.dumps(tokenizer.get_vocab(), sort_keys=True) for _, tokenizer in found}
    if len(vocabularies) > 1:
        raise ValueError(
            "The checkpoints have different tokenizers: they cannot share the columns."
        )
    return {f"{len(found)} checkpoints": ([victim for victim, _ in found], found[0][1])}


def row(name: str, games: list[SubstitutionGame], found: list[Equilibrium]) -> list[str]:
    """Return a row of the table."""
    mean = {n: np.mean([getattr(one, n) for one in found]) for n in NAMES}
    exact = np.mean([oracles.equilibrium(game.payoff).value for game in games])
    adversary = np.mean([one.guaranteed - one.pure_adversary_value > HELPS for one in found])
    learner = np.mean([one.pure_learner_value - one.worst > HELPS for one in found])
    numbers = [mean["pure_adversary_value"], mean["guaranteed"], exact]
    numbers += [mean["worst"], mean["pure_learner_value"]]
    columns = sorted(game.payoff.shape[1] for game in games)
    return [
        name, str(len(games)), f"{columns[0]} to {columns[-1]}",
        *[f"{number:.4f}" for number in numbers],
        f"{max(one.gap for one in found):.1e}", f"{100 * adversary:.0f}", f"{100 * learner:.0f}",
    ]  # fmt: skip


def work(options: Namespace) -> str:
    """Play and solve; return the table."""
    task, source = attack.load_task(options), candidates(options.neighbours)
    texts, labels = attack.chosen(options, task)
    played = [single_substitutions(text, source, max_texts=options.columns) for text in texts]
    lines = []
    for name, (rows, tokenizer) in learners(options, task).items():
        games = []
        for columns, label in zip(tqdm(played, desc=name, disable=None), labels, strict=True):
            game = substitution_game(rows, tokenizer, columns, label, max_length=LENGTH)
            games.append(game)
        found = solve_games(games)
        lines.append(row(name, games, found))
        if options.output:
            write(options.output, name, options, games, found)
    few = sum(len(columns) == 1 for columns in played)
    warning = f"\n\n{few} of {len(texts)} {ALONE}" if few else ""
    return f"{markdown(HEAD, lines)}\n\n{READ}{warning}"


def write(
    path: Path, name: str, options: Namespace, games: list[SubstitutionGame], found: Any
) -> None:
    """Add a line for each game: payoffs, both mixtures, and what they guarantee."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        for number, (game, one) in enumerate(zip(games, found, strict=True)):
            line = {"learners": name, "task": options.task, "text": number}
            line |= {"payoff": [[round(v, 6) for v in r] for r in game.payoff.tolist()]}
            line |= {n: v.tolist() if hasattr(v, "tolist") else v for n, v in one._asdict().items()}
            file.write(json.dumps(line) + "\n")


main = entry("attack_game", arguments, work)


if __name__ == "__main__":
    sys.exit(main())
