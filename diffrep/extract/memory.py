"""Batches that fit: what to do when a device runs out of memory."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import psutil
import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

from diffrep.errors import DiffrepError

# Where accelerate's list ends: memory that libraries take beside torch's allocator.
OTHERS = ("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")
# All that oneDNN, which runs convolutions on CPUs, says where memory is short.
ONEDNN = ("could not create a primitive", "could not execute a primitive", "could not create a memory object")
# Where Linux mounts control groups, of the second version and of the first, with the files that hold the limit of
# memory, what is used of it, and the name of the share of that which the kernel gives up when it is needed.
CONTROL_GROUPS = (
    ("/sys/fs/cgroup", "", ("memory.max", "memory.current", "inactive_file")),
    ("/sys/fs/cgroup/memory", "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")),
)


class OutOfMemory(DiffrepError):
    """The device has no memory for a batch of this size."""


class Batching:
    """How many rows are worked on at a time.

    Args:
        rows: At most.
        adaptive: Halve that when the device runs out of memory, and go on.
        full: Batches have all these rows, whether they are needed or not.
        what: What is done, for messages: "forward".

    Attributes:
        rows: As it is now.
    """

    def __init__(self, rows: int, adaptive: bool, full: bool, what: str):
        self.rows, self.adaptive, self.full, self.what = rows, adaptive, full, what

    def run(self, count: int, each: int, work: Callable[[range], None]) -> None:
        """Does a number of pieces of work, as many at a time as fit into a batch.

        Args:
            count: How many there are.
            each: Rows that one of them takes; where it takes more than a batch, `work` has to cut it.
            work: Does some; it is called once more with fewer of the same when memory ran out.

        Raises:
            OutOfMemory: The device ran out of memory, at one row where the number may change.
        """
        start = 0
        while start < count:
            part = range(start, min(start + max(1, self.rows // each), count))
            try:
                work(part)
            except (RuntimeError, MemoryError) as error:
                if not _is_out_of_memory(error):
                    raise
                self._shrink(len(part) * each, error)
            else:
                start = part.stop
                continue
            # Only here: as long as the error was there, so were the tensors of the frames that it came through.
            clear_memory()

    def filled(self, tensor: torch.Tensor) -> torch.Tensor:
        """Returns a batch (n, ...), n at most `rows`, with all its rows where they are asked for.

        The last row is repeated; what comes of that is to be dropped.
        """
        missing = self.rows - len(tensor) if self.full and len(tensor) else 0
        return tensor if missing <= 0 else torch.cat([tensor, tensor[-1:].expand(missing, *tensor.shape[1:])])

    def _shrink(self, used: int, error: Exception) -> None:
        used = self.rows if self.full else min(used, self.rows)
        reason = str(error).strip().partition("\n")[0]
        if not self.adaptive:
            raise OutOfMemory(
                f"out of memory in the {self.what} of {used} rows: {reason}; use batch_size=auto, or less than {used}"
            ) from error
        if used == 1:
            raise OutOfMemory(
                f"out of memory in the {self.what} of a single row: {reason}; use smaller images, or bfloat16"
            ) from error
        self.rows = used // 2
        warnings.warn(f"out of memory in the {self.what} of {used} rows; going on with {self.rows}", stacklevel=4)


def _is_out_of_memory(error: Exception) -> bool:
    known = isinstance(error, (torch.OutOfMemoryError, MemoryError)) or should_reduce_batch_size(error)
    return known or str(error).strip() in ONEDNN or any(text in str(error) for text in OTHERS)


def clear_memory() -> None:
    """Frees what nobody uses any more: errors and their frames refer to each other, and hold tensors."""
    clear_device_cache(garbage_collection=True)


def free_memory(device: torch.device) -> int:
    """Returns the bytes that this process may still take on a device.

    On a CPU that is less than the machine has where a control group limits it: a scheduler kills who takes more, and
    there is no error that one could back off from.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return min([psutil.virtual_memory().available, *_left_in_groups(Path("/proc/self/cgroup"))])


def _left_in_groups(listing: Path) -> list[int]:
    left = []
    for line in listing.read_text().splitlines() if listing.exists() else ():
        _, controllers, path = line.split(":", 2)
        for root, controller, (limit, used, cache) in CONTROL_GROUPS:
            if controller not in controllers.split(","):
                continue
            # A container may see its own group at the root, whatever the path says; each group around it limits too.
            inner = Path(root) / path.lstrip("/")
            for place in (inner, *inner.parents):
                if not place.is_relative_to(root) or not (place / limit).exists():
                    continue
                most = (place / limit).read_text().strip()
                if most.isdigit():
                    stat = dict(one.split(maxsplit=1) for one in (place / "memory.stat").read_text().splitlines())
                    left.append(max(0, int(most) - int((place / used).read_text()) + int(stat.get(cache, 0))))
    return left
