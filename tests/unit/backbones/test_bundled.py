from importlib import resources

import pytest
import torch

from diffrep import DataConfig, FeatureRequest, list_backbones, load_backbone, open_images
from diffrep.backbones.sources import BUNDLED
from diffrep.noise import mix, sample_noise


def test_every_bundled_backbone_is_small_described_and_opens():
    for name in BUNDLED:
        folder = resources.files("diffrep.backbones") / "bundled" / name
        weights = [file for file in folder.iterdir() if file.name.endswith(".safetensors")]
        assert sum(len(file.read_bytes()) for file in weights) <= 4_000_000
        card = (folder / "README.md").read_text()
        backbone = load_backbone(name, device="cpu")
        assert backbone.name == name
        assert list_backbones()[name]
        assert f"{sum(p.numel() for p in backbone.network.parameters()):,} parameters" in card
        assert (folder / "training.yaml").is_file()
        assert (folder / "loss.jsonl").is_file()


@pytest.mark.parametrize("name, level, most", [("fashion-unet", 200, 0.1), ("sit-mini", 0.5, 0.3)])
def test_they_predict_of_images_they_have_not_seen(name, level, most):
    """Noise for the U-Net, the velocity (noise minus image) for the transformer."""
    backbone = load_backbone(name, device="cpu")
    images = open_images(DataConfig(path="fashion-demo", splits="test", limit=16, size=32, fit="pad"), 1)
    clean = backbone.codec.encode(torch.stack([images[i] for i in range(16)])).mean
    level = backbone.schedule.level(level)
    eps = torch.stack([sample_noise(clean.shape[1:], 0, images.id(i), level.key, 0) for i in range(16)])
    noisy = mix(clean, eps, torch.full((16,), level.signal), torch.full((16,), level.noise))
    wanted = eps - clean if backbone.schedule.prediction == "velocity" else eps
    error = (backbone.denoise(noisy, level.time) - wanted).square().mean()
    untrained = load_backbone(name, init_seed=0, device="cpu").denoise(noisy, level.time)
    assert error < most
    assert (untrained - wanted).square().mean() > 0.5


def test_sit_mini_reads_its_blocks_as_without_a_class():
    backbone = load_backbone("sit-mini", device="cpu")
    assert (backbone.family, backbone.image_channels, backbone.sample_size) == ("repa", 1, 32)
    assert backbone.schedule.describe() == {"kind": "flow", "path": "linear", "data_time": 0, "scale": 1.0}
    blocks = {layer.name: layer.shape for layer in backbone.layers() if layer.name in backbone.blocks()}
    assert blocks == {f"blocks.{number}": (128, 8, 8) for number in range(6)}
    assert not hasattr(backbone.network, "projectors")
    images = torch.rand(3, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    request = FeatureRequest("blocks.3", "sigma=0.2", dtype="float32")
    features = {cond: backbone.extract(images, request, cond=cond)["blocks.3", "sigma=0.2"] for cond in (None, 10, 3)}
    assert torch.equal(features[None], features[10]), "the row behind the ten classes"
    assert not torch.allclose(features[None], features[3])
