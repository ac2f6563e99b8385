"""Attention kernels: the right numbers or a refusal with the reason, and half precision that overflows."""

import sys
import types

import diffusers
import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from diffrep import Backbone, FeatureRequest, load_backbone
from diffrep.backbones.attention import AttentionBackend, choose_attention, count_attention
from diffrep.errors import BackendUnavailable, ConfigError, DiffrepError, UnknownNameError
from diffrep.noise import FlowSchedule
from diffrep.taps import to_meta
from diffrep.testing import KINDS, save_tiny

CPU = torch.device("cpu")
SOME = ("unet2d-condition", "pixart", "sd3", "flux", "sana", "adm", "edm", "sit")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("tiny")
    return {kind: save_tiny(kind, root / kind) for kind in KINDS}


@pytest.fixture
def xformers(monkeypatch):
    """A stand-in for a package whose kernels need a GPU: its layouts and its demands, the sum written out.

    Returns the shapes of the queries and biases that it was called with.
    """
    calls = []

    def memory_efficient_attention(query, key, value, attn_bias=None, p=0.0, scale=None):
        batch, queries, heads, width = query.shape
        assert key.shape == (batch, key.shape[1], heads, width) and value.shape[:3] == key.shape[:3]
        assert p == 0
        assert query.stride(-1) == key.stride(-1) == value.stride(-1) == 1
        scores = torch.einsum("bqhd,bkhd->bhqk", query, key) * (width**-0.5 if scale is None else scale)
        if attn_bias is not None:
            assert attn_bias.shape == (batch, heads, queries, key.shape[1])
            assert attn_bias.dtype == query.dtype and attn_bias.stride(-1) == 1
            aligned = 128 // torch.finfo(attn_bias.dtype).bits
            assert all(step % aligned == 0 for step in attn_bias.stride()[:-1])
            scores = scores + attn_bias
        calls.append((tuple(query.shape), None if attn_bias is None else tuple(attn_bias.shape)))
        return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), value)

    package, ops = types.ModuleType("xformers"), types.ModuleType("xformers.ops")
    package.ops, ops.memory_efficient_attention = ops, memory_efficient_attention
    monkeypatch.setitem(sys.modules, "xformers", package)
    monkeypatch.setitem(sys.modules, "xformers.ops", ops)
    return calls


def tensors(*shape, count=3, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, generator=generator).to(dtype) for _ in range(count)]


def inputs(net, batch=2, tokens=6):
    """Network input, time and condition: rows that differ, and a mask where the family takes one."""
    side = 16 if type(net).__name__ == "Flux" else net.sample_size
    (x,) = tensors(batch, net.in_channels, side, side, count=1)
    cond = {}
    for name, row in net.conditioner.example().items():
        if name == "labels":
            return x, net.schedule.level("sigma=0.7").time, None if row.is_floating_point() else [1, 2][:batch]
        shape = (tokens, *row.shape[2:]) if row.ndim == 3 else row.shape[1:]
        (cond[name],) = tensors(batch, *shape, count=1)
    if "prompt_attention_mask" in getattr(net.conditioner, "shapes", {}):
        cond["prompt_attention_mask"] = torch.arange(tokens) < torch.tensor([[3], [5]])[:batch]
    return x, net.schedule.level("sigma=0.7").time, cond or None


def answers(net):
    x, time, cond = inputs(net)
    return net.capture(x, time, ["blocks"], cond) | {"out": net.denoise(x, time, cond)}


# The choice


def test_the_choice_of_torch():
    for name in ("auto", "sdpa"):
        assert choose_attention(name, CPU, torch.float32) is None


def test_unknown_names(folders):
    with pytest.raises(UnknownNameError, match="unknown attention backend 'xformer'; did you mean 'xformers'"):
        choose_attention("xformer", CPU, torch.float32)
    with pytest.raises(UnknownNameError, match="did you mean 'flash'"):
        load_backbone(folders["sit"], device="cpu", attention="flesh")


def test_xformers_that_is_not_there(folders, monkeypatch):
    monkeypatch.setitem(sys.modules, "xformers", None)
    monkeypatch.setitem(sys.modules, "xformers.ops", None)
    with pytest.raises(
        BackendUnavailable, match=r"cannot be imported \(.*\); pip install 'diffrep\[xformers\]', or use"
    ):
        load_backbone(folders["sit"], device="cpu", attention="xformers")


def test_xformers_without_a_gpu(folders, xformers):
    with pytest.raises(BackendUnavailable, match="needs a GPU and the network is on cpu; use attention=sdpa"):
        load_backbone(folders["sit"], device="cpu", attention="xformers")


def test_kernels_that_fail_in_the_first_call(xformers, monkeypatch):
    def fails(*_, **__):
        raise NotImplementedError(
            "No operator found for `memory_efficient_attention_forward`\n   device=cpu\n  is bad"
        )

    sys.modules["xformers.ops"].memory_efficient_attention = fails
    monkeypatch.setattr("diffrep.backbones.attention._need_xformers", lambda device: None)
    with pytest.raises(BackendUnavailable) as error:
        choose_attention("xformers", CPU, torch.float16)
    assert str(error.value) == (
        "attention=xformers cannot run on cpu in float16: No operator found for `memory_efficient_attention_forward` "
        "device=cpu is bad; use attention=sdpa"
    )
    query, key, value = tensors(1, 2, 4, 8)
    with (
        pytest.raises(BackendUnavailable, match="xformers does not take this network's attention: No operator found"),
        AttentionBackend("xformers"),
    ):
        scaled_dot_product_attention(query, key, value)


def test_a_network_without_softmax_attention(tmp_path):
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2, "add_attention": False}
    sizes = {"sample_size": 16, "in_channels": 1, "out_channels": 1, "block_out_channels": (8, 16)}
    diffusers.UNet2DModel(**sizes, **blocks, norm_num_groups=4).save_pretrained(tmp_path / "unet")
    diffusers.DDPMScheduler().save_pretrained(tmp_path / "scheduler")
    load_backbone(tmp_path, device="cpu", attention="sdpa")
    with pytest.raises(BackendUnavailable, match="flash would change nothing: UNet2DModel ran no softmax attention"):
        load_backbone(tmp_path, device="cpu", attention="flash")


@pytest.mark.parametrize("kind", KINDS)
def test_every_attention_is_counted(folders, kind):
    net = load_backbone(folders[kind], device="cpu")
    example = net._example(net.sample_size, net.sample_size)
    counted = count_attention(to_meta(net.network), lambda network: net.call(network, *example))
    modules = [module for module in net.network.modules() if hasattr(module, "to_q") or hasattr(module, "qkv")]
    # Sana attends to the image linearly, to the text by softmax.
    assert counted == len(modules) / (2 if kind == "sana" else 1) > 0


# Flash


@pytest.mark.parametrize("kind", SOME)
def test_flash_gives_the_same_features(folders, kind):
    expected = answers(load_backbone(folders[kind], device="cpu", attention="sdpa"))
    found = answers(load_backbone(folders[kind], device="cpu", attention="flash"))
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, atol=2e-5, rtol=1e-4, msg=lambda text, name=name: f"{name} {text}"
        )


def test_flash_in_half_precision(folders):
    expected = answers(load_backbone(folders["sd3"], device="cpu"))["out"]
    found = answers(load_backbone(folders["sd3"], device="cpu", dtype="bfloat16", attention="flash"))["out"]
    assert found.dtype == torch.bfloat16
    assert (found.float() - expected).norm() < 0.05 * expected.norm()


class Uneven(nn.Module):
    """Its values are narrower than its queries, which no flash kernel takes."""

    def __init__(self):
        super().__init__()
        self.project = nn.Conv2d(3, 8, 1)

    def forward(self, x, time):
        tokens = self.project(x).flatten(2).transpose(1, 2)[:, None]
        out = scaled_dot_product_attention(tokens, tokens, tokens[..., :3])
        return out[:, 0].transpose(1, 2).unflatten(2, x.shape[-2:])


@pytest.mark.filterwarnings("ignore:Flash attention")
def test_what_flash_cannot_take_is_refused_with_the_reason():
    net = Backbone.from_module(Uneven(), FlowSchedule(), in_channels=3, sample_size=8)
    (x,) = tensors(1, 3, 8, 8, count=1)
    expected = net.denoise(x, 0.5)
    net.attention = choose_attention("flash", CPU, torch.float32)
    with pytest.raises(
        BackendUnavailable, match="attention=flash does not take this network's attention: No available"
    ):
        net.denoise(x, 0.5)
    net.attention = None
    assert torch.equal(net.denoise(x, 0.5), expected)  # nothing is left switched on


def test_other_errors_pass_through():
    with pytest.raises(RuntimeError, match="mine"), AttentionBackend("flash"):
        raise RuntimeError("mine")


# xformers


@pytest.mark.parametrize("shape", [(2, 3, 5, 8), (2, 5, 8)])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_xformers_gets_its_own_layout(xformers, shape, scale):
    query, _, _ = tensors(*shape)
    _, key, value = tensors(*shape[:-2], 7, shape[-1])
    with AttentionBackend("xformers"):
        found = scaled_dot_product_attention(query, key, value, scale=scale)
    torch.testing.assert_close(found, scaled_dot_product_attention(query, key, value, scale=scale))
    assert xformers == [((2, 5, 3 if len(shape) == 4 else 1, 8), None)]


def mask_of(*shape):
    """A boolean mask that leaves every row at least one key."""
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(2)) > 0.4
    mask[..., 0] = True
    return mask


MASKS = {
    "whole": mask_of(2, 3, 5, 7),
    "of keys": mask_of(2, 1, 1, 7),
    "of queries and keys": mask_of(5, 7),
    "of queries": mask_of(2, 3, 5, 1),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("mask", MASKS)
def test_xformers_masks(xformers, mask, added, dtype):
    query, _, _ = tensors(2, 3, 5, 8, dtype=dtype)
    _, key, value = tensors(2, 3, 7, 8, dtype=dtype)
    mask = MASKS[mask]
    if added:
        mask = torch.where(mask, 0.5, -3.0).to(dtype)
    with AttentionBackend("xformers"):
        found = scaled_dot_product_attention(query, key, value, attn_mask=mask)
    near = {torch.float32: 1e-6, torch.bfloat16: 2e-2}[dtype]
    expected = scaled_dot_product_attention(query, key, value, attn_mask=mask)
    torch.testing.assert_close(found, expected, atol=near, rtol=near)
    assert xformers[0][1] == (2, 3, 5, 7)


def test_xformers_masks_of_attention_without_heads(xformers):
    query, key, value = tensors(2, 5, 8)
    mask = mask_of(2, 1, 5)
    with AttentionBackend("xformers"):
        found = scaled_dot_product_attention(query, key, value, attn_mask=mask)
    torch.testing.assert_close(found, scaled_dot_product_attention(query, key, value, attn_mask=mask))


@pytest.mark.parametrize("options", [{"is_causal": True}, {"dropout_p": 0.1}, {"enable_gqa": True}])
def test_attention_that_xformers_has_no_form_for(xformers, options):
    query, key, value = tensors(1, 2, 4, 8)
    with pytest.raises(ConfigError, match="use attention=sdpa"), AttentionBackend("xformers"):
        scaled_dot_product_attention(query, key, value, **options)
    with pytest.raises(ConfigError, match="use attention=sdpa"), AttentionBackend("xformers"):
        scaled_dot_product_attention(query[None], key[None], value[None])
    assert not xformers


@pytest.mark.parametrize("kind", SOME)
def test_xformers_gives_the_same_features(folders, xformers, kind):
    net = load_backbone(folders[kind], device="cpu")
    x, time, cond = inputs(net)
    expected = answers(net)
    net.attention = AttentionBackend("xformers")
    found = answers(net)
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, atol=2e-5, rtol=1e-4, msg=lambda text, name=name: f"{name} {text}"
        )
    xformers.clear()
    net.denoise(x, time, cond)
    modules = [module for module in net.network.modules() if hasattr(module, "to_q") or hasattr(module, "qkv")]
    assert len(xformers) == len(modules) // (2 if kind == "sana" else 1)
    masked = {"pixart": len(modules) // 2, "sana": len(modules) // 2}.get(kind, 0)
    assert sum(bias is not None for _, bias in xformers) == masked


def test_maps_of_attention_under_another_kernel(folders, xformers):
    net = load_backbone(folders["unet2d-condition"], device="cpu")
    names = [f"{path}:attention" for path, module in net.network.named_modules() if hasattr(module, "to_q")]
    x, time, cond = inputs(net)
    expected = net.capture(x, time, names, cond, tokens=True)
    net.attention = AttentionBackend("xformers")
    found = net.capture(x, time, names, cond, tokens=True)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.compile
@pytest.mark.parametrize("name", ["flash", "xformers"])
def test_compiled_features_use_the_kernel(folders, xformers, name):
    net = load_backbone(folders["sit"], device="cpu", compile=True)
    net.compiler = "aot_eager"
    x, time, cond = inputs(net)
    expected = net.capture(x, time, ["blocks.1"], cond)["blocks.1"]
    net._functions.clear()
    net.attention = AttentionBackend(name)
    found = net.capture(x, time, ["blocks.1"], cond)["blocks.1"]
    assert bool(xformers) == (name == "xformers")
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("kind", SOME)
def test_the_real_xformers(folders, kind, dtype):
    pytest.importorskip("xformers.ops")
    expected = answers(load_backbone(folders[kind], device="cuda", dtype="float32"))
    found = answers(load_backbone(folders[kind], device="cuda", dtype=dtype, attention="xformers"))
    near = 1e-3 if dtype == "float32" else 0.1
    for name, value in expected.items():
        assert (found[name].float() - value).norm() < near * value.norm(), name


# Overflow


def test_half_precision_that_overflows_is_named(tmp_path):
    folder = save_tiny("unet2d-condition", tmp_path)
    network = diffusers.UNet2DConditionModel.from_pretrained(folder / "unet")
    network.up_blocks[0].resnets[0].conv2.weight.data *= 1e5
    network.save_pretrained(folder / "unet")
    images, cond = torch.rand(2, 3, 16, 16), torch.zeros(5, 12)
    layers = ["down_blocks.0", "up_blocks.0"]
    half = load_backbone(folder, device="cpu", dtype="float16")
    near = half.extract(images, FeatureRequest("down_blocks.0", [261], dtype="float32"), cond=cond)
    assert near["down_blocks.0", 261].isfinite().all()
    full = load_backbone(folder, device="cpu")
    for net, dtype in ((half, "float32"), (half, "float16"), (full, "float16")):
        with pytest.raises(DiffrepError) as error:
            net.extract(images, FeatureRequest(layers, [261], dtype=dtype), ids=["a", "b"], cond=cond)
        assert str(error.value).startswith("features of up_blocks.0@t=261 are not finite for 2 images, first 'a'")
        assert "try dtype float32 for request and backbone" in str(error.value)
    found = full.extract(images, FeatureRequest(layers, [261], dtype="float32"), cond=cond)["up_blocks.0", 261]
    assert found.abs().max() > 65504


def test_tiny_networks_stay_finite_in_half_precision(folders):
    net = load_backbone(folders["sd3"], device="cpu", dtype="float16")
    assert answers(net)["out"].dtype == torch.float16
    assert answers(net)["out"].isfinite().all()
