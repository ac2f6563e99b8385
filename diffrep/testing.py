"""Tiny backbones with random weights, of the real classes: for tests of diffrep and of users' own code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from PIL import Image
from torch import nn

from diffrep.backbones import Backbone, load_backbone
from diffrep.backbones.convert import save_official
from diffrep.backbones.registry import OFFICIAL
from diffrep.errors import UnknownNameError

_UNET = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 12,
    "attention_head_dim": 2,
    "norm_num_groups": 4,
}
_HEADS = {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "sample_size": 8}
_JOINT = {"joint_attention_dim": 12, "pooled_projection_dim": 10, "num_attention_heads": 2, "attention_head_dim": 8}
# Kind -> (class of diffusers, its arguments).
TINY: dict[str, tuple[str, dict[str, Any]]] = {
    "unet2d": (
        "UNet2DModel",
        {
            "sample_size": 16,
            "in_channels": 1,
            "out_channels": 1,
            "block_out_channels": (8, 16),
            "layers_per_block": 1,
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
            "norm_num_groups": 4,
            "attention_head_dim": 8,
        },
    ),
    "unet2d-condition": ("UNet2DConditionModel", _UNET),
    "sdxl": (
        "UNet2DConditionModel",
        _UNET
        | {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 4,
            "projection_class_embeddings_input_dim": 34,
            "transformer_layers_per_block": (1, 2),
            "use_linear_projection": True,
        },
    ),
    "transformer2d": (
        "Transformer2DModel",
        _HEADS
        | {
            "num_layers": 2,
            "norm_num_groups": 4,
            "cross_attention_dim": 12,
            "norm_type": "ada_norm",
            "num_embeds_ada_norm": 1000,
        },
    ),
    "pixart": (
        "PixArtTransformer2DModel",
        _HEADS
        | {
            "num_layers": 3,
            "attention_head_dim": 12,  # the size conditions want a width divisible by three
            "cross_attention_dim": 24,
            "caption_channels": 12,
            "patch_size": 2,
            "use_additional_conditions": True,
        },
    ),
    "sd3": (
        "SD3Transformer2DModel",
        _JOINT
        | {
            "sample_size": 8,
            "in_channels": 4,
            "out_channels": 4,
            "patch_size": 2,
            "num_layers": 3,
            "caption_projection_dim": 16,
            "pos_embed_max_size": 8,
            "qk_norm": "rms_norm",
        },
    ),
    "flux": (
        "FluxTransformer2DModel",
        _JOINT
        | {
            "in_channels": 16,
            "num_layers": 2,
            "num_single_layers": 2,
            "axes_dims_rope": (2, 2, 4),
            "guidance_embeds": True,
        },
    ),
    "sana": (
        "SanaTransformer2DModel",
        _HEADS
        | {
            "out_channels": 4,
            "num_layers": 2,
            "num_cross_attention_heads": 2,
            "cross_attention_head_dim": 8,
            "cross_attention_dim": 16,
            "caption_channels": 12,
            "patch_size": 1,
        },
    ),
    "dit": (
        "DiTTransformer2DModel",
        _HEADS | {"out_channels": 8, "num_layers": 3, "patch_size": 2, "num_embeds_ada_norm": 10},
    ),
}
_DIT = {"input_size": 8, "hidden_size": 16, "depth": 3, "num_heads": 2, "num_classes": 10}
# Kind -> config of an official checkpoint.
TINY_OFFICIAL: dict[str, dict[str, Any]] = {
    "sit": _DIT,
    "repa": _DIT | {"z_dims": [6], "projector_dim": 8, "encoder_depth": 2},
    "adm": {
        "image_size": 16,
        "in_channels": 3,
        "model_channels": 32,
        "out_channels": 6,
        "num_res_blocks": 1,
        "attention_resolutions": [2],
        "channel_mult": [1, 2],
        "num_head_channels": 16,
        "use_scale_shift_norm": True,
        "resblock_updown": True,
    },
    "edm": {
        "precond": "edm",
        "model_type": "SongUNet",
        "img_resolution": 16,
        "img_channels": 3,
        "label_dim": 10,
        "model_channels": 16,
        "channel_mult": [1, 2],
        "num_blocks": 1,
        "attn_resolutions": [8],
    },
}
KINDS = (*TINY, *TINY_OFFICIAL)
_VAE = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "norm_num_groups": 4,
}
_FLOWS = ("sd3", "flux", "sana")


def save_tiny(kind: str, folder: str | Path, seed: int = 0) -> Path:
    """Writes a folder that `load_backbone` opens, with a tiny network of random weights.

    Args:
        kind: One of `KINDS`: "unet2d" (pixels, one channel), a network on latents of RGB images ("unet2d-condition",
            "sdxl", "transformer2d", "pixart", "sd3", "flux", "sana", "dit": pipeline folders with VAE and scheduler),
            or an official network ("sit", "repa": latents are given; "adm", "edm": RGB pixels).
        folder: Where to write.
        seed: Seeds the weights.

    Raises:
        UnknownNameError: There is no such kind.
    """
    if kind not in KINDS:
        raise UnknownNameError("tiny backbone", kind, KINDS)
    folder = Path(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if kind in TINY_OFFICIAL:
            network = OFFICIAL[kind].build(TINY_OFFICIAL[kind], None)
            _fill(network)
            save_official(network, kind, TINY_OFFICIAL[kind], folder)
            return folder
        name, arguments = TINY[kind]
        network = getattr(diffusers, name)(**arguments)
        _fill(network)
        network.save_pretrained(folder / ("unet" if "UNet" in name else "transformer"))
        if kind == "unet2d":
            diffusers.DDPMScheduler().save_pretrained(folder / "scheduler")
            return folder
        diffusers.AutoencoderKL(**_VAE).save_pretrained(folder / "vae")
        if kind in _FLOWS:
            scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
        else:
            betas = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
            scheduler = diffusers.DDIMScheduler(**betas)
        scheduler.save_pretrained(folder / "scheduler")
    return folder


def _fill(network: nn.Module) -> None:
    # Zero-initialised layers (adaLN, output projections) would hide mistakes upstream of them.
    for name, parameter in network.named_parameters():
        if name == "pos_embed":
            continue  # a fixed table
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
        else:
            parameter.data += 0.1 * torch.randn_like(parameter)


def tiny_backbone(kind: str, folder: str | Path, **options: object) -> Backbone:
    """Writes a tiny pipeline and loads it; `options` go to `load_backbone`."""
    return load_backbone(save_tiny(kind, folder), device="cpu", **options)


def save_images(folder: str | Path, per_class: int = 6, classes: int = 3, size: int = 16, seed: int = 0) -> Path:
    """Writes an image folder, train/ and test/, whose classes differ in brightness: PNG, grey, `size` x `size`."""
    folder, rng = Path(folder), np.random.default_rng(seed)
    for split in ("train", "test"):
        for label in range(classes):
            place = folder / split / f"class{label}"
            place.mkdir(parents=True, exist_ok=True)
            for index in range(per_class):
                pixels = rng.integers(0, 60, (size, size)) + 60 * label
                Image.fromarray(pixels.astype(np.uint8)).save(place / f"{index}.png")
    return folder
