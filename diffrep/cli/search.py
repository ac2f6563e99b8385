"""Find the layer and level that suit a data set by successive halving; run it again to go on after a stop.

Every rung judges the cells (layer, level) that are left on more samples, and extracts only what is new. The cells that
are left at the end are probed on all samples; beside the race all cells are ranked without labels.

Examples:
  diffrep search configs/search/fashion_demo.yaml out=runs/search
  diffrep search configs/search/folder.yaml backbone=NAME data=PATH data.size=256 out=runs/search --dry-run
  diffrep search configs/search/folder.yaml backbone=NAME data=PATH out=runs/search ranking=only
  diffrep search configs/search/fashion_demo.yaml out=runs/search rungs=[200,800] keep=2 --nproc 2
"""

from __future__ import annotations

import argparse

from diffrep.cli.extract import on_meta
from diffrep.cli.words import add_config, add_nproc, read_config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the verb's arguments."""
    add_config(parser)
    parser.add_argument("--dry-run", action="store_true", help="print rungs, samples, cells and FLOPs, and stop")
    add_nproc(parser)


def run(arguments: argparse.Namespace) -> int:
    """Searches and prints the table, or prints the rungs."""
    from diffrep.config.search import SearchConfig

    config = read_config(SearchConfig, arguments.words)
    from pathlib import Path

    from diffrep import dist
    from diffrep.probe.laststage import shortlist
    from diffrep.probe.run import table
    from diffrep.probe.search import Search, run_search

    if arguments.dry_run:
        print(Search(on_meta(config)).text())
        return 0
    if arguments.nproc > 1:
        Search(on_meta(config))  # a mistake is told once, before there are N processes to tell it
        return dist.launch(arguments.nproc, ["search", *arguments.words])
    metrics = run_search(config)
    if dist.state().is_main_process:
        told = table(metrics) if "scores" in metrics else shortlist(metrics)
        report = (Path(config.out) / "report.html").resolve()
        print("\n".join(["", told, "", *metrics["notes"], f"report: {report}"]))
    dist.teardown()
    return 0
