"""How far each faster way of running a network is from float32, and what it gains.

    python scripts/bench/modes.py [--families dit unet2d ...] [--batch 8] [--rounds 5] [--device auto] [--json FILE]

The networks are those of backbones.py, and the middle block is read. "error" is the norm of the difference from a pass
in float32 without TF32, over the norm of that pass; "time" is the median over that of float32 (with TF32, where the
device has it), all ways of a family taking turns in every round; "first" is the seconds of the first call, in which
compilation lies. A way that cannot run here has its reason in place of figures; one whose error is above its bound
makes the exit status 1.
"""

import argparse
import math
import sys
import time

import torch
from backbones import NETWORKS, open_network
from timing import median_times, write_json

from diffrep.backbones.attention import choose_attention
from diffrep.backbones.compiled import compile_mode
from diffrep.errors import DiffrepError

# dtype, compile, attention, and the bound of the error: a few units in the last place of the dtype, summed up over
# some blocks.
WAYS = {
    "float32": (torch.float32, False, "auto", 1e-3),
    "bfloat16": (torch.bfloat16, False, "auto", 0.05),
    "float16": (torch.float16, False, "auto", 0.01),
    "compile": (torch.float32, True, "auto", 1e-3),
    "compile=regional": (torch.float32, "regional", "auto", 1e-3),
    "compile=cudagraphs": (torch.float32, "cudagraphs", "auto", 1e-3),
    "bfloat16, compile": (torch.bfloat16, True, "auto", 0.05),
    "bfloat16, compile=regional": (torch.bfloat16, "regional", "auto", 0.05),
    "bfloat16, compile=cudagraphs": (torch.bfloat16, "cudagraphs", "auto", 0.05),
    "float32, xformers": (torch.float32, False, "xformers", 1e-3),
    "bfloat16, xformers": (torch.bfloat16, False, "xformers", 0.05),
    "bfloat16, flash": (torch.bfloat16, False, "flash", 0.05),
}


def set_tf32(allowed):
    """Says whether float32 may be rounded to ten bits on the way into products, as is torch's default in part."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed


class Way:
    """A network that runs in one of the ways.

    Raises:
        DiffrepError: It cannot run here.
    """

    def __init__(self, family, way, device):
        dtype, compiled, attention, self.bound = WAYS[way]
        kernel = choose_attention(attention, device, dtype)
        mode = compile_mode(compiled, device)
        self.backbone = open_network(family, device, dtype)
        self.backbone.attention = kernel
        if mode is not None:
            self.backbone.compiler, self.backbone.compile_mode = "inductor", mode

    def __call__(self, x, level, layer, cond):
        """Returns the layer's features in float32."""
        return self.backbone.capture(x, level, [layer], cond)[layer].float()


def inputs_of(backbone, batch, family):
    """Returns noised inputs, a time, the middle block and a condition."""
    generator = torch.Generator().manual_seed(0)
    side = 32 if family == "flux" else backbone.sample_size
    x = torch.randn(batch, backbone.in_channels, side, side, generator=generator)
    example = {name: row for name, row in backbone.conditioner.example().items() if row.is_floating_point()}
    cond = {name: torch.randn(row.shape, generator=generator) for name, row in example.items()} or None
    blocks = backbone.blocks()
    return x, backbone.schedule.level("sigma=0.7").time, blocks[len(blocks) // 2 - 1], cond


def measure(family, options, device):
    """Yields the family's rows."""
    exact = Way(family, "float32", device)
    given = inputs_of(exact.backbone, options.batch, family)
    set_tf32(False)
    expected = exact(*given)
    set_tf32(True)
    calls, rows = {"float32": lambda: exact(*given)}, []
    for name in options.ways:
        row = {"family": family, "way": name}
        rows.append(row)
        try:
            way = Way(family, name, device)
            began = time.perf_counter()
            way(*given).sum().item()
            first = time.perf_counter() - began
            way(*given)  # a CUDA graph is recorded by the second call and replayed by the third
            error = ((way(*given) - expected).norm() / expected.norm()).item()
        except DiffrepError as reason:
            row["unavailable"] = first_words(reason)
        except Exception as reason:  # whatever compilers raise; the other ways are worth their figures
            row["broken"] = f"{type(reason).__name__}: {first_words(reason)}"
        else:
            row |= {"first_s": first, "error": error, "bound": way.bound}
            if not math.isfinite(error):
                row |= {"error": None, "broken": "features are not finite"}
            elif name != "float32":
                calls[name] = lambda way=way: way(*given)
    seconds = median_times(options.rounds, calls, warmups=1)
    for row in rows:
        if row["way"] in seconds and row.get("error") is not None:
            row |= {"ms": 1000 * seconds[row["way"]], "time": seconds[row["way"]] / seconds["float32"]}
        yield row


def first_words(reason):
    """Returns the beginning of an error's text in one line."""
    return " ".join(str(reason).split())[:300]


def wrong(row):
    """Tells whether a way gave wrong features or none."""
    return "broken" in row or row.get("error", 0) > row.get("bound", 0)


def text(row):
    """Returns a line of the table."""
    begin = f"{row['family']:18} {row['way']:30}"
    for kind in ("unavailable", "broken"):
        if kind in row:
            return f"{begin} {kind}: {row[kind]}"
    far = f"  above {row['bound']:g}" if wrong(row) else ""
    return f"{begin} {row['error']:9.1e} {row['first_s']:8.2f} {row['ms']:9.2f} {row['time']:7.2f}{far}"


def main():
    """Prints the table; the exit status is 1 when a way gives wrong features or breaks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", metavar="FILE", help="also write the rows there")
    options = parser.parse_args()
    device = torch.device(options.device)
    print(f"{device}, {torch.get_num_threads()} threads, batch {options.batch}, medians of {options.rounds}")
    print(f"{'family':18} {'way':30} {'error':>9} {'first s':>8} {'ms':>9} {'time':>7}")
    rows = []
    for family in options.families:
        for row in measure(family, options, device):
            print(text(row), flush=True)
            rows.append(row)
    write_json(options.json, "modes", rows)
    sys.exit(any(wrong(row) for row in rows))


if __name__ == "__main__":
    main()
