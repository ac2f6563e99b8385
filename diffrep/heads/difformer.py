"""DifFormer: several layers and noise levels read by one transformer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

import torch
from torch import nn

from diffrep.errors import ConfigError, UnknownNameError
from diffrep.heads.attention import AttentionHead
from diffrep.heads.head import Head

NORMS = ("layer", "batch", "none")
Maps = Mapping[tuple[str, str], torch.Tensor]


class DifFormer(Head):
    """Reads the maps of several layers at several noise levels through class tokens of one transformer.

    diffssl (Mukhopadhyay et al., 2024): each layer's map is averaged to at most `pool` cells a side, normed, and
    projected to `width`, the same way at all levels. The tokens of all layers of one level, in the order of `layers`,
    go through one transformer with a class token, again the same at all levels. The class tokens of the levels, in the
    order of `levels`, are concatenated and mapped to scores. With one layer and one level it is the published
    Attention head. State-dict keys are the published ones, `pre_layer.24.2.weight`; a dot in a layer's name becomes
    "-" in its key.

    Args:
        layers: (C, h, w) of each layer's map.
        levels: Noise levels, as in the keys of the features.
        classes: Number of classes.
        pool: Most cells along each side of a map.
        width: Token width.
        heads: Attention heads; divides `width`.
        depth: Transformer blocks.
        mlp_ratio: Width of the blocks' MLP over `width`.
        norm: "layer", over channels and cells with an affine for each; "batch", with affine; or "none".
        dropout: Dropout in the blocks; it changes no key.
        positions: Add a learned vector to each token, which the published head does not have; key `positions`.

    Raises:
        ConfigError: No layers, no levels, or names that give one key.
        UnknownNameError: There is no such norm.
    """

    reads_mapping: ClassVar[bool] = True

    def __init__(
        self,
        layers: Mapping[str, Sequence[int]],
        levels: Sequence[str],
        classes: int,
        pool: int = 16,
        width: int = 1024,
        heads: int = 8,
        depth: int = 2,
        mlp_ratio: float = 4.0,
        norm: Literal["layer", "batch", "none"] = "layer",
        dropout: float = 0.0,
        positions: bool = False,
    ):
        super().__init__()
        if norm not in NORMS:
            raise UnknownNameError("norm", norm, NORMS)
        keys = {name: name.replace(".", "-") for name in layers}
        if not layers or not levels or len(set(keys.values())) < len(keys) or len(set(levels)) < len(levels):
            raise ConfigError(
                f"a DifFormer needs layers and levels, each once, and names that still differ with '-' in place of "
                f"'.'; got {list(layers)} at {list(levels)}"
            )
        self.shapes = {name: tuple(shape) for name, shape in layers.items()}
        self.levels = list(levels)
        self._keys = keys
        grids = {name: (min(h, pool), min(w, pool)) for name, (_, h, w) in self.shapes.items()}
        self.pre_layer = nn.ModuleDict(
            {
                key: nn.Sequential(
                    nn.AdaptiveAvgPool2d(grids[name]),
                    _norm(norm, self.shapes[name][0], grids[name]),
                    nn.Conv2d(self.shapes[name][0], width, 1),
                )
                for name, key in keys.items()
            }
        )
        self.intra_inter_block_attention = AttentionHead(
            f"Use_CLS_Token:True:{width},Insert_CLS_Token,Attention:{width}:{heads}:{mlp_ratio}:{depth},"
            "Extract_CLS_Token",
            dropout,
        )
        self.head = nn.Linear(width * len(self.levels), classes)
        count = sum(h * w for h, w in grids.values())
        self.positions = nn.Parameter(0.02 * torch.randn(1, count, width)) if positions else None

    def forward(self, features: Maps) -> torch.Tensor:
        """Returns scores (B, classes).

        Args:
            features: {(layer, level): map (B, C, h, w)}, such as `Features`; entries beyond the head's are not read.

        Raises:
            UnknownNameError: A map is missing.
            ConfigError: A map has another shape.
        """
        return self.head(self.summary(features))

    def summary(self, features: Maps) -> torch.Tensor:
        """Returns the class tokens (B, levels * width) that the scores are made of."""
        tokens = torch.stack([self.tokens(features, level) for level in self.levels])
        # All levels in one call of the transformer: they only share weights.
        summaries = self.intra_inter_block_attention(tokens.flatten(0, 1))
        return summaries.unflatten(0, tokens.shape[:2]).transpose(0, 1).flatten(1)

    def tokens(self, features: Maps, level: str) -> torch.Tensor:
        """Returns the tokens (B, N, width) of all layers at one level."""
        # A level at a time, for batch norm takes its statistics from one level in the published head.
        maps = [
            self.pre_layer[key](self._map(features, name, level)).flatten(2).transpose(1, 2)
            for name, key in self._keys.items()
        ]
        tokens = torch.cat(maps, dim=1)
        return tokens if self.positions is None else tokens + self.positions

    def _map(self, features: Maps, layer: str, level: str) -> torch.Tensor:
        if (layer, level) not in features:
            raise UnknownNameError("map", f"{layer}@{level}", [f"{a}@{b}" for a, b in features])
        found = features[layer, level]
        if found.dim() != 4 or tuple(found.shape[1:]) != self.shapes[layer]:
            raise ConfigError(
                f"the map {layer}@{level} is {tuple(found.shape)}, the head reads (B, "
                f"{', '.join(map(str, self.shapes[layer]))}); extract it as the head was trained"
            )
        return found.float()


def _norm(kind: str, channels: int, grid: tuple[int, int]) -> nn.Module:
    if kind == "layer":
        return nn.LayerNorm([channels, *grid])
    return nn.BatchNorm2d(channels) if kind == "batch" else nn.Identity()
