"""The samples of one shard in the order they lie there: tar files from the beginning on, parquet by row groups.

Nothing is known of a shard before it is read, and nothing is kept of what was read. Where a shard is damaged, the
samples before the damage are given, and then DataError is raised.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, BinaryIO, NamedTuple

from diffrep.data.images import EXTENSIONS
from diffrep.data.labels import label_columns
from diffrep.data.tars import MAX_IMAGE, MAX_TEXT, Header, find_image, label_part, part_name, read_label
from diffrep.errors import BackendUnavailable, ConfigError, DataError, DiffrepError

ROWS = 16  # that parquet decodes at a time
ENDS = 16  # empty reads, of which a whole file gives one or two


class Sample(NamedTuple):
    """A sample of a shard.

    Attributes:
        id: Its shard's name and its key or row.
        content: The image file's bytes; None where there is a problem.
        label: An integer, a 0 or 1 for each class, or None.
        problem: Why it cannot be used, beginning with the id; or None.
    """

    id: str
    content: bytes | None
    label: int | list[int] | None
    problem: str | None = None


class ReadFailed(Exception):
    """The storage did not answer: a failure of reading, not of what was read."""


class Watched:
    """A file whose failures to read are told apart from what its readers make of damaged contents.

    Args:
        file: Opened for reading.
    """

    mode = "rb"

    def __init__(self, file: BinaryIO):
        self._file = file
        self._empty = 0

    def read(self, size: int = -1) -> bytes:
        """Reads bytes.

        Raises:
            DataError: The end was met several times.
            ReadFailed: The storage failed.
        """
        try:
            found = self._file.read(size)
        except Exception as error:  # each storage's client has errors of its own
            raise ReadFailed(str(error) or type(error).__name__) from error
        self._empty += not found and size != 0
        if self._empty > ENDS:
            # To pass over a member, tarfile reads on to where its header says it ends, be it exabytes away.
            raise DataError("is cut off; fetch it again")
        return found

    def seek(self, offset: int, whence: int = 0) -> int:
        """Moves to a place.

        Raises:
            DataError: The storage gives files only from beginning to end.
        """
        try:
            return self._file.seek(offset, whence)
        except Exception as error:
            raise DataError(f"is given from beginning to end only, and parquet begins at its end: {error}") from error

    def tell(self) -> int:
        """Returns the place."""
        return self._file.tell()

    def close(self) -> None:
        """Leaves the file open, for it is the opener's."""

    @property
    def closed(self) -> bool:
        """Whether the file is closed."""
        return self._file.closed


@contextmanager
def _damage() -> Iterator[None]:
    try:
        yield
    except (ReadFailed, DiffrepError):
        raise
    except Exception as error:  # tarfile and pyarrow raise many kinds on damaged files
        raise DataError(f"cannot be read: {error or type(error).__name__}") from error


def stream_tar(file: Watched, shard: str, image_key: str | None, label_key: str | None) -> Iterator[Sample]:
    """Gives the samples of a WebDataset shard; ids are "shard/key". The parts of a sample lie together.

    Args:
        file: The tar file.
        shard: Its name.
        image_key: As of `read_tars`.
        label_key: As of `read_tars`, where the labels are integers.

    Raises:
        DataError: The shard is damaged or cut off.
        ConfigError: A label is a name or a list.
        ReadFailed: The storage failed.
    """
    seen: set[str] = set()
    current: _Parts | None = None
    try:
        with _damage(), tarfile.open(fileobj=file, mode="r|", tarinfo=Header) as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()
                found, problem = _part_of(member)
                if found is None:
                    continue
                key, extension = found
                if current is None or current.key != key:
                    if current is not None:
                        yield current.sample()
                    name = shard.removesuffix(".tar") + "/" + key
                    current = _Parts(key, name, image_key, label_key)
                    if key in seen:
                        current.id += f"#{len(seen)}"
                        problem = "the key came before; the parts of a sample must lie together"
                    seen.add(key)
                current.problem = current.problem or problem
                current.add(extension, member, tar)
            if not getattr(tar, "whole", False):
                where = f"after {current.id}" if current else "at its beginning"
                raise DataError(f"is cut off or damaged {where}; fetch it again")
    except DataError:
        if current is not None and current.has_image():
            yield current.sample()
        raise
    if current is not None:
        yield current.sample()


def _part_of(member: tarfile.TarInfo) -> tuple[tuple[str, str] | None, str | None]:
    try:
        return part_name(member), None
    except DataError as error:
        return (member.name.encode(errors="backslashreplace").decode(), ""), str(error)


@dataclass
class _Parts:
    """The parts of one sample that came so far; only the image and the label's part are held."""

    key: str
    id: str
    image_key: str | None
    label_key: str | None
    held: dict[str, bytes] = field(default_factory=dict)
    problem: str | None = None

    def add(self, extension: str, member: tarfile.TarInfo, tar: tarfile.TarFile) -> None:
        if self.problem is not None:
            return
        limit = self._limit(extension)
        if extension in self.held:
            self.problem = f"has two parts .{extension}; keys must be unique"
        elif member.size > limit > 0:
            self.problem = f"has a part .{extension} of {member.size:,} bytes, and at most {limit:,} are read"
        elif limit == MAX_IMAGE and self.has_image():
            self.held[extension] = b""  # one too many; `find_image` says so
        else:
            content = tar.extractfile(member).read() if limit else b""
            if limit and len(content) != member.size:
                raise DataError(f"is cut off in the member {member.name!r}; fetch it again")
            self.held[extension] = content

    def has_image(self) -> bool:
        return any(self._limit(extension) == MAX_IMAGE for extension in self.held)

    def sample(self) -> Sample:
        try:
            if self.problem is not None:
                raise DataError(self.problem)
            image = self.held[find_image(self.held, self.image_key, "the sample")]
            part = label_part(self.held, self.label_key, "the sample")
            label = None if part is None else read_label(self.held[part], self.label_key, "the label")
            return Sample(self.id, image, None if part is None else _whole_number(self.id, label))
        except DataError as error:
            return Sample(self.id, None, None, f"{self.id}: {error}")

    def _limit(self, extension: str) -> int:
        """Returns the most bytes that are read of a part; 0 for parts that are passed over."""
        if self.image_key is None:
            is_image = "." + extension.rpartition(".")[2] in EXTENSIONS
        else:
            is_image = extension == self.image_key.lower().lstrip(".")
        if is_image:
            return MAX_IMAGE
        return MAX_TEXT if extension == ("cls" if self.label_key is None else "json") else 0


def _whole_number(sample: str, label: Any) -> int:
    if isinstance(label, (str, list)):
        raise ConfigError(
            f"{sample}: its label is {str(label)[:60]!r}; labels of a streamed set are integers, for names and lists "
            "would have to be listed first. Name a key with integers in data.label_key, or read local shards with "
            "data.stream=false"
        )
    if type(label) is not int or label < 0:
        raise DataError(f"label {label!r} is not usable; labels are integers from 0 on")
    return label


@dataclass(frozen=True)
class Columns:
    """What is read of a parquet file.

    Attributes:
        image: Column of the image.
        leaf: The part of it that holds the file's bytes, "image.bytes", or the column itself.
        labels: Columns of the labels.
        classes: Class names, where the file has them.
        mode: Colour mode that the set wants its images in, or None.
    """

    image: str
    leaf: str
    labels: tuple[str, ...]
    classes: tuple[str, ...] | None
    mode: str | None


def open_parquet(file: Watched) -> Any:
    """Opens a parquet file.

    Raises:
        BackendUnavailable: pyarrow is not installed.
        DataError: It is none, or damaged.
        ReadFailed: The storage failed.
    """
    try:
        from pyarrow import parquet
    except ImportError:
        raise BackendUnavailable("parquet needs the pyarrow package: pip install 'diffrep[datasets]'") from None
    with _damage():
        return parquet.ParquetFile(file, pre_buffer=True)


def find_columns(schema: Any, image_key: str | None, label_key: str | tuple[str, ...] | None) -> Columns:
    """Finds the columns of an HF set's image and labels in a parquet schema.

    Args:
        schema: The pyarrow schema.
        image_key: Column of the image; None takes the first that holds images.
        label_key: Column or columns of the label; None takes "label" or the first class-label column.

    Raises:
        DataError: There is no image column.
        UnknownNameError: There is no such label column.
        ConfigError: A label column does not hold integers.
    """
    from pyarrow import types

    features = _features(schema)
    kinds = {f.name: f.type for f in schema}
    leaves = {name: name for name, kind in kinds.items() if types.is_binary(kind) or types.is_large_binary(kind)}
    leaves |= {
        name: f"{name}.bytes"
        for name, kind in kinds.items()
        if types.is_struct(kind) and "bytes" in {kind.field(i).name for i in range(kind.num_fields)}
    }
    marked = [name for name in leaves if features.get(name, {}).get("_type") == "Image"]
    image = image_key or next(iter(marked or leaves), None)
    if image not in leaves:
        raise DataError(f"no image column {image or ''}; columns: {list(kinds)}")
    guesses = [n for n in kinds if n == "label" or features.get(n, {}).get("_type") == "ClassLabel"]
    label_key = label_key or (guesses[0] if guesses else None)
    labels = [] if label_key is None else label_columns(label_key, kinds)
    for name in labels:
        if not (types.is_integer(kinds[name]) or types.is_boolean(kinds[name])):
            raise ConfigError(
                f"column {name!r} holds {kinds[name]}; labels of a streamed set are integers, or several columns of 0 "
                "and 1, for names and lists would have to be listed first"
            )
    names = labels if len(labels) > 1 else features.get(labels[0], {}).get("names") if labels else None
    classes = tuple(map(str, names)) if isinstance(names, list) and names else None
    return Columns(image, leaves[image], tuple(labels), classes, features.get(image, {}).get("mode"))


def _features(schema: Any) -> dict[str, dict[str, Any]]:
    """Returns what the `datasets` package noted: {"label": {"_type": "ClassLabel", "names": ["cat", "dog"]}}."""
    try:
        found = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
        return {name: dict(feature) for name, feature in found.items() if isinstance(feature, dict)}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}


def stream_parquet(file: Watched, shard: str, columns: Columns) -> Iterator[Sample]:
    """Gives the rows of a parquet file; ids are "shard#row".

    Args:
        file: The parquet file; it must be seekable.
        shard: Its name.
        columns: What to read; others are not fetched.

    Raises:
        DataError: The file is damaged, or has other columns.
        ReadFailed: The storage failed.
    """
    opened, row = open_parquet(file), 0
    try:
        found = find_columns(opened.schema_arrow, columns.image, columns.labels or None)
    except ConfigError as error:
        raise DataError(f"has other columns than the first: {error}") from error
    if found != columns:
        raise DataError(f"has other columns than the first: {found}, and there {columns}")
    wanted = [columns.leaf, *columns.labels]
    with _damage():
        for group in range(opened.metadata.num_row_groups):
            batches = opened.iter_batches(ROWS, row_groups=[group], columns=wanted, use_threads=False)
            for batch in batches:
                images = batch.column(columns.image)
                labels = [batch.column(name).to_pylist() for name in columns.labels]
                for i in range(batch.num_rows):
                    values = [int(column[i]) if column[i] is not None else None for column in labels]
                    yield _row(f"{shard}#{row}", images[i].as_py(), values, columns)
                    row += 1


def _row(name: str, image: Any, labels: list[int | None], columns: Columns) -> Sample:
    content = image["bytes"] if isinstance(image, dict) else image
    try:
        if content is None:
            raise DataError("the row holds no image; paths to other files are not followed")
        if len(content) > MAX_IMAGE:
            raise DataError(f"an image of {len(content):,} bytes, and at most {MAX_IMAGE:,} are read")
        if None in labels:
            raise DataError("the row has no label")
        if len(labels) > 1 and set(labels) - {0, 1}:
            raise DataError(f"the labels {labels}; several label columns hold 0 or 1")
        if labels and not labels[0] < (len(columns.classes) if columns.classes else 1 << 63):
            raise DataError(f"the label {labels[0]}, and {len(columns.classes or ())} classes have names")
    except DataError as error:
        return Sample(name, None, None, f"{name}: {error}")
    return Sample(name, content, labels if len(labels) > 1 else labels[0] if labels else None)
