"""Streamed sets: WebDataset shards and HF parquet files, local or on object storage, read one after another.

Nothing is listed but the shards' names, and nothing at all where a pattern gives these.
"""

from __future__ import annotations

import hashlib
import io
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from itertools import islice
from typing import TypeVar

import torch

from diffrep.config import DataConfig
from diffrep.data.images import Transform, decode, image_errors, pick_splits
from diffrep.data.listing import MISSING, find_shards, is_remote, open_file, open_storage
from diffrep.data.streams import (
    Columns,
    ReadFailed,
    Sample,
    Watched,
    find_columns,
    open_parquet,
    stream_parquet,
    stream_tar,
)
from diffrep.data.tars import find_splits
from diffrep.errors import ConfigError, DataError, DiffrepError

# Times that a shard is begun when its storage fails, and seconds before the second; they double.
TRIES, PAUSE = 3, 1.0
T = TypeVar("T")


class StorageError(DataError):
    """The storage of a set failed; its samples may be there at another time, so none counts as unreadable."""


class ShardSet:
    """Shards of one or several splits, one after another; how many samples they hold is not known.

    Args:
        root: What all shards' names are relative to: a folder or URL.
        splits: Of each split, its shards' names, and their sizes in bytes where these are known.
        kind: "webdataset" or "hf".
        transform: Applied to every image.
        image_key: As of `DataConfig`.
        label_key: As of `DataConfig`.

    Attributes:
        shards: Names, in the order of the splits, sorted in each.
        splits: Positions in `shards`, of each split.
    """

    def __init__(
        self,
        root: str,
        splits: dict[str, dict[str, int | None]],
        kind: str,
        transform: Transform,
        image_key: str | None = None,
        label_key: str | tuple[str, ...] | None = None,
    ):
        self.root, self.kind, self.transform = root, kind, transform
        self.image_key, self.label_key = image_key, label_key
        self.shards: list[str] = []
        self.sizes: list[int | None] = []
        self.splits: dict[str, range] = {}
        for split, shards in splits.items():
            self.splits[split] = range(len(self.shards), len(self.shards) + len(shards))
            self.shards += sorted(shards)
            self.sizes += [shards[name] for name in sorted(shards)]

    def samples(self, index: int, pause: Callable[[float], object] = time.sleep) -> Iterator[Sample]:
        """Gives the samples of a shard in order, those that cannot be used with the reason.

        Where a shard is damaged, or one that nobody has listed is missing, a last sample with the shard's name as id
        says so.

        Args:
            index: The shard's position.
            pause: Waits some seconds before a shard is begun anew.

        Raises:
            StorageError: The storage failed three times, or has lost the shard.
            ConfigError: A label is not an integer.
        """
        name = self.shards[index]
        labelled = next(self._labelled[split] for split, inside in self.splits.items() if index in inside)
        try:
            for sample in self._retried(index, self._stream, pause):
                yield self._checked(sample, labelled)
        except StorageError:
            raise
        except DataError as error:
            yield Sample(name, None, None, f"{name}: the shard {error}")

    def image(self, content: bytes) -> torch.Tensor:
        """Decodes a sample's image to (C, H, W) fp32 in [0, 1].

        Raises:
            DataError: It cannot be decoded.
        """
        # As the `datasets` package gives images; WebDataset's decoders leave them as they lie.
        image = decode(io.BytesIO(content), upright=self.kind == "hf")
        mode = self._columns.mode if self.kind == "hf" else None
        if mode is not None and image.mode != mode:
            with image_errors():
                image = image.convert(mode)
        return self.transform(image)

    @property
    def labelled(self) -> bool:
        """Whether every split has labels; the first sample of each tells."""
        return all(self._labelled.values())

    @property
    def multilabel(self) -> bool:
        """Whether a sample has several labels: a 0 or 1 for each class."""
        return self.kind == "hf" and len(self._columns.labels) > 1

    @property
    def classes(self) -> list[str] | None:
        """Class names in the order of the label numbers, when the source has them."""
        found = self._columns.classes if self.kind == "hf" else None
        return None if found is None else list(found)

    def fingerprint(self) -> str:
        """Returns a digest of the splits, the shards' names, their sizes where known, and what is read of them."""
        digest = hashlib.sha256(repr((self.kind, self.image_key, self.label_key)).encode())
        for split, inside in self.splits.items():
            digest.update(repr((split, len(inside))).encode())
            for i in inside:
                digest.update(repr((self.shards[i], self.sizes[i])).encode())
        return digest.hexdigest()[:16]

    def _stream(self, index: int, file: Watched) -> Iterator[Sample]:
        name = self.shards[index]
        if self.kind == "webdataset":
            return stream_tar(file, name, self.image_key, self.label_key)
        return stream_parquet(file, name, self._columns)

    def _retried(
        self,
        index: int,
        read: Callable[[int, Watched], Iterator[T]],
        pause: Callable[[float], object] = time.sleep,
        glance: bool = False,
    ) -> Iterator[T]:
        """Gives what `read` finds in a shard, each thing once, however often the storage fails on the way."""
        path, given, failure = f"{self.root}/{self.shards[index]}", 0, None
        for attempt in range(TRIES):
            if attempt:
                pause(PAUSE * 2 ** (attempt - 1))
            try:
                with _opened(path, self.sizes[index] is not None, glance, attempt > 0) as file:
                    for item in islice(read(index, file), given, None):
                        given += 1
                        yield item
                return
            except ReadFailed as error:
                failure = error
        raise StorageError(
            f"cannot read the shard {path}: {failure}; tried {TRIES} times. When the storage answers again, run again "
            "to go on"
        ) from failure

    def _checked(self, sample: Sample, labelled: bool) -> Sample:
        if sample.problem is None and (sample.label is not None) != labelled:
            has, first = ("no label", "one") if labelled else ("a label", "none")
            reason = f"{sample.id}: the sample has {has}, and the first of its split has {first}"
            return Sample(sample.id, None, None, reason)
        return sample if self.labelled else sample._replace(label=None)

    @cached_property
    def _labelled(self) -> dict[str, bool]:
        if self.kind == "hf":
            return dict.fromkeys(self.splits, bool(self._columns.labels))
        if self.label_key is not None:
            return dict.fromkeys(self.splits, True)
        found = {split: self._first(inside, self._stream) for split, inside in self.splits.items()}
        return {split: isinstance(first, Sample) and first.label is not None for split, first in found.items()}

    @cached_property
    def _columns(self) -> Columns:
        found = self._first(range(len(self.shards)), self._find_columns)
        if isinstance(found, Columns):
            return found
        raise DataError(f"no file of {self.root!r} holds images; of {self.shards[0]!r}: {found}")

    def _find_columns(self, index: int, file: Watched) -> Iterator[Columns]:
        yield find_columns(open_parquet(file).schema_arrow, self.image_key, self.label_key)

    def _first(self, shards: range, read: Callable[[int, Watched], Iterator[T]]) -> T | DataError | None:
        """Returns the first thing that `read` finds in one of the shards, or what is wrong with the first of them."""
        problem = None
        for index in shards:
            try:
                for found in self._retried(index, read, glance=True):
                    if not isinstance(found, Sample) or found.problem is None:
                        return found
            except StorageError:
                raise
            except DataError as error:
                problem = problem or error
        return problem


@contextmanager
def _opened(path: str, listed: bool, glance: bool, again: bool) -> Iterator[Watched]:
    try:
        file = open_file(path, glance, again)
    except MISSING as error:
        if listed:  # a disk or folder that vanished, and skipping would go on to the end of the set
            raise ReadFailed(f"{error}; it was there when the set was opened") from error
        raise DataError(f"is missing: {error}") from error
    except DiffrepError:
        raise
    except Exception as error:
        # A refusal by object storage often means that credentials have run out; that of a disk is the file's own.
        if isinstance(error, PermissionError) and not is_remote(path):
            raise DataError(f"cannot be opened: {error}") from error
        raise ReadFailed(str(error) or type(error).__name__) from error
    with file:
        yield Watched(file)


def open_shards(config: DataConfig, transform: Transform) -> ShardSet:
    """Opens a streamed set; see `DataConfig.stream`.

    Splits are told by the shards' names, as of sets that are not streamed.

    Raises:
        ConfigError: A setting does not go with streaming.
        BackendUnavailable: The package for the URL's protocol is not installed.
        DataError: Nothing is there, or a local shard is missing.
        UnknownNameError: A split does not exist.
    """
    if config.limit is not None:
        raise ConfigError(
            "data.limit counts samples, and nobody has counted those of a streamed set; name fewer shards, such as "
            "'name-{000..009}.tar', or set data.stream=false"
        )
    kind, root, sizes = find_shards(config.path, config.kind)
    if kind == "webdataset" and isinstance(config.label_key, tuple):
        raise ConfigError(f"data.label_key of shards is one key of their .json, given: {list(config.label_key)}")
    if is_remote(root):
        open_storage(root)
    splits = find_splits(sorted(sizes))
    wanted = pick_splits(list(splits), config.splits)
    chosen = {split: {name: sizes[name] for name in splits[split]} for split in wanted}
    return ShardSet(root, chosen, kind, transform, config.image_key, config.label_key)
