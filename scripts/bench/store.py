"""What writing and reading a feature store costs, beside plain files and other formats.

    python scripts/bench/store.py [--rounds 15] [--others 3] [--folder DIR] [--json FILE]

The same fp16 features go through every format: vectors (20,000 x 1,024), in units of 1,000 and of 10,000, and maps
(1,000 x 256 x 16 x 16). All take turns within each round and medians are printed, so that a busy machine disturbs all
alike. The page cache is warm; what is written is removed between the calls, outside of the timing.

- Writing is compared with `safetensors.torch.save_file` of the same tensors, in as many files as the store has units.
  A store's units are written with their JSON and checksum. "no fsync" turns `os.fsync` off in this script alone, as
  `save_file` does not call it; in the rows with fsync each file is synced, and a store's folders too.
- Sequential reading copies everything once, as tensors, in blocks of 256 vectors or 32 maps. A random batch is 256
  vectors or 32 maps in ascending order, ten of them a round. Both are compared with one mapped numpy file.

WebDataset, zarr, Parquet and Lance are measured where they are installed; the script says which are missing.
"""

import argparse
import os
import shutil
import tempfile
from contextlib import contextmanager, nullcontext
from functools import partial
from importlib.util import find_spec
from itertools import cycle
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from timing import median_times, write_json

from diffrep import FeatureStore
from diffrep.store import StoreWriter
from diffrep.store.export import export_store

# Shape, samples of a batch, and samples of a unit.
CASES = {
    "vectors": ((20_000, 1024), 256, 1000),
    "vectors 10k": ((20_000, 1024), 256, 10_000),
    "maps": ((1_000, 256, 16, 16), 32, 1000),
}
BATCHES = 10
# Module, package to install, and what it is called here.
OTHERS = {
    "Parquet": ("pyarrow", "pyarrow"),
    "Lance": ("lance", "pylance"),
    "zarr": ("zarr", "zarr"),
    "WebDataset": ("webdataset", "webdataset"),
}


@contextmanager
def without_fsync():
    """Makes `os.fsync` do nothing."""
    real, os.fsync = os.fsync, lambda _: None
    try:
        yield
    finally:
        os.fsync = real


def fsync(path):
    """Waits until a file is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


class Plain:
    """`save_file`, a file for each unit; read back as one mapped numpy file, the yardstick of reading."""

    def __init__(self, folder, features, unit, sync=False):
        self.folder, self.features, self.unit, self.sync = folder, features, unit, sync

    def write(self):
        """Writes all features."""
        for start in range(0, len(self.features), self.unit):
            part = self.features[start : start + self.unit]
            file = self.folder / f"{start}.safetensors"
            save_file({"x@t=0": part, "row": torch.arange(start, start + len(part))}, file)
            if self.sync:
                fsync(file)

    def open(self):
        """Gets ready to read."""
        np.save(self.folder / "x.npy", self.features.numpy())
        self.mapped = np.load(self.folder / "x.npy", mmap_mode="r")

    def block(self, start, stop):
        """Returns consecutive samples."""
        return torch.from_numpy(self.mapped[start:stop].copy())

    def take(self, rows):
        """Returns some samples."""
        return torch.from_numpy(self.mapped[rows])


class Ours:
    """A store of one layer and level."""

    def __init__(self, folder, features, unit, sync=False):
        self.folder, self.features, self.sync = folder / "store", features, sync
        self.rows = list(range(len(features)))
        self.ids = [f"class/{row:08d}.jpg" for row in self.rows]
        self.meta = {
            "layers": {"x": {"shape": list(features.shape[1:]), "cost": 1.0}},
            "levels": [["0", "t=0", 0, 1.0, 0.0]],
            "splits": {"all": [0, len(features)]},
            "classes": None,
            "unit_size": unit,
        }

    def begin(self):
        """Makes the empty store."""
        with without_fsync():
            self.writer = StoreWriter(self.folder, self.meta)

    def write(self):
        """Writes all units."""
        with nullcontext() if self.sync else without_fsync():
            for unit in self.writer.units:
                part = slice(unit.rows.start, unit.rows.stop)
                self.writer.write(unit, {"x@t=0": self.features[part]}, self.ids[part], self.rows[part], None, [])

    def open(self):
        """Gets ready to read."""
        self.begin()
        self.write()
        self.writer.finish()
        self.store = FeatureStore(self.folder)

    def block(self, start, stop):
        """Returns consecutive samples."""
        return self.store.take("x", 0, np.arange(start, stop))

    def take(self, rows):
        """Returns some samples."""
        return self.store.take("x", 0, rows)


class Exported:
    """What `export_store` makes of a store."""

    def __init__(self, folder, features, unit, to):
        kept = folder.parent.with_name("kept") / to
        kept.mkdir(parents=True)
        self.to, self.ours = to, Ours(kept, features, unit)
        self.shape, self.out = features.shape[1:], folder / to
        self.ours.open()

    def write(self):
        """Exports the store."""
        export_store(self.ours.store, self.out, self.to)

    def tensor(self, column):
        """Returns the tensor of a column."""
        flat = column.combine_chunks().flatten().to_numpy(zero_copy_only=False)
        return torch.from_numpy(flat.copy()).unflatten(0, (-1, *self.shape))


class Parquet(Exported):
    """Read by row groups: Parquet finds no row by its number."""

    def __init__(self, folder, features, unit):
        super().__init__(folder, features, unit, "parquet")

    def open(self):
        """Gets ready to read."""
        import pyarrow.parquet

        self.write()
        (name,) = (self.out / "data").iterdir()
        self.file = pyarrow.parquet.ParquetFile(name)
        counts = [self.file.metadata.row_group(group).num_rows for group in range(self.file.num_row_groups)]
        self.ends = np.cumsum(counts)

    def whole(self):
        """Reads everything."""
        for group in range(self.file.num_row_groups):
            self.tensor(self.file.read_row_group(group, ["x@t=0"])["x@t=0"])

    def take(self, rows):
        """Returns some samples."""
        groups = np.searchsorted(self.ends, rows, side="right")
        parts = []
        for group in np.unique(groups):
            start = self.ends[group - 1] if group else 0
            table = self.file.read_row_group(int(group), ["x@t=0"])
            parts.append(self.tensor(table.take(rows[groups == group] - start)["x@t=0"]))
        return torch.cat(parts)


class Lance(Exported):
    """Read by the library's own calls."""

    def __init__(self, folder, features, unit):
        super().__init__(folder, features, unit, "lance")

    def open(self):
        """Gets ready to read."""
        import lance

        self.write()
        self.data = lance.dataset(str(self.out))

    def whole(self):
        """Reads everything."""
        for batch in self.data.to_batches(columns=["x@t=0"]):
            flat = batch["x@t=0"].flatten().to_numpy(zero_copy_only=False)
            torch.from_numpy(flat.copy()).unflatten(0, (-1, *self.shape))

    def take(self, rows):
        """Returns some samples."""
        return self.tensor(self.data.take(rows, columns=["x@t=0"])["x@t=0"])


class Zarr:
    """Chunks of a megabyte in shards, not compressed."""

    def __init__(self, folder, features, unit):
        self.folder, self.features = folder / "zarr", features

    def write(self):
        """Writes all features."""
        import zarr

        sample = self.features[0].numel() * 2
        chunk = max(1, (1 << 20) // sample)
        trailing = tuple(self.features.shape[1:])
        self.array = zarr.create_array(
            store=self.folder,
            shape=tuple(self.features.shape),
            dtype="float16",
            chunks=(chunk, *trailing),
            shards=(chunk * 32, *trailing),
            compressors=None,
        )
        self.array[:] = self.features.numpy()

    def open(self):
        """Gets ready to read."""
        self.write()

    def block(self, start, stop):
        """Returns consecutive samples."""
        return torch.from_numpy(self.array[start:stop])

    def take(self, rows):
        """Returns some samples."""
        return torch.from_numpy(self.array.oindex[rows])


class WebDataset:
    """One `.npy` a sample in tars of a unit each; no random rows."""

    take = None

    def __init__(self, folder, features, unit):
        self.folder, self.features, self.unit = folder, features, unit

    def write(self):
        """Writes all features."""
        import webdataset

        samples = self.features.numpy()
        for start in range(0, len(samples), self.unit):
            with webdataset.TarWriter(str(self.folder / f"{start:06d}.tar")) as tar:
                for row in range(start, min(start + self.unit, len(samples))):
                    tar.write({"__key__": f"{row:08d}", "x.npy": samples[row]})

    def open(self):
        """Gets ready to read."""
        self.write()
        self.tars = sorted(map(str, self.folder.glob("*.tar")))

    def whole(self):
        """Reads everything."""
        import webdataset

        for sample in webdataset.WebDataset(self.tars, shardshuffle=False).decode():
            torch.from_numpy(sample["x.npy"])


FORMATS = {"Parquet": Parquet, "Lance": Lance, "zarr": Zarr, "WebDataset": WebDataset}


def sequential(form, count, size):
    """Returns the call that reads everything."""
    if hasattr(form, "whole"):
        return form.whole
    return lambda: [form.block(start, min(start + size, count)) for start in range(0, count, size)]


def measure_writing(forms, rounds, folder):
    """Returns the median seconds of writing; nothing of it stays."""

    def clear():
        for one in folder.iterdir():
            shutil.rmtree(one)
            one.mkdir()
        for form in forms.values():
            if hasattr(form, "begin"):
                form.begin()

    seconds = median_times(rounds, {name: form.write for name, form in forms.items()}, warmups=1, before=clear)
    clear()
    return seconds


def measure_reading(forms, rounds, features, size):
    """Returns the median seconds of reading all, and of a random batch; checks what is read."""
    generator = np.random.default_rng(0)
    batches = [np.sort(generator.choice(len(features), size, replace=False)) for _ in range(BATCHES)]
    for name, form in forms.items():
        form.open()
        if form.take is not None:
            assert torch.equal(form.take(batches[0]), features[batches[0]]), name
    whole = {name: sequential(form, len(features), size) for name, form in forms.items()}
    some = {name: one_by_one(form.take, batches) for name, form in forms.items() if form.take}
    return median_times(rounds, whole, 1), median_times(rounds * BATCHES, some, 1)


def one_by_one(take, batches):
    """Returns a call that takes the next of some batches, over and over."""
    turns = cycle(batches)
    return lambda: take(next(turns))


def compare(case, kinds, rounds, options):
    """Returns a row for each format: MB/s, and ratios to the first of them."""
    shape, size, unit = CASES[case]
    torch.manual_seed(0)
    features = torch.randn(round(shape[0] * options.share), *shape[1:]).half()
    size, first = min(size, len(features)), next(iter(kinds))
    with tempfile.TemporaryDirectory(dir=options.folder) as root:
        folder, forms = Path(root) / "written", {}
        for name, kind in kinds.items():
            (folder / name).mkdir(parents=True)
            forms[name] = kind(folder / name, features, unit)
        written = measure_writing(forms, rounds, folder)
        whole, some = measure_reading(forms, rounds, features, size)
    megabytes = features.nbytes / 1e6
    batch = megabytes * size / len(features)
    rows = []
    for name in forms:
        row = {"case": case, "format": name}
        for key, seconds, amount in (
            ("write", written, megabytes),
            ("read", whole, megabytes),
            ("random", some, batch),
        ):
            if name in seconds:
                row[key] = amount / seconds[name]
                row[f"{key}_ratio"] = seconds[first] / seconds[name]
        rows.append(row)
    return rows


def show(row):
    """Prints a line of the table."""
    cells = "".join(
        f"{row[key]:9.0f} {row[f'{key}_ratio']:6.3f}" if key in row else f"{'-':>9} {'-':>6}"
        for key in ("write", "read", "random")
    )
    print(f"{row['case']:12} {row['format']:20}{cells}", flush=True)


def main():
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="rounds for the store and plain files")
    parser.add_argument("--others", type=int, default=3, help="rounds for other formats; 0 leaves them out")
    parser.add_argument("--share", type=float, default=1.0, help="take this share of the samples")
    parser.add_argument("--folder", help="where to write; default the system's temporary folder")
    parser.add_argument("--json", metavar="FILE", help="write the rows there")
    options = parser.parse_args()
    others = {name: find_spec(module) for name, (module, _) in OTHERS.items() if options.others}
    for name, found in others.items():
        if not found:
            print(f"{name} is not installed: pip install {OTHERS[name][1]}")
    print(f"medians of {options.rounds} rounds, of {options.others} for other formats; MB/s, and ratio to plain files")
    print(f"{'case':12} {'format':20}{'write':>9} {'':6}{'read':>9} {'':6}{'random':>9}")
    rows = []
    for case in CASES:
        plain = {"plain files": Plain, "store, no fsync": Ours}
        synced = {"plain files, fsync": partial(Plain, sync=True), "store, fsync": partial(Ours, sync=True)}
        beside = {"plain files": Plain} | {name: FORMATS[name] for name, found in others.items() if found}
        found = [row for kinds in (plain, synced) for row in compare(case, kinds, options.rounds, options)]
        if len(beside) > 1 and case != "vectors 10k":
            found += compare(case, beside, options.others, options)[1:]
        for row in found:
            show(row)
        rows += found
    write_json(options.json, "store", rows)


if __name__ == "__main__":
    main()
