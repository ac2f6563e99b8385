"""Feature stores: safetensors shards and JSON, written in units that exist whole or not at all."""

from diffrep.store.layout import NUMERICS, Unit, list_units
from diffrep.store.reader import FeatureStore, LayerDataset
from diffrep.store.writer import StoreWriter

__all__ = ["NUMERICS", "FeatureStore", "LayerDataset", "StoreWriter", "Unit", "list_units"]
