"""Class-conditional diffusion transformers: diffusers' `DiTTransformer2DModel`."""

from __future__ import annotations

import torch
from torch import nn

from diffrep.backbones.backbone import Backbone
from diffrep.backbones.conditioning import ClassLabels, Conditioner


class DiffusersDiT(Backbone):
    """`diffusers.DiTTransformer2DModel`, made numerically equal to the official DiT (Peebles and Xie, 2023).

    The stock class spaces its time frequencies by 127 where the official network has 128, and normalises before the
    MLP with another epsilon; both are set right on construction.
    """

    diffusers_class = "DiTTransformer2DModel"

    def __init__(self, name: str, network: nn.Module, *args, **kwargs):
        for block in network.transformer_blocks:
            block.norm1.emb.time_proj.downscale_freq_shift = 0
            block.norm3.eps = 1e-6
        super().__init__(name, network, *args, **kwargs)

    @staticmethod
    def conditioner_of(network: nn.Module) -> Conditioner:
        """Returns labels with the null row after the last class."""
        classes = network.config.num_embeds_ada_norm
        return ClassLabels(classes + 1, null=classes)

    @property
    def in_channels(self) -> int:
        """Channels of the network's input."""
        return self.network.config.in_channels

    @property
    def sample_size(self) -> int:
        """Native side of the network's input."""
        return self.network.config.sample_size

    def blocks(self) -> list[str]:
        """Returns the transformer blocks."""
        return [f"transformer_blocks.{i}" for i in range(len(self.network.transformer_blocks))]

    def grid(self, tokens: int, height: int, width: int) -> tuple[int, int] | None:
        """Returns the patch grid."""
        patch = self.network.config.patch_size
        grid = (height // patch, width // patch)
        return grid if grid[0] * grid[1] == tokens else None

    def call(self, network: nn.Module, x: torch.Tensor, time: torch.Tensor, cond: torch.Tensor | None) -> torch.Tensor:
        """Calls the network."""
        return network(x, timestep=time, class_labels=cond, return_dict=False)[0]
