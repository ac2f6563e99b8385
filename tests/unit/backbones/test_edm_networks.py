"""EDM's networks at tiny size, the preconditionings, and the configs that networks are made from."""

import copy

import pytest
import torch
from torch import nn

from diffrep.backbones.edm import PRECONDITIONINGS, VARIANTS, DhariwalUNet, SongUNet, edm_arguments
from diffrep.errors import ConfigError, UnknownNameError

TINY = {
    "ddpmpp": {
        "model_type": "SongUNet",
        "img_resolution": 16,
        "img_channels": 3,
        "label_dim": 4,
        "augment_dim": 9,
        "model_channels": 8,
        "channel_mult": [1, 2],
        "num_blocks": 1,
        "attn_resolutions": [8],
    },
    "adm": {
        "model_type": "DhariwalUNet",
        "img_resolution": 16,
        "img_channels": 3,
        "label_dim": 4,
        "model_channels": 32,
        "channel_mult": [1, 4],
        "num_blocks": 1,
        "attn_resolutions": [16, 8],
    },
}
TINY["ncsnpp"] = TINY["ddpmpp"] | {
    "embedding_type": "fourier",
    "encoder_type": "residual",
    "channel_mult_noise": 2,
    "resample_filter": [1, 3, 3, 1],
}
TINY["skips"] = TINY["ddpmpp"] | {"encoder_type": "skip", "decoder_type": "skip", "channel_mult": [1, 1, 2]}


def build(config, seed=0):
    factory, arguments, _ = edm_arguments(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return factory(**arguments).requires_grad_(False).eval()


def example(batch=2):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, 3, 16, 16, generator=generator)
    return x, torch.linspace(-0.5, 0.5, batch), nn.functional.one_hot(torch.arange(batch), 4).float()


@pytest.fixture(params=TINY)
def kind(request):
    return request.param


# The networks -------------------------------------------------------------------------------------------------------


def test_runs_and_depends_on_every_input(kind):
    network, (x, noise_labels, classes) = build(TINY[kind]), example()
    output = network(x, noise_labels, classes)
    assert output.shape == x.shape
    assert output.isfinite().all()
    assert not torch.allclose(output, network(x, noise_labels + 0.3, classes))
    assert not torch.allclose(output, network(x, noise_labels, classes.flip(0)))


def test_no_class_is_zeros_and_no_augmentation_is_zeros():
    network, (x, noise_labels, _) = build(TINY["ddpmpp"]), example()
    expected = network(x, noise_labels, torch.zeros(2, 4), torch.zeros(2, 9))
    torch.testing.assert_close(network(x, noise_labels), expected)
    assert not torch.allclose(network(x, noise_labels, None, torch.ones(2, 9)), expected)


def test_a_sample_does_not_depend_on_its_batch(kind):
    network, (x, noise_labels, classes) = build(TINY[kind]), example()
    alone = network(x[1:], noise_labels[1:], classes[1:])
    torch.testing.assert_close(network(x, noise_labels, classes)[1:], alone, atol=1e-5, rtol=1e-5)


def test_ncsnpp_keys():
    state = build(TINY["ncsnpp"]).state_dict()
    assert state["map_noise.freqs"].shape == (8,)
    assert state["enc.8x8_aux_residual.weight"].shape == (8, 3, 3, 3)
    filters = {key: tuple(value.shape) for key, value in state.items() if key.endswith("resample_filter")}
    assert filters == {
        f"{place}.resample_filter": (1, 1, 4, 4)
        for place in (
            "enc.8x8_down.conv0",
            "enc.8x8_down.skip",
            "enc.8x8_aux_residual",
            "dec.16x16_up.conv0",
            "dec.16x16_up.skip",
        )
    }
    assert "enc.8x8_down.skip.weight" in state


def test_ncsnpp_residual_branch_replaces_the_skip():
    network, (x, noise_labels, classes) = build(TINY["ncsnpp"]), example()
    seen = {}
    for name, module in network.named_modules():
        module.register_forward_hook(lambda _, args, out, name=name: seen.update({name: (args[0], out)}))
    network(x, noise_labels, classes)
    branch = network.enc["8x8_aux_residual"]
    full_size = nn.functional.conv2d(nn.functional.pad(x, (2, 2, 2, 2)), branch.weight, branch.bias)
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
    halved = torch.einsum("bcyxij,i,j->bcyx", full_size.unfold(2, 4, 2).unfold(3, 4, 2), taps, taps)
    torch.testing.assert_close(seen["enc.8x8_aux_residual"][1], halved, atol=1e-5, rtol=1e-5)
    stream = (seen["enc.8x8_down"][1] + halved) / 2**0.5
    torch.testing.assert_close(seen["enc.8x8_block0"][0], stream, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(seen["dec.8x8_block1"][0][:, -8:], stream, atol=1e-5, rtol=1e-5)


def test_skip_keys():
    state = build(TINY["skips"]).state_dict()
    assert {key.split(".")[1] for key in state if "_aux_" in key} == {
        *("8x8_aux_down", "8x8_aux_skip", "4x4_aux_down", "4x4_aux_skip"),
        *("8x8_aux_up", "16x16_aux_up"),
        *(f"{size}_aux_{part}" for size in ("4x4", "8x8", "16x16") for part in ("norm", "conv")),
    }
    assert "enc.8x8_aux_down.weight" not in state


def test_dhariwal_keys():
    network = build(TINY["adm"])
    state = network.state_dict()
    assert "map_label.bias" not in state
    assert state["out_conv.weight"].shape == (3, 32, 3, 3)
    # A resampling block that keeps its channels has a shortcut without weights.
    assert [key for key in state if key.startswith("enc.8x8_down.skip.")] == ["enc.8x8_down.skip.resample_filter"]
    # Heads are 64 channels wide: two at 128 channels, in every block of the level, and none at 32.
    heads = {name: module.num_heads for name, module in network.named_modules() if hasattr(module, "num_heads")}
    assert heads["enc.16x16_block0"] == 0
    assert heads["dec.16x16_block1"] == 0
    assert heads["enc.8x8_down"] == 0
    assert heads["dec.8x8_in1"] == 0
    assert all(heads[f"{block}"] == 2 for block in ("enc.8x8_block0", "dec.8x8_in0", "dec.8x8_block0"))
    assert not any(key.startswith("enc.16x16_block0.qkv") for key in state)


def test_song_attends_once_at_the_end_of_a_decoder_level():
    network = build(TINY["ddpmpp"])
    attended = [name for name, module in network.named_modules() if getattr(module, "num_heads", 0)]
    assert attended == ["enc.8x8_block0", "dec.8x8_in0", "dec.8x8_block1"]


def test_split_qkv_undoes_the_interleaving():
    block = build(TINY["adm"]).enc["8x8_block0"]
    kinds = torch.arange(3 * 128) % 3
    channels = torch.arange(3 * 128) // 3
    qkv = (1000 * kinds + channels).float()[None, :, None, None] + torch.arange(6).view(1, 1, 2, 3) / 8
    for index, part in enumerate(block.split_qkv(qkv)):
        expected = 1000 * index + torch.arange(128).float()[None, None] + torch.arange(6)[None, :, None] / 8
        torch.testing.assert_close(part, expected, atol=0, rtol=0)


def test_the_filters_keep_the_mean_and_the_size():
    network = build(TINY["skips"] | {"resample_filter": [1, 3, 3, 1]})
    flat = torch.full((1, 3, 16, 16), 0.7)
    down = network.enc["8x8_aux_down"](flat)
    up = network.dec["16x16_aux_up"](down)
    assert down.shape[-1] == 8
    assert up.shape[-1] == 16
    torch.testing.assert_close(down[:, :, 1:-1, 1:-1], torch.full((1, 3, 6, 6), 0.7))
    torch.testing.assert_close(up[:, :, 4:-4, 4:-4], torch.full((1, 3, 8, 8), 0.7))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_near(kind, dtype):
    network, (x, noise_labels, classes) = build(TINY[kind]), example()
    exact = network(x, noise_labels, classes)
    half = network.to(dtype)(x.to(dtype), noise_labels, classes)
    assert half.dtype == dtype
    assert (half.float() - exact).norm() < 0.05 * exact.norm()


def test_fourier_frequencies_stay_exact():
    network = build(TINY["ncsnpp"])
    exact = network.map_noise.freqs.clone()
    assert torch.equal(network.to(torch.bfloat16).map_noise.freqs, exact)
    assert torch.equal(copy.deepcopy(network).half().map_noise.freqs, exact)
    assert network.map_layer0.weight.dtype == torch.bfloat16


def test_meta_device(kind):
    with torch.device("meta"):
        network = build(TINY[kind])
        x, noise_labels, classes = torch.zeros(2, 3, 16, 16), torch.zeros(2), torch.zeros(2, 4)
    assert network(x, noise_labels, classes).shape == x.shape
    for precond in PRECONDITIONINGS.values():
        assert precond.c_noise(noise_labels).device.type == "meta"
    assert build(TINY[kind]).to("meta")(x, noise_labels, classes).device.type == "meta"


def test_label_dropout_only_in_training():
    network, (x, noise_labels, classes) = build(TINY["adm"] | {"label_dropout": 1.0, "dropout": 0.0}), example()
    null = network(x, noise_labels)
    assert not torch.allclose(network(x, noise_labels, classes), null)
    torch.testing.assert_close(network.train()(x, noise_labels, classes), null)


@pytest.mark.compile
@pytest.mark.parametrize("kind", ["ncsnpp", "adm"])
def test_compiles_into_one_graph(kind):
    network, (x, noise_labels, classes) = build(TINY[kind]), example()
    expected = PRECONDITIONINGS["iddpm"].denoised(network, x, noise_labels + 1, classes)
    compiled = torch.compile(
        lambda x, sigma, classes: PRECONDITIONINGS["iddpm"].denoised(network, x, sigma, classes),
        fullgraph=True,
        backend="aot_eager",
    )
    torch.testing.assert_close(compiled(x, noise_labels + 1, classes), expected, atol=1e-5, rtol=1e-5)


def test_labels_that_do_not_fit():
    network, (x, noise_labels, classes) = build(TINY["ddpmpp"]), example()
    with pytest.raises(ConfigError, match=r"class_labels must be \(B, 4\), got \(2,\)"):
        network(x, noise_labels, classes.argmax(1))
    with pytest.raises(ConfigError, match=r"augment_labels must be \(B, 9\), got \(2, 3\)"):
        network(x, noise_labels, classes, torch.zeros(2, 3))
    unconditional = build(TINY["ddpmpp"] | {"label_dim": 0, "augment_dim": 0})
    with pytest.raises(ConfigError, match="class_labels must be left out"):
        unconditional(x, noise_labels, classes)


def test_unknown_types():
    with pytest.raises(UnknownNameError, match="did you mean 'fourier'"):
        build(TINY["ddpmpp"] | {"embedding_type": "fourrier"})
    with pytest.raises(UnknownNameError, match="encoder_type"):
        build(TINY["ddpmpp"] | {"encoder_type": "unet"})


# Preconditionings ---------------------------------------------------------------------------------------------------


class Echo(nn.Module):
    """Returns its input, `copies` times along the channels, and remembers how it was called."""

    def __init__(self, copies=1, dtype=torch.float32):
        super().__init__()
        self.weight = nn.Parameter(torch.ones((), dtype=dtype))
        self.copies = copies

    def forward(self, x, noise_labels, class_labels, augment_labels=None):
        self.called = x, noise_labels, class_labels, augment_labels
        return torch.cat([x * self.weight * (index + 1) for index in range(self.copies)], dim=1)


@pytest.mark.parametrize("name", PRECONDITIONINGS)
def test_denoised_is_the_sum_of_both_paths(name):
    precond, (x, _, classes) = PRECONDITIONINGS[name], example()
    sigma = torch.tensor([0.3, 7.0])
    echo = Echo(precond.outputs_per_channel, torch.bfloat16)
    denoised = precond.denoised(echo, x, sigma, classes, augment_labels=classes)
    scaled, noise_labels, given, augment = echo.called
    assert scaled.dtype == torch.bfloat16
    assert noise_labels.dtype == denoised.dtype == torch.float32
    assert given is classes
    assert augment is classes
    for row in range(2):
        c = {part: getattr(precond, part)(sigma)[row] for part in ("c_in", "c_skip", "c_out")}
        expected = c["c_skip"] * x[row] + c["c_out"] * (c["c_in"] * x[row]).bfloat16().float()
        torch.testing.assert_close(denoised[row], expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", ["vp", "ve", "iddpm"])
def test_a_perfect_noise_predictor_gives_the_clean_image(name):
    precond = PRECONDITIONINGS[name]
    generator = torch.Generator().manual_seed(0)
    clean, noise = torch.randn(2, 1, 3, 4, 4, generator=generator)

    class Oracle(Echo):
        def forward(self, x, noise_labels, class_labels):
            predicted = -noise if name == "ve" else noise
            return torch.cat([predicted] * precond.outputs_per_channel, dim=1)

    found = precond.denoised(Oracle(), clean + 2.0 * noise, torch.tensor([2.0]))
    torch.testing.assert_close(found, clean, atol=1e-5, rtol=1e-5)


def test_iddpm_rounds_to_the_nearest_level():
    precond = PRECONDITIONINGS["iddpm"]
    levels = precond.levels
    assert torch.equal(precond.round_sigma(levels * (1 + 1e-5)), levels)
    between = levels[500] + 0.49 * (levels[499] - levels[500])
    assert precond.round_sigma(between) == levels[500]
    assert precond.c_noise(between) == 499


# Configs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variant", "parameters"),
    [("cifar10-32x32-uncond-vp", 55_733_891), ("imagenet-64x64-cond-adm", 295_899_267)],
)
def test_published_parameter_counts(variant, parameters):
    with torch.device("meta"):
        network = build(variant)
    assert sum(parameter.numel() for parameter in network.parameters()) == parameters


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_say_what_their_names_say(variant):
    factory, arguments, precond = edm_arguments(variant)
    assert precond == "edm"
    assert f"{arguments['img_resolution']}x{arguments['img_resolution']}" in variant
    assert bool(arguments["label_dim"]) == ("uncond" not in variant)
    assert factory is (DhariwalUNet if variant.endswith("adm") else SongUNet)
    assert arguments.get("embedding_type") == {"vp": "positional", "ve": "fourier"}.get(variant[-2:])
    assert arguments["in_channels"] == arguments["out_channels"] == 3


def test_the_wrappers_decide_network_and_outputs():
    small = {"img_resolution": 16, "img_channels": 3}
    assert edm_arguments(small | {"precond": "vp"})[0] is SongUNet
    factory, arguments, precond = edm_arguments(small | {"precond": "iddpm", "use_fp16": True, "sigma_max": 80})
    assert (factory, arguments["out_channels"], precond) == (DhariwalUNet, 6, "iddpm")
    assert set(arguments) == {"img_resolution", "in_channels", "out_channels"}


def test_config_errors_come_all_at_once():
    with pytest.raises(ConfigError) as error:
        edm_arguments({"model_type": "SongUNet", "chanel_mult": [1], "in_channels": 3, "img_resolution": 16})
    text = str(error.value)
    assert "'chanel_mult'; did you mean 'channel_mult'" in text
    assert "'in_channels'" in text
    assert "img_channels is missing" in text
    with pytest.raises(ConfigError, match="unknown key 'embedding_type'"):
        edm_arguments(TINY["adm"] | {"embedding_type": "positional"})
    with pytest.raises(ConfigError, match="sigma_data is 1.0"):
        edm_arguments(TINY["adm"] | {"sigma_data": 1.0})


def test_unknown_names():
    with pytest.raises(UnknownNameError, match="did you mean 'cifar10-32x32-uncond-vp'"):
        edm_arguments("cifar10-32x32-uncond-vpp")
    with pytest.raises(UnknownNameError, match="unknown precond 'ddpm'"):
        edm_arguments(TINY["adm"] | {"precond": "ddpm"})
    with pytest.raises(UnknownNameError, match="did you mean 'SongUNet'"):
        edm_arguments(TINY["adm"] | {"model_type": "SongUnet"})
