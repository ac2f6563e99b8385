"""Networks that diffrep knows nothing of: the docstring's, one of tokens, one with labels, and timm's ViT."""

import doctest

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

import diffrep.backbones.module as module
from diffrep import Backbone, FeatureRequest
from diffrep.backbones.codec import VAECodec
from diffrep.backbones.conditioning import ClassLabels
from diffrep.errors import ConfigError, LayerError, UnknownNameError
from diffrep.noise import DiscreteSchedule, FlowSchedule, SigmaSchedule
from diffrep.testing import save_tiny


def images(channels=3, side=32, batch=2):
    return torch.rand(batch, channels, side, side, generator=torch.Generator().manual_seed(0))


class Patches(nn.Module):
    """A transformer on patches with a class token in front when asked for, and tokens (B, N, C) throughout."""

    def __init__(self, side=32, patch=8, width=16, classes=0, first=False):
        super().__init__()
        self.patch = patch
        self.embed = nn.Conv2d(3, width, patch, stride=patch)
        self.places = nn.Parameter(torch.randn(1, (side // patch) ** 2, width))
        self.first = nn.Parameter(torch.randn(1, 1, width)) if first else None
        self.labels = nn.Embedding(classes, width) if classes else None
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(width, 2, 32, 0.0, batch_first=True) for _ in range(3))
        self.out = nn.Linear(width, 3 * patch**2)

    def forward(self, x, time, labels=None):
        tokens = self.embed(x).flatten(2).transpose(1, 2) + self.places + time[:, None, None]
        if labels is not None:
            tokens = tokens + self.labels(labels)[:, None]
        if self.first is not None:
            tokens = torch.cat([self.first.expand(len(x), -1, -1), tokens], dim=1)
        for block in self.blocks:
            tokens = block(tokens)
        tokens = self.out(tokens[:, self.first is not None :])
        return F.fold(tokens.transpose(1, 2), x.shape[-2:], self.patch, stride=self.patch)


def wrap(network, **options):
    options = {"in_channels": 3, "sample_size": 32, "patch_size": 8} | options
    return Backbone.from_module(network, FlowSchedule(), **options)


def test_the_example_in_the_docstring():
    found = doctest.testmod(module)
    assert found.attempted > 5
    assert found.failed == 0


def test_tokens_become_maps():
    net = wrap(Patches(), blocks=[f"blocks.{i}" for i in range(3)])
    found = net.capture(images(), 0.3, ["blocks"])
    assert {name: tuple(value.shape) for name, value in found.items()} == {
        f"blocks.{i}": (2, 16, 4, 4) for i in range(3)
    }
    tokens = net.capture(images(), 0.3, ["blocks.1"], tokens=True)["blocks.1"]
    assert torch.equal(tokens.transpose(1, 2).reshape(2, 16, 4, 4), found["blocks.1"])
    layer = next(layer for layer in net.layers() if layer.name == "blocks.1")
    assert (layer.shape, layer.stride) == ((16, 4, 4), 8)
    features = net.extract(images(), FeatureRequest("blocks", ["sigma=0.5"], pool=2))
    assert features["blocks.2", "sigma=0.5"].shape == (2, 16, 2, 2)


def test_without_a_patch_size_a_halved_grid_is_tried():
    net = wrap(Patches(), patch_size=None)  # 4 x 4 is 32 halved three times
    assert net.capture(images(), 0.3, ["blocks.0"])["blocks.0"].shape == (2, 16, 4, 4)
    three = wrap(Patches(side=30, patch=10), sample_size=30, patch_size=None)  # 3 x 3 is not
    with pytest.raises(LayerError, match=r"gives \(2, 9, 16\), which is no map .* ask for tokens=True"):
        three.capture(images(side=30), 0.3, ["blocks.0"])
    assert three.capture(images(side=30), 0.3, ["blocks.0"], tokens=True)["blocks.0"].shape == (2, 9, 16)


def test_tokens_that_are_no_grid_are_refused():
    net = wrap(Patches(first=True))
    with pytest.raises(LayerError, match=r"gives \(2, 17, 16\), which is no map"):
        net.capture(images(), 0.3, ["blocks.0"])
    assert net.capture(images(), 0.3, ["blocks.0"], tokens=True)["blocks.0"].shape == (2, 17, 16)
    assert "blocks.0" not in [layer.name for layer in net.layers()]


def test_a_call_of_its_own_with_labels():
    seen = []

    def call(network, x, time, cond):
        seen.append(tuple(cond["labels"].shape))
        return network(x, time * 10, labels=cond["labels"])

    torch.manual_seed(0)
    network = Patches(classes=5)
    net = wrap(network, call=call, conditioner=ClassLabels(5, null=4), name="mine")
    assert net.name == "mine" and net.describe()["name"] == "mine"
    x, time = images(), torch.tensor([0.1, 0.2])
    expected = network(x, time * 10, torch.tensor([1, 2]))
    assert torch.equal(net.denoise(x, time, cond=[1, 2]), expected)
    assert torch.equal(net.denoise(x, time), network(x, time * 10, torch.tensor([4, 4])))
    assert torch.equal(net.denoise(x, time, cond=3), net.denoise(x, time, cond={"labels": torch.tensor([3])}))
    assert set(seen) == {(2,)}  # one label is spread over the batch before the call
    with pytest.raises(ConfigError, match="outside 0 to 4"):
        net.denoise(x, time, cond=5)
    request = FeatureRequest("blocks.2", ["sigma=0.5"], draws=2, pool="mean", dtype="float32")
    both = net.extract(x, request, ids=["a", "b"], cond=[1, 2])["blocks.2", "sigma=0.5"]
    alone = net.extract(x[1:], request, ids=["b"], cond=2)["blocks.2", "sigma=0.5"]
    torch.testing.assert_close(both[1:], alone, atol=1e-5, rtol=1e-5)


def test_what_a_network_may_return():
    class Output:
        def __init__(self, sample):
            self.sample = sample

    x = images()
    for form in (lambda out: out, lambda out: (out, None), Output):
        net = wrap(Patches(), call=lambda network, x, time, cond, form=form: form(network(x, time)))
        assert net.denoise(x, 0.3).shape == x.shape


def test_blocks_that_do_not_exist():
    with pytest.raises(UnknownNameError, match=r"unknown block of Patches 'block.1'; did you mean 'blocks.1'"):
        wrap(Patches(), blocks=["blocks.0", "block.1"])
    with pytest.raises(UnknownNameError, match="unknown block of Patches ''"):
        wrap(Patches(), blocks=[""])


def test_blocks_are_the_children_unless_named():
    assert wrap(Patches()).blocks() == ["embed", "blocks.0", "blocks.1", "blocks.2", "out"]
    assert wrap(Patches(), blocks=("blocks.2",)).blocks() == ["blocks.2"]


def test_the_network_is_frozen_and_named_after_its_class():
    network = Patches().train()
    net = wrap(network)
    assert not network.training and not any(p.requires_grad for p in network.parameters())
    assert net.name == "Patches"


def test_a_codec_of_another_width_is_refused():
    from diffusers import AutoencoderTiny

    with pytest.raises(ConfigError, match="codec gives 4 channels, the network takes 3"):
        wrap(Patches(), codec=VAECodec(AutoencoderTiny()))


@pytest.mark.parametrize(
    ("schedule", "level"), [(DiscreteSchedule.linear(), 261), (SigmaSchedule(), 0.7), (FlowSchedule(), 0.4)]
)
def test_time_comes_in_the_schedules_own_convention(schedule, level):
    seen = []

    def call(network, x, time, cond):
        if x.device.type != "meta":
            seen.append(time)
        return network(x, time)

    net = Backbone.from_module(Patches(), schedule, in_channels=3, sample_size=32, patch_size=8, call=call)
    net.extract(images(), FeatureRequest("blocks.0", [level]))
    assert len(seen) == 1 and seen[0].shape == (2,)
    assert seen[0].tolist() == pytest.approx([schedule.level(level).time] * 2)


@pytest.fixture(scope="module")
def vit():
    torch.manual_seed(0)
    network = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=16, depth=3, num_heads=2, class_token=False,
        global_pool="avg", num_classes=0,
    )  # fmt: skip
    blocks = [f"blocks.{i}" for i in range(3)]
    net = wrap(network, blocks=blocks, call=lambda network, x, time, cond: network.forward_features(x))
    return net, network


def test_timms_vit(vit):
    net, network = vit
    assert net.blocks() == ["blocks.0", "blocks.1", "blocks.2"]
    x = images()
    found = net.capture(x, 0.0, ["blocks"])
    _, expected = network.forward_intermediates(x, norm=False)
    for name, value in zip(net.blocks(), expected, strict=True):
        torch.testing.assert_close(found[name], value)


def test_points_of_timms_vit(vit):
    net, network = vit
    x = images()
    names = [f"blocks.1.attn:{point}" for point in ("q", "k", "v", "attention")]
    found = net.capture(x, 0.0, names, tokens=True)
    stream = net.capture(x, 0.0, ["blocks.0"], tokens=True)["blocks.0"]
    block = network.blocks[1]
    queries, keys, values = block.attn.qkv(block.norm1(stream)).chunk(3, dim=-1)
    for point, value in zip("qkv", (queries, keys, values), strict=True):
        torch.testing.assert_close(found[f"blocks.1.attn:{point}"], value)
    heads = [part.unflatten(-1, (2, 8)).transpose(1, 2) for part in (queries, keys)]
    weights = (heads[0] @ heads[1].transpose(-1, -2) * 8**-0.5).softmax(-1).mean(1)
    torch.testing.assert_close(found["blocks.1.attn:attention"], weights, atol=1e-5, rtol=1e-4)
    assert net.capture(x, 0.0, ["blocks.1.attn:q"])["blocks.1.attn:q"].shape == (2, 16, 4, 4)
    features = net.extract(x, FeatureRequest("blocks.1.attn:k", ["clean"], pool="mean", noise="none"))
    assert features["blocks.1.attn:k", "clean"].shape == (2, 16)


class Stubborn(nn.Module):
    """Makes a tensor where its input is not."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x, time):
        return self.conv(x + torch.ones(1, device="cpu"))


def test_a_forward_that_cannot_run_on_meta_is_explained():
    net = Backbone.from_module(Stubborn(), FlowSchedule(), in_channels=3, sample_size=8)
    with pytest.raises(ConfigError, match="does not run on the meta device.*device=x.device"):
        net.layers()


def test_a_codec_by_its_folder_and_a_network_without_parameters(tmp_path):
    vae = save_tiny("dit", tmp_path) / "vae"
    net = Backbone.from_module(nn.Identity(), FlowSchedule(), in_channels=4, sample_size=8, codec=vae)
    assert (net.image_size, net.device.type, net.dtype) == (16, "cpu", torch.float32)


def test_a_module_that_is_called_as_an_alias_is_that_module():
    network = nn.Module()
    network.gd = nn.ModuleList([nn.Conv2d(3, 3, 1) for _ in range(2)])
    net = Backbone.from_module(
        network,
        FlowSchedule(),
        in_channels=3,
        sample_size=8,
        call=lambda network, x, time, cond: network.gd[1](network.gd[0](x)),
    )
    assert list(net.addresses(["gd.1"])) == ["gd.1"]
