import io
import json
import os
import pickle
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from fsspec import register_implementation
from fsspec.implementations.memory import MemoryFileSystem
from PIL import Image

from diffrep.config import DataConfig
from diffrep.data import ShardSet, Transform, open_images, shards
from diffrep.errors import BackendUnavailable, ConfigError, DataError, UnknownNameError


def names(samples):
    return [sample.id for sample in samples]


def values(images, samples):
    return [round(images.image(sample.content).mean().item() * 255) for sample in samples]


@pytest.fixture
def folder(tmp_path, write):
    """Two training shards and a test shard, keys that repeat."""
    for shard, first in (("train-000", 0), ("train-001", 3), ("test-000", 6)):
        members = []
        for i in range(first, first + 3):
            members += [(f"{i % 3:04d}.png", 10 * i), (f"{i % 3:04d}.cls", str(i % 2)), (f"{i % 3:04d}.txt", "words")]
        write(tmp_path / "set" / f"{shard}.tar", members)
    return tmp_path / "set"


@pytest.fixture
def parquet(tmp_path, png):
    """Writes parquet files of an HF set, five rows in row groups of two."""
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {"note": datasets.Value("string"), "img": datasets.Image(), "fine": datasets.ClassLabel(names=["cat", "dog"])}
    )

    def write(name, first=0, images=None, features=features, **columns):
        images = images or [{"bytes": png(10 * (first + i)), "path": f"{i}.png"} for i in range(5)]
        rows = {"note": ["x"] * len(images), "img": images, "fine": [0, 1, 0, 1, 1][: len(images)]} | columns
        (tmp_path / "hf").mkdir(exist_ok=True)
        rows = datasets.Dataset.from_dict({key: rows[key] for key in features}, features=features)
        rows.to_parquet(tmp_path / "hf" / name, batch_size=2)
        return tmp_path / "hf"

    return write


def test_shards(folder, open_set):
    images = open_set(folder, stream=True)
    assert isinstance(images, ShardSet)
    assert images.splits == {"train": range(0, 2), "test": range(2, 3)}
    assert images.shards == ["train-000.tar", "train-001.tar", "test-000.tar"]
    samples = [list(images.samples(i)) for i in range(3)]
    assert names(samples[1]) == ["train-001/0000", "train-001/0001", "train-001/0002"]
    assert [sample.label for sample in samples[0] + samples[2]] == [0, 1, 0, 0, 1, 0]
    assert [values(images, part) for part in samples] == [[0, 10, 20], [30, 40, 50], [60, 70, 80]]
    assert (images.labelled, images.multilabel, images.classes) == (True, False, None)
    assert open_set(folder, stream=True, splits="test").splits == {"test": range(0, 1)}
    with pytest.raises(UnknownNameError, match="unknown split 'val'"):
        open_set(folder, stream=True, splits="val")
    copy = pickle.loads(pickle.dumps(images))
    assert names(copy.samples(2)) == names(samples[2])


def test_ids_and_fingerprint_do_not_depend_on_the_place(folder, tmp_path, open_set):
    images = open_set(folder, stream=True)
    same = [open_set(f"{folder}/{{test,train}}-*.tar", stream=True), open_set(f"{folder}/*.tar", stream=True)]
    same += [open_set(f"{folder}/{{train-001,train-000,test-000}}.tar", stream=True)]
    folder.rename(tmp_path / "moved")
    same += [open_set(tmp_path / "moved", stream=True)]
    for other in same:
        assert other.fingerprint() == images.fingerprint()
        assert (other.shards, other.splits) == (images.shards, images.splits)
    shard = tmp_path / "moved" / "train-000.tar"
    shard.write_bytes(shard.read_bytes() + bytes(512))
    assert open_set(tmp_path / "moved", stream=True).fingerprint() != images.fingerprint()
    assert open_set(tmp_path / "moved", stream=True, image_key="png").fingerprint() != images.fingerprint()


def test_patterns_of_a_remote_set_list_nothing(folder, open_set, monkeypatch):
    monkeypatch.setattr(MemoryFileSystem, "store", {})
    system = MemoryFileSystem()
    for file in folder.iterdir():
        system.pipe_file(f"/set/{file.name}", file.read_bytes())
    listed = open_set("memory://set", kind="webdataset")
    assert listed.fingerprint() == open_set(folder, stream=True).fingerprint()
    assert open_set("memory://set/t*.tar").fingerprint() == listed.fingerprint()
    monkeypatch.setattr(MemoryFileSystem, "ls", None)  # anything that lists would call it
    images = open_set("memory://set/train-{000..002}.tar")
    assert images.shards == ["train-000.tar", "train-001.tar", "train-002.tar"]
    assert values(images, images.samples(1)) == [30, 40, 50]
    assert [s.problem for s in images.samples(2)] == ["train-002.tar: the shard is missing: /set/train-002.tar"]


def test_what_cannot_be_streamed(folder, tmp_path, open_set, image_folder):
    for options, error, message in (
        ({"limit": 3}, ConfigError, "data.limit counts samples"),
        ({"kind": "csv"}, ConfigError, "data.kind=csv cannot be streamed; webdataset and hf can"),
        ({"kind": "hf"}, DataError, "no .parquet file in"),
        ({"label_key": ["a", "b"]}, ConfigError, "one key of their .json"),
    ):
        with pytest.raises(error, match=message):
            open_set(folder, stream=True, **options)
    with pytest.raises(DataError, match=r"no .tar or .parquet file in"):
        open_set(image_folder, stream=True)
    with pytest.raises(DataError, match="there is no shard .*train-002.tar"):
        open_set(folder / "train-{000..002}.tar", stream=True)
    with pytest.raises(DataError, match="streamed as 'hf://datasets/OWNER/NAME'"):
        open_set("owner/name", stream=True, kind="hf")
    (folder / "train-002.parquet").write_bytes(b"")
    with pytest.raises(ConfigError, match="both kinds of shards; set data.kind"):
        open_set(folder, stream=True)
    with pytest.raises(ConfigError, match="Protocol not known"):
        open_set("nonsense://a/b.tar")
    with pytest.raises(BackendUnavailable, match="dropbox"):
        open_set("dropbox://a/b.tar")
    for path, stream in ((folder, True), ("memory://set", False)):
        with pytest.raises(ConfigError, match="is streamed, which 'diffrep extract' can do"):
            open_images(DataConfig(path=path, stream=stream), 3)


@pytest.mark.parametrize(
    ("members", "problem"),
    [
        ([("b.cls", "0")], "set/b: the sample has no image; it holds .cls"),
        ([("b.png", 1)], "set/b: the sample has no label, and the first of its split has one"),
        ([("b.png", 1), ("b.cls", "cat")], "set/b: the label: .cls holds b'cat', no integer"),
        ([("b.png", 1), ("b.cls", "-1")], "set/b: label -1 is not usable"),
        ([("b.png", 1), ("b.cls", "9" * 30)], "set/b: the label: a label of more than 64 bits"),
        ([("b.png", 1), ("b.PNG", 1), ("b.cls", "0")], "set/b: has two parts .png"),
        ([("b.png", 1), ("b.x.png", 1), ("b.cls", "0")], r"set/b: the sample has several images, \['png', 'x.png'\]"),
        ([("a.json", "{}")], "set/a#2: the key came before; the parts of a sample must lie together"),
    ],
)
def test_bad_samples_are_problems(tmp_path, write, open_set, members, problem):
    good = [("a.png", 1), ("a.cls", "0")], [("z.png", 2), ("z.cls", "1")], [("c.png", 3), ("c.cls", "1")]
    path = write(tmp_path / "set.tar", [*good[0], *good[1], *members, *good[2]])
    images = open_set(path, stream=True)
    samples = list(images.samples(0))
    assert [sample.id for sample in samples if sample.problem is None] == ["set/a", "set/z", "set/c"]
    assert len(samples) == 4
    with pytest.raises(DataError, match=problem):
        raise DataError(samples[2].problem)


def test_labels(tmp_path, write, open_set):
    records = [{"n": 4, "name": "dog", "tags": [1]}, {"n": 2, "name": "cat", "tags": [2]}, {"name": "cat"}]
    members = [(f"{i}.{kind}", content) for i, r in enumerate(records) for kind, content in (("json", json.dumps(r)),)]
    members = [part for i, member in enumerate(members) for part in (member, (f"{i}.jpeg", 7))]
    path = write(tmp_path / "set.tar", members)
    images = open_set(path, stream=True, label_key="n")
    assert [sample.label for sample in images.samples(0)] == [4, 2, None]
    assert next(s.problem for s in images.samples(0) if s.problem) == (
        "set/2: the label: its .json has no 'n'; it holds the keys ['name']"
    )
    for key in ("name", "tags"):
        with pytest.raises(ConfigError, match="labels of a streamed set are integers"):
            list(open_set(path, stream=True, label_key=key).samples(0))
    assert [sample.label for sample in open_set(path, stream=True).samples(0)] == [None] * 3
    # Labels count where every split has them, as of an indexed set.
    write(tmp_path / "two" / "train-0.tar", [("a.png", 1), ("a.cls", "5")])
    write(tmp_path / "two" / "test-0.tar", [("a.png", 1)])
    both = open_set(tmp_path / "two", stream=True)
    assert not both.labelled
    assert [s.label for i in range(2) for s in both.samples(i)] == [None, None]
    assert next(open_set(tmp_path / "two", stream=True, splits="train").samples(0)).label == 5


def test_damaged_shards_give_what_lies_before(folder, open_set):
    shard = folder / "train-000.tar"
    whole = shard.read_bytes()
    images = open_set(folder, stream=True)
    # Each sample is a png, a cls and a txt: six blocks. Cut in the third one's image, its header, and before it.
    for content, good in ((whole[: 512 * 13 + 20], 2), (whole[: 512 * 12 + 99], 2), (whole[: 512 * 12], 2)):
        shard.write_bytes(content)
        samples = list(images.samples(0))
        assert names(samples) == [f"train-000/000{i}" for i in range(good)] + ["train-000.tar"]
        assert samples[-1].problem.startswith("train-000.tar: the shard ")
    shard.write_bytes(whole[: 512 * 6] + b"x" * 512 + whole[512 * 7 :])
    assert names(images.samples(0)) == ["train-000/0000", "train-000.tar"]
    for content in (b"", b"no tar at all" * 100, bytes(10)):
        shard.write_bytes(content)
        assert [s.problem is None for s in images.samples(0)] == [False]
    shard.unlink()  # it was listed, so the disk may be gone, and all other shards with it
    with pytest.raises(shards.StorageError, match="train-000.tar'; it was there when the set was opened; tried 3"):
        next(images.samples(0, pause=lambda seconds: None))


class Flaky(MemoryFileSystem):
    """Storage that fails in the midst of a file, as often as `failures` says."""

    protocol = "flaky"
    store, pseudo_dirs = {}, [""]
    failures, denied = 0, False

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.replace("flaky://", "memory://"))

    def _open(self, path, mode="rb", **options):
        if self.denied:
            raise PermissionError("the credentials have run out")
        return FlakyFile(self, path) if mode == "rb" else super()._open(path, mode, **options)


class FlakyFile(io.BytesIO):
    def __init__(self, system, path):
        super().__init__(system.store[path].getvalue())

    def read(self, size=-1):
        if self.tell() > 9000 and Flaky.failures > 0:
            Flaky.failures -= 1
            raise TimeoutError("the storage did not answer")
        return super().read(size)


@pytest.fixture
def flaky(monkeypatch):
    register_implementation("flaky", Flaky, clobber=True)
    monkeypatch.setattr(shards, "PAUSE", 0.001)
    monkeypatch.setattr(Flaky, "failures", 0)
    monkeypatch.setattr(Flaky, "denied", False)
    return Flaky(skip_instance_cache=True)


def test_a_storage_that_fails_is_asked_again(flaky, tmp_path, write, parquet, open_set):
    write(tmp_path / "a.tar", [(f"{i:03d}.png", i) for i in range(100)])
    noise = [{"bytes": np.random.default_rng(i).bytes(4000), "path": None} for i in range(5)]
    flaky.pipe_file("/a.tar", (tmp_path / "a.tar").read_bytes())
    flaky.pipe_file("/a.parquet", (parquet("a.parquet", images=noise) / "a.parquet").read_bytes())
    for name, count in (("a.tar", 100), ("a.parquet", 5)):
        images = open_set(f"flaky://{name}")
        expected = list(images.samples(0))
        assert len(expected) == count
        Flaky.failures = 2
        assert list(images.samples(0)) == expected
        assert Flaky.failures == 0
        Flaky.failures, found = 3, []
        with pytest.raises(DataError, match="cannot read the shard flaky:///?a.* did not answer; tried 3 times"):
            found.extend(images.samples(0))
        assert found == expected[: len(found)], "what came before counts, and no sample is called unreadable"
        Flaky.failures = 0
    Flaky.denied = True
    with pytest.raises(DataError, match="credentials have run out; tried 3 times"):
        list(images.samples(0))


def test_parquet(parquet, open_set):
    parquet("train-00000-of-00002.parquet")
    parquet("train-00001-of-00002.parquet", 5)
    folder = parquet("test-00000-of-00001.parquet", 10)
    images, indexed = open_set(folder, stream=True), open_set(folder)
    assert images.splits == {"train": range(0, 2), "test": range(2, 3)}
    samples = [sample for i in range(3) for sample in images.samples(i)]
    assert samples[5].id == "train-00001-of-00002.parquet#0"
    assert (images.classes, images.labelled) == (["cat", "dog"], True)
    assert [sample.label for sample in samples] == [indexed.label(i) for i in range(15)]
    assert all(torch.equal(images.image(sample.content), indexed[i]) for i, sample in enumerate(samples))
    assert next(open_set(folder, stream=True, image_key="img").samples(0)).id == samples[0].id
    with pytest.raises(DataError, match="no image column image"):
        open_set(folder, stream=True, image_key="image").classes  # noqa: B018
    with pytest.raises(UnknownNameError, match="unknown label column 'lable'"):
        open_set(folder, stream=True, label_key="lable").classes  # noqa: B018
    with pytest.raises(ConfigError, match="column 'note' holds string; labels of a streamed set are integers"):
        open_set(folder, stream=True, label_key="note").classes  # noqa: B018


def test_several_label_columns(parquet, open_set):
    datasets = pytest.importorskip("datasets")
    kinds = {"img": datasets.Image(), "wet": datasets.Value("int8"), "big": datasets.Value("bool")}
    columns = {"wet": [0, 1, None, 2, 1], "big": [True, False, True, True, True]}
    folder = parquet("train.parquet", features=datasets.Features(kinds), **columns)
    images = open_set(folder, stream=True, label_key="wet,big")
    samples = list(images.samples(0))
    assert [s.label for s in samples] == [[0, 1], [1, 0], None, None, [1, 1]]
    assert (images.multilabel, images.classes) == (True, ["wet", "big"])
    assert "has no label" in samples[2].problem
    assert "several label columns hold 0 or 1" in samples[3].problem


def test_bad_parquet(parquet, open_set, tmp_path, png):
    datasets = pytest.importorskip("datasets")
    secret = tmp_path / "secret.png"
    secret.write_bytes(png(99))
    rows = [{"bytes": png(1), "path": None}, {"bytes": None, "path": str(secret)}, None]
    folder = parquet("a.parquet", images=rows)
    images = open_set(folder, stream=True)
    samples = list(images.samples(0))
    assert [s.problem is None for s in samples] == [True, False, False]
    assert samples[1].problem == "a.parquet#1: the row holds no image; paths to other files are not followed"
    with pytest.raises(DataError, match="all:1|train:1.*paths to other files are not followed"):
        open_set(folder)[1]
    parquet(
        "b.parquet",
        features=datasets.Features({"img": datasets.Image(), "other": datasets.Value("int8")}),
        other=[1] * 5,
    )
    (folder / "c.parquet").write_bytes(b"PAR1 no parquet PAR1")
    images = open_set(folder, stream=True)
    assert "has other columns than the first" in next(images.samples(1)).problem
    assert next(images.samples(2)).problem.startswith("c.parquet: the shard cannot be read")
    whole = (folder / "a.parquet").read_bytes()
    (folder / "a.parquet").write_bytes(whole[:60] + bytes(40) + whole[100:])
    assert list(images.samples(0))[-1].id == "a.parquet"


def test_images_stand_upright_where_hf_does_so(parquet, open_set):
    packed, exif = io.BytesIO(), Image.Exif()
    exif[274] = 6
    Image.fromarray(np.arange(32, dtype=np.uint8).reshape(4, 8)).save(packed, "PNG", exif=exif)
    folder = parquet("a.parquet", images=[{"bytes": packed.getvalue(), "path": None}])
    images = open_set(folder, stream=True)
    image = images.image(next(images.samples(0)).content)
    assert image.shape == (1, 8, 4)
    assert torch.equal(image, open_set(folder)[0])
    assert Transform(1)(Image.open(packed)).shape == (1, 4, 8)


def test_closing_a_shard_early_closes_its_file(folder, open_set):
    images = open_set(folder, stream=True)
    images.labelled  # noqa: B018  looks into shards
    before = len(os.listdir("/proc/self/fd"))
    samples = images.samples(0)
    next(samples)
    assert len(os.listdir("/proc/self/fd")) == before + 1
    samples.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_web_server_without_ranges(tmp_path, write, open_set, monkeypatch):
    pytest.importorskip("aiohttp")
    monkeypatch.setattr(shards, "PAUSE", 0.001)
    # Files of more than a block are asked for in several requests, which this server does not know.
    write(tmp_path / "0.tar", [("a.png", 1), ("a.bin", "x" * 6_000_000), ("b.png", 2)])
    handler = partial(SimpleHTTPRequestHandler, directory=tmp_path)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        images = open_set(f"http://127.0.0.1:{server.server_port}/{{0..1}}.tar")
        samples = list(images.samples(0))
        assert names(samples) == ["0/a", "0/b"]
        assert values(images, samples) == [1, 2]
        assert "the shard is missing" in next(images.samples(1)).problem
        server.shutdown()
