"""Which families of the transformers library are played: a table written by the tests that ran.

    python -m tests.families

runs `tests/test_families.py` and writes `tests/families.md`; see `tests.matrix`.
"""

import pytest

import mixadv
from tests.families_zoo import FAMILIES, REFUSED
from tests.matrix import ROOT, Recorder
from tests.zoo import REFUSED as SAID

TABLE = ROOT / "tests" / "families.md"
TESTS = "tests/test_families.py"
CHECKS = {
    "r·g/‖g‖": "test_one_step_is_the_radius_times_the_direction_of_the_gradient[{}]",
    "padding still": "test_what_does_not_count_stays_still[{}]",
    "radius 0 is plain": "test_at_radius_zero_the_gradient_is_the_plain_one[{}]",
    **{
        solver: f"test_the_loss_falls_or_the_solver_says_why_not[{{}}-{solver}]"
        for solver in ("fgm", "freelb", "smart", "mat", "cat")
    },
}


class All(Recorder):
    """Runs all that was collected."""

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        self.collected = [item.nodeid for item in items]


def cell(test: str, seen: Recorder) -> str:
    """Return ✔, or why a test passed by being refused."""
    if test not in seen.passed:
        raise SystemExit(f"no verdict without a test that passes: {test}")
    return f"– {SAID[test]}" if test in SAID else "✔"


def table(seen: Recorder) -> str:
    """Return the table in Markdown, and that of what is refused as it is."""
    lines = [
        f"| family | kind | site | {' | '.join(CHECKS)} |",
        "|---" * (len(CHECKS) + 3) + "|",
    ]
    for name, family in FAMILIES.items():
        [site] = mixadv.Game(family.build(), "fgm", family.site).site.names
        cells = [cell(f"{TESTS}::{check.format(name)}", seen) for check in CHECKS.values()]
        said = f"`{site}`{'' if family.site is None else ', named'}"
        lines.append(f"| {name} | {family.kind} | {said} | {' | '.join(cells)} |")
    lines += ["", "| refused as it is | kind | reason |", "|---|---|---|"]
    for name, (family, _) in REFUSED.items():
        test = f"{TESTS}::test_what_is_refused_says_what_to_write[{name}]"
        lines.append(f"| {name} | {family.kind} | {cell(test, seen)[2:]} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run the tests; write the table."""
    seen = All()
    options = ["-q", "-W", "ignore::pytest.PytestAssertRewriteWarning", "-p", "no:cacheprovider"]
    pytest.main([*options, "-m", "slow or not slow", TESTS], plugins=[seen])
    TABLE.write_text(table(seen))


if __name__ == "__main__":
    main()
