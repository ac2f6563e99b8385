"""Encoders of timm, latents and pixels in the form of a backbone."""

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from diffrep import FeatureRequest, load_backbone
from diffrep.errors import CheckpointError, ConfigError, UnknownNameError
from diffrep.testing import save_tiny

VIT = {"model": "vit_tiny_patch16_224", "img_size": 32, "depth": 2, "embed_dim": 24, "num_heads": 2, "reg_tokens": 2}


def read(backbone, layer, images):
    return backbone.extract(images, FeatureRequest(layer, "clean", dtype="float32"))[layer, "clean"]


@pytest.fixture(scope="module")
def lite():
    torch.manual_seed(3)
    return timm.create_model("tf_efficientnet_lite0").eval()


@pytest.fixture(scope="module")
def lite_file(lite, tmp_path_factory):
    file = tmp_path_factory.mktemp("lite") / "lite.safetensors"
    save_file(lite.state_dict(), file)
    return file


@pytest.fixture(scope="module")
def images():
    return torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def test_an_encoder_gives_timms_own_features(lite, lite_file, images):
    backbone = load_backbone(lite_file, family="timm", config="tf_efficientnet_lite0", device="cpu")
    mean, std = (torch.tensor(lite.pretrained_cfg[name]).view(3, 1, 1) for name in ("mean", "std"))
    with torch.no_grad():
        expected = lite.forward_intermediates((images - mean) / std, indices=[3], intermediates_only=True)[0]
    torch.testing.assert_close(read(backbone, "blocks.4", images), expected)
    names = [layer.name for layer in backbone.layers()]
    assert names.index("conv_stem") < names.index("blocks.0") < names.index("blocks.6") < names.index("conv_head")


def test_names_of_efficientnet_pytorch(lite, lite_file, images, tmp_path):
    blocks = {"conv_dw": "_depthwise_conv", "conv_pwl": "_project_conv"}
    number, renamed = {}, {}
    for key, value in lite.state_dict().items():
        parts = key.split(".")
        if parts[0] == "blocks":
            index = number.setdefault(tuple(parts[1:3]), len(number))
            key = ".".join(["_blocks", str(index), blocks.get(parts[3], f"_{parts[3]}"), *parts[4:]])
        renamed[key] = value.clone()
    torch.save(renamed, tmp_path / "theirs.pth")  # safetensors would sort the keys
    options = {"family": "timm", "config": "tf_efficientnet_lite0", "device": "cpu"}
    theirs, ours = (load_backbone(file, **options) for file in (tmp_path / "theirs.pth", lite_file))
    assert theirs.weights_hash == ours.weights_hash
    with pytest.raises(CheckpointError, match="begins with tf_"):
        load_backbone(tmp_path / "theirs.pth", family="timm", config="tf_efficientnet_lite1", device="cpu")


def test_class_and_register_tokens_are_no_map(images):
    backbone = load_backbone("vit", family="timm", config=VIT, init_seed=0, device="cpu")
    images = images[:, :, :32, :32]
    found = read(backbone, "blocks.1", images)
    assert found.shape == (2, 24, 2, 2)
    with torch.no_grad():
        tokens = backbone.network.forward_intermediates(backbone.codec.encode(images).mean, intermediates_only=True)
    torch.testing.assert_close(found, tokens[1])
    assert "blocks.0" in [layer.name for layer in backbone.layers()]


def test_untrained_weights_follow_the_seed(lite_file, images):
    options = {"family": "timm", "config": "tf_efficientnet_lite0", "device": "cpu"}
    one, again, other = (load_backbone(lite_file, init_seed=seed, **options) for seed in (1, 1, 2))
    trained = load_backbone(lite_file, **options)
    assert one.weights_hash == again.weights_hash
    assert len({one.weights_hash, other.weights_hash, trained.weights_hash}) == 3


def test_latents_are_the_codecs(tmp_path, images):
    from diffrep.backbones.folders import load_codec

    folder = save_tiny("unet2d-condition", tmp_path / "net") / "vae"
    backbone = load_backbone(folder, family="latents", device="cpu")
    codec = load_codec(folder, torch.device("cpu"), torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(read(backbone, "latents", images), codec.encode(images).mean)


def test_patches_are_the_pixels_around_each_pixel(images):
    backbone = load_backbone("pixels", family="pixels", config={"side": 3}, device="cpu")
    found = read(backbone, "patches", images).unflatten(1, (3, 3, 3))
    padded = F.pad(images * 2 - 1, [1] * 4, mode="replicate")
    for dy in range(3):
        for dx in range(3):
            torch.testing.assert_close(found[:, :, dy, dx], padded[:, :, dy : dy + 64, dx : dx + 64])


def test_what_cannot_be_opened(lite_file, tmp_path):
    for words, error, message in (
        ({"source": "efficientnet_lit0", "family": "timm"}, UnknownNameError, "efficientnet_lite0"),
        ({"source": lite_file, "family": "timm"}, ConfigError, "the timm model it belongs to"),
        ({"source": lite_file, "family": "timm", "config": "resnet18"}, CheckpointError, "do not fit"),
        ({"source": "x.pth", "family": "timm", "config": "resnet18"}, CheckpointError, "no such file"),
        ({"source": "resnet18", "family": "timm", "config": {"modle": "x"}}, ConfigError, "under 'model'"),
        ({"source": "resnet18", "family": "timm", "codec": "x"}, ConfigError, "takes no .*codec"),
        ({"source": "r", "family": "timm", "config": VIT | {"dpth": 3}, "init_seed": 0}, CheckpointError, "dpth"),
        ({"source": "pixels", "family": "pixels", "config": {"side": 4}}, ConfigError, "odd side"),
        ({"source": "pixles", "family": "pixels"}, ConfigError, "the source 'pixels'"),
        ({"source": tmp_path, "family": "latents"}, CheckpointError, "holds no autoencoder"),
        ({"source": tmp_path, "family": "latents", "init_seed": 1}, ConfigError, "no weights"),
        ({"source": tmp_path, "family": "latent"}, UnknownNameError, "did you mean 'latents'"),
    ):
        with pytest.raises(error, match=message):
            load_backbone(**words, device="cpu")
