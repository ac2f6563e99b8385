"""Files that nobody vouches for: each is read, or refused with DataError."""

import importlib.util
import io
import os
import struct
import tarfile
import warnings
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile

from diffrep.data import Transform
from diffrep.data.images import MAX_PIXELS, decode
from diffrep.data.pairs import PairImage
from diffrep.errors import DataError


def load_fuzz():
    spec = importlib.util.spec_from_file_location("fuzz_data", Path(__file__).with_name("fuzz_data.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def packed(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def read(content):
    return decode(io.BytesIO(content))


def chunk(name, content):
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png_of(width, height, rows=b""):
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


RAMP = Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3))


@pytest.mark.filterwarnings("ignore")
def test_mutated_files_give_an_image_or_data_error():
    fuzz = load_fuzz()
    found = fuzz.fuzz(0, 1500)
    assert found.total() == 1500
    for kind in fuzz.KINDS:
        assert found[kind, False] > 0, "mutations do damage"
    assert sum(count for (_, was_read), count in found.items() if was_read) > 200, "and not always too much"


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(
    ("width", "height"), [(9460, 9460), (50_000, 50_000), (2**31 - 1, 2**31 - 1), (100_000, 1), (1, 100_000)]
)
def test_decompression_bombs(width, height):
    assert width * height > MAX_PIXELS or max(width, height) > 65_535
    with pytest.raises(DataError, match=f"{width}x{height}|exceeds limit"):
        read(png_of(width, height))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(DataError, match=f"{width}x{height}|exceeds limit"):
            read(png_of(width, height))


def test_a_png_whose_pixels_are_others_than_were_written():
    content = bytearray(png_of(8, 8, bytes(9 * 8)))
    assert read(bytes(content)).getpixel((7, 7)) == 0
    packed_pixels = zlib.compress(bytes(9 * 7) + b"\0" + b"\7" * 8)
    with_old_sum = chunk(b"IDAT", packed_pixels)[:-4] + bytes(content[content.index(b"IEND") - 8 :][:4])
    start, stop = content.index(b"IDAT") - 4, content.index(b"IEND") - 4
    with pytest.raises(DataError, match="its pixels do not fit their checksum"):
        read(bytes(content[:start]) + with_old_sum + bytes(content[stop:]))


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_the_size_of_an_image_that_is_too_large_or_of_another_kind(tmp_path):
    (tmp_path / "a.png").write_bytes(png_of(9460, 9460))
    RAMP.save(tmp_path / "b.png", "EPS")
    RAMP.save(tmp_path / "c.jpg", "PNG")
    with pytest.raises(DataError, match="^a: cannot read the image: its size is 9460x9460"):
        PairImage("a", tmp_path / "a.png").size()
    with pytest.raises(DataError, match="^b: cannot read the image: not an image"):
        PairImage("b", tmp_path / "b.png").size()
    assert PairImage("c", tmp_path / "c.jpg").size() == (8, 8)


def test_text_that_unpacks_to_gigabytes():
    content = packed(RAMP)
    text = chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(1 << 26)))
    with pytest.raises(DataError, match="(?i)decompressed data too large"):
        read(content[:33] + text + content[33:])


@pytest.mark.parametrize("size", [(1, 1), (1, 400), (400, 1)])
def test_images_of_one_pixel(size):
    image = read(packed(Image.new("RGB", size, (51, 102, 204))))
    for fit in ("resize", "crop"):
        found = Transform(3, 16, fit)(image)
        assert found.shape == (3, 16, 16)
        assert torch.allclose(found[:, 3, 5], torch.tensor([0.2, 0.4, 0.8]))
    if size == (1, 1):
        assert Transform(3, 16, "pad")(image).sum() == pytest.approx(1.4)
    else:
        with pytest.raises(DataError, match="fit 'pad' cannot bring"):
            Transform(3, 16, "pad")(image)


def test_a_strip_is_not_enlarged_without_end():
    strip = read(packed(Image.new("L", (1, 30_000))))
    with pytest.raises(DataError, match="fit 'crop' would enlarge 1x30000 to 512x15360000 pixels"):
        Transform(1, 512, "crop")(strip)
    assert Transform(1, 512)(strip).shape == (1, 512, 512)


def test_images_without_pixels():
    for content in (png_of(0, 5), b"P6 0 3 255\n", b"GIF89a" + bytes(7), b"BM" + bytes(52)):
        with pytest.raises(DataError, match="cannot read the image"):
            read(content)


def test_only_the_named_formats_are_tried(tmp_path, monkeypatch):
    # PIL hands EPS to Ghostscript; a program of that name would leave a trace.
    trace = tmp_path / "ran"
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {trace}\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    for kind in ("EPS", "PDF", "ICO", "TGA", "PCX", "SGI"):
        content = packed(RAMP, kind)
        (tmp_path / "a.png").write_bytes(content)
        with pytest.raises(DataError, match="cannot read the image: not an image"):
            decode(tmp_path / "a.png")
    assert not trace.exists()


def test_a_name_that_lies(tmp_path, open_set):
    (tmp_path / "a.jpg").write_bytes(packed(RAMP, "PNG"))
    (tmp_path / "b.png").write_bytes(packed(RAMP, "BMP"))
    (tmp_path / "c.png").write_bytes(b"%PDF-1.7")
    images = open_set(tmp_path, channels=3)
    assert torch.equal(images[0], Transform(3)(RAMP))
    assert torch.equal(images[1], images[0])
    with pytest.raises(DataError, match="c.png: cannot read the image: not an image"):
        images[2]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "GIF", "PPM", "TIFF"])
def test_half_an_image_is_none(kind):
    assert not ImageFile.LOAD_TRUNCATED_IMAGES
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    content = packed(Image.fromarray(noise), kind)
    assert read(content).size == (64, 64)
    for share in (0.1, 0.5, 0.9):
        with pytest.raises(DataError, match="cannot read the image"):
            read(content[: int(len(content) * share)])


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_the_first_frame_of_several(kind):
    frames = [Image.new("RGB", (6, 6), colour) for colour in ("red", "blue")]
    options = {"lossless": True} if kind == "WEBP" else {}
    found = Transform(3)(read(packed(frames[0], kind, save_all=True, append_images=frames[1:], **options)))
    assert torch.equal(found[:, 2, 2], torch.tensor([1.0, 0.0, 0.0]))


def test_modes_of_colour():
    palette = RAMP.convert("P")
    content = packed(palette, transparency=bytes(range(256)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert torch.equal(Transform(3)(read(content)), Transform(3)(palette))
    cmyk = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    found = Transform(3)(read(packed(cmyk, "JPEG", quality=95)))
    assert torch.allclose(found[:, 4, 4], torch.tensor([1.0, 0.0, 0.0]), atol=0.02)
    deep = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000
    for kind in ("PNG", "TIFF"):
        found = Transform(1)(read(packed(Image.fromarray(deep), kind)))
        np.testing.assert_allclose(found[0], deep / 65_535, atol=0.003)
    with pytest.raises(DataError, match="conversion from LAB to"):
        Transform(1)(read(packed(Image.new("LAB", (4, 4)), "TIFF")))


def test_links_that_lead_back_and_pipes(tmp_path, open_set, png):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1.png").write_bytes(png(1))
    (tmp_path / "b").symlink_to(tmp_path / "a")
    os.mkfifo(tmp_path / "a" / "pipe.png")
    assert [open_set(tmp_path).id(i) for i in range(2)] == ["a/1.png", "b/1.png"]
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    with pytest.raises(DataError, match="the link '.*/up' leads back to"):
        open_set(tmp_path)
    (tmp_path / "a" / "up").unlink()
    (tmp_path / "a" / "itself").symlink_to("itself")
    with pytest.raises(DataError, match="cannot list"):
        open_set(tmp_path)
    (tmp_path / "a" / "itself").unlink()
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/a/\xff.png")).write_bytes(png(1))
    with pytest.raises(DataError, match="is not UTF-8"):
        open_set(tmp_path)


@pytest.mark.parametrize("name", ["../up.png", "/etc/abs.png", "a/../../b.png", "./../c.png", "..", "../README"])
def test_tar_names_that_point_outside(tmp_path, write, open_set, name):
    path = write(tmp_path / "a.tar", [("1.png", 1), (name, 2), ("2.png", 3)])
    with pytest.raises(DataError, match="has a name that points outside"):
        open_set(path)
    samples = list(open_set(path, stream=True).samples(0))
    assert [sample.problem is None for sample in samples] == [True, False, True]
    assert "has a name that points outside" in samples[1].problem
    assert samples[1].problem.startswith(samples[1].id + ": ")


def test_tar_members_that_are_no_files(tmp_path, open_set, png):
    secret = tmp_path / "secret.png"
    secret.write_bytes(png(200))
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        for name, kind in (("s.png", tarfile.SYMTYPE), ("h.png", tarfile.LNKTYPE), ("d.png", tarfile.CHRTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, str(secret)
            tar.addfile(info)
        info = tarfile.TarInfo("1.png")
        info.size = len(png(7))
        tar.addfile(info, io.BytesIO(png(7)))
    assert [open_set(path).id(i) for i in range(1)] == ["1"]
    assert [sample.id for sample in open_set(path, stream=True).samples(0)] == ["a/1"]


def forged(path, size, kind=b"0", name="1.png", sizes=None):
    """Writes a tar file of one member whose header tells another size than it has."""
    info = tarfile.TarInfo(name)
    info.size, info.type, info.pax_headers = size, kind, sizes or {}
    path.write_bytes(info.tobuf(tarfile.PAX_FORMAT if sizes else tarfile.GNU_FORMAT) + bytes(4096))
    return path


@pytest.mark.parametrize(
    "forgery",
    [
        {"size": 1 << 40},
        {"size": -512},
        {"size": 512, "sizes": {"size": "-512"}},
        {"size": 1 << 30, "kind": tarfile.GNUTYPE_LONGNAME},
        {"size": 1 << 30, "kind": tarfile.XHDTYPE},
        {
            "size": 512,
            "sizes": {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": str(1 << 50)},
        },
    ],
)
def test_tar_headers_that_lie_about_sizes(tmp_path, open_set, forgery):
    path = forged(tmp_path / "a.tar", **forgery)
    with pytest.raises(DataError):
        open_set(path)[0]
    assert not [sample for sample in open_set(path, stream=True).samples(0) if sample.problem is None]


def test_large_members_of_a_tar(tmp_path, write, open_set, monkeypatch, png):
    monkeypatch.setattr("diffrep.data.tars.MAX_IMAGE", 1000)
    monkeypatch.setattr("diffrep.data.tars.MAX_TEXT", 1000)
    monkeypatch.setattr("diffrep.data.streams.MAX_IMAGE", 1000)
    monkeypatch.setattr("diffrep.data.streams.MAX_TEXT", 999)
    path = write(tmp_path / "a.tar", [("1.png", png(1) + bytes(1000)), ("2.png", 2), ("2.txt", " " * 5000)])
    images = open_set(path)
    with pytest.raises(DataError, match="1: cannot read the image: .* bytes, and at most 1,000"):
        images[0]
    samples = list(open_set(path, stream=True).samples(0))
    assert [sample.problem is None for sample in samples] == [False, True]
    assert "a part .png of" in samples[0].problem
    path = write(tmp_path / "b.tar", [("1.png", 1), ("1.cls", " " * 1000 + "1")])
    with pytest.raises(DataError, match="its label lies in a part of 1,001 bytes"):
        open_set(path)
    assert "a part .cls of 1,001 bytes" in next(open_set(path, stream=True).samples(0)).problem


@pytest.mark.parametrize(
    "text", ["9" * 5000, str(1 << 70), "[" * 100_000, '{"label": ' + "[" * 100_000, '{"label": 1e999}']
)
def test_labels_that_are_meant_to_break(tmp_path, write, open_set, text):
    path = write(tmp_path / "a.tar", [("1.png", 1), ("1.cls", text), ("1.json", text)])
    for key in (None, "label"):
        with pytest.raises(DataError):
            open_set(path, label_key=key)
        assert "a/1" in next(open_set(path, stream=True, label_key=key).samples(0)).problem


def test_a_class_number_that_asks_for_gigabytes(tmp_path, write, open_set):
    path = write(tmp_path / "a.tar", [("1.png", 1), ("1.json", '{"label": [8000000000]}')])
    with pytest.raises(DataError, match="8,000,000,001 classes, and at most 1,048,576"):
        open_set(path, label_key="label")


def test_npz_files_that_are_meant_to_break(tmp_path, open_set, monkeypatch):
    file = tmp_path / "a.npz"
    monkeypatch.setattr("diffrep.data.arrays.NPZ_BYTES", 1 << 20)
    np.savez_compressed(file, all_images=np.zeros((600, 64, 64), np.uint8))
    with pytest.raises(DataError, match="would unpack to 2,457,.* bytes, more than 200 times its own"):
        open_set(file)
    np.savez(file, all_images=np.zeros((600, 64, 64), np.uint8))
    assert len(open_set(file)) == 600
    np.savez(file, all_images=np.array([{"code": 1}], dtype=object))
    with pytest.raises(DataError, match="cannot read"):
        open_set(file)
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": (1 << 46, 8, 8)})
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("all_images.npy", header.getvalue())
        archive.writestr("note.txt", "no array")
    with pytest.raises(DataError, match="cannot read"):
        open_set(file)
    np.savez(file, all_images=np.zeros((2, 4, 4), np.uint8), all_labels=np.int64(3))
    with pytest.raises(DataError, match="2 images and 1 labels"):
        open_set(file)
    np.save(tmp_path / "b.npy", np.zeros(3))
    (tmp_path / "b.npy").rename(file)
    with pytest.raises(DataError, match="cannot read"):
        open_set(file)
