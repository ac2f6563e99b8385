import io
import tarfile
import threading
import time

import numpy as np
import pytest
import torch
from fsspec import register_implementation
from fsspec.implementations.memory import MemoryFileSystem
from PIL import Image

from diffrep.config import DataConfig
from diffrep.data import open_data, shards
from diffrep.errors import ConfigError, DataError
from diffrep.extract.feed import ImageFeed
from diffrep.extract.stream import StreamFeed
from diffrep.store import list_units

COUNTS = (7, 4, 0, 1, 6)


def png(number, side=8):
    packed = io.BytesIO()
    Image.fromarray(np.random.default_rng(number).integers(0, 255, (side, side, 3), np.uint8)).save(packed, "PNG")
    return packed.getvalue()


def pack(path, members):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Shards of several sizes; two samples cannot be read."""
    folder, number = tmp_path_factory.mktemp("shards"), 0
    for shard, count in enumerate(COUNTS):
        members = []
        for _ in range(count):
            content = b"no image" if number in (3, 17) else png(number)
            members += [(f"{number:03d}.png", content), (f"{number:03d}.cls", b"%d" % (number % 4))]
            number += 1
        pack(folder / f"{shard:02d}.tar", members)
    return folder


@pytest.fixture
def images(folder):
    return open_data(DataConfig(path=folder, stream=True), 3)


def units_of(images):
    return list_units(images.splits, 1)


def threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("diffrep-")]


def test_the_batches_of_a_streamed_set_are_those_of_the_indexed_one(folder, images):
    indexed = open_data(DataConfig(path=folder), 3)
    feed = ImageFeed(indexed, 18)
    ((_, whole), _) = feed(list_units(indexed.splits, 18))
    for workers in (0, 3):
        found = list(StreamFeed(images, 3, workers, 1)(units_of(images)))
        ends = [unit.number for unit, batch in found if batch is None]
        assert ends == [0, 1, 2, 3, 4]
        assert [unit.number for unit, batch in found if batch] == [0, 0, 0, 1, 1, 3, 4, 4]
        batches = [batch for _, batch in found if batch]
        assert torch.equal(torch.cat([batch.images for batch in batches if batch.images is not None]), whole.images)
        assert [label for batch in batches for label in batch.labels] == whole.labels
        assert [name.split("/")[1] for batch in batches for name in batch.ids] == whole.ids
        assert [row for batch in batches for row in batch.rows] == [0, 1, 2, 4, 5, 6, 0, 1, 2, 3, 0, 0, 1, 2, 3, 4]
        assert [problem for batch in batches for problem in batch.problems] == [
            (f"{name}", f"{name}: cannot read the image: not an image") for name in ("00/003", "04/017")
        ]
        assert [batch.samples for batch in batches] == [3, 3, 1, 3, 1, 1, 3, 3]
    assert not threads()


def test_images_of_several_sizes_have_no_tensor(tmp_path):
    pack(tmp_path / "a.tar", [("0.png", png(0)), ("1.png", png(1, 9))])
    images = open_data(DataConfig(path=tmp_path, stream=True), 3)
    ((_, batch), _) = StreamFeed(images, 2)(units_of(images))
    assert (batch.images, batch.sizes, batch.labels) == (None, [(8, 8), (9, 9)], None)
    images = open_data(DataConfig(path=tmp_path, stream=True, size=8), 3)
    ((_, batch), _) = StreamFeed(images, 2)(units_of(images))
    assert batch.images.shape == (2, 3, 8, 8)


class Counting(MemoryFileSystem):
    """Storage that counts what is read, and stands still or fails where it is told to."""

    protocol = "counting"
    store, pseudo_dirs = {}, [""]
    opened: list[str] = []
    read = 0
    go_on = threading.Event()
    fails = False

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.replace("counting://", "memory://"))

    def _open(self, path, mode="rb", **options):
        if mode != "rb":
            return super()._open(path, mode, **options)
        if Counting.fails:
            raise TimeoutError("no answer")
        Counting.opened.append(path)
        return CountingFile(self.store[path].getvalue())


class CountingFile(io.BytesIO):
    def read(self, size=-1):
        if self.tell() > 40_000:
            Counting.go_on.wait(5)
        found = super().read(size)
        Counting.read += len(found)
        return found


@pytest.fixture
def counting(tmp_path, monkeypatch):
    """Three shards of fifty samples behind a storage that counts."""
    register_implementation("counting", Counting, clobber=True)
    monkeypatch.setattr(Counting, "opened", [])
    monkeypatch.setattr(Counting, "go_on", threading.Event())
    monkeypatch.setattr(Counting, "fails", False)
    system = Counting(skip_instance_cache=True)
    for shard in range(3):
        pack(tmp_path / "a.tar", [(f"{i:03d}.png", png(i, 32)) for i in range(50)])
        system.pipe_file(f"/set/{shard}.tar", (tmp_path / "a.tar").read_bytes())
    images = open_data(DataConfig(path="counting://set/{0..2}.tar"), 3)
    images.labelled  # noqa: B018  looks into a shard
    Counting.opened.clear()
    return images


def settled(value):
    """Waits until a value stands still, and returns it."""
    last, until = value(), time.monotonic() + 5
    while time.monotonic() < until:
        time.sleep(0.05)
        if value() == last:
            return last
        last = value()
    raise AssertionError("it goes on and on")


@pytest.mark.parametrize("workers", [0, 2])
def test_it_reads_ahead_but_not_without_end(counting, monkeypatch, workers):
    Counting.go_on.set()
    monkeypatch.setattr(Counting, "read", 0)
    taken = []
    units = (taken.append(unit.number) or unit for unit in units_of(counting))
    batches = StreamFeed(counting, 5, workers, prefetch=2)(units)
    ahead = 10 * max(workers, 1)
    size = len(Counting.store["/set/0.tar"].getvalue()) / 50
    for _ in range(3):
        next(batches)
    read = settled(lambda: Counting.read) / size
    assert 15 + ahead <= read + 5 < 15 + ahead + 15, "three batches and those ahead, and what tarfile buffers"
    assert taken == [0, 1], "a unit more than is being read"
    for _ in range(7):
        next(batches)
    settled(lambda: Counting.read)
    assert Counting.opened == ["/set/0.tar", "/set/1.tar"], "the next shard is begun before the last one is through"
    assert next(batches)[1] is None
    assert sum(batch.samples for _, batch in batches if batch) == 100
    assert not threads()


def test_many_small_shards_are_read_ahead_together(tmp_path):
    for shard in range(30):
        pack(tmp_path / f"{shard:02d}.tar", [("0.png", png(shard))])
    images, taken = open_data(DataConfig(path=tmp_path, stream=True), 3), []
    units = (taken.append(unit.number) or unit for unit in units_of(images))
    batches = StreamFeed(images, 8, workers=4, prefetch=2)(units)
    for _ in range(12):
        next(batches)
        settled(lambda: len(threads()))
    assert 6 + 4 <= len(taken) <= 6 + 8 + 8
    assert sum(batch.samples for _, batch in batches if batch) == 24


@pytest.mark.parametrize("workers", [0, 2])
def test_closing_ends_the_threads(counting, workers):
    Counting.go_on.set()
    batches = StreamFeed(counting, 4, workers, 2)(units_of(counting))
    next(batches)
    assert threads()
    began = time.monotonic()
    batches.close()
    assert time.monotonic() - began < 1
    assert not threads()


def test_closing_while_the_storage_hangs(counting, monkeypatch):
    monkeypatch.setattr("diffrep.extract.stream.PATIENCE", 0.1)
    batches = StreamFeed(counting, 4, 1, 8)(units_of(counting))
    next(batches)
    settled(lambda: Counting.read)  # it has come to where the storage hangs
    began = time.monotonic()
    batches.close()
    assert time.monotonic() - began < 2
    (left,) = threads()
    Counting.go_on.set()
    left.join(5)
    assert not left.is_alive(), "it ends when the storage answers"


def test_errors_reach_the_consumer(tmp_path, counting, monkeypatch):
    pack(tmp_path / "b.tar", [("0.png", png(0)), ("0.json", b'{"kind": "cat"}')])
    images = open_data(DataConfig(path=tmp_path / "b.tar", stream=True, label_key="kind"), 3)
    with pytest.raises(ConfigError, match="labels of a streamed set are integers"):
        list(StreamFeed(images, 2, 1)(units_of(images)))

    def failing():
        yield from units_of(counting)
        raise ValueError("the list of units broke")

    Counting.go_on.set()
    with pytest.raises(ValueError, match="the list of units broke"):
        list(StreamFeed(counting, 20, 2)(failing()))
    monkeypatch.setattr(shards, "PAUSE", 0.001)
    Counting.fails = True
    with pytest.raises(DataError, match="0.tar: no answer; tried 3 times"):
        list(StreamFeed(counting, 20, 2)(units_of(counting)))
    assert not threads()


def test_a_damaged_shard_ends_with_a_problem(tmp_path):
    pack(tmp_path / "a.tar", [(f"{i}.png", png(i)) for i in range(4)])
    pack(tmp_path / "b.tar", [("0.png", png(0))])
    shard = tmp_path / "a.tar"
    images = open_data(DataConfig(path=tmp_path, stream=True), 3)
    shard.write_bytes(shard.read_bytes()[:2400])
    found = list(StreamFeed(images, 2, 1)(units_of(images)))
    assert [batch and (batch.rows, [name for name, _ in batch.problems]) for _, batch in found] == [
        ([0, 1], []),
        ([], ["a.tar"]),
        None,
        ([0], []),
        None,
    ]


@pytest.mark.gpu
def test_pinned_batches(images):
    (_, batch), *_ = StreamFeed(images, 3, 2, pin=True)(units_of(images))
    assert batch.images.is_pinned()
