"""Readers of sets of pairs: `open_pairs` finds the right one for a `PairsConfig`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from diffrep.config.pairs import PairsConfig
from diffrep.data.correspondences.ap10k import read_ap10k
from diffrep.data.correspondences.catalogue import Catalogue, build
from diffrep.data.correspondences.cats import read_cats
from diffrep.data.correspondences.cub import read_cub
from diffrep.data.correspondences.hpatches import read_hpatches, sequences
from diffrep.data.correspondences.listed import FILE, read_listed
from diffrep.data.correspondences.proposal_flow import (
    PASCAL_LISTS,
    WILLOW_FOLDER,
    WILLOW_LISTS,
    find_list,
    pascal_home,
    read_pf_pascal,
    read_pf_willow,
)
from diffrep.data.correspondences.spair import read_spair
from diffrep.data.pairs import PairSet
from diffrep.errors import ConfigError, DataError

READERS: dict[str, Callable[[Path, PairsConfig], Catalogue]] = {
    "spair": read_spair,
    "pf-pascal": read_pf_pascal,
    "pf-willow": read_pf_willow,
    "cub": read_cub,
    "ap-10k": read_ap10k,
    "hpatches": read_hpatches,
    "cats": read_cats,
    "json": read_listed,
}
__all__ = ["READERS", "open_pairs"]


def open_pairs(config: PairsConfig) -> PairSet:
    """Opens a set of pairs.

    Points that are not visible in both images or lie outside one of them are dropped; so are pairs without points.

    Args:
        config: What to open and which of its pairs.

    Raises:
        DataError: There is nothing readable, images are missing, or no pair is left.
        ConfigError: A key is set that this kind of data has not, or the pairs are too many to hold.
        UnknownNameError: There is no such split or category.
        BackendUnavailable: A package that this kind of data needs is not installed.
    """
    path = Path(config.path).expanduser()
    if not path.exists():
        raise DataError(f"no set of pairs at {config.path!r}")
    kind = guess_kind(path) if config.kind == "auto" else config.kind
    misplaced = config.misplaced(kind)
    if misplaced:
        raise ConfigError(misplaced)
    if path.is_file() and kind != "json":
        raise DataError(f"{config.path!r} is a file; a set of kind {kind} is a folder")
    return build(READERS[kind](path, config), config)


def guess_kind(path: Path) -> str:
    """Returns the kind of data that a path holds.

    Raises:
        DataError: It is none of the known ones.
    """
    signs: dict[str, Callable[[], bool]] = {
        "json": lambda: path.suffix.lower() == ".json" or (path / FILE).is_file(),
        "ap-10k": lambda: any((path / "annotations").glob("ap10k-*.json")),
        "spair": lambda: (path / "PairAnnotation").is_dir(),
        "cub": lambda: (path / "parts" / "part_locs.txt").is_file(),
        "hpatches": lambda: bool(sequences(path)),
        "pf-pascal": lambda: (
            (pascal_home(path) / "JPEGImages").is_dir()
            and any(find_list((path, pascal_home(path)), names) for names in PASCAL_LISTS.values())
        ),
        "pf-willow": lambda: find_list((path, path / WILLOW_FOLDER), WILLOW_LISTS) is not None,
        "cats": lambda: any(path.rglob("*.cat")),
    }
    found = next((kind for kind, sign in signs.items() if sign()), None)
    if found is None:
        raise DataError(f"{str(path)!r} is no set of pairs that is known; the kinds are {', '.join(READERS)}")
    return found
