"""Judge every layer and level of a store with every head, chosen on validation, reported on test.

Examples:
  diffrep probe configs/probe/default.yaml store=runs/features
  diffrep probe store=runs/features out=runs/probe heads=[logistic,sgd,knn] combine=[single,layers] pools=[1,stored]
  diffrep probe configs/probe/trained.yaml store=runs/features --nproc 2
"""

from __future__ import annotations

import argparse

from diffrep.cli.words import add_config, add_nproc, read_config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the verb's arguments."""
    add_config(parser)
    add_nproc(parser)


def run(arguments: argparse.Namespace) -> int:
    """Probes and prints the table."""
    from diffrep.config import ProbeConfig

    config = read_config(ProbeConfig, arguments.words)
    from diffrep import dist
    from diffrep.probe.run import Probe, run_probe, table
    from diffrep.store import FeatureStore

    if arguments.nproc > 1:
        Probe(FeatureStore(config.store), config)  # a mistake is told once, before there are N processes to tell it
        return dist.launch(arguments.nproc, ["probe", *arguments.words])
    metrics = run_probe(config)
    if dist.state().is_main_process:
        print(f"\n{table(metrics)}\n\nreport: {(config.folder / 'report.html').resolve()}")
    dist.teardown()
    return 0
