"""Train a diffusion model, with alignment or without, or a student of a backbone; run it again to go on.

A `model` section names the network, `objective` what it learns to predict, `align` what its features are drawn to
(REPA, iREPA, SRA, dispersive, U-REPA). With a `distill` section in their place the network is a copy of a teacher that
learns to give, for clean images, the features that the teacher gives for noised ones (CleanDIFT). Read it with
noise=none at the level that model/distill.json names. SIGTERM and SIGUSR1 save a checkpoint and end the run.

Examples:
  diffrep train configs/train/fashion_unet.yaml data=PATH out=runs/fashion-unet
  diffrep train configs/train/repa.yaml data=PATH out=runs/repa align.repa.encoder=MODEL
  diffrep train configs/train/repa.yaml data=PATH out=runs/two --nproc 2
  diffrep train configs/train/distill_cifar.yaml data=PATH distill.teacher=SOURCE out=runs/student
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
    if model is not None and int(os.environ.get("RANK", "0")) == 0:
        print(f"model: {model}")
    return 0
