"""Mutated images, tar shards, parquet and .npz files: each gives what it holds, or DataError and nothing else."""

import io
import tarfile
import tempfile
from collections import Counter
from functools import cache, partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from PIL import Image
from pyarrow import parquet

from diffrep.data.arrays import read_npz
from diffrep.data.images import Transform, decode
from diffrep.data.streams import Watched, find_columns, open_parquet, stream_parquet, stream_tar
from diffrep.data.tars import read_tars
from diffrep.errors import ConfigError, DataError

SIDE = 12
# Name -> (PIL format, mode, options of saving, largest error of a pixel).
KINDS = {
    "jpeg": ("JPEG", "RGB", {"quality": 95, "subsampling": 0}, 40),
    "jpeg-progressive": ("JPEG", "RGB", {"quality": 95, "subsampling": 0, "progressive": True}, 40),
    "jpeg-grey": ("JPEG", "L", {"quality": 95}, 40),
    "jpeg-cmyk": ("JPEG", "CMYK", {"quality": 95, "subsampling": 0}, 60),
    "png": ("PNG", "RGB", {}, 0),
    "png-alpha": ("PNG", "RGBA", {}, 0),
    "png-palette": ("PNG", "P", {"transparency": bytes(range(256))}, 0),
    "png-16": ("PNG", "I;16", {}, 0),
    "webp": ("WEBP", "RGB", {"lossless": True}, 0),
    "webp-animated": ("WEBP", "RGB", {"lossless": True, "save_all": True}, 0),
    "webp-lossy": ("WEBP", "RGB", {"quality": 95}, 120),
    "bmp": ("BMP", "RGB", {}, 0),
    "gif-animated": ("GIF", "P", {"save_all": True}, 0),
    "ppm": ("PPM", "RGB", {}, 0),
    "pgm": ("PPM", "L", {}, 0),
    "tiff": ("TIFF", "RGB", {}, 0),
    "tiff-lzw": ("TIFF", "RGB", {"compression": "tiff_lzw"}, 0),
    "tiff-deflate": ("TIFF", "RGB", {"compression": "tiff_adobe_deflate"}, 0),
    "tiff-jpeg": ("TIFF", "RGB", {"compression": "jpeg", "quality": 95}, 60),
    "tiff-16": ("TIFF", "I;16", {}, 0),
}


@cache
def originals():
    """Returns the bytes of an image of each kind, and its pixels (3, H, W) as they should come out."""
    ramp = np.arange(SIDE * SIDE, dtype=np.uint8).reshape(SIDE, SIDE)
    colours = Image.fromarray(np.stack([ramp, 255 - ramp, ramp // 2 + 50], 2))
    found = {}
    for name, (kind, mode, options, _) in KINDS.items():
        image = Image.fromarray(ramp.astype(np.uint16) * 257) if mode == "I;16" else colours.convert(mode)
        if "save_all" in options:
            options = options | {"append_images": [Image.new(mode, image.size, 3)]}
        packed = io.BytesIO()
        image.save(packed, kind, **options)
        shown = Image.fromarray(ramp) if mode == "I;16" else image
        found[name] = packed.getvalue(), np.asarray(shown.convert("RGB")).transpose(2, 0, 1)
    return found


@cache
def tar_file():
    """Returns a shard of three samples, one with a long name, with labels."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for i, key in enumerate(("a", "folder/b", "c" * 120)):
            for extension, content in (("png", originals()["png"][0]), ("cls", b"%d" % i)):
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return packed.getvalue()


@cache
def parquet_file():
    """Returns a parquet file of three images with labels, in two row groups."""
    images = [{"bytes": originals()[name][0], "path": name} for name in ("png", "jpeg", "bmp")]
    packed = io.BytesIO()
    parquet.write_table(pa.table({"image": images, "label": [0, 1, 2]}), packed, row_group_size=2)
    return packed.getvalue()


@cache
def npz_file(packer):
    """Returns arrays of images and labels, packed or not."""
    packed = io.BytesIO()
    packer(packed, train_images=np.arange(96, dtype=np.uint8).reshape(2, 4, 4, 3), train_labels=np.arange(2))
    return packed.getvalue()


def mutate(content, rng):
    """Returns a copy with some damage: flipped bits, bytes that are often limits, holes, cuts, repeats, splices."""
    data = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 4, 16])):
        place, length = int(rng.integers(len(data) + 1)), int(rng.choice([1, 2, 4, 8, 64]))
        kind = rng.integers(8)
        if kind == 0:
            place = min(place, len(data) - 1)
            data[place] ^= 1 << int(rng.integers(8))
        elif kind == 1:
            data[place : place + length] = rng.bytes(len(data[place : place + length]))
        elif kind == 2:
            edge = (b"\0", b"\xff", b"\x7f", b"\x80", b"0", b"7", b"/")[rng.integers(7)]
            data[place : place + length] = edge * len(data[place : place + length])
        elif kind == 3:
            del data[place : place + length]
        elif kind == 4:
            data[place:place] = data[place : place + length]
        elif kind == 5:
            del data[place:]
        elif kind == 6:
            # Headers lie at the beginning and decide about everything else.
            place = min(int(rng.integers(64)), len(data) - 1)
            data[place] = int(rng.integers(256))
        else:
            other = originals()[list(KINDS)[rng.integers(len(KINDS))]][0]
            data[place : place + length] = other[:length]
        if not data:
            break
    return bytes(data)


def fuzz(seed, cases):
    """Reads mutated files and returns how often each kind was read or refused.

    Case k of a seed is the same in every run: `fuzz_case(seed, k)`.

    Raises:
        AssertionError: A file gave anything else than an image or DataError; or a whole file not what it holds.
    """
    check_originals()
    with tempfile.TemporaryDirectory() as folder:
        return Counter(fuzz_case(seed, case, Path(folder)) for case in range(cases))


def check_originals():
    """Checks that files without damage give the truth."""
    for name, (content, truth) in originals().items():
        found = Transform(3)(decode(io.BytesIO(content))).numpy() * 255
        np.testing.assert_allclose(found, truth, atol=KINDS[name][3] + 0.01, err_msg=name)
    samples = read_tar_stream(tar_file())
    assert [sample.label for sample in samples] == [0, 1, 2]
    assert [sample.content for sample in samples] == [originals()["png"][0]] * 3
    assert [sample.label for sample in read_parquet(parquet_file())] == [0, 1, 2]


def fuzz_case(seed, case, folder):
    """Runs one case and returns (kind, whether it was read)."""
    rng = np.random.default_rng([seed, case])
    readers = {
        "tar": (tar_file(), partial(read_tar, folder=folder)),
        "tar-stream": (tar_file(), read_tar_stream),
        "parquet": (parquet_file(), read_parquet),
        "npz": (npz_file(np.savez), partial(read_arrays, folder=folder)),
        "npz-packed": (npz_file(np.savez_compressed), partial(read_arrays, folder=folder)),
    }
    names = [*KINDS, *readers]
    name = names[case % len(names)]
    content, read = readers[name] if name in readers else (originals()[name][0], read_image)
    damaged = mutate(content, rng)
    try:
        read(damaged)
    except DataError as error:
        assert str(error)
        return name, False
    except Exception as error:
        raise AssertionError(f"fuzz_case({seed}, {case}) of {name} raised {type(error).__name__}: {error}") from error
    return name, True


def read_image(content):
    """Decodes an image and brings it to a size."""
    whole = decode(io.BytesIO(content))
    if whole.format == "PNG":  # the one with checksums
        pixels = Transform(3)(whole).numpy() * 255
        pngs = [originals()[name][1] for name in KINDS if name.startswith("png")]
        assert any(np.allclose(pixels, truth, atol=0.01) for truth in pngs), "other pixels than the file holds"
    for fit in ("resize", "crop"):
        found = Transform(3, 8, fit)(decode(io.BytesIO(content), upright=fit == "crop"))
        assert found.shape == (3, 8, 8)
        assert found.dtype == torch.float32
        assert 0 <= found.min() <= found.max() <= 1


def read_tar(content, folder):
    """Indexes a shard and decodes its images."""
    shard = folder / "a.tar"
    shard.write_bytes(content)
    readers, _ = read_tars(str(shard), None, None)
    for row in range(len(readers["all"].ids)):
        assert ".." not in readers["all"].ids[row].split("/")
        images_or_data_errors(partial(readers["all"].image, row))


def read_tar_stream(content):
    """Streams a shard and decodes its images; returns the samples."""
    samples = []
    for sample in stream_tar(Watched(io.BytesIO(content)), "a.tar", None, None):
        samples.append(sample)
        assert len(samples) <= 10
        assert (sample.content is None) != (sample.problem is None)
        if sample.problem is None:
            assert ".." not in sample.id.split("/")
            images_or_data_errors(lambda packed=sample.content: decode(io.BytesIO(packed)))
    assert len({sample.id for sample in samples}) == len(samples)
    return samples


def read_parquet(content):
    """Streams a parquet file and decodes its images; returns the samples."""
    try:
        columns = find_columns(open_parquet(Watched(io.BytesIO(content))).schema_arrow, None, None)
    except ConfigError as error:  # a damaged name or type of a column
        raise DataError(str(error)) from error
    samples = list(stream_parquet(Watched(io.BytesIO(content)), "a.parquet", columns))
    for sample in samples:
        if sample.problem is None:
            images_or_data_errors(lambda packed=sample.content: decode(io.BytesIO(packed)))
    return samples


def read_arrays(content, folder):
    """Reads the images of an .npz file."""
    file = folder / "a.npz"
    file.write_bytes(content)
    readers, _ = read_npz(file)
    for reader in readers.values():
        for row in range(min(len(reader.ids), 4)):
            images_or_data_errors(partial(reader.image, row))


def images_or_data_errors(read):
    """Reads an image, which may be refused."""
    try:
        Transform(1, 8)(read())
    except DataError as error:
        assert str(error)
