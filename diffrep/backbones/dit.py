"""Diffusion transformers with the official state-dict keys: DiT, SiT and REPA's SiT in one module.

DiT: Peebles and Xie (2023). SiT: Ma et al. (2024). REPA: Yu et al. (2025). The three share every key but REPA's
`projectors.*`; they differ in what the last layer gives, in the time they are fed and in the direction it runs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

from diffrep.backbones.timestep import timestep_embedding
from diffrep.errors import ConfigError

# Width of the time's sinusoids.
FREQUENCIES = 256


class PatchEmbed(nn.Module):
    """Cuts the input into patches and embeds each: (B, C, H, W) to (B, N, D)."""

    def __init__(self, patch_size: int, in_channels: int, hidden_size: int):
        super().__init__()
        self.proj = nn.Conv2d(in_channels, hidden_size, patch_size, stride=patch_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Embeds."""
        return self.proj(x).flatten(2).transpose(1, 2)


class TimestepEmbedder(nn.Module):
    """Sinusoids of the time, [cos | sin] with frequencies 1e4^(-i/128), and a two-layer MLP."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(FREQUENCIES, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))

    def forward(self, time: torch.Tensor) -> torch.Tensor:
        """Embeds times (B,) to (B, D)."""
        return self.mlp(timestep_embedding(time, FREQUENCIES).to(self.mlp[0].weight.dtype))


class LabelEmbedder(nn.Module):
    """A table of class embeddings whose last row, present where labels are dropped in training, is "no class"."""

    def __init__(self, num_classes: int, hidden_size: int, dropout: float):
        super().__init__()
        self.num_classes = num_classes
        self.dropout = dropout
        self.embedding_table = nn.Embedding(num_classes + (dropout > 0), hidden_size)

    def forward(self, labels: torch.Tensor) -> torch.Tensor:
        """Embeds labels (B,) to (B, D); in training each becomes "no class" with probability `dropout`."""
        if self.training and self.dropout > 0:
            drop = torch.rand(len(labels), device=labels.device) < self.dropout
            labels = torch.where(drop, self.num_classes, labels)
        return self.embedding_table(labels)


class Attention(nn.Module):
    """Multi-head self-attention over (B, N, D)."""

    def __init__(self, hidden_size: int, heads: int, qk_norm: bool):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.q_norm = nn.LayerNorm(hidden_size // heads) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(hidden_size // heads) if qk_norm else nn.Identity()
        self.proj = nn.Linear(hidden_size, hidden_size)

    def split_qkv(self, qkv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Splits the output of `qkv` (B, N, 3D) into queries, keys and values (B, N, D)."""
        return qkv.chunk(3, dim=-1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Attends."""
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.split_qkv(self.qkv(x)))
        out = F.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v)
        return self.proj(out.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Two linear layers with the tanh form of GELU between them."""

    def __init__(self, hidden_size: int, inner_size: int):
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, inner_size)
        self.fc2 = nn.Linear(inner_size, hidden_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Transforms each token."""
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Block(nn.Module):
    """A transformer block whose norms are shifted, scaled and gated by the condition (adaLN-Zero)."""

    def __init__(self, hidden_size: int, heads: int, mlp_ratio: float, qk_norm: bool):
        super().__init__()
        self.norm1 = _norm(hidden_size)
        self.attn = Attention(hidden_size, heads, qk_norm)
        self.norm2 = _norm(hidden_size)
        self.mlp = Mlp(hidden_size, int(hidden_size * mlp_ratio))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))

    def forward(self, x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        """Returns the residual stream (B, N, D) after the block, for a condition (B, D)."""
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaLN_modulation(c)[:, None].chunk(6, dim=-1)
        x = x + gate_a * self.attn(_modulate(self.norm1(x), shift_a, scale_a))
        return x + gate_m * self.mlp(_modulate(self.norm2(x), shift_m, scale_m))


class FinalLayer(nn.Module):
    """Modulated norm and the projection of tokens to patches."""

    def __init__(self, hidden_size: int, patch_size: int, out_channels: int):
        super().__init__()
        self.norm_final = _norm(hidden_size)
        self.linear = nn.Linear(hidden_size, patch_size**2 * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        """Returns patches (B, N, patch^2 * channels), the channel running fastest."""
        shift, scale = self.adaLN_modulation(c)[:, None].chunk(2, dim=-1)
        return self.linear(_modulate(self.norm_final(x), shift, scale))


class DiT(nn.Module):
    """A class-conditional diffusion transformer; see the module's docstring.

    Args:
        input_size: Side of the input that the position table is made for; other sizes rescale positions to it.
        patch_size: Side of a patch.
        in_channels: Channels of the input.
        hidden_size: Token width.
        depth: Blocks.
        num_heads: Attention heads.
        mlp_ratio: Inner width of the MLPs over `hidden_size`.
        class_dropout_prob: Share of labels dropped in training; above 0 the label table has a "no class" row.
        num_classes: Classes.
        learn_sigma: Whether the last layer gives variances beside the prediction: 2 * in_channels channels.
        drop_sigma: Whether `forward` leaves those variances out, as SiT does.
        time_scale: Multiplies the time before it is embedded; 1 in all published weights.
        qk_norm: LayerNorm on queries and keys.
        z_dims: Widths of REPA's projections, one for each target encoder.
        projector_dim: Inner width of the projectors.
        encoder_depth: The projectors read the stream after this many blocks.

    Raises:
        ConfigError: The width is no multiple of the heads or of 4, or the projectors' depth is none of the blocks.
    """

    def __init__(
        self,
        input_size: int = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        hidden_size: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        class_dropout_prob: float = 0.1,
        num_classes: int = 1000,
        learn_sigma: bool = True,
        drop_sigma: bool = False,
        time_scale: float = 1.0,
        qk_norm: bool = False,
        z_dims: Sequence[int] = (),
        projector_dim: int = 2048,
        encoder_depth: int = 8,
    ):
        super().__init__()
        if hidden_size % num_heads or hidden_size % 4:
            raise ConfigError(f"hidden_size must be a multiple of num_heads, {num_heads}, and of 4, got {hidden_size}")
        if z_dims and not 1 <= encoder_depth <= depth:
            raise ConfigError(f"encoder_depth must lie between 1 and depth, {depth}, got {encoder_depth}")
        self.input_size = input_size
        self.patch_size = patch_size
        self.in_channels = in_channels
        self.num_classes = num_classes
        self.drop_sigma = drop_sigma
        self.time_scale = time_scale
        self.encoder_depth = encoder_depth
        out_channels = in_channels * 2 if learn_sigma else in_channels
        self.x_embedder = PatchEmbed(patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size, class_dropout_prob)
        side = input_size // patch_size
        self.pos_embed = nn.Parameter(sincos_positions(hidden_size, side, side, side)[None], requires_grad=False)
        self.blocks = nn.ModuleList(Block(hidden_size, num_heads, mlp_ratio, qk_norm) for _ in range(depth))
        self.final_layer = FinalLayer(hidden_size, patch_size, out_channels)
        if z_dims:
            self.projectors = nn.ModuleList(_projector(hidden_size, projector_dim, width) for width in z_dims)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialises as the official code: Xavier, normals in the embedders, zeros in modulations and last layer."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.view(len(self.x_embedder.proj.weight), -1))
        nn.init.zeros_(self.x_embedder.proj.bias)
        for table in (self.y_embedder.embedding_table, self.t_embedder.mlp[0], self.t_embedder.mlp[2]):
            nn.init.normal_(table.weight, std=0.02)
        for layer in (*(block.adaLN_modulation[1] for block in self.blocks), self.final_layer.adaLN_modulation[1]):
            nn.init.zeros_(layer.weight)
        nn.init.zeros_(self.final_layer.linear.weight)

    def forward(
        self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor, project: bool = False
    ) -> torch.Tensor | tuple[torch.Tensor, list[torch.Tensor]]:
        """Predicts.

        Args:
            x: Noised input (B, C, H, W), sides divisible by the patch.
            t: Native time (B,).
            y: Labels (B,) int64; `num_classes` is "no class".
            project: Also return REPA's projections.

        Returns:
            The prediction (B, C or 2C, H, W); with `project` also the projections, (B, N, z) each.
        """
        height, width = x.shape[-2:]
        c = self.t_embedder(t * self.time_scale) + self.y_embedder(y)
        x = self.x_embedder(x) + self.positions(height, width)
        for number, block in enumerate(self.blocks, start=1):
            x = block(x, c)
            if number == self.encoder_depth:
                aligned = x
        out = self._unpatchify(self.final_layer(x, c), height, width)
        out = out[:, : self.in_channels] if self.drop_sigma else out
        if not project:
            return out
        return out, [projector(aligned) for projector in self.projectors]

    def positions(self, height: int, width: int) -> torch.Tensor:
        """Returns the position table (1, N, D) for an input of (height, width)."""
        if (height, width) == (self.input_size, self.input_size):
            return self.pos_embed
        table = sincos_positions(
            self.pos_embed.shape[-1],
            height // self.patch_size,
            width // self.patch_size,
            self.input_size // self.patch_size,
        )
        return table[None].to(self.pos_embed)

    def _unpatchify(self, patches: torch.Tensor, height: int, width: int) -> torch.Tensor:
        p = self.patch_size
        grid = patches.unflatten(1, (height // p, width // p)).unflatten(-1, (p, p, -1))
        return grid.permute(0, 5, 1, 3, 2, 4).reshape(len(patches), -1, height, width)


def sincos_positions(width: int, rows: int, columns: int, base: int) -> torch.Tensor:
    """Returns the fixed 2-d position table (rows * columns, width).

    The first half of the channels encodes the column, the second the row, each as [sin | cos]. A grid other than
    base x base is rescaled to span the same positions, as diffusers' `PatchEmbed` does.
    """
    omega = 1e4 ** -(torch.arange(width // 4, dtype=torch.float64) / (width / 4))
    row = torch.arange(rows, dtype=torch.float64) * (base / rows)
    column = torch.arange(columns, dtype=torch.float64) * (base / columns)

    def encode(positions: torch.Tensor) -> torch.Tensor:
        angles = positions[:, None] * omega
        return torch.cat([angles.sin(), angles.cos()], dim=1)

    across = encode(column).expand(rows, -1, -1)
    down = encode(row)[:, None].expand(-1, columns, -1)
    return torch.cat([across, down], dim=-1).flatten(0, 1).float()


def _norm(width: int) -> nn.LayerNorm:
    return nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)


def _modulate(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return x * (1 + scale) + shift


def _projector(hidden_size: int, inner: int, width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(hidden_size, inner), nn.SiLU(), nn.Linear(inner, inner), nn.SiLU(), nn.Linear(inner, width)
    )
