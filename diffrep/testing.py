"""Tiny backbones with random weights, of the real classes: for tests of diffrep and of users' own code."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    DiTTransformer2DModel,
    UNet2DConditionModel,
    UNet2DModel,
)
from PIL import Image

from diffrep.backbones import Backbone, load_backbone
from diffrep.errors import UnknownNameError

TINY = {
    "unet2d": {
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
    "unet2d-condition": {
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
    },
    "dit": {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 8,
        "num_layers": 3,
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "patch_size": 2,
        "num_embeds_ada_norm": 10,
    },
}
_CLASSES = {"unet2d": UNet2DModel, "unet2d-condition": UNet2DConditionModel, "dit": DiTTransformer2DModel}
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


def save_tiny(kind: str, folder: str | Path, seed: int = 0) -> Path:
    """Writes a pipeline folder with a tiny network of random weights, a scheduler and, for latents, a VAE.

    Args:
        kind: "unet2d" (pixels, one channel), "unet2d-condition" or "dit" (latents of RGB images, 2 x down).
        folder: Where to write.
        seed: Seeds the weights.

    Raises:
        UnknownNameError: There is no such kind.
    """
    if kind not in TINY:
        raise UnknownNameError("tiny backbone", kind, TINY)
    folder = Path(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = _CLASSES[kind](**TINY[kind])
        for parameter in network.parameters():
            # Zero-initialised layers (adaLN, output projections) would hide mistakes upstream of them.
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
            else:
                parameter.data += 0.1 * torch.randn_like(parameter)
        network.save_pretrained(folder / ("transformer" if kind == "dit" else "unet"))
        if kind == "unet2d":
            DDPMScheduler().save_pretrained(folder / "scheduler")
        else:
            AutoencoderKL(**_VAE).save_pretrained(folder / "vae")
            DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012).save_pretrained(
                folder / "scheduler"
            )
    return folder


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
