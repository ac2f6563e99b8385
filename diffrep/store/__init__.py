"""Feature stores: safetensors shards and JSON, written in units that exist whole or not at all."""

from diffrep.store.claims import Claims
from diffrep.store.layout import NUMERICS, Unit, Units, list_units
from diffrep.store.place import Place, open_place
from diffrep.store.reader import FeatureStore, LayerDataset
from diffrep.store.writer import StoreWriter

__all__ = [
    "NUMERICS",
    "Claims",
    "FeatureStore",
    "LayerDataset",
    "Place",
    "StoreWriter",
    "Unit",
    "Units",
    "list_units",
    "open_place",
]
