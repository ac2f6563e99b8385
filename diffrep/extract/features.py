"""The features of a batch of images."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from diffrep.config import LevelSpec
from diffrep.errors import DiffrepError, UnknownNameError
from diffrep.noise import LevelTable


class Features(Mapping):
    """Tensors by (layer, level): `features["up_blocks.1", 261]`.

    Each is (B, C, H, W) for maps, (B, C) for pool "mean", (B, C, k, k) for pool k, (B, N, C) for tokens; on the CPU.

    Attributes:
        ids: Sample ids, in the order of the rows.
        layers: Addresses.
        levels: The levels, by canonical key; each has the native time that the network was given.
        ends: Where trajectories that were run to their end lead, by name ("generation of 10 steps"), (B, draws, C, h,
            w) fp32 on the CPU. A generation leads to the clean sample, which `backbone.codec.decode` turns into an
            image; an inversion to the noise, at unit variance, that a generation with as many steps takes as `noise`.
    """

    def __init__(
        self,
        tensors: dict[tuple[str, str], torch.Tensor],
        ids: list[str],
        levels: LevelTable,
        aliases: dict[str, str] | None = None,
        ends: dict[str, torch.Tensor] | None = None,
    ):
        self._tensors = tensors
        self._aliases = aliases or {}
        self._table = levels
        self.ids = ids
        self.ends = ends or {}
        self.layers = list(dict.fromkeys(layer for layer, _ in tensors))
        self.levels = levels.levels

    @property
    def final(self) -> torch.Tensor:
        """Where the only trajectory leads, see `ends`.

        Raises:
            DiffrepError: None was run to its end, or several.
        """
        if len(self.ends) != 1:
            raise DiffrepError(
                f"final is the end of one trajectory, and there are {len(self.ends)} ends"
                + (f"; take ends[name], one of {list(self.ends)}" if self.ends else "; extract with whole=True")
            )
        return next(iter(self.ends.values()))

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
