"""What early exit, half precision and compilation gain, family by family.

    python scripts/bench/backbones.py [--families dit unet2d ...] [--batch 8] [--rounds 7] [--json FILE]

Networks are of the real classes, a few layers deep and a few hundred channels wide, with random weights. Each column
is a ratio of median times measured in one run, the variants taking turns within every round: "exit" is a capture of
the middle block over the full pass (beside it the ratio of FLOPs), "bf16" the same capture in bfloat16 over float32,
and "compiled" the compiled capture over the eager one. Compilation takes up to a minute a family; --no-compile leaves
it out.
"""

import argparse

import diffusers
import torch
from timing import median_times, write_json

from diffrep.backbones.folders import cast
from diffrep.backbones.opening import DIFFUSERS, OFFICIAL
from diffrep.noise import DiscreteSchedule, FlowSchedule

_DIT = {"input_size": 32, "hidden_size": 384, "depth": 12, "num_heads": 6, "num_classes": 1000}
_HEADS = {"num_attention_heads": 6, "attention_head_dim": 64}
_JOINT = _HEADS | {"joint_attention_dim": 768, "pooled_projection_dim": 768}
_UNET = {"sample_size": 32, "layers_per_block": 1, "block_out_channels": (96, 192, 288)}
NETWORKS = {
    "unet2d": _UNET
    | {
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    },
    "unet2d-condition": _UNET
    | {
        "cross_attention_dim": 768,
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    },
    "pixart": _HEADS
    | {"sample_size": 32, "num_layers": 8, "cross_attention_dim": 384, "caption_channels": 768, "in_channels": 4},
    "sd3": _JOINT
    | {"sample_size": 32, "num_layers": 8, "caption_projection_dim": 384, "in_channels": 16, "patch_size": 2},
    "flux": _JOINT | {"in_channels": 64, "num_layers": 4, "num_single_layers": 4, "axes_dims_rope": (16, 24, 24)},
    "sana": _HEADS
    | {
        "sample_size": 16,
        "in_channels": 32,
        "num_layers": 8,
        "num_cross_attention_heads": 6,
        "cross_attention_head_dim": 64,
        "cross_attention_dim": 384,
        "caption_channels": 768,
    },
    "dit": _DIT,
    "sit": _DIT,
    "adm": {
        "image_size": 64,
        "in_channels": 3,
        "model_channels": 64,
        "out_channels": 6,
        "num_res_blocks": 1,
        "attention_resolutions": [4, 8],
        "channel_mult": [1, 2, 3, 4],
        "num_head_channels": 64,
        "use_scale_shift_norm": True,
        "resblock_updown": True,
    },
    "edm": {
        "model_type": "SongUNet",
        "img_resolution": 32,
        "img_channels": 3,
        "model_channels": 64,
        "channel_mult": [1, 2, 2],
        "num_blocks": 2,
        "attn_resolutions": [16],
    },
}


def open_network(family, device, dtype):
    """Builds a backbone of random weights, the same for every dtype."""
    torch.manual_seed(0)
    if family in OFFICIAL:
        adapter = OFFICIAL[family]
        network, schedule = adapter.build(NETWORKS[family], None), adapter.schedule_of(NETWORKS[family])
    else:
        adapter = DIFFUSERS[family]
        network = getattr(diffusers, adapter.diffusers_class)(**NETWORKS[family])
        scale = getattr(adapter, "flow_scale", 1.0)
        schedule = FlowSchedule(scale=scale) if family in ("sd3", "flux", "sana") else DiscreteSchedule.linear()
    network = cast(network, device, dtype)
    return adapter(family, network, schedule, None, adapter.conditioner_of(network))


def measure(family, options, device):
    """Returns the family's row."""
    single, half, compiled = (
        open_network(family, device, dtype) for dtype in (torch.float32, torch.bfloat16, torch.float32)
    )
    compiled.compiler = "inductor"
    side = 32 if family == "flux" else single.sample_size
    x = torch.randn(options.batch, single.in_channels, side, side)
    level = single.schedule.level("sigma=0.7").time
    rows = {
        name: torch.randn(row.shape) for name, row in single.conditioner.example().items() if row.is_floating_point()
    }
    cond = rows or None
    blocks = single.blocks()
    middle = blocks[len(blocks) // 2 - 1]
    calls = {
        "full": lambda: single.denoise(x, level, cond),
        "exit": lambda: single.capture(x, level, [middle], cond),
        "bf16": lambda: half.capture(x, level, [middle], cond),
    }
    if not options.no_compile:
        calls["compiled"] = lambda: compiled.capture(x, level, [middle], cond)
    seconds = median_times(options.rounds, calls)
    spent, total = single.flops(single.addresses([middle]), side, side)
    return {
        "family": family,
        "block": middle,
        "full_ms": 1000 * seconds["full"],
        "exit": seconds["exit"] / seconds["full"],
        "flops": spent[middle] / total,
        "bf16": seconds["bf16"] / seconds["exit"],
        "compiled": seconds["compiled"] / seconds["exit"] if "compiled" in seconds else None,
    }


def main():
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--json", metavar="FILE", help="also write the rows there")
    options = parser.parse_args()
    where = torch.cuda.get_device_name() if options.device.startswith("cuda") else "CPU"
    print(f"{where}, {torch.get_num_threads()} threads, batch {options.batch}, medians of {options.rounds}")
    print(f"{'family':18} {'middle block':24} {'full ms':>8} {'exit':>6} {'FLOPs':>6} {'bf16':>6} {'compiled':>9}")
    rows = []
    for family in options.families:
        row = measure(family, options, torch.device(options.device))
        compiled = "-" if row["compiled"] is None else f"{row['compiled']:.2f}"
        print(
            f"{family:18} {row['block']:24} {row['full_ms']:8.0f} {row['exit']:6.2f} {row['flops']:6.2f} "
            f"{row['bf16']:6.2f} {compiled:>9}",
            flush=True,
        )
        rows.append(row)
    write_json(options.json, "backbones", rows)


if __name__ == "__main__":
    main()
