"""State dicts of diffusion transformers between the official layout and diffusers' `DiTTransformer2DModel`."""

from __future__ import annotations

import re
from typing import Any

import torch

from diffrep.errors import CheckpointError

State = dict[str, torch.Tensor]
# Official name -> diffusers name; {i} is the block. The embedders stand in every block of diffusers, all alike.
WHOLE = {
    "x_embedder.proj": "pos_embed.proj",
    "final_layer.adaLN_modulation.1": "proj_out_1",
    "final_layer.linear": "proj_out_2",
}
EMBEDDERS = {
    "t_embedder.mlp.0": "norm1.emb.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "norm1.emb.timestep_embedder.linear_2",
    "y_embedder.embedding_table": "norm1.emb.class_embedder.embedding_table",
}
BLOCK = {
    "adaLN_modulation.1": "norm1.linear",
    "attn.proj": "attn1.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
}
HEADS = ("attn1.to_q", "attn1.to_k", "attn1.to_v")


def arguments_from_diffusers(config: dict[str, Any]) -> dict[str, Any]:
    """Returns the arguments of `DiT` for a config of `DiTTransformer2DModel`."""
    heads, channels = config["num_attention_heads"], config["in_channels"]
    return {
        "input_size": config["sample_size"],
        "patch_size": config["patch_size"],
        "in_channels": channels,
        "hidden_size": heads * config["attention_head_dim"],
        "depth": config["num_layers"],
        "num_heads": heads,
        "num_classes": config["num_embeds_ada_norm"],
        "learn_sigma": (config.get("out_channels") or channels) == 2 * channels,
    }


def config_for_diffusers(arguments: dict[str, Any]) -> dict[str, Any]:
    """Returns the config of `DiTTransformer2DModel` for arguments of `DiT`.

    Raises:
        CheckpointError: The class has no form for these arguments.
    """
    usual = {"qk_norm": False, "z_dims": [], "time_scale": 1.0, "mlp_ratio": 4.0, "drop_sigma": False}
    given = arguments | {"z_dims": list(arguments["z_dims"])}
    odd = [f"{name}={given[name]!r}" for name in usual if given[name] != usual[name]]
    if not given["class_dropout_prob"] > 0:
        odd.append(f"class_dropout_prob={given['class_dropout_prob']!r} (labels without a null row)")
    if odd:
        raise CheckpointError(f"DiTTransformer2DModel has no {', '.join(odd)}; only a usual DiT converts to it")
    channels = arguments["in_channels"]
    return {
        "sample_size": arguments["input_size"],
        "patch_size": arguments["patch_size"],
        "in_channels": channels,
        "out_channels": 2 * channels if arguments["learn_sigma"] else channels,
        "num_layers": arguments["depth"],
        "num_attention_heads": arguments["num_heads"],
        "attention_head_dim": arguments["hidden_size"] // arguments["num_heads"],
        "num_embeds_ada_norm": arguments["num_classes"],
    }


def from_diffusers(state: State, positions: torch.Tensor) -> State:
    """Renames a state dict of `DiTTransformer2DModel` to official keys.

    Args:
        state: Its state dict.
        positions: The position table, which diffusers computes and does not store.

    Raises:
        CheckpointError: The embedders, which that class has in every block, are not all alike.
    """
    depth = 1 + max(int(key.split(".")[1]) for key in state if key.startswith("transformer_blocks."))
    _check_embedders(state, depth)
    named = {"pos_embed": positions}
    for suffix in ("weight", "bias"):
        for official, theirs in WHOLE.items():
            named[f"{official}.{suffix}"] = state[f"{theirs}.{suffix}"]
        for official, theirs in EMBEDDERS.items():
            if f"transformer_blocks.0.{theirs}.{suffix}" in state:
                named[f"{official}.{suffix}"] = state[f"transformer_blocks.0.{theirs}.{suffix}"]
        for i in range(depth):
            for official, theirs in BLOCK.items():
                named[f"blocks.{i}.{official}.{suffix}"] = state[f"transformer_blocks.{i}.{theirs}.{suffix}"]
            parts = [state[f"transformer_blocks.{i}.{head}.{suffix}"] for head in HEADS]
            named[f"blocks.{i}.attn.qkv.{suffix}"] = torch.cat(parts)
    return named


def _check_embedders(state: State, depth: int) -> None:
    names = [f"{theirs}.{suffix}" for theirs in EMBEDDERS.values() for suffix in ("weight", "bias")]
    for name in names:
        first = state.get(f"transformer_blocks.0.{name}")
        if first is None or first.is_meta:
            continue
        for i in range(1, depth):
            if not torch.equal(first, state[f"transformer_blocks.{i}.{name}"]):
                raise CheckpointError(
                    f"{name} of block {i} differs from that of block 0, and the official DiT has one for all; weights "
                    "trained with diffusers' class are opened as they are by family='diffusers-dit'"
                )


def to_diffusers(state: State) -> State:
    """Renames an official state dict to the keys of `DiTTransformer2DModel`."""
    depth = 1 + max(int(key.split(".")[1]) for key in state if key.startswith("blocks."))
    named = {}
    for suffix in ("weight", "bias"):
        for official, theirs in WHOLE.items():
            named[f"{theirs}.{suffix}"] = state[f"{official}.{suffix}"]
        for i in range(depth):
            place = f"transformer_blocks.{i}"
            for official, theirs in EMBEDDERS.items():
                if f"{official}.{suffix}" in state:
                    named[f"{place}.{theirs}.{suffix}"] = state[f"{official}.{suffix}"].clone()
            for official, theirs in BLOCK.items():
                named[f"{place}.{theirs}.{suffix}"] = state[f"blocks.{i}.{official}.{suffix}"]
            for head, part in zip(HEADS, state[f"blocks.{i}.attn.qkv.{suffix}"].chunk(3), strict=True):
                named[f"{place}.{head}.{suffix}"] = part.clone()
    return named


def modern_keys(state: State) -> State:
    """Brings REPA's first key layout up to date: `decoder_blocks.K` follow the `blocks` there are."""
    split = len({key.split(".")[1] for key in state if key.startswith("blocks.")})

    def rename(key: str) -> str:
        return re.sub(r"^decoder_blocks\.(\d+)", lambda match: f"blocks.{split + int(match[1])}", key)

    return {rename(key): value for key, value in state.items()}
