"""The average of the weights over the steps, kept so that a network can run on it at any time."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers.training_utils import EMAModel
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from diffrep.errors import CheckpointError
from diffrep.train.sharding import local, share, whole

EMA_FILE = "ema.safetensors"


class Average:
    """An exponential moving average of a module's weights (diffusers' `EMAModel`).

    Under FSDP each process averages its share of the weights. `twin`, `refresh`, `save` and `load` then put shares
    together or take them apart, so all processes must call them.

    Args:
        module: What is trained, on its device, as Accelerate has prepared it.
        decay: Of the average, once a step; in the first steps it is less, (1 + step) / (10 + step).
        main: Whether this process writes, and keeps whole averages where the weights are spread.
    """

    def __init__(self, module: nn.Module, decay: float, main: bool = True):
        self.main = main
        # Kept, because FSDP puts others in their place while the module runs.
        self._weights = dict(module.named_parameters())
        self._ema = EMAModel(self._shares(), decay=decay, foreach=True)
        self._copies: dict[str, torch.Tensor | None] = {}  # whole averages of spread weights, on the main process

    def step(self) -> None:
        """Moves the average on to the module's weights."""
        self._ema.step(self._shares())

    def twin(self, form: nn.Module, part: nn.Module, prefix: str) -> nn.Module:
        """Returns a frozen copy, in eval mode, whose weights are the averages themselves: they move with each step.

        Of spread weights they move with each `refresh`, on the main process; the others' twins hold no data.

        Args:
            form: A copy of the part on the meta device, with no hooks.
            part: A part of the module.
            prefix: What stands before the names of its weights in the module, such as "network.".
        """
        averages, buffers = dict(self._averages()), dict(part.named_buffers())
        memo: dict[int, torch.Tensor] = {id(buffer): buffers[name] for name, buffer in form.named_buffers()}
        for name, weight in form.named_parameters():
            average, own = averages[prefix + name], self._weights[prefix + name]
            if local(own) is not own:
                average = torch.empty(own.shape, dtype=own.dtype, device=average.device) if self.main else None
                self._copies[prefix + name] = average
            if average is not None:
                memo[id(weight)] = nn.Parameter(average, requires_grad=False)
        twin = copy.deepcopy(form, memo).eval()
        self.refresh()
        return twin

    @torch.no_grad()
    def refresh(self) -> None:
        """Brings twins of spread weights up to date; others always are."""
        for name, shadow in self._averages():
            if name in self._copies:
                average = whole(shadow, self._weights[name])
                if self.main:
                    self._copies[name].copy_(average)

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Puts the averages into the module for a while."""
        self._ema.store(self._shares())
        self._ema.copy_to(self._shares())
        try:
            yield
        finally:
            self._ema.restore(self._shares())

    @torch.no_grad()
    def save(self, folder: Path) -> None:
        """Writes the averages; not through accelerate's custom objects, which are read back as pickles."""
        state = {}
        for name, shadow in self._averages():
            average = whole(shadow, self._weights[name])
            if self.main:
                state[name] = average.cpu().contiguous()  # convolutions may lie channels last
        if self.main:
            save_file(state, folder / EMA_FILE)

    @torch.no_grad()
    def load(self, folder: Path, step: int) -> None:
        """Reads the averages of a checkpoint.

        Raises:
            CheckpointError: They are another module's.
        """
        with safe_open(folder / EMA_FILE, "pt") as stored:
            if sorted(stored.keys()) != sorted(self._weights):
                raise CheckpointError(f"{folder / EMA_FILE} holds averages of another module; give another out")
            for name, shadow in self._averages():
                shadow.copy_(share(stored.get_tensor(name), self._weights[name]))  # in place: twins share the memory
        self._ema.optimization_step = step
        self.refresh()

    def _shares(self) -> list[torch.Tensor]:
        return [local(weight) for weight in self._weights.values()]

    def _averages(self) -> Iterator[tuple[str, torch.Tensor]]:
        return zip(self._weights, self._ema.shadow_params, strict=True)
