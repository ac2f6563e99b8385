"""Stores with damaged or forged files: each is read as it was, or refused with a StoreError.

fuzz(seed, cases) returns how many there were of each outcome, and raises AssertionError with the case that went wrong.
"""

import json
import os
import random
import struct
import tempfile
from collections import Counter
from pathlib import Path

import fsspec
import numpy as np
import torch

from diffrep.errors import StoreError
from diffrep.store import FeatureStore, StoreWriter
from diffrep.store.check import verify
from diffrep.store.layout import checksum

META = {
    "layers": {"mid": {"shape": [2], "cost": 0.5}, "up": {"shape": [1, 2], "cost": 1.0}},
    "levels": [["5", "t=5", 5, 0.9, 0.4], ["clean", "clean", 0, 1.0, 0.0]],
    "splits": {"train": [0, 5], "test": [5, 8]},
    "classes": ["a", "b"],
    "aliases": {"m": "mid"},
    "unit_size": 3,
}
NAMES = ["", "../../x", "/etc/passwd", "\ud800"]
HOSTILE = [*NAMES, -1, 0, 1, 2**31, 2**63, 10**30, 1e400, -0.5, float("nan"), True, None, [], {}, [[]], [0, 2**62]]
HOSTILE += ["xxh3-128:" + "0" * 32, "xxh3-128:" + "é" * 32, [[-3, 5]], "shard", ["a"] * 50]


def make_store(target):
    """Makes a store of 8 samples, of which one was skipped, in 3 units."""
    writer = StoreWriter(target, META)
    for unit in writer.missing():
        rows = [row for row in unit.rows if row != 6]
        values = torch.tensor(rows).half()[:, None] + torch.arange(2).half()
        tensors = {f"{la}@{le}": values for la in ("mid",) for le in ("t=5", "clean")}
        tensors |= {f"up@{le}": values[:, None] * 2 for le in ("t=5", "clean")}
        skipped = [{"id": "id6", "reason": "broken"}] if 6 in unit.rows else []
        writer.write(unit, tensors, [f"id{row}" for row in rows], rows, [row % 2 for row in rows], skipped)
    writer.finish()


def read_all(target):
    """Returns all that a store tells."""
    store = FeatureStore(target)
    rows = np.arange(len(store))[::-1]
    found = {"ids": store.ids, "labels": None if store.labels is None else store.labels.tolist()}
    found |= {"classes": store.classes, "splits": {split: store.rows(split).tolist() for split in store.splits}}
    found["levels"] = {key: (level.time, level.signal, level.noise) for key, level in store.levels.items()}
    for layer in store.layers:
        for level in store.levels:
            found[layer, level] = store[layer, level].tolist()
            assert store.take(layer, level, rows).tolist() == found[layer, level][::-1]
    return found


class Files:
    """A store's files, in a folder or in memory, which can be changed and brought back."""

    def __init__(self, target):
        self.target = target
        self.fs, self.root = fsspec.core.url_to_fs(str(target))
        self.truth = {name[len(self.root) :].lstrip("/"): self.fs.cat_file(name) for name in self.fs.find(self.root)}
        self.changed = set()

    def put(self, name, content):
        self.changed.add(name)
        self.fs.pipe_file(f"{self.root}/{name}", content)

    def bring_back(self):
        for name in list(self.changed):
            path = Path(self.root, name)
            if isinstance(self.target, Path) and not (path.is_file() and not path.is_symlink()):
                path.rmdir() if path.is_dir() else path.unlink(missing_ok=True)
            self.put(name, self.truth[name])
        self.changed.clear()


def fuzz(seed, cases):
    chance, outcomes = random.Random(seed), Counter()
    # In memory: a disk takes longer for three files than a case does for all else.
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as folder:
        secret = Path(folder) / "secret"
        secret.write_bytes(b"x" * 300)
        places = [Files(make_at(Path(folder) / "store")), Files(make_at(f"memory://fuzz-{seed}/store"))]
        truth = read_all(places[0].target)
        for case in range(cases):
            files = places[chance.random() < 0.2]
            told = damage(chance, files, secret)
            try:
                outcomes[judge(files.target, truth, forged="forged" in told)] += 1
            except Exception as error:
                raise AssertionError(f"seed {seed}, case {case}: {told}") from error
            finally:
                files.bring_back()
        assert read_all(places[0].target) == truth == read_all(places[1].target)
        assert verify(places[0].target).clean
        assert verify(places[1].target).clean
        places[1].fs.rm(places[1].root, recursive=True)
    return outcomes


def make_at(target):
    make_store(target)
    return target


def judge(target, truth, forged):
    """Returns the outcome of reading; of a store whose checksums fit what was forged, anything but a crash will do."""
    try:
        found = read_all(target)
    except StoreError:
        return "refused"
    if found == truth:
        return "as it was"
    if forged:
        return "forged"
    try:
        clean = verify(target).clean
    except StoreError:
        clean = False
    assert not clean, f"another content was read, and verification finds nothing: {found}"
    return "found by verify"


def damage(chance, files, secret):
    name = chance.choice(sorted(files.truth.keys() - {"skipped.jsonl"}))
    content = files.truth[name]
    kinds = [cut_bytes, flip_bytes, insert_bytes]
    kinds += [change_json] * 5 if name.endswith(".json") else [change_header] * 5
    kind = chance.choice(kinds)
    if chance.random() < 0.05 and isinstance(files.target, Path):
        return replace_file(chance, files, name, secret)
    changed = kind(chance, content)
    files.put(name, changed)
    told = f"{kind.__name__} of {name}: {changed[:600]!r}"
    if chance.random() < 0.5:
        forge(files, name, changed)
        told += ", forged"
    return told


def replace_file(chance, files, name, secret):
    path = files.target / name
    path.unlink()
    files.changed.add(name)
    kind = chance.choice(["nothing", "a folder", "a link out", "a pipe"])
    if kind == "a folder":
        path.mkdir()
    elif kind == "a link out":
        path.symlink_to(secret)
    elif kind == "a pipe":
        os.mkfifo(path)
    return f"{kind} in place of {name}"


def cut_bytes(chance, content):
    start = chance.randrange(len(content))
    return content[:start] + content[start + chance.choice([1, 8, 40, 10**6]) :]


def flip_bytes(chance, content):
    changed = bytearray(content)
    for _ in range(chance.choice([1, 1, 2, 8])):
        changed[chance.randrange(len(changed))] ^= 1 << chance.randrange(8)
    return bytes(changed)


def insert_bytes(chance, content):
    start = chance.randrange(len(content))
    extra = chance.choice([b"\0", b"[" * 3000, b'"', b"9" * 5000, content[:50], chance.randbytes(20)])
    return content[:start] + extra + content[start:]


def change_json(chance, content):
    return json.dumps(change_value(chance, json.loads(content))).encode()


def change_value(chance, value):
    """Replaces, removes or doubles something in a JSON value."""
    if chance.random() < 0.1 or not isinstance(value, dict | list) or not value:
        return chance.choice(HOSTILE)
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    key, act = chance.choice(keys), chance.random()
    if act < 0.15:
        del value[key]
    elif act < 0.3 and isinstance(value, list):
        value.append(value[key])
    elif act < 0.3:
        value[chance.choice(NAMES)] = value.pop(key)
    else:
        value[key] = change_value(chance, value[key])
    return value


def change_header(chance, content):
    length = struct.unpack("<Q", content[:8])[0]
    header, data = content[8 : 8 + length], content[8 + length :]
    if chance.random() < 0.1:
        return struct.pack("<Q", chance.choice([0, 1, length - 1, length + 8, 2**40, 2**63])) + header + data
    header = change_json(chance, header)
    header += b" " * (-len(header) % chance.choice([1, 8]))
    return struct.pack("<Q", len(header)) + header + data


def forge(files, name, changed):
    """Makes the checksums fit what was changed, as somebody would who wants it to be read."""
    now = files.truth | {name: changed}

    def put(file, value):
        now[file] = json.dumps(value).encode()
        files.put(file, now[file])

    index, folder = json.loads(files.truth["index.json"]), json.loads(files.truth["units/0000/index.json"])
    if name.endswith(".safetensors"):
        info = name.replace(".safetensors", ".json")
        number = int(Path(name).stem)
        new = {"bytes": len(changed), "checksum": checksum(changed)}
        put(info, json.loads(now[info]) | new)
        for key, value in new.items():
            folder[key][number] = value
        put("units/0000/index.json", folder)
        index["bytes"] = index["folders"][0]["bytes"] = sum(folder["bytes"])
    if name != "index.json":
        index["folders"][0]["checksum"] = checksum(now["units/0000/index.json"])
        index["meta"] = checksum(now["meta.json"])
        put("index.json", index)
