"""Target encoders: presets, grids, layers, projections."""

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.layers.pos_embed import resample_abs_pos_embed
from torch.nn import functional as F

from diffrep.backbones.encoders import CLIP, IMAGENET, PRESETS, open_encoder
from diffrep.config import EncoderConfig, validate
from diffrep.errors import CheckpointError, ConfigError, LayerError, UnknownNameError

CPU = torch.device("cpu")
SIZES = {"embed_dim": 24, "num_heads": 2, "depth": 2}
VIT = {"model": "vit_tiny_patch16_224", "img_size": 56, "patch_size": 14, "reg_tokens": 1, **SIZES}


def encoder_of(model=VIT, seed=0, device=CPU, dtype=torch.float32, **keys):
    source = model["model"] if isinstance(model, dict) else model
    config = validate(EncoderConfig, {"source": source, "model": model, **keys})
    return open_encoder(config, device, dtype, init_seed=seed)


def normalized(images, values):
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in values)
    return (images - mean) / std


@pytest.fixture(scope="module")
def images():
    return torch.rand(2, 3, 128, 128, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_position_tables_are_resampled_once_as_in_repa(images):
    encoder = encoder_of(preset="dinov2")
    network = timm.create_model(VIT["model"], **{k: v for k, v in VIT.items() if k != "model"} | {"img_size": 112})
    state = encoder.network.state_dict()
    tokens = network.num_prefix_tokens
    state["pos_embed"] = resample_abs_pos_embed(state["pos_embed"], [8, 8], num_prefix_tokens=tokens)
    network.eval().load_state_dict(state)
    x = F.interpolate(normalized(images, IMAGENET), 112, mode="bicubic")
    expected = network.forward_features(x)[:, tokens:].transpose(1, 2).unflatten(2, (8, 8))
    found = encoder(images)
    assert found.shape == (2, encoder.channels, 8, 8)
    torch.testing.assert_close(found, expected)


@torch.no_grad()
@pytest.mark.parametrize("preset", ["clip", "mae"])
def test_without_the_final_norm(images, preset):
    encoder = encoder_of(preset=preset)
    images = images[..., :112, :112]
    x = F.interpolate(images, 98, mode="bicubic") if preset == "clip" else images
    x = normalized(x, CLIP if preset == "clip" else IMAGENET)
    tokens = encoder.network.forward_intermediates(x, indices=[1], norm=False, intermediates_only=True)[0]
    torch.testing.assert_close(encoder(images), tokens)
    normed = encoder_of(preset=preset, layer="norm")(images)
    assert not torch.allclose(normed, tokens, atol=0.1)


@torch.no_grad()
@pytest.mark.parametrize("model", ["test_efficientnet", "test_resnet", "test_convnext"])
def test_a_cnn_gives_its_last_stage_of_stride_16(images, model):
    encoder = encoder_of(model)
    network = encoder.network
    x = normalized(images, (network.pretrained_cfg["mean"], network.pretrained_cfg["std"]))
    reductions = [stage["reduction"] for stage in network.feature_info]
    expected = network.forward_intermediates(x, indices=[reductions.index(16)], intermediates_only=True)[0]
    found = encoder(images)
    assert found.shape == (2, encoder.channels, 8, 8)
    torch.testing.assert_close(found, expected)
    assert encoder_of(model, size=64)(images).shape[-2:] == (4, 4)


def test_gray_images_repeat(images):
    encoder, gray = encoder_of(preset="dinov2"), images[:, :1]
    assert torch.equal(encoder(gray), encoder(gray.expand(-1, 3, -1, -1)))


def test_it_runs_in_its_own_type_without_gradients(images):
    encoder = encoder_of(preset="dinov2")
    plain = encoder(images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = encoder(images.requires_grad_())
    images.requires_grad_(False)
    assert torch.equal(inside, plain)
    assert not inside.requires_grad
    narrow = encoder_of(preset="dinov2", dtype=torch.bfloat16)(images)
    assert narrow.dtype == torch.float32
    assert 0 < (narrow - plain).abs().max() < 0.2


NAMES = {
    "vit_small_patch14_dinov2.lvd142m": "dinov2",
    "vit_small_patch14_reg4_dinov2": "dinov2",
    "vit_small_patch16_dinov3.lvd1689m": "dinov3",
    "vit_small_patch16_224.dino": "dinov1",
    "vit_base_patch16_224.mae": "mae",
    "vit_base_patch16_clip_224.openai": "clip",
    "vit_base_patch16_siglip_224.webli": "siglip",
    "vit_huge_patch14_gap_224.in1k_ijepa": "jepa",
    "test_convnext": "cnn",
}


@pytest.mark.parametrize("name", NAMES)
def test_a_name_suggests_its_preset(name):
    small = {} if name.startswith("test") else SIZES
    encoder = encoder_of({"model": name, **small}, device=torch.device("meta"))
    assert encoder.preset == NAMES[name]
    assert encoder.channels == (48 if name.startswith("test") else 24)
    values = PRESETS[encoder.preset].values
    own = encoder.network.pretrained_cfg
    assert values is None or values == (tuple(own["mean"]), tuple(own["std"]))  # timm agrees with the published code


def test_a_file_of_any_name(tmp_path, images):
    torch.manual_seed(4)
    network = timm.create_model("test_vit").eval()
    save_file(network.state_dict(), tmp_path / "mocov3-small.safetensors")
    config = EncoderConfig(source=str(tmp_path / "mocov3-small.safetensors"), model="test_vit")
    encoder = open_encoder(config, CPU)
    assert encoder.preset == "mocov3"
    with torch.no_grad():
        tokens = network.forward_features(normalized(images, IMAGENET))[:, 1:]
    torch.testing.assert_close(encoder(images).flatten(2).transpose(1, 2), tokens)


@pytest.mark.parametrize(
    ("keys", "shape", "message"),
    [
        ({"preset": "dinov2"}, (100, 128), "multiples of 16, such as 96 and 112. Set data.size .* a multiple of 14"),
        ({"preset": "dinov2"}, (8, 8), "such as 16 and 32"),
        ({"preset": "mae"}, (128, 128), "multiples of 14, such as 126 and 140"),
        ({"preset": "dinov2", "size": 60}, (32, 32), "size=60 is no multiple of its patch, 14"),
        ({"preset": "dinov2", "size": 56}, (32, 64), "square images, got 32x64"),
    ],
)
def test_images_that_form_no_grid(keys, shape, message):
    with pytest.raises(ConfigError, match=message):
        encoder_of(**keys)(torch.rand(1, 3, *shape))


def test_a_given_size_wins():
    assert encoder_of(preset="mae", size=56)(torch.rand(1, 3, 32, 32)).shape == (1, 24, 4, 4)


def test_no_images():
    for images in (torch.rand(3, 32, 32), torch.rand(1, 4, 32, 32), torch.zeros(1, 3, 32, 32, dtype=torch.uint8)):
        with pytest.raises(ConfigError, match="floats .B, 1 or 3, H, W."):
            encoder_of(preset="dinov2")(images)


def test_a_projection(tmp_path, images):
    mean, components = torch.randn(24), torch.randn(5, 24)
    save_file({"mean": mean, "components": components}, tmp_path / "pca.safetensors")
    encoder, whole = encoder_of(preset="dinov2", pca=tmp_path / "pca.safetensors"), encoder_of(preset="dinov2")
    assert encoder.channels == 5
    expected = torch.einsum("kd,bdhw->bkhw", components, whole(images) - mean.view(-1, 1, 1))
    torch.testing.assert_close(encoder(images), expected)
    assert encoder.describe()["pca"] != whole.describe()["pca"]
    save_file({"mean": mean[:9], "components": components[:, :9].contiguous()}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match="of 9 channels, and the encoder gives 24"):
        encoder_of(preset="dinov2", pca=tmp_path / "other.safetensors")
    save_file({"weight": mean}, tmp_path / "none.safetensors")
    with pytest.raises(CheckpointError, match="holds weight, no projection"):
        encoder_of(preset="dinov2", pca=tmp_path / "none.safetensors")


def test_what_tells_encoders_apart():
    described = encoder_of(preset="dinov2").describe()
    assert described == encoder_of(preset="dinov2").describe()
    assert {name: described[name] for name in ("model", "preset", "order", "size", "layer")} == {
        "model": "vit_tiny_patch16_224",
        "preset": "dinov2",
        "order": "normalize, resize",
        "size": "14/16",
        "layer": "norm",
    }
    for keys, differ in (
        ({"seed": 1}, {"weights"}),
        ({"preset": "jepa"}, {"preset"}),
        ({"layer": "blocks.0"}, {"layer"}),
        ({"size": 56}, {"size"}),
        ({"model": VIT | {"num_heads": 4}}, {"arguments"}),
    ):
        other = encoder_of(**{"preset": "dinov2"} | keys).describe()
        assert {name for name in described if described[name] != other[name]} == differ


def test_what_cannot_be_opened():
    for model, keys, error, message in (
        ("test_vit", {}, ConfigError, "'test_vit' does not tell .* preset, one of dinov2, dinov3"),
        ("test_vit2", {"preset": "dinov2"}, ConfigError, "no final norm of its tokens"),
        ("test_resnet", {"preset": "mae"}, ConfigError, "has no blocks"),
        ("test_mambaout", {}, ConfigError, "channels last"),
        ("test_vitt", {}, UnknownNameError, "test_vit"),
        ({"img_size": 32, "model": "test_vit"}, {"preset": "mae", "layer": "blocks.9"}, LayerError, "blocks.9"),
    ):
        with pytest.raises(error, match=message):
            encoder_of(model, **keys)
    with pytest.raises(ConfigError, match="name of it under 'model'"):
        open_encoder(EncoderConfig(source="x", model={"depth": 2}), CPU, init_seed=0)
