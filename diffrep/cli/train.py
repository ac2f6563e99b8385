"""Train a small diffusion model; run it again to go on from the last checkpoint.

Examples:
  diffrep train configs/train/fashion_unet.yaml data=PATH out=runs/fashion-unet
  diffrep train configs/train/fashion_unet.yaml data=PATH out=runs/two --nproc 2
"""

from __future__ import annotations

import argparse
import os

from diffrep.cli.words import add_config, add_nproc, read_config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the verb's arguments."""
    add_config(parser)
    add_nproc(parser)


def run(arguments: argparse.Namespace) -> int:
    """Trains."""
    from diffrep.config import TrainConfig

    config = read_config(TrainConfig, arguments.words)
    from diffrep import dist
    from diffrep.train import run_train

    if arguments.nproc > 1:
        return dist.launch(arguments.nproc, ["train", *arguments.words])
    model = run_train(config)
    if int(os.environ.get("RANK", "0")) == 0:
        print(f"model: {model}")
    return 0
