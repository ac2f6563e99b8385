"""What reading one layer costs for ImageNet-1k, LAION-400M and a billion images: the tables of docs/scale.md.

    python scripts/scale.py                 # prints them
    python scripts/scale.py --write         # puts them into docs/scale.md
    python scripts/scale.py sd15 DiT-XL/2   # these networks only

Networks are opened on the meta device: no weights, no images. Each is read at its native size, at one level, one draw.
"""

import argparse
import warnings
from dataclasses import replace
from pathlib import Path

from diffrep import FeatureRequest, load_backbone
from diffrep.config import BackboneConfig, DataConfig, ExtractConfig
from diffrep.extract import make_plan
from diffrep.extract.cost import GOOD, Cost, written
from diffrep.extract.plan import scaled

PAGE = Path(__file__).parents[1] / "docs" / "scale.md"
BEGIN, END = "<!-- tables of scripts/scale.py -->\n", "<!-- end of the tables -->\n"
SETS = {"ImageNet-1k": 1_281_167, "LAION-400M": 413_000_000, "a billion images": 1_000_000_000}
# Network -> layer, level, where the choice is from.
READ = {
    "adm-256": ("gd.24", 90, "Mukhopadhyay et al. (2023)"),
    "DiT-XL/2": ("blocks.13", 121, "DDAE, Xiang et al. (2023)"),
    "edm-cifar10": ("ddae.7", "step 3/18", "DDAE, Xiang et al. (2023)"),
    "flux-dev": ("single_transformer_blocks.9", 0.26, "DiTF's script: block 28, t=260"),
    "pixart-xl": ("transformer_blocks.13", 141, "the middle block; none is published"),
    "sd15": ("up_blocks.1", 25, "Revelio, Kim et al. (2025)"),
    "sd21": ("dift.1", 261, "DIFT, Tang et al. (2023)"),
    "sd3-medium": ("transformer_blocks.11", 260, "the middle block; none is published"),
    "sdxl": ("dift.1", 261, "as for sd21; none is published"),
    "SiT-XL/2": ("repa.8", 0.5, "REPA, Yu et al. (2025)"),
}
UNITS = 1000
IMAGE_HEAD = ("network", "parameters, 10^9", "px", "layer, level", "map", "encode, FLOP", "network, FLOP")
IMAGE_HEAD += ("of a full pass", "mean", "map, fp16", "latents")
SET_HEAD = (
    "network",
    "FLOP",
    "A100 h",
    "H100 h",
    "H100 h, latents kept",
    "means",
    "units",
    "maps",
    "units of samples",
)


def costs_of(name):
    """Returns the native side, and the costs for one image: of maps, of their means, of maps when latents are kept."""
    layer, level, _ = READ[name]
    backbone = load_backbone(name, device="meta")
    side, found = backbone.image_size, []
    parts = {"backbone": BackboneConfig(source=name), "data": DataConfig(path="photos", size=side), "out": "features"}
    for pool, latents in (("none", None), ("mean", None), ("none", "latents")):
        request = FeatureRequest(layer, level, pool=pool)
        config = ExtractConfig(request=request, latents=latents, unit_size=UNITS, **parts)
        found.append(Cost.of(config, backbone, make_plan(backbone, request, side, side), 1))
    return side, found


def table(head, rows):
    """Returns a table in Markdown; numbers are set to the right."""
    rule = " | ".join(["---"] + ["---:"] * (len(head) - 1))
    return "\n".join([f"| {' | '.join(head)} |", f"| {rule} |", *(f"| {' | '.join(row)} |" for row in rows)])


def image_row(name, side, dense, pooled, kept):
    """Returns a network's row of the table for one image."""
    layer, level, source = READ[name]
    plan = dense.plan
    ((address, shape),) = plan.shapes.items()
    read = f"`{layer}`" if layer == address else f"`{layer}` = `{address}`"
    whole = plan.encode_flops + plan.network_flops
    return [
        f"`{name}`",
        f"{dense.weights / 2e9:,.2f}",
        f"{side}",
        f"{read}, {level} ({source})",
        "x".join(map(str, shape)),
        scaled(plan.encode_flops).strip() if plan.encode_flops else "none",
        scaled(plan.forward_flops),
        f"{plan.flops / whole:.0%}",
        f"{scaled(pooled.bytes)}B",
        f"{scaled(dense.bytes)}B",
        f"{scaled(kept.latents)}B" if dense.encoder_flops else "none",
    ]


def set_row(name, dense, pooled, kept, images):
    """Returns a network's row of the table for a data set."""
    dense, pooled, kept = (replace(cost, images=images) for cost in (dense, pooled, kept))
    size = min(UNITS, max(1, GOOD // dense.plan.bytes))
    return [
        f"`{name}`",
        scaled(dense.flops),
        written(dense.hours("A100")),
        written(dense.hours("H100")),
        written(kept.hours("H100")) if dense.encoder_flops else "the same",
        f"{scaled(pooled.bytes)}B",
        f"{pooled.units:,}",
        f"{scaled(dense.bytes)}B",
        f"{replace(dense, unit_size=size).units:,} of {size}",
    ]


def tables(names):
    """Returns all tables for some networks, as Markdown."""
    found = {name: costs_of(name) for name in names}
    parts = [
        "### One image\n",
        table(IMAGE_HEAD, [image_row(name, found[name][0], *found[name][1]) for name in names]),
    ]
    for title, images in SETS.items():
        rows = [set_row(name, *found[name][1], images) for name in names]
        parts += [f"\n### {title}: {images:,} images\n", table(SET_HEAD, rows)]
    return "\n".join(parts) + "\n"


def main():
    """Prints the tables, or writes them into the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=list(READ), help="networks (default: all registered ones)")
    parser.add_argument("--write", action="store_true", help="put the tables into docs/scale.md")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    text = tables(options.names)
    if not options.write:
        print(text, end="")
        return
    before, _, rest = PAGE.read_text().partition(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}{text}{END}{rest.partition(END)[2]}")


if __name__ == "__main__":
    main()
