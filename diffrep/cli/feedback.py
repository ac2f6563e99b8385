"""Train DifFeed: a U-Net's decoder fed back into its encoder, and a head on the second pass, from live images.

A run that was stopped goes on from its last epoch when it is started again.

Examples:
  diffrep feedback backbone=fashion-unet data=fashion-demo levels=[90] read=[up_blocks.1] out=runs/feedback
  diffrep feedback backbone=256x256_diffusion_uncond.pt backbone.family=adm backbone.config=256-uncond
      data=/data/imagenet50 data.size=256 levels=[150] read=[gd.24] batch_size=16 out=runs/diffeed
"""

from __future__ import annotations

import argparse

from diffrep.cli.words import add_config, read_config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the verb's arguments."""
    add_config(parser)


def run(arguments: argparse.Namespace) -> None:
    """Trains, scores and prints the table."""
    from diffrep.config.feedback import FeedbackConfig

    config = read_config(FeedbackConfig, arguments.words)
    from pathlib import Path

    from diffrep.probe.feedback import run_feedback
    from diffrep.probe.run import table

    metrics = run_feedback(config)
    print(f"\n{table(metrics)}\n\nreport: {(Path(config.out) / 'report.html').resolve()}")
