"""The features of a batch of images."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from diffrep.config import LevelSpec
from diffrep.errors import UnknownNameError
from diffrep.noise import LevelTable


class Features(Mapping):
    """Tensors by (layer, level): `features["up_blocks.1", 261]`.

    Each is (B, C, H, W) for maps, (B, C) for pool "mean", (B, C, k, k) for pool k, (B, N, C) for tokens; on the CPU.

    Attributes:
        ids: Sample ids, in the order of the rows.
        layers: Addresses.
        levels: The levels, by canonical key; each has the native time that the network was given.
    """

    def __init__(
        self,
        tensors: dict[tuple[str, str], torch.Tensor],
        ids: list[str],
        levels: LevelTable,
        aliases: dict[str, str] | None = None,
    ):
        self._tensors = tensors
        self._aliases = aliases or {}
        self._table = levels
        self.ids = ids
        self.layers = list(dict.fromkeys(layer for layer, _ in tensors))
        self.levels = levels.levels

    def __getitem__(self, key: tuple[str, LevelSpec]) -> torch.Tensor:
        layer, level = key
        layer = self._aliases.get(layer, layer)
        if layer not in self.layers:
            raise UnknownNameError("layer", layer, self.layers)
        return self._tensors[layer, self._table.key(level)]

    def __iter__(self) -> Iterator[tuple[str, str]]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __repr__(self) -> str:
        lines = [f"  {layer} @ {level}: {tuple(tensor.shape)}" for (layer, level), tensor in self._tensors.items()]
        return f"Features of {len(self.ids)} images:\n" + "\n".join(lines)
