"""Make images with a diffusion model; run it again to go on after a stop.

Writes images/*.png, samples.npz (for the evaluator of guided-diffusion), grid.png, and results.json with all that a
score of the images has to be published with.

Examples:
  diffrep sample backbone=fashion-unet out=runs/samples count=16 sampler.steps=20
  diffrep sample configs/sample/repa-sit-xl2.yaml out=runs/repa-samples count=64
  diffrep sample backbone=runs/fashion-unet/model out=runs/ddim sampler.method=ddim --nproc 2
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from diffrep.cli.words import add_config, add_nproc, read_config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the verb's arguments."""
    add_config(parser)
    add_nproc(parser)


def run(arguments: argparse.Namespace) -> int:
    """Makes the images."""
    from diffrep.config import SampleConfig

    config = read_config(SampleConfig, arguments.words)
    from diffrep import dist
    from diffrep.train.sample import run_sample

    if arguments.nproc > 1:
        return dist.launch(arguments.nproc, ["sample", *arguments.words])
    run_sample(config)
    if int(os.environ.get("RANK", "0")) == 0:
        print(Path(config.out) / ("grid.png" if config.grid else "images" if config.png else "samples.npz"))
    dist.teardown()
    return 0
