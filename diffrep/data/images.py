"""A set of images with a stable id for each sample, and the transform that brings them to the backbone's input."""

from __future__ import annotations

import hashlib
import struct
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch.utils.data import Dataset

from diffrep.errors import ConfigError, DataError, UnknownNameError

# What is decoded, whatever a file's name says. PIL knows fifty more, of which EPS starts another program.
FORMATS = {
    "JPEG": (".jpg", ".jpeg"),
    "PNG": (".png",),
    "WEBP": (".webp",),
    "BMP": (".bmp",),
    "GIF": (".gif",),
    "PPM": (".ppm", ".pgm"),
    "TIFF": (".tif", ".tiff"),
}
EXTENSIONS = frozenset(extension for extensions in FORMATS.values() for extension in extensions)
# A quarter of a GiB in RGB, from where PIL begins to warn of decompression bombs.
MAX_PIXELS = (1 << 28) // 3
# The longest side of a JPEG or GIF. Damaged headers of other formats name millions, which take minutes.
MAX_SIDE = 65_535


@dataclass(frozen=True)
class Transform:
    """PIL image -> (C, H, W) fp32 in [0, 1].

    Attributes:
        channels: 1 (luma, ITU-R 601) or 3 (RGB).
        size: Side of the square result; None keeps the image's size.
        fit: "resize" both sides, "crop" (short side to `size`, centre crop) or "pad" with zeros to `size`, centred.
    """

    channels: int
    size: int | None = None
    fit: str = "resize"

    def __call__(self, image: Image.Image) -> torch.Tensor:
        """Transforms one image.

        Raises:
            DataError: The image's range is not known (32-bit integers and floats), it is too large to pad or too long
                to crop, or its colours cannot be converted.
        """
        if image.mode.startswith("I;16"):
            # PIL would clip 16-bit values at 255.
            image = Image.fromarray((np.asarray(image).astype(np.float32) / 257).round().astype(np.uint8))
        if image.mode in ("I", "F"):
            raise DataError(f"images of mode {image.mode!r} have no known range; convert them to 8 or 16 bits")
        with image_errors():
            image = image.convert({1: "L", 3: "RGB"}[self.channels])
            if self.size is not None and image.size != (self.size, self.size):
                image = getattr(self, f"_{self.fit}")(image)
            array = np.asarray(image)
            array = array[None] if array.ndim == 2 else array.transpose(2, 0, 1)
            return torch.from_numpy(array.astype(np.float32) / 255)

    def _resize(self, image: Image.Image) -> Image.Image:
        return image.resize((self.size, self.size), Image.Resampling.BICUBIC)

    def _crop(self, image: Image.Image) -> Image.Image:
        scale = self.size / min(image.size)
        width, height = (max(self.size, round(side * scale)) for side in image.size)
        if width * height > MAX_PIXELS:
            # A strip of one pixel times 65,535 would grow to gigabytes before it is cropped.
            given = "x".join(map(str, image.size))
            raise DataError(f"fit 'crop' would enlarge {given} to {width}x{height} pixels; leave the image out")
        left, top = (width - self.size) // 2, (height - self.size) // 2
        image = image.resize((width, height), Image.Resampling.BICUBIC)
        return image.crop((left, top, left + self.size, top + self.size))

    def _pad(self, image: Image.Image) -> Image.Image:
        width, height = image.size
        if max(width, height) > self.size:
            raise DataError(f"fit 'pad' cannot bring {width}x{height} pixels to {self.size}; use 'resize' or 'crop'")
        canvas = Image.new(image.mode, (self.size, self.size))
        canvas.paste(image, ((self.size - width) // 2, (self.size - height) // 2))
        return canvas


class Reader(Protocol):
    """One split of a source of images. Integers index it; ids never change between runs or machines.

    Labels are (n,) integers, or (n, L) of 0 and 1 where a sample has several.
    """

    ids: list[str]
    labels: np.ndarray | None

    def image(self, index: int) -> Image.Image:
        """Reads one image; raises DataError naming it when it cannot be decoded."""

    def fingerprint(self) -> list[object]:
        """Names and sizes that change when the files do."""


@contextmanager
def image_errors() -> Iterator[None]:
    """Turns whatever PIL raises into a DataError.

    On damaged files its plugins raise about any kind: struct.error, IndexError, KeyError, OverflowError, MemoryError.
    """
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        # PIL names an open file by its address, which says nothing and differs from run to run.
        reason = "not an image" if isinstance(error, UnidentifiedImageError) else error
        raise DataError(f"cannot read the image: {reason or type(error).__name__}") from error


def decode(source: Path | BinaryIO, upright: bool = False) -> Image.Image:
    """Reads an image file, the first frame where there are several.

    Args:
        source: The file.
        upright: Turn the image as its EXIF orientation says.

    Raises:
        DataError: It is damaged, cut off, in none of `FORMATS`, or larger than `MAX_PIXELS` or `MAX_SIDE`.
    """
    with image_errors():
        image = _open(source)
        if image.format == "PNG":
            _check_png(image.fp)
        image.load()
        if upright and image.getexif().get(ExifTags.Base.Orientation) is not None:
            image = ImageOps.exif_transpose(image)
        return image


def size_of(file: Path) -> tuple[int, int]:
    """Returns (H, W) of an image file, from its header.

    Raises:
        DataError: As `decode` for what the header shows.
    """
    with image_errors(), _open(file) as image:
        return image.height, image.width


def _open(source: Path | BinaryIO) -> Image.Image:
    image = Image.open(source, formats=list(FORMATS))
    width, height = image.size
    if not 0 < width * height <= MAX_PIXELS or max(width, height) > MAX_SIDE:
        limits = f"{MAX_PIXELS:,} pixels and sides of {MAX_SIDE:,}"
        raise DataError(f"cannot read the image: its size is {width}x{height}; at most {limits} are decoded")
    return image


def _check_png(file: BinaryIO) -> None:
    """Compares the packed pixels with their checksums, which PIL reads past: it would show other pixels."""
    place, known = file.tell(), file.seek(8)
    while len(head := file.read(8)) == 8:
        length, name = struct.unpack(">I4s", head)
        known += length + 12
        if name == b"IDAT":
            content, told = file.read(length), file.read(4)
            if len(told) < 4 or zlib.crc32(content, zlib.crc32(name)) != int.from_bytes(told):
                raise DataError("cannot read the image: its pixels do not fit their checksum")
        elif name == b"IEND":
            break
        file.seek(known)
    file.seek(place)


def check_text(name: str) -> None:
    """Checks that a file's name can be part of an id.

    Raises:
        DataError: It is not UTF-8.
    """
    try:
        name.encode()
    except UnicodeEncodeError:
        raise DataError(f"the name {name!r} is not UTF-8, and ids are; rename it") from None


class RowsReader:
    """Some rows of another reader, in ascending order."""

    def __init__(self, reader: Reader, rows: np.ndarray):
        self.reader, self.rows = reader, rows
        self.ids = [reader.ids[row] for row in rows]
        self.labels = None if reader.labels is None else reader.labels[rows]

    def image(self, index: int) -> Image.Image:
        """Reads one image."""
        return self.reader.image(int(self.rows[index]))

    def fingerprint(self) -> list[object]:
        """Returns what identifies the whole, and a digest of the rows."""
        return [*self.reader.fingerprint(), hashlib.sha256(self.rows.tobytes()).hexdigest()[:16]]


@dataclass
class ImageSet(Dataset):
    """Images of one or several splits, one after another.

    Indexing gives (C, H, W) fp32 in [0, 1].

    Attributes:
        readers: One reader for each split, in order.
        transform: Applied to every image.
        classes: Class names in the order of the label numbers, when the source has them.
        limit: First n samples of each split; a dict limits splits by name.
    """

    readers: dict[str, Reader]
    transform: Transform
    classes: list[str] | None = None
    limit: int | dict[str, int] | None = None
    splits: dict[str, range] = field(init=False)

    def __post_init__(self):
        if isinstance(self.limit, dict):
            for name in self.limit:
                if name not in self.readers:
                    raise UnknownNameError("split in data.limit", name, self.readers)
        self.splits, start = {}, 0
        for name, reader in self.readers.items():
            limit = self.limit.get(name) if isinstance(self.limit, dict) else self.limit
            count = min(len(reader.ids), limit or len(reader.ids))
            self.splits[name] = range(start, start + count)
            start += count
        if start == 0:
            raise DataError("the data set holds no images")
        shapes = set()
        for name, reader in self.readers.items():
            if reader.labels is not None:
                if reader.labels.dtype.kind not in "iu" or reader.labels.ndim not in (1, 2):
                    raise DataError(f"the labels of split {name!r} are {reader.labels.dtype}; they must be integers")
                shapes.add(reader.labels.shape[1:])
                several = reader.labels.ndim == 2
                found = reader.labels.shape[1] if several else int(reader.labels.max(initial=-1)) + 1
                if self.classes and (found > len(self.classes) or several and found < len(self.classes)):
                    raise DataError(
                        f"split {name!r} has labels of {found} classes, and {len(self.classes)} have names"
                    )
        if len(shapes) > 1:
            raise DataError(f"the splits differ in the number of labels a sample has: {sorted(shapes)}")

    def __len__(self) -> int:
        return sum(len(rows) for rows in self.splits.values())

    def __getitem__(self, index: int) -> torch.Tensor:
        reader, row = self._locate(index)
        try:
            return self.transform(reader.image(row))
        except DataError as error:
            raise DataError(f"{reader.ids[row]}: {error}") from error

    def id(self, index: int) -> str:
        """Returns the id of a sample."""
        reader, row = self._locate(index)
        return reader.ids[row]

    @property
    def labelled(self) -> bool:
        """Whether every split has labels."""
        return all(reader.labels is not None for reader in self.readers.values())

    @property
    def multilabel(self) -> bool:
        """Whether a sample has several labels: a 0 or 1 for each class."""
        return self.labelled and next(iter(self.readers.values())).labels.ndim == 2

    def label(self, index: int) -> int | list[int]:
        """Returns the label of a sample of a labelled set; of a multi-label set, a 0 or 1 for each class."""
        reader, row = self._locate(index)
        return reader.labels[row].tolist()

    def subset(self, rows: Sequence[int]) -> ImageSet:
        """Returns the samples at some positions, in ascending order, with the ids and labels they have here.

        Args:
            rows: Positions; splits without any are left out.

        Raises:
            IndexError: A position does not exist.
            ConfigError: A position is named twice.
            DataError: There are none.
        """
        wanted = np.asarray(rows, dtype=np.int64)
        picked = np.unique(wanted)
        if len(picked) and not 0 <= picked[0] <= picked[-1] < len(self):
            raise IndexError(f"rows {picked[0]} to {picked[-1]} of {len(self)} samples")
        if len(picked) < len(wanted):
            raise ConfigError("the rows of a subset name a sample twice")
        readers = {}
        for name, places in self.splits.items():
            inside = picked[(picked >= places.start) & (picked < places.stop)] - places.start
            if len(inside):
                readers[name] = RowsReader(self.readers[name], inside)
        return ImageSet(readers, self.transform, self.classes)

    def fingerprint(self) -> str:
        """Returns a digest of the sources' file names and sizes, the splits, and how many samples are used of each."""
        parts = [(name, len(rows), self.readers[name].fingerprint()) for name, rows in self.splits.items()]
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]

    def _locate(self, index: int) -> tuple[Reader, int]:
        for name, rows in self.splits.items():
            if index in rows:
                return self.readers[name], index - rows.start
        raise IndexError(f"sample {index} of {len(self)}")


def pick_splits(available: list[str], wanted: tuple[str, ...] | None) -> list[str]:
    """Returns the wanted splits, or all of them.

    Raises:
        UnknownNameError: A wanted split is not available.
        ConfigError: A split is named twice.
    """
    if wanted is None:
        return available
    for name in wanted:
        if name not in available:
            raise UnknownNameError("split", name, available)
    if len(set(wanted)) != len(wanted):
        raise ConfigError(f"data.splits names a split twice: {list(wanted)}")
    return list(wanted)
