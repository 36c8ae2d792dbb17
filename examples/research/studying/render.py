"""report.md: the summary, the tables and the pictures of a study."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from mixadv.reports import kept
from studying import pictures, summary, tables, work
from studying.commands import commands
from studying.findings import Findings
from studying.plan import Study

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
        started=[task for task in study.tasks if findings.finished(task)],
        command=command,
        commands=commands,
        machines=sorted({line["machine"] for line in results.values() if "machine" in line}),
        pictures={path.name for path in pictures.draw(findings, folder)},
        summary=summary,
        tables=tables,
        work=work,
    )
    text = re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"  # parts that are left out leave gaps
    kept.write(folder / "report.md", text)
    return text
