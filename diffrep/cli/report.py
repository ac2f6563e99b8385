"""Write report.html again from the results.json of a run folder, or print its numbers as Markdown tables.

Examples:
  diffrep report runs/demo
  diffrep report runs/demo --markdown
"""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the verb's arguments."""
    parser.add_argument("folder", type=Path, help="run folder of 'diffrep demo' or 'diffrep probe'")
    parser.add_argument("--markdown", action="store_true", help="print the tables instead")


def run(arguments: argparse.Namespace) -> None:
    """Writes the page, or prints the tables."""
    if arguments.markdown:
        from diffrep.report.markdown import markdown

        print(markdown(arguments.folder), end="")
        return
    from diffrep.report import write_report

    print(f"report: {write_report(arguments.folder).resolve()}")
