"""Transformers of diffusers: Transformer2D, PixArt, Stable Diffusion 3, FLUX, Sana and its own class of DiT."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.normalization import AdaLayerNorm
from torch import nn

from diffrep.backbones.aliases import pick
from diffrep.backbones.backbone import Backbone
from diffrep.backbones.conditioning import ClassLabels, Cond, Condition, Conditioner, PromptEmbeddings, Unconditional
from diffrep.backbones.text import PromptEncoder
from diffrep.errors import ConfigError


class DiffusersTransformer(Backbone):
    """What the transformers of diffusers have in common."""

    # Native time of a schedule's end for flow models: these networks take the sampler's timesteps, 0 to 1000.
    flow_scale = 1000.0

    @property
    def in_channels(self) -> int:
        """Channels of the network's input."""
        return self.network.config.in_channels

    @property
    def sample_size(self) -> int:
        """Native side of the network's input."""
        return self.network.config.sample_size

    @property
    def patch_size(self) -> int:
        """Input cells per token, along one side."""
        return self.network.config.patch_size or 1

    def blocks(self) -> list[str]:
        """Returns the transformer blocks."""
        return [f"transformer_blocks.{i}" for i in range(len(self.network.transformer_blocks))]

    def alias(self, family: str, rest: str) -> str | None:
        """Knows repa.K."""
        return pick(self.blocks(), rest, first=1) if family == "repa" else None


class DiffusersDiT(DiffusersTransformer):
    """`diffusers.DiTTransformer2DModel` as it is, for networks that were trained with that class.

    The class spaces its time frequencies by 127 where the official DiT has 128 and normalises with another epsilon, so
    it does not give the official network's numbers; folders of official weights are therefore opened as `DiT`.
    """

    diffusers_class = "DiTTransformer2DModel"

    @staticmethod
    def conditioner_of(network: nn.Module, encoder: PromptEncoder | None = None) -> Conditioner:
        """Returns labels with the null row after the last class."""
        classes = network.config.num_embeds_ada_norm
        return ClassLabels(classes + 1, null=classes)

    def call(self, network: nn.Module, x: torch.Tensor, time: torch.Tensor, cond: Condition) -> torch.Tensor:
        """Calls the network."""
        return network(x, timestep=time, class_labels=cond["labels"], return_dict=False)[0]

    def denoise(self, x: torch.Tensor, time: float | torch.Tensor, cond: Cond = None) -> torch.Tensor:
        """Returns the raw output for a square input: the class puts patches together as a square, whatever came in."""
        if x.shape[-2] != x.shape[-1]:
            raise ConfigError(f"DiTTransformer2DModel gives outputs of square inputs only, got {tuple(x.shape[-2:])}")
        return super().denoise(x, time, cond)


class Transformer2D(DiffusersTransformer):
    """`diffusers.Transformer2DModel` on continuous inputs, with or without cross-attention.

    Its adaptive norms take one time for the whole batch; they are rearranged, without a change of any number, to take
    a time for each sample.
    """

    diffusers_class = "Transformer2DModel"

    def __init__(self, name: str, network: nn.Module, *args: Any):
        for module in network.modules():
            if isinstance(module, AdaLayerNorm) and module.chunk_dim == 0:
                # Split along the batch, the linear gives (scale, shift); along the channels, (shift, scale).
                module.chunk_dim = 1
                for parameter in module.linear.parameters():
                    parameter.data = torch.cat(parameter.data.chunk(2)[::-1])
        super().__init__(name, network, *args)

    @staticmethod
    def conditioner_of(network: nn.Module, encoder: PromptEncoder | None = None) -> Conditioner:
        """Returns the conditioner that fits the network's config."""
        if network.config.in_channels is None or network.config.patch_size is not None:
            raise ConfigError("Transformer2DModel is supported on continuous inputs only: in_channels, no patch_size")
        width = network.config.cross_attention_dim
        return Unconditional() if width is None else PromptEmbeddings({"prompt_embeds": (None, width)}, (), encoder)

    @property
    def sample_size(self) -> int:
        """Native side of the network's input; 32 where the config says none."""
        return self.network.config.sample_size or 32

    def call(self, network: nn.Module, x: torch.Tensor, time: torch.Tensor, cond: Condition) -> torch.Tensor:
        """Calls the network."""
        prompt = cond.get("prompt_embeds")
        return network(x, encoder_hidden_states=prompt, timestep=time, return_dict=False)[0]


class PixArt(DiffusersTransformer):
    """`diffusers.PixArtTransformer2DModel`: PixArt-alpha and PixArt-sigma."""

    diffusers_class = "PixArtTransformer2DModel"

    @staticmethod
    def conditioner_of(network: nn.Module, encoder: PromptEncoder | None = None) -> Conditioner:
        """Returns prompt embeddings with their mask."""
        width = network.config.caption_channels or network.config.cross_attention_dim
        shapes = {"prompt_embeds": (None, width), "prompt_attention_mask": (None,)}
        return PromptEmbeddings(shapes, ("prompt_attention_mask",), encoder, length=120)

    def call(self, network: nn.Module, x: torch.Tensor, time: torch.Tensor, cond: Condition) -> torch.Tensor:
        """Calls the network; its size conditions, where it has them, are those of the input."""
        added = {"resolution": None, "aspect_ratio": None}
        if network.use_additional_conditions:
            height, width = (float(side * self.codec.downscale) for side in x.shape[-2:])
            size = torch.tensor([height, width], device=x.device, dtype=x.dtype)
            ratio = torch.tensor([height / width], device=x.device, dtype=x.dtype)
            added = {"resolution": size.expand(len(x), -1), "aspect_ratio": ratio.expand(len(x), -1)}
        return network(
            x,
            encoder_hidden_states=cond["prompt_embeds"],
            encoder_attention_mask=cond.get("prompt_attention_mask"),
            timestep=time,
            added_cond_kwargs=added,
            return_dict=False,
        )[0]


class SD3(DiffusersTransformer):
    """`diffusers.SD3Transformer2DModel`: Stable Diffusion 3 and 3.5."""

    diffusers_class = "SD3Transformer2DModel"

    @staticmethod
    def conditioner_of(network: nn.Module, encoder: PromptEncoder | None = None) -> Conditioner:
        """Returns prompt embeddings and their pooled form."""
        shapes = {
            "prompt_embeds": (None, network.config.joint_attention_dim),
            "pooled_prompt_embeds": (network.config.pooled_projection_dim,),
        }
        return PromptEmbeddings(shapes, (), encoder, length=333)  # 77 of CLIP, 256 of T5

    def call(self, network: nn.Module, x: torch.Tensor, time: torch.Tensor, cond: Condition) -> torch.Tensor:
        """Calls the network."""
        return network(
            hidden_states=x,
            timestep=time,
            encoder_hidden_states=cond["prompt_embeds"],
            pooled_projections=cond["pooled_prompt_embeds"],
            return_dict=False,
        )[0]


class Flux(DiffusersTransformer):
    """`diffusers.FluxTransformer2DModel`; x is the latents (B, C, h, w), packed here into 2 x 2 tokens.

    Guidance-distilled variants take a guidance scale; `cond["guidance"]` sets it, else it is 3.5, the pipeline's.
    """

    diffusers_class = "FluxTransformer2DModel"
    flow_scale = 1.0

    @staticmethod
    def conditioner_of(network: nn.Module, encoder: PromptEncoder | None = None) -> Conditioner:
        """Returns prompt embeddings and their pooled form."""
        shapes: dict[str, tuple[int | None, ...]] = {
            "prompt_embeds": (None, network.config.joint_attention_dim),
            "pooled_prompt_embeds": (network.config.pooled_projection_dim,),
        }
        optional = ()
        if network.config.guidance_embeds:
            shapes["guidance"], optional = (), ("guidance",)
        return PromptEmbeddings(shapes, optional, encoder, length=512)

    @property
    def in_channels(self) -> int:
        """Channels of the latents."""
        return self.network.config.in_channels // 4

    @property
    def sample_size(self) -> int:
        """128: 1024 pixels. The config does not say."""
        return 128

    @property
    def patch_size(self) -> int:
        """Latents are packed 2 x 2."""
        return 2

    def blocks(self) -> list[str]:
        """Returns the double blocks, then the single blocks."""
        singles = [f"single_transformer_blocks.{i}" for i in range(len(self.network.single_transformer_blocks))]
        return super().blocks() + singles

    def call(self, network: nn.Module, x: torch.Tensor, time: torch.Tensor, cond: Condition) -> torch.Tensor:
        """Packs, calls the network, and unpacks."""
        batch, channels, height, width = x.shape
        rows, columns = height // 2, width // 2
        tokens = x.view(batch, channels, rows, 2, columns, 2).permute(0, 2, 4, 1, 3, 5)
        row, column = torch.meshgrid(
            torch.arange(rows, device=x.device), torch.arange(columns, device=x.device), indexing="ij"
        )
        places = torch.stack([torch.zeros_like(row), row, column], dim=-1).flatten(0, 1).to(x.dtype)
        prompt, guidance = cond["prompt_embeds"], cond.get("guidance")
        if network.config.guidance_embeds and guidance is None:
            guidance = torch.full((batch,), 3.5, device=x.device)
        out = network(
            hidden_states=tokens.reshape(batch, rows * columns, 4 * channels),
            timestep=time,
            guidance=guidance,
            encoder_hidden_states=prompt,
            pooled_projections=cond["pooled_prompt_embeds"],
            img_ids=places,
            txt_ids=torch.zeros(prompt.shape[1], 3, device=x.device, dtype=x.dtype),
            return_dict=False,
        )[0]
        return out.view(batch, rows, columns, -1, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(batch, -1, height, width)


class Sana(DiffusersTransformer):
    """`diffusers.SanaTransformer2DModel`; its self-attention is linear and has no map."""

    diffusers_class = "SanaTransformer2DModel"

    @staticmethod
    def conditioner_of(network: nn.Module, encoder: PromptEncoder | None = None) -> Conditioner:
        """Returns prompt embeddings with their mask."""
        if network.config.guidance_embeds:
            raise ConfigError(
                "SanaTransformer2DModel with guidance_embeds (Sana-Sprint) is not supported; wrap it with "
                "Backbone.from_module"
            )
        shapes: dict[str, tuple[int | None, ...]] = {
            "prompt_embeds": (None, network.config.caption_channels),
            "prompt_attention_mask": (None,),
        }
        return PromptEmbeddings(shapes, ("prompt_attention_mask",), encoder, length=300)

    def call(self, network: nn.Module, x: torch.Tensor, time: torch.Tensor, cond: Condition) -> torch.Tensor:
        """Calls the network."""
        return network(
            x,
            encoder_hidden_states=cond["prompt_embeds"],
            encoder_attention_mask=cond.get("prompt_attention_mask"),
            timestep=time,
            return_dict=False,
        )[0]
