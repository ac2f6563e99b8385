"""Judge every (layer, level) of a store: logistic regression and kNN, chosen on validation, reported on test.

Examples:
  diffrep probe configs/probe/default.yaml store=runs/features
  diffrep probe store=runs/features out=runs/probe strengths=[0.001,0.01]
"""

from __future__ import annotations

import argparse

from diffrep.cli.words import add_config, read_config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the verb's arguments."""
    add_config(parser)


def run(arguments: argparse.Namespace) -> None:
    """Probes and prints the table."""
    from diffrep.config import ProbeConfig

    config = read_config(ProbeConfig, arguments.words)
    from pathlib import Path

    from diffrep.probe.run import run_probe, table

    metrics = run_probe(config)
    out = Path(config.out or Path(config.store) / "probe")
    print(f"\n{table(metrics)}\n\nreport: {(out / 'report.html').resolve()}")
