"""What it takes to list a full-size backbone's layers from its config: seconds beyond imports, and peak memory.

    python scripts/bench/layers.py [NAME ...] [--json FILE]

One process for each registered name, as `diffrep layers NAME` is. Beside them the layer that papers read, and what a
pass that ends there costs of the whole.
"""

import argparse
import json
import subprocess
import sys

from timing import write_json

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
import json, sys, time, resource
from diffrep import load_backbone
began = time.perf_counter()
backbone = load_backbone(sys.argv[1], device="meta")
layers = {layer.name: layer for layer in backbone.layers()}
seconds = time.perf_counter() - began
layer = layers[sys.argv[2]]
millions = sum(p.numel() for p in backbone.network.parameters()) / 1e6
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
row = {"name": sys.argv[1], "millions": millions, "layers": len(layers), "seconds": seconds, "peak_mb": peak}
print(json.dumps(row | {"layer": layer.name, "shape": layer.shape, "to_here": layer.flops_to_here}))
"""


def main():
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=[name for name in list_backbones() if name not in BUNDLED])
    parser.add_argument("--json", metavar="FILE", help="also write the rows there")
    options = parser.parse_args()
    sizes = f"{'name':12} {'M params':>9} {'layers':>7} {'seconds':>8} {'peak MB':>8}"
    print(f"{sizes}  {'layer':22} {'shape':>14} {'to here':>8}")
    rows = []
    for name in options.names:
        command = [sys.executable, "-W", "ignore", "-c", PROBE, name, READ.get(name, "up_blocks.1")]
        row = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
        shape = "x".join(map(str, row["shape"]))
        print(
            f"{name:12} {row['millions']:9,.1f} {row['layers']:7} {row['seconds']:8.2f} {row['peak_mb']:8,.0f}  "
            f"{row['layer']:22} {shape:>14} {row['to_here']:8.3f}",
            flush=True,
        )
        rows.append(row)
    write_json(options.json, "layers", rows)


if __name__ == "__main__":
    main()
