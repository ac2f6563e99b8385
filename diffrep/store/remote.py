"""Stores on object storage and other machines, through fsspec."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from fsspec.asyn import AsyncFileSystem
from fsspec.core import url_to_fs
from fsspec.spec import AbstractFileSystem

from diffrep.errors import StoreError
from diffrep.store.place import Buffer, Place, temporary_name

# One put of these is seen whole or not at all; the others need a move of their own.
OBJECT_STORES = {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "oss", "oci", "memory"}
# How those that have no exclusive put open a file that must not be there.
EXCLUSIVE_MODES = {"file": "xb", "local": "xb", "sftp": "wxb", "ssh": "wxb"}
# What changes when an object is written: no file system tells all of them.
STAMPS = ("ETag", "etag", "generation", "LastModified", "last_modified", "updated", "modified", "mtime", "created")


class RemotePlace(Place):
    """A folder that fsspec opens.

    A file is put in one call on object storage, from memory, and elsewhere gets a temporary name and is moved.

    Args:
        target: URL, such as "s3://bucket/store".

    Raises:
        StoreError: The protocol is unknown, or its package is not installed.
    """

    def __init__(self, target: str):
        super().__init__(target)
        self._opened: tuple[AbstractFileSystem, str] | None = None
        self._pid = 0
        self._exclusive = False
        _ = self._fs

    @property
    def _fs(self) -> AbstractFileSystem:
        # Connections do not survive a fork: each process makes its own.
        if self._opened is None or self._pid != os.getpid():
            try:
                self._opened = url_to_fs(self.target)
            except Exception as error:  # what a file system raises on the way to its server
                raise StoreError(f"cannot open {self.target}: {_reason(error)}") from error
            self._pid = os.getpid()
        return self._opened[0]

    @property
    def _puts(self) -> bool:
        return bool(OBJECT_STORES & _protocols(self._fs))

    def make(self, folder: str = "") -> None:
        """Makes the place, or a folder of it with those above; object storage has none."""
        if not self._puts:
            self._try("make", folder, lambda path: self._fs.makedirs(path, exist_ok=True))

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        """Returns a file, or its bytes from `start` to before `stop`."""
        if stop is not None and stop <= start:
            return b""
        span = {} if (start, stop) == (0, None) else {"start": start, "end": stop}
        return bytes(self._try("read", name, lambda path: self._fs.cat_file(path, **span)))

    def write(
        self, name: str, parts: Iterable[Buffer], token: str = "", still: Callable[[], bool] | None = None
    ) -> bool:
        """Writes a file: one put, or a temporary name and a move."""
        if self._puts:
            content = b"".join(parts)
            if still is not None and not still():
                return False
            self._try("write", name, lambda path: self._fs.pipe_file(path, content))
            return True
        if type(self._fs).mv is AbstractFileSystem.mv:
            raise StoreError(
                f"cannot write {self.where(name)}: of the file system {type(self._fs).__name__} it is not known that "
                f"a file appears whole; allowed are {', '.join(sorted(OBJECT_STORES))} and those that can move files"
            )
        return self._try("write", name, lambda path: self._move_in(path, name, parts, token, still))

    def create(self, name: str, content: bytes, whole: bool = False) -> bool:
        """Writes a file only if there is none, and tells whether it did."""
        if not self._exclusive:
            self._check_exclusive(temporary_name(name))
            self._exclusive = True
        return self._create(name, content)

    def size(self, name: str) -> int | None:
        """Returns the size of a file in bytes; None when missing."""
        info = self._info(name)
        return None if info is None else info["size"]

    def list(self, folder: str = "") -> list[str]:
        """Returns the names of the files directly in a folder."""
        return [name for name, info in self._scan(folder) if info["type"] != "directory"]

    def sizes(self, folder: str = "") -> dict[str, int]:
        """Returns the sizes in bytes of the files directly in a folder, by name."""
        return {name: info["size"] for name, info in self._scan(folder) if info["type"] != "directory"}

    def folders(self, folder: str = "") -> list[str]:
        """Returns the names of the folders directly in a folder."""
        return [name for name, info in self._scan(folder) if info["type"] == "directory"]

    def stamp(self, name: str) -> str | None:
        """Returns the size, and what the file system tells of the last write."""
        info = self._info(name)
        return None if info is None else " ".join(str(info[key]) for key in ("size", *STAMPS) if key in info)

    def touch(self, name: str) -> None:
        """Writes a file again with another number of spaces at its end, unless it is missing."""
        if self._info(name) is None:
            return
        content = self.read(name)
        text = content.rstrip(b" ")
        # Times of object storage are in seconds and its tags are digests of the content.
        spaces = (len(content) - len(text)) % 8 + 1
        self._try("write", name, lambda path: self._fs.pipe_file(path, text + b" " * spaces))

    def remove(self, name: str) -> None:
        """Removes a file; nothing happens when it is missing."""
        with suppress(FileNotFoundError):
            self._try("remove", name, lambda path: self._fs.rm_file(path), missing=True)

    def remove_folder(self, name: str) -> None:
        """Removes a folder with all that is in it; nothing happens when it is missing."""
        for inner in self.folders(name):
            self.remove_folder(f"{name}/{inner}")
        for file in self.list(name):
            self.remove(f"{name}/{file}")
        # Not an error where another process, at work in it, put a file there.
        with suppress(Exception):
            self._fs.rmdir(self._path(name))

    def file(self, name: str) -> Path | None:
        """Returns None: the file is not on this machine."""
        self.where(name)
        return None

    def free(self) -> int | None:
        """Returns None: nobody knows."""
        return None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None}

    def _path(self, name: str) -> str:
        self.where(name)
        root = self._opened[1] if self._fs is not None else ""
        return f"{root.rstrip('/')}/{name}" if name else root

    def _try(self, what: str, name: str, call: Callable[[str], Any], missing: bool = False) -> Any:
        """Calls the file system with a file's path; its errors, of many libraries, become StoreError."""
        path = self._path(name)
        try:
            return call(path)
        except FileNotFoundError as error:
            if missing:
                raise
            if what == "read":
                raise StoreError(f"{self.where(name)} is missing") from error
            raise self._cannot(what, name, error) from error
        except StoreError:  # of the parts of a file, or of who is asked about it
            raise
        except Exception as error:
            raise self._cannot(what, name, error) from error

    def _cannot(self, what: str, name: str, error: Exception) -> StoreError:
        return StoreError(
            f"cannot {what} {self.where(name)}: {_reason(error)}; finished units stay, run again to go on"
        )

    def _info(self, name: str) -> dict[str, Any] | None:
        self._fs.invalidate_cache()
        try:
            return self._try("read", name, lambda path: self._fs.info(path), missing=True)
        except FileNotFoundError:
            return None

    def _scan(self, folder: str) -> list[tuple[str, dict[str, Any]]]:
        self._fs.invalidate_cache()
        try:
            entries = self._try("list", folder, lambda path: self._fs.ls(path, detail=True), missing=True)
        except FileNotFoundError:
            return []
        # Object storage lists the marker of an empty folder among what is in it.
        here = self._path(folder).strip("/")
        return [
            (entry["name"].rstrip("/").rsplit("/", 1)[-1], entry)
            for entry in entries
            if entry["name"].strip("/") != here
        ]

    def _move_in(
        self, path: str, name: str, parts: Iterable[Buffer], token: str, still: Callable[[], bool] | None
    ) -> bool:
        temporary = self._path(temporary_name(name, token))
        try:
            self._make_parent(path)
            with self._fs.open(temporary, "wb") as file:
                for part in parts:
                    file.write(part)
            if still is not None and not still():
                self._fs.rm_file(temporary)
                return False
            self._fs.mv(temporary, path)
        except BaseException:
            with suppress(Exception):
                self._fs.rm_file(temporary)
            raise
        return True

    def _make_parent(self, path: str) -> None:
        parent = path.rsplit("/", 1)[0]
        # Never the place itself: one that vanished stays away.
        if parent.strip("/") != self._opened[1].strip("/") and not self._fs.isdir(parent):
            with suppress(FileExistsError):
                self._fs.mkdir(parent, create_parents=False)

    def _create(self, name: str, content: bytes) -> bool:
        mode = next((EXCLUSIVE_MODES[key] for key in _protocols(self._fs) if key in EXCLUSIVE_MODES), None)
        return self._try("write", name, lambda path: self._put(path, content, mode))

    def _put(self, path: str, content: bytes, mode: str | None) -> bool:
        try:
            if mode is None:
                self._fs.pipe_file(path, content, mode="create")
                return True
            self._make_parent(path)
            file = self._fs.open(path, mode)
        except Exception as error:
            # Not every file system says "exists" when it does.
            if isinstance(error, FileExistsError) or self._is_conflict(error) or (mode and self._fs.exists(path)):
                return False
            raise
        try:
            with file:
                file.write(content)
        except BaseException:
            with suppress(Exception):
                self._fs.rm_file(path)
            raise
        return True

    @staticmethod
    def _is_conflict(error: Exception) -> bool:
        answer = getattr(error.__cause__ or error, "response", None)
        code = answer.get("Error", {}).get("Code") if isinstance(answer, dict) else None
        return code in ("PreconditionFailed", "ConditionalRequestConflict")

    def _check_exclusive(self, probe: str) -> None:
        """Finds out whether the second of two that create a file is told so: some servers ignore the condition."""
        fs = self._fs
        own = fs._pipe_file if isinstance(fs, AsyncFileSystem) else fs.pipe_file
        known = own.__func__ is not AbstractFileSystem.pipe_file and "mode" in inspect.signature(own).parameters
        known = known or bool(_protocols(fs) & EXCLUSIVE_MODES.keys())
        try:
            if known and self._create(probe, b"{}") and not self._create(probe, b"{}"):
                return
        finally:
            if known:
                self.remove(probe)
        raise StoreError(
            f"{self.target}: its file system creates no file exclusively, so that two processes could take the same "
            "work; extract into a local folder or into s3, gs or abfs, and copy the finished store"
        )


def _protocols(fs: AbstractFileSystem) -> set[str]:
    return {fs.protocol} if isinstance(fs.protocol, str) else set(fs.protocol)


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__
