"""Write report.html again from the results.json of a run folder.

Example:
  diffrep report runs/demo
"""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the verb's arguments."""
    parser.add_argument("folder", type=Path, help="run folder of 'diffrep demo' or 'diffrep probe'")


def run(arguments: argparse.Namespace) -> None:
    """Writes the page."""
    from diffrep.report import write_report

    print(f"report: {write_report(arguments.folder).resolve()}")
