"""What matching, aggregation and extraction over many timesteps cost beside the usual scripts.

    python scripts/bench/correspond.py [--images 12] [--rounds 3] [--threads 1] [--json FILE]

Runs everything in turn within each round and prints medians, so that a busy machine disturbs all alike.

1. P pairs over N images of 375 x 500 pixels, 10 key points each. Ours reads each image once and never holds a feature
   map of the image's size. The usual loop reads both images of a pair, enlarges both maps to the images' sizes, and
   compares one key point at a time, with the target's descriptors normalised anew (DIFT's eval_spair.py). It is run on
   some pairs and scaled up. Both predict the same points. The second row leaves the network out on both sides.
2. Peak memory above the weights of the aggregation network, each case in a process of its own (on Linux): maps of 12
   layers in the shapes of Stable Diffusion 1.5 at 512 pixels are made one timestep at a time.
3. 11 timesteps x 12 layers of one image: one encoding and 11 passes, against a script that encodes and runs the whole
   network for every timestep and layer, on a random pipeline of the classes of Stable Diffusion, smaller.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import diffusers
import numpy as np
import torch
from timing import median_times, write_json
from torch.nn import functional as F

from diffrep import FeatureRequest, load_backbone
from diffrep.config import get_protocol
from diffrep.correspond.matching import prepare
from diffrep.correspond.predict import Question, predict_all
from diffrep.data.frame import frame_of
from diffrep.extract import Extractor
from diffrep.heads.aggregation import AggregationNetwork

ORIGINAL = (375, 500)
SIDE = 64
POINTS = 10
# Channels and side of the 12 ResNet outputs of Stable Diffusion 1.5's decoder at 512 pixels.
BLOCKS = [(1280, 8), (1280, 16), (640, 32), (320, 64)]
LAYERS = {f"up_blocks.{block}.resnets.{i}": shape for block, shape in enumerate(BLOCKS) for i in range(3)}


class Pairs:
    """All ordered pairs of some random photos, with random key points, matched in two ways."""

    def __init__(self, count):
        """Makes the images."""
        rng = np.random.default_rng(0)
        self.backbone = load_backbone("cifar-unet", device="cpu")
        self.layer, self.level = "up_blocks.1", 20
        self.extractor = Extractor(self.backbone, FeatureRequest(self.layer, self.level, dtype="float32"))
        self.images = F.interpolate(torch.rand(count, 3, 16, 16), (SIDE, SIDE), mode="bicubic").clamp(0, 1)
        self.ids = [str(number) for number in range(count)]
        self.pairs = [(a, b) for a in range(count) for b in range(count) if a != b]
        self.points = [rng.integers(0, ORIGINAL[::-1], (POINTS, 2)).astype(float) for _ in self.pairs]
        self.kept = self.read(list(range(count)))

    def read(self, rows):
        """Returns the maps (n, C, h, w) of some images."""
        names = [self.ids[row] for row in rows]
        return self.extractor(self.images[rows], names)[self.layer, self.level]

    def ours(self, maps=None):
        """Predicts all pairs from maps that are read once."""
        maps = self.read(list(range(len(self.images)))) if maps is None else maps
        frame, protocol = frame_of(ORIGINAL, (SIDE, SIDE)), get_protocol("dift")
        sides = [prepare(one, frame, protocol) for one in maps]
        return predict_all(
            Question(sides[a], sides[b], points) for (a, b), points in zip(self.pairs, self.points, strict=True)
        )

    def usual(self, numbers, maps=None):
        """Predicts some pairs as the published loop does."""
        found = []
        for number in numbers:
            a, b = self.pairs[number]
            source, target = self.read([a, b]) if maps is None else (maps[a], maps[b])
            source, target = (F.interpolate(one[None], ORIGINAL, mode="bilinear") for one in (source, target))
            predicted = []
            for x, y in self.points[number].astype(int):
                vector = F.normalize(source[:, :, y, x])
                cosine = (vector @ F.normalize(target).flatten(2)[0]).view(ORIGINAL)
                place = int(cosine.argmax())
                predicted.append((place % ORIGINAL[1], place // ORIGINAL[1]))
            found.append(np.array(predicted, dtype=float))
        return found


def bench_pairs(options):
    """Prints how much faster an evaluation is than the usual loop, and returns the rows."""
    pairs = Pairs(options.images)
    some = list(range(0, len(pairs.pairs), max(1, len(pairs.pairs) // 3)))[:3]
    ours, theirs = pairs.ours(), pairs.usual(some)
    same = np.mean([np.abs(ours[number] - found).max(1) < 1 for number, found in zip(some, theirs, strict=True)])
    calls = {
        "ours": pairs.ours,
        "usual": lambda: pairs.usual(some),
        "ours, maps at hand": lambda: pairs.ours(pairs.kept),
        "usual, maps at hand": lambda: pairs.usual(some, pairs.kept),
    }
    seconds = median_times(options.rounds, calls, warmups=1)
    factor = len(pairs.pairs) / len(some)
    print(f"\n{len(pairs.pairs)} pairs over {options.images} images; {same:.0%} of the points are the same")
    rows = []
    for name in ("", ", maps at hand"):
        mine, usual = seconds[f"ours{name}"], factor * seconds[f"usual{name}"]
        print(f"{'evaluation' + name:28} ours {mine:7.2f} s   usual loop {usual:8.1f} s   ratio {usual / mine:6.1f}x")
        rows.append({"case": "evaluation" + name, "seconds": mine, "usual_seconds": usual, "same_points": same})
    return rows


def resident(name):
    """Returns what Linux says of this process's memory, in MB: "VmRSS" now, "VmHWM" at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(name))) / 1024


def aggregate(levels, form):
    """Runs the network on maps of some timesteps and prints its peak memory above weights and imports, in MB."""
    names = [f"t={number}" for number in range(levels)]
    network = AggregationNetwork({name: c for name, (c, _) in LAYERS.items()}, names, size=(64, 64)).eval()

    def maps():
        return {name: torch.rand(1, c, side, side) for name, (c, side) in LAYERS.items()}

    with torch.no_grad():
        F.conv2d(torch.rand(1, 1280, 8, 8), torch.rand(8, 1280, 1, 1))  # the kernels' own workspace
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
        before = resident("VmRSS")
        if form == "stream":
            network.stream((name, maps()) for name in names)
        else:
            resized = [F.interpolate(one, (64, 64), mode="bilinear") for _ in names for one in maps().values()]
            network(torch.cat(resized, dim=1))
    print(resident("VmHWM") - before)


def bench_memory(options):
    """Prints the peak memory of the aggregation network for 1 and 11 timesteps, and returns the rows."""
    found = {}
    for form in ("stream", "concat"):
        for levels in (1, 11):
            command = [sys.executable, __file__, "--aggregate", str(levels), form, "--threads", str(options.threads)]
            # Freed blocks go back at once, so that what is counted is what is held.
            environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
            runs = [
                subprocess.run(command, env=environment, capture_output=True, text=True, check=True) for _ in range(3)
            ]
            found[form, levels] = sorted(float(run.stdout) for run in runs)[1]
    print("\npeak memory of aggregation, MB above the weights")
    for form in ("stream", "concat"):
        one, eleven = found[form, 1], found[form, 11]
        print(f"{form:28} 1 timestep {one:7.1f}   11 timesteps {eleven:8.1f}   ratio {eleven / one:6.2f}")
    return [
        {"case": f"memory of aggregation, {form}, {levels} timesteps", "megabytes": value}
        for (form, levels), value in found.items()
    ]


def pipeline(folder):
    """Saves a random pipeline of the classes of Stable Diffusion 1.5."""
    torch.manual_seed(0)
    widths = (32, 64, 128, 128)
    unet = diffusers.UNet2DConditionModel(
        sample_size=32, block_out_channels=widths, layers_per_block=2, cross_attention_dim=64, attention_head_dim=4
    )
    vae = diffusers.AutoencoderKL(
        block_out_channels=widths,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
    )
    scheduler = diffusers.DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    for name, part in {"unet": unet, "vae": vae, "scheduler": scheduler}.items():
        part.save_pretrained(Path(folder) / name)


def bench_extraction(options):
    """Prints how much faster one pass over timesteps is than one for each timestep and layer, and returns the row."""
    with tempfile.TemporaryDirectory() as folder:
        pipeline(folder)
        backbone = load_backbone(folder, device="cpu")
    layers = [f"up_blocks.{block}.resnets.{i}.conv2" for block in range(4) for i in range(3)]
    levels = list(range(0, 1000, 91))
    image, cond = torch.rand(1, 3, 256, 256), torch.zeros(1, 77, 64)
    request = FeatureRequest(layers, levels, dtype="float32")
    extractor = Extractor(backbone, request)

    def usual():
        for layer in layers[:2]:
            for level in levels[:2]:
                latents = backbone.codec.encode(image).mean
                kept = []
                module = backbone.network.get_submodule(layer)
                hook = module.register_forward_hook(lambda _, __, out, kept=kept: kept.append(out))
                with torch.no_grad():
                    backbone.denoise(latents, level, cond)
                hook.remove()

    with torch.no_grad():
        seconds = median_times(options.rounds, {"ours": lambda: extractor(image, ["a"], cond), "usual": usual}, 1)
    whole = seconds["usual"] / 4 * len(layers) * len(levels)
    print(f"\n{len(levels)} timesteps x {len(layers)} layers of one image")
    mine = seconds["ours"]
    print(f"{'extraction':28} ours {mine:7.2f} s   usual script {whole:6.1f} s   ratio {whole / mine:6.1f}x")
    return [{"case": "extraction over timesteps and layers", "seconds": mine, "usual_seconds": whole}]


def main():
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", metavar="FILE", help="also write the rows there")
    parser.add_argument("--aggregate", nargs=2, metavar=("TIMESTEPS", "FORM"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.aggregate:
        aggregate(int(options.aggregate[0]), options.aggregate[1])
        return
    print(f"{options.threads} threads, medians of {options.rounds}")
    write_json(options.json, "correspond", bench_pairs(options) + bench_memory(options) + bench_extraction(options))


if __name__ == "__main__":
    main()
