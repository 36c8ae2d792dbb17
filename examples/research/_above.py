"""Lets the scripts of this folder import what they share with those above: import it first."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).absolute().parent.parent))
