"""What a sweep of linear heads costs beside separate fits, and beside scripts that run the backbone every epoch.

    python scripts/bench/probe.py [--samples 3000] [--images 192] [--rounds 3] [--threads 1] [--json FILE]

Runs everything in turn within each round and prints medians, so that a busy machine disturbs all alike. Features are
real: Fashion-MNIST through the bundled network. Both sides get the same threads.

1. 500 linear heads, (one cell of pool 1 with four norms, one of pool 2) x 10 learning rates x 10 weight decays,
   trained together, against scikit-learn's estimators one by one on features that were normalised beforehand. A random
   subset of the 500 is fitted and its time scaled up. SGDClassifier takes one sample a step: its rate is
   ours / batch / (1 - momentum), which moves the weights as far in an epoch. LogisticRegression takes the same weight
   decays as C = 1 / (decay * N).
2. The logistic regressions of many strengths at once against LogisticRegression for the same ones, all fitted.
3. A grid of all blocks x levels x DINOv2's 13 learning rates: one extraction and the sweep on what it kept, against a
   script that runs the backbone in every epoch, for each block and level, and trains one head there. One epoch of each
   block at one level is timed (all levels cost the same) and multiplied. "Whole network" is what published scripts
   run; "stops early" ends each pass after the block that is read.
"""

import argparse
import warnings

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression, SGDClassifier
from threadpoolctl import threadpool_limits
from timing import median_times, write_json
from torch.nn import functional as F

from diffrep import FeatureRequest, load_backbone
from diffrep.config import DataConfig
from diffrep.config.probe import SGDConfig
from diffrep.data import open_images
from diffrep.extract import Extractor
from diffrep.noise import mix, sample_noise
from diffrep.probe.logistic import LogisticPath
from diffrep.probe.sgd import LinearSpec, SGDHeads, linear_specs

NORMS = ("none", "batch", "layer", "standard")
DINOV2 = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1)
CLASSES = 10


def read(count, split, size):
    """Returns images (N, 1, H, W), their ids and labels of the bundled set."""
    images = open_images(DataConfig(path="fashion-demo", size=size, fit="pad"), 1)
    rows = list(images.splits[split])[:count]
    labels = torch.tensor([images.label(row) for row in rows])
    return torch.stack([images[row] for row in rows]), [images.id(row) for row in rows], labels


def normalised(norm, x, like):
    """Returns features (N, D) as a head with this norm sees them, by the statistics of `like`."""
    if norm == "layer":
        x = F.layer_norm(x, x.shape[1:])
    elif norm != "none":
        x = (x - like.mean(0)) / like.std(0).clamp(min=1e-6)
    return x.numpy().astype(np.float64)


def accuracy(predicted, labels):
    """Returns the share of hits."""
    return float((torch.as_tensor(predicted) == labels).double().mean())


class Sweep:
    """500 heads on stored features, here and in scikit-learn."""

    def __init__(self, options, features, labels):
        """Takes maps (N, C, 2, 2) and labels (N,) of "train" and "test"."""
        self.options, self.labels = options, labels
        self.readings = {
            pool: {split: F.adaptive_avg_pool2d(maps, pool).flatten(1) for split, maps in features.items()}
            for pool in (1, 2)
        }
        shared = {"lrs": np.geomspace(1e-3, 1, 10).tolist(), "weight_decays": np.geomspace(1e-6, 1e-2, 10).tolist()}
        shared |= {"epochs": options.epochs, "batch_size": options.batch}
        self.configs = {1: SGDConfig(norms=NORMS, **shared), 2: SGDConfig(norms=("batch",), **shared)}
        self.heads = [(pool, spec) for pool, config in self.configs.items() for spec in linear_specs(config)]
        chosen = np.random.default_rng(0).choice(len(self.heads), options.subset, replace=False)
        self.chosen = sorted(chosen.tolist())
        self.arrays = {
            (pool, norm, split): normalised(norm, x, parts["train"])
            for pool, parts in self.readings.items()
            for norm in self.configs[pool].norms
            for split, x in parts.items()
        }
        self.strengths = np.geomspace(1e-4, 1e-1, options.strengths).tolist()
        self.found = {}

    def joint(self):
        """Trains all heads and scores them on the test samples."""
        hits = []
        for pool, config in self.configs.items():
            parts = self.readings[pool]
            heads = SGDHeads(linear_specs(config), config, 0).fit(parts["train"], self.labels["train"], CLASSES)
            hits += [accuracy(one.argmax(1), self.labels["test"]) for one in heads.scores(parts["test"])]
        self.found["joint"] = [hits[i] for i in self.chosen]

    def separate(self, make):
        """Fits and scores an estimator for each head of the subset."""
        hits = []
        for pool, spec in (self.heads[i] for i in self.chosen):
            fitted = make(spec, self.configs[pool])
            fitted.fit(self.arrays[pool, spec.norm, "train"], self.labels["train"].numpy())
            hits.append(accuracy(fitted.predict(self.arrays[pool, spec.norm, "test"]), self.labels["test"]))
        return hits

    def sgd(self):
        """scikit-learn's SGD."""

        def make(spec: LinearSpec, config):
            rate = spec.effective_lr(config) / config.batch_size / (1 - config.momentum)
            return SGDClassifier(
                loss="log_loss",
                alpha=spec.weight_decay,
                learning_rate="constant",
                eta0=rate,
                max_iter=config.epochs,
                tol=None,
                n_jobs=self.options.threads,
                random_state=0,
            )

        self.found["sgd"] = self.separate(make)

    def logistic(self):
        """scikit-learn's L-BFGS at the same weight decays."""
        count = len(self.labels["train"])
        self.found["logistic"] = self.separate(lambda spec, _: LogisticRegression(C=1 / (spec.weight_decay * count)))

    def path(self):
        """All strengths together."""
        parts = self.readings[2]
        fitted = LogisticPath(tuple(self.strengths)).fit(parts["train"], self.labels["train"], CLASSES)
        self.found["path"] = [accuracy(one.argmax(1), self.labels["test"]) for one in fitted.scores(parts["test"])]

    def path_apart(self):
        """A LogisticRegression for each strength."""
        train, test = (self.arrays[2, "batch", split] for split in ("train", "test"))
        hits = []
        for strength in self.strengths:
            fitted = LogisticRegression(C=1 / (strength * len(train))).fit(train, self.labels["train"].numpy())
            hits.append(accuracy(fitted.predict(test), self.labels["test"]))
        self.found["path apart"] = hits


class Grid:
    """All blocks and levels of the backbone, from one extraction and from passes in every epoch."""

    def __init__(self, options, backbone, images, ids, labels):
        self.options, self.backbone, self.images, self.ids, self.labels = options, backbone, images, ids, labels
        self.blocks, self.levels = backbone.blocks(), [20, 60, 120, 240, 480][: options.levels]
        request = FeatureRequest(self.blocks, self.levels, pool="mean", dtype="float32")
        self.extractor = Extractor(backbone, request, options.batch)
        self.config = SGDConfig(lrs=DINOV2, epochs=options.grid_epochs, batch_size=options.batch)

    def extract(self):
        """Keeps every cell."""
        self.features = self.extractor(self.images, self.ids)

    def sweep(self):
        """Trains all heads of every cell of the features kept."""
        for feature in self.features.values():
            heads = SGDHeads(linear_specs(self.config), self.config, 0).fit(feature, self.labels, CLASSES)
            heads.scores(feature)

    def epoch(self, block, whole):
        """One epoch at one block and level: noise, forward and a step of one head on each batch."""
        backbone, level, kept = self.backbone, self.backbone.schedule.level(self.levels[0]), []
        channels = next(layer.shape[0] for layer in backbone.layers() if layer.name == block)
        head = torch.nn.Linear(channels, CLASSES)
        optimizer = torch.optim.SGD(head.parameters(), 1e-2, 0.9)
        hook = backbone.network.get_submodule(block).register_forward_hook(
            lambda _, __, out: kept.append(out[0] if isinstance(out, tuple) else out)
        )
        for start in range(0, len(self.images), self.options.batch):
            rows = slice(start, start + self.options.batch)
            with torch.no_grad():
                clean = backbone.codec.encode(self.images[rows]).mean
                noise = torch.stack([sample_noise(clean.shape[1:], 0, i, level.key, 0) for i in self.ids[rows]])
                ones = torch.ones(len(clean))
                x = mix(clean, noise, ones * level.signal, ones * level.noise)
                if whole:
                    backbone.denoise(x, level.time)
                else:
                    backbone.capture(x, level.time, [block])
            loss = F.cross_entropy(head(kept.pop().mean((2, 3))), self.labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        hook.remove()


def rows_of_sweep(sweep, rounds):
    """Times parts 1 and 2; yields (case, seconds here, seconds there, remark)."""
    calls = {
        "joint": sweep.joint,
        "sgd": sweep.sgd,
        "logistic": sweep.logistic,
        "path": sweep.path,
        "path apart": sweep.path_apart,
    }
    seconds = median_times(rounds, calls, warmups=0)
    scale = len(sweep.heads) / len(sweep.chosen)
    scaled = f"{len(sweep.chosen)} of {len(sweep.heads)} fitted, x {scale:.0f}"
    mean = {name: f"{np.mean(found):.3f}" for name, found in sweep.found.items()}
    best = {name: f"{np.max(found):.3f}" for name, found in sweep.found.items()}
    for name, other in (("SGDClassifier", "sgd"), ("LogisticRegression", "logistic")):
        remark = f"accuracy {mean['joint']}, best {best['joint']}; there {mean[other]}, best {best[other]} ({scaled})"
        yield f"{len(sweep.heads)} heads / {name}", seconds["joint"], seconds[other] * scale, remark
    remark = f"accuracy {mean['path']}, best {best['path']}; there {mean['path apart']}, best {best['path apart']}"
    count = len(sweep.strengths)
    yield f"{count} strengths / LogisticRegression", seconds["path"], seconds["path apart"], remark


def rows_of_grid(grid, rounds):
    """Times part 3."""
    calls = {"extract": grid.extract, "sweep": grid.sweep}
    calls |= {f"early {block}": lambda b=block: grid.epoch(b, whole=False) for block in grid.blocks}
    calls["whole"] = lambda: grid.epoch(grid.blocks[-1], whole=True)
    seconds = median_times(rounds, calls, warmups=0)
    epochs, levels = grid.options.grid_epochs, len(grid.levels)
    ours = seconds["extract"] + seconds["sweep"]
    early = sum(seconds[f"early {block}"] for block in grid.blocks) * levels * epochs
    whole = seconds["whole"] * len(grid.blocks) * levels * epochs
    remark = (
        f"extraction {seconds['extract']:.1f} s, {len(grid.blocks) * levels * len(DINOV2)} heads "
        f"{seconds['sweep']:.1f} s; {epochs} epochs x {len(grid.blocks)} blocks x {levels} levels, one epoch timed"
    )
    yield "grid / whole network an epoch", ours, whole, remark
    yield "grid / an epoch that stops early", ours, early, remark


def main():
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", default="fashion-unet")
    parser.add_argument("--layer", default="up_blocks.0")
    parser.add_argument("--level", type=int, default=60)
    parser.add_argument("--samples", type=int, default=3000, help="training samples of parts 1 and 2")
    parser.add_argument("--subset", type=int, default=10, help="of the 500 heads, fitted by scikit-learn")
    parser.add_argument("--epochs", type=int, default=10, help="of parts 1 and 2")
    parser.add_argument("--strengths", type=int, default=10)
    parser.add_argument("--images", type=int, default=192, help="training images of part 3")
    parser.add_argument("--levels", type=int, default=5, help="of part 3, at most 5")
    parser.add_argument("--grid-epochs", type=int, default=28, help="of part 3; diffssl takes 28")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", metavar="FILE", help="also write the rows there")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore", category=ConvergenceWarning)  # 100 iterations on both sides
    backbone = load_backbone(options.source, device="cpu")
    request = FeatureRequest([options.layer], [options.level], pool=2, dtype="float32")
    extractor, features, labels = Extractor(backbone, request, options.batch), {}, {}
    for split, count in (("train", options.samples), ("test", 1000)):
        images, ids, labels[split] = read(count, split, backbone.image_size)
        parts = [slice(start, start + 500) for start in range(0, len(ids), 500)]
        found = [extractor(images[part], ids[part])[options.layer, options.level] for part in parts]
        features[split] = torch.cat(found)
    shape = tuple(features["train"].shape)
    print(f"{options.source}, features {shape}, {options.threads} threads, medians of {options.rounds}")
    print(f"{'case':38} {'here / s':>9} {'there / s':>10} {'ratio':>7}  remark")
    kept = []
    with threadpool_limits(options.threads):
        sweep = Sweep(options, features, labels)
        grid = Grid(options, backbone, *read(options.images, "train", backbone.image_size))
        for rows in (rows_of_sweep(sweep, options.rounds), rows_of_grid(grid, options.rounds)):
            for case, ours, theirs, remark in rows:
                print(f"{case:38} {ours:9.2f} {theirs:10.1f} {theirs / ours:6.1f}x  {remark}", flush=True)
                kept.append({"case": case, "seconds": ours, "other_seconds": theirs, "remark": remark})
    write_json(options.json, "probe", kept)


if __name__ == "__main__":
    main()
