"""What a round of each solver costs, against its floor, against other code, and for what.

    python examples/research/benchmark.py --quick        # two minutes
    python examples/research/benchmark.py                # 16×128 and 64×24: half an hour
    python examples/research/benchmark.py --dropout 0.1 --model embedded --rows smart-pytorch
    python examples/research/benchmark.py --device cuda --sizes 16x128 64x24 4x24 2x16
    python examples/research/benchmark.py --scaling      # cost against sizes, fitted exponents
    python examples/research/benchmark.py --report       # the tables of what was measured

One process measures all rows in turn, in an order that every round reverses, and with them the
parts of an ordinary training step: F a forward pass, A one with a backward to δ alone, S the whole
step, O the optimizer in it, N a normal draw for every weight. A solver's floor is its passes at
those prices: forwards at F, backwards for δ at A − F, backwards of the learner at S − F − O, O for
each optimizer step, N where weights get noise. Every round starts from the same weights. Seconds
are those of the processor for this process, or of the GPU's events; medians over rounds, and
[least, most]. Memory is the most that a round holds at once above what was held before it, in units
of an ordinary step's; what a solver keeps from round to round is told beside it. KL reached is the
symmetric KL at δ, in nats, all playing in one ball. First of all, those who are compared are
checked to compute the same, in float64.
"""

import argparse
from pathlib import Path

import _above  # noqa: F401
from benchmark_parts import EMBEDDED, MODELS
from common.options import script

OUTPUT = Path(__file__).parent.parent / "results"
SIZES, QUICK = ["16x128", "64x24"], ["4x24"]


def asked() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = script("benchmark", "[options]", __doc__)
    add = parser.add_argument
    add("--quick", action="store_true", help="4×24 tokens, 3 rounds")
    add("--sizes", nargs="+", metavar="BxN", help=f"batch x length (default: {' '.join(SIZES)})")
    add("--model", choices=[*MODELS, EMBEDDED], default="bert", help="(default: %(default)s)")
    add("--dropout", type=float, default=0.0, metavar="P", help="(default: %(default)g)")
    add("--device", choices=["cpu", "cuda"], default="cpu", help="(default: %(default)s)")
    add("--threads", type=int, default=1, help="(default: %(default)s)")
    add("--rounds", type=int, metavar="N", help="(default: 5)")
    add("--rows", nargs="+", default=[], metavar="NAME", help="(default: all of one particle)")
    text = "folder of benchmark.jsonl, .md and .png (default: examples/results)"
    add("--output", type=Path, default=OUTPUT, metavar="FOLDER", help=text)
    text = "leave out settings whose rows have as many rounds in benchmark.jsonl already"
    add("--resume", action="store_true", help=text)
    add("--report", action="store_true", help="measure nothing, print tables and draw the picture")
    add("--scaling", action="store_true", help="measure how cost grows instead")
    return parser


if __name__ == "__main__":
    asked().parse_args()  # a mistake is answered before the imports below, which take seconds

import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from tqdm import tqdm

from benchmark_parts import checks, picture, results, scaling
from benchmark_parts.contenders import CONTENDERS
from benchmark_parts.measure import BLOCKS, measure
from benchmark_parts.work import PARTS, Setting

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler tells of each start


TINY = 64
"""Tokens of a batch up to which the tiny model stands in for BERT."""


def sizes(texts: list[str]) -> list[tuple[int, int]]:
    """Return batch and length of each size, given as 16x128.

    Raises:
        ValueError: naming the one that is not a size.
    """
    found = []
    for text in texts:
        match = re.fullmatch(r"([1-9]\d*)[x×]([1-9]\d*)", text)
        if match is None:
            raise ValueError(f"a size is batch x length, such as 16x128, got {text}")
        batch, length = map(int, match.groups())
        if batch < 2 or length > 512:
            raise ValueError(f"a size has 2 rows or more, of at most 512 tokens, got {text}")
        found.append((batch, length))
    return found


def settings(options: argparse.Namespace) -> list[Setting]:
    """Return what is measured on."""
    chosen = options.sizes or (QUICK if options.quick else SIZES)
    found = []
    for batch, length in sizes(chosen):
        small = options.model == "bert" and batch * length <= TINY
        model = "tiny" if small else options.model
        where = (options.device, options.threads)
        found.append(Setting(model, batch, length, options.dropout, *where))
    return found


def rows(options: argparse.Namespace) -> list[str]:
    """Return the names of the rows that are measured.

    Raises:
        ValueError: naming those that there are.
    """
    unknown = [name for name in options.rows if name not in CONTENDERS]
    if unknown:
        raise ValueError(f"there is no row {unknown[0]!r}; there are {', '.join(CONTENDERS)}")
    usual = [name for name, contender in CONTENDERS.items() if not contender.extra]
    return options.rows or usual


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = asked()
    options = parser.parse_args(argv)
    options.rounds = options.rounds or (3 if options.quick else 5)
    try:
        check(options)
    except ValueError as error:
        parser.error(str(error))
    return options


def check(options: argparse.Namespace) -> None:
    """Raise ValueError where the options cannot be measured with."""
    sizes(options.sizes or [])
    rows(options)
    for name in ("threads", "rounds"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name} must be at least 1, got {getattr(options, name)}")
    if not 0 <= options.dropout < 1:
        raise ValueError(f"--dropout must be in [0, 1), got {options.dropout:g}")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no GPU here")


def run(options: argparse.Namespace, path: Path) -> list[results.Result]:
    """Measure what the options ask for, keep the results after each round.

    Returns:
        All results that are kept.
    """
    names, wanted = rows(options), settings(options)
    done = {(results.setting(r), r["row"], len(r["seconds"])) for r in results.load(path)}
    if options.resume:
        wanted = [s for s in wanted if not {(s, n, options.rounds) for n in names} <= done]
    for name, error in checks.assert_equivalent().items():
        print(f"{name}: {error:.0e} apart, relative, in float64", file=sys.stderr)
    plays = 2 * len(names) + options.rounds * (len(names) + BLOCKS * len(PARTS))
    for setting in wanted:
        with noting(plays, f"{setting.batch}×{setting.length}, ") as note:
            for found in measure(setting, names, options.rounds, note):
                results.store(path, found)
    return results.load(path)


@contextmanager
def noting(total: int, where: str = "") -> Iterator[Callable[[str], None]]:
    """Give a function that shows what comes next, of so many plays."""
    with tqdm(total=total, disable=None, leave=False) as bar:

        def note(text: str) -> None:
            bar.set_description(where + text)
            bar.update()

        yield note


def scaled(options: argparse.Namespace) -> str:
    """Return the table of how cost grows."""
    with noting(options.rounds * scaling.plays()) as note:
        return scaling.table(scaling.measure(options.device, options.threads, options.rounds, note))


def main(argv: list[str] | None = None) -> int:
    """Measure, keep the results and print their tables."""
    options = arguments(argv)
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore", "There is a performance drop")  # of vmap on a CPU: measured
    if options.scaling:
        print(scaled(options))
        return 0
    path = options.output / "benchmark.jsonl"
    try:
        known = results.load(path)
        if not options.report:
            known = run(options, path)
    except (ValueError, AssertionError) as error:
        print(f"benchmark: {error}", file=sys.stderr)
        return 2
    picture.draw(known, path.with_suffix(".png"))
    report = results.report(known)
    path.with_suffix(".md").write_text(report + "\n")
    print(report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
