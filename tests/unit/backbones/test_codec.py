"""Autoencoders: diffusers' three classes at tiny size and the TAESD layout, against the classes themselves."""

import diffusers
import pytest
import torch
from safetensors.torch import save_file

from diffrep import FeatureRequest, load_backbone
from diffrep.backbones.codec import Codec, IdentityCodec, Posterior, TAESDCodec, VAECodec
from diffrep.backbones.folders import load_codec
from diffrep.backbones.taesd import TAESD, taesd_from
from diffrep.errors import CheckpointError, ConfigError
from diffrep.testing import save_tiny, save_tiny_pipeline

CPU, META = torch.device("cpu"), torch.device("meta")
SIZES = [(16, 16), (17, 16), (31, 33), (8, 24)]
KL = {
    "block_out_channels": (8, 16),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "norm_num_groups": 4,
}
TINY = {
    "encoder_block_out_channels": (8, 8, 8),
    "decoder_block_out_channels": (8, 8, 8),
    "num_encoder_blocks": (1, 1, 1),
    "num_decoder_blocks": (1, 1, 1),
}


def images(height=32, width=32, batch=2):
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(1))


def save_taesd(folder, latent_channels=4, pooled=False, name="taesd", suffix=".pth", dtype=torch.float32):
    """Writes the pair of files that the authors publish, with random weights."""
    torch.manual_seed(0)
    network = TAESD(latent_channels, pooled).eval()
    folder.mkdir(parents=True, exist_ok=True)
    for part in ("encoder", "decoder"):
        state = {key: value.to(dtype) for key, value in getattr(network, part).state_dict().items()}
        file = folder / f"{name}_{part}{suffix}"
        torch.save(state, file) if suffix == ".pth" else save_file(state, file)
    return network.requires_grad_(False)


@pytest.fixture(scope="module")
def sana(tmp_path_factory):
    pytest.importorskip("transformers")
    return save_tiny_pipeline("sana", tmp_path_factory.mktemp("sana"))


@pytest.fixture(scope="module")
def deep(sana):
    return load_codec(sana, CPU, torch.float32)


# diffusers' classes


def test_autoencoder_kl_shifts_and_scales():
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(**KL, scaling_factor=1.5305, shift_factor=0.0609).eval().requires_grad_(False)
    codec = VAECodec(vae)
    posterior, own = codec.encode(images()), vae.encode(images() * 2 - 1).latent_dist
    torch.testing.assert_close(posterior.mean, (own.mean - 0.0609) * 1.5305)
    torch.testing.assert_close(posterior.std, own.std * 1.5305)
    expected = vae.decode(own.mean).sample / 2 + 0.5
    torch.testing.assert_close(codec.decode(posterior.mean), expected.clamp(0, 1), atol=1e-5, rtol=1e-5)
    assert (codec.image_channels, codec.latent_channels, codec.downscale, codec.random) == (3, 4, 2, True)
    assert codec.describe() == {"kind": "AutoencoderKL", "scale": 1.5305, "shift": 0.0609, "downscale": 2}
    assert codec.module() is vae


def test_autoencoder_kl_without_a_shift():
    vae = diffusers.AutoencoderKL(**KL).eval().requires_grad_(False)
    mean = vae.encode(images() * 2 - 1).latent_dist.mean
    torch.testing.assert_close(VAECodec(vae).encode(images()).mean, mean * 0.18215)


def test_autoencoder_tiny():
    vae = diffusers.AutoencoderTiny(**TINY, scaling_factor=2.0, shift_factor=0.5).eval().requires_grad_(False)
    codec = VAECodec(vae)
    posterior, latents = codec.encode(images()), vae.encode(images() * 2 - 1).latents
    assert posterior.std is None and not codec.random
    torch.testing.assert_close(posterior.mean, (latents - 0.5) * 2)
    expected = (vae.decode(latents).sample / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(codec.decode(posterior.mean), expected, atol=1e-5, rtol=1e-5)
    assert (codec.latent_channels, codec.downscale) == (4, 4)


def test_autoencoder_dc(deep):
    posterior, latents = deep.encode(images()), deep.vae.encode(images() * 2 - 1).latent
    assert posterior.std is None and not deep.random
    torch.testing.assert_close(posterior.mean, latents * 0.41407)
    expected = (deep.vae.decode(latents).sample / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(deep.decode(posterior.mean), expected, atol=1e-5, rtol=1e-5)
    assert (deep.latent_channels, deep.downscale) == (4, 4)
    assert latents.shape[-2:] == (8, 8)


@pytest.mark.parametrize("size", SIZES)
def test_latent_size_is_what_encode_gives(size):
    for vae in (diffusers.AutoencoderKL(**KL), diffusers.AutoencoderTiny(**TINY)):
        codec = VAECodec(vae.requires_grad_(False))
        assert codec.latent_size(*size) == tuple(codec.encode(images(*size)).mean.shape[-2:])
    codec = TAESDCodec(TAESD(4).requires_grad_(False))
    assert codec.latent_size(*size) == tuple(codec.encode(images(*size)).mean.shape[-2:])
    assert IdentityCodec(3).latent_size(*size) == size


def test_sides_that_cannot_be_encoded(sana, deep):
    assert deep.latent_size(16, 24) == (4, 6)
    with pytest.raises(ConfigError, match="AutoencoderDC cannot encode images of 30x32 pixels .* divisible by 4"):
        deep.latent_size(30, 32)
    net = load_backbone(sana, device="cpu")
    with pytest.raises(ConfigError, match="divisible by 4"):
        net.extract(images(30), FeatureRequest("blocks", ["clean"]), cond="a cat")


def test_odd_sides_through_a_network(tmp_path):
    vae = VAECodec(diffusers.AutoencoderTiny(**TINY))
    net = load_backbone(save_tiny("unet2d-condition", tmp_path), device="cpu", codec=vae)
    request = FeatureRequest("blocks", ["clean"], dtype="float32")
    features = net.extract(images(31, 45), request, cond=torch.zeros(5, 12))
    assert features["down_blocks.0", "clean"].shape == (2, 8, 4, 6)  # 8 x 12 latents, halved
    assert net.codec.latent_size(31, 45) == (8, 12)


def test_an_autoencoder_that_overflows_runs_in_full_precision(tmp_path):
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(**KL)
    vae.encoder.conv_in.weight.data *= 1e5  # the norms behind it bring the scale back
    vae.save_pretrained(tmp_path / "vae")
    codec = load_codec(tmp_path, CPU, torch.float16)
    assert codec.vae.dtype == torch.float32
    full = load_codec(tmp_path, CPU, torch.float32).encode(images()).mean
    assert codec.encode(images()).mean.dtype == torch.float32
    torch.testing.assert_close(codec.encode(images().half()).mean, full, atol=2e-3, rtol=2e-2)
    assert load_codec(tmp_path, CPU, torch.bfloat16).vae.dtype == torch.bfloat16
    vae.register_to_config(force_upcast=False)
    vae.save_pretrained(tmp_path / "vae")
    half = load_codec(tmp_path, CPU, torch.float16)
    assert half.vae.dtype == torch.float16
    assert not half.encode(images()).mean.isfinite().all()


def test_other_autoencoders_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="codec class VQModel is not supported; use AutoencoderKL, AutoencoderTiny"):
        VAECodec(diffusers.VQModel(block_out_channels=(8,), norm_num_groups=4, num_vq_embeddings=4))
    with pytest.raises(ConfigError, match="latents_mean and latents_std"):
        VAECodec(diffusers.AutoencoderKL(**KL, latents_mean=[0.0] * 4, latents_std=[1.0] * 4))
    folder = save_tiny("unet2d", tmp_path / "unet2d")
    with pytest.raises(ConfigError, match="codec class UNet2DModel is not supported"):
        load_codec(folder / "unet", CPU, torch.float32)
    with pytest.raises(CheckpointError, match=r"holds no autoencoder: no config.json, and no \*_encoder.pth"):
        load_codec(folder, CPU, torch.float32)


def test_pixels():
    codec = IdentityCodec(1)
    x = torch.rand(2, 1, 4, 4)
    assert torch.equal(codec.encode(x).mean, x * 2 - 1)
    assert codec.encode(x).std is None and codec.module() is None
    torch.testing.assert_close(codec.decode(x * 2 - 1), x)
    assert codec.decode(torch.full((1, 1, 1, 1), 3.0)).item() == 1


def test_a_codec_may_lack_a_decoder():
    class Encoder(Codec):
        image_channels, latent_channels, downscale, random = 3, 3, 1, False

        def encode(self, images):
            return Posterior(images)

        def describe(self):
            return {"kind": "encoder"}

    with pytest.raises(ConfigError, match="Encoder has no decoder"):
        Encoder().decode(images())


# TAESD's own files


@pytest.mark.parametrize(("channels", "pooled"), [(4, False), (16, False), (16, True), (32, True)])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_taesd_files(tmp_path, channels, pooled, suffix):
    network = save_taesd(tmp_path, channels, pooled, suffix=suffix)
    codec = load_codec(tmp_path, CPU, torch.float32)
    assert isinstance(codec, TAESDCodec)
    posterior = codec.encode(images())
    assert torch.equal(posterior.mean, network.encode(images()))
    assert posterior.mean.shape == (2, channels, 4, 4) and posterior.std is None
    assert codec.describe() == {"kind": "TAESD", "latent_channels": channels, "downscale": 8}
    decoded = codec.decode(torch.randn(2, channels, 4, 6) * 5)
    assert decoded.shape == (2, 3, 32, 48)
    assert decoded.min() >= 0 and decoded.max() <= 1
    assert torch.equal(codec.decode(posterior.mean), network.decode(posterior.mean).clamp(0, 1))
    keys = set(network.state_dict())
    assert ("encoder.11.pool.0.weight" in keys) == pooled and "encoder.1.pool.0.weight" not in keys


def test_taesd_is_autoencoder_tiny(tmp_path):
    network = save_taesd(tmp_path)
    renamed = {}
    for key, value in network.state_dict().items():
        part, index, rest = key.split(".", 2)
        renamed[f"{part}.layers.{int(index) - (part == 'decoder')}.{rest}"] = value  # there the clamp has no number
    vae = diffusers.AutoencoderTiny().eval().requires_grad_(False)
    vae.load_state_dict(renamed)
    codec, other = load_codec(tmp_path, CPU, torch.float32), VAECodec(vae)
    latents = codec.encode(images()).mean
    torch.testing.assert_close(latents, other.encode(images()).mean, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(codec.decode(latents), other.decode(latents), atol=1e-6, rtol=1e-5)
    wide = torch.randn(1, 4, 4, 4) * 9  # beyond the clamp
    torch.testing.assert_close(codec.decode(wide), other.decode(wide), atol=1e-6, rtol=1e-5)
    assert codec.downscale == other.downscale


def test_taesd_as_the_codec_of_a_backbone(tmp_path):
    folder = save_tiny("unet2d-condition", tmp_path / "net")
    network = save_taesd(tmp_path / "vae", dtype=torch.float16)
    net = load_backbone(folder, codec=tmp_path / "vae", device="cpu")
    assert net.image_size == 64
    assert net.codec.module().encoder[0].weight.dtype == torch.float32
    assert not any(parameter.requires_grad for parameter in net.codec.module().parameters())
    latents = net.codec.encode(images(64, 64)).mean
    torch.testing.assert_close(latents, network.half().float().encode(images(64, 64)))
    cond, request = torch.zeros(5, 12), FeatureRequest("up_blocks.0", ["clean"], dtype="float32")
    found = net.extract(images(64, 64), request, cond=cond)["up_blocks.0", "clean"]
    clean = net.schedule.level("clean")
    expected = net.capture(latents, clean.time, ["up_blocks.0"], cond=cond)["up_blocks.0"]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    other = load_backbone(folder, device="cpu")
    assert other.weights_hash != net.weights_hash
    assert load_backbone(folder, codec=tmp_path / "vae", device="meta").codec.module().encoder[0].weight.device == META
    half = load_backbone(folder, codec=tmp_path / "vae", device="cpu", dtype="bfloat16")
    assert half.codec.encode(images(64, 64)).mean.dtype == torch.bfloat16


def test_a_codec_with_other_channels_than_the_network(tmp_path):
    folder = save_tiny("unet2d-condition", tmp_path / "net")
    save_taesd(tmp_path / "vae", latent_channels=16)
    with pytest.raises(ConfigError, match="codec gives 16 channels, the network takes 4"):
        load_backbone(folder, codec=tmp_path / "vae", device="cpu")


def test_a_folder_of_several_taesds_wants_a_name(tmp_path):
    save_taesd(tmp_path, 4, name="taesd")
    save_taesd(tmp_path, 16, name="taesd3")
    with pytest.raises(ConfigError, match=r"several autoencoders; name .* taesd3_encoder.pth, taesd_encoder.pth"):
        load_codec(tmp_path, CPU, torch.float32)
    for name, channels in (("taesd", 4), ("taesd3", 16)):
        codec = load_codec(tmp_path / f"{name}_encoder.pth", CPU, torch.float32)
        assert codec.latent_channels == channels
    with pytest.raises(CheckpointError, match="taesd_decoder.pth holds no autoencoder"):
        load_codec(tmp_path / "taesd_decoder.pth", CPU, torch.float32)


def test_files_that_are_no_taesd(tmp_path):
    save_taesd(tmp_path / "alone")
    (tmp_path / "alone" / "taesd_decoder.pth").unlink()
    with pytest.raises(CheckpointError, match="holds no autoencoder"):
        load_codec(tmp_path / "alone", CPU, torch.float32)
    save_taesd(tmp_path / "cut")
    file = tmp_path / "cut" / "taesd_encoder.pth"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="cannot read the weights in .*taesd_encoder.pth"):
        load_codec(tmp_path / "cut", CPU, torch.float32)
    save_taesd(tmp_path / "odd")
    torch.save([1, 2], tmp_path / "odd" / "taesd_encoder.pth")
    with pytest.raises(CheckpointError, match="taesd_encoder.pth holds no state dict"):
        load_codec(tmp_path / "odd", CPU, torch.float32)
    for encoder, decoder in (({"0.weight": torch.zeros(1)}, {}), (TAESD(4).encoder.state_dict(), {})):
        with pytest.raises(CheckpointError, match="not the weights of a TAESD"):
            taesd_from(encoder, decoder)
    with pytest.raises(CheckpointError, match="(?s)not the weights of a TAESD.*size mismatch"):
        taesd_from(TAESD(4).encoder.state_dict(), TAESD(16).decoder.state_dict())
    with pytest.raises(CheckpointError, match="(?s)not the weights of a TAESD.*pool"):
        taesd_from(TAESD(4, pooled=True).encoder.state_dict(), TAESD(4).decoder.state_dict())


def test_a_state_dict_inside_a_checkpoint(tmp_path):
    network = save_taesd(tmp_path)
    torch.save({"state_dict": network.encoder.state_dict()}, tmp_path / "taesd_encoder.pth")
    assert torch.equal(load_codec(tmp_path, CPU, torch.float32).encode(images()).mean, network.encode(images()))
