"""Tensors on their way to the device and back, without waiting for each of them."""

from __future__ import annotations

from typing import Any

import torch

from diffrep.extract.plan import Plan


def sent(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Returns a tensor on the device. A copy to a GPU is not waited for: it starts from page-locked memory."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


class Outbox:
    """Brings results to the CPU; a GPU goes on meanwhile.

    Args:
        device: Where they come from.
    """

    def __init__(self, device: torch.device):
        self.device = device

    def send(self, tensor: torch.Tensor) -> torch.Tensor:
        """Returns a tensor on the CPU whose values are there after the next `wait`."""
        if tensor.device.type != "cuda":
            return tensor.cpu()
        held = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        return held.copy_(tensor, non_blocking=True)

    def wait(self) -> None:
        """Waits until everything that was sent is there."""
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()


class Collected:
    """The features of a batch, brought to the CPU as they come and there after one wait for all of them.

    Args:
        plan: What is read.
        count: Number of images.
        device: Where they come from.
    """

    def __init__(self, plan: Plan, count: int, device: torch.device):
        self.outbox = Outbox(device)
        dtype = getattr(torch, plan.dtype)
        self._features = {
            name: torch.empty((len(plan.draws), count, *shape), dtype=dtype) for name, shape in plan.shapes.items()
        }
        self._sent: list[tuple[torch.Tensor, Any, torch.Tensor]] = []

    def put(self, name: str, index: Any, feature: torch.Tensor) -> None:
        """Takes features (..., C, h, w) of one layer; `index` says of which (level, image)."""
        target = self._features[name]
        feature = feature.to(target.dtype)
        if feature.device.type == "cuda":
            self._sent.append((target, index, self.outbox.send(feature)))
        else:
            target[index] = feature.cpu()

    def features(self) -> dict[str, torch.Tensor]:
        """Waits, and returns the features (levels, B, ...) of each layer."""
        self.outbox.wait()
        for target, index, feature in self._sent:
            target[index] = feature
        self._sent.clear()
        return self._features
