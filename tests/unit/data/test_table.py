import pytest
import torch
from torch.utils.data import DataLoader

from diffrep.errors import ConfigError, DataError, UnknownNameError


@pytest.fixture
def write(tmp_path, png):
    """Writes images a.png to d.png and a table beside them."""
    (tmp_path / "photos").mkdir()
    for i, name in enumerate("abcd"):
        (tmp_path / "photos" / f"{name}.png").write_bytes(png(50 * i))

    def write(text, name="set.csv"):
        (tmp_path / name).write_text(text)
        return tmp_path / name

    return write


def lines(header, *rows):
    return "\n".join([header, *(f"photos/{row}" for row in rows)]) + "\n"


def test_names_and_splits(write, open_set):
    file = write(lines("path,label,split", "a.png,dog,train", "b.png,cat,test", "c.png,cat,train", "d.png,dog,extra"))
    images = open_set(file)
    assert {name: len(rows) for name, rows in images.splits.items()} == {"train": 2, "test": 1, "extra": 1}
    assert [images.id(i) for i in range(4)] == [f"photos/{name}.png" for name in "acbd"]
    assert [images.label(i) for i in range(4)] == [1, 0, 0, 1]
    assert images.classes == ["cat", "dog"]
    assert torch.equal(torch.cat(list(DataLoader(images, num_workers=2))), torch.stack([images[i] for i in range(4)]))
    assert open_set(file, splits="test").label(0) == 0


def test_integers_other_columns_and_tabs(write, open_set):
    file = write(lines("file\tage\tkind", "a.png\t3\tx", "b.png\t0\ty"), "set.tsv")
    unlabelled = open_set(file)
    assert (list(unlabelled.splits), unlabelled.labelled, unlabelled.classes) == (["all"], False, None)
    aged = open_set(file, image_key="file", label_key="age")
    assert ([aged.label(i) for i in range(2)], aged.classes) == ([3, 0], None)
    assert open_set(file, label_key="kind").classes == ["x", "y"]


def test_several_label_columns(write, open_set):
    file = write(lines("path,young,old,glad", "a.png,1,0,1", "b.png,0,0,0"))
    images = open_set(file, label_key="young, glad")
    assert images.multilabel
    assert images.classes == ["young", "glad"]
    assert [images.label(i) for i in range(2)] == [[1, 1], [0, 0]]
    assert open_set(file, label_key=["young", "glad"]).fingerprint() == images.fingerprint()
    assert not open_set(file, label_key="old").multilabel


def test_a_byte_order_mark_and_absolute_paths(write, tmp_path, open_set):
    file = write(f"\ufeffpath,label\n{tmp_path}/photos/a.png,0\n")
    assert open_set(file).id(0) == f"{tmp_path}/photos/a.png"
    assert open_set(file)[0].shape == (1, 4, 4)


def test_the_fingerprint_follows_labels_and_files(write, tmp_path, open_set, png):
    before = open_set(write(lines("path,label", "a.png,0", "b.png,1"))).fingerprint()
    assert open_set(write(lines("path,label", "a.png,1", "b.png,1"))).fingerprint() != before
    assert open_set(write(lines("path,label", "a.png,0", "b.png,1"))).fingerprint() == before
    (tmp_path / "photos" / "a.png").write_bytes(png(1) + b"more")
    assert open_set(tmp_path / "set.csv").fingerprint() != before


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (lines("path,label", "a.png,0", "z.png,1"), r"set.csv, line 3: there is no file '.*z.png'"),
        (lines("path,label", "a.png,0", "b.png,1", "a.png,0"), r"line 4: 'photos/a.png' stands in line 2 already"),
        (lines("path,label", "a.png,0", "b.png,cat"), "line 3: label 'cat' is not usable"),
        (lines("path,label", "a.png,0.5"), "line 2: label 0.5 is not usable"),
        (lines("path,label", "a.png,-1"), "line 2: label -1 is not usable"),
        (lines("path,label", "a.png,dog", "b.png,"), "line 3: label '' is not usable"),
        (lines("path,label,split", "a.png,0,"), "line 2: the split is empty"),
        (lines("path,label", "a.png"), "line 2: 1 columns where the header has 2"),
        (lines("path,label", "a.png,1,2"), "line 2: 3 columns where the header has 2"),
        ("path,label\n", "holds no samples"),
        ("", "holds no samples"),
        ('path,label\n"photos/a.png,1\n', "cannot read the table"),
    ],
)
def test_bad_tables(write, open_set, text, message):
    with pytest.raises(DataError, match=message):
        open_set(write(text))


def test_bad_columns(write, tmp_path, open_set):
    file = write(lines("path,young,old", "a.png,1,2"))
    with pytest.raises(UnknownNameError, match="unknown image column 'paths'; did you mean 'path'"):
        open_set(file, image_key="paths")
    with pytest.raises(UnknownNameError, match="unknown label column 'yuong'; did you mean 'young'"):
        open_set(file, label_key="yuong,old")
    with pytest.raises(DataError, match="line 2: '2' in column 'old'; several label columns hold 0 or 1"):
        open_set(file, label_key="young,old")
    with pytest.raises(DataError, match="cannot read the table"):
        open_set(tmp_path / "none.csv")
    with pytest.raises(ConfigError, match="this is 'folder'"):
        open_set(tmp_path / "photos", label_key="label")
