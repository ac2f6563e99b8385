"""Which tensors inside a network lie on the image's grid."""

from __future__ import annotations

from torch import nn

from diffrep.taps import Address

# Parts of diffusers' transformers that hold the prompt's tokens, which may be as many as the image's.
TEXT_PARTS = (
    "context_embedder",
    "caption_projection",
    "caption_norm",
    "norm1_context",
    "norm2_context",
    "ff_context",
    "add_q_proj",
    "add_k_proj",
    "add_v_proj",
    "to_add_out",
)
# Norms inside attention, which run on (B, N, heads, d) or (B, heads, N, d).
HEAD_PARTS = ("norm_q", "norm_k", "norm_added_q", "norm_added_k", "q_norm", "k_norm")


def is_spatial(network: nn.Module, address: Address, dimensions: int) -> bool:
    """Whether a tensor is a map (B, C, H, W) or tokens (B, N, C) of the image: no (B, C, N), no heads, no text.

    Args:
        network: The network.
        address: Where the tensor is read.
        dimensions: How many dimensions it has, 3 or 4.
    """
    path = address.module.split(".")
    if address.point == "output" and path[-1] in HEAD_PARTS:
        return False
    if dimensions == 4:
        return True
    if address.point == "output" and isinstance(network.get_submodule(address.module), (nn.GroupNorm, nn.Conv1d)):
        return False
    if any(part in TEXT_PARTS for part in path):
        return False
    of_keys = path[-1] in ("to_k", "to_v") or address.point in ("k", "v")
    holder = ".".join(path[:-1] if path[-1] in ("to_k", "to_v") else path)
    return not (of_keys and getattr(network.get_submodule(holder), "is_cross_attention", False))
