"""List what ships with the package."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the verb's arguments."""
    parser.add_argument("what", nargs="?", choices=("backbones", "datasets"), help="one kind only")


def run(arguments: argparse.Namespace) -> None:
    """Prints the lists."""
    from diffrep.backbones import list_backbones
    from diffrep.data import BUNDLED

    kinds = {"backbones": list_backbones(), "datasets": BUNDLED}
    for kind, entries in kinds.items():
        if arguments.what in (None, kind):
            print(kind)
            for name, text in entries.items():
                print(f"  {name:<16}{text}")
