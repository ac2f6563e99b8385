"""Layers of EDM's networks, with the names and numbers of NVlabs/edm (Karras et al., 2022)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PositionalEmbedding(nn.Module):
    """Cosines, then sines, of a noise label at geometric frequencies from 1 down to 1/10000.

    Args:
        channels: Width of the embedding.
        endpoint: Reach 1/10000 at the last frequency, as DDPM++ does, in place of one step after it, as ADM does.
    """

    def __init__(self, channels: int, endpoint: bool = False):
        super().__init__()
        self.half, self.endpoint = channels // 2, endpoint

    def forward(self, noise_labels: Tensor) -> Tensor:
        """Embeds labels (B,) to (B, channels) in fp32."""
        steps = torch.arange(self.half, dtype=torch.float32, device=noise_labels.device)
        phases = noise_labels.float()[:, None] * (1 / 10000) ** (steps / (self.half - self.endpoint))
        return torch.cat([phases.cos(), phases.sin()], dim=1)


class FourierEmbedding(nn.Module):
    """Cosines, then sines, of a noise label at random frequencies that the checkpoint holds.

    Args:
        channels: Width of the embedding.
        scale: Standard deviation of the frequencies.
    """

    def __init__(self, channels: int, scale: float = 16):
        super().__init__()
        self.register_buffer("freqs", torch.randn(channels // 2) * scale)

    def forward(self, noise_labels: Tensor) -> Tensor:
        """Embeds labels (B,) to (B, channels) in fp32."""
        phases = noise_labels.float()[:, None] * (2 * math.pi * self.freqs)
        return torch.cat([phases.cos(), phases.sin()], dim=1)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        # Phases reach hundreds of radians, so frequencies rounded to half precision would embed another noise level.
        exact = self.freqs
        super()._apply(fn, recurse)
        if self.freqs.dtype != torch.float32:
            self.freqs = exact.to(self.freqs.device)
        return self


class Resample(nn.Module):
    """Halves or doubles a map with a separable filter.

    Args:
        up: Double in place of halving.
        resample_filter: Taps along one axis; they are normalised to a sum of 1.
    """

    def __init__(self, up: bool, resample_filter: Sequence[float]):
        super().__init__()
        self.up = up
        self.register_buffer("resample_filter", _separable(resample_filter))

    def forward(self, x: Tensor) -> Tensor:
        """Resamples (B, C, H, W)."""
        return _resample(x, self.resample_filter, self.up)


class ResampledConv(nn.Conv2d):
    """A convolution of a map that is halved or doubled first.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        kernel: Side of the kernel.
        up: Double in place of halving.
        resample_filter: As for `Resample`.
        filter_last: Convolve at full size and halve then, as NCSN++'s residual branch does.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int,
        up: bool,
        resample_filter: Sequence[float],
        filter_last: bool = False,
    ):
        super().__init__(in_channels, out_channels, kernel, padding=kernel // 2)
        self.up, self.filter_last = up, filter_last
        self.register_buffer("resample_filter", _separable(resample_filter))

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, in_channels, H, W) to (B, out_channels, H / 2, W / 2), or twice the size."""
        if not self.filter_last:
            return super().forward(_resample(x, self.resample_filter, self.up))
        # Both paddings come before the convolution: the filter sees convolved padding, not zeros.
        margin = self.padding[0] + (self.resample_filter.shape[-1] - 1) // 2
        return _resample(F.conv2d(x, self.weight, self.bias, padding=margin), self.resample_filter, self.up, pad=0)


class EDMBlock(nn.Module):
    """A residual block with optional resampling and self-attention: the one block of all these networks.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        emb_channels: Width of the noise embedding.
        resample: "up", "down" or None.
        attention: Attend after the convolutions.
        num_heads: Heads of the attention; None gives out_channels // 64, hence no attention below 64 channels.
        dropout: Before the second convolution, in training.
        skip_scale: Factor on every residual sum.
        eps: Of the norms.
        resample_filter: As for `Resample`.
        project_resampled: Convolve (1 x 1) the shortcut of a resampling block even where its channels stay.
        adaptive_scale: The embedding gives a scale and a shift, in place of a shift before the norm.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        emb_channels: int,
        resample: str | None = None,
        attention: bool = False,
        num_heads: int | None = None,
        dropout: float = 0.0,
        skip_scale: float = 1.0,
        eps: float = 1e-5,
        resample_filter: Sequence[float] = (1, 1),
        project_resampled: bool = False,
        adaptive_scale: bool = True,
    ):
        super().__init__()
        self.dropout, self.skip_scale, self.adaptive_scale = dropout, skip_scale, adaptive_scale
        self.num_heads = (out_channels // 64 if num_heads is None else num_heads) if attention else 0
        conv = partial(_conv, resample=resample, resample_filter=resample_filter)
        self.norm0 = norm(in_channels, eps)
        self.conv0 = conv(in_channels, out_channels, 3)
        self.affine = nn.Linear(emb_channels, out_channels * (2 if adaptive_scale else 1))
        self.norm1 = norm(out_channels, eps)
        self.conv1 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.skip = None
        if in_channels != out_channels or (resample and project_resampled):
            self.skip = conv(in_channels, out_channels, 1)
        elif resample:
            self.skip = Resample(resample == "up", resample_filter)
        if self.num_heads:
            self.norm2 = norm(out_channels, eps)
            self.qkv = nn.Conv2d(out_channels, 3 * out_channels, 1)
            self.proj = nn.Conv2d(out_channels, out_channels, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """Maps (B, in_channels, H, W) and embeddings (B, emb_channels) to (B, out_channels, H', W')."""
        hidden = self.conv0(F.silu(self.norm0(x)))
        modulation = self.affine(emb)[:, :, None, None]
        if self.adaptive_scale:
            scale, shift = modulation.chunk(2, dim=1)
            hidden = F.silu(torch.addcmul(shift, self.norm1(hidden), scale + 1))
        else:
            hidden = F.silu(self.norm1(hidden + modulation))
        hidden = self.conv1(F.dropout(hidden, self.dropout, self.training))
        x = (hidden + (x if self.skip is None else self.skip(x))) * self.skip_scale
        return (self._attend(x) + x) * self.skip_scale if self.num_heads else x

    def split_qkv(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Takes apart the output of `qkv`, whose channels run (head, channel, one of q k v).

        Args:
            qkv: (B, 3C, H, W).

        Returns:
            Queries, keys and values, each (B, H * W, C) with the heads one after the other.
        """
        parts = qkv.reshape(len(qkv), qkv.shape[1] // 3, 3, -1).permute(2, 0, 3, 1)
        return parts.contiguous().unbind(0)  # fused attention kernels want the channels to run fastest

    def _attend(self, x: Tensor) -> Tensor:
        parts = self.split_qkv(self.qkv(self.norm2(x)))
        q, k, v = (part.unflatten(2, (self.num_heads, -1)).transpose(1, 2) for part in parts)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(2, 3)
        return self.proj(mixed.reshape(x.shape))


def norm(channels: int, eps: float) -> nn.GroupNorm:
    """Returns a group norm of 32 groups, or fewer where a group would hold less than 4 channels."""
    return nn.GroupNorm(min(32, channels // 4), channels, eps=eps)


def _conv(
    in_channels: int, out_channels: int, kernel: int, resample: str | None, resample_filter: Sequence[float]
) -> nn.Conv2d:
    if resample is None:
        return nn.Conv2d(in_channels, out_channels, kernel, padding=kernel // 2)
    return ResampledConv(in_channels, out_channels, kernel, resample == "up", resample_filter)


def _separable(taps: Sequence[float]) -> Tensor:
    line = torch.tensor(taps, dtype=torch.float32)
    return (torch.outer(line, line) / line.sum().square())[None, None]


def _resample(x: Tensor, resample_filter: Tensor, up: bool, pad: int | None = None) -> Tensor:
    pad = (resample_filter.shape[-1] - 1) // 2 if pad is None else pad
    channels = x.shape[1]
    weight = resample_filter.to(x.dtype).repeat(channels, 1, 1, 1)
    if up:  # times 4: zeros stand between the samples, and the mean is to stay
        return F.conv_transpose2d(x, 4 * weight, stride=2, padding=pad, groups=channels)
    return F.conv2d(x, weight, stride=2, padding=pad, groups=channels)
