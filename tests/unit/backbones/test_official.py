"""Official checkpoints through `load_backbone`: forms of a file, configs, folders that were converted."""

import argparse
import json
import re

import pytest
import torch
from diffusers import DDPMScheduler, DiTTransformer2DModel
from safetensors.torch import load_file, save_file

from diffrep import FeatureRequest, load_backbone
from diffrep.backbones.convert import convert
from diffrep.backbones.edm import PRECONDITIONINGS
from diffrep.errors import CheckpointError, ConfigError, LayerError, UnknownNameError
from diffrep.noise import DiscreteSchedule, FlowSchedule, SigmaSchedule
from diffrep.testing import save_tiny, save_tiny_pipeline

# The same ADM in the vocabulary of create_model_and_diffusion.
ADM_FLAGS = {
    "image_size": 16,
    "num_channels": 32,
    "num_res_blocks": 1,
    "attention_resolutions": "8",
    "channel_mult": "1,2",
    "num_head_channels": 16,
    "learn_sigma": True,
    "resblock_updown": True,
}


@pytest.fixture(scope="module", params=["dit", "sit", "repa", "adm", "edm"])
def family(request):
    return request.param


def inputs(net, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, net.in_channels, net.sample_size, net.sample_size, generator=generator)


def assert_same(a, b):
    """The same features and outputs."""
    x, time = inputs(a), a.schedule.level("sigma=0.7").time
    assert b.schedule == a.schedule
    found = a.capture(x, time, ["blocks"]), b.capture(x, time, ["blocks"])
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    assert torch.equal(a.denoise(x, time), b.denoise(x, time))


# Where the weights may lie


def wrapped(state, form):
    """A state dict as training code saves it."""
    other = {key: torch.full_like(value, 7.0) for key, value in state.items()}
    arguments = argparse.Namespace(model="XL/2", lr=1e-4, sizes=[1, 2], resume=None)
    return {
        "bare": state,
        "ema": {"ema": state},
        "dit": {"model": other, "ema": state, "opt": {"state": {}, "param_groups": [{"lr": 1e-4}]}, "args": arguments},
        "model": {"model": state, "steps": 10},
        "lightning": {"state_dict": state, "epoch": 3},
        "ddp": {"ema": {f"module.{key}": value for key, value in state.items()}},
        "compiled": {f"_orig_mod.{key}": value for key, value in state.items()},
        "both": {"model": {f"module._orig_mod.{key}": value for key, value in state.items()}},
        "parameters": {key: torch.nn.Parameter(value) for key, value in state.items()},
        "half": {key: value.half() for key, value in state.items()},
    }[form]


@pytest.mark.parametrize("form", ["bare", "ema", "dit", "model", "lightning", "ddp", "compiled", "both", "parameters"])
def test_forms_of_a_checkpoint(load, files, states, family, form, tmp_path):
    file = tmp_path / "last.pt"
    torch.save(wrapped(states[family], form), file)
    assert load(file, family).weights_hash == load(files[family], family).weights_hash


def test_half_precision_on_disk_is_computed_in_fp32(load, states, tmp_path):
    file = tmp_path / "half.pt"
    torch.save(wrapped(states["dit"], "half"), file)
    net = load(file, "dit")
    assert net.dtype == torch.float32
    assert torch.equal(net.network.blocks[0].mlp.fc1.weight, states["dit"]["blocks.0.mlp.fc1.weight"].half().float())


def test_edm_keys_with_and_without_the_wrapper(load, files, states, tmp_path):
    file = tmp_path / "bare.safetensors"
    save_file({key.removeprefix("model."): value for key, value in states["edm"].items()}, file)
    assert all(key.startswith("model.") for key in states["edm"])
    assert_same(load(files["edm"], "edm"), load(file, "edm"))


def test_the_first_key_layout_of_repa(configs, load, files, states, tmp_path):
    depth = configs["repa"]["encoder_depth"]

    def old(key):
        match = re.match(r"blocks\.(\d+)\.(.*)", key)
        return f"decoder_blocks.{int(match[1]) - depth}.{match[2]}" if match and int(match[1]) >= depth else key

    renamed = {old(key): value for key, value in states["repa"].items()}
    assert any(key.startswith("decoder_blocks.0.") for key in renamed)
    torch.save(renamed, tmp_path / "last.pt")
    assert_same(load(files["repa"], "repa"), load(tmp_path / "last.pt", "repa"))


def test_repa_with_and_without_projectors(configs, load, files, states, tmp_path):
    file = tmp_path / "without.safetensors"
    save_file({key: value for key, value in states["repa"].items() if not key.startswith("projectors.")}, file)
    net, without = load(files["repa"], "repa"), load(file, "repa", configs["dit"])
    assert_same(net, without)
    x = inputs(net)
    found = net.capture(x, 0.5, ["projectors.0", "projectors.1", "repa.2"], tokens=True)
    for name, width in (("projectors.0", 6), ("projectors.1", 5)):
        assert found[name].shape == (2, 16, width)
        assert torch.equal(found[name], net.network.get_submodule(name)(found["blocks.1"]))
    last = net.blocks()[-1]
    assert net.flops(net.addresses([last]), 8, 8)[0] == without.flops(without.addresses([last]), 8, 8)[0]
    with pytest.raises(LayerError, match="projectors"):
        without.addresses(["projectors.0"])
    with pytest.raises(CheckpointError, match="12 keys missing: projectors.0.0.bias"):
        load(file, "repa")


def test_sizes_that_the_weights_say(configs, random_state, load, tmp_path):
    config = {"input_size": 64, "num_classes": 7, "in_channels": 3, "qk_norm": True, "learn_sigma": False}
    file = tmp_path / "large.safetensors"
    save_file(random_state("dit", configs["dit"] | config), file)
    known = {"hidden_size": 16, "depth": 3, "num_heads": 2, "learn_sigma": False}
    net = load(file, "dit", known)
    unread = load_backbone(file, family="dit", config=known, device="meta")
    assert unread.layers() == net.layers()
    assert (net.sample_size, net.in_channels, net.conditioner.rows, net.conditioner.null) == (64, 3, 8, 7)
    assert net.denoise(inputs(net), 5).shape == (2, 3, 64, 64)
    assert {"blocks.0.attn.q_norm", "blocks.0.attn.k_norm"} <= {name for name, _ in net.network.named_modules()}
    assert_same(net, load(file, "dit", configs["dit"] | config))


def test_a_table_without_the_null_row_needs_a_label(configs, random_state, load, tmp_path):
    config = configs["dit"] | {"class_dropout_prob": 0}
    file = tmp_path / "labelled.safetensors"
    save_file(random_state("dit", config), file)
    net = load(file, "dit", {key: config[key] for key in config if key != "num_classes"})
    assert net.conditioner.rows == 10
    with pytest.raises(ConfigError, match="class-conditional; give cond, labels from 0 to 9"):
        net.denoise(inputs(net), 5)


def test_a_config_in_a_json_file(configs, load, files, family, tmp_path):
    file = tmp_path / "config.json"
    file.write_text(json.dumps(configs[family]))
    assert_same(load(files[family], family), load(files[family], family, file))
    file.write_text("[1]")
    with pytest.raises(CheckpointError, match=r"must hold a JSON object, .* the constructor's arguments, got \[1\]"):
        load(files[family], family, str(file))


def test_another_network_of_the_same_shape(load, files, family):
    trained = load(files[family], family)
    first, again, other = (load(files[family], family, init_seed=seed) for seed in (0, 0, 1))
    assert first.layers() == trained.layers()
    assert first.weights_hash == again.weights_hash
    assert len({first.weights_hash, other.weights_hash, trained.weights_hash}) == 3
    assert load(files[family], family, device="meta", init_seed=0).layers() == trained.layers()


# Configs


@pytest.mark.parametrize(
    ("family", "name", "message"),
    [
        ("dit", "XL/3", "unknown DiT variant 'XL/3'; did you mean 'XL/8' or 'XL/4' or 'XL/2'"),
        ("sit", "XXL/2", "did you mean .*'XL/2'"),
        ("repa", "nothing", "known: S/2, S/4, S/8, B/2"),
        ("adm", "256-uncnd", "unknown ADM variant '256-uncnd'; did you mean '256-uncond'"),
        ("edm", "cifar10-32x32-uncond", "unknown EDM variant .*did you mean 'cifar10-32x32-uncond-vp'"),
    ],
)
def test_unknown_variants(load, files, family, name, message):
    with pytest.raises(UnknownNameError, match=message):
        load(files[family], family, name)


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        ("dit", {"num_head": 2}, "unknown key 'num_head'; did you mean 'num_heads'"),
        ("dit", {"num_heads": 3}, "hidden_size must be a multiple of num_heads, 3"),
        ("dit", {"num_heads": 0}, "DiT cannot be built from .*'num_heads': 0"),
        ("dit", {"depth": "3"}, "DiT cannot be built from .*'depth': '3'"),
        ("repa", {"encoder_depth": 4}, "encoder_depth must lie between 1 and depth, 3, got 4"),
        ("repa", {"path_type": "liner"}, "unknown path_type 'liner'; did you mean 'linear'"),
        ("adm", {"model_chanels": 32}, "did you mean 'model_channels'"),
        ("adm", {"num_res_blocks": "1"}, "ADMUNet cannot be built from"),
        ("edm", {"precond": "vpp"}, "unknown precond 'vpp'; did you mean 'vp'"),
        ("edm", {"model_type": "SongUnet"}, "did you mean 'SongUNet'"),
        ("edm", {"sigma_data": 1.0}, "only 0.5 is supported"),
    ],
)
def test_configs_that_cannot_be_built(configs, load, files, family, change, message):
    with pytest.raises(ConfigError, match=message):
        load(files[family], family, configs[family] | change)


@pytest.mark.parametrize(
    ("family", "config", "schedule"),
    [
        ("dit", {}, DiscreteSchedule.linear()),
        ("sit", {}, FlowSchedule("linear", data_time=1)),
        ("sit", {"path_type": "GVP"}, FlowSchedule("cosine", data_time=1)),
        ("sit", {"path_type": "VP"}, FlowSchedule("vp", data_time=1)),
        ("repa", {}, FlowSchedule("linear", data_time=0)),
        ("repa", {"path_type": "edm"}, FlowSchedule("linear", data_time=0)),
        ("repa", {"path_type": "cosine"}, FlowSchedule("cosine", data_time=0)),
        ("adm", {}, DiscreteSchedule.linear()),
        ("edm", {}, SigmaSchedule("edm", 0.002, 80.0)),
    ],
)
def test_schedules_of_the_papers(configs, load, files, family, config, schedule):
    assert load(files[family], family, configs[family] | config).schedule == schedule


def test_adm_in_both_vocabularies(configs, load, files):
    net, flags = (load(files["adm"], "adm", config) for config in (configs["adm"], ADM_FLAGS))
    assert_same(net, flags)
    assert any(name.endswith(".qkv") for name, _ in flags.network.input_blocks.named_modules())
    cosine = load(files["adm"], "adm", ADM_FLAGS | {"noise_schedule": "cosine"})
    assert cosine.schedule == DiscreteSchedule.cosine()
    with pytest.raises(ConfigError, match="keep to one"):
        load(files["adm"], "adm", ADM_FLAGS | {"model_channels": 32})


def test_a_class_conditional_adm_needs_labels(configs, random_state, load, tmp_path):
    config = configs["adm"] | {"num_classes": 5}
    file = tmp_path / "cond.safetensors"
    save_file(random_state("adm", config), file)
    net = load(file, "adm", config)
    x = inputs(net)
    for call in (lambda cond: net.denoise(x, 5, cond), lambda cond: net.capture(x, 5, ["middle_block"], cond)):
        with pytest.raises(ConfigError, match="class-conditional; give cond, labels from 0 to 4"):
            call(None)
        with pytest.raises(ConfigError, match="labels outside 0 to 4"):
            call([0, 5])
        call([0, 4])
    assert not torch.equal(net.denoise(x, 5, 0), net.denoise(x, 5, 1))
    assert net.layers(), "the table needs no label"


@pytest.mark.parametrize("precond", PRECONDITIONINGS)
def test_preconditionings(configs, random_state, load, tmp_path, precond):
    """D(x; sigma) = c_skip x + c_out F(c_in x; c_noise), EDM's table 1; c_noise has golden numbers of its own."""
    config = configs["edm"] | {"precond": precond}
    state = random_state("edm", config)
    if precond == "iddpm":
        state["u"] = PRECONDITIONINGS["iddpm"].levels  # what the published wrapper keeps beside the network
    file = tmp_path / "net.safetensors"
    save_file(state, file)
    net = load(file, "edm", config)
    x = inputs(net)
    level = net.schedule.level("sigma=0.7")
    s, labels = level.time, torch.eye(10)[[3, 3]]
    skip, out, scale = {
        "edm": (0.25 / (s**2 + 0.25), 0.5 * s / (s**2 + 0.25) ** 0.5, (s**2 + 0.25) ** -0.5),
        "vp": (1, -s, (s**2 + 1) ** -0.5),
        "ve": (1, s, 1),
        "iddpm": (1, -s, (s**2 + 1) ** -0.5),
    }[precond]
    told = PRECONDITIONINGS[precond].c_noise(torch.tensor([s, s]))
    raw = net.network(scale * x, told, labels)
    assert raw.shape[1] == (6 if precond == "iddpm" else 3)
    torch.testing.assert_close(net.denoise(x, s, 3), skip * x + out * raw[:, :3], atol=1e-5, rtol=1e-5)
    assert torch.equal(net.denoise(x, s), net.denoise(x, s, torch.zeros(2, 10)))


# Folders


def test_a_converted_folder_is_the_original(configs, load, files, family, tmp_path):
    out = convert(files[family], tmp_path / "out", family, configs[family])
    net, again = load(files[family], family), load_backbone(out, device="cpu")
    assert type(again) is type(net)
    assert_same(net, again)
    assert again.weights_hash == net.weights_hash
    assert load_backbone(out, device="meta").layers() == net.layers()
    assert load_backbone(out, family=family, device="meta").layers() == net.layers()
    other = "adm" if family != "adm" else "edm"
    with pytest.raises(ConfigError, match=f"family '{family}', not '{other}'"):
        load_backbone(out, family=other)
    twice = convert(out, tmp_path / "twice")
    assert (twice / "config.json").read_text() == (out / "config.json").read_text()


def test_a_converted_folder_keeps_what_the_weights_said(configs, random_state, load, tmp_path):
    file = tmp_path / "large.safetensors"
    save_file(random_state("sit", configs["dit"] | {"input_size": 16, "num_classes": 7}), file)
    config = {"hidden_size": 16, "depth": 3, "num_heads": 2, "path_type": "GVP"}
    out = convert(file, tmp_path / "out", "sit", config)
    unread = load_backbone(out, device="meta")
    assert (unread.sample_size, unread.conditioner.rows) == (16, 8)
    assert unread.schedule == FlowSchedule("cosine", data_time=1)
    assert unread.layers() == load(file, "sit", config).layers()


def test_a_folder_trained_with_diffusers_class_is_told(tmp_path):
    torch.manual_seed(0)
    config = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "sample_size": 8}
    DiTTransformer2DModel(**config).save_pretrained(tmp_path / "transformer")  # each block has embedders of its own
    DDPMScheduler().save_pretrained(tmp_path / "scheduler")
    with pytest.raises(CheckpointError, match="of block 1 differs from that of block 0.*family='diffusers-dit'"):
        load_backbone(tmp_path, device="cpu")
    assert load_backbone(tmp_path, family="diffusers-dit", device="cpu").blocks()[0] == "transformer_blocks.0"
    with pytest.raises(ConfigError, match="which is not family 'sit'"):
        load_backbone(tmp_path, family="sit", device="cpu")


def test_networks_without_a_form_in_diffusers(configs, random_state, files, tmp_path):
    for family in ("sit", "repa", "adm", "edm"):
        with pytest.raises(ConfigError, match=f"only DiT has a form in diffusers; .* is family '{family}'"):
            convert(files[family], tmp_path / family, family, configs[family], to="diffusers")
    for change, named in (
        ({"class_dropout_prob": 0}, "class_dropout_prob=0"),
        ({"qk_norm": True}, "qk_norm=True"),
        ({"mlp_ratio": 2.0, "time_scale": 1000.0}, "time_scale=1000.0, mlp_ratio=2.0"),
    ):
        file = tmp_path / "odd.safetensors"
        save_file(random_state("dit", configs["dit"] | change), file)
        with pytest.raises(CheckpointError, match=f"DiTTransformer2DModel has no {named}"):
            convert(file, tmp_path / "odd", "dit", configs["dit"] | change, to="diffusers")
        assert not (tmp_path / "odd").exists(), "nothing is written before the refusal"


# Names from papers


@pytest.mark.parametrize(
    ("family", "alias", "address"),
    [
        ("dit", "repa.2", "blocks.1"),
        ("sit", "repa.1", "blocks.0"),
        ("repa", "repa.3", "blocks.2"),
        ("adm", "dift.1", "output_blocks.1"),
        ("adm", "gd.1", "input_blocks.0"),
        ("adm", "gd.5", "middle_block"),
        ("edm", "ddae.1", "dec.8x8_block0"),
        ("edm", "ddae.4", "dec.16x16_block1"),
    ],
)
def test_features_asked_for_by_alias_come_back_under_the_address(load, files, family, alias, address):
    net = load(files[family], family)
    images = torch.rand(2, net.image_channels, net.image_size, net.image_size)
    features = net.extract(images, FeatureRequest([alias], ["sigma=0.7"], dtype="float32"))
    assert features.layers == [address]
    direct = net.extract(images, FeatureRequest([address], ["sigma=0.7"], dtype="float32"))
    assert torch.equal(features[alias, "sigma=0.7"], direct[address, "sigma=0.7"])
    assert torch.equal(features[address, "sigma=0.7"], direct[address, "sigma=0.7"])


@pytest.mark.parametrize(
    ("family", "alias"),
    [
        ("dit", "repa.0"),
        ("dit", "repa.4"),
        ("dit", "dift.1"),
        ("repa", "repa.x"),
        ("adm", "gd.0"),
        ("adm", "gd.10"),
        ("adm", "dift.4"),
        ("adm", "repa.1"),
        ("edm", "ddae.0"),
        ("edm", "ddae.5"),
        ("edm", "gd.1"),
    ],
)
def test_aliases_that_name_nothing(load, files, family, alias):
    net = load(files[family], family)
    with pytest.raises(LayerError, match=rf"alias '{alias}' \(.*names no layer of {type(net.network).__name__}$"):
        net.addresses([alias])


def test_round_trip_of_state_dicts_on_disk(configs, files, tmp_path):
    out = convert(files["dit"], tmp_path / "out", "dit", configs["dit"], to="diffusers")
    back = convert(out, tmp_path / "back")
    state, again = load_file(files["dit"]), load_file(back / "model.safetensors")
    assert state.keys() == again.keys()
    assert all(torch.equal(state[key], again[key]) for key in state)


@pytest.mark.parametrize(
    ("held", "family"), [("dit", "repa"), ("sit", "repa"), ("plain repa", "sit"), ("plain repa", "dit")]
)
def test_the_last_layer_tells_repa_from_the_others(configs, random_state, load, tmp_path, held, family):
    plain = {
        key: value for key, value in configs["repa"].items() if key not in ("z_dims", "projector_dim", "encoder_depth")
    }
    kind, config = ("repa", plain) if held == "plain repa" else (held, configs[held])
    file = tmp_path / "weights.safetensors"
    save_file(random_state(kind, config), file)
    with pytest.raises(CheckpointError, match="last layer is half as wide as that of DiT and SiT"):
        load(file, family, plain)


def test_registered_names_reach_the_hub_by_their_id(tmp_path, monkeypatch):
    """Weights, and at the first prompt the text encoders, of the repository and not of the name."""
    folder, asked = save_tiny_pipeline("sd15", tmp_path / "snapshot"), []

    def snapshot(name, **options):
        asked.append((name, any("text_encoder" in pattern for pattern in options["allow_patterns"])))
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    net = load_backbone("sd15", device="cpu")
    net.extract(torch.rand(1, 3, 16, 16), FeatureRequest("mid_block", 5))
    repository = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    assert asked == [(repository, False), (repository, True)]
    assert net.name == "sd15"


def test_a_folder_of_a_registered_name_comes_first(tmp_path, monkeypatch):
    save_tiny("unet2d", tmp_path / "sd15")
    monkeypatch.chdir(tmp_path)
    assert load_backbone("sd15", device="meta").in_channels == 1
    with pytest.raises(ConfigError, match="registered backbone, which has its own family and config"):
        load_backbone("sdxl", family="sd3", device="meta")
