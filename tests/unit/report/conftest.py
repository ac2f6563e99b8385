"""A made-up run: scores, predictions and pictures that a report is drawn from."""

import re

import numpy as np
import pytest

from diffrep import write_report
from diffrep.config import write_results
from diffrep.report import ARRAYS, PICTURES

NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
LAYERS = ["down_blocks.0", "down_blocks.1", "down_blocks.2", "mid_block", "up_blocks.0", "up_blocks.1", "up_blocks.2"]
SIDES = [16, 8, 4, 4, 8, 16, 32]
TIMES = (1, 5, 10, 20, 50, 100, 200, 400)
SIGMAS = (0.01, 0.04, 0.07, 0.13, 0.3, 0.6, 1.4, 4.5)
# Kind of head -> its name in the table, how far it lies above or below the logistic regression, its setting.
KINDS = {
    "logistic": ("linear", 0.0, {"penalty": 0.01}),
    "sgd": ("linear, SGD", -0.008, {"norm": "batch", "lr": 0.05, "weight_decay": 0.0}),
    "knn": ("kNN", -0.11, {"k": 20, "temperature": 0.07}),
}
TEST = 2000


def make_metrics(layers=LAYERS, names=NAMES, pools=(1, 4), seed=0):
    """Scores that rise and fall over depth and noise, as the papers' maps do."""
    random = np.random.default_rng(seed)
    levels = [{"key": f"t={t}", "time": t, "sigma": s} for t, s in zip(TIMES, SIGMAS, strict=True)]
    about = [
        {"name": layer, "shape": [64, SIDES[i % 7], SIDES[i % 7]], "cost": round((i + 1) / (len(layers) + 0.3), 3)}
        for i, layer in enumerate(layers)
    ]
    cells = []
    for head, (_, shift, chosen) in KINDS.items():
        for i, layer in enumerate([*about, {"name": "all layers", "cost": about[-1]["cost"]}]):
            depth = i / max(1, len(layers) - 1)
            for j, level in enumerate(levels):
                for pool in pools:
                    val = 0.72 - 0.5 * (depth - 0.6) ** 2 - 0.011 * (j - 3.2) ** 2 + 0.02 * (pool > 1) + shift
                    val = round(float(val + random.normal(0, 0.006)), 4)
                    dim = 64 * pool**2 * (len(layers) if i == len(layers) else 1)
                    cells.append(
                        {
                            **{"layer": layer["name"], "level": level["key"], "pool": pool, "dim": dim},
                            **{"bytes": 2 * dim, "flops": int(1.2e9 * layer["cost"] + 2e8), "forwards": layer["cost"]},
                            **{"head": head, "val": val, "interval": [val - 0.018, val + 0.018], "setting": chosen},
                        }
                    )
    scores = [_score(name, max((c for c in cells if c["head"] == head), key=lambda c: c["val"]), random)
              for head, (name, _, _) in KINDS.items()]  # fmt: skip
    best = max((c for c in cells if c["head"] == "logistic"), key=lambda c: c["val"])
    combined = {"layer": "3 layers", "level": "3 levels", "pool": 8, "bytes": 73728, "dim": 36864, "forwards": 2.5}
    pixels = {"layer": "pixels", "level": "", "pool": None, "bytes": None, "forwards": None, "flops": None}
    scores += [
        _score("attention", {**best, "head": "attention", "val": best["val"] + 0.02}, random),
        _score("DifFormer", {**best, **combined, "head": "difformer", "val": best["val"] + 0.055}, random),
        _score("linear on raw pixels", {**best, **pixels, "val": 0.41}, random),
    ]
    return {
        "title": "cifar-unet on 12,000 CIFAR-10 images",
        "metric": "accuracy",
        "names": names,
        "samples": {"train": 8000, "val": 2000, "test": TEST, "classes": len(names)},
        "layers": about,
        "levels": levels,
        "costs": {"network_flops": 1.2e9, "encode_flops": 2e8, "draws": {level["key"]: 1 for level in levels}},
        "cells": cells,
        "scores": scores,
        "low_data": [
            {"head": head, "train": train, "samples": n, "mean": mean + shift / 2, "error": error, "values": []}
            for head, (_, shift, _) in KINDS.items()
            for train, n, mean, error in (
                ("1 per class", 10, 0.26, 0.018),
                ("5 per class", 50, 0.41, 0.009),
                ("1 %", 100, 0.47, 0.006),
                ("10 %", 1000, 0.61, 0.003),
            )
        ],
        "gallery": [
            {"title": title, "of": "DifFormer", "rows": list(range(first, first + 10))}
            for title, first in (("Most certain and right", 0), ("Least certain", 10), ("Most certain and wrong", 20))
        ],
        "notes": ["Features were read from the store in 12 s."],
    }


def _score(name, cell, random):
    tests = [round(float(cell["val"] - 0.004 + random.normal(0, 0.003)), 4) for _ in range(3)]
    test = float(np.mean(tests))
    kept = {key: cell[key] for key in ("head", "layer", "level", "pool", "val", "dim", "bytes", "flops", "forwards")}
    return {
        **{**kept, "name": name, "test": test, "tests": tests, "error": float(np.std(tests, ddof=1) / 3**0.5)},
        **{"interval": [test - 0.019, test + 0.019], "top5": min(test + 0.25, 0.99), "mean_per_class": test},
        "setting": cell["setting"],
    }


def make_run(folder, metrics, thumbnails=True):
    """A run folder with predictions that confuse cats and dogs, and thumbnails of noise."""
    random = np.random.default_rng(1)
    classes = metrics["samples"]["classes"]
    labels = np.arange(TEST) % classes
    arrays = {"labels": labels, "ids": np.array([f"test/{name:05d}.png" for name in range(TEST)])}
    for number, score in enumerate(metrics["scores"]):
        wrong = random.random(TEST) > score["test"]
        wrong[:10], wrong[20:30] = False, True
        guess = np.where(random.random(TEST) < 0.4, labels ^ 1, random.integers(0, classes, TEST)) % classes
        guess = np.where((labels == 3) & (random.random(TEST) < 0.5), 5 % classes, guess)
        arrays[f"predicted.{number}"] = np.where(wrong, guess, labels)
        arrays[f"confidence.{number}"] = random.uniform(0.3, 1, TEST).astype(np.float32)
    if thumbnails:
        coarse = random.integers(40, 220, (30, 4, 4, 3)).repeat(8, 1).repeat(8, 2)
        noise = (coarse + random.normal(0, 18, (30, 32, 32, 3))).clip(0, 255).astype(np.uint8)
        arrays |= {"thumbnails": noise, "thumbnail_rows": np.arange(30)}
    write_results(folder, {"store": "features"}, 0, metrics)
    np.savez(folder / ARRAYS, **arrays)
    return folder


def make_pictures(folder, layers=LAYERS, levels=("t=1", "t=50", "t=400"), images=4):
    random = np.random.default_rng(2)
    maps = {f"{layer}@{level}": random.integers(0, 255, (images, 8, 8, 3), np.uint8)
            for layer in layers for level in levels}  # fmt: skip
    inputs = random.integers(0, 255, (images, 32, 32, 3), np.uint8)
    np.savez(folder / PICTURES, images=inputs, layers=list(layers), levels=list(levels), **maps)


def make_search(seed=0):
    random = np.random.default_rng(seed)
    places = [(layer, f"t={t}") for layer in LAYERS for t in TIMES]
    worth = {place: 0.6 - 0.02 * abs(i // 8 - 4) - 0.015 * abs(i % 8 - 3) for i, place in enumerate(places)}
    rungs = []
    for samples in (500, 1000, 2000, 4000):
        keep = sorted(places, key=worth.get)[len(places) // 2 :]
        cells = [
            {"layer": a, "level": b, "val": worth[a, b] + float(random.normal(0, 0.01)), "kept": (a, b) in keep}
            for a, b in places
        ]
        rungs.append({"samples": samples, "cells": cells, "flops": samples * len(places) * 4e8})
        places = keep
    ranking = [
        {"layer": a, "level": b, "alignment": 0.2, "uniformity": -2.0, "score": v + float(random.normal(0, 0.03))}
        for (a, b), v in worth.items()
    ]
    return {"rungs": rungs, "ranking": ranking}


def read_page(folder):
    """The page without its images, whose base64 may spell anything."""
    return re.sub(r"data:image/png;base64,[\w+/=]*", "data:", write_report(folder).read_text())


@pytest.fixture(scope="session")
def sample_metrics():
    return make_metrics


@pytest.fixture(scope="session")
def write_run():
    return make_run


@pytest.fixture(scope="session")
def sample_search():
    return make_search


@pytest.fixture(scope="session")
def page_of():
    return read_page


@pytest.fixture(scope="session")
def page(tmp_path_factory):
    folder = make_run(tmp_path_factory.mktemp("run"), make_metrics())
    make_pictures(folder)
    return read_page(folder)
