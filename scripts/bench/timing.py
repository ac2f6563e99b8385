"""Timing that a busy machine disturbs alike for all."""

import statistics
import time

import torch


def median_times(rounds, calls, warmups=2):
    """Runs the calls in turn `rounds` times after warm-ups and returns each one's median seconds."""
    seconds = {name: [] for name in calls}
    for call in calls.values():
        for _ in range(warmups):
            call()
    for _ in range(rounds):
        for name, call in calls.items():
            began = time.perf_counter()
            call()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in seconds.items()}
