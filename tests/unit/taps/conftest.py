"""Every family of networks at tiny size, with inputs for a batch of two."""

from functools import cache

import pytest
import torch
from diffusers import (
    DiTTransformer2DModel,
    FluxTransformer2DModel,
    PixArtTransformer2DModel,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    UNet2DModel,
)

TEXT = 5
LABELS = torch.tensor([1, 2])
TIMES = torch.tensor([3, 400])
SD3 = {
    "sample_size": 8,
    "patch_size": 2,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 2,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "joint_attention_dim": 12,
    "caption_projection_dim": 16,
    "pooled_projection_dim": 10,
    "pos_embed_max_size": 8,
}


class Tiny:
    """A network and the inputs of one pass."""

    def __init__(self, network, **inputs):
        self.network = network.requires_grad_(False).eval()
        self.inputs = inputs

    def __call__(self, network=None):
        network = network or self.network
        device = next(network.parameters()).device
        moved = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in self.inputs.items()}
        return network(**moved, return_dict=False)[0]


def unet2d():
    network = UNet2DModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        attention_head_dim=4,
    )
    return Tiny(network, sample=torch.randn(2, 3, 8, 8), timestep=TIMES)


def unet_text():
    network = UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        attention_head_dim=2,
        cross_attention_dim=12,
    )
    text = torch.randn(2, TEXT, 12)
    return Tiny(network, sample=torch.randn(2, 4, 8, 8), timestep=TIMES, encoder_hidden_states=text)


def dit():
    network = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=3,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=10,
    )
    return Tiny(network, hidden_states=torch.randn(2, 4, 8, 8), timestep=TIMES, class_labels=LABELS)


def pixart():
    network = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=8,
        patch_size=2,
        cross_attention_dim=16,
        caption_channels=12,
        use_additional_conditions=False,
    )
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    return Tiny(
        network,
        hidden_states=torch.randn(2, 4, 8, 8),
        encoder_hidden_states=torch.randn(2, TEXT, 12),
        encoder_attention_mask=mask,
        timestep=TIMES,
        added_cond_kwargs={"resolution": None, "aspect_ratio": None},
    )


def sana():
    network = SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=8,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=12,
        sample_size=8,
        patch_size=1,
    )
    text = torch.randn(2, TEXT, 12)
    return Tiny(network, hidden_states=torch.randn(2, 4, 8, 8), encoder_hidden_states=text, timestep=TIMES)


def sd3(**changes):
    return Tiny(
        SD3Transformer2DModel(**SD3 | changes),
        hidden_states=torch.randn(2, 4, 8, 8),
        encoder_hidden_states=torch.randn(2, TEXT, 12),
        pooled_projections=torch.randn(2, 10),
        timestep=TIMES,
    )


def sd35():
    return sd3(dual_attention_layers=(0,), qk_norm="rms_norm")


def flux():
    network = FluxTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        pooled_projection_dim=10,
        axes_dims_rope=(2, 2, 4),
    )
    # All positions 0: the rotary embedding is then the identity, and attention can be worked out by hand.
    return Tiny(
        network,
        hidden_states=torch.randn(2, 16, 4),
        encoder_hidden_states=torch.randn(2, TEXT, 12),
        pooled_projections=torch.randn(2, 10),
        timestep=torch.tensor([0.3, 0.7]),
        img_ids=torch.zeros(16, 3),
        txt_ids=torch.zeros(TEXT, 3),
    )


BUILD = {build.__name__: build for build in (unet2d, unet_text, dit, pixart, sana, sd3, sd35, flux)}


@pytest.fixture
def tiny():
    """Builds a family, the same weights and inputs each time."""

    @cache
    def build(name):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return BUILD[name]()

    return build
