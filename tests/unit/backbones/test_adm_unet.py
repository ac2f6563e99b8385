import copy

import pytest
import torch

from diffrep.backbones.adm import ADM_VARIANTS, ADMUNet, adm_arguments, adm_noise_schedule
from diffrep.backbones.adm_layers import AttentionBlock
from diffrep.backbones.timestep import timestep_embedding
from diffrep.errors import ConfigError, UnknownNameError
from diffrep.testing import TINY_OFFICIAL

TINY = TINY_OFFICIAL["adm"]


def redraw(module):
    """Random parameters everywhere: the published start has zeros, which hide half of the network."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            gain = 1.0 if parameter.ndim == 1 and name.endswith("weight") else 0.0
            parameter.copy_(gain + 0.1 * torch.randn(parameter.shape, generator=generator))
    return module.eval()


def tiny(**changes):
    return redraw(ADMUNet(**{**TINY, **changes}))


def example(side=16):
    x = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1))
    return x, torch.tensor([3, 700])


def explicit_attention(block, x):
    """The published arithmetic, head by head: softmax(q k / sqrt(width)) v in an explicit matrix."""
    batch, channels, height, width = x.shape
    qkv = block.qkv(block.norm(x.flatten(2)))
    size = channels // block.num_heads
    mixed = []
    for head in range(block.num_heads):
        if block.use_new_attention_order:
            starts = [part * channels + head * size for part in range(3)]
        else:
            starts = [(3 * head + part) * size for part in range(3)]
        q, k, v = (qkv[:, start : start + size] for start in starts)
        weights = torch.softmax(torch.einsum("bct,bcs->bts", q, k) / size**0.5, dim=-1)
        mixed.append(torch.einsum("bts,bcs->bct", weights, v))
    return x + block.proj_out(torch.cat(mixed, dim=1)).reshape(batch, channels, height, width)


@pytest.mark.parametrize("new_order", [False, True])
@pytest.mark.parametrize(("heads", "head_channels"), [(4, -1), (1, -1), (1, 8)])
def test_attention_is_the_explicit_softmax(new_order, heads, head_channels):
    block = redraw(AttentionBlock(32, heads, head_channels, new_order))
    x = torch.randn(2, 32, 4, 6, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(block(x), explicit_attention(block, x), atol=1e-5, rtol=0)


def test_the_two_attention_orders_differ():
    legacy, new = (redraw(AttentionBlock(32, 4, -1, order)) for order in (False, True))
    x = torch.randn(1, 32, 4, 4, generator=torch.Generator().manual_seed(1))
    assert (legacy(x) - new(x)).abs().max() > 1e-2


@pytest.mark.parametrize("new_order", [False, True])
def test_split_qkv_puts_heads_one_after_the_other(new_order):
    block = AttentionBlock(64, 2, -1, new_order)
    rows = torch.arange(192.0)[None, :, None].expand(1, 192, 5)
    q, k, v = block.split_qkv(rows)
    assert q.shape == k.shape == v.shape == (1, 5, 64)
    first, second = torch.arange(32.0), torch.arange(32.0) + (32 if new_order else 96)
    step = 64 if new_order else 32
    for index, part in enumerate((q, k, v)):
        assert torch.equal(part[0, 0], torch.cat([first, second]) + index * step)


def test_timestep_embedding_has_cosines_first_and_takes_fractions():
    found = timestep_embedding(torch.tensor([0.0, 2.5]), 8)
    assert torch.equal(found[0], torch.tensor([1.0] * 4 + [0.0] * 4))
    angles = 2.5 * torch.tensor([1.0, 0.1, 0.01, 0.001])
    torch.testing.assert_close(found[1], torch.cat([angles.cos(), angles.sin()]))


def test_weights_start_as_published():
    network = ADMUNet(**TINY).eval()
    assert torch.count_nonzero(network(*example())) == 0
    assert torch.count_nonzero(network.middle_block[0].out_layers[3].weight) == 0
    assert torch.count_nonzero(network.middle_block[1].proj_out.weight) == 0


@pytest.mark.parametrize("scale_shift", [False, True])
@pytest.mark.parametrize(
    ("sampler", "down", "up"),
    [
        (
            {"resblock_updown": True},
            {"in_layers", "emb_layers", "out_layers"},
            {"in_layers", "emb_layers", "out_layers"},
        ),
        ({"resblock_updown": False}, {"op"}, {"conv"}),
        ({"resblock_updown": False, "conv_resample": False}, set(), set()),
    ],
    ids=["resblock", "conv", "plain"],
)
def test_samplers_run_and_have_the_published_keys(sampler, down, up, scale_shift):
    network = tiny(**sampler, use_scale_shift_norm=scale_shift)
    keys = network.state_dict().keys()
    for place, expected in (("input_blocks.2.0.", down), ("output_blocks.1.2.", up)):
        assert {key.removeprefix(place).split(".")[0] for key in keys if key.startswith(place)} == expected
    rows = network.state_dict()["middle_block.0.emb_layers.1.weight"].shape[0]
    assert rows == (128 if scale_shift else 64)
    out = network(*example())
    assert out.shape == (2, 6, 16, 16)
    assert torch.isfinite(out).all()
    with torch.no_grad():
        network.time_embed[2].bias.add_(1)
    assert not torch.equal(out, network(*example()))


def test_without_scale_shift_the_embedding_is_added_before_the_norm():
    block = tiny(use_scale_shift_norm=False).input_blocks[1][0]
    x, emb = torch.randn(2, 32, 4, 4), torch.randn(2, 128)
    norm, *rest = block.out_layers
    h = norm(block.in_layers(x) + block.emb_layers(emb)[:, :, None, None])
    for layer in rest:
        h = layer(h)
    assert torch.equal(block(x, emb), x + h)


def test_heads_on_the_way_up():
    network = tiny(num_head_channels=-1, num_heads=2, num_heads_upsample=8)
    assert (network.input_blocks[3][1].num_heads, network.middle_block[1].num_heads) == (2, 2)
    assert network.output_blocks[0][1].num_heads == 8


def test_labels_change_the_output():
    network = tiny(num_classes=4)
    x, t = example()
    first, second = network(x, t, torch.tensor([0, 1])), network(x, t, torch.tensor([0, 2]))
    assert torch.equal(first[0], second[0])
    assert not torch.equal(first[1], second[1])


@pytest.mark.parametrize(
    ("name", "millions", "inputs"),
    [("64", 295.9, 16), ("128", 421.5, 15), ("256", 553.8, 18), ("256-uncond", 552.8, 18), ("512", 559.0, 21)],
)
def test_published_variants_on_the_meta_device(name, millions, inputs):
    arguments = adm_arguments(name)
    with torch.device("meta"):
        network = ADMUNet(**arguments)
    assert round(sum(parameter.numel() for parameter in network.parameters()) / 1e6, 1) == millions
    assert len(network.input_blocks) == len(network.output_blocks) == inputs
    assert network.num_classes == (None if name == "256-uncond" else 1000)
    assert adm_noise_schedule(name) == ("cosine" if name == "64" else "linear")
    assert network.middle_block[1].use_new_attention_order == (name == "64")
    assert network.middle_block[1].num_heads == (4 if name == "128" else 1024 // 64 if name != "64" else 768 // 64)


def test_blocks_of_the_256_pixel_model():
    with torch.device("meta"):
        network = ADMUNet(**adm_arguments("256-uncond"))
    shapes = {}
    for name in ("input_blocks", "output_blocks"):
        for index, block in enumerate(getattr(network, name)):
            block.register_forward_hook(
                lambda _, __, out, at=(name, index): shapes.update({at: tuple(out.shape[1:3])})
            )
    network(torch.zeros(1, 3, 256, 256, device="meta"), torch.zeros(1, dtype=torch.int64, device="meta"))
    sides = [8] * 2 + [16] * 3 + [32] * 3 + [64] * 3 + [128] * 3 + [256] * 4
    widths = [1024] * 6 + [512] * 6 + [256] * 6
    assert [shapes["output_blocks", i] for i in range(18)] == list(zip(widths, sides, strict=True))
    sides = [256] * 3 + [128] * 3 + [64] * 3 + [32] * 3 + [16] * 3 + [8] * 3
    widths = [256] * 7 + [512] * 6 + [1024] * 5
    assert [shapes["input_blocks", i] for i in range(18)] == list(zip(widths, sides, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_close(dtype):
    network = tiny(num_classes=4)
    x, t = example()
    y = torch.tensor([0, 3])
    expected = network(x, t, y)
    half = copy.deepcopy(network).to(dtype)
    seen = []
    half.middle_block[0].in_layers[0].register_forward_hook(lambda _, args, out: seen.extend([args[0], out]))
    found = half(x, t, y)
    assert found.dtype == dtype
    assert {tensor.dtype for tensor in seen} == {dtype}
    error = (found.float() - expected).norm() / expected.norm()
    assert 0 < error < (0.05 if dtype == torch.bfloat16 else 0.01)


def test_half_precision_norms_in_fp32():
    norm = tiny().to(torch.bfloat16).middle_block[0].in_layers[0]
    # A mean far above the spread is lost when the statistics themselves are taken in half precision.
    x = (100 + torch.randn(1, 64, 8, 8, generator=torch.Generator().manual_seed(1))).to(torch.bfloat16)
    expected = torch.nn.functional.group_norm(x.float(), 32, norm.weight.float(), norm.bias.float(), norm.eps)
    assert torch.equal(norm(x), expected.to(torch.bfloat16))


@pytest.mark.compile
def test_compiled_whole_equals_eager():
    network = tiny(num_classes=4)
    x, t = example()
    y = torch.tensor([0, 3])
    # Breaks and guards are the tracer's matter; generating C++ for the graph would take a minute and test torch.
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x, t, y), network(x, t, y), atol=1e-5, rtol=1e-5)


def test_hooks_fire_once_and_gradients_reach_the_input_of_a_frozen_network():
    network = tiny().requires_grad_(False)
    fired = []
    network.middle_block[1].qkv.register_forward_hook(lambda *_: fired.append(1))
    x, t = example()
    x.requires_grad_()
    network(x, t).sum().backward()
    assert len(fired) == 1
    assert x.grad.abs().sum() > 0


def test_inputs_that_do_not_fit_are_refused():
    x, t = example(15)
    with pytest.raises(ConfigError, match="multiples of 2, got 15 x 15"):
        tiny()(x, t)
    with pytest.raises(ConfigError, match="class-conditional; give y, labels from 0 to 3"):
        tiny(num_classes=4)(*example())
    with pytest.raises(ConfigError, match="unconditional; leave y out"):
        tiny()(*example(), torch.tensor([0, 1]))


def test_widths_that_do_not_fit_are_refused():
    with pytest.raises(ConfigError, match=r"multiples of 32, got \[48, 96\]"):
        ADMUNet(**{**TINY, "model_channels": 48})
    with pytest.raises(ConfigError, match="over 64 channels: num_heads=1, num_head_channels=48"):
        ADMUNet(**{**TINY, "num_head_channels": 48})


def test_the_two_vocabularies_name_one_network():
    flags = {
        "image_size": 64,
        "num_channels": 32,
        "num_res_blocks": 1,
        "channel_mult": "1,2",
        "attention_resolutions": "32",
        "num_head_channels": 16,
        "learn_sigma": True,
        "class_cond": True,
        "resblock_updown": True,
        "noise_schedule": "cosine",
        "diffusion_steps": 1000,
        "timestep_respacing": "250",
        "use_fp16": True,
    }
    found = adm_arguments(flags)
    assert found["attention_resolutions"] == (2,)
    assert (found["out_channels"], found["num_classes"], found["num_heads"]) == (6, 1000, 4)
    own = adm_arguments({**TINY, "image_size": 64, "num_classes": 1000, "use_fp16": True, "dims": 2})
    assert ADMUNet(**found).state_dict().keys() == ADMUNet(**own).state_dict().keys()
    assert "use_fp16" not in own
    assert (adm_noise_schedule(flags), adm_noise_schedule(TINY)) == ("cosine", "linear")


def test_defaults_are_those_of_each_vocabulary():
    assert adm_arguments({"image_size": 512, "num_channels": 64})["channel_mult"] == (0.5, 1, 1, 2, 2, 4, 4)
    assert adm_arguments({"image_size": 64, "class_cond": False})["attention_resolutions"] == (4, 8)
    assert "num_heads" not in adm_arguments(TINY)
    assert adm_arguments({**TINY, "attention_resolutions": []})["attention_resolutions"] == ()


def test_unknown_variants_have_suggestions():
    for read in (adm_arguments, adm_noise_schedule):
        with pytest.raises(UnknownNameError, match="unknown ADM variant '256-uncod'; did you mean '256-uncond'"):
            read("256-uncod")
    assert set(ADM_VARIANTS) == {"64", "128", "256", "256-uncond", "512"}


def test_all_wrong_keys_are_named_at_once():
    wrong = {key: value for key, value in TINY.items() if key != "in_channels"}
    with pytest.raises(ConfigError) as caught:
        adm_arguments({**wrong, "num_head_chanels": 8, "dropuot": 0})
    text = str(caught.value)
    assert "'num_head_chanels'; did you mean 'num_head_channels'" in text
    assert "'dropuot'; did you mean 'dropout'" in text
    assert "in_channels is missing" in text


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({**TINY, "num_channels": 32}, "num_channels to create_model_and_diffusion; keep to one"),
        ({"image_size": 64, "dropout": 0.0}, "give model_channels"),
        ({"num_channels": 32}, "image_size is missing"),
        ({"image_size": "64", "num_channels": 32}, "whole number of pixels, got '64'"),
        ({"image_size": 32, "num_channels": 32}, "image_size 32 has no default channel_mult, only 64, 128, 256, 512"),
        ({"image_size": 64, "num_channels": 32, "attention_resolutions": "16;8"}, "got '16;8'"),
        ({"image_size": 64, "num_channels": 32, "channel_mult": [1, 0]}, r"got \[1, 0\]"),
        ({**TINY, "dims": 3}, "dims is 3"),
    ],
)
def test_configs_that_cannot_be_read(config, message):
    with pytest.raises(ConfigError, match=message):
        adm_arguments(config)


def test_schedules_without_a_name_are_refused():
    with pytest.raises(UnknownNameError, match="did you mean 'cosine'"):
        adm_noise_schedule({"image_size": 64, "noise_schedule": "cosin"})
    with pytest.raises(ConfigError, match="diffusion_steps is 4000"):
        adm_noise_schedule({"image_size": 64, "diffusion_steps": 4000})
