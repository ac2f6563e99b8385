"""Match points between images: score descriptors on annotated pairs, train an aggregation network, or look at matches.

Examples:
  diffrep correspond evaluate configs/correspond/spair.yaml pairs=SPair-71k backbone=SOURCE out=runs/spair
  diffrep correspond evaluate backbone=cifar-unet size=256 request.layers=up_blocks.1 request.levels=20
      pairs=CATS out=runs/cats
  diffrep correspond train configs/correspond/hyperfeatures.yaml pairs=SPair-71k val_pairs=SPair-71k
      backbone=SOURCE out=runs/aggregation
  diffrep correspond match A.jpg B.jpg backbone=cifar-unet size=256 request.layers=up_blocks.1 request.levels=20
      out=runs/match
  diffrep correspond warp backbone=cifar-unet data=PATH data.size=32 data.limit=100 request.layers=blocks
      request.levels=20 out=runs/warp
"""

from __future__ import annotations

import argparse

from diffrep.cli.words import add_config, add_nproc, read_config
from diffrep.errors import ConfigError

ACTIONS = {
    "evaluate": "PCK of descriptors on annotated pairs, under named protocols",
    "train": "an aggregation network on frozen features (Diffusion Hyperfeatures)",
    "match": "two images -> a picture of matches and a page to click through",
    "warp": "images against seeded warps of themselves, error in pixels",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the verb's arguments."""
    text = "; ".join(f"{name}: {what}" for name, what in ACTIONS.items())
    parser.add_argument("action", choices=ACTIONS, metavar="|".join(ACTIONS), help=text)
    add_config(parser)
    add_nproc(parser)


def run(arguments: argparse.Namespace) -> int:
    """Does one of the actions."""
    return {"evaluate": _evaluate, "train": _train, "match": _match, "warp": _warp}[arguments.action](arguments)


def _evaluate(arguments: argparse.Namespace) -> int:
    from diffrep.config.correspond import CorrespondConfig

    config = read_config(CorrespondConfig, arguments.words)
    from pathlib import Path

    from diffrep import dist
    from diffrep.correspond.evaluate import run_evaluate, table

    if arguments.nproc > 1:
        return dist.launch(arguments.nproc, ["correspond", "evaluate", *arguments.words])
    metrics = run_evaluate(config)
    if dist.state().is_main_process:
        report = (Path(config.out) / "report.html").resolve()
        print("\n".join(["", table(metrics), "", *metrics["notes"], f"report: {report}"]))
    dist.teardown()
    return 0


def _train(arguments: argparse.Namespace) -> int:
    from diffrep.config.correspond import AggregateConfig

    config = read_config(AggregateConfig, arguments.words)
    from pathlib import Path

    from diffrep import dist
    from diffrep.correspond.aggregate import HEAD, run_aggregate

    if arguments.nproc > 1:
        if config.pairs_per_step % arguments.nproc:
            raise ConfigError(
                f"pairs_per_step {config.pairs_per_step} does not divide among {arguments.nproc} processes"
            )
        return dist.launch(arguments.nproc, ["correspond", "train", *arguments.words])
    metrics = run_aggregate(config)
    if dist.state().is_main_process:
        print("\n".join(["", *metrics["notes"], f"head: {(Path(config.out) / HEAD).resolve()}"]))
    dist.teardown()
    return 0


def _match(arguments: argparse.Namespace) -> int:
    from diffrep.config.correspond import MatchConfig

    images = [word for word in arguments.words if "=" not in word and not word.endswith((".yaml", ".yml"))]
    if len(images) != 2:
        raise ConfigError(f"match takes two images, got {len(images)}: {', '.join(images) or 'none'}")
    if arguments.nproc > 1:
        raise ConfigError("match has no work for several processes; leave --nproc out")
    config = read_config(MatchConfig, [word for word in arguments.words if word not in images])
    from diffrep.correspond.match import PICTURE, run_match

    page = run_match(config, *images).resolve()
    print(f"picture: {page.with_name(PICTURE)}\npage: {page}")
    return 0


def _warp(arguments: argparse.Namespace) -> int:
    from diffrep.config.correspond import WarpConfig

    if arguments.nproc > 1:
        raise ConfigError("warp works in one process; leave --nproc out")
    config = read_config(WarpConfig, arguments.words)
    from pathlib import Path

    from diffrep.correspond.geometric import run_warp, table

    metrics = run_warp(config)
    print(f"\n{table(metrics['geometric'])}\n\nreport: {(Path(config.out) / 'report.html').resolve()}")
    return 0
