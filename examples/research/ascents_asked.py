"""The command line of directions.py and ascents_tried.py."""

import argparse
from pathlib import Path


def asked(argv: list[str] | None, about: str, output: str) -> argparse.Namespace:
    """Parse the command line of a script: what it is about, and where its rows go."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--task", default="intents", help="of examples/intent.py or glue.py")
    parser.add_argument("--data", default="", help="a folder with the task, as for those")
    parser.add_argument("--updates", type=int, default=80)
    parser.add_argument("--limit", type=int, default=0, help="training rows; 0 takes all")
    parser.add_argument("--shots", type=int, default=0, help="training rows of each label")
    parser.add_argument("--lr", type=float, default=4e-4)
    parser.add_argument("--rows", type=int, default=128, help="held out, to play on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path(output))
    parser.add_argument("--report", action="store_true", help="what there is in OUTPUT")
    return parser.parse_args(argv)
