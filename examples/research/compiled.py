"""What a round of a compiled model takes, over one of the model as it is.

    python examples/research/compiled.py --device cuda                 # batches of 1 to 64
    python examples/research/compiled.py --sizes 2x16 --rows fgm       # on a CPU, tiny

Both play the same rounds from the same weights, in turn, after rounds that compile; the ratio is
the median of the rounds', with [least, most]. Settings that are in compiled.jsonl with as many
rounds are left out.
"""

import argparse
import re
import sys
from pathlib import Path

import _above  # noqa: F401
from common.options import positive, script

OUTPUT = Path(__file__).parent.parent / "results"
SIZES = ["1x128", "4x128", "16x128", "64x128"]
ROWS = ["pgd, K=3", "smart, no teacher", "mat, 3 and 2"]
TINY = 64  # tokens of a batch up to which the model is tiny, as in benchmark.py


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = script("compiled", "[options]", __doc__)
    add = parser.add_argument
    add("--sizes", nargs="+", metavar="BxN", default=SIZES, help="(default: %(default)s)")
    add("--device", choices=["cpu", "cuda"], default="cpu", help="(default: %(default)s)")
    add("--rounds", type=positive, default=7, metavar="N", help="(default: %(default)s)")
    add("--rows", nargs="+", default=ROWS, metavar="NAME", help="as of benchmark.py")
    add("--output", type=Path, default=OUTPUT, metavar="FOLDER", help="of compiled.jsonl")
    options = parser.parse_args(argv)
    for size in options.sizes:
        if not re.fullmatch(r"[1-9]\d*x[1-9]\d*", size):
            parser.error(f"a size is batch x length, such as 16x128, got {size}")
    return options


if __name__ == "__main__":
    arguments()  # a mistake is answered before the imports below, which take seconds

import json
from dataclasses import asdict
from functools import partial
from typing import Any

import torch

from benchmark_parts.contenders import CONTENDERS, ours
from benchmark_parts.measure import seconds
from benchmark_parts.results import ratio
from benchmark_parts.work import Part, Setting, Work
from common.tables import markdown

WARM_UP = 3


def measure(setting: Setting, name: str, rounds: int) -> dict[str, Any]:
    """Return the seconds of each round, as it is and compiled."""
    taken: dict[str, list[float]] = {"plain": [], "compiled": []}
    plays = {}
    for kind in taken:
        work = Work(setting)
        if kind == "compiled":
            work.model = torch.compile(work.model)
        player = ours(work, CONTENDERS[name].solver(work.coordinates))
        plays[kind] = Part(work.reset, partial(player.play, None))
        for _ in range(WARM_UP):
            seconds(setting.device, plays[kind])
    for number in range(rounds):
        for kind in sorted(taken, reverse=bool(number % 2)):
            taken[kind].append(seconds(setting.device, plays[kind]))
    return {**asdict(setting), "torch": torch.__version__, "row": name, **taken}


def table(results: list[dict[str, Any]]) -> str:
    """Return the ratios as a table."""
    rows = []
    for r in results:
        size = f"{r['batch']}×{r['length']}"
        rows.append([r["row"], size, r["device"], ratio(r["compiled"], r["plain"])])
    return markdown(["row", "tokens", "on", "compiled ÷ plain"], rows)


def _check(options: argparse.Namespace) -> None:
    unknown = [name for name in options.rows if name not in CONTENDERS]
    if unknown:
        raise ValueError(f"there is no row {unknown[0]!r}, there are {', '.join(CONTENDERS)}.")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no GPU here.")


def main(argv: list[str] | None = None) -> int:
    """Measure what is not known yet, and print the table."""
    options = arguments(argv)
    try:
        _check(options)
    except ValueError as error:
        print(f"compiled: {error}", file=sys.stderr)
        return 2
    torch.set_num_threads(1)
    path = options.output / "compiled.jsonl"
    known = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    for size in options.sizes:
        batch, length = map(int, size.split("x"))
        model = "tiny" if batch * length <= TINY else "bert"
        setting = Setting(model, batch, length, device=options.device)
        for name in options.rows:
            found = {**asdict(setting), "row": name}
            if any({**r, **found} == r and len(r["plain"]) == options.rounds for r in known):
                continue
            known.append(measure(setting, name, options.rounds))
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a") as file:
                file.write(json.dumps(known[-1]) + "\n")
    print(table(known))
    return 0


if __name__ == "__main__":
    sys.exit(main())
