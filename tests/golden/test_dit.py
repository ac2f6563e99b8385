"""diffusers' DiT class, set right, against the official network's numbers."""

import json

import pytest
import torch
from diffusers import DDPMScheduler, DiTTransformer2DModel
from safetensors.torch import load_file

from diffrep import load_backbone


def to_diffusers(state, depth):
    """Renames official keys to those of `DiTTransformer2DModel`; embedders are copied into every block."""
    named = {}
    for w in ("weight", "bias"):
        named[f"pos_embed.proj.{w}"] = state[f"x_embedder.proj.{w}"]
        named[f"proj_out_1.{w}"] = state[f"final_layer.adaLN_modulation.1.{w}"]
        named[f"proj_out_2.{w}"] = state[f"final_layer.linear.{w}"]
        for i in range(depth):
            block, official = f"transformer_blocks.{i}", f"blocks.{i}"
            embedder = f"{block}.norm1.emb.timestep_embedder"
            named[f"{embedder}.linear_1.{w}"] = state[f"t_embedder.mlp.0.{w}"].clone()
            named[f"{embedder}.linear_2.{w}"] = state[f"t_embedder.mlp.2.{w}"].clone()
            named[f"{block}.norm1.linear.{w}"] = state[f"{official}.adaLN_modulation.1.{w}"]
            for name, part in zip("qkv", state[f"{official}.attn.qkv.{w}"].chunk(3), strict=True):
                named[f"{block}.attn1.to_{name}.{w}"] = part.clone()
            named[f"{block}.attn1.to_out.0.{w}"] = state[f"{official}.attn.proj.{w}"]
            named[f"{block}.ff.net.0.proj.{w}"] = state[f"{official}.mlp.fc1.{w}"]
            named[f"{block}.ff.net.2.{w}"] = state[f"{official}.mlp.fc2.{w}"]
    for i in range(depth):
        table = state["y_embedder.embedding_table.weight"].clone()
        named[f"transformer_blocks.{i}.norm1.emb.class_embedder.embedding_table.weight"] = table
    return named


@pytest.fixture(scope="module")
def backbone(golden, tmp_path_factory):
    config = json.loads((golden / "dit" / "dit_tiny.json").read_text())["config"]
    network = DiTTransformer2DModel(
        sample_size=config["input_size"],
        patch_size=config["patch_size"],
        in_channels=config["in_channels"],
        out_channels=2 * config["in_channels"],
        num_layers=config["depth"],
        num_attention_heads=config["num_heads"],
        attention_head_dim=config["hidden_size"] // config["num_heads"],
        num_embeds_ada_norm=config["num_classes"],
    )
    state = to_diffusers(load_file(golden / "dit" / "dit_tiny.safetensors"), config["depth"])
    network.load_state_dict(state, strict=True)
    folder = tmp_path_factory.mktemp("dit")
    network.save_pretrained(folder / "transformer")
    DDPMScheduler().save_pretrained(folder / "scheduler")
    return load_backbone(folder, device="cpu")


def test_blocks_and_output(backbone, golden):
    io = load_file(golden / "dit" / "dit_tiny_io.safetensors")
    found = backbone.capture(io["x"], io["t"], ["blocks"], cond=io["y"], tokens=True)
    assert len(found) == 4
    for i in range(4):
        torch.testing.assert_close(found[f"transformer_blocks.{i}"], io[f"blocks.{i}"], atol=2e-5, rtol=0)
    torch.testing.assert_close(backbone.denoise(io["x"], io["t"], cond=io["y"]), io["out"], atol=2e-5, rtol=0)


def test_no_condition_is_the_null_row(backbone, golden):
    io = load_file(golden / "dit" / "dit_tiny_io.safetensors")
    null = backbone.capture(io["x"], io["t"], ["transformer_blocks.3"])
    given = backbone.capture(io["x"], io["t"], ["transformer_blocks.3"], cond=torch.full((3,), 10))
    torch.testing.assert_close(null["transformer_blocks.3"], given["transformer_blocks.3"], atol=0, rtol=0)
