"""Tasks of glue.py and of intent.py, for scripts that take either."""

from types import ModuleType

import glue
import intent


def script_of(task: str) -> ModuleType:
    """Return the script that a task belongs to."""
    return glue if task in glue.TASKS else intent
