import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from diffrep import FeatureStore
from diffrep.errors import UnknownNameError
from diffrep.store import StoreWriter

datasets = pytest.importorskip("datasets")

SHAPES = {"mid": (3,), "up": (3, 2, 4)}
LEVELS = [["5", "t=5", 5, 0.9, 0.4], ["clean", "clean", 0, 1.0, 0.0]]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def make_store(path, label=lambda row: row % 2, classes=("a", "b"), dtype=torch.float16, offset=0):
    meta = {
        "layers": {name: {"shape": list(shape), "cost": 0.5} for name, shape in SHAPES.items()},
        "levels": LEVELS,
        "splits": {"train": [0, 5], "test": [5, 8]},
        "classes": classes and list(classes),
        "unit_size": 2,
    }
    writer = StoreWriter(path, meta)
    for unit in writer.missing():
        rows = list(unit.rows)
        tensors = {
            f"{name}@{level[1]}": torch.stack([torch.full(shape, row + offset + i / 2) for row in rows]).to(dtype)
            for name, shape in SHAPES.items()
            for i, level in enumerate(LEVELS)
        }
        labels = None if label is None else [label(row) for row in rows]
        writer.write(unit, tensors, [f"id{row}" for row in rows], rows, labels, [])
    writer.finish()
    return FeatureStore(path)


def several(row):
    return [row % 2, 1, 0]


def test_all_layers_and_levels(tmp_path):
    store = make_store(tmp_path / "store")
    rows = store.to_dataset()
    assert rows.column_names == ["id", "label", "mid@t=5", "mid@clean", "up@t=5", "up@clean"]
    assert rows["id"][:] == store.ids
    assert rows.features["label"].names == ["a", "b"]
    assert rows["label"][:] == store.labels.tolist()
    arrays = rows.with_format("numpy")
    for layer in SHAPES:
        for level in ("t=5", "clean"):
            assert np.array_equal(arrays[f"{layer}@{level}"][:], store.numpy(layer, level))
    assert rows.with_format("torch")[3]["up@clean"].shape == (3, 2, 4)
    assert rows.features["mid@t=5"].feature.dtype == rows.features["up@t=5"].dtype == "float16"


def test_one_layer_level_and_split(tmp_path):
    store = make_store(tmp_path / "store", classes=None)
    rows = store.to_dataset("up", 5, "test")
    assert rows.column_names == ["id", "label", "up@t=5"]
    assert rows["id"][:] == ["id5", "id6", "id7"]
    assert rows.features["label"] == datasets.Value("int64")
    with pytest.raises(UnknownNameError, match="unknown layer 'down'"):
        store.to_dataset("down")
    with pytest.raises(UnknownNameError, match="unknown split 'val'"):
        store.to_dataset(split="val")


def test_unlabelled_stores_and_bfloat16(tmp_path):
    store = make_store(tmp_path / "store", label=None, dtype=torch.bfloat16)
    rows = store.to_dataset("mid")
    assert rows.column_names == ["id", "mid@t=5", "mid@clean"]
    assert rows.features["mid@t=5"].feature.dtype == "float32"
    assert rows[7]["mid@clean"] == [7.5] * 3


def test_several_labels_go_through_store_loader_and_data_set(tmp_path):
    store = make_store(tmp_path / "store", several, ("a", "b", "c"))
    assert store.labels.dtype == np.int64
    assert store.labels.tolist() == [several(row) for row in range(8)]
    assert store[3]["label"].tolist() == [1, 1, 0]
    batches = list(DataLoader(store.dataset("mid", 5, "train"), batch_size=4, num_workers=2))
    assert torch.cat([labels for _, labels in batches]).tolist() == [several(row) for row in range(5)]
    named = store.to_dataset("mid", 5)
    assert named.features["label"].feature.names == ["a", "b", "c"]
    assert named["label"][:] == [[1], [0, 1]] * 4
    plain = make_store(tmp_path / "plain", several, None).to_dataset("mid", 5)
    assert plain.features["label"] == datasets.List(datasets.Value("int64"), length=3)
    assert plain["label"][:] == [several(row) for row in range(8)]


def test_a_store_made_again_is_not_taken_from_the_cache(tmp_path):
    first = make_store(tmp_path / "store").to_dataset("mid", 5)
    for file in sorted((tmp_path / "store").rglob("*"), reverse=True):
        file.rmdir() if file.is_dir() else file.unlink()
    second = make_store(tmp_path / "store", offset=10).to_dataset("mid", 5)
    assert (first[0]["mid@t=5"], second[0]["mid@t=5"]) == ([0.0] * 3, [10.0] * 3)


def test_without_the_library(tmp_path):
    make_store(tmp_path / "store")
    code = (
        "import sys; sys.modules['datasets'] = None\n"
        "from diffrep import FeatureStore; from diffrep.errors import BackendUnavailable\n"
        f"try: FeatureStore({str(tmp_path / 'store')!r}).to_dataset()\n"
        "except BackendUnavailable as error: print(error)"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "pip install 'diffrep[datasets]'" in told
