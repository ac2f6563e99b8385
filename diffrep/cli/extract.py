"""Read features of a whole data set into a store; run it again to go on after a stop.

Examples:
  diffrep extract configs/extract/fashion_demo.yaml out=runs/features
  diffrep extract configs/extract/folder.yaml data=PATH out=runs/photos request.levels=[10,50] --dry-run
  diffrep extract configs/extract/folder.yaml data=PATH out=runs/photos --nproc 2
  diffrep extract configs/extract/dit-xl2.yaml data=PATH out=runs/dit --dry-run --images 400000000 --cards A100,H100
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from diffrep.cli.words import add_config, add_nproc, read_config
from diffrep.errors import ConfigError

if TYPE_CHECKING:
    from diffrep.config import ExtractConfig
    from diffrep.extract.cost import Cost
    from diffrep.extract.job import ExtractJob

ONLY_DRY = ("images", "cards", "utilisation", "json")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the verb's arguments."""
    add_config(parser)
    parser.add_argument(
        "--dry-run", action="store_true", help="print units, FLOPs, bytes, GPU-hours and expected time, and stop"
    )
    parser.add_argument(
        "--images", type=_positive, metavar="N", help="with --dry-run: for so many images, and no data is opened"
    )
    parser.add_argument("--cards", metavar="A100,H100", help="with --dry-run: the GPUs to count hours of, or 'all'")
    parser.add_argument(
        "--utilisation", type=_share, metavar="X", help="with --dry-run: share of a GPU's peak reached (default: 0.35)"
    )
    parser.add_argument("--json", action="store_true", help="with --dry-run: print JSON")
    add_nproc(parser)


def run(arguments: argparse.Namespace) -> int:
    """Extracts, or prints the plan and its costs."""
    from diffrep.config import ExtractConfig

    config = read_config(ExtractConfig, arguments.words)
    if arguments.dry_run:
        return dry_run(config, arguments)
    given = [f"--{name}" for name in ONLY_DRY if getattr(arguments, name)]
    if given:
        raise ConfigError(f"{', '.join(given)}: only --dry-run takes this; add it, or leave this out")
    from diffrep import dist
    from diffrep.extract.job import ExtractJob

    if arguments.nproc > 1:
        ExtractJob(on_meta(config)).plan()  # a mistake is told once, before there are N processes to tell it
        return dist.launch_apart(arguments.nproc, ["extract", *arguments.words])
    store = ExtractJob(config).run()
    if dist.worker().rank == 0:
        print(store)
    return 0


def dry_run(config: ExtractConfig, arguments: argparse.Namespace) -> int:
    """Prints what an extraction would do and cost; writes nothing.

    Raises:
        ConfigError: The samples of a streamed set are not counted, and `--images` is not given.
    """
    import json

    from diffrep.data.listing import is_remote
    from diffrep.extract.cards import SHOWN, read_cards
    from diffrep.extract.cost import UTILISATION
    from diffrep.extract.job import ExtractJob

    streamed = config.data.stream or is_remote(config.data.path)
    if streamed and arguments.images is None:
        raise ConfigError("nobody has counted the samples of a streamed set; say how many there are with --images N")
    cards = read_cards(arguments.cards) if arguments.cards else SHOWN
    config = without_weights(config)
    job = ExtractJob(config) if arguments.images is None else announced_job(config, arguments.images)
    cost = cost_of(job, streamed, cards, arguments.utilisation or UTILISATION)
    if arguments.json:
        print(json.dumps(cost.as_json() | {"time": job.expected_time()}, indent=1))
        return 0
    shards = f"{cost.shards:,}, one" if cost.shards else "one"
    head = f"units     {shards} for each shard\n{cost.plan.text(cost.images)}" if streamed else job.text()
    print("\n".join([head, *cost.lines(), f"time      {job.expected_time()}"]))
    return 0


def announced_job(config: ExtractConfig, count: int) -> ExtractJob:
    """Returns the extraction of so many images that are not here, at `data.size` or the network's native size."""
    from diffrep.data import ImageSet, Transform
    from diffrep.extract.cost import Announced
    from diffrep.extract.job import ExtractJob, open_backbone

    backbone = open_backbone(config.backbone)
    side = config.data.size or backbone.image_size
    images = ImageSet({"images": Announced(count)}, Transform(backbone.image_channels, side, config.data.fit))
    data = config.data.model_copy(update={"size": side, "stream": False})
    return ExtractJob(config.model_copy(update={"data": data}), backbone, images)


def cost_of(job: ExtractJob, streamed: bool, cards: tuple[str, ...], utilisation: float) -> Cost:
    """Returns the costs of an extraction, with the room that there is where its features go."""
    from diffrep.extract.cost import Cost, count_shards
    from diffrep.store import Claims, list_units
    from diffrep.store.layout import META
    from diffrep.store.place import open_place

    place, images = open_place(job.config.out), len(job.images)
    more = {"cards": cards, "utilisation": utilisation, "free": place.free()}
    if streamed:
        more |= {"unit_size": None, "shards": count_shards(job.config.data)}
    elif place.size(META) is not None:
        units = list_units(job.images.splits, job.config.unit_size)
        claims = Claims(place, units, job.config.lease)
        claims.refresh()
        more["done"] = images * claims.done // len(units)
    return Cost.of(job.config, job.backbone, job.plan(), images, **more)


def without_weights(config: ExtractConfig) -> ExtractConfig:
    """Returns the config with a registered network on the meta device, unless it names a device: its config ships."""
    from diffrep.backbones.sources import registered

    source, device = config.backbone.source, config.backbone.device
    apart = device != "auto" or source not in registered() or Path(source).expanduser().exists()
    return config if apart else on_meta(config)


def on_meta(config: ExtractConfig) -> ExtractConfig:
    """Returns the config with a backbone that reads no weights, which is enough for a plan."""
    light = config.backbone.model_copy(update={"device": "meta", "attention": "auto", "compile": False})
    return config.model_copy(update={"backbone": light})


def _positive(text: str) -> int:
    digits = text.replace("_", "").replace(",", "")
    if not digits.isdecimal() or int(digits) < 1:
        raise argparse.ArgumentTypeError(f"must be a number of images, got {text!r}")
    return int(digits)


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise argparse.ArgumentTypeError(f"must be above 0 and at most 1, got {text!r}")
    return share
