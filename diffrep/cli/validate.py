"""Check a config against its verb's schema and print it resolved.

Example:
  diffrep validate extract configs/extract/folder.yaml data=PATH out=runs/photos
"""

from __future__ import annotations

import argparse

from diffrep.cli.words import add_config, read_config

SCHEMAS = {
    "extract": "ExtractConfig",
    "probe": "ProbeConfig",
    "search": "SearchConfig",
    "vtab": "VtabConfig",
    "feedback": "FeedbackConfig",
    "train": "TrainConfig",
    "sample": "SampleConfig",
    "correspond-evaluate": "CorrespondConfig",
    "correspond-train": "AggregateConfig",
    "correspond-match": "MatchConfig",
    "correspond-warp": "WarpConfig",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the verb's arguments."""
    parser.add_argument("schema", choices=SCHEMAS, help="verb whose config it is")
    add_config(parser)


def run(arguments: argparse.Namespace) -> None:
    """Prints the resolved config."""
    from diffrep import config

    print(config.to_yaml(read_config(getattr(config, SCHEMAS[arguments.schema]), arguments.words)), end="")
