"""Writes the bundled set `fashion-demo`: 4,000 training and 1,000 test images of Fashion-MNIST.

    python scripts/make_fashion_demo.py PATH diffrep/data/bundled/fashion-demo.npz

PATH is the folder of scripts/fashion_mnist.sh. Each split keeps its first 400 or 100 images of every class, class by
class in turn, so that any prefix is balanced.
"""

import sys

import numpy as np
from torchvision.datasets import FashionMNIST

root, target = sys.argv[1:]
arrays = {}
for split, per_class in (("train", 400), ("test", 100)):
    data = FashionMNIST(root, train=split == "train")
    labels = data.targets.numpy()
    rows = np.stack([np.flatnonzero(labels == label)[:per_class] for label in range(10)], axis=1).ravel()
    arrays[f"{split}_images"], arrays[f"{split}_labels"] = data.data.numpy()[rows], labels[rows].astype(np.uint8)
np.savez_compressed(target, classes=np.array(data.classes), **arrays)
