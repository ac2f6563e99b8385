"""Read features of a whole data set into a store; run it again to go on after a stop.

Examples:
  diffrep extract configs/extract/fashion_demo.yaml out=runs/features
  diffrep extract configs/extract/folder.yaml data=PATH out=runs/photos request.levels=[10,50] --dry-run
  diffrep extract configs/extract/folder.yaml data=PATH out=runs/photos --nproc 2
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from diffrep.cli.words import add_config, add_nproc, read_config

if TYPE_CHECKING:
    from diffrep.config import ExtractConfig


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the verb's arguments."""
    add_config(parser)
    parser.add_argument("--dry-run", action="store_true", help="print units, FLOPs, bytes and expected time, and stop")
    add_nproc(parser)


def run(arguments: argparse.Namespace) -> int:
    """Extracts, or prints the plan."""
    from diffrep.config import ExtractConfig

    config = read_config(ExtractConfig, arguments.words)
    from diffrep import dist
    from diffrep.extract.job import ExtractJob

    if arguments.nproc > 1 and not arguments.dry_run:
        ExtractJob(on_meta(config)).plan()  # a mistake is told once, before there are N processes to tell it
        return dist.launch(arguments.nproc, ["extract", *arguments.words])
    job = ExtractJob(config)
    if arguments.dry_run:
        print(f"{job.text()}\ntime      {job.expected_time()}")
        return 0
    store = job.run()
    if dist.state().is_main_process:
        print(store)
    dist.teardown()
    return 0


def on_meta(config: ExtractConfig) -> ExtractConfig:
    """Returns the config with a backbone that reads no weights, which is enough for a plan."""
    light = config.backbone.model_copy(update={"device": "meta", "attention": "auto"})
    return config.model_copy(update={"backbone": light})
