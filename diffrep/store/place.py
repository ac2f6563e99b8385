"""Where a store lies: a local folder, or whatever fsspec opens ("s3://bucket/store", "memory://x")."""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import TypeAlias

from diffrep.errors import StoreError

Buffer: TypeAlias = bytes | bytearray | memoryview
# What file systems without hard links answer to os.link.
NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)
# What `temporary_name` gives; network file systems have hidden files of their own.
TEMPORARY = re.compile(r"\.[^.].*\.[0-9a-f]{16}")
# A process that ends a job may remove a folder or a temporary file that another one has just made.
TRIES = 5


def open_place(target: str | Path) -> Place:
    """Returns the place that a path or URL names; nothing is made there, and nothing read.

    Raises:
        StoreError: The URL's protocol is unknown, or its package is not installed.
    """
    if isinstance(target, str) and ("://" in target or "::" in target):
        from diffrep.store.remote import RemotePlace

        return RemotePlace(target)
    return LocalPlace(target)


class Place(ABC):
    """A folder of files that are seen whole or not at all.

    Names are relative POSIX names inside the place, such as "units/0000/0000123.json". Every method raises StoreError
    when the place answers with an error, or when a name points outside.

    Attributes:
        target: The path or URL.
        name: Its last part.
    """

    def __init__(self, target: str):
        self.target = target
        self.name = target.rstrip("/").rsplit("/", 1)[-1]

    @abstractmethod
    def make(self, folder: str = "") -> None:
        """Makes the place, or a folder of it with those above; nothing happens when it is there."""

    @abstractmethod
    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        """Returns a file, or its bytes from `start` to before `stop`; fewer where it ends earlier.

        Raises:
            StoreError: The file is missing, or cannot be read.
        """

    @abstractmethod
    def write(
        self, name: str, parts: Iterable[Buffer], token: str = "", still: Callable[[], bool] | None = None
    ) -> bool:
        """Writes a file whole or not at all, in place of one that is there.

        Its own folder is made when missing, those above are not: a place that vanished stays away.

        Args:
            name: The file.
            parts: Its content.
            token: End of the temporary name, ".{file}.{token}"; random when empty.
            still: Asked when all is written and before it is seen; a no leaves nothing behind.

        Returns:
            Whether it was written.

        Raises:
            StoreError: It cannot be written; nothing of it stays.
        """

    @abstractmethod
    def create(self, name: str, content: bytes, whole: bool = False) -> bool:
        """Writes a file only if there is none, and tells whether it did; of several that try at once one does.

        Args:
            name: The file; its folder is made as in `write`.
            content: What stands in it.
            whole: Nobody sees a part of it, and it survives a crash of the machine. Without, that is not promised of
                local folders, and it takes fewer calls.

        Raises:
            StoreError: It cannot be written, or the file system does not create exclusively.
        """

    @abstractmethod
    def size(self, name: str) -> int | None:
        """Returns the size of a file in bytes; None when missing."""

    @abstractmethod
    def list(self, folder: str = "") -> list[str]:
        """Returns the names of the files directly in a folder, hidden ones too; none when it is missing."""

    @abstractmethod
    def sizes(self, folder: str = "") -> dict[str, int]:
        """Returns the sizes in bytes of the files directly in a folder, by name."""

    @abstractmethod
    def folders(self, folder: str = "") -> list[str]:
        """Returns the names of the folders directly in a folder."""

    @abstractmethod
    def stamp(self, name: str) -> str | None:
        """Returns what changes whenever the file is written or touched; None when missing."""

    @abstractmethod
    def touch(self, name: str) -> None:
        """Changes the stamp of a file and nothing else, unless it is missing."""

    @abstractmethod
    def remove(self, name: str) -> None:
        """Removes a file; nothing happens when it is missing."""

    @abstractmethod
    def remove_folder(self, name: str) -> None:
        """Removes a folder with all that is in it; nothing happens when it is missing."""

    @abstractmethod
    def file(self, name: str) -> Path | None:
        """Returns the file's local path, which can be mapped; None elsewhere."""

    @abstractmethod
    def free(self) -> int | None:
        """Returns how many bytes are free; None where nobody knows."""

    def where(self, name: str = "") -> str:
        """Returns the path or URL of a file or folder, for messages.

        Raises:
            StoreError: The name points outside the place.
        """
        if name.startswith("/") or ".." in name.split("/"):
            raise StoreError(f"{name!r} points outside {self.target}; a name inside it is wanted, without '..'")
        return f"{self.target.rstrip('/')}/{name}" if name else self.target

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.target!r})"


def temporary_name(name: str, token: str = "") -> str:
    """Returns the hidden name that a file has while it is written, beside its own."""
    folder, slash, file = name.rpartition("/")
    return f"{folder}{slash}.{file}.{token or secrets.token_hex(8)}"


def is_temporary(file: str) -> bool:
    """Tells whether a file's name, without its folder, is a temporary one."""
    return TEMPORARY.fullmatch(file) is not None


class LocalPlace(Place):
    """A folder of this machine or of a file system that it mounts."""

    def __init__(self, target: str | Path):
        super().__init__(str(target))
        self.path = Path(target)
        self._root = str(self.path)

    def make(self, folder: str = "") -> None:
        """Makes the place, or a folder of it with those above."""
        path = Path(self._path(folder))
        if path.is_dir():
            return
        try:
            missing = [above for above in (path, *path.parents) if not above.exists()]
            path.mkdir(parents=True, exist_ok=True)
            for above in missing:
                _sync_folder(above.parent)
        except OSError as error:
            raise self._cannot("make", folder, error) from error

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        """Returns a file, or its bytes from `start` to before `stop`."""
        try:
            with open(self._path(name), "rb") as file:
                file.seek(start)
                return file.read(-1 if stop is None else max(0, stop - start))
        except FileNotFoundError as error:
            raise StoreError(f"{self.where(name)} is missing") from error
        except OSError as error:
            raise StoreError(f"cannot read {self.where(name)}: {error.strerror or error}") from error

    def write(
        self, name: str, parts: Iterable[Buffer], token: str = "", still: Callable[[], bool] | None = None
    ) -> bool:
        """Writes a file: temporary name, fsync, rename, fsync of the folder."""
        path, temporary = self._path(name), self._path(temporary_name(name, token))
        tries = TRIES if isinstance(parts, list) else 1
        try:
            while True:
                self._fill(temporary, parts, os.O_TRUNC, sync=True)
                if still is not None and not still():
                    os.unlink(temporary)
                    return False
                try:
                    os.replace(temporary, path)
                    break
                except FileNotFoundError:
                    tries -= 1
                    if not tries:
                        raise
            _sync_folder(os.path.dirname(path))
        except BaseException as error:
            with suppress(OSError):
                os.unlink(temporary)
            if not isinstance(error, OSError):
                raise
            raise self._cannot("write", name, error) from error
        return True

    def create(self, name: str, content: bytes, whole: bool = False) -> bool:
        """Writes a file only if there is none, and tells whether it did."""
        path = self._path(name)
        try:
            return self._link(path, name, content) if whole else self._fill(path, [content], os.O_EXCL)
        except OSError as error:
            raise self._cannot("write", name, error) from error

    def size(self, name: str) -> int | None:
        """Returns the size of a file in bytes; None when missing."""
        status = self._status(name)
        return None if status is None else status.st_size

    def list(self, folder: str = "") -> list[str]:
        """Returns the names of the files directly in a folder."""
        return [entry.name for entry in self._scan(folder) if not entry.is_dir(follow_symlinks=False)]

    def sizes(self, folder: str = "") -> dict[str, int]:
        """Returns the sizes in bytes of the files directly in a folder, by name."""
        found = {}
        for entry in self._scan(folder):
            if not entry.is_dir(follow_symlinks=False):
                with suppress(FileNotFoundError):  # removed since the folder was read
                    found[entry.name] = entry.stat().st_size
        return found

    def folders(self, folder: str = "") -> list[str]:
        """Returns the names of the folders directly in a folder."""
        return [entry.name for entry in self._scan(folder) if entry.is_dir(follow_symlinks=False)]

    def stamp(self, name: str) -> str | None:
        """Returns the time of the last write or touch, as the file system tells it, and the size."""
        status = self._status(name)
        return None if status is None else f"{status.st_mtime_ns}-{status.st_size}"

    def touch(self, name: str) -> None:
        """Changes the stamp of a file and nothing else, unless it is missing."""
        try:
            os.utime(self._path(name))
        except FileNotFoundError:
            pass
        except OSError as error:
            raise self._cannot("write", name, error) from error

    def remove(self, name: str) -> None:
        """Removes a file; nothing happens when it is missing."""
        try:
            os.unlink(self._path(name))
        except FileNotFoundError:
            pass
        except OSError as error:
            raise self._cannot("remove", name, error) from error

    def remove_folder(self, name: str) -> None:
        """Removes a folder with all that is in it; nothing happens when it is missing."""
        for inner in self.folders(name):
            self.remove_folder(f"{name}/{inner}")
        for file in self.list(name):
            self.remove(f"{name}/{file}")
        try:
            os.rmdir(self._path(name))
        except OSError as error:
            # Another process, at work in it, put a file there.
            if error.errno not in (errno.ENOENT, errno.ENOTEMPTY, errno.EEXIST):
                raise self._cannot("remove", name, error) from error

    def file(self, name: str) -> Path | None:
        """Returns the file's path."""
        return Path(self._path(name))

    def free(self) -> int | None:
        """Returns how many bytes are free for this user."""
        here = self.path.absolute()
        with suppress(OSError):
            return shutil.disk_usage(next(path for path in (here, *here.parents) if path.exists())).free
        return None

    def _path(self, name: str) -> str:
        self.where(name)
        return f"{self._root}/{name}"

    def _fill(self, path: str, parts: Iterable[Buffer], flag: int, sync: bool = False) -> bool:
        """Writes a new file; False when it is there and `flag` is O_EXCL. What could not be filled is removed."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | flag
        try:
            handle = self._open(path, flags)
        except FileExistsError:
            return False
        try:
            for part in parts:
                view = memoryview(part).cast("B")
                while view:
                    view = view[os.write(handle, view) :]
            if sync:
                os.fsync(handle)
        except BaseException:
            with suppress(OSError):
                os.unlink(path)
            raise
        finally:
            os.close(handle)
        return True

    def _open(self, path: str, flags: int) -> int:
        for _ in range(TRIES):
            try:
                return os.open(path, flags, 0o666)
            except FileNotFoundError:
                # Only its folder: a store whose file system was unmounted would go on in the empty mount point.
                folder = os.path.dirname(path)
                if folder == self._root:
                    raise
                with suppress(FileExistsError):
                    os.mkdir(folder)
                    _sync_folder(os.path.dirname(folder))
        return os.open(path, flags, 0o666)

    def _link(self, path: str, name: str, content: bytes) -> bool:
        temporary = self._path(temporary_name(name))
        try:
            self._fill(temporary, [content], os.O_EXCL, sync=True)
            try:
                os.link(temporary, path)
            except FileExistsError:
                # A network file system that repeats a call whose answer got lost finds its own link.
                return os.stat(temporary).st_nlink == 2
            except OSError as error:
                if error.errno not in NO_LINKS:
                    raise
                return self._fill(path, [content], os.O_EXCL, sync=True)
            _sync_folder(os.path.dirname(path))
            return True
        finally:
            with suppress(OSError):
                os.unlink(temporary)

    def _scan(self, folder: str) -> list[os.DirEntry[str]]:
        try:
            with os.scandir(self._path(folder)) as entries:
                return list(entries)
        except FileNotFoundError:
            return []
        except OSError as error:
            raise self._cannot("list", folder, error) from error

    def _status(self, name: str) -> os.stat_result | None:
        try:
            return os.stat(self._path(name))
        except FileNotFoundError:
            return None
        except OSError as error:
            raise self._cannot("read", name, error) from error

    def _cannot(self, what: str, name: str, error: OSError) -> StoreError:
        reason = error.strerror or str(error)
        if error.errno == errno.ENOENT and not self.path.exists():
            reason = "the store is not there any more"
        return StoreError(f"cannot {what} {self.where(name)}: {reason}; finished units stay, run again to go on")


def _sync_folder(folder: str | Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # file systems that do not sync folders
            raise
    finally:
        os.close(handle)
