"""Which process this is, so that others of the same machine can tell when it is gone."""

from __future__ import annotations

import os
import socket
from functools import cache
from pathlib import Path
from typing import Any

PROC = Path("/proc")


def this_process() -> dict[str, Any]:
    """Returns what names this process: "host", "pid", and on Linux "boot", "space" and "born".

    "boot" is the kernel's id of this start of the machine, "space" the name space of process ids (a container's own),
    and "born" the process's start, in clock ticks since boot: a later process may get the same id.
    """
    return dict(_describe(os.getpid()))


def is_gone(owner: dict[str, Any] | None) -> bool:
    """Tells whether a process is known to be gone; of other machines and containers nothing is known."""
    if owner is None or owner.get("host") != socket.gethostname():
        return False
    machine, pid = _machine(), owner.get("pid")
    if not machine or any(owner.get(key) != machine[key] for key in machine) or type(pid) is not int or pid <= 0:
        return False
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return True
    except PermissionError:
        return False
    born = _born(pid)
    return born is not None and owner.get("born") is not None and born != owner["born"]


@cache
def _describe(pid: int) -> dict[str, Any]:
    return {"host": socket.gethostname(), "pid": pid, **_machine(), "born": _born(pid)}


@cache
def _machine() -> dict[str, str]:
    try:
        return {
            "boot": (PROC / "sys/kernel/random/boot_id").read_text().strip(),
            "space": os.readlink(PROC / "self/ns/pid"),
        }
    except OSError:
        return {}


def _born(pid: int) -> int | None:
    """Returns the start of a process; 0 when it has ended and waits for its parent to take note, None if unknown."""
    try:
        # The name, in parentheses, may hold anything.
        fields = (PROC / str(pid) / "stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return None
    return 0 if fields[0] in (b"Z", b"X") else int(fields[19])
