"""What a command line of pretrain.py asks for, checked before anything is imported for it."""

from argparse import Namespace

from common.parameters import PLAIN, check_solver, known, parameters
from common.places import a_file, check_text
from common.pretraining import ADVERSARY, OBJECTIVES, TINY


def adversary(options: Namespace) -> str:
    """Return the name of the solver that plays against the learner, or "plain"."""
    return options.solver or ADVERSARY.get(options.objective, PLAIN)


def check(options: Namespace) -> None:
    """Raise ValueError for what cannot be run, as far as no data are read."""
    known("--objective", options.objective, OBJECTIVES)
    _check_numbers(options)
    _check_adversary(options)
    if options.tokenizer and options.model != TINY:
        raise ValueError(f"--tokenizer is for {TINY}: {options.model} has one of its own.")
    if options.only_new and (options.from_scratch or options.model == TINY):
        raise ValueError("--only-new is for a checkpoint: from scratch all parameters are new.")
    check_text(options.data)
    if options.neighbours not in ("", "builtin"):
        a_file(options.neighbours)


def _check_numbers(options: Namespace) -> None:
    if not 0 < options.lr < float("inf"):
        raise ValueError(f"--lr must be positive, got {options.lr}.")
    if not 0 <= options.warmup < 1:
        raise ValueError(f"--warmup must be a share in [0, 1), got {options.warmup}.")
    if not options.curriculum >= 0:
        raise ValueError(f"--curriculum must be at least 0, got {options.curriculum}.")
    if not 0 <= options.substitute <= 1:
        raise ValueError(f"--substitute must be a share in [0, 1], got {options.substitute}.")


def _check_adversary(options: Namespace) -> None:
    solver = adversary(options)
    if solver == PLAIN:
        if options.curriculum or options.set:
            raise ValueError("--curriculum and --set are for an adversary: choose a --solver.")
    elif options.objective == "electra":
        raise ValueError(
            "--solver is for mlm, alum and macbert: the adversary of electra is its generator, "
            "which replaces tokens."
        )
    check_solver(solver, of_trainer=True)
    parameters([solver], options.set, None)
