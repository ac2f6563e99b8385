"""VTAB-1k: extract and probe each of its 19 tasks, and average; run it again to go on after a stop.

Tasks are prepared folders (caltech101, cifar, dtd, ...) with images/ and train800.txt, val200.txt and test.txt.

Examples:
  diffrep vtab configs/vtab/default.yaml backbone=SOURCE data=PATH data.size=256 out=runs/vtab
  diffrep vtab configs/vtab/dit-xl2.yaml data=PATH tasks=[cifar,dtd,eurosat] out=runs/vtab-dit --nproc 2
  diffrep vtab runs/vtab/config.yaml --dry-run
"""

from __future__ import annotations

import argparse

from diffrep.cli.words import add_config, add_nproc, read_config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the verb's arguments."""
    add_config(parser)
    parser.add_argument("--dry-run", action="store_true", help="print each task's units, FLOPs and bytes, and stop")
    add_nproc(parser)


def run(arguments: argparse.Namespace) -> int:
    """Runs the tasks and prints the table, or prints the plan."""
    from diffrep.config.vtab import VtabConfig

    config = read_config(VtabConfig, arguments.words)
    from pathlib import Path

    from diffrep import dist
    from diffrep.cli.extract import on_meta
    from diffrep.extract.job import open_backbone
    from diffrep.probe.vtab import TABLE, check_vtab, run_vtab, table, unfinished

    if arguments.dry_run or arguments.nproc > 1:  # a mistake is told once, before there are N processes to tell it
        jobs = check_vtab(config, unfinished(config), open_backbone(on_meta(config).backbone))
        if not arguments.dry_run:
            return dist.launch(arguments.nproc, ["vtab", *arguments.words])
        for name, job in jobs.items():
            print(f"{name}\n{job.text()}\n")
        return 0
    metrics = run_vtab(config)
    if dist.state().is_main_process:
        print(f"\n{table(metrics)}\ntable: {(Path(config.out) / TABLE).resolve()}")
    dist.teardown()
    return 0
