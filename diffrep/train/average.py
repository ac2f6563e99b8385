"""The average of the weights over the steps, kept so that a network can run on it at any time."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file
from torch import nn

from diffrep.errors import CheckpointError

EMA_FILE = "ema.safetensors"


class Average:
    """An exponential moving average of a module's weights (diffusers' `EMAModel`).

    Args:
        module: What is trained, on its device.
        decay: Of the average, once a step; in the first steps it is less, (1 + step) / (10 + step).
    """

    def __init__(self, module: nn.Module, decay: float):
        self._ema = EMAModel(module.parameters(), decay=decay, foreach=True)
        self._names = [name for name, _ in module.named_parameters()]

    def step(self, module: nn.Module) -> None:
        """Moves the average on to the module's weights."""
        self._ema.step(module.parameters())

    def twin(self, part: nn.Module, prefix: str) -> nn.Module:
        """Returns a frozen copy, in eval mode, whose weights are the averages themselves: they move with each step.

        Args:
            part: The module, or a part of it.
            prefix: What stands before the names of its weights in the module: "" or "network.".
        """
        twin = copy.deepcopy(part).requires_grad_(False).eval()
        for inner in twin.modules():
            # Hooks on the original, which would take passes of the copy for its own.
            inner._forward_hooks.clear()
            inner._forward_pre_hooks.clear()
        shadows = dict(zip(self._names, self._ema.shadow_params, strict=True))
        for name, weight in twin.named_parameters():
            weight.data = shadows[prefix + name]
        return twin

    @contextmanager
    def swapped(self, module: nn.Module) -> Iterator[None]:
        """Puts the averages into the module for a while."""
        self._ema.store(module.parameters())
        self._ema.copy_to(module.parameters())
        try:
            yield
        finally:
            self._ema.restore(module.parameters())

    def save(self, folder: Path) -> None:
        """Writes the averages; not through accelerate's custom objects, which are read back as pickles."""
        save_file(dict(zip(self._names, self._ema.shadow_params, strict=True)), folder / EMA_FILE)

    def load(self, folder: Path, step: int) -> None:
        """Reads the averages of a checkpoint.

        Raises:
            CheckpointError: They are another module's.
        """
        stored: dict[str, torch.Tensor] = load_file(folder / EMA_FILE)
        if sorted(stored) != sorted(self._names):
            raise CheckpointError(f"{folder / EMA_FILE} holds averages of another module; give another out")
        for name, shadow in zip(self._names, self._ema.shadow_params, strict=True):
            shadow.copy_(stored[name])  # in place: twins share the memory
        self._ema.optimization_step = step
