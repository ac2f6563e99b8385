"""Train DifFeed: a U-Net's decoder fed back into its encoder, and a head on the second pass, from live images.

A run that was stopped goes on from its last epoch when it is started again. --nproc N shares each step.

Examples:
  diffrep feedback backbone=fashion-unet data=fashion-demo levels=[90] read=[up_blocks.1] out=runs/feedback
  diffrep feedback backbone=256x256_diffusion_uncond.pt backbone.family=adm backbone.config=256-uncond
      data=/data/imagenet50 data.size=256 levels=[150] read=[gd.24] batch_size=16 out=runs/diffeed
"""

from __future__ import annotations

import argparse

from diffrep.cli.words import add_config, add_nproc, read_config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the verb's arguments."""
    add_config(parser)
    add_nproc(parser)


def run(arguments: argparse.Namespace) -> int:
    """Trains, scores and prints the table."""
    from diffrep.config.feedback import FeedbackConfig

    config = read_config(FeedbackConfig, arguments.words)
    from pathlib import Path

    from diffrep import dist
    from diffrep.errors import ConfigError
    from diffrep.probe.feedback import run_feedback
    from diffrep.probe.run import table

    if arguments.nproc > 1:
        if config.batch_size % arguments.nproc:
            raise ConfigError(f"batch_size {config.batch_size} does not divide among {arguments.nproc} processes")
        return dist.launch(arguments.nproc, ["feedback", *arguments.words])
    metrics = run_feedback(config)
    if dist.state().is_main_process:
        print(f"\n{table(metrics)}\n\nreport: {(Path(config.out) / 'report.html').resolve()}")
    dist.teardown()
    return 0
