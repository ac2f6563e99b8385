"""Write a checkpoint as safetensors and JSON, in a folder that every verb opens.

Examples:
  diffrep convert edm-cifar10-32x32-uncond-vp.pkl models/edm-cifar10
  diffrep convert DiT-XL-2-256x256.pt models/dit --family dit --config XL/2
  diffrep convert models/dit models/dit-diffusers --to diffusers
"""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the verb's arguments."""
    parser.add_argument("source", help="EDM pickle, official checkpoint, or DiT folder; code in a pickle is not run")
    parser.add_argument("out", help="folder to write")
    parser.add_argument("--family", help="of an official checkpoint: dit, sit, repa, adm or edm")
    parser.add_argument("--config", help="its variant, such as XL/2, or a JSON file of arguments")
    parser.add_argument("--to", choices=("official", "diffusers"), default="official", help="default: official keys")


def run(arguments: argparse.Namespace) -> None:
    """Converts and prints the folder."""
    from diffrep.backbones.convert import convert

    print(convert(arguments.source, arguments.out, arguments.family, arguments.config, arguments.to))
