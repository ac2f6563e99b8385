import numpy as np
import pytest
from torchvision import datasets as tv

from diffrep.data import ImageSet, Transform
from diffrep.data.arrays import ArrayReader, _targets
from diffrep.data.labels import number_labels
from diffrep.errors import ConfigError, DataError, UnknownNameError

datasets = pytest.importorskip("datasets")


@pytest.fixture
def parquet(tmp_path, png):
    """Writes a set of two splits with the given label columns."""

    def write(features, train, test):
        features = datasets.Features({"image": datasets.Image(), **features})
        for split, columns in (("train", train), ("test", test)):
            count = len(next(iter(columns.values())))
            rows = {"image": [{"bytes": png(i), "path": None} for i in range(count)], **columns}
            file = tmp_path / "set" / f"{split}-00000-of-00001.parquet"
            datasets.Dataset.from_dict(rows, features=features).to_parquet(file)
        return tmp_path / "set"

    return write


def labels_of(images):
    return [images.label(i) for i in range(len(images))]


def test_lists_of_class_labels(parquet, open_set):
    kind = datasets.List(datasets.ClassLabel(names=["cat", "dog", "hat"]))
    images = open_set(parquet({"objects": kind}, {"objects": [[0, 2], []]}, {"objects": [[1]]}))
    assert images.multilabel
    assert images.classes == ["cat", "dog", "hat"]
    assert labels_of(images) == [[1, 0, 1], [0, 0, 0], [0, 1, 0]]


def test_lists_of_integers(parquet, open_set):
    kind = {"tags": datasets.List(datasets.Value("int64"))}
    path = parquet(kind, {"tags": [[0], [1, 0]]}, {"tags": [[3]]})
    assert not open_set(path).labelled
    images = open_set(path, label_key="tags", splits="train")
    assert labels_of(images) == [[1, 0, 0, 0], [1, 1, 0, 0]], "as many as all splits have"
    already = open_set(parquet(kind, {"tags": [[0, 1, 1], [0, 0, 0]]}, {"tags": [[1, 0, 0]]}), label_key="tags")
    assert labels_of(already) == [[0, 1, 1], [0, 0, 0], [1, 0, 0]]
    with pytest.raises(DataError, match=r"row 1 of column 'tags': the labels \[2, 2\] name a class twice"):
        open_set(parquet(kind, {"tags": [[0], [2, 2]]}, {"tags": [[3]]}), label_key="tags")


def test_several_columns(parquet, open_set):
    kinds = {"young": datasets.Value("bool"), "glad": datasets.Value("int8"), "age": datasets.Value("int8")}
    rows = {"young": [True, False], "glad": [0, 1], "age": [30, 70]}
    path = parquet(kinds, rows, rows)
    images = open_set(path, label_key="young,glad")
    assert (images.classes, labels_of(images)[:2]) == (["young", "glad"], [[1, 0], [0, 1]])
    with pytest.raises(DataError, match=r"columns \['young', 'age'\] have several columns, which must hold 0 and 1"):
        open_set(path, label_key=["young", "age"])
    with pytest.raises(UnknownNameError, match="unknown label column 'gald'; did you mean 'glad'"):
        open_set(path, label_key=["young", "gald"])


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        (datasets.Value("float32"), [0.5, 1.0]),
        (datasets.Value("int64"), [0, None]),
        (datasets.List(datasets.Value("float32")), [[0.5], [1.0]]),
        (datasets.List(datasets.Value("string")), [["a"], ["b"]]),
    ],
)
def test_labels_that_are_not_integers(parquet, open_set, kind, values):
    path = parquet({"label": kind}, {"label": values}, {"label": values})
    with pytest.raises(DataError, match="labels in column 'label' are not integers"):
        open_set(path)


def test_npz(tmp_path, open_set):
    file, images = tmp_path / "set.npz", np.zeros((3, 4, 4), np.uint8)
    np.savez(file, all_images=images, all_labels=np.array([[0, 1], [1, 1], [0, 0]]), classes=["a", "b"])
    opened = open_set(file)
    assert opened.multilabel
    assert labels_of(opened) == [[0, 1], [1, 1], [0, 0]]
    for labels, message in (
        (np.zeros(3), "labels of split 'all' are not integers"),
        (np.array([[0, 2]] * 3), "must hold 0 and 1 only"),
    ):
        np.savez(file, all_images=images, all_labels=labels)
        with pytest.raises(DataError, match=message):
            open_set(file)


def test_torchvision_sets_keep_labels_and_names_in_their_own_ways(tmp_path, open_set, png):
    """Caltech101 and GTSRB, whose labels a reader of `targets` would miss, in their real layout at tiny size."""
    (tmp_path / "caltech101" / "101_ObjectCategories" / "BACKGROUND_Google").mkdir(parents=True)  # no class
    for name in ("ants", "bass"):
        folder = tmp_path / "caltech101" / "101_ObjectCategories" / name
        folder.mkdir(parents=True)
        (folder / "image_0001.jpg").write_bytes(png(9, "JPEG"))
        (tmp_path / "caltech101" / "Annotations" / name).mkdir(parents=True)
    images = open_set(tmp_path, kind="torchvision", name="Caltech101")
    assert (images.classes, labels_of(images)) == (["ants", "bass"], [0, 1])
    for label in range(2):
        folder = tmp_path / "gtsrb" / "GTSRB" / "Training" / f"{label:05d}"
        folder.mkdir(parents=True)
        (folder / "1.ppm").write_bytes(png(9, "PPM"))
    images = open_set(tmp_path, kind="torchvision", name="GTSRB", splits="train")
    assert (images.classes, labels_of(images)) == (None, [0, 1])
    assert _targets(tv.FakeData(4)) is None


# ImageSet itself


def image_set(train, test, classes=None):
    pixels = np.arange(160, dtype=np.uint8).reshape(10, 4, 4)
    readers = {"train": ArrayReader("train", pixels[:6], train, ["a"]), "test": ArrayReader("test", pixels, test, [])}
    return ImageSet(readers, Transform(1), classes)


def test_sets_of_users_own_readers_are_checked():
    numbers = np.arange(10)
    with pytest.raises(DataError, match="labels of split 'test' are float64; they must be integers"):
        image_set(numbers[:6], numbers.astype(float))
    with pytest.raises(DataError, match="splits differ in the number of labels"):
        image_set(numbers[:6], np.zeros((10, 2), np.int64))
    assert not image_set(np.zeros((6, 2), np.int64), None).multilabel


def test_names_must_cover_the_labels():
    with pytest.raises(DataError, match="split 'test' has labels of 10 classes, and 2 have names"):
        image_set(np.arange(6) % 2, np.arange(10), ["a", "b"])
    with pytest.raises(DataError, match="split 'train' has labels of 3 classes, and 2 have names"):
        image_set(np.zeros((6, 3), np.int64), np.zeros((10, 3), np.int64), ["a", "b"])


def test_lists_that_could_be_read_in_two_ways():
    place = "row {}".format
    hot, classes = number_labels([[0, 1], [1, 0], [0, 1]], place)
    assert (hot.tolist(), classes) == ([[0, 1], [1, 0], [0, 1]], None)
    hot, _ = number_labels([[0, 1], [1], [0, 1]], place)
    assert hot.tolist() == [[1, 1], [0, 1], [1, 1]]
    hot, classes = number_labels([["a", "b"], ["b", "a"]], place)
    assert (hot.tolist(), classes) == ([[1, 1], [1, 1]], ["a", "b"])
    with pytest.raises(DataError, match=r"row 1: the labels \['a', 'a'\] name a class twice"):
        number_labels([["a", "b"], ["a", "a"]], place)


def test_subset():
    whole = image_set(np.arange(6), np.arange(10), list("abcdefghij"))
    part = whole.subset([9, 2, 0, 15])
    assert {name: list(rows) for name, rows in part.splits.items()} == {"train": [0, 1], "test": [2, 3]}
    for i, row in enumerate((0, 2, 9, 15)):
        assert (part.id(i), part.label(i)) == (whole.id(row), whole.label(row))
        assert (part[i] == whole[row]).all()
    assert part.classes == whole.classes
    assert list(whole.subset([7]).splits) == ["test"]
    fingerprints = {images.fingerprint() for images in (whole, part, whole.subset([0, 2]), whole.subset(range(16)))}
    assert len(fingerprints) == 4
    assert whole.subset([15, 0, 2, 9]).fingerprint() == part.fingerprint()
    assert part.subset([1, 3]).id(1) == whole.id(15)
    with pytest.raises(IndexError, match="of 16 samples"):
        whole.subset([3, 16])
    with pytest.raises(ConfigError, match="twice"):
        whole.subset([3, 3])
    with pytest.raises(DataError, match="no images"):
        whole.subset([])
