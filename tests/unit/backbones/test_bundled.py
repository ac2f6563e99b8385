from importlib import resources

import torch

from diffrep import DataConfig, load_backbone, open_images
from diffrep.backbones.sources import BUNDLED
from diffrep.noise import mix, sample_noise


def test_every_bundled_backbone_is_small_described_and_opens():
    for name in BUNDLED:
        folder = resources.files("diffrep.backbones") / "bundled" / name
        weights = folder / "diffusion_pytorch_model.safetensors"
        assert len(weights.read_bytes()) <= 4_000_000
        card = (folder / "README.md").read_text()
        backbone = load_backbone(name, device="cpu")
        assert f"{sum(p.numel() for p in backbone.network.parameters()):,} parameters" in card
        assert (folder / "training.yaml").is_file()
        assert (folder / "loss.jsonl").is_file()


def test_fashion_unet_denoises_images_it_has_not_seen():
    backbone = load_backbone("fashion-unet", device="cpu")
    images = open_images(DataConfig(path="fashion-demo", splits="test", limit=16, size=32, fit="pad"), 1)
    clean = backbone.codec.encode(torch.stack([images[i] for i in range(16)])).mean
    eps = torch.stack([sample_noise(clean.shape[1:], 0, images.id(i), "t=200", 0) for i in range(16)])
    level = backbone.schedule.level(200)
    noisy = mix(clean, eps, torch.full((16,), level.signal), torch.full((16,), level.noise))
    error = (backbone.denoise(noisy, 200) - eps).square().mean()
    untrained = load_backbone("fashion-unet", init_seed=0, device="cpu").denoise(noisy, 200)
    assert error < 0.1
    assert (untrained - eps).square().mean() > 0.5
