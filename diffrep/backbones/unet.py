"""U-Nets of diffusers: `UNet2DModel` and `UNet2DConditionModel`."""

from __future__ import annotations

import torch
from torch import nn

from diffrep.backbones.backbone import Backbone
from diffrep.backbones.conditioning import ClassLabels, Conditioner, PromptEmbeddings, Unconditional
from diffrep.errors import ConfigError


class UNet2D(Backbone):
    """`diffusers.UNet2DModel`, unconditional or with class labels."""

    diffusers_class = "UNet2DModel"

    @staticmethod
    def conditioner_of(network: nn.Module) -> Conditioner:
        """Returns the conditioner that fits the network's config."""
        if network.config.class_embed_type is None and network.config.num_class_embeds is not None:
            return ClassLabels(network.config.num_class_embeds, null=None)
        if network.config.class_embed_type is not None:
            raise ConfigError(
                f"UNet2DModel with class_embed_type {network.config.class_embed_type!r} is not supported"
            )
        return Unconditional()

    @property
    def in_channels(self) -> int:
        """Channels of the network's input."""
        return self.network.config.in_channels

    @property
    def sample_size(self) -> int:
        """Native side of the network's input."""
        size = self.network.config.sample_size or 64
        return size if isinstance(size, int) else size[0]

    def blocks(self) -> list[str]:
        """Returns down blocks, the middle block and up blocks."""
        downs = [f"down_blocks.{i}" for i in range(len(self.network.down_blocks))]
        middle = ["mid_block"] if self.network.mid_block is not None else []
        return downs + middle + [f"up_blocks.{i}" for i in range(len(self.network.up_blocks))]

    def call(self, network: nn.Module, x: torch.Tensor, time: torch.Tensor, cond: torch.Tensor | None) -> torch.Tensor:
        """Calls the network."""
        return network(x, time, class_labels=cond, return_dict=False)[0]


class UNet2DCondition(UNet2D):
    """`diffusers.UNet2DConditionModel` conditioned on prompt embeddings (Stable Diffusion 1.x and 2.x)."""

    diffusers_class = "UNet2DConditionModel"

    @staticmethod
    def conditioner_of(network: nn.Module) -> Conditioner:
        """Returns the conditioner that fits the network's config."""
        config = network.config
        extra = config.addition_embed_type or config.class_embed_type or config.num_class_embeds
        if extra or not isinstance(config.cross_attention_dim, int):
            raise ConfigError(
                "UNet2DConditionModel with conditions besides prompt embeddings and time is not supported yet"
            )
        return PromptEmbeddings(config.cross_attention_dim)

    def call(self, network: nn.Module, x: torch.Tensor, time: torch.Tensor, cond: torch.Tensor | None) -> torch.Tensor:
        """Calls the network."""
        return network(x, time, encoder_hidden_states=cond, return_dict=False)[0]
