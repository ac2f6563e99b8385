"""What a store's meta.json says, checked: it may come from anybody."""

from __future__ import annotations

from typing import Any

from diffrep.config import LevelSpec
from diffrep.errors import StoreError
from diffrep.noise import Level, LevelTable
from diffrep.store.index import parse
from diffrep.store.inside import read_inside
from diffrep.store.layout import META, units_of
from diffrep.store.place import Place


def read_meta(place: Place) -> dict[str, Any]:
    """Reads a store's meta.json.

    Raises:
        StoreError: There is no store, or the file is damaged.
    """
    if place.size(META) is None:
        raise StoreError(f"no feature store in {place.target!r}; 'diffrep extract' makes one")
    meta = parse(read_inside(place, META), place.where(META))
    wanted = {"layers": dict, "levels": list, "splits": dict}
    for key, kind in wanted.items():
        if not isinstance(meta, dict) or not isinstance(meta.get(key), kind):
            raise StoreError(f"{place.where(META)} is no store's: {key} is missing or wrong; give the store's folder")
    units_of(meta)
    read_shapes(place, meta)
    read_levels(place, meta)
    classes, aliases = meta.get("classes"), meta.get("aliases", {})
    if not (classes is None or _is_strings(classes)) or not (
        isinstance(aliases, dict) and _is_strings(list(aliases.values()))
    ):
        raise StoreError(f"{place.where(META)} is damaged: classes and aliases are names")
    return meta


def read_shapes(place: Place, meta: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Returns the shape of a sample's features, by layer.

    Raises:
        StoreError: A layer has none.
    """
    found = {}
    for layer, about in meta["layers"].items():
        shape = about.get("shape") if isinstance(about, dict) else None
        if not isinstance(shape, list) or not all(type(size) is int and 0 < size < 2**40 for size in shape):
            raise StoreError(f"{place.where(META)} is damaged: layer {layer!r} has the shape {shape!r}")
        found[layer] = tuple(shape)
    return found


def read_levels(place: Place, meta: dict[str, Any]) -> LevelTable:
    """Returns a store's levels.

    Raises:
        StoreError: One is damaged.
    """

    def level(entry: Any) -> tuple[LevelSpec, Level]:
        spec, key, *numbers = entry
        if not (isinstance(spec, str) and isinstance(key, str) and len(numbers) == 3):
            raise ValueError(entry)
        if any(isinstance(one, bool) or not isinstance(one, int | float) for one in numbers):
            raise ValueError(entry)
        return spec, Level(key, *numbers)

    try:
        return LevelTable(map(level, meta["levels"]))
    except (TypeError, ValueError, OverflowError) as error:
        raise StoreError(
            f"{place.where(META)} is damaged: a level is [written, key, time, signal, noise], and one is {error}"
        ) from error


def _is_strings(values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(value, str) for value in values)
