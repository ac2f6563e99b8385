"""WebDataset shards: tar files whose members "key.extension" with the same key make a sample."""

from __future__ import annotations

import io
import itertools
import json
import os
import re
import tarfile
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from diffrep.data.folder import SPLIT_NAMES, files_below
from diffrep.data.images import EXTENSIONS, check_text, decode
from diffrep.data.labels import label_digest, number_labels
from diffrep.errors import DataError

# Where each part of a sample lies in its shard: extension -> (offset, bytes).
Parts = dict[str, tuple[int, int]]
BRACE = re.compile(r"\{([^{}]*)\}")
# An uncompressed image of images.MAX_PIXELS with four channels of 16 bits is smaller.
MAX_IMAGE = 1 << 30
# Labels, captions and embeddings of one sample; long names, of which tar makes members of its own.
MAX_TEXT = 1 << 24
EXTENSION_TYPES = frozenset({tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, *tarfile.GNU_TYPES})
EXTENSION_TYPES -= {tarfile.GNUTYPE_SPARSE}


class TarReader:
    """Samples of one split, in the order of the shards and of the samples in them.

    Args:
        shards: The tar files.
        ids: Sample ids.
        places: (n, 3) int64: position in `shards`, offset and size of each image.
        labels: (n,) or (n, L) int64, or None.
        names: The shards' names, for the fingerprint.
    """

    def __init__(
        self, shards: list[Path], ids: list[str], places: np.ndarray, labels: np.ndarray | None, names: list[str]
    ):
        self.shards, self.ids, self.places, self.labels, self.names = shards, ids, places, labels, names
        self._opened: tuple[int, BinaryIO] | None = None

    def image(self, index: int) -> Image.Image:
        """Reads one image out of its shard."""
        shard, offset, size = (int(value) for value in self.places[index])
        if size > MAX_IMAGE:
            raise DataError(f"cannot read the image: {size:,} bytes, and at most {MAX_IMAGE:,} are decoded")
        try:
            # pread moves no shared file position, so threads and forked workers do not disturb each other. The name
            # keeps the file open while another thread turns to the next shard.
            file = self._open(shard)
            content = os.pread(file.fileno(), size, offset)
        except OSError as error:
            raise DataError(f"cannot read the shard {self.shards[shard]}: {error}") from error
        return decode(io.BytesIO(content))

    def fingerprint(self) -> list[object]:
        """Returns (name, bytes) of every shard and a digest of the labels."""
        sizes = [(name, shard.stat().st_size) for name, shard in zip(self.names, self.shards, strict=True)]
        return [*sizes, label_digest(self.labels)]

    def _open(self, shard: int) -> BinaryIO:
        opened = self._opened
        if opened is None or opened[0] != shard:
            # The last shard stays open: reading in order opens each once.
            opened = self._opened = (shard, open(self.shards[shard], "rb"))  # noqa: SIM115
        return opened[1]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None}


def read_tars(
    given: str, image_key: str | None, label_key: str | None
) -> tuple[dict[str, TarReader], list[str] | None]:
    """Indexes WebDataset shards.

    A sample's id is its key, the member's path up to the first dot of the file name; where a key comes in two shards,
    every id begins with its shard's name: "train-000/0001". A shard's split is a part of its name or of a folder's,
    "train-000.tar", "set-val-3.tar", "test/000.tar"; shards that name none make the split "all".

    Args:
        given: A folder of `.tar` files, one file, or a pattern such as "name-{000..011}.tar".
        image_key: Extension of the image; None takes the one part of a sample that is an image.
        label_key: Key of the label in the sample's `.json`: integers, names, or lists of these. None takes the integer
            of `.cls`, where there is one.

    Returns:
        A reader for each split, and the class names or None.

    Raises:
        DataError: A shard is missing or damaged, or a sample has no image, no label, or a part twice.
    """
    root, names = _find_shards(given)
    splits = find_splits(names)
    found = {name: _index(root / name, image_key, label_key) for name in names}
    keys = Counter(itertools.chain.from_iterable(samples for samples, _, _ in found.values()))
    if not keys:
        raise DataError(f"no samples in {given!r}")
    prefixed = max(keys.values()) > 1
    ids, places, values = {}, {}, {}
    for split, inside in splits.items():
        ids[split] = [f"{n.removesuffix('.tar')}/{key}" if prefixed else key for n in inside for key in found[n][0]]
        places[split] = [(i, *place) for i, name in enumerate(inside) for place in found[name][1]]
        values[split] = [value for name in inside for value in found[name][2]]
    labels, classes = _number(ids, values)
    return {
        split: TarReader(
            [root / name for name in inside],
            ids[split],
            np.array(places[split], dtype=np.int64).reshape(-1, 3),
            labels[split],
            inside,
        )
        for split, inside in splits.items()
    }, classes


def _find_shards(given: str) -> tuple[Path, list[str]]:
    path = Path(given).expanduser()
    if path.is_dir():
        names = files_below(path, {".tar"})
        if not names:
            raise DataError(f"no .tar file in {given!r} at any depth")
        return path, names
    files = expand(str(path))
    for file in files:
        if not Path(file).is_file():
            raise DataError(f"there is no shard {file!r}; data.path is a folder, a .tar or 'name-{{000..011}}.tar'")
    root = os.path.commonpath([os.path.dirname(os.path.abspath(file)) for file in files])
    return Path(root), [Path(os.path.abspath(file)).relative_to(root).as_posix() for file in files]


def expand(pattern: str) -> list[str]:
    """Expands the braces of a shell: "{000..011}" and "{a,b}"."""
    brace = BRACE.search(pattern)
    if brace is None:
        return [pattern]
    numbers = re.fullmatch(r"(\d+)\.\.(\d+)", brace[1])
    if numbers:
        first, last = numbers.groups()
        choices = [str(n).zfill(len(first)) for n in range(int(first), int(last) + 1)]
    else:
        choices = brace[1].split(",")
    if not choices or len(choices) == 1 and not numbers:
        raise DataError(f"cannot expand '{brace[0]}' in {pattern!r}; write {{000..011}} or {{a,b}}")
    return [pattern[: brace.start()] + choice + rest for choice in choices for rest in expand(pattern[brace.end() :])]


def find_splits(names: list[str]) -> dict[str, list[str]]:
    """Sorts shards into the splits that their names tell, or into one, "all".

    Raises:
        DataError: Some tell one, and others none.
    """
    of = {name: _split_of(name) for name in names}
    splits = {split: [name for name in names if of[name] == split] for split in SPLIT_NAMES if split in of.values()}
    without = [name for name in names if of[name] is None]
    if splits and without:
        raise DataError(
            f"the shards {without[:3]} name no split, and others name {list(splits)}; move them away or give a "
            "pattern such as 'train-{000..011}.tar'"
        )
    return splits or {"all": names}


def _split_of(name: str) -> str | None:
    for part in name.removesuffix(".tar").split("/"):
        words = set(re.split(r"[^a-z]+", part.lower())) & set(SPLIT_NAMES)
        if len(words) == 1:
            return words.pop()
    return None


def _index(
    shard: Path, image_key: str | None, label_key: str | None
) -> tuple[list[str], list[tuple[int, int]], list[Any]]:
    """Returns the keys of a shard, where their images lie, and their labels, None without one."""
    samples = _list_samples(shard)
    places, labels = [], []
    with open(shard, "rb") as file:
        for key, parts in samples.items():
            where = f"sample {key!r} of {shard}"
            places.append(parts[find_image(parts, image_key, where)])
            part = label_part(parts, label_key, where)
            content = None if part is None else _read_text(file, *parts[part], where)
            labels.append(None if content is None else read_label(content, label_key, where))
    return list(samples), places, labels


def _read_text(file: BinaryIO, offset: int, size: int, where: str) -> bytes:
    if size > MAX_TEXT:
        raise DataError(f"{where}: its label lies in a part of {size:,} bytes, and at most {MAX_TEXT:,} are read")
    file.seek(offset)
    return file.read(size)


class Header(tarfile.TarInfo):
    """The header of a member of an untrusted tar file; `whole` of the TarFile becomes True at its proper end."""

    @classmethod
    def frombuf(cls, buf: bytes, encoding: str, errors: str) -> Header:
        """Reads a header.

        Raises:
            tarfile.ReadError: A size is negative, or that of a header's extension, which tarfile holds in memory.
        """
        header = super().frombuf(buf, encoding, errors)
        if header.size < 0 or header.type in EXTENSION_TYPES and header.size > MAX_TEXT:
            raise tarfile.ReadError(f"a header of {header.size} bytes")
        return header

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> Header:
        """Reads the next header."""
        try:
            header = super().fromtarfile(tar)
        except tarfile.EOFHeaderError:
            # To tarfile a damaged header is an end too.
            tar.whole = True
            raise
        if header.size < 0:  # by an extension
            raise tarfile.ReadError(f"a member of {header.size} bytes")
        return header


def part_name(member: tarfile.TarInfo) -> tuple[str, str] | None:
    """Returns a member's key and extension, and None for what is no part of a sample: folders, links, devices.

    Raises:
        DataError: The name is absolute, has "..", or is not UTF-8; or the member has holes.
    """
    if not member.isreg():
        return None
    name = member.name.removeprefix("./")
    if name.startswith("/") or ".." in name.split("/"):
        raise DataError(f"the member {member.name!r} has a name that points outside; pack the shard anew")
    check_text(name)
    folder, _, file = name.rpartition("/")
    stem, _, extension = file.partition(".")
    # Names in double underscores belong to the format, such as "__worker__".
    if not (stem and extension) or stem.startswith("__"):
        return None
    if member.issparse():
        raise DataError(f"the member {member.name!r} is a sparse file, which is not read; pack the shard anew")
    return (f"{folder}/{stem}" if folder else stem), extension.lower()


def _list_samples(shard: Path) -> dict[str, Parts]:
    samples: dict[str, Parts] = {}
    try:
        with tarfile.open(shard, "r:", tarinfo=Header) as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # which nobody needs again
                found = part_name(member)
                if found is None:
                    continue
                key, extension = found
                parts = samples.setdefault(key, {})
                if extension in parts:
                    raise DataError(f"sample {key!r} of {shard} has two parts .{extension}; keys must be unique")
                parts[extension] = (member.offset_data, member.size)
            whole = getattr(tar, "whole", False)
    except (OSError, tarfile.TarError, EOFError, ValueError) as error:
        raise DataError(f"the shard {shard} cannot be read: {error}") from error
    if not whole:
        raise DataError(f"the shard {shard} is cut off or damaged after {len(samples)} samples; fetch it again")
    return samples


def find_image(parts: Collection[str], image_key: str | None, where: str) -> str:
    """Returns which part of a sample is its image.

    Raises:
        DataError: None is, or several are.
    """
    if image_key is not None:
        found = [image_key.lower().lstrip(".")] if image_key.lower().lstrip(".") in parts else []
    else:
        found = [name for name in parts if "." + name.rpartition(".")[2] in EXTENSIONS]
    if not found:
        wanted = f".{image_key}" if image_key else "image"
        raise DataError(f"{where} has no {wanted}; it holds {', '.join('.' + name for name in parts)}")
    if len(found) > 1:
        raise DataError(f"{where} has several images, {found}; choose one with data.image_key={found[0]}")
    return found[0]


def label_part(parts: Collection[str], label_key: str | None, where: str) -> str | None:
    """Returns which part of a sample holds its label, None without one.

    Raises:
        DataError: A key is looked for, and there is no `.json`.
    """
    if label_key is None:
        return "cls" if "cls" in parts else None
    if "json" not in parts:
        raise DataError(f"{where} has no .json; data.label_key={label_key} looks there")
    return "json"


def read_label(content: bytes, label_key: str | None, where: str) -> Any:
    """Reads a label out of the content of `.cls`, or by its key out of that of `.json`.

    Raises:
        DataError: It is not there, or not what it should be.
    """
    try:
        label = found = int(content) if label_key is None else json.loads(content)
    except (ValueError, RecursionError):
        what = ".cls holds {!r}, no integer" if label_key is None else ".json holds {!r}, no JSON"
        raise DataError(f"{where}: {what.format(content[:40])}") from None
    if label_key is not None:
        if not isinstance(found, dict) or label_key not in found:
            holds = f"the keys {list(found)}" if isinstance(found, dict) else type(found).__name__
            raise DataError(f"{where}: its .json has no {label_key!r}; it holds {holds}")
        label = found[label_key]
    if any(isinstance(value, int) and abs(value) >= 1 << 63 for value in (label if type(label) is list else [label])):
        raise DataError(f"{where}: a label of more than 64 bits")
    return label


def _number(
    ids: dict[str, list[str]], values: dict[str, list[Any]]
) -> tuple[dict[str, np.ndarray | None], list[str] | None]:
    """Numbers the labels of all splits together, so that a class has the same number in each."""
    labels: dict[str, np.ndarray | None] = dict.fromkeys(ids)
    labelled = [split for split in ids if any(value is not None for value in values[split])]
    if not labelled:
        return labels, None
    names = [name for split in labelled for name in ids[split]]
    together = [value for split in labelled for value in values[split]]
    if None in together:
        raise DataError(f"sample {names[together.index(None)]!r} has no label, and others of its split have one")
    numbers, classes = number_labels(together, lambda i: f"sample {names[i]!r}")
    ends = np.cumsum([len(ids[split]) for split in labelled])
    return labels | dict(zip(labelled, np.split(numbers, ends[:-1]), strict=True)), classes
