"""Timing that a busy machine disturbs alike for all, and the file that a bench leaves."""

import datetime
import json
import os
import platform
import statistics
import time
from pathlib import Path

import torch


def median_times(rounds, calls, warmups=2, before=None):
    """Runs the calls in turn `rounds` times after warm-ups and returns each one's median seconds.

    Args:
        rounds: Timed rounds.
        calls: What is timed, by name.
        warmups: Untimed rounds, which come first.
        before: Called ahead of every call, untimed; it clears away what the last one left.
    """
    seconds = {name: [] for name in calls}
    for turn in range(warmups + rounds):
        for name, call in calls.items():
            if before is not None:
                before()
            began = time.perf_counter()
            call()
            if torch.cuda.is_initialized():  # asking whether there is a device may not begin to use it: benches fork
                torch.cuda.synchronize()
            if turn >= warmups:
                seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in seconds.items()}


def machine():
    """Returns what figures depend on: device, processor, cores, torch's release and threads, and the time in UTC."""
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "processor": platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def write_json(path, name, rows):
    """Writes a bench's rows to a file: {"bench", "machine", "rows"}.

    Args:
        path: The file, whose folder is made; None writes nothing.
        name: The bench's name.
        rows: One dict a row, of numbers and strings.
    """
    if path is not None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {"bench": name, "machine": machine(), "rows": rows}
        path.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")
