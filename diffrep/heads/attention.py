"""Heads that read a feature map with a small transformer."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from diffrep.errors import ConfigError, UnknownNameError
from diffrep.heads.head import Head

# Layer of the layer string -> types of its arguments.
GRAMMAR: dict[str, tuple[type, ...]] = {
    "Use_CLS_Token": (str, int),
    "Pool": (int, int),
    "Reshape": (),
    "Flatten": (),
    "Insert_CLS_Token": (),
    "Attention": (int, int, float, int),
    "Extract_CLS_Token": (),
    "FullyPool": (),
    "Dense": (int, int, str),
}
ACTIVATIONS = {"identity": None, "relu": nn.ReLU, "sigmoid": nn.Sigmoid, "tanh": nn.Tanh}


class AttentionPool(Head):
    """Reads a feature map with a small transformer through one class token.

    Batch norm without affine, a 1x1 projection to `width`, learned positions, pre-norm transformer blocks over the
    cells and a class token, layer norm, a linear map of the class token. diffssl (Mukhopadhyay et al., 2024)
    introduced such a head for diffusion features; its exact form with its state-dict keys is `AttentionHead`.

    Args:
        channels: Channels of the map.
        size: (h, w) of the map.
        classes: Number of classes.
        width: Token width.
        depth: Transformer blocks.
        heads: Attention heads; divides `width`.
        dropout: Dropout in the blocks.

    Raises:
        ConfigError: `heads` does not divide `width`.
    """

    def __init__(
        self,
        channels: int,
        size: tuple[int, int],
        classes: int,
        width: int = 128,
        depth: int = 2,
        heads: int = 4,
        dropout: float = 0.1,
    ):
        super().__init__()
        _check_heads(width, heads)
        self.norm = nn.BatchNorm2d(channels, affine=False)
        self.project = nn.Conv2d(channels, width, 1)
        self.positions = nn.Parameter(0.02 * torch.randn(1, size[0] * size[1], width))
        self.query = nn.Parameter(0.02 * torch.randn(1, 1, width))
        block = nn.TransformerEncoderLayer(
            width, heads, 4 * width, dropout, activation="gelu", batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(block, depth, norm=nn.LayerNorm(width), enable_nested_tensor=False)
        self.classify = nn.Linear(width, classes)

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        """Returns scores (B, classes) for maps (B, channels, h, w)."""
        tokens = self.project(self.norm(maps.float())).flatten(2).transpose(1, 2) + self.positions
        tokens = torch.cat([self.query.expand(len(tokens), -1, -1), tokens], dim=1)
        return self.classify(self.blocks(tokens)[:, 0])


class AttentionHead(Head):
    """Reads maps or tokens with the layers of a diffssl layer string.

    diffssl (Mukhopadhyay et al., 2024) writes its heads as layers with commas between them:

        Use_CLS_Token:True:1024,Pool:2:2,Reshape,Insert_CLS_Token,
        Attention:1024:8:4:2,Extract_CLS_Token,Dense:1024:50:identity

    `Use_CLS_Token:<True|False>:<dim>` makes the class token, zero at first; `Pool:<kernel>:<stride>` averages cells;
    `Reshape` turns maps into tokens; `Insert_CLS_Token` puts the class token first; `Attention:<dim>:<heads>:<MLP
    ratio>:<blocks>` adds transformer blocks; `Extract_CLS_Token` keeps the class token, `FullyPool` the mean token;
    `Flatten`; `Dense:<in>:<out>:<identity|relu|sigmoid|tanh>`. There are no positions and no last norm. State-dict
    keys are the published ones: `cls_token`, `layers.3.attn.qkv.weight`.

    In the published code False means True, as any text does. Here it means no class token; weights that were trained
    with it load under True.

    Args:
        layers: The layer string.
        dropout: Dropout on attention weights and after each linear map of the blocks; it changes no key.

    Raises:
        UnknownNameError: There is no such layer or activation.
        ConfigError: A layer has wrong arguments, or the class token is used and not made.
    """

    def __init__(self, layers: str, dropout: float = 0.0):
        super().__init__()
        parsed = [_parse(text.strip()) for text in layers.split(",")]
        wanted = dict(arguments for name, arguments in parsed if name == "Use_CLS_Token")
        if strange := wanted.keys() - {"True", "False"}:
            raise ConfigError(f"Use_CLS_Token takes True or False, not {strange.pop()!r}")
        has_token = "True" in wanted
        names = [name for name, _ in parsed]
        if not has_token and {"Insert_CLS_Token", "Extract_CLS_Token"} & set(names):
            raise ConfigError(
                f"{layers!r} reads a class token and makes none; begin with Use_CLS_Token:True:<dim>, or use "
                "FullyPool in place of Insert_CLS_Token and Extract_CLS_Token"
            )
        if has_token:
            self.cls_token = nn.Parameter(torch.zeros(1, 1, wanted["True"]))
        self.layers = nn.Sequential(*(module for layer in parsed for module in _modules(*layer, dropout)))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Returns scores (B, classes) for maps (B, C, h, w), or tokens (B, N, C) where no layer reshapes."""
        x = features.float()
        for layer in self.layers:
            x = layer(x, self.cls_token) if isinstance(layer, _InsertToken) else layer(x)
        return x


class Block(nn.Module):
    """A pre-norm transformer block (B, N, dim) -> (B, N, dim); query, key and value have no bias.

    Args:
        dim: Token width.
        heads: Attention heads.
        mlp_ratio: Width of the MLP over `dim`.
        dropout: Dropout on attention weights and after each linear map.

    Raises:
        ConfigError: `heads` does not divide `dim`.
    """

    def __init__(self, dim: int, heads: int, mlp_ratio: float = 4.0, dropout: float = 0.0):
        super().__init__()
        _check_heads(dim, heads)
        self.norm1 = nn.LayerNorm(dim)
        self.attn = _Attention(dim, heads, dropout)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = _MLP(dim, int(dim * mlp_ratio), dropout)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Returns the tokens after attention and MLP."""
        tokens = tokens + self.attn(self.norm1(tokens))
        return tokens + self.mlp(self.norm2(tokens))


class _Attention(nn.Module):
    def __init__(self, dim: int, heads: int, dropout: float):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.proj = nn.Linear(dim, dim)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(tokens).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        rate = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=rate)
        return F.dropout(self.proj(mixed.transpose(1, 2).flatten(2)), rate)


class _MLP(nn.Module):
    def __init__(self, dim: int, hidden: int, dropout: float):
        super().__init__()
        self.dropout = dropout
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = F.dropout(F.gelu(self.fc1(tokens)), self.dropout, self.training)
        return F.dropout(self.fc2(hidden), self.dropout, self.training)


class _ToTokens(nn.Module):
    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        return maps.flatten(2).transpose(1, 2)


class _InsertToken(nn.Module):
    def forward(self, tokens: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
        return torch.cat([token.expand(len(tokens), -1, -1), tokens], dim=1)


class _FirstToken(nn.Module):
    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return tokens[:, 0]


class _MeanToken(nn.Module):
    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return tokens.mean(1)


# Layers without arguments.
_PLAIN = {
    "Reshape": _ToTokens,
    "Flatten": nn.Flatten,
    "Insert_CLS_Token": _InsertToken,
    "Extract_CLS_Token": _FirstToken,
    "FullyPool": _MeanToken,
}


def _check_heads(width: int, heads: int) -> None:
    if width % heads:
        raise ConfigError(f"{heads} attention heads do not divide the token width {width}")


def _parse(text: str) -> tuple[str, list]:
    name, *given = text.split(":")
    if name not in GRAMMAR:
        raise UnknownNameError("layer", name, GRAMMAR)
    types = GRAMMAR[name]
    try:
        return name, [kind(argument) for kind, argument in zip(types, given, strict=True)]
    except ValueError as error:
        form = ":".join([name, *(f"<{kind.__name__}>" for kind in types)])
        raise ConfigError(f"{text!r} should have the form {form}") from error


def _modules(name: str, arguments: list, dropout: float) -> list[nn.Module]:
    if name == "Use_CLS_Token":
        return []
    if name == "Attention":
        dim, heads, ratio, count = arguments
        return [Block(dim, heads, ratio, dropout) for _ in range(count)]
    if name == "Pool":
        return [nn.AvgPool2d(*arguments)]
    if name == "Dense":
        *sizes, activation = arguments
        if activation not in ACTIVATIONS:
            raise UnknownNameError("activation", activation, ACTIVATIONS)
        return [nn.Linear(*sizes), *([] if activation == "identity" else [ACTIVATIONS[activation]()])]
    return [_PLAIN[name]()]
