import errno
import os
import pickle

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from diffrep import FeatureStore
from diffrep.errors import StoreError, UnknownNameError
from diffrep.store import StoreWriter
from diffrep.store.layout import info_file, tensor_file

META = {
    "numerics": 1,
    "backbone": {"name": "net", "weights": "abc"},
    "request": {"seed": 0, "draws": 1},
    "layers": {"mid": {"shape": [2], "cost": 0.5}},
    "levels": [["5", "t=5", 5, 0.9, 0.4]],
    "data": {"path": "photos"},
    "splits": {"train": [0, 5], "test": [5, 8]},
    "classes": ["a", "b"],
    "unit_size": 2,
    "versions": {"torch": "1"},
}


def fill(writer, unit):
    rows = list(unit.rows)
    features = torch.tensor([[row, -row] for row in rows], dtype=torch.float16)
    writer.write(unit, {"mid@t=5": features}, [f"id{row}" for row in rows], rows, [row % 2 for row in rows], [])


@pytest.fixture
def path(tmp_path):
    writer = StoreWriter(tmp_path / "store", META)
    for unit in writer.missing():
        fill(writer, unit)
    writer.finish()
    return tmp_path / "store"


def test_units_never_cross_a_split(path):
    writer = StoreWriter(path, META)
    assert [(unit.split, list(unit.rows)) for unit in writer.units] == [
        ("train", [0, 1]),
        ("train", [2, 3]),
        ("train", [4]),
        ("test", [5, 6]),
        ("test", [7]),
    ]
    assert writer.missing() == []


def test_reading(path):
    store = FeatureStore(path)
    assert len(store) == 8
    assert store.layers == ["mid"]
    assert store.levels["t=5"].time == 5
    assert store["mid", 5].dtype == torch.float16
    assert np.array_equal(store.numpy("mid", "t=5")[:, 0], np.arange(8))
    assert store.tensor("mid", 5, "test")[:, 0].tolist() == [5, 6, 7]
    assert store.rows("test").tolist() == [5, 6, 7]
    assert store.labels.tolist() == [0, 1] * 4
    assert store.splits == ["train", "test"]
    assert store.verify() == []


def test_taking_some_samples(path):
    store = FeatureStore(path)
    for rows in ([0, 3, 7], [6, 1, 1, 4], [2, 3], []):
        taken = store.take("mid", 5, np.array(rows, dtype=np.int64))
        assert torch.equal(taken, store["mid", 5][rows])
        assert taken.dtype == torch.float16
    for rows in ([8], [-1]):
        with pytest.raises(IndexError):
            store.take("mid", 5, np.array(rows))


def test_a_torch_data_set_with_workers(path):
    store = FeatureStore(path)
    assert store[5]["id"] == "id5"
    batches = list(DataLoader(store, batch_size=3, num_workers=1))
    assert torch.cat([batch["mid@t=5"] for batch in batches])[:, 0].tolist() == list(range(8))
    assert torch.cat([batch["label"] for batch in batches]).tolist() == [0, 1] * 4
    pairs = pickle.loads(pickle.dumps(store.dataset("mid", 5, "test")))
    assert [(feature[0].item(), label) for feature, label in (pairs[i] for i in range(3))] == [(5, 1), (6, 0), (7, 1)]
    with pytest.raises(IndexError):
        store[8]


def test_bfloat16_goes_to_numpy_as_float32(tmp_path):
    meta = {**META, "splits": {"all": [0, 2]}, "unit_size": 2}
    writer = StoreWriter(tmp_path / "store", meta)
    writer.write(writer.units[0], {"mid@t=5": torch.ones(2, 2, dtype=torch.bfloat16)}, ["a", "b"], [0, 1], None, [])
    writer.finish()
    store = FeatureStore(tmp_path / "store")
    assert store.numpy("mid", 5).dtype == np.float32
    assert store.labels is None


def test_wrong_names(path):
    store = FeatureStore(path)
    with pytest.raises(UnknownNameError, match="unknown layer 'mit'; did you mean 'mid'"):
        store["mit", 5]
    with pytest.raises(UnknownNameError, match="unknown level '6'; known: t=5"):
        store["mid", 6]
    with pytest.raises(UnknownNameError, match="unknown split 'val'"):
        store.rows("val")


def test_another_request_is_refused_and_every_difference_named(path):
    other = {**META, "request": {"seed": 1, "draws": 2}}
    with pytest.raises(StoreError) as caught:
        StoreWriter(path, other)
    assert "request.seed: 0 there, 1 now" in str(caught.value)
    assert "request.draws: 1 there, 2 now" in str(caught.value)
    assert "backbone" not in str(caught.value)


def test_other_versions_only_warn(path):
    with pytest.warns(UserWarning, match="torch 1 -> 2"):
        StoreWriter(path, {**META, "versions": {"torch": "2"}})


def test_a_unit_exists_whole_or_not_at_all(path):
    info_file(path, 1).unlink()
    with open(tensor_file(path, 3), "r+b") as file:
        file.truncate(10)
    writer = StoreWriter(path, META)
    assert [unit.number for unit in writer.missing()] == [1, 3]
    with pytest.raises(StoreError, match="2 of 5 units are missing"):
        writer.finish()
    for unit in writer.missing():
        fill(writer, unit)
    writer.finish()
    assert np.array_equal(FeatureStore(path).numpy("mid", 5)[:, 0], np.arange(8))


def test_damage_is_found(path):
    file = tensor_file(path, 0)
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert FeatureStore(path).verify() == [0]
    file.write_bytes(content[:20])
    with pytest.raises(StoreError, match="cannot read"):
        FeatureStore(path)


def test_stores_that_are_not_there_or_not_finished(path, tmp_path):
    with pytest.raises(StoreError, match="no feature store"):
        FeatureStore(tmp_path / "nothing")
    (path / "index.json").unlink()
    with pytest.raises(StoreError, match="not finished"):
        FeatureStore(path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("dear")
    with pytest.raises(StoreError, match="not empty"):
        StoreWriter(tmp_path / "full", META)
    (path / "meta.json").write_text("{")
    with pytest.raises(StoreError, match="cannot read"):
        FeatureStore(path)


def test_no_space_left(tmp_path, monkeypatch):
    writer = StoreWriter(tmp_path / "store", META)

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreError, match="No space left on device; finished units stay"):
        fill(writer, writer.units[0])
    monkeypatch.undo()
    assert len(writer.missing()) == 5
    assert not [file for file in (tmp_path / "store").rglob("*") if file.is_file() and file.name != "meta.json"]


def test_skipped_samples_are_listed(tmp_path):
    writer = StoreWriter(tmp_path / "store", {**META, "splits": {"train": [0, 2], "test": [2, 4]}})
    writer.write(writer.units[0], {}, [], [], [], [{"id": "x", "reason": "broken"}, {"id": "y", "reason": "broken"}])
    fill(writer, writer.units[1])
    writer.finish()
    assert len(FeatureStore(tmp_path / "store")) == 2
    assert (tmp_path / "store" / "skipped.jsonl").read_text().count("broken") == 2
