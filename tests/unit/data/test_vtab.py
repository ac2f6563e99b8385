import pytest

from diffrep.data import vtab_means
from diffrep.data.vtab import TASKS
from diffrep.errors import DataError, UnknownNameError


@pytest.fixture
def task(tmp_path, png):
    """The layout of the prepared archives: every split's images in a folder of its own, the union's a second time."""
    root = tmp_path / "dtd"
    samples = {"train800": [(i, i % 5) for i in range(8)], "val200": [(100 + i, i) for i in range(2)]}
    samples["train800val200"] = samples["train800"] + samples["val200"]
    samples["test"] = [(200 + i, 46 - i) for i in range(4)]
    for split, rows in samples.items():
        (root / "images" / split).mkdir(parents=True)
        lines = []
        for i, (value, label) in enumerate(rows):
            (root / "images" / split / f"{i:06d}.jpg").write_bytes(png(value, "JPEG"))
            lines.append(f"images/{split}/{i:06d}.jpg {label}")
        (root / f"{split}.txt").write_text("\n".join(lines) + "\n")
    return root


def test_reading(task, open_set):
    images = open_set(task, channels=3, kind="vtab")
    assert {name: len(rows) for name, rows in images.splits.items()} == {"train800": 8, "val200": 2, "test": 4}
    assert images.id(8) == "images/val200/000000.jpg"
    assert [images.label(i) for i in (0, 9, 10)] == [0, 1, 46]
    assert images.classes is None
    assert images[0].shape == (3, 4, 4)
    assert open_set(task).fingerprint() == images.fingerprint(), "the lists are noticed"
    (task / "train800val200.txt").unlink()
    assert len(open_set(task)) == 14


def test_a_union_of_other_samples_is_refused(task, open_set):
    file = task / "train800val200.txt"
    good = file.read_text()
    for bad in (good[: good.rindex("images")], good.replace("000003.jpg 3", "000003.jpg 4")):
        file.write_text(bad)
        with pytest.raises(DataError, match="lists other samples"):
            open_set(task)


def test_paths_with_spaces(task, open_set):
    (task / "images" / "test" / "000000.jpg").rename(task / "images" / "test" / "a b.jpg")
    (task / "test.txt").write_text("images/test/a b.jpg 3\n\n")
    assert open_set(task, splits="test").id(0) == "images/test/a b.jpg"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("images/test/000000.jpg", "test.txt, line 1: .* expected 'relative/path label'"),
        ("images/test/000000.jpg stripes", "with an integer label"),
        ("images/test/000000.jpg 0.5", "with an integer label"),
        ("images/test/000000.jpg 47", "line 1: label 47, and dtd has 47 classes"),
        ("images/test/000009.jpg 1", "line 1: there is no file"),
        ("images/test/000000.jpg 1\nimages/test/000000.jpg 1", "line 2: .* is listed twice"),
        ("", "test.txt lists no images"),
    ],
)
def test_bad_lists(task, open_set, line, message):
    (task / "test.txt").write_text(line)
    with pytest.raises(DataError, match=message):
        open_set(task)


def test_a_folder_without_lists(image_folder, open_set):
    with pytest.raises(DataError, match=r"cannot read .*train800.txt: .*; a prepared VTAB-1k task holds images/"):
        open_set(image_folder, kind="vtab")


def test_means():
    scores = {name: 0.1 + 0.01 * i for i, name in enumerate(TASKS)}
    means = vtab_means(scores)
    assert {group: mean["tasks"] for group, mean in means.items()} == {
        "Natural": 7,
        "Specialized": 4,
        "Structured": 8,
        "all": 19,
    }
    assert means["Natural"]["mean"] == pytest.approx(0.13)
    assert means["all"]["mean"] == pytest.approx(0.19)
    assert means["all"]["missing"] == []


def test_a_partial_mean_is_never_given():
    scores = dict.fromkeys(TASKS, 0.5)
    del scores["kitti"], scores["dmlab"]
    means = vtab_means(scores)
    assert means["Structured"] == {"mean": None, "tasks": 8, "missing": ["dmlab", "kitti"]}
    assert means["all"] == {"mean": None, "tasks": 19, "missing": ["dmlab", "kitti"]}
    assert means["Natural"]["mean"] == 0.5
    with pytest.raises(UnknownNameError, match="unknown VTAB task 'kiti'; did you mean 'kitti'"):
        vtab_means({"kiti": 0.5})
