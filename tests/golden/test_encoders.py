"""How images are brought to the target encoders, and latents drawn, against the published code's numbers."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from diffrep.backbones.encoders import open_encoder
from diffrep.config import EncoderConfig
from diffrep.train.imported import import_moments

TOLERANCE = {"atol": 2e-5, "rtol": 0}
# Case -> (side of its patches, preset).
CASES = {
    "dinov2": (14, "dinov2"),
    "dinov2_512": (14, "dinov2"),
    "clip": (14, "clip"),
    "mocov3": (16, "mocov3"),
    "mae": (16, "mae"),
    "jepa": (14, "jepa"),
    "dinov1": (16, "dinov1"),
}


@pytest.fixture(scope="module")
def numbers(golden):
    return load_file(golden / "repa" / "repa_preprocess.safetensors")


def picture(side):
    y, x = np.mgrid[:256, :256]
    channels = [(3 * x + 5 * y) % 256, (x * x // 7 + y) % 256, (x * y // 11) % 256]
    image = torch.from_numpy(np.stack(channels).astype(np.float32) / 255)[None]
    return image.repeat_interleave(side // 256, 2).repeat_interleave(side // 256, 3)


def test_every_case_is_here(numbers):
    assert {name.split(".")[0] for name in numbers} == {*CASES}


@pytest.mark.parametrize("case", CASES)
def test_inputs(numbers, case):
    patch, preset = CASES[case]
    model = {"model": "vit_tiny_patch16_224", "img_size": 224, "patch_size": patch, "depth": 1, "embed_dim": 12}
    config = EncoderConfig(source="vit", model=model | {"num_heads": 2}, preset=preset)
    encoder = open_encoder(config, torch.device("cpu"), init_seed=0)
    prepared = encoder.prepare(picture(512 if case.endswith("512") else 256))
    assert list(prepared.shape) == numbers[f"{case}.shape"].tolist()
    found = {"sub16": prepared[0, :, ::16, ::16], "sub8": prepared[0, :, ::8, ::8]}
    found |= {"corner": prepared[0, :, :6, :6], "mean": prepared[0].mean((1, 2)), "std": prepared[0].std((1, 2))}
    recorded = [name for name in found if f"{case}.{name}" in numbers]
    assert len(recorded) == (1 if case.endswith("512") else 4)
    for name in recorded:
        torch.testing.assert_close(found[name], numbers[f"{case}.{name}"], **TOLERANCE)


def test_latents_of_stored_moments(golden):
    recorded = load_file(golden / "repa" / "posterior.safetensors")
    mean, std = import_moments(recorded["moments"], "std", scale=0.18215).chunk(2, dim=1)
    torch.testing.assert_close(mean + std * recorded["posterior_noise"], recorded["latent"], **TOLERANCE)
