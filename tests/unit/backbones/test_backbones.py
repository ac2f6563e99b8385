import json
import shutil

import diffusers
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from diffrep import load_backbone
from diffrep.errors import BackendUnavailable, CheckpointError, ConfigError, LayerError, UnknownNameError
from diffrep.testing import TINY, save_tiny


def plain_hook(backbone, name, x, time, cond):
    """What a user without diffrep would write: a full forward and one hook."""
    kept = []
    module = backbone.network.get_submodule(name)
    handle = module.register_forward_hook(lambda _, __, out: kept.append(out[0] if isinstance(out, tuple) else out))
    backbone.denoise(x, time, cond)
    handle.remove()
    return kept[0].clone()


def example(backbone, batch=2, height=None, width=None):
    size = backbone.sample_size
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch, backbone.in_channels, height or size, width or size, generator=generator)


def test_capture_equals_a_plain_hook_on_every_layer(backbone, cond):
    x = example(backbone)
    names = [layer.name for layer in backbone.layers()]
    found = backbone.capture(x, 7, names, cond=cond)
    for name in names:
        expected = plain_hook(backbone, name, x, 7, cond)
        if expected.ndim == 3:
            expected = expected.transpose(1, 2).reshape(found[name].shape)
        assert torch.equal(found[name], expected), name


def test_measured_shapes_strides_and_order(backbone, cond):
    layers = backbone.layers()
    found = backbone.capture(example(backbone), 7, [layer.name for layer in layers], cond=cond)
    for layer in layers:
        assert tuple(found[layer.name].shape[1:]) == layer.shape
        assert layer.stride == backbone.sample_size / layer.shape[-1]
    shares = [layer.flops_to_here for layer in layers]
    assert shares == sorted(shares)
    assert 0 < shares[-1] <= 1
    names = [layer.name for layer in layers]
    assert [name for name in names if name in backbone.blocks()] == backbone.blocks()


def test_early_exit_spends_the_flops_that_layers_says(backbone, cond):
    x = example(backbone, batch=1)
    # The table counts a prompt of 77 tokens, so the share is taken with as many here.
    cond = None if cond is None else torch.zeros(77, cond.shape[-1])
    # The counter does not know the fused attention of the CPU, so both sides take the plain one.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as full:
        backbone.denoise(x, 7, cond)
    for layer in backbone.layers():
        if layer.name in backbone.blocks():
            with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as part:
                backbone.capture(x, 7, [layer.name], cond=cond)
            assert part.get_total_flops() / full.get_total_flops() == pytest.approx(layer.flops_to_here)


def test_time_for_each_row_and_condition_for_each_row(backbone, kind, cond):
    x = example(backbone)
    name = backbone.blocks()[-1]
    both = backbone.capture(x, torch.tensor([3, 400]), [name], cond=cond)[name]
    for row, time in enumerate((3, 400)):
        alone = backbone.capture(x[row : row + 1], time, [name], cond=cond)[name]
        torch.testing.assert_close(both[row : row + 1], alone, atol=1e-5, rtol=1e-5)


def test_input_sizes_that_are_not_native(backbone, kind, cond):
    height, width = (backbone.sample_size + 4, backbone.sample_size) if kind != "dit" else (8, 4)
    x = example(backbone, height=height, width=width)
    found = backbone.capture(x, 7, ["blocks"], cond=cond)
    assert all(feature.ndim == 4 for feature in found.values())
    assert found[backbone.blocks()[-1]].shape[-2] * width == found[backbone.blocks()[-1]].shape[-1] * height


def test_tokens_are_kept_on_request(backbone, kind, cond):
    if kind != "dit":
        pytest.skip("only transformers give tokens")
    name = backbone.blocks()[0]
    tokens = backbone.capture(example(backbone), 7, [name], tokens=True)[name]
    maps = backbone.capture(example(backbone), 7, [name])[name]
    assert torch.equal(tokens.transpose(1, 2).reshape(maps.shape), maps)


def test_features_can_feed_a_heads_backward(backbone, cond):
    name = backbone.blocks()[0]
    feature = backbone.capture(example(backbone), 7, [name], cond=cond)[name]
    weight = torch.ones(feature.shape[1], requires_grad=True)
    (feature * weight[:, None, None]).sum().backward()
    assert weight.grad is not None


def test_a_frozen_network(backbone):
    assert not any(p.requires_grad for p in backbone.network.parameters())
    assert not backbone.network.training


def test_wrong_inputs(backbone, kind, cond):
    x = example(backbone)
    with pytest.raises(ConfigError, match=f"x must be \\(B, {backbone.in_channels}"):
        backbone.capture(torch.zeros(2, 7, 8, 8), 1, ["blocks"], cond=cond)
    with pytest.raises(ConfigError, match="time must be"):
        backbone.capture(x, torch.zeros(3), ["blocks"], cond=cond)
    with pytest.raises(LayerError, match="did you mean"):
        backbone.capture(x, 1, [backbone.blocks()[0] + "0"], cond=cond)
    wrong = {"unet2d": torch.zeros(2), "unet2d-condition": torch.zeros(1, 5, 11), "dit": torch.tensor([11, 0])}[kind]
    with pytest.raises(ConfigError, match="cond"):
        backbone.capture(x, 1, ["blocks"], cond=wrong)
    if kind == "unet2d-condition":
        with pytest.raises(ConfigError, match="text-conditional"):
            backbone.capture(x, 1, ["blocks"])


def test_a_norm_over_channels_first_tokens_is_no_map(unet):
    name = "down_blocks.1.attentions.0.group_norm"  # (B, C, N): read as tokens, its channels would become pixels
    assert name not in [layer.name for layer in unet.layers()]
    with pytest.raises(LayerError, match="no map"):
        unet.capture(torch.zeros(1, 1, 16, 16), 1, [name])


def test_a_shared_activation_cannot_be_addressed(unet):
    shared = "down_blocks.0.resnets.0.nonlinearity"
    assert shared not in [layer.name for layer in unet.layers()]
    with pytest.raises(LayerError, match="times in one pass"):
        unet.capture(torch.zeros(1, 1, 16, 16), 1, [shared])


# Loading


def test_meta_device_reads_no_weights(kind, tmp_path):
    folder = save_tiny(kind, tmp_path)
    layers = load_backbone(folder, device="cpu").layers()
    for file in folder.rglob("*.safetensors"):
        file.unlink()
    assert load_backbone(folder, device="meta").layers() == layers


def test_parts_may_be_given_apart(unet_folder, unet, tmp_path):
    alone = tmp_path / "network"
    shutil.copytree(unet_folder / "unet", alone)
    with pytest.raises(ConfigError, match="no scheduler/"):
        load_backbone(alone)
    loaded = load_backbone(alone, schedule=unet_folder / "scheduler", device="cpu")
    assert loaded.weights_hash == unet.weights_hash
    assert loaded.schedule == unet.schedule


def test_a_file_of_weights_with_its_config(unet_folder, unet, tmp_path):
    weights = unet_folder / "unet" / "diffusion_pytorch_model.safetensors"
    options = {"family": "unet2d", "config": TINY["unet2d"][1], "schedule": unet_folder / "scheduler", "device": "cpu"}
    assert load_backbone(weights, **options).weights_hash == unet.weights_hash
    pickled = tmp_path / "weights.pt"
    torch.save(unet.network.state_dict(), pickled)
    assert load_backbone(pickled, **options).weights_hash == unet.weights_hash
    with pytest.raises(ConfigError, match="give its family"):
        load_backbone(weights)
    with pytest.raises(UnknownNameError, match="did you mean 'unet2d'"):
        load_backbone(weights, **{**options, "family": "unet2"})
    smaller = {**TINY["unet2d"][1], "layers_per_block": 2}
    with pytest.raises(CheckpointError, match="keys missing: up_blocks|keys missing: down_blocks"):
        load_backbone(weights, **{**options, "config": smaller})
    wider = {**TINY["unet2d"][1], "block_out_channels": (8, 24)}
    with pytest.raises(CheckpointError, match=r"of another shape: down_blocks.1.*\(16,\) in the file, \(24,\) in the"):
        load_backbone(weights, **{**options, "config": wider})


class Evil:
    def __reduce__(self):
        return (print, ("code ran",))


def test_pickles_are_never_executed(unet_folder, tmp_path, capsys):
    file = tmp_path / "evil.pt"
    torch.save({"conv_in.weight": Evil()}, file)
    with pytest.raises(CheckpointError, match="holds code or objects.*diffrep convert"):
        load_backbone(file, family="unet2d", config=TINY["unet2d"][1], schedule=unet_folder / "scheduler")
    assert "code ran" not in capsys.readouterr().out


def test_missing_and_truncated_checkpoints(unet_folder, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(unet_folder, folder)
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match="cannot load"):
        load_backbone(folder)
    weights.unlink()
    with pytest.raises(CheckpointError, match="cannot load"):
        load_backbone(folder)
    (folder / "unet" / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot read"):
        load_backbone(folder)
    (folder / "unet" / "config.json").unlink()
    with pytest.raises(CheckpointError, match="no config.json"):
        load_backbone(folder)


def test_a_checkpoint_that_lacks_weights_is_refused(unet_folder, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "copy"
    shutil.copytree(unet_folder, folder)
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    del state["conv_in.weight"]
    save_file(state, file)
    with pytest.raises(CheckpointError, match="1 keys missing: conv_in.weight"):
        load_backbone(folder)


def test_unknown_names_devices_and_classes(unet_folder, tmp_path):
    with pytest.raises(UnknownNameError, match="did you mean 'fashion-unet'"):
        load_backbone("fashion-net")
    with pytest.raises(ConfigError, match="unknown device"):
        load_backbone(unet_folder, device="gpu")
    if not torch.cuda.is_available():
        with pytest.raises(BackendUnavailable, match="no CUDA"):
            load_backbone(unet_folder, device="cuda")
    folder = tmp_path / "copy"
    shutil.copytree(unet_folder, folder)
    config = folder / "unet" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "_class_name": "UNet1DModel"}))
    with pytest.raises(ConfigError, match="'UNet1DModel' is not supported"):
        load_backbone(folder)


def test_an_unreachable_hub_says_so(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="the hub did not give it"):
        load_backbone("no-such-owner/no-such-model")


def test_untrained_weights_are_a_function_of_the_seed(unet_folder, unet):
    first, again, other = (load_backbone(unet_folder, init_seed=seed, device="cpu").weights_hash for seed in (0, 0, 1))
    assert first == again
    assert len({first, other, unet.weights_hash}) == 3


def test_a_codec_of_another_width_is_refused(unet_folder, tmp_path):
    vae = save_tiny("unet2d-condition", tmp_path) / "vae"
    with pytest.raises(ConfigError, match="the codec gives 4 channels, the network takes 1"):
        load_backbone(unet_folder, codec=vae)


@pytest.mark.gpu
def test_cuda_equals_cpu(kind, cond, tmp_path, monkeypatch):
    # torch lets convolutions round to TF32, three digits, unless it is told not to.
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    folder = save_tiny(kind, tmp_path)
    x = torch.randn(2, 1 if kind == "unet2d" else 4, 8, 8)
    results = [
        load_backbone(folder, device=device, dtype="float32").capture(x, 7, ["blocks"], cond=cond)
        for device in ("cpu", "cuda")
    ]
    for name, feature in results[0].items():
        torch.testing.assert_close(results[1][name].cpu(), feature, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(
    ("norm", "family", "extra"),
    [
        ("ada_norm_zero", "DiTBackbone", {"num_embeds_ada_norm": 10}),
        (
            "ada_norm_single",
            "PixArt",
            {"num_embeds_ada_norm": 1000, "cross_attention_dim": 24, "caption_channels": 12},
        ),
    ],
)
def test_folders_from_before_dit_and_pixart_had_classes(norm, family, extra, tmp_path):
    """The published repositories of DiT and PixArt-alpha name Transformer2DModel."""
    torch.manual_seed(0)
    arguments = {"num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 8} | extra
    arguments |= {"num_layers": 2, "patch_size": 2, "sample_size": 8, "norm_type": norm, "attention_bias": True}
    arguments |= {"activation_fn": "gelu-approximate", "norm_elementwise_affine": False}
    old = diffusers.Transformer2DModel(**arguments).eval()
    x, time = torch.randn(2, 4, 8, 8), torch.tensor([3, 500])
    if family == "DiTBackbone":
        for block in old.transformer_blocks:
            block.norm1.emb.load_state_dict(old.transformer_blocks[0].norm1.emb.state_dict())
        cond, given = [1, 2], {"class_labels": torch.tensor([1, 2])}
    else:
        cond = torch.randn(2, 5, 12)
        given = {"encoder_hidden_states": cond, "added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}
    old.save_pretrained(tmp_path / "transformer")
    diffusers.DDIMScheduler().save_pretrained(tmp_path / "scheduler")
    net = load_backbone(tmp_path, device="cpu")
    assert type(net).__name__ == family
    if family == "DiTBackbone":  # opened as the official network, whose frequencies and epsilon the class has not
        for block in old.transformer_blocks:
            block.norm1.emb.time_proj.downscale_freq_shift, block.norm3.eps = 0, 1e-6
    with torch.no_grad():
        expected = old(x, timestep=time, return_dict=False, **given)[0]
    torch.testing.assert_close(net.denoise(x, time, cond), expected, atol=1e-5, rtol=1e-5)
