"""Where the shards of a streamed set lie: local paths and fsspec URLs, of which only shards' names are listed."""

from __future__ import annotations

import glob
import os
from pathlib import Path
from typing import Any, BinaryIO

from diffrep.data.folder import files_below
from diffrep.data.images import check_text
from diffrep.data.tars import expand
from diffrep.errors import BackendUnavailable, ConfigError, DataError

SUFFIXES = {"webdataset": ".tar", "hf": ".parquet"}
# What a storage says of a file that is not there, in contrast to a storage that does not answer.
MISSING = (FileNotFoundError, IsADirectoryError, NotADirectoryError)


def is_remote(path: str) -> bool:
    """Whether a path has a protocol, such as "s3://" or "simplecache::https://"."""
    return "://" in path or "::" in path


def open_storage(url: str, **options: Any) -> tuple[Any, str]:
    """Returns the fsspec file system of a URL, and the path in it; options are the file system's.

    File systems are made where they are used, for most of them do not survive a fork.

    Raises:
        BackendUnavailable: The package for this protocol is not installed.
        ConfigError: The protocol is not known.
        DataError: The storage cannot be reached.
    """
    import fsspec

    try:
        return fsspec.core.url_to_fs(url, **options)
    except ImportError as error:
        raise BackendUnavailable(f"{url!r}: {error}") from error
    except ValueError as error:
        raise ConfigError(f"{url!r}: {error}; data.path is a local path or a URL that fsspec opens") from error
    except Exception as error:  # some connect here, each with errors of its own
        raise DataError(f"cannot reach {url!r}: {error or type(error).__name__}") from error


def open_file(path: str, glance: bool = False, again: bool = False) -> BinaryIO:
    """Opens a local path or a URL for reading, from the beginning on.

    Args:
        path: The path or URL.
        glance: Little of it will be read; object storage is otherwise read in blocks of up to 50 MiB.
        again: The first try failed. Web servers are asked for a file block by block first, which outlives pauses of
            the reader; some give files from beginning to end only, which the second try asks for.
    """
    if not is_remote(path):
        return open(path, "rb", buffering=1 << 20)
    if not (again and path.startswith(("http://", "https://"))):
        system, inside = open_storage(path)
        return system.open(inside, "rb", **({"block_size": 1 << 20} if glance else {}))
    from aiohttp import ClientTimeout

    # A file is as long under way as its samples take to be extracted.
    patient = {"timeout": ClientTimeout(total=None, sock_read=60)}
    system, inside = open_storage(path, client_kwargs=patient)
    return system.open(inside, "rb", block_size=0)


def find_shards(given: str, kind: str) -> tuple[str, str, dict[str, int | None]]:
    """Finds shards without looking into them.

    Patterns in braces give the names themselves, and nothing is listed; "*" and folders are listed once.

    Args:
        given: A folder, file, or pattern such as "name-{000..011}.tar" or "train/*.parquet"; a path or URL.
        kind: "webdataset", "hf", or "auto" by their suffix.

    Returns:
        The kind, the folder or URL that names are relative to, and the names with the sizes in bytes where known.

    Raises:
        ConfigError: The kind cannot be told, or has no shards.
        DataError: Nothing is there, a local shard is missing, or the storage cannot be listed.
    """
    if kind not in (*SUFFIXES, "auto"):
        raise ConfigError(f"data.kind={kind} cannot be streamed; {' and '.join(SUFFIXES)} can. Copy {given!r} here")
    suffixes = tuple(SUFFIXES.values()) if kind == "auto" else (SUFFIXES[kind],)
    given = given if is_remote(given) else os.path.abspath(os.path.expanduser(given))
    patterns = expand(given)
    if patterns == [given] and "*" not in given and _is_folder(given):
        root, names = given.rstrip("/"), _list(given, suffixes)
    else:
        found: dict[str, int | None] = {}
        for pattern in patterns:
            found |= _glob(pattern, suffixes) if "*" in pattern else {pattern: _size(pattern)}
        root = _root(list(found))
        names = {path[len(root) + 1 :]: size for path, size in found.items()}
    for name in names:
        check_text(name)
    if not names:
        raise DataError(f"no {' or '.join(suffixes)} file in {given!r}")
    return _kind(kind, given, names), root, names


def _is_folder(given: str) -> bool:
    return not given.endswith(tuple(SUFFIXES.values())) if is_remote(given) else os.path.isdir(given)


def _size(path: str) -> int | None:
    if is_remote(path):
        return None
    try:
        return os.stat(path).st_size
    except OSError:
        raise DataError(
            f"there is no shard {path!r}; data.path is a folder, a file, 'name-{{000..011}}.tar', 'train/*.parquet', "
            "or a URL of one of these. A hub set is streamed as 'hf://datasets/OWNER/NAME'"
        ) from None


def _kind(kind: str, given: str, names: dict[str, Any]) -> str:
    if kind != "auto":
        return kind
    kinds = [kind for kind, suffix in SUFFIXES.items() if any(name.endswith(suffix) for name in names)]
    if len(kinds) != 1:
        what = "both kinds of shards" if kinds else "shards whose kind cannot be told from their names"
        raise ConfigError(f"{given!r} names {what}; set data.kind to {' or '.join(SUFFIXES)}")
    return kinds[0]


def _list(folder: str, suffixes: tuple[str, ...]) -> dict[str, int | None]:
    if not is_remote(folder):
        return {name: os.stat(Path(folder, name)).st_size for name in files_below(Path(folder), suffixes)}
    return _remote(folder.rstrip("/"), "", suffixes)


def _glob(pattern: str, suffixes: tuple[str, ...]) -> dict[str, int | None]:
    base, _, rest = pattern[: pattern.index("*")].rpartition("/")
    rest += pattern[pattern.index("*") :]
    if is_remote(pattern):
        return {f"{base}/{name}": size for name, size in _remote(base, rest, suffixes).items()}
    found = glob.glob(rest, root_dir=base or "/", recursive=True)
    return {f"{base}/{n}": os.stat(f"{base}/{n}").st_size for n in found if n.endswith(suffixes)}


def _remote(base: str, pattern: str, suffixes: tuple[str, ...]) -> dict[str, int | None]:
    system, inside = open_storage(base)
    inside = inside.rstrip("/")
    try:
        found = system.glob(f"{inside}/{pattern}", detail=True) if pattern else system.find(inside, detail=True)
    except Exception as error:  # each storage's client has errors of its own
        raise DataError(f"cannot list {base!r}: {error or type(error).__name__}") from error
    names = {}
    for path, info in found.items():
        name = path.removeprefix(inside + "/")
        # The links of a web page may lead anywhere.
        if name != path and name.endswith(suffixes) and ".." not in name.split("/") and info["type"] == "file":
            names[name] = info.get("size")
    return names


def _root(paths: list[str]) -> str:
    folders = [folder.split("/") for folder in {path.rpartition("/")[0] for path in paths}] or [[]]
    first, last = min(folders), max(folders)
    same = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    return "/".join(first[:same])
