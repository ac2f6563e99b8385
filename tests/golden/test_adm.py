"""ADM's U-Net against openai/guided-diffusion, DIFT's ADM and diffssl's 37-block features."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from diffrep.backbones.adm import ADMUNet, adm_arguments, adm_noise_schedule


def load(config, state):
    network = ADMUNet(**adm_arguments(config)).eval()
    network.load_state_dict(state, strict=True)
    return network


@torch.no_grad()
def outputs(network, names, *arguments):
    found = {}
    handles = [
        network.get_submodule(name).register_forward_hook(lambda _, __, out, name=name: found.update({name: out}))
        for name in names
    ]
    found["out_final"] = network(*arguments)
    for handle in handles:
        handle.remove()
    return found


def blocks(network):
    inputs = [f"input_blocks.{i}" for i in range(len(network.input_blocks))]
    return [*inputs, "middle_block", *(f"output_blocks.{i}" for i in range(len(network.output_blocks)))]


def test_every_block_of_a_class_conditional_network(golden):
    config = json.loads((golden / "adm" / "adm_updown.json").read_text())["config"]
    network = load(config, load_file(golden / "adm" / "adm_updown.safetensors"))
    io = load_file(golden / "adm" / "adm_updown_io.safetensors")
    names = [*blocks(network), "time_embed"]
    found = outputs(network, names, io["x"], io["t"], io["y"])
    for name in [*names, "out_final"]:
        last_only = f"{name}.sample1" in io
        expected = io[f"{name}.sample1"] if last_only else io[name]
        actual = found[name][1:] if last_only else found[name]
        torch.testing.assert_close(actual, expected, atol=2e-5, rtol=0, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("t", [101, 261])
def test_output_blocks_that_dift_reads(golden, t):
    config = json.loads((golden / "adm" / "dift_adm.json").read_text())["create_model_and_diffusion"]
    network = load(config, load_file(golden / "adm" / "dift_adm.safetensors"))
    io = load_file(golden / "adm" / "dift_adm_io.safetensors")
    names = [f"output_blocks.{i}" for i in range(9)]
    found = outputs(network, names, io[f"x_t.t{t}"], torch.tensor([t]))
    for i, name in enumerate(names):
        torch.testing.assert_close(found[name], io[f"up_ft{i}.t{t}"], atol=2e-5, rtol=0)


@pytest.mark.parametrize("t", [90, 150])
def test_37_blocks_of_diffssl(golden, t):
    file = golden / "adm" / "diffssl_unet37.safetensors"
    with safe_open(file, "pt") as opened:
        config = json.loads(opened.metadata()["config"])
    assert adm_noise_schedule(config) == "linear"
    tensors = load_file(file)
    state = {key.removeprefix("sd."): value for key, value in tensors.items() if key.startswith("sd.")}
    network = load(config, state)
    # Coefficients go to fp32 before mixing, as in the published code.
    power = tensors["sqrt_alphas_cumprod"][t] ** 2
    signal, noise = power.sqrt().float(), (1 - power).sqrt().float()
    x_t = signal * tensors["x0"] + noise * tensors["noise"]
    names = blocks(network)
    assert len(names) == 37
    found = outputs(network, names, x_t, torch.tensor([t, t]))
    assert [found[name].shape[-1] for name in names] == tensors[f"t{t}.hw"].tolist()
    for number in (19, 24, 28):
        torch.testing.assert_close(found[names[number - 1]], tensors[f"t{t}.b{number}"], atol=1e-4, rtol=0)
    means = torch.stack([found[name].mean((2, 3)) for name in names], dim=1)
    deviations = torch.stack([found[name].std((2, 3)) for name in names], dim=1)
    torch.testing.assert_close(means, tensors[f"t{t}.gap"], atol=1e-4, rtol=0)
    torch.testing.assert_close(deviations, tensors[f"t{t}.std"], atol=1e-4, rtol=0)
