"""Layers of ADM's U-Net, with the names and numbers of openai/guided-diffusion (Dhariwal and Nichol, 2021).

Attention runs through torch's fused kernels, and nothing is checkpointed: that would run inner modules twice under
grad, and fire their hooks twice.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from diffrep.errors import ConfigError

GROUPS = 32


class GroupNorm32(nn.GroupNorm):
    """Group norm of 32 groups, computed in fp32 whatever the network runs in."""

    def __init__(self, channels: int):
        super().__init__(GROUPS, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Normalises (B, C, ...); the result has the input's dtype."""
        return F.group_norm(x.float(), GROUPS, self.weight.float(), self.bias.float(), self.eps).to(x.dtype)


class Downsample(nn.Module):
    """Halves a map (B, C, H, W): a strided convolution, or the mean of 2 x 2 cells."""

    def __init__(self, channels: int, conv: bool):
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1) if conv else nn.AvgPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        """Halves."""
        return self.op(x)


class Upsample(nn.Module):
    """Doubles a map (B, C, H, W) by repeating cells; a convolution may follow."""

    def __init__(self, channels: int, conv: bool):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1) if conv else None

    def forward(self, x: Tensor) -> Tensor:
        """Doubles."""
        x = F.interpolate(x, scale_factor=2, mode="nearest")
        return x if self.conv is None else self.conv(x)


SAMPLERS = {"down": Downsample, "up": Upsample}


class ResBlock(nn.Module):
    """A residual block modulated by the embedding of time and class.

    Args:
        channels: Channels of the input.
        out_channels: Channels of the output.
        emb_channels: Width of the embedding.
        dropout: Before the second convolution, in training.
        use_scale_shift_norm: The embedding scales and shifts the second norm's output, in place of a shift before it.
        resample: "up", "down" or None: change the map's size between the first norm and the first convolution.
    """

    def __init__(
        self,
        channels: int,
        out_channels: int,
        emb_channels: int,
        dropout: float,
        use_scale_shift_norm: bool,
        resample: str | None = None,
    ):
        super().__init__()
        self.use_scale_shift_norm, self.resample = use_scale_shift_norm, resample
        conv = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.in_layers = nn.Sequential(GroupNorm32(channels), nn.SiLU(), conv)
        if resample is not None:
            self.h_upd, self.x_upd = SAMPLERS[resample](channels, False), SAMPLERS[resample](channels, False)
        modulation = nn.Linear(emb_channels, out_channels * (2 if use_scale_shift_norm else 1))
        self.emb_layers = nn.Sequential(nn.SiLU(), modulation)
        conv = zeroed(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        self.out_layers = nn.Sequential(GroupNorm32(out_channels), nn.SiLU(), nn.Dropout(dropout), conv)
        same = channels == out_channels
        self.skip_connection = nn.Identity() if same else nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """Maps (B, channels, H, W) and embeddings (B, emb_channels) to (B, out_channels, H', W')."""
        if self.resample is None:
            h = self.in_layers(x)
        else:
            norm, activation, conv = self.in_layers
            h, x = conv(self.h_upd(activation(norm(x)))), self.x_upd(x)
        modulation = self.emb_layers(emb)[:, :, None, None]
        if self.use_scale_shift_norm:
            norm, activation, dropout, conv = self.out_layers
            scale, shift = modulation.chunk(2, dim=1)
            h = conv(dropout(activation(norm(h) * (1 + scale) + shift)))
        else:
            h = self.out_layers(h + modulation)
        return self.skip_connection(x) + h


class AttentionBlock(nn.Module):
    """Residual self-attention over the cells of a map.

    Args:
        channels: Channels of the map.
        num_heads: Heads, where `num_head_channels` is -1.
        num_head_channels: Channels of a head, or -1.
        use_new_attention_order: Channels of `qkv` run (one of q k v, head, channel) in place of (head, one of q k v,
            channel). Weights of both orders have the same shapes, so only the config can tell.

    Raises:
        ConfigError: The channels cannot be shared out evenly among the heads.
    """

    def __init__(self, channels: int, num_heads: int, num_head_channels: int, use_new_attention_order: bool):
        super().__init__()
        if channels % (num_heads if num_head_channels == -1 else num_head_channels):
            raise ConfigError(
                f"attention over {channels} channels: num_heads={num_heads}, num_head_channels={num_head_channels} "
                "do not share them out evenly"
            )
        self.num_heads = num_heads if num_head_channels == -1 else channels // num_head_channels
        self.use_new_attention_order = use_new_attention_order
        self.norm = GroupNorm32(channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = zeroed(nn.Conv1d(channels, channels, 1))

    def split_qkv(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Takes apart the output of `qkv`.

        Args:
            qkv: (B, 3C, N).

        Returns:
            Queries, keys and values, each (B, N, C) with the heads one after the other.
        """
        if self.use_new_attention_order:
            parts = qkv.unflatten(1, (3, self.num_heads, -1))
        else:
            parts = qkv.unflatten(1, (self.num_heads, 3, -1)).transpose(1, 2)
        # Contiguous, since fused attention kernels want the channels to run fastest.
        return parts.permute(1, 0, 4, 2, 3).contiguous().flatten(3).unbind(0)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the map (B, C, H, W) after attention; logits are scaled by 1 / sqrt(channels of a head)."""
        parts = self.split_qkv(self.qkv(self.norm(x.flatten(2))))
        q, k, v = (part.unflatten(2, (self.num_heads, -1)).transpose(1, 2) for part in parts)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(2, 3).flatten(1, 2)
        return x + self.proj_out(mixed).unflatten(2, x.shape[2:])


class EmbedSequential(nn.Sequential):
    """Layers in a row, of which the residual blocks take the embedding too."""

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """Maps (B, C, H, W) and embeddings (B, emb_channels) to (B, C', H', W')."""
        for layer in self:
            x = layer(x, emb) if isinstance(layer, ResBlock) else layer(x)
        return x


def zeroed(conv: nn.Module) -> nn.Module:
    """Sets a layer's parameters to zero and returns it."""
    for parameter in conv.parameters():
        nn.init.zeros_(parameter)
    return conv
