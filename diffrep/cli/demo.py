"""Run the whole path on bundled networks and images: features, probes, baselines, head, matching, report.

Examples:
  diffrep demo
  diffrep demo --limit 500 --out runs/quick
"""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the verb's arguments."""
    parser.add_argument("--limit", type=int, metavar="N", help="images in all, of the 5,000 (at least 100)")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/demo"), metavar="DIR", help="run folder (default: runs/demo)"
    )


def run(arguments: argparse.Namespace) -> None:
    """Runs the demo."""
    from diffrep.cli.layers import layer_table
    from diffrep.errors import ConfigError

    if arguments.limit is not None and not 100 <= arguments.limit <= 5000:
        raise ConfigError(f"--limit must lie between 100 and 5000, got {arguments.limit}")
    from diffrep import dist, load_backbone
    from diffrep.correspond.geometric import table as warp_table
    from diffrep.demo import BACKBONE, TRANSFORMER, demo
    from diffrep.probe.run import table

    for name in (BACKBONE, TRANSFORMER):
        backbone = load_backbone(name, device="meta")
        print(f"{name}, its blocks in execution order:\n{layer_table(backbone, depth=1)}\n")
    metrics = demo(arguments.out, arguments.limit)
    report = (arguments.out / "report.html").resolve()
    print("\n".join(["", table(metrics), "", warp_table(metrics["geometric"]), "", f"report: {report}"]))
    dist.teardown()
