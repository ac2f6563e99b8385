"""Registered names on the meta device: layers, sizes and costs of the published networks, without their weights."""

import pytest

from diffrep import list_backbones, load_backbone
from diffrep.backbones.sources import BUNDLED, registered
from diffrep.errors import ConfigError, LayerError, UnknownNameError

# Name -> parameters in millions, as published.
PARAMETERS = {
    "sd15": 859.5,
    "sdxl": 2567,
    "sd3-medium": 2028,
    "flux-dev": 11900,
    "adm-256": 552.8,
    "edm-cifar10": 55.7,
    "DiT-XL/2": 675.1,
    "SiT-XL/2": 675.1,
}
# (name, layer) -> share of the FLOPs until it has ended.
COSTS = {
    ("DiT-XL/2", "blocks.13"): (0.50, 0.005),
    ("SiT-XL/2", "blocks.13"): (0.50, 0.005),
    ("sd15", "up_blocks.1"): (0.55, 0.005),
    ("sdxl", "mid_block"): (0.43, 0.005),
    ("sdxl", "up_blocks.0"): (0.79, 0.005),
    ("sd3-medium", "transformer_blocks.11"): (0.50, 0.005),
    ("flux-dev", "transformer_blocks.18"): (0.33, 0.006),
}


@pytest.fixture(scope="module")
def opened():
    """Name -> backbone on the meta device and its layers; each is built once."""
    found = {}

    def get(name):
        if name not in found:
            net = load_backbone(name, device="meta")
            found[name] = net, net.layers()
        return found[name]

    return get


@pytest.mark.parametrize("name", list_backbones())
def test_layers_of_every_name(opened, name):
    net, layers = opened(name)
    assert all(parameter.is_meta for parameter in net.network.parameters())
    names = [layer.name for layer in layers]
    assert [layer for layer in names if layer in net.blocks()] == net.blocks()
    shares = [layer.flops_to_here for layer in layers]
    assert shares == sorted(shares)
    assert 0.99 < shares[-1] <= 1
    assert net.name == name


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters(opened, name):
    count = sum(parameter.numel() for parameter in opened(name)[0].network.parameters())
    assert count / 1e6 == pytest.approx(PARAMETERS[name], rel=1e-3)


@pytest.mark.parametrize(("name", "layer"), COSTS)
def test_what_an_early_exit_costs(opened, name, layer):
    share, tolerance = COSTS[name, layer]
    found = {layer.name: layer.flops_to_here for layer in opened(name)[1]}
    assert found[layer] == pytest.approx(share, abs=tolerance)


@pytest.mark.parametrize(
    ("name", "weights", "loading"),
    [
        ("SiT-XL/2", "SiT-XL-2-256.pt", r"load_backbone\(FILE, family='sit', config='XL/2'\)"),
        ("adm-256", "256x256_diffusion_uncond.pt", r"load_backbone\(FILE, family='adm', config='256-uncond'\)"),
        ("edm-cifar10", "edm-cifar10-32x32-uncond-vp.pkl", r"'diffrep convert', and load_backbone\(FOLDER\)"),
    ],
)
def test_names_without_weights_say_where_they_are(name, weights, loading):
    with pytest.raises(ConfigError, match=f"{name}' ships as a config.*device='meta'.*{weights}.*{loading}"):
        load_backbone(name, device="cpu")


def test_every_name_ships_weights_or_says_where_they_are():
    for name in list_backbones():
        assert name in BUNDLED or "hub" in registered()[name] or "weights" in registered()[name]


def test_a_name_that_is_close():
    with pytest.raises(UnknownNameError, match="did you mean 'adm-256'"):
        load_backbone("adm-265", device="meta")


def test_another_seed_on_the_meta_device_builds_nothing(opened):
    net = load_backbone("DiT-XL/2", device="meta", init_seed=0)
    assert all(parameter.is_meta for parameter in net.network.parameters())
    assert net.layers() == opened("DiT-XL/2")[1]


def test_the_37_blocks_of_guided_diffusion(opened):
    net, _ = opened("adm-256")
    expected = [
        *(f"input_blocks.{i}" for i in range(18)),
        "middle_block",
        *(f"output_blocks.{i}" for i in range(18)),
    ]
    assert list(net.addresses([f"gd.{i}" for i in range(1, 38)])) == expected
    assert list(net.addresses(["dift.4", "dift.11"])) == ["output_blocks.4", "output_blocks.11"]
    for name in ("gd.0", "gd.38", "dift.18", "gd.1.0", "ddae.1"):
        with pytest.raises(LayerError, match=f"alias '{name}' .*names no layer of ADMUNet"):
            net.addresses([name])


def test_aliases_of_the_published_recipes(opened):
    for name, alias, address in (
        ("DiT-XL/2", "repa.8", "blocks.7"),
        ("SiT-XL/2", "repa.8", "blocks.7"),
        ("edm-cifar10", "ddae.1", "dec.8x8_block0"),
        ("edm-cifar10", "ddae.7", "dec.16x16_block1"),
        ("edm-cifar10", "ddae.15", "dec.32x32_block4"),
    ):
        assert list(opened(name)[0].addresses([alias])) == [address]
        assert list(opened(name)[0].addresses([f"{alias}:input"])) == [f"{address}:input"]
