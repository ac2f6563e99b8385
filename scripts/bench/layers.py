"""What it takes to list a full-size backbone's layers from its config: seconds beyond imports, and peak memory.

    python scripts/bench/layers.py [NAME ...]

One process for each registered name, as `diffrep layers NAME` is. Beside them the layer that papers read, and what a
pass that ends there costs of the whole.
"""

import argparse
import subprocess
import sys

from diffrep import list_backbones
from diffrep.backbones.sources import BUNDLED

READ = {
    "DiT-XL/2": "blocks.13",
    "SiT-XL/2": "blocks.7",
    "adm-256": "output_blocks.4",
    "edm-cifar10": "dec.16x16_block1",
    "flux-dev": "transformer_blocks.18",
    "pixart-xl": "transformer_blocks.13",
    "sd3-medium": "transformer_blocks.11",
}
PROBE = """
import sys, time, resource
from diffrep import load_backbone
began = time.perf_counter()
backbone = load_backbone(sys.argv[1], device="meta")
layers = {layer.name: layer for layer in backbone.layers()}
seconds = time.perf_counter() - began
layer = layers[sys.argv[2]]
millions = sum(p.numel() for p in backbone.network.parameters()) / 1e6
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
shape = "x".join(map(str, layer.shape))
sizes = f"{sys.argv[1]:12} {millions:9,.1f} {len(layers):7} {seconds:8.2f} {peak:8,.0f}"
print(f"{sizes}  {layer.name:22} {shape:>14} {layer.flops_to_here:8.3f}")
"""


def main():
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=[name for name in list_backbones() if name not in BUNDLED])
    options = parser.parse_args()
    sizes = f"{'name':12} {'M params':>9} {'layers':>7} {'seconds':>8} {'peak MB':>8}"
    print(f"{sizes}  {'layer':22} {'shape':>14} {'to here':>8}")
    for name in options.names:
        layer = READ.get(name, "up_blocks.1")
        subprocess.run([sys.executable, "-W", "ignore", "-c", PROBE, name, layer], check=True)


if __name__ == "__main__":
    main()
