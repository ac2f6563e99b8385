"""Every family at tiny size, the real classes: what is captured is what a plain hook gives, by any route."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from diffrep import FeatureRequest, load_backbone
from diffrep.errors import ConfigError
from diffrep.testing import KINDS, save_tiny


@pytest.fixture(scope="module", params=[*KINDS, "diffusers-dit"])
def name(request):
    return request.param


@pytest.fixture(scope="module")
def folder(name, tmp_path_factory):
    return save_tiny(name.removeprefix("diffusers-"), tmp_path_factory.mktemp(name))


@pytest.fixture(scope="module")
def load(folder, name):
    """Opens the folder; the class of DiT in diffusers is opened as it is on request only."""
    family = name if name == "diffusers-dit" else None
    return lambda **options: load_backbone(folder, family=family, device="cpu", **options)


@pytest.fixture(scope="module")
def net(load):
    return load()


@pytest.fixture(scope="module")
def prompt(net):
    """A condition with five prompt tokens, or labels."""
    generator = torch.Generator().manual_seed(3)
    rows = {}
    for key, example in net.conditioner.example().items():
        shape = [5 if side == net.conditioner.length else side for side in example.shape] if example.ndim > 2 else None
        rows[key] = torch.randn(shape or example.shape, generator=generator)
    return None if not rows or "labels" in rows else rows


def example(net, batch=2, height=None, width=None):
    side = 16 if type(net).__name__ == "Flux" else net.sample_size  # its native 128 is large for a test
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch, net.in_channels, height or side, width or side, generator=generator)


def time_of(net):
    return net.schedule.level("sigma=0.7").time


def plain_hooks(net, names, x, prompt):
    """What a user without diffrep would write: a full forward with a hook on every module."""
    kept, handles = {}, []

    def keep(name):
        def hook(module, _, out):
            if isinstance(out, tuple):
                out = out[1 if type(module).__name__.endswith("TransformerBlock") else 0]
            kept[name] = out.clone()

        return hook

    for name in names:
        handles.append(net.network.get_submodule(name).register_forward_hook(keep(name)))
    net.denoise(x, time_of(net), prompt)
    for handle in handles:
        handle.remove()
    return kept


def test_capture_equals_plain_hooks_on_every_layer(net, prompt):
    x = example(net)
    names = [layer.name for layer in net.layers()]
    assert len(names) > 25
    found = net.capture(x, time_of(net), names, cond=prompt)
    expected = plain_hooks(net, names, x, prompt)
    for name in names:
        whole = expected[name]
        if whole.ndim == 3:
            whole = whole[
                :, -found[name].shape[-1] * found[name].shape[-2] :
            ]  # FLUX's single blocks: text comes first
            whole = whole.transpose(1, 2).reshape(found[name].shape)
        assert torch.equal(found[name], whole), name


def test_early_exit_equals_the_full_pass_and_spends_what_layers_says(net, prompt):
    x = example(net, batch=1)
    full = plain_hooks(net, net.blocks(), x, prompt)
    size = tuple(x.shape[-2:])
    addresses = net.addresses(["blocks"])
    spent, total = net.flops(addresses, *size)
    # The dry run counts a prompt of the native length, and the counter does not know the CPU's fused attention.
    native = {k: torch.zeros(v.shape) for k, v in net.conditioner.example().items()} if prompt else None
    for name in net.blocks():
        alone = net.capture(x, time_of(net), [name], cond=prompt, tokens=True)[name]
        assert torch.equal(alone, full[name]), name
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            net.capture(x, time_of(net), [name], cond=native)
        assert counter.get_total_flops() == spent[name], name
    assert spent[net.blocks()[-1]] <= total


def test_shapes_strides_and_order_are_the_measured_ones(net, prompt):
    layers = net.layers()
    if type(net).__name__ == "Flux":
        x = example(net, batch=1, height=net.sample_size, width=net.sample_size)
    else:
        x = example(net)
    found = net.capture(x, time_of(net), [layer.name for layer in layers], cond=prompt)
    for layer in layers:
        assert tuple(found[layer.name].shape[1:]) == layer.shape
        assert layer.stride == net.sample_size / layer.shape[-1]
    assert [layer.name for layer in layers if layer.name in net.blocks()] == net.blocks()
    shares = [layer.flops_to_here for layer in layers]
    assert shares == sorted(shares)
    assert 0 < shares[-1] <= 1


def test_inputs_that_are_neither_native_nor_square(net, prompt):
    x = example(net, height=8, width=12 if net.sample_size < 16 or type(net).__name__ == "Flux" else 16)
    found = net.capture(x, time_of(net), ["blocks"], cond=prompt)
    for name, feature in found.items():
        assert feature.ndim == 4
        assert feature.shape[-2] * x.shape[-1] == feature.shape[-1] * x.shape[-2], name
    if type(net).__name__ == "DiffusersDiT":  # puts patches together as a square; a capture ends before that
        with pytest.raises(ConfigError, match="square inputs only"):
            net.denoise(x, time_of(net), prompt)
    else:
        assert net.denoise(x, time_of(net), prompt).shape[-2:] == x.shape[-2:]
    shapes = net.shapes(net.addresses(["blocks"]), *x.shape[-2:])
    assert shapes == {name: tuple(feature.shape[1:]) for name, feature in found.items()}


def test_sides_that_the_patch_does_not_divide(net, prompt):
    if not net.patch_size or net.patch_size == 1:
        pytest.skip("no patches")
    with pytest.raises(ConfigError, match="sides are multiples of its patch, 2, got 9 x 8; .*pixels"):
        net.capture(example(net, height=9, width=8), time_of(net), ["blocks"], cond=prompt)
    with pytest.raises(ConfigError, match="multiples of its patch"):
        net.flops(net.addresses(["blocks"]), 8, 9)


def test_a_time_and_a_condition_for_each_row(net, prompt):
    x = example(net)
    levels = [net.schedule.level(spec).time for spec in ("sigma=0.3", "sigma=2")]
    block = net.blocks()[-1]
    rows = prompt and {key: torch.cat([value, 2 * value]) for key, value in prompt.items()}
    both = net.capture(x, torch.tensor(levels), [block], cond=rows)[block]
    for row, time in enumerate(levels):
        mine = rows and {key: value[row : row + 1] for key, value in rows.items()}
        alone = net.capture(x[row : row + 1], time, [block], cond=mine)[block]
        torch.testing.assert_close(both[row : row + 1], alone, atol=2e-5, rtol=1e-5)


def test_extract_follows_the_schedule(net, prompt, name):
    side = (16 if name == "flux" else net.sample_size) * net.codec.downscale
    images = torch.rand(2, net.image_channels, side, side, generator=torch.Generator().manual_seed(1))
    block = net.blocks()[0]
    request = FeatureRequest(block, ["sigma=0.7", "logsnr=1.2", "clean", "step 2/10"], dtype="float32")
    features = net.extract(images, request, cond=prompt, noise=torch.ones_like(net.codec.encode(images).mean)[:, None])
    clean = net.codec.encode(images).mean
    for spec in request.levels:
        level = net.schedule.level(spec)
        x = level.signal * clean + level.noise
        expected = net.capture(x, level.time, [block], cond=prompt)[block]
        torch.testing.assert_close(features[block, spec], expected, atol=2e-4, rtol=1e-4)


@pytest.mark.compile
def test_compiled_equals_eager(net, name, prompt, load):
    compiled = load(compile=True)
    assert compiled.compiler == "inductor"
    compiled.compiler = "aot_eager"  # the same graph without code generation, which takes 10 to 30 s a family
    x = example(net)
    early, middle, late = (net.blocks()[index] for index in (0, len(net.blocks()) // 2, -1))
    # Whole networks and other sets of layers take long to trace, so one U-Net and one transformer stand for all.
    sets = ([middle], [late, middle], [middle]) if name in ("unet2d", "dit") else ([early],)
    for names in sets:
        got = compiled.capture(x, time_of(net), names, cond=prompt)
        torch.testing.assert_close(got, net.capture(x, time_of(net), names, cond=prompt), atol=1e-4, rtol=1e-4)


@pytest.mark.compile
def test_smaller_batches_are_not_compiled_anew(tmp_path):
    net = load_backbone(save_tiny("edm", tmp_path), device="cpu")
    net.compiler = "aot_eager"
    stats = torch._dynamo.utils.counters["stats"]
    before = stats["unique_graphs"]
    for batch in (8, 6, 3):
        net.capture(torch.randn(batch, 3, 16, 16), 0.5, ["enc.8x8_down"])
    assert stats["unique_graphs"] == before + 1


@pytest.mark.compile
@pytest.mark.parametrize(("kind", "block"), [("unet2d", "mid_block"), ("flux", "transformer_blocks.1")])
def test_generated_code_equals_eager(kind, block, tmp_path):
    folder = save_tiny(kind, tmp_path)
    net, compiled = (load_backbone(folder, device="cpu", compile=compile) for compile in (False, True))
    x = torch.randn(2, net.in_channels, 16, 16)
    rows = {key: torch.randn(2, *row.shape[1:]) for key, row in net.conditioner.example().items()}
    time = net.schedule.level("sigma=0.7").time
    for batch in (2, 1):
        cond = {key: row[:batch] for key, row in rows.items()} or None
        got = compiled.capture(x[:batch], time, [block], cond=cond)
        torch.testing.assert_close(got, net.capture(x[:batch], time, [block], cond=cond), atol=1e-4, rtol=1e-4)


@pytest.mark.compile
def test_generated_code_equals_eager_for_many_sets_of_layers(tmp_path):
    folder = save_tiny("sit", tmp_path)
    net, compiled = (load_backbone(folder, device="cpu", compile=compile) for compile in (False, True))
    x = torch.randn(2, 4, 8, 8)
    names = [f"blocks.{i}{point}" for i in range(3) for point in ("", ":adaln", ".attn:q", ".attn:k")]
    for name in names:  # more sets than torch recompiles one function for
        got = compiled.capture(x, 0.4, [name])[name]
        torch.testing.assert_close(got, net.capture(x, 0.4, [name])[name], atol=1e-5, rtol=1e-4)


def test_half_precision_is_near(net, prompt, load):
    half = load(dtype="bfloat16")
    block = net.blocks()[0]
    x = example(net)
    time = time_of(net)
    if type(net).__name__ == "Flux":  # multiplies time and guidance by 1000 in bf16, so 0.4 would not be 0.4
        time, prompt = 0.5, prompt | {"guidance": torch.tensor(4.0)}
    full = net.capture(x, time, [block], cond=prompt)[block]
    near = half.capture(x, time, [block], cond=prompt)[block]
    assert near.dtype == torch.bfloat16
    assert (near.float() - full).norm() < 0.05 * full.norm()


def test_channels_last_changes_the_layout_only(net, prompt, load):
    other = load(channels_last=True)
    block = net.blocks()[0]
    a, b = (n.capture(example(net), time_of(net), [block], cond=prompt)[block] for n in (net, other))
    torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    if net.convolutional:
        kernels = [w for w in other.network.parameters() if w.ndim == 4 and min(w.shape) > 1]
        assert all(w.is_contiguous(memory_format=torch.channels_last) for w in kernels)
