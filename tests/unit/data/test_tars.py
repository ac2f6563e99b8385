import json
import pickle
import re
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.utils.data import DataLoader

from diffrep.errors import ConfigError, DataError, UnknownNameError


@pytest.fixture
def shards(tmp_path, write):
    """Two training shards and a test shard, keys unique over all."""
    for shard, first in (("train-000", 0), ("train-001", 3), ("test-000", 6)):
        members = []
        for i in range(first, first + 3):
            members += [(f"{i:04d}.png", 10 * i), (f"{i:04d}.cls", str(i % 2) + "\n")]
        write(tmp_path / "shards" / f"{shard}.tar", members)
    return tmp_path / "shards"


def test_shards(shards, open_set):
    images = open_set(shards)
    assert {name: len(rows) for name, rows in images.splits.items()} == {"train": 6, "test": 3}
    assert [images.id(i) for i in (0, 3, 8)] == ["0000", "0003", "0008"]
    assert [images.label(i) for i in range(9)] == [0, 1, 0, 1, 0, 1, 0, 1, 0]
    assert [round(images[i].mean().item() * 255) for i in (8, 0, 4)] == [80, 0, 40]
    assert images.classes is None
    assert list(open_set(shards, splits="test").splits) == ["test"]
    with pytest.raises(UnknownNameError, match="unknown split 'val'"):
        open_set(shards, splits="val")


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_workers_and_threads_read_what_one_process_reads(shards, open_set, context):
    images = open_set(shards)
    alone = torch.stack([images[i] for i in range(9)])
    loader = DataLoader(images, batch_size=2, num_workers=2, multiprocessing_context=context)
    assert torch.equal(torch.cat(list(loader)), alone)
    copy = pickle.loads(pickle.dumps(images))
    assert [copy.id(i) for i in range(9)] == [images.id(i) for i in range(9)]
    assert copy.fingerprint() == images.fingerprint()
    order = [8, 0, 5, 2, 7, 1, 6, 3, 4] * 20
    with ThreadPoolExecutor(4) as pool:
        assert torch.equal(torch.stack(list(pool.map(images.__getitem__, order))), alone[order])


def test_one_shard_and_patterns(shards, open_set, image_folder):
    one = open_set(shards / "train-001.tar")
    assert list(one.splits) == ["train"]
    assert one.id(0) == "0003"
    assert len(open_set(shards / "train-{000..001}.tar")) == 6
    both = open_set(shards / "{train,test}-000.tar")
    assert [both.id(i) for i in range(6)] == ["0000", "0001", "0002", "0006", "0007", "0008"]
    with pytest.raises(DataError, match=r"no shard '.*train-002.tar'"):
        open_set(shards / "train-{000..002}.tar")
    with pytest.raises(DataError, match="cannot expand '{0-2}'"):
        open_set(shards / "train-{0-2}.tar")
    with pytest.raises(DataError, match="no .tar file"):
        open_set(image_folder, kind="webdataset")


def test_keys_that_come_in_two_shards_carry_the_shard(tmp_path, write, open_set):
    for shard in ("train/000", "val/000"):
        write(tmp_path / "set" / f"{shard}.tar", [("./dogs/a.b.png", 1), ("dogs/c.png", 2)])
    images = open_set(tmp_path / "set")
    assert list(images.splits) == ["train", "val"]
    ids = ["train/000/dogs/a", "train/000/dogs/c", "val/000/dogs/a", "val/000/dogs/c"]
    assert [images.id(i) for i in range(4)] == ids
    assert open_set(tmp_path / "set", splits="val").id(0) == "val/000/dogs/a", "ids do not depend on the splits read"
    assert not images.labelled


def test_splits_of_shard_names(tmp_path, write, open_set):
    for i, name in enumerate(("imagenet1k-validation-00", "imagenet1k-train-00", "imagenet1k-train-01")):
        write(tmp_path / "named" / f"{name}.tar", [(f"{i}.png", i)])
        write(tmp_path / "plain" / f"{i:02d}.tar", [(f"{i}.png", i)])
    named = open_set(tmp_path / "named")
    assert {name: len(rows) for name, rows in named.splits.items()} == {"train": 2, "validation": 1}
    assert list(open_set(tmp_path / "plain").splits) == ["all"]
    write(tmp_path / "named" / "extra.tar", [("x.png", 1)])
    with pytest.raises(DataError, match=r"shards \['extra.tar'\] name no split, and others name"):
        open_set(tmp_path / "named")


def test_labels_in_json(tmp_path, write, open_set):
    records = [{"kind": "dog", "id": 7, "tags": ["red"]}, {"kind": "cat", "id": 2, "tags": []}]
    records += [{"kind": "dog", "id": 0, "tags": ["red", "big"]}]
    for shard, rows in (("train-0", records[:2]), ("test-0", records[2:])):
        members = [(f"{shard}_{i}.json", json.dumps(row)) for i, row in enumerate(rows)]
        write(tmp_path / f"{shard}.tar", members + [(f"{shard}_{i}.JPG", 3) for i in range(len(rows))])
    named = open_set(tmp_path, label_key="kind")
    assert named.classes == ["cat", "dog"]
    assert [named.label(i) for i in range(3)] == [1, 0, 1]
    assert open_set(tmp_path, label_key="kind", splits="test").label(0) == 1, "numbered over all splits"
    numbered = open_set(tmp_path, label_key="id")
    assert (numbered.label(0), numbered.classes, numbered.multilabel) == (7, None, False)
    assert numbered.fingerprint() != named.fingerprint()
    tagged = open_set(tmp_path, label_key="tags")
    assert tagged.multilabel
    assert tagged.classes == ["big", "red"]
    assert [tagged.label(i) for i in range(3)] == [[0, 1], [0, 0], [1, 1]]
    with pytest.raises(DataError, match=r"sample 'test-0_0' .*: its .json has no 'sort'; it holds the keys"):
        open_set(tmp_path, label_key="sort")
    with pytest.raises(ConfigError, match="one key of their .json"):
        open_set(tmp_path, label_key=["kind", "id"])


def test_several_images_in_a_sample(tmp_path, write, open_set):
    path = write(tmp_path / "a.tar", [("1.png", 5), ("1.mask.png", 50), ("2.png", 6), ("2.mask.png", 60)])
    with pytest.raises(DataError, match=r"sample '1' .* has several images, \['png', 'mask.png'\]; choose one"):
        open_set(path)
    assert round(open_set(path, image_key="mask.png")[1].mean().item() * 255) == 60
    with pytest.raises(DataError, match=r"has no .jpg; it holds .png, .mask.png"):
        open_set(path, image_key="jpg")


def test_other_members_are_passed_over(tmp_path, write, open_set):
    path = write(tmp_path / "a.tar", [("__meta__.json", "{}"), ("._1.png", "mac"), ("README", "hi"), ("1.png", 5)])
    assert [open_set(path).id(i) for i in range(1)] == ["1"]
    assert len(open_set(path)) == 1


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("1.png", 1), ("2.cls", "0")], r"sample '2' of .*a.tar has no image; it holds .cls"),
        ([("1.png", 1), ("2.png", 1), ("1.png", 1)], r"sample '1' of .* has two parts .png"),
        ([("1.png", 1), ("1.cls", "0"), ("2.png", 1)], "sample '2' has no label"),
        ([("1.png", 1), ("1.cls", "cat")], r"sample '1' of .*: .cls holds b'cat', no integer"),
        ([("1.png", 1), ("1.cls", "0.5")], "no integer"),
        ([("1.png", 1), ("1.cls", "-1")], "sample '1': label -1 is not usable"),
        ([("README", "hi")], "no samples in"),
        ([], "no samples in"),
    ],
)
def test_bad_samples(tmp_path, write, open_set, members, message):
    with pytest.raises(DataError, match=message):
        open_set(write(tmp_path / "a.tar", members))


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ('{"label": 0.5}', "label 0.5 is not usable"),
        ('{"label": true}', "label True is not usable"),
        ('{"label": [1, "a"]}', re.escape("label [1, 'a'] is not usable")),
        ('{"label": [3, 3]}', "name a class twice"),
        ('{"label": null}', "sample '1' has no label"),
        ("[1]", "its .json has no 'label'; it holds list"),
        ("{", ".json holds b'{', no JSON"),
    ],
)
def test_bad_json(tmp_path, write, open_set, record, message):
    members = [("0.png", 1), ("0.json", '{"label": [1]}' if "[3" in record else '{"label": 1}')]
    members = members[:0] if "[1, " in record else members
    path = write(tmp_path / "a.tar", [*members, ("1.png", 1), ("1.json", record)])
    with pytest.raises(DataError, match=message):
        open_set(path, label_key="label")


def test_damaged_shards(shards, open_set):
    shard = shards / "train-000.tar"
    whole = shard.read_bytes()
    # In the middle of a member, in the middle of a header, between two members, and a header overwritten.
    for content in (whole[:700], whole[:1200], whole[:2048], whole[:2048] + b"x" * 512 + whole[2560:]):
        shard.write_bytes(content)
        with pytest.raises(DataError, match=r"train-000.tar (cannot be read|is cut off or damaged)"):
            open_set(shards)
    for content in (b"", b"no tar at all" * 100):
        shard.write_bytes(content)
        with pytest.raises(DataError, match=r"train-000.tar cannot be read"):
            open_set(shards)


def test_an_unreadable_image_is_named(tmp_path, write, open_set):
    images = open_set(write(tmp_path / "a.tar", [("dogs/1.png", "no image")]))
    with pytest.raises(DataError, match="^dogs/1: cannot read the image: not an image$"):
        images[0]


def test_a_tar_beside_the_images_it_held_is_passed_over(tmp_path, write, open_set, png):
    write(tmp_path / "photos.tar", [("1.png", 1)])
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1.png").write_bytes(png(3))
    assert open_set(tmp_path).id(0) == "a/1.png"
