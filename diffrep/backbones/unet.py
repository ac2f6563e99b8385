"""U-Nets of diffusers: `UNet2DModel` and `UNet2DConditionModel`."""

from __future__ import annotations

import torch
from torch import nn

from diffrep.backbones.aliases import pick
from diffrep.backbones.backbone import Backbone
from diffrep.backbones.conditioning import ClassLabels, Condition, Conditioner, PromptEmbeddings, Unconditional
from diffrep.backbones.text import PromptEncoder
from diffrep.errors import ConfigError

# CleanDIFT's ten decoder maps in Stable Diffusion 1.x and 2.x: whole blocks, or members of them.
CLEANDIFT = {
    "mid": "mid_block",
    "us1": "up_blocks.0.resnets.0",
    "us2": "up_blocks.0.resnets.1",
    "us3": "up_blocks.0",
    "us4": "up_blocks.1.attentions.0",
    "us5": "up_blocks.1.attentions.1",
    "us6": "up_blocks.1",
    "us7": "up_blocks.2.attentions.0",
    "us8": "up_blocks.2.attentions.1",
    "us9": "up_blocks.2",
    "us10": "up_blocks.3.attentions.0",
}
# ODISE reads what the LDM's output_blocks 2, 5, 8, 11 are called with, before the skip is joined: the stream behind
# the last but one member of each up block.
ODISE = {
    "s5": "up_blocks.0.resnets.1",
    "s4": "up_blocks.1.attentions.1",
    "s3": "up_blocks.2.attentions.1",
    "s2": "up_blocks.3.attentions.1",
}


class UNet2D(Backbone):
    """`diffusers.UNet2DModel`, unconditional or with class labels."""

    diffusers_class = "UNet2DModel"
    convolutional = True
    flow_scale = 1000.0  # as diffusers' flow schedulers count

    @staticmethod
    def conditioner_of(network: nn.Module, encoder: PromptEncoder | None = None) -> Conditioner:
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

    def alias(self, family: str, rest: str) -> str | None:
        """Knows dift.I, hf.I.J and ddae.I."""
        ups = [f"up_blocks.{i}" for i in range(len(self.network.up_blocks))]
        resnets = [
            f"up_blocks.{i}.resnets.{j}"
            for i, block in enumerate(self.network.up_blocks)
            for j in range(len(getattr(block, "resnets", ())))
        ]
        if family == "dift":
            return pick(ups, rest)
        if family == "ddae":
            return pick(resnets, rest, first=1)
        if family == "hf":
            block, _, member = rest.partition(".")
            name = f"up_blocks.{block}.resnets.{member}"
            return f"{name}.conv2" if name in resnets else None
        return None

    def call(self, network: nn.Module, x: torch.Tensor, time: torch.Tensor, cond: Condition) -> torch.Tensor:
        """Calls the network."""
        return network(x, time, class_labels=cond.get("labels"), return_dict=False)[0]


class UNet2DCondition(UNet2D):
    """`diffusers.UNet2DConditionModel` conditioned on prompts: Stable Diffusion 1.x, 2.x and XL.

    SDXL's `time_ids` (original size, crop corner, target size, in pixels), where none are given, are those of an image
    of the input's size that was not cropped.
    """

    diffusers_class = "UNet2DConditionModel"

    @staticmethod
    def conditioner_of(network: nn.Module, encoder: PromptEncoder | None = None) -> Conditioner:
        """Returns the conditioner that fits the network's config."""
        config = network.config
        width = config.cross_attention_dim
        width = width if isinstance(width, int) else width[0]
        further = ("class_embed_type", "num_class_embeds", "encoder_hid_dim_type", "addition_embed_type")
        other = [f"{name}={config[name]!r}" for name in further if config[name] not in (None, "text_time")]
        if other:
            raise ConfigError(
                f"UNet2DConditionModel with {', '.join(other)} is not supported; wrap it with Backbone.from_module"
            )
        if config.addition_embed_type is None:
            return PromptEmbeddings({"prompt_embeds": (None, width)}, encoder=encoder)
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        shapes = {"prompt_embeds": (None, width), "pooled_prompt_embeds": (pooled,), "time_ids": (6,)}
        return PromptEmbeddings(shapes, optional=("time_ids",), encoder=encoder)

    def alias(self, family: str, rest: str) -> str | None:
        """Knows, besides those of `UNet2D`, cleandift.NAME and odise.NAME."""
        table = {"cleandift": CLEANDIFT, "odise": ODISE}.get(family)
        if table is None:
            return super().alias(family, rest)
        address = table.get(rest)
        return address if address in dict(self.network.named_modules()) else None

    def call(self, network: nn.Module, x: torch.Tensor, time: torch.Tensor, cond: Condition) -> torch.Tensor:
        """Calls the network."""
        added = None
        if "pooled_prompt_embeds" in cond:
            height, width = (side * self.codec.downscale for side in x.shape[-2:])
            ids = cond.get("time_ids")
            if ids is None:
                ids = torch.tensor([height, width, 0, 0, height, width], device=x.device, dtype=x.dtype)
                ids = ids.expand(len(x), -1)
            added = {"text_embeds": cond["pooled_prompt_embeds"], "time_ids": ids}
        prompt = cond["prompt_embeds"]
        return network(x, time, encoder_hidden_states=prompt, added_cond_kwargs=added, return_dict=False)[0]
