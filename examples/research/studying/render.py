"""report.md: the summary, the tables and the pictures of a study."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mixadv.reports import kept
from studying import pictures, summary, tables
from studying.findings import Findings, groups
from studying.plan import BUDGETS, COMPARED, Budget, Study
from studying.work import COUNT, RESTARTS, STEPS

PICTURES = {
    "gains.png": "Difference to plain training, with 95 % intervals over seeds",
    "attacked.png": "Accuracy against the radius of PGD at equal epochs, mean over seeds; dotted "
    "where a model always answers the same",
}
GROUPS = (
    "Groups are means over their methods, seed by seed. Pure, the adversary plays one particle: "
    "{pure}. Mixed, it plays several: {mixed}. Noise is in neither and in no count above: it does "
    "not look at the loss. Each line of the list corrects for its own comparisons."
)
OFFICIAL = (
    "Mean over seeds ± half of Student's 95 % interval, times 100, of the last weights: no "
    "checkpoint is chosen. Differences to plain training are paired: the same seed draws the same "
    "training rows and their order; the test rows are the same for all, and their choice is in no "
    "interval. An interval is that of a single comparison, and of twenty one "
    "misses by chance: the summary corrects for their number. `passes`: what an update costs in "
    "plain updates; a forward, a backward to the activations and one to the weights count alike. "
    "`time`: what it took, the least over the seeds at equal epochs, beside other jobs. "
    "At equal compute every method gets {compute:g} times the passes of plain training at equal "
    "epochs: one that costs less than {compute:g} reads the rows more often than at equal epochs, "
    "one that costs more less often."
)
ROBUST = (
    "Means over seeds ± half of Student's 95 % interval. `PGD r`: accuracy at the end of {steps} "
    "steps in an L2 ball of r token norms of the untrained encoder, on {rows} rows, others for "
    "each seed. `loss increase`: median of the largest found in a ball of {increase_radius:g}, "
    "from δ = 0 and from {restarts} random starts, on the rows that all methods get right with a "
    "seed; `from zero`, `from random`: by these starts alone; `clean loss`: median on these rows. "
    "Shifted sets: accuracy, and the drop from that on {clean_rows} clean rows. `under`: accuracy "
    "under attack by that source of words, with the words changed in a success and the texts read "
    "per row that was right. `ECE`: expected calibration error, in per cent. A model that always "
    "answers the same cannot be attacked: it is right on the share of that answer at every radius."
)
EXPLOITED = (
    "Lower bound of what the adversary gains by leaving the solver's own strategy for the end of "
    f"{STEPS} steps from {RESTARTS} starts in its own ball, at equal epochs, on the first {COUNT} "
    "rows. Each line of the table has the payoff and the radius (in token norms) of its solver: "
    "they do not compare."
)
LEARNERS = (
    "At equal epochs. `mean`: the running average of the weights, over all updates alike. "
    "`mixture`: the mean probability of the last samples of the weights; these are of the last "
    "updates, where the rate has decayed, and so are almost the last weights."
)
HALF = "At as many epochs, so half of the updates."
RATES = (
    "Score of one run with seed {} on {} training rows held out, for each rate, at the budget of "
    "the runs that it is chosen for; the one chosen is bold, the first of equals. A rate at an end "
    "of the grid may not be the best."
)
DAMPED = (
    "MAT pulls the weights back within and between rounds: with its default damping and one sample "
    "of the weights per round it moves 0.49 of each step, so that its rates are to be read as half "
    "as large."
)


def render(study: Study, results: Mapping[str, Any], folder: Path, command: str) -> str:
    """Write report.md and the pictures of a study in a folder; return the report."""
    findings = Findings(study, results)
    drawn = {path.name for path in pictures.draw(findings, folder)}
    parts = [
        "# What adversarial training bought",
        about(findings, command),
        "## Summary",
        "\n".join(summary.verdict(findings, *of) for of in summary.compared(findings)),
        summary.power(findings),
        summary.grouped(findings),
        GROUPS.format(**{group: ", ".join(of) for group, of in groups(study).items()}),
        *(f"![{text}]({file})" for file, text in PICTURES.items() if file in drawn),
        "## Official metrics",
        OFFICIAL.format(compute=study.compute),
        *(part for task in study.tasks for part in _official(findings, task)),
        *_part("## Robust measures", ROBUST.format(**asdict(study.measure)), _robust(findings)),
        *_part("## Learners", LEARNERS, tables.learners(findings, "epochs")),
        *_part("## Exploitability", EXPLOITED, tables.exploitability(findings, "epochs")),
        *_part("## Half of the rows", HALF, tables.half(findings)),
        "## Learning rates",
        RATES.format(study.search_seed, study.hold_out),
        DAMPED if any(way.solver == "mat" for way in study.methods.values()) else "",
        *(part for budget, text in BUDGETS.items() for part in _rates(findings, budget, text)),
    ]
    text = "\n\n".join(part for part in parts if part) + "\n"
    kept.write(folder / "report.md", text)
    return text


def about(findings: Findings, command: str) -> str:
    """Return how the study was made, and what is missing."""
    study = findings.study
    machines = {line["machine"] for line in findings.results.values() if "machine" in line}
    seeds = ", ".join(map(str, study.seeds))
    return (
        f"`{command}`: {study.model}, seeds {seeds}, "
        f"on {'; '.join(sorted(machines)) or 'a machine that is not known'}. "
        f"Missing: {summary.missing(findings)}.{summary.diverged(findings)}"
    )


def _official(findings: Findings, task: str) -> list[str]:
    return [f"### {task}: {findings.metric(task)}", tables.official(findings, task)]


def _robust(findings: Findings) -> str:
    found = {
        f"### {task}, {BUDGETS[budget]}": tables.robust(findings, task, budget)
        for task in findings.study.tasks
        for budget in COMPARED
    }
    return "\n\n".join(f"{title}\n\n{table}" for title, table in found.items() if table)


def _rates(findings: Findings, budget: Budget, title: str) -> list[str]:
    return _part(f"### {title.capitalize()}", "", tables.rates(findings, budget))


def _part(title: str, text: str, found: str) -> list[str]:
    return [title, text, found] if found else []
