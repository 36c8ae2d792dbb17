"""report.md: the summary, the tables and the pictures of a study."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from mixadv.reports import kept
from studying import pictures, summary, tables, work
from studying.findings import Findings, groups
from studying.plan import BUDGETS, COMPARED, Study

TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


def render(study: Study, results: Mapping[str, Any], folder: Path, command: str) -> str:
    """Write report.md and the pictures of a study in a folder; return the report."""
    findings = Findings(study, results)
    text = TEMPLATES.get_template("report.md.jinja").render(
        study=study,
        findings=findings,
        command=command,
        machines=sorted({line["machine"] for line in results.values() if "machine" in line}),
        pictures={path.name for path in pictures.draw(findings, folder)},
        groups=groups(study),
        fixed=[name for name, of in study.tasks.items() if len(of.learning_rates) == 1],
        summary=summary,
        tables=tables,
        work=work,
        BUDGETS=BUDGETS,
        COMPARED=COMPARED,
    )
    text = re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"  # parts that are left out leave gaps
    kept.write(folder / "report.md", text)
    return text
