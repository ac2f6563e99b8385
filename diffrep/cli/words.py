"""Words of the command line that verbs share."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, TypeVar

from diffrep.errors import ConfigError

if TYPE_CHECKING:
    from diffrep.config.schema import Section

T = TypeVar("T", bound="Section")


def add_config(parser: argparse.ArgumentParser) -> None:
    """Adds `[config.yaml ...] [key=value ...]`."""
    parser.add_argument("words", nargs="*", metavar="config.yaml | key=value", help="files first, then overrides")


def add_nproc(parser: argparse.ArgumentParser) -> None:
    """Adds `--nproc`."""
    parser.add_argument("--nproc", type=int, default=1, metavar="N", help="processes on this machine")


def read_config(schema: type[T], words: list[str]) -> T:
    """Sorts words into files and overrides and loads the config.

    Raises:
        ConfigError: A word is neither, or the config is wrong.
    """
    from diffrep.config import load_config

    files = [word for word in words if "=" not in word]
    for word in files:
        if not word.endswith((".yaml", ".yml")):
            raise ConfigError(f"cannot read the word {word!r}; give config files (.yaml) and overrides (key=value)")
    return load_config(schema, files, [word for word in words if "=" in word])
