import io
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from diffrep.config import DataConfig
from diffrep.data import Transform, open_images
from diffrep.errors import ConfigError, DataError, UnknownNameError


def open_set(path, channels=1, **options):
    return open_images(DataConfig(path=path, **options), channels)


def test_folder_with_splits_and_classes(image_folder):
    images = open_set(image_folder)
    assert {name: len(rows) for name, rows in images.splits.items()} == {"train": 18, "test": 18}
    assert images.id(0) == "train/class0/0.png"
    assert images.id(35) == "test/class2/5.png"
    assert (images.label(0), images.label(35)) == (0, 2)
    assert images.classes == ["class0", "class1", "class2"]
    assert images[0].shape == (1, 16, 16)
    assert 0 <= images[0].min() <= images[35].max() <= 1


def test_folders_without_splits_or_classes(image_folder, tmp_path):
    classes = open_set(image_folder / "train")
    assert list(classes.splits) == ["all"]
    assert classes.id(0) == "class0/0.png"
    flat = open_set(image_folder / "train" / "class1")
    assert not flat.labelled
    assert flat.classes is None
    # A file beside class folders makes the classes unknown; it is read all the same.
    mixed = tmp_path / "mixed"
    shutil.copytree(image_folder / "train", mixed)
    shutil.copy(mixed / "class0" / "0.png", mixed / "loose.png")
    assert (len(open_set(mixed)), open_set(mixed).labelled) == (19, False)


def test_splits_and_limits(image_folder):
    assert len(open_set(image_folder, splits="test", limit=5)) == 5
    both = open_set(image_folder, splits=["test", "train"], limit={"train": 2})
    assert [both.id(i).split("/")[0] for i in (0, 17, 18, 19)] == ["test", "test", "train", "train"]
    assert len(both) == 20
    with pytest.raises(UnknownNameError, match="unknown split 'tset'; did you mean 'test'"):
        open_set(image_folder, splits="tset")
    with pytest.raises(UnknownNameError, match="data.limit"):
        open_set(image_folder, limit={"val": 2})
    with pytest.raises(ConfigError, match="twice"):
        open_set(image_folder, splits=["test", "test"])


def test_fingerprint_follows_the_files(image_folder, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(image_folder, copy)
    assert open_set(copy).fingerprint() == open_set(image_folder).fingerprint()
    assert open_set(copy, limit=3).fingerprint() != open_set(copy).fingerprint()
    (copy / "train" / "class0" / "0.png").write_bytes(b"other")
    assert open_set(copy).fingerprint() != open_set(image_folder).fingerprint()


def test_unreadable_images_are_named(image_folder, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(image_folder, copy)
    broken = copy / "train" / "class0" / "0.png"
    for content in (b"no image", broken.read_bytes()[:60]):
        broken.write_bytes(content)
        with pytest.raises(DataError, match="train/class0/0.png: cannot read the image"):
            open_set(copy)[0]


def test_empty_and_missing_folders(tmp_path):
    with pytest.raises(DataError, match="no data at"):
        open_set(tmp_path / "nothing")
    with pytest.raises(DataError, match="no image in"):
        open_set(tmp_path)


def gradient(width, height, mode="RGB"):
    ramp = np.linspace(0, 255, width * height * 3, dtype=np.uint8).reshape(height, width, 3)
    return Image.fromarray(ramp).convert(mode)


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "1", "CMYK"])
@pytest.mark.parametrize("channels", [1, 3])
def test_any_mode_becomes_the_backbones_channels(mode, channels):
    tensor = Transform(channels)(gradient(9, 5, mode))
    assert tensor.shape == (channels, 5, 9)
    assert tensor.dtype == torch.float32


def test_sixteen_bit_images_keep_their_range():
    ramp = np.linspace(0, 65535, 16).astype(np.uint16).reshape(4, 4)
    tensor = Transform(1)(Image.fromarray(ramp))
    np.testing.assert_allclose(tensor[0], ramp / 65535, atol=0.003)
    for mode in ("I", "F"):
        with pytest.raises(DataError, match=f"mode '{mode}' have no known range"):
            Transform(1)(Image.new(mode, (4, 4)))


def test_fits():
    image = gradient(20, 10)
    assert Transform(3, 8, "resize")(image).shape == (3, 8, 8)
    assert Transform(3, 8, "crop")(image).shape == (3, 8, 8)
    padded = Transform(3, 24, "pad")(image)
    assert padded.shape == (3, 24, 24)
    assert torch.equal(padded[:, 7:17, 2:22], Transform(3)(image))
    assert padded[:, :7].sum() == 0
    with pytest.raises(DataError, match="fit 'pad' cannot bring 20x10"):
        Transform(3, 16, "pad")(image)


def test_crop_keeps_the_aspect_ratio():
    square = Image.new("L", (40, 20))
    square.paste(255, (10, 0, 30, 20))
    assert Transform(1, 10, "crop")(square).mean() > 0.95


def test_bundled_set():
    images = open_set("fashion-demo", size=32, fit="pad")
    assert {name: len(rows) for name, rows in images.splits.items()} == {"train": 4000, "test": 1000}
    labels = [images.label(i) for i in range(40)]
    assert labels == list(range(10)) * 4, "any prefix is balanced"
    assert images.classes[9] == "Ankle boot"
    assert images[0].shape == (1, 32, 32)
    with pytest.raises(DataError, match="did you mean 'fashion-demo'"):
        open_set("fashion-dem")


def test_npz(tmp_path):
    file = tmp_path / "set.npz"
    np.savez(file, all_images=np.zeros((3, 4, 4, 3), np.uint8))
    assert open_set(file).id(2) == "all:2"
    np.savez(file, all_images=np.zeros((3, 4, 4, 1), np.uint8))
    assert open_set(file)[0].shape == (1, 4, 4)
    np.savez(file, all_images=np.zeros((3, 4, 4)))
    with pytest.raises(DataError, match="expected uint8"):
        open_set(file)
    np.savez(file, all_images=np.zeros((3, 4, 4), np.uint8), all_labels=np.zeros(2))
    with pytest.raises(DataError, match="3 images and 2 labels"):
        open_set(file)
    np.savez(file, pixels=np.zeros(3))
    with pytest.raises(DataError, match="expected arrays named like"):
        open_set(file)
    file.write_bytes(b"PK junk")
    with pytest.raises(DataError, match="cannot read"):
        open_set(file)


def test_torchvision(tmp_path):
    with pytest.raises(UnknownNameError, match="did you mean 'CIFAR10'"):
        open_set(tmp_path, kind="torchvision", name="CIFAR")
    with pytest.raises(UnknownNameError, match="unknown split 'tain'; did you mean 'train'"):
        open_set(tmp_path, kind="torchvision", name="MNIST", splits="tain")
    with pytest.raises(ConfigError, match="images of 4 channels"):
        open_set(tmp_path, kind="torchvision", name="MNIST", channels=4)
    with pytest.raises(DataError, match="download=true fetches it"):
        open_set(tmp_path, kind="torchvision", name="MNIST")
    # FakeData is torchvision's own generated set: the real class, no files.
    images = open_set(tmp_path, kind="torchvision", name="FakeData", channels=3, limit=4)
    assert images.id(3) == "all:3"
    assert images[3].shape == (3, 224, 224)


def test_hf_parquet(tmp_path):
    datasets = pytest.importorskip("datasets")
    pq = pytest.importorskip("pyarrow.parquet")
    del pq
    packed = io.BytesIO()
    gradient(6, 6).save(packed, "PNG")
    features = datasets.Features(
        {"img": datasets.Image(), "fine": datasets.ClassLabel(names=["cat", "dog"]), "note": datasets.Value("string")}
    )
    rows = {"img": [{"bytes": packed.getvalue(), "path": None}] * 3, "fine": [0, 1, 1], "note": ["x"] * 3}
    for split in ("train", "test"):
        datasets.Dataset.from_dict(rows, features=features).to_parquet(
            tmp_path / "set" / f"{split}-00000-of-00001.parquet"
        )
    images = open_set(tmp_path / "set", channels=3)
    assert {name: len(rows) for name, rows in images.splits.items()} == {"train": 3, "test": 3}
    assert (images.id(4), images.label(4), images.classes) == ("test:1", 1, ["cat", "dog"])
    assert torch.equal(images[4], Transform(3)(gradient(6, 6)))
    with pytest.raises(DataError, match="labels in column 'note' are not integers"):
        open_set(tmp_path / "set", label_key="note")
    with pytest.raises(UnknownNameError, match="label column"):
        open_set(tmp_path / "set", label_key="lable")
    with pytest.raises(DataError, match="no image column"):
        open_set(tmp_path / "set", image_key="image")
    with pytest.raises(UnknownNameError, match="unknown split 'val'"):
        open_set(tmp_path / "set", splits="val")
