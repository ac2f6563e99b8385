"""Batches of fixed and of changing size, memory that runs out, copies that are not waited for."""

import contextlib
import copy
import warnings

import pytest
import torch
from torch import nn

from diffrep import Backbone, FeatureRequest, load_backbone
from diffrep.backbones import Posterior
from diffrep.backbones.codec import Codec
from diffrep.backbones.compiled import compile_mode
from diffrep.backbones.conditioning import Ready
from diffrep.errors import BackendUnavailable, ConfigError, DiffrepError, UnknownNameError
from diffrep.extract import Extractor, memory
from diffrep.extract.memory import OutOfMemory, free_memory
from diffrep.extract.sizing import find_batch_size
from diffrep.noise import FlowSchedule

IDS = [f"image{i}" for i in range(7)]
IMPOSSIBLE = 2**50  # floats: more than an address can reach


@pytest.fixture(scope="module", params=["unet2d", "unet2d-condition"])
def tiny(request, folder_of):
    """A network of pixels, or one of latents and prompts, with images and a condition for it."""
    net = load_backbone(folder_of(request.param), device="cpu")
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(7, net.image_channels, net.image_size, net.image_size, generator=generator)
    cond = torch.randn(7, 5, 12, generator=generator) if request.param == "unet2d-condition" else None
    return net, images, cond


def near(found, expected, tolerance):
    assert list(found) == list(expected)
    for key, feature in expected.items():
        assert float((found[key] - feature).abs().max() / feature.abs().max()) <= tolerance, key


# Padding


REQUESTS = {
    "levels": FeatureRequest("up_blocks.0", [5, 300, "clean"], draws=3, pool="mean", dtype="float32"),
    "more draws than rows": FeatureRequest("mid_block", 300, draws=6, posterior="sample", dtype="float32"),
    "inversion": FeatureRequest("mid_block", ["inversion 1/3", "inversion 2/3"], noise="inversion", dtype="float32"),
}


@pytest.mark.parametrize("name", REQUESTS)
def test_a_padded_forward_has_one_shape_and_the_same_features(tiny, name):
    (net, images, cond), rows = tiny, []
    parts = [net.network, *([] if net.codec.module() is None else [net.codec.module().encoder])]
    extractor = Extractor(net, REQUESTS[name], batch_size=4, pad=True)
    extractor.plan(*images.shape[-2:], net.condition(cond, 7))
    with contextlib.ExitStack() as stack:
        for part in parts:
            hook = part.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
            stack.callback(hook.remove)
        found = extractor(images, ids=IDS, cond=cond)
    assert set(rows) == {4}
    # The last batch of the other has fewer rows, for which torch sums in another order.
    tolerance = 1e-5 if name == "inversion" else 2e-6
    near(found, Extractor(net, REQUESTS[name], batch_size=4)(images, ids=IDS, cond=cond), tolerance)


def test_a_padded_generation_with_guidance(tiny):
    net, _, cond = tiny
    guidance = {"guidance": 2, "dtype": "float32"} if cond is not None else {"dtype": "float32"}
    request = FeatureRequest("mid_block", "generation 1/3", noise="generation", **guidance)
    arguments = {"ids": IDS, "cond": cond, "uncond": None if cond is None else cond[:1]}
    found, plain = (Extractor(net, request, 4, pad=pad)(None, **arguments) for pad in (True, False))
    near(found, plain, 1e-5)
    torch.testing.assert_close(found.final, plain.final, atol=1e-4, rtol=1e-4)


def test_a_posterior_in_place_of_images(tiny):
    net, images, cond = tiny
    for posterior in ("mode", "sample"):
        request = FeatureRequest("mid_block", [5, "clean"], draws=2, posterior=posterior, dtype="float32")
        extractor = Extractor(net, request, batch_size=4)
        encoded = extractor.encode(images)
        assert (encoded.std is None) == (posterior == "mode" or not net.codec.random)
        found = extractor(None, ids=IDS, cond=cond, posterior=encoded)
        expected = extractor(images, ids=IDS, cond=cond)
        assert all(torch.equal(found[key], feature) for key, feature in expected.items())
    mean = encoded.mean
    for arguments, message in (
        ({"images": images, "posterior": encoded, "ids": IDS}, "give one of them"),
        ({"images": None, "posterior": encoded}, "a posterior needs ids"),
        ({"images": None, "posterior": encoded, "ids": IDS[:2]}, "2 ids for 7 images"),
        ({"images": None, "posterior": Posterior(mean[:, :0]), "ids": IDS}, r"mean and std are \(B, \d, h, w\)"),
    ):
        with pytest.raises(ConfigError, match=message):
            extractor(**arguments, cond=cond)
    if net.codec.random:
        with pytest.raises(ConfigError, match="needs the std"):
            extractor(None, ids=IDS, cond=cond, posterior=Posterior(mean))


def test_a_condition_is_checked_once(folder_of):
    net = load_backbone(folder_of("unet2d-condition"), device="cpu")
    prompt = torch.zeros(1, 5, 12).double()
    ready = net.condition(prompt, 3)
    assert net.condition(ready, 3) is ready
    with pytest.raises(ConfigError, match="cond holds 2 rows for a batch of 3"):
        net.condition(Ready({"prompt_embeds": torch.zeros(2, 5, 12)}, ready.owner), 3)
    for owner in ((copy.copy(net.conditioner), net.device, torch.float64), (None, net.device, net.dtype)):
        assert net.condition(Ready({"prompt_embeds": prompt}, owner), 3)["prompt_embeds"].dtype == torch.float32


# Memory


class Hungry(nn.Module):
    """A network, or encoder, that cannot work on more rows than some: torch's allocator refuses."""

    def __init__(self, rows):
        super().__init__()
        self.rows, self.inner, self.seen = rows, nn.Conv2d(3, 3, 3, padding=1), []

    def forward(self, x, time=None):
        if x.device.type != "meta":
            self.seen.append(len(x))
        x.new_empty(IMPOSSIBLE if len(x) > self.rows else 1)
        return self.inner(x)


class HungryCodec(Codec):
    image_channels = latent_channels = 3
    downscale, random = 1, False

    def __init__(self, rows):
        self.encoder = Hungry(rows)

    def encode(self, images):
        return Posterior(self.encoder(images))

    def module(self):
        return self.encoder

    def describe(self):
        return {"kind": "hungry"}


def hungry(rows, codec=None):
    torch.manual_seed(0)
    codec = None if codec is None else HungryCodec(codec)
    options = {"in_channels": 3, "sample_size": 8, "blocks": ["inner"]}
    return Backbone.from_module(Hungry(rows), FlowSchedule(), codec=codec, **options)


ODD = FeatureRequest("inner", [0.2, 0.5], draws=3, dtype="float32")
PATH = FeatureRequest("inner", ["inversion 1/3", "inversion 2/3"], noise="inversion", dtype="float32")
PIXELS = torch.rand(7, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("request_", [ODD, PATH], ids=["levels", "inversion"])
@pytest.mark.parametrize("pad", [False, True])
def test_batches_are_halved_until_they_fit(request_, pad):
    net = hungry(rows=3)
    expected = Extractor(net, request_, batch_size=3, whole=request_ is PATH)(PIXELS, ids=IDS)
    extractor = Extractor(net, request_, batch_size=16, whole=request_ is PATH, pad=pad, adaptive=True)
    net.network.seen.clear()
    with pytest.warns(UserWarning, match="out of memory in the forward of") as caught:
        found = extractor(PIXELS, ids=IDS)
    near(found, expected, 1e-6)
    if request_ is PATH:
        torch.testing.assert_close(found.final, expected.final, atol=1e-5, rtol=1e-5)
    assert extractor.batch_size in (2, 3)
    refused = [rows for rows in net.network.seen if rows > 3]
    assert len(caught) == len(refused) == len(set(refused)), "one line for each time"
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # what was learned stays
        near(extractor(PIXELS, ids=IDS), expected, 1e-6)


def test_an_encoder_that_needs_more_does_not_hold_the_network_up():
    net = hungry(rows=100, codec=2)
    expected = Extractor(net, ODD, batch_size=2)(PIXELS, ids=IDS)
    net.network.seen.clear()
    extractor = Extractor(net, ODD, batch_size=12, adaptive=True)
    with pytest.warns(UserWarning, match="out of memory in the encoding of [73] rows; going on with [31]"):
        near(extractor(PIXELS, ids=IDS), expected, 1e-6)
    assert (extractor.batch_size, set(net.network.seen)) == (12, {12, 6})


def test_where_nothing_fits_the_message_says_what_to_do():
    net = hungry(rows=0)
    with pytest.raises(
        DiffrepError, match="forward of 6 rows: .*DefaultCPUAllocator.*batch_size=auto, or less than 6"
    ):
        Extractor(net, ODD, batch_size=8)(PIXELS, ids=IDS)
    with (
        pytest.warns(UserWarning),
        pytest.raises(OutOfMemory, match="forward of a single row.*smaller images") as error,
    ):
        Extractor(net, ODD, batch_size=8, adaptive=True)(PIXELS, ids=IDS)
    assert isinstance(error.value.__cause__, RuntimeError)
    with pytest.raises(OutOfMemory, match="encoding of 7 rows"):
        Extractor(hungry(rows=50, codec=0), ODD)(PIXELS, ids=IDS)


def test_other_errors_are_not_taken_for_missing_memory():
    net = hungry(rows=9)
    net.network.inner.weight.data = net.network.inner.weight.data[:, :2]
    with pytest.raises(RuntimeError, match="hannel"):
        net.capture(PIXELS, 0.5, ["inner"])
    extractor = Extractor(hungry(rows=99), ODD, adaptive=True)
    extractor.plan(8, 8)
    extractor.backbone.network.inner.weight.data = net.network.inner.weight.data
    with pytest.raises(RuntimeError, match="hannel"):
        extractor(PIXELS, ids=IDS)


# The size of a batch


@pytest.mark.parametrize(
    ("rows", "codec", "allowed"), [(100, None, {8, 16, 32, 64}), (100, 20, {8, 16}), (3, None, {2})]
)
def test_the_batch_size_is_one_that_fits(rows, codec, allowed):
    net = hungry(rows, codec)
    extractor = Extractor(net, FeatureRequest("inner", [0.2, 0.5]), batch_size=5)
    assert find_batch_size(extractor, 8, 8) in allowed
    assert extractor.batch_size == 5
    assert find_batch_size(extractor, 8, 8, most=4) <= 4


def test_a_batch_size_for_latents_does_not_count_the_encoder():
    net = hungry(rows=100, codec=100)
    extractor = Extractor(net, FeatureRequest("inner", 0.5))
    assert find_batch_size(extractor, 8, 8, encode=False) in {8, 16, 32, 64}
    with pytest.raises(OutOfMemory, match="single row|1 rows"):
        find_batch_size(Extractor(hungry(rows=0), FeatureRequest("inner", 0.5)), 8, 8)


@pytest.mark.parametrize(
    ("mount", "line", "files"),
    [
        ("", "0::/job/step", {"max": "memory.max", "used": "memory.current", "cache": "inactive_file"}),
        (
            "memory",
            "4:cpu,memory:/job/step",
            {"max": "memory.limit_in_bytes", "used": "memory.usage_in_bytes", "cache": "total_inactive_file"},
        ),
    ],
)
def test_a_control_group_limits_the_memory(tmp_path, monkeypatch, mount, line, files):
    """Files as the kernel lays them out, the limit on the job around the step."""
    root = tmp_path / mount
    for place, most in (("job/step", "max"), ("job", "1000000"), (".", "max")):
        (root / place).mkdir(parents=True, exist_ok=True)
        (root / place / files["max"]).write_text(f"{most}\n")
        (root / place / files["used"]).write_text("600000\n")
        (root / place / "memory.stat").write_text(f"anon 5\n{files['cache']} 150000\n")
    groups = [(str(root), *rest) for path, *rest in memory.CONTROL_GROUPS if path.endswith(mount or "cgroup")]
    monkeypatch.setattr(memory, "CONTROL_GROUPS", groups)
    (tmp_path / "self").write_text(f"{line}\n3:pids:/job\n")
    assert memory._left_in_groups(tmp_path / "self") == [550000]
    assert 0 < free_memory(torch.device("cpu")) < 2**50


# CUDA graphs, without CUDA


def test_modes_that_cannot_be(unet_folder):
    with pytest.raises(BackendUnavailable, match="records CUDA graphs, and the device is cpu; use compile=true"):
        load_backbone(unet_folder, device="cpu", compile="cudagraphs")
    with pytest.raises(UnknownNameError, match="unknown compile mode 'region'; did you mean 'regional'"):
        load_backbone(unet_folder, device="cpu", compile="region")
    assert compile_mode("cudagraphs", torch.device("meta")) == "cudagraphs", "a plan needs no GPU"
    planned = load_backbone(unet_folder, device="meta", compile="cudagraphs")
    with pytest.raises(ConfigError, match="cudagraphs replays forwards of one shape, so it needs pad=true"):
        Extractor(planned, FeatureRequest("mid_block", 5))
    assert Extractor(planned, FeatureRequest("mid_block", 5), pad=True).plan(16, 16).forwards == 1


# With CUDA


@pytest.fixture
def exact(monkeypatch):
    """Convolutions do not round to TF32, which keeps three digits."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["unet2d", "sit"])
@pytest.mark.parametrize("pad", [False, True])
def test_a_gpu_gives_the_cpus_features_and_is_waited_for_once(folder_of, exact, kind, pad):
    levels = [0.2, 0.7] if kind == "sit" else [5, 300]
    request = FeatureRequest("blocks", levels, draws=3, posterior="sample", dtype="float32")
    on_cpu, on_gpu = (load_backbone(folder_of(kind), device=device, dtype="float32") for device in ("cpu", "cuda"))
    images = torch.rand(7, on_cpu.image_channels, on_cpu.image_size, on_cpu.image_size)
    expected = Extractor(on_cpu, request, 8)(images, ids=IDS)
    extractor = Extractor(on_gpu, request, 8, pad=pad)
    extractor(images, ids=IDS)  # the first call of a kernel may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = extractor(images.pin_memory(), ids=IDS)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for key, feature in expected.items():
        torch.testing.assert_close(found[key], feature, atol=1e-3, rtol=1e-3)


@pytest.mark.gpu
def test_a_trajectory_on_a_gpu_ends_where_the_cpus_does(folder_of, exact):
    request = FeatureRequest("blocks", "inversion 1/3", noise="inversion", dtype="float32")
    nets = [load_backbone(folder_of("unet2d"), device=device, dtype="float32") for device in ("cpu", "cuda")]
    images = torch.rand(7, 1, 16, 16)
    on_cpu, on_gpu = (Extractor(net, request, 4, whole=True)(images, ids=IDS) for net in nets)
    torch.testing.assert_close(on_gpu.final, on_cpu.final, atol=1e-2, rtol=1e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["unet2d", "sit"])
def test_bfloat16_on_a_gpu_is_near(folder_of, kind):
    request = FeatureRequest("blocks", "sigma=0.7", dtype="float32")
    full, half = (load_backbone(folder_of(kind), device="cuda", dtype=dtype) for dtype in ("float32", "bfloat16"))
    images = torch.rand(7, full.image_channels, full.image_size, full.image_size)
    expected, found = (Extractor(net, request)(images, ids=IDS) for net in (full, half))
    for key, feature in expected.items():
        assert (found[key] - feature).norm() < 0.05 * feature.norm(), key


class Greedy(nn.Module):
    """A network that takes a GiB for each row."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x, time):
        x.new_empty(len(x), 2**28)
        return self.inner(x)


@pytest.fixture
def three_gib():
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 3.5 * 2**30) / total)
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.gpu
def test_a_gpu_that_runs_out_of_memory_takes_smaller_batches(three_gib):
    net = Backbone.from_module(Greedy().cuda(), FlowSchedule(), in_channels=3, sample_size=8)
    request = FeatureRequest("inner", 0.5, dtype="float32")
    expected = Extractor(net, request, batch_size=1)(PIXELS, ids=IDS)
    extractor = Extractor(net, request, batch_size=16, adaptive=True)
    with pytest.warns(UserWarning, match="out of memory in the forward of 7 rows; going on with 3"):
        near(extractor(PIXELS, ids=IDS), expected, 1e-4)
    assert extractor.batch_size == 3
    with pytest.raises(OutOfMemory, match="CUDA out of memory.*batch_size=auto, or less than 7"):
        Extractor(net, request)(PIXELS, ids=IDS)
    assert find_batch_size(extractor, 8, 8) in (1, 2)


@pytest.mark.gpu
@pytest.mark.compile
def test_cuda_graphs_give_the_eager_features(folder_of, exact):
    request = FeatureRequest("blocks", [0.2, 0.7], draws=3, dtype="float32")
    eager = load_backbone(folder_of("sit"), device="cuda", dtype="float32")
    recorded = load_backbone(folder_of("sit"), device="cuda", dtype="float32", compile="cudagraphs")
    first, second = torch.rand(2, 7, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    extractor = Extractor(recorded, request, batch_size=8, pad=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="torch could not record a CUDA graph")
        found = [extractor(images, ids=IDS) for images in (first, second, first, second)]
    for images, given in zip((first, second, first, second), found, strict=True):
        expected = Extractor(eager, request, batch_size=8)(images, ids=IDS)
        for key, feature in expected.items():
            torch.testing.assert_close(given[key], feature, atol=1e-3, rtol=1e-3)
    x = [torch.randn(8, 4, 8, 8, device="cuda") for _ in range(3)]
    held = [recorded.capture(one, 0.4, ["blocks.1"])["blocks.1"] for one in x]  # replays must not write over these
    for one, feature in zip(x, held, strict=True):
        torch.testing.assert_close(feature, eager.capture(one, 0.4, ["blocks.1"])["blocks.1"], atol=1e-3, rtol=1e-3)
