import json
import os
import pickle
import shutil
from concurrent.futures import ThreadPoolExecutor

import fsspec
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from diffrep import FeatureStore
from diffrep.errors import StoreError, UnknownNameError
from diffrep.store import StoreWriter, files, open_place, tensors
from diffrep.store.layout import checksum, info_file, tensor_file, tensor_name
from diffrep.store.tensors import RemoteUnit, load_unit, open_unit

SHAPES = {"mid": (2,), "up": (3, 2, 2)}
META = {
    "backbone": {"name": "net"},
    "layers": {name: {"shape": list(shape), "cost": 0.5} for name, shape in SHAPES.items()},
    "levels": [["5", "t=5", 5, 0.9, 0.4], ["clean", "clean", 0, 1.0, 0.0]],
    "splits": {"train": [0, 50], "test": [50, 80]},
    "classes": ["a", "b"],
    "unit_size": 7,
}


def values(shape, rows, dtype=torch.float16):
    return torch.stack([torch.full(shape, float(row)) for row in rows]).to(dtype) if rows else torch.zeros(0, *shape)


def fill(target, meta=META, skip=(), dtype=torch.float16, labels=lambda row: row % 2, only=None):
    writer = StoreWriter(target, meta)
    for unit in writer.missing():
        if only is not None and unit.number not in only:
            continue
        rows = [row for row in unit.rows if row not in skip]
        content = {f"{la}@{le[1]}": values(SHAPES[la], rows, dtype) for la in meta["layers"] for le in meta["levels"]}
        skipped = [{"id": f"id{row}", "reason": "broken"} for row in unit.rows if row in skip]
        given = None if labels is None else [labels(row) for row in rows]
        writer.write(unit, content if rows else {}, [f"id{row}" for row in rows], rows, given, skipped)
    if only is None:
        writer.finish()
    return target


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    return fill(tmp_path_factory.mktemp("stores") / "store")


@pytest.fixture
def path(shared, tmp_path):
    return shutil.copytree(shared, tmp_path / "store")


@pytest.fixture(params=["local", "remote"])
def store(request, shared):
    if request.param == "local":
        return FeatureStore(shared)
    memory = fsspec.filesystem("memory")
    for file in (file for file in shared.rglob("*") if file.is_file()):
        memory.pipe_file(f"/reader/{file.relative_to(shared)}", file.read_bytes())
    request.addfinalizer(lambda: memory.rm("/reader", recursive=True))
    return FeatureStore("memory://reader")


def test_reading(store):
    assert len(store) == 80
    assert store.layers == ["mid", "up"]
    assert store.levels["t=5"].time == 5
    assert store["mid", 5].dtype == torch.float16
    assert torch.equal(store["up", "clean"], values(SHAPES["up"], range(80)))
    assert np.array_equal(store.numpy("mid", "t=5")[:, 0], np.arange(80))
    assert store.tensor("mid", 5, "test")[:, 1].tolist() == list(range(50, 80))
    assert store.rows("test").tolist() == list(range(50, 80))
    assert store.labels.tolist() == [0, 1] * 40
    assert store.labels.dtype == np.int64
    assert store.ids == [f"id{row}" for row in range(80)]
    assert store.splits == ["train", "test"]
    assert store[53]["id"] == "id53"
    assert store[53]["label"] == 1
    assert torch.equal(store[53]["up@t=5"], torch.full(SHAPES["up"], 53.0).half())
    assert store.dataset("mid", 5, "test")[3][0].tolist() == [53, 53]
    assert store.verify() == []
    assert len(store.digest) == 16


@pytest.mark.parametrize("rows", [[0, 3, 79], [76, 1, 1, 40, 0], list(range(80)), []])
def test_taking_some_samples(store, rows, monkeypatch):
    for most in (1024, 3):  # files that may be mapped
        monkeypatch.setattr(files, "OPEN", most)
        for _ in range(2):
            taken = store.take("up", 5, np.array(rows, dtype=np.int64))
            assert torch.equal(taken, store["up", 5][rows])
            assert taken.dtype == torch.float16
        assert store.ids_of(np.array(rows, dtype=np.int64)) == [f"id{row}" for row in rows]
        assert store.labels_of(np.array(rows, dtype=np.int64)).tolist() == [row % 2 for row in rows]
    for wrong in ([80], [-1], [3, 10**12]):
        with pytest.raises(IndexError):
            store.take("up", 5, np.array(wrong))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.float32])
def test_element_types(tmp_path, dtype, monkeypatch):
    meta = META | {"splits": {"all": [0, 20]}}
    store = FeatureStore(fill(tmp_path / "store", meta, dtype=dtype, labels=None))
    wanted = values(SHAPES["up"], range(20)).to(dtype)
    assert store.labels is None
    assert store.labels_of(np.array([3])) is None
    assert torch.equal(store["up", 5].float(), wanted.float())
    assert store["up", 5].dtype == dtype
    assert store.numpy("up", 5).dtype == np.float32
    rows = np.array([19, 2, 7, 7])
    assert torch.equal(store.take("up", 5, rows).float(), wanted[rows].float())
    # As where units lie too far apart in memory for one array.
    monkeypatch.setattr(tensors, "LARGEST", 0)
    again = FeatureStore(tmp_path / "store")
    assert torch.equal(again.take("up", 5, rows).float(), wanted[rows].float())
    with pytest.raises(IndexError):
        again.take("up", 5, np.array([20]))


@pytest.mark.parametrize("size", [1, 9, 200])
def test_batches_give_each_sample_once(store, size):
    for split, wanted in ((None, range(80)), ("test", range(50, 80))):
        orders = []
        for shuffle in (None, 0, 0, 1):
            found = list(store.batches("up", "clean", split, size, shuffle, window=3))
            assert all(len(rows) == size for rows, _, _ in found[:-1])
            for rows, features, labels in found:
                assert torch.equal(features, values(SHAPES["up"], rows.tolist()))
                assert labels.tolist() == [row % 2 for row in rows]
            orders.append([row for rows, _, _ in found for row in rows.tolist()])
            assert sorted(orders[-1]) == list(wanted)
        assert orders[0] == list(wanted)
        assert orders[1] == orders[2] != orders[3] != orders[0]
    with pytest.raises(ValueError, match="1 or more"):
        store.batches("up", "clean", size=0)


def test_samples_of_a_window_of_units_are_shuffled_together(shared):
    order = np.concatenate([rows for rows, _, _ in FeatureStore(shared).batches("mid", 5, "train", 8, 0, window=2)])
    units = order // 7
    assert len(set(units[:14].tolist())) == 2
    assert set(units[:14].tolist()).isdisjoint(units[14:].tolist())
    assert len(set(units[:7].tolist())) == 2


def test_a_torch_data_set_with_workers(shared):
    store = FeatureStore(shared)
    store.take("mid", 5, np.arange(80))  # what is mapped here is mapped again there
    batches = list(DataLoader(store, batch_size=32, num_workers=1))
    assert torch.cat([batch["mid@t=5"] for batch in batches])[:, 0].tolist() == list(range(80))
    assert torch.cat([batch["label"] for batch in batches]).tolist() == [0, 1] * 40
    pairs = pickle.loads(pickle.dumps(store.dataset("mid", 5, "test")))
    assert [(feature[0].item(), label) for feature, label in (pairs[i] for i in range(3))] == [
        (50, 0),
        (51, 1),
        (52, 0),
    ]
    with pytest.raises(IndexError):
        store[80]


def test_several_threads_may_take(shared, monkeypatch):
    monkeypatch.setattr(files, "OPEN", 2)
    store, generator = FeatureStore(shared), np.random.default_rng(0)
    draws = [generator.integers(0, 80, 5) for _ in range(200)]
    with ThreadPoolExecutor(4) as threads:
        for rows, taken in zip(draws, threads.map(lambda rows: store.take("mid", 5, rows), draws), strict=True):
            assert taken[:, 0].tolist() == rows.tolist()


def test_few_files_are_open(path, monkeypatch):
    monkeypatch.setattr(files, "OPEN", 3)
    store = FeatureStore(path)
    before = _mapped(path)
    for row in range(80):
        store.take("mid", 5, np.array([row]))
        assert store["mid", 5].shape == (80, 2)
    assert before == 0 < _mapped(path) <= 6


def _mapped(path):
    with open("/proc/self/maps") as maps:
        return sum(str(path) in line for line in maps)


def test_what_is_read_can_be_changed_and_does_not_reach_the_file(path):
    FeatureStore(path)[0]["mid@t=5"].zero_()
    FeatureStore(path)[1]["mid@t=5"].zero_()
    assert FeatureStore(path).verify() == []
    assert FeatureStore(path)["mid", 5][1].tolist() == [1, 1]


def test_wrong_names(shared):
    store = FeatureStore(shared)
    with pytest.raises(UnknownNameError, match="unknown layer 'mit'; did you mean 'mid'"):
        store["mit", 5]
    with pytest.raises(UnknownNameError, match="unknown level '6'; known: t=5"):
        store["mid", 6]
    for call in (
        store.rows,
        lambda split: store.tensor("mid", 5, split),
        lambda split: store.batches("mid", 5, split),
    ):
        with pytest.raises(UnknownNameError, match="unknown split 'val'"):
            call("val")


def test_skipped_samples_and_empty_units(tmp_path):
    gone = [0, 1, 9, *range(50, 57), 79]
    store = FeatureStore(fill(tmp_path / "store", skip=gone))
    left = [row for row in range(80) if row not in gone]
    assert store.ids == [f"id{row}" for row in left]
    assert store["mid", 5][:, 0].tolist() == left
    assert store.take("mid", 5, store.rows("test"))[:, 0].tolist() == [row for row in left if row >= 50]
    all_gone = fill(tmp_path / "nothing", META | {"splits": {"train": [0, 3]}}, skip=range(3))
    with pytest.raises(StoreError, match="every image was skipped"):
        FeatureStore(all_gone)


def test_a_part_of_a_store(tmp_path):
    path = fill(tmp_path / "store", only=[])
    with pytest.raises(StoreError, match="not finished; run the same 'diffrep extract' again"):
        FeatureStore(path)
    with pytest.raises(StoreError, match="no unit of the store .* is there yet"):
        FeatureStore(path, partial=True)
    fill(path, only=[1, 9])
    store = FeatureStore(path, partial=True)
    rows = [*range(7, 14), *range(57, 64)]
    assert store.ids == [f"id{row}" for row in rows]
    assert store["mid", 5][:, 0].tolist() == rows
    assert store.rows("test").tolist() == list(range(7, 14))
    assert FeatureStore(fill(path), partial=True).ids == [f"id{row}" for row in range(80)]


def test_damage_is_found(path):
    file = tensor_file(path, 0)
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert FeatureStore(path).verify() == [0]
    file.write_bytes(content[:20])
    store = FeatureStore(path)
    with pytest.raises(StoreError, match="has 20 bytes in place of"):
        store["mid", 5]
    assert store.take("mid", 5, np.array([7]))[0, 0] == 7
    file.unlink()
    with pytest.raises(StoreError, match="0000000.safetensors is missing"):
        FeatureStore(path)["mid", 5]


def test_names_that_belong_to_other_tensors_are_refused(path):
    for name in ("ids", "skipped"):
        file = info_file(path, 2)
        content = file.read_text()
        info = json.loads(content)
        info[name] = [{"id": "id99", "reason": "broken"}] if name == "skipped" else ["id99", *info["ids"][1:]]
        file.write_text(json.dumps(info))
        store = FeatureStore(path)
        assert store[0]["id"] == "id0"
        with pytest.raises(StoreError, match="not the one that belongs to its tensors"):
            store.ids_of(np.array([14]))
        with pytest.raises(StoreError, match="not the one that belongs to its tensors"):
            _ = store.ids
        assert store.verify() == [2]
        file.write_text(content)


def test_a_changed_meta_is_refused(path):
    meta = json.loads((path / "meta.json").read_text())
    (path / "meta.json").write_text(json.dumps(meta | {"classes": ["b", "a"]}))
    with pytest.raises(StoreError, match="not the one that index.json was made from"):
        FeatureStore(path)


def test_links_that_lead_out_of_the_store_are_refused(path, tmp_path):
    file = tensor_file(path, 0)
    file.rename(tmp_path / "outside")
    file.symlink_to(tmp_path / "outside")
    with pytest.raises(StoreError, match="a link that leads out of the store"):
        FeatureStore(path)["mid", 5]
    file.unlink()
    (tmp_path / "outside").rename(path / "inside")
    file.symlink_to(path / "inside")
    assert FeatureStore(path)["mid", 5][0, 0] == 0
    (path / "units").rename(tmp_path / "units")
    (path / "units").symlink_to(tmp_path / "units")
    with pytest.raises(StoreError, match="a link that leads out of the store"):
        FeatureStore(path)


def test_a_store_of_the_first_format_is_refused(path):
    (path / "index.json").write_text('{"samples": 2, "units": [{"unit": 0, "samples": 2, "sha256": "00"}]}')
    with pytest.raises(StoreError, match="written by another version; extract it again"):
        FeatureStore(path)


def test_stores_that_are_not_there(path, tmp_path):
    with pytest.raises(StoreError, match="no feature store"):
        FeatureStore(tmp_path / "nothing")
    with pytest.raises(StoreError, match="no feature store"):
        FeatureStore("memory://nothing")
    (path / "meta.json").write_text("{")
    with pytest.raises(StoreError, match="cannot read"):
        FeatureStore(path)


def test_sizes_that_no_file_has_are_refused(path):
    index, folder = (json.loads((path / name).read_text()) for name in ("index.json", "units/0000/index.json"))
    folder["samples"][0] = index["samples"] = index["folders"][0]["samples"] = 2**61
    (path / "units/0000/index.json").write_text(json.dumps(folder))
    index["samples"] = index["folders"][0]["samples"] = sum(folder["samples"])
    index["folders"][0]["checksum"] = checksum((path / "units/0000/index.json").read_bytes())
    (path / "index.json").write_text(json.dumps(index))
    with pytest.raises(StoreError, match="sizes that no files have"):
        FeatureStore(path)


def test_remote_tensors_are_read_by_ranges(store, monkeypatch):
    if store.name != "reader":  # the store in memory
        unit = open_unit(store.place, tensor_name(0), store.place.size(tensor_name(0)))
        assert os.path.samefile(unit.where, store.path / tensor_name(0))
        return
    size = store.place.size(tensor_name(0))
    monkeypatch.setattr(tensors, "HEAD", 16)
    monkeypatch.setattr(tensors, "GAP", 30)
    asked, place = [], open_place("memory://reader")
    read = place.read
    monkeypatch.setattr(place, "read", lambda name, *span: asked.append(span) or read(name, *span))
    unit = RemoteUnit(place, tensor_name(0), size)
    whole = load_unit(place, tensor_name(0), size)
    assert unit.slots == whole.slots
    asked.clear()
    assert torch.equal(unit.rows("up@t=5", np.array([6, 0, 1, 6])), whole.tensor("up@t=5")[[6, 0, 1, 6]])
    assert [stop - start for start, stop in asked] == [48, 24]
    assert torch.equal(unit.tensor("up@t=5"), whole.tensor("up@t=5"))
    with pytest.raises(StoreError, match="in place of"):
        load_unit(place, tensor_name(0), size + 1)
