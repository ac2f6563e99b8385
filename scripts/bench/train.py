"""What alignment costs a training step: targets from an encoder in each step, from a store, or none.

    python scripts/bench/train.py [--data FOLDER] [--rounds 7] [--steps 8] [--batch 16] [--json FILE]

The same small transformer is trained in three ways, with the trainer's own data feed, loss and average of the weights:
`none` (from a store, no alignment), `cached` (from the same store, with targets) and `online` (from image files, with
the encoder). They take turns of a few steps, and medians over the rounds are printed, so that a busy machine disturbs
all alike. The first steps of a turn are not timed: their batches were read during the others' turns.

The encoder is EfficientNet-Lite0 with random weights; the data are random images, or those of a folder with a split
"train". The projector has the share of the network's work that REPA's has in SiT-XL/2; its published width would
double the work of so small a network. FLOPs are those of forward, backward and encoder together.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import timm
import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from timing import write_json
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from diffrep.config import DataConfig, ExtractConfig, TrainConfig, validate
from diffrep.data import open_images
from diffrep.extract.job import run_extract
from diffrep.testing import save_images
from diffrep.train.average import Average
from diffrep.train.data import open_training
from diffrep.train.feed import AHEAD, Feed
from diffrep.train.generative import Generative
from diffrep.train.objective import Batch
from diffrep.train.order import StepBatches
from diffrep.train.trainer import backward

ENCODER = "tf_efficientnet_lite0"
# Batches that lie ready when a turn begins, and the one that is being read.
UNTIMED = AHEAD + 1


class Run:
    """One way of training, which goes on where it stopped."""

    def __init__(self, settings, accelerator, limit):
        self.config, self.accelerator = validate(TrainConfig, settings, "this bench"), accelerator
        torch.manual_seed(0)
        self.objective = Generative(self.config, accelerator.device)
        data = open_training(self.config, self.objective.image_channels)
        self.objective.attach(data)
        self.network = self.objective.module()
        optimizer = torch.optim.AdamW(self.objective.parameters(self.network), lr=1e-4, fused=True)
        self.model, self.optimizer = accelerator.prepare(self.network, optimizer)
        self.network.train()
        self.average = Average(self.network, self.config.ema)
        self.objective.follow(self.average)
        order = StepBatches(len(data), self.config.batch_size, 0, 0, limit, flip=self.config.flip)
        self.feed = Feed(data, order, self.config.workers, accelerator.device)
        self.batches = iter(self.feed)
        self.done = 0

    def step(self):
        """Takes one step."""
        (rows, _), tensors = next(self.batches)
        backward(self.objective, self.model, self.config, self.done, Batch(rows, tensors), self.accelerator)
        self.accelerator.clip_grad_norm_(self.model.parameters(), self.config.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.average.step()
        self.done += 1

    def flops(self):
        """Counts the operations of one step."""
        # The counter does not know the fused attention of the CPU.
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            self.step()
        return counter.get_total_flops()

    def turn(self, steps):
        """Takes steps and returns the seconds of one, and the share of them that went by waiting for data."""
        for _ in range(UNTIMED):
            self.step()
        self.settle()
        began, waited = time.perf_counter(), self.feed.waited
        for _ in range(steps):
            self.step()
        self.settle()
        seconds = time.perf_counter() - began
        return seconds / steps, (self.feed.waited - waited) / seconds

    def settle(self):
        """Waits for the device."""
        if self.accelerator.device.type == "cuda":
            torch.cuda.synchronize()


def ways(options, folder):
    """Writes what the runs read, and returns their settings by name."""
    data = options.data or str(save_images(folder / "images", per_class=64, size=options.size))
    images = {"path": data, "splits": "train", "size": options.size, "fit": "crop"}
    torch.manual_seed(0)
    save_file(timm.create_model(ENCODER, pretrained=False).state_dict(), folder / "encoder.safetensors")
    encoder = {"source": str(folder / "encoder.safetensors"), "model": ENCODER, "size": options.encoder_size}
    extraction = {
        "backbone": {"source": "pixels", "family": "prepare", "config": {"encoders": {"lite": encoder}}},
        "data": images,
        "request": {"layers": "blocks", "levels": "clean", "noise": "none"},
        "out": str(folder / "store"),
    }
    run_extract(validate(ExtractConfig, extraction, "this bench"))
    labels = open_images(validate(DataConfig, images, "data"), 3)
    classes = 1 + max(labels.label(row) for row in range(len(labels))) if labels.labelled else 1
    term = {"preset": "repa", "width": options.width}
    stored = {"store": str(folder / "store")}
    return {
        "none": base(options, classes, stored),
        "cached": base(options, classes, stored | {"align": {"repa": term | {"stored": "lite"}}}),
        "online": base(options, classes, {"data": images, "align": {"repa": term | {"encoder": encoder}}}),
    }


def base(options, classes, more):
    """Returns the settings of a run."""
    network = {"input_size": options.size, "patch_size": options.patch, "in_channels": 3, "num_classes": classes}
    network |= {"hidden_size": options.hidden, "depth": options.depth, "num_heads": options.hidden // 64}
    return {
        "model": {"kind": "repa", "args": network},
        "out": "unused",
        "steps": 1,
        "batch_size": options.batch,
        "workers": options.workers,
        **more,
    }


def main():
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="image folder; None makes random images")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=8, help="timed steps of a turn")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--workers", type=int, default=0, help="processes that read data")
    parser.add_argument("--json", metavar="FILE", help="also write the rows there")
    parser.add_argument("--size", type=int, default=64, help="side of the images")
    parser.add_argument("--patch", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=192)
    parser.add_argument("--depth", type=int, default=8)
    parser.add_argument("--width", type=int, default=128, help="inner width of the projector")
    parser.add_argument(
        "--encoder-size", type=int, default=128, help="side that images are brought to for the encoder"
    )
    options = parser.parse_args()
    accelerator = Accelerator(mixed_precision="bf16" if torch.cuda.is_available() else "no")
    with tempfile.TemporaryDirectory() as folder:
        limit = options.rounds * (UNTIMED + options.steps) + 2
        runs = {name: Run(settings, accelerator, limit) for name, settings in ways(options, Path(folder)).items()}
        flops = {name: run.flops() for name, run in runs.items()}
        for run in runs.values():
            run.step()
        turns = {name: [] for name in runs}
        for _ in range(options.rounds):
            for name, run in runs.items():
                turns[name].append(run.turn(options.steps))
        for run in runs.values():
            run.batches.close()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    weights = sum(weight.numel() for weight in runs["none"].network.parameters()) / 1e6
    print(f"{weights:.1f}M weights, batch {options.batch}, {device}, {torch.get_num_threads()} threads", end=", ")
    print(f"medians of {options.rounds} turns of {options.steps} steps")
    print(f"{'targets':8} {'ms a step':>10} {'time / none':>12} {'FLOPs / none':>13} {'data wait':>10}")
    rows = []
    for name, values in turns.items():
        seconds, waits = (statistics.median(column) for column in zip(*values, strict=True))
        # Of the same round, where the machine was as busy for both.
        ratio = statistics.median(mine[0] / none[0] for mine, none in zip(values, turns["none"], strict=True))
        work = flops[name] / flops["none"]
        print(f"{name:8} {seconds * 1e3:10.1f} {ratio:12.3f} {work:13.3f} {waits:10.1%}")
        rows.append({"targets": name, "step_ms": 1e3 * seconds, "time": ratio, "flops": work, "data_wait": waits})
    write_json(options.json, "train", rows)


if __name__ == "__main__":
    main()
