"""What a network is conditioned on besides time, and what stands in when the user gives nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from diffrep.errors import ConfigError


class Conditioner(Protocol):
    """Turns a user's `cond` into the tensor that the network takes."""

    def __call__(self, cond: torch.Tensor | None, batch: int, device: torch.device) -> torch.Tensor | None:
        """Returns the condition for a batch.

        Raises:
            ConfigError: `cond` does not fit the network.
        """

    def example(self) -> torch.Tensor | None:
        """Returns a condition for a batch of one on the meta device."""


class Unconditional:
    """Networks that take nothing but time."""

    def __call__(self, cond: torch.Tensor | None, batch: int, device: torch.device) -> None:
        """Checks that nothing is given."""
        if cond is not None:
            raise ConfigError("this network is unconditional; leave cond out")

    def example(self) -> None:
        """Returns None."""


@dataclass(frozen=True)
class ClassLabels:
    """Networks with a table of class embeddings.

    Attributes:
        rows: Number of rows of the table.
        null: Row that stands for "no class"; None when the network has none, and a label must be given.
    """

    rows: int
    null: int | None

    def __call__(self, cond: torch.Tensor | None, batch: int, device: torch.device) -> torch.Tensor:
        """Returns labels (B,) int64; a single label serves the whole batch."""
        if cond is None:
            if self.null is None:
                raise ConfigError(f"this network is class-conditional; give cond, labels from 0 to {self.rows - 1}")
            return torch.full((batch,), self.null, device=device)
        labels = torch.as_tensor(cond, device=device)
        if labels.is_floating_point() or labels.ndim > 1:
            raise ConfigError(f"cond must be integer labels (B,), got {labels.dtype} {tuple(labels.shape)}")
        if labels.numel() and not (int(labels.min()) >= 0 and int(labels.max()) < self.rows):
            raise ConfigError(
                f"cond has labels outside 0 to {self.rows - 1}: {int(labels.min())} to {int(labels.max())}"
            )
        return _for_batch(labels.reshape(-1), batch)

    def example(self) -> torch.Tensor:
        """Returns one label."""
        return torch.zeros(1, dtype=torch.int64, device="meta")


@dataclass(frozen=True)
class PromptEmbeddings:
    """Networks with cross-attention to prompt embeddings.

    Attributes:
        width: Channels of the embeddings.
    """

    width: int

    def __call__(self, cond: torch.Tensor | None, batch: int, device: torch.device) -> torch.Tensor:
        """Returns embeddings (B, T, width); one prompt, (T, width) or (1, T, width), serves the whole batch."""
        if cond is None:
            raise ConfigError(
                f"this network is text-conditional; give cond, prompt embeddings (B, T, {self.width}), "
                "such as those of the empty prompt"
            )
        embeddings = torch.as_tensor(cond, device=device)
        embeddings = embeddings[None] if embeddings.ndim == 2 else embeddings
        if embeddings.ndim != 3 or embeddings.shape[-1] != self.width:
            raise ConfigError(f"cond must be prompt embeddings (B, T, {self.width}), got {tuple(embeddings.shape)}")
        return _for_batch(embeddings, batch)

    def example(self) -> torch.Tensor:
        """Returns embeddings of 77 tokens, CLIP's length."""
        return torch.zeros(1, 77, self.width, device="meta")


def _for_batch(cond: torch.Tensor, batch: int) -> torch.Tensor:
    if len(cond) not in (1, batch):
        raise ConfigError(f"cond holds {len(cond)} rows for a batch of {batch}; give 1 or {batch}")
    return cond.expand(batch, *cond.shape[1:])
