"""Compiled blocks in an eager network: the same features, nothing lost, one compilation for all that is alike."""

import pytest
import torch
from torch import nn

from diffrep import load_backbone
from diffrep.backbones.attention import AttentionBackend
from diffrep.backbones.compiled import find_regions
from diffrep.errors import ConfigError
from diffrep.testing import save_tiny

pytestmark = pytest.mark.compile
# The same graphs without code generation.
COMPILER = "aot_eager"


def pair(folder, **options):
    net, regional = (load_backbone(folder, device="cpu", compile=mode, **options) for mode in (False, "regional"))
    assert (regional.compiler, regional.compile_mode) == ("inductor", "regional")
    regional.compiler = COMPILER
    del regional.regions  # which were found for the other compiler
    return net, regional


def arguments(net, batch=3):
    generator = torch.Generator().manual_seed(0)
    side = 16 if type(net).__name__ == "Flux" else net.sample_size
    rows = {
        name: torch.randn(batch, *row.shape[1:], generator=generator)
        for name, row in net.conditioner.example().items()
        if row.is_floating_point()
    }
    x = torch.randn(batch, net.in_channels, side, side, generator=generator)
    return x, net.schedule.level("sigma=0.7").time, rows or None


def graphs():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.parametrize(
    ("kind", "inside"),
    [
        ("unet2d-condition", ["mid_block.resnets.0.conv2", "down_blocks.0.attentions.0:input"]),
        ("sit", ["blocks.1:adaln", "blocks.0.attn:q", "blocks.2.mlp"]),
        ("flux", ["single_transformer_blocks.0:adaln", "transformer_blocks.1.attn:k"]),
        ("adm", ["middle_block.1", "output_blocks.1:input", "input_blocks.1.0.in_layers.2"]),
    ],
)
def test_regional_features_are_the_eager_ones(folder_of, kind, inside):
    net, regional = pair(folder_of(kind))
    x, time, cond = arguments(net)
    # Of one network all sets of layers, since compilation takes seconds.
    for layers in (net.blocks(), inside) if kind == "sit" else ([*inside, net.blocks()[2]],):
        found, expected = (one.capture(x, time, layers, cond=cond) for one in (regional, net))
        assert list(found) == list(expected)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert not any("forward" in vars(module) for module in regional.network.modules()), "it is as it was"
    torch.testing.assert_close(regional.denoise(x, time, cond), net.denoise(x, time, cond))


def test_one_compilation_serves_blocks_and_layers_and_batches(folder_of):
    net, regional = pair(folder_of("sit"))
    x, time, cond = arguments(net, 8)
    before = graphs()
    for layers in (["blocks.2"], ["blocks.0", "blocks.1"], ["blocks.2:input"], ["blocks.1.attn:q", "blocks.2"]):
        for batch in (8, 5, 2):
            rows = cond and {name: row[:batch] for name, row in cond.items()}
            found, expected = (one.capture(x[:batch], time, layers, cond=rows) for one in (regional, net))
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert graphs() == before + 1
    assert len({id(region.function) for region in regional.regions.values()}) == 1


def test_a_pass_ends_after_the_deepest_layer(folder_of):
    _, regional = pair(folder_of("sit"))
    x, time, cond = arguments(regional)
    regional.capture(x, time, ["blocks.1"], cond=cond)  # a dry run would run hooks too
    ran = []
    with regional.network.blocks[1].register_forward_pre_hook(lambda *_: ran.append(1)):
        regional.capture(x, time, ["blocks.0"], cond=cond)
        assert not ran
        regional.capture(x, time, ["blocks.1"], cond=cond)
        assert ran == [1]


def test_regional_blocks_run_the_chosen_attention_kernel(folder_of):
    net, regional = pair(folder_of("sit"))
    x, time, cond = arguments(net)
    regional.attention = AttentionBackend("flash")
    found, expected = (one.capture(x, time, ["blocks.1", "blocks.2"], cond=cond) for one in (regional, net))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    maps = [one.capture(x, time, ["blocks.1.attn:attention"], cond=cond, tokens=True) for one in (regional, net)]
    torch.testing.assert_close(*maps)


def test_regional_generated_code_equals_eager(folder_of):
    net, regional = (load_backbone(folder_of("sit"), device="cpu", compile=mode) for mode in (False, "regional"))
    x, time, cond = arguments(net)
    found, expected = (one.capture(x, time, net.blocks(), cond=cond) for one in (regional, net))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


class Inner(nn.Module):
    def __init__(self, width, scale):
        super().__init__()
        self.line, self.scale = nn.Linear(width, width), scale

    def forward(self, x):
        return self.line(x) * self.scale


class Outer(nn.Module):
    def __init__(self, width, scale=1.0):
        super().__init__()
        self.inner = Inner(width, scale)

    def forward(self, x):
        return x + self.inner(x)


def test_what_counts_as_a_repeated_block():
    net = nn.Module()
    net.same = nn.ModuleList([Outer(4), Outer(4)])
    net.pair = nn.ModuleDict({"wide": Outer(8), "strong": Outer(4, scale=2.0)})
    net.lines = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    net.own = Outer(4)
    net.own.forward = lambda x: x
    found = find_regions(net, COMPILER)
    assert list(found) == ["same.0", "same.1", "own.inner"], "alike in class, settings and shapes; the outermost"
    assert found["same.0"].function is found["same.1"].function
    assert found["same.0"].function is not found["own.inner"].function


def test_a_network_without_repeated_blocks_is_refused(tmp_path):
    folder = save_tiny("edm", tmp_path)
    with pytest.raises(ConfigError, match="compile=regional would change nothing: no block of .* occurs twice"):
        load_backbone(folder, device="cpu", compile="regional")


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["unet2d-condition", "sit", "flux"])
def test_regional_features_on_a_gpu(folder_of, kind, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    options = {"device": "cuda", "dtype": "float32"}
    net, regional = (load_backbone(folder_of(kind), compile=mode, **options) for mode in (False, "regional"))
    x, time, cond = arguments(net)
    for batch in (3, 2):
        rows = cond and {name: row[:batch] for name, row in cond.items()}
        found, expected = (one.capture(x[:batch], time, net.blocks(), cond=rows) for one in (regional, net))
        torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)
