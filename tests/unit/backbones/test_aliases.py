"""Names from papers against plain hooks, on the tiny Stable Diffusion of the golden numbers."""

import pytest
import torch

from diffrep import load_backbone
from diffrep.backbones.codec import IdentityCodec
from diffrep.backbones.unet import CLEANDIFT, ODISE
from diffrep.errors import LayerError


@pytest.fixture(scope="module")
def net(golden):
    return load_backbone(golden / "correspondence", codec=IdentityCodec(4), device="cpu")


@pytest.fixture(scope="module")
def inputs():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 4, 16, 16, generator=generator), torch.randn(7, 32, generator=generator)


@pytest.mark.parametrize("name", CLEANDIFT)
def test_cleandift_is_a_plain_hook(net, inputs, name):
    x, prompt = inputs
    kept = []
    module = net.network.get_submodule(CLEANDIFT[name])
    handle = module.register_forward_hook(lambda _, __, out: kept.append(out[0] if isinstance(out, tuple) else out))
    net.denoise(x, 261.5, prompt)
    handle.remove()
    (found,) = net.capture(x, 261.5, [f"cleandift.{name}"], prompt).values()
    assert torch.equal(found, kept[0])


@pytest.mark.parametrize(("name", "block"), list(zip(ODISE, range(4), strict=True)))
def test_odise_is_the_stream_that_meets_the_skip(net, inputs, name, block):
    x, prompt = inputs
    alias, joined = f"odise.{name}", f"up_blocks.{block}.resnets.2:input"
    found = net.capture(x, 50, [alias, joined], prompt)
    stream = found[ODISE[name]]
    assert torch.equal(found[joined][:, : stream.shape[1]], stream)
    assert found[joined].shape[1] > stream.shape[1], "the skip comes behind it"


def test_dift_hf_and_ddae(net, inputs):
    x, prompt = inputs
    found = net.capture(x, 5, ["dift.1", "hf.2.0", "ddae.4", "dift.1:input"], prompt)
    assert list(found) == ["up_blocks.1", "up_blocks.2.resnets.0.conv2", "up_blocks.1.resnets.0", "up_blocks.1:input"]


@pytest.mark.parametrize(
    "name", ["dift.4", "dift.one", "hf.0", "hf.0.7", "gd.3", "repa.1", "cleandift.us11", "odise.s1"]
)
def test_an_alias_that_names_nothing(net, name):
    with pytest.raises(LayerError, match=f"alias '{name}' .*names no layer of UNet2DConditionModel"):
        net.addresses([name])
