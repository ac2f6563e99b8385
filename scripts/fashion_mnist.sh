#!/usr/bin/env bash
# Makes the Fashion-MNIST folder that configs/train/fashion_unet.yaml takes as data=PATH:
#   scripts/fashion_mnist.sh PATH
# From Debian's package dataset-fashion-mnist where it is installed; otherwise torchvision downloads the set.
set -euo pipefail
target="${1:?usage: scripts/fashion_mnist.sh PATH}"
source_dir=/usr/share/datasets/fashion-mnist
if [ -d "$source_dir" ]; then
  mkdir -p "$target/FashionMNIST/raw"
  for file in "$source_dir"/*.gz; do
    name="$(basename "$file" .gz)"
    gunzip -c "$file" > "$target/FashionMNIST/raw/$name"
  done
else
  python -c 'import sys; from torchvision.datasets import FashionMNIST as F; [F(sys.argv[1], train=t, download=True) for t in (True, False)]' "$target"
fi
echo "$target"
