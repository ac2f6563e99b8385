import json
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from diffrep import FeatureStore
from diffrep.errors import StoreError, UnknownNameError
from diffrep.store import StoreWriter, export
from diffrep.store.export import export_store
from diffrep.store.layout import tensor_file

SHAPES = {"mid": (3,), "up": (3, 2, 4)}
LEVELS = [["5", "t=5", 5, 0.9, 0.4], ["inversion 1/3", "inversion 1/3", 0, 1.0, 0.0]]
NAMES = [f"{layer}@{level[1]}" for layer in SHAPES for level in LEVELS]


def make_store(path, label=lambda row: row % 2, classes=("a", "b"), dtype=torch.float16):
    meta = {
        "layers": {name: {"shape": list(shape), "cost": 0.5} for name, shape in SHAPES.items()},
        "levels": LEVELS,
        "splits": {"train": [0, 5], "val 2": [5, 8]},
        "classes": classes and list(classes),
        "unit_size": 2,
    }
    writer = StoreWriter(path, meta)
    for unit in writer.missing():
        rows = list(unit.rows)
        tensors = {
            f"{layer}@{level[1]}": (torch.arange(len(rows) * np.prod(shape)) + 100 * rows[0] + i).view(-1, *shape)
            for layer, shape in SHAPES.items()
            for i, level in enumerate(LEVELS)
        }
        labels = None if label is None else [label(row) for row in rows]
        content = {name: tensor.to(dtype) for name, tensor in tensors.items()}
        writer.write(unit, content, [f"é/{row}\n" for row in rows], rows, labels, [])
    writer.finish()
    return FeatureStore(path)


def cut_last(path):
    """Damages the last unit of a store."""
    file = tensor_file(path, 4)
    file.write_bytes(file.read_bytes()[:100])


def check_table(table, store, rows):
    """Compares columns with what the store itself gives."""
    assert table["id"].to_pylist() == [store.ids[row] for row in rows]
    assert table["label"].to_pylist() == [store.labels[row] for row in rows]
    assert table["split"].to_pylist() == ["train" if row < 5 else "val 2" for row in rows]
    shapes = json.loads(table.schema.metadata[b"diffrep"])["shapes"]
    assert shapes == {f"{layer}@{level[1]}": list(shape) for layer, shape in SHAPES.items() for level in LEVELS}
    for name in NAMES:
        flat = table[name].combine_chunks()
        found = flat.flatten().to_numpy(zero_copy_only=False).reshape(len(rows), *shapes[name])
        assert np.array_equal(found, store.numpy(*name.split("@"))[rows])
        assert found.dtype == np.float16


def test_parquet_in_files_and_row_groups(tmp_path, monkeypatch):
    store = make_store(tmp_path / "store")
    # 108 bytes of features a sample: two make a row group, four a file.
    monkeypatch.setattr(export, "GROUP", 220)
    monkeypatch.setattr(export, "FILE", 440)
    out = export_store(store, tmp_path / "out", "parquet")
    files = sorted((out / "data").iterdir())
    assert [file.name for file in files] == [
        "train-00000-of-00002.parquet",
        "train-00001-of-00002.parquet",
        "val 2-00000-of-00001.parquet",
    ]
    assert [pq.ParquetFile(file).num_row_groups for file in files] == [2, 1, 2]
    table = pa.concat_tables(pq.read_table(file) for file in files)
    check_table(table, store, list(range(8)))
    assert json.loads(table.schema.metadata[b"diffrep"])["meta"] == store.meta
    assert [folder.name for folder in tmp_path.iterdir() if folder.name.startswith(".")] == []


def test_the_datasets_library_reads_parquet(tmp_path):
    import datasets

    store = make_store(tmp_path / "store")
    out = export_store(store, tmp_path / "out", "parquet", "up", 5, "train")
    for source in ({"path": "parquet", "data_dir": str(out)}, {"path": str(out)}):
        (rows,) = datasets.load_dataset(**source, cache_dir=str(tmp_path / "cache")).values()
        assert rows.split == "train"
        assert rows.features["label"].names == ["a", "b"]
        assert rows["id"][:] == store.ids[:5]
        found = rows.with_format("numpy")["up@t=5"][:].reshape(-1, *SHAPES["up"])
        assert np.array_equal(found, store.numpy("up", 5, "train"))


def test_lance(tmp_path):
    store = make_store(tmp_path / "store")
    broken = make_store(tmp_path / "broken").path
    cut_last(broken)
    # In a process of its own, which imports Lance: it warns in every process that forks, as other tests do.
    code = (
        "import sys; from diffrep.store.export import export_store; from diffrep.errors import StoreError\n"
        "import lance, pyarrow.parquet as pq\n"
        "store, broken, out, taken = sys.argv[1:]\n"
        "pq.write_table(lance.dataset(str(export_store(store, out, 'lance'))).take([1, 4, 6]), taken)\n"
        "try: export_store(broken, out + '2', 'lance')\n"
        "except StoreError as error: print(error)\n"
    )
    words = [str(store.path), str(broken), str(tmp_path / "out"), str(tmp_path / "taken")]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("cannot read") and "0000004.safetensors" in done.stdout
    check_table(pq.read_table(tmp_path / "taken"), store, [1, 4, 6])
    assert sorted(one.name for one in tmp_path.iterdir()) == ["broken", "out", "store", "taken"]


def test_numpy_arrays(tmp_path, monkeypatch):
    store = make_store(tmp_path / "store", lambda row: [row % 2, 1], dtype=torch.bfloat16)
    monkeypatch.setattr(export, "CHUNK", 50)
    out = export_store(store, tmp_path / "out", "npy")
    listing = json.loads((out / "export.json").read_text())
    assert listing["meta"] == store.meta
    assert listing["splits"]["val 2"]["features"]["up@inversion 1/3"] == "val 2/up@inversion 1%2F3.npy"
    for split, about in listing["splits"].items():
        rows = store.rows(split)
        assert about["samples"] == len(rows)
        assert json.loads((out / about["ids"]).read_text()) == [store.ids[row] for row in rows]
        assert np.array_equal(np.load(out / about["labels"]), store.labels[rows])
        for name, file in about["features"].items():
            found = np.load(out / file, mmap_mode="r")
            assert found.dtype == np.float32
            assert np.array_equal(found, store.numpy(*name.split("@"), split))


def test_a_part_without_labels(tmp_path):
    store = make_store(tmp_path / "store", label=None, dtype=torch.float8_e4m3fn)
    out = export_store(store, tmp_path / "npy", "npy", "mid", 5, "val 2")
    assert sorted(str(file.relative_to(out)) for file in out.rglob("*.*")) == [
        "export.json",
        "val 2/ids.json",
        "val 2/mid@t=5.npy",
    ]
    table = pq.read_table(export_store(store, tmp_path / "parquet", "parquet", "mid", 5))
    assert table.column_names == ["id", "split", "mid@t=5"]
    assert table.schema.field("mid@t=5").type == pa.list_(pa.float32(), 3)


def test_names_stay_inside(tmp_path):
    names = [export._file_name(name) for name in ("..", ".", "../../x", "a@t=5", "/etc/passwd", ".hidden")]
    assert names == ["%2E.", "%2E", "%2E.%2F..%2Fx", "a@t=5", "%2Fetc%2Fpasswd", "%2Ehidden"]


def test_nothing_is_left_of_an_export_that_fails(tmp_path):
    path = make_store(tmp_path / "store").path
    cut_last(path)
    for to in ("parquet", "npy"):
        with pytest.raises(StoreError, match="cannot read .*0000004.safetensors"):
            export_store(path, tmp_path / "out", to)
    assert [one.name for one in tmp_path.iterdir()] == ["store"]


def test_what_is_refused(tmp_path):
    store = make_store(tmp_path / "store")
    (tmp_path / "out").mkdir()
    with pytest.raises(StoreError, match="out exists; give another out"):
        export_store(store, tmp_path / "out", "npy")
    with pytest.raises(UnknownNameError, match="unknown format 'parket'; did you mean 'parquet'"):
        export_store(store, tmp_path / "new", "parket")
    with pytest.raises(UnknownNameError, match="unknown split 'test'"):
        export_store(store, tmp_path / "new", "npy", split="test")
    with pytest.raises(UnknownNameError, match="unknown layer 'mit'"):
        export_store(store, tmp_path / "new", "npy", "mit")
    with pytest.raises(StoreError, match="to a local folder, and out is 's3://bucket/x'"):
        export_store(store, "s3://bucket/x", "npy")
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot write .*Not a directory"):
        export_store(store, tmp_path / "file" / "new", "npy")


def test_without_the_packages(tmp_path):
    make_store(tmp_path / "store")
    code = (
        "import sys; sys.modules |= {'lance': None, 'pyarrow': None}\n"
        "from diffrep.store.export import export_store; from diffrep.errors import BackendUnavailable\n"
        "for to in ('lance', 'parquet'):\n"
        f"    try: export_store({str(tmp_path / 'store')!r}, {str(tmp_path / 'out')!r}, to)\n"
        "    except BackendUnavailable as error: print(error)\n"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert told == (
        "Lance needs the pylance package: pip install 'diffrep[lance]'\n"
        "Parquet needs the pyarrow package: pip install 'diffrep[datasets]'\n"
    )
    assert not (tmp_path / "out").exists()
