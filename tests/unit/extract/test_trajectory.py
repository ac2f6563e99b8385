"""Features along trajectories, through `extract` and into a store."""

import weakref
from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from diffrep import Backbone, FeatureRequest, load_backbone
from diffrep.errors import ConfigError, DiffrepError
from diffrep.extract import Extractor, Leg, make_plan, walk
from diffrep.noise import DiscreteSchedule, FlowSchedule, LevelTable, read_levels, sample_noise
from diffrep.testing import tiny_backbone

IDS = [f"image{i}" for i in range(5)]
CONDITIONAL = pytest.mark.parametrize("kind", ["unet2d-condition", "dit"], indirect=True)


@pytest.fixture(scope="module")
def images(backbone):
    size = backbone.image_size
    return torch.rand(5, backbone.image_channels, size, size, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def uncond(kind):
    """The other condition of guidance: a negative prompt, or what stands for no class."""
    return torch.randn(3, 12, generator=torch.Generator().manual_seed(4)) if kind == "unet2d-condition" else None


@pytest.fixture
def guided(kind, cond):
    """A condition that guidance can push towards."""
    return 3 if kind == "dit" else cond


def by_hand(backbone, x, spec, layer, cond, whole=False, guidance=None):
    """Features of one level, and the last state, from `capture`, `denoise` and DDIM's formulas for epsilon."""
    direction = spec.split()[0]
    path = read_levels(backbone.schedule, [spec], direction)[1][0]
    targets = [*path.levels[1:], path.end]
    found = None
    for level, target in zip(path.levels, targets, strict=True):
        if level.key == spec:
            found = backbone.capture(x, level.time, [layer], cond)[layer]
            if not whole:
                return found, x
        if target is None:
            break
        eps = backbone.denoise(x, level.time, cond)[:, : x.shape[1]]
        if guidance is not None:
            null = backbone.denoise(x, level.time, guidance[1])[:, : x.shape[1]]
            eps = null + guidance[0] * (eps - null)
        clean = (x - level.noise * eps) / level.signal
        x = target.signal * clean + target.noise * eps
    return found, x


def test_inversion_is_what_its_definition_says(backbone, images, cond):
    layer = backbone.blocks()[1]
    specs = ["inversion 4/6", "inversion 0/6", "inversion 2/6"]
    request = FeatureRequest(layer, specs, noise="inversion", pool=2, dtype="float32")
    found = backbone.extract(images, request, ids=IDS, cond=cond)
    assert list(found.levels) == specs, "levels stay in the order of the request"
    with torch.no_grad():
        clean = backbone.codec.encode(images).mean
    for spec in specs:
        expected, _ = by_hand(backbone, clean, spec, layer, cond)
        expected = torch.nn.functional.adaptive_avg_pool2d(expected, 2)
        torch.testing.assert_close(found[layer, spec], expected, atol=1e-4, rtol=1e-4)
    assert [found.levels[spec].time for spec in specs] == [
        backbone.schedule.level("step 4/6").time,
        0,
        backbone.schedule.level("step 2/6").time,
    ]


def test_generation_starts_from_the_samples_noise_and_ends_in_a_clean_sample(backbone, cond):
    layer, shape = backbone.blocks()[-1], (backbone.in_channels, backbone.sample_size, backbone.sample_size)
    request = FeatureRequest(layer, ["generation 5/6", "generation 0/6"], noise="generation", seed=7, dtype="float32")
    found = backbone.extract(None, request, ids=IDS, cond=cond)
    start = torch.stack([sample_noise(shape, 7, name, "generation", 0) for name in IDS])
    for spec in request.levels:
        expected, final = by_hand(backbone, start, spec, layer, cond, whole=True)
        torch.testing.assert_close(found[layer, spec], expected, atol=1e-4, rtol=1e-4)
    assert found.final.shape == (5, 1, *shape)
    torch.testing.assert_close(found.final[:, 0], final, atol=1e-3, rtol=1e-3)
    size = backbone.image_size
    assert backbone.codec.decode(found.final[:, 0]).shape == (5, backbone.image_channels, size, size)
    given = backbone.extract(None, request, cond=cond, noise=start[:, None])
    assert torch.equal(given[layer, "generation 0/6"], found[layer, "generation 0/6"])
    assert torch.equal(given.final, found.final)
    assert len(set(given.ids)) == 5


def test_generation_of_another_size(backbone, cond):
    side = backbone.sample_size
    noise = torch.randn(2, 1, backbone.in_channels, side, 2 * side, generator=torch.Generator().manual_seed(0))
    layer = backbone.blocks()[0]
    found = backbone.extract(None, FeatureRequest(layer, "generation 1/2", noise="generation"), cond=cond, noise=noise)
    assert found.final.shape == noise.shape
    height, width = found[layer, "generation 1/2"].shape[-2:]
    assert width == 2 * height


@CONDITIONAL
def test_guidance_steers_the_path_and_features_are_those_of_the_condition(backbone, guided, uncond):
    layer = backbone.blocks()[1]
    request = FeatureRequest(layer, "generation 1/4", noise="generation", guidance=3.0, dtype="float32")
    found = backbone.extract(None, request, ids=IDS, cond=guided, uncond=uncond)
    shape = (backbone.in_channels, backbone.sample_size, backbone.sample_size)
    start = torch.stack([sample_noise(shape, 0, name, "generation", 0) for name in IDS])
    expected, final = by_hand(backbone, start, "generation 1/4", layer, guided, True, (3.0, uncond))
    torch.testing.assert_close(found[layer, "generation 1/4"], expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found.final[:, 0], final, atol=1e-2, rtol=1e-3)
    plain = backbone.extract(None, replace(request, guidance=1.0), ids=IDS, cond=guided)
    assert not torch.allclose(plain.final, found.final, atol=1e-2)


def test_batch_size_and_order_change_nothing(backbone, images, cond):
    specs = ["inversion 3/4", "inversion 1/4", "hf.inversion 2/4"]
    reader = Extractor(backbone, FeatureRequest("blocks", specs, 3, "mean", "inversion", "sample", dtype="float32"))
    whole, order = reader(images, IDS, cond), [3, 0, 4, 2, 1]
    reader.batch_size = 4
    shuffled = reader(images[order], [IDS[i] for i in order], cond)
    reader.batch_size = 2  # less than the draws of one image
    one = reader(images[2:3], IDS[2:3], cond)
    for key, feature in whole.items():
        assert (shuffled[key] - feature[order]).abs().max() <= 1e-4 * feature.abs().max()
        assert (one[key] - feature[2:3]).abs().max() <= 1e-4 * feature.abs().max()


def test_batch_size_changes_no_generation(unet):
    reader = Extractor(unet, FeatureRequest("blocks", "generation 1/3", 3, noise="generation", dtype="float32"))
    together = reader(None, IDS)
    reader.batch_size = 2
    alone = reader(None, IDS[1:2])
    assert alone.final.shape == (1, 3, 1, 16, 16)
    for found, expected in [(alone.final, together.final), *((alone[key], together[key]) for key in together)]:
        assert (found - expected[1:2]).abs().max() <= 1e-4 * expected.abs().max()


def test_equal_draws_are_run_once(unet):
    images, request = torch.rand(2, 1, 16, 16), FeatureRequest("mid_block", "inversion 1/3", 4, noise="inversion")
    once = replace(request, draws=1)
    found, single = (unet.extract(images, one)["mid_block", "inversion 1/3"] for one in (request, once))
    assert torch.equal(found, single)
    assert make_plan(unet, request, 16, 16).forwards == 2


@pytest.mark.parametrize("kind", ["unet2d-condition", "dit"], indirect=True)  # whose codecs have a posterior
def test_draws_average_trajectories(backbone, images, cond):
    assert backbone.codec.random
    layer, specs = backbone.blocks()[0], ["inversion 1/3", "inversion 2/5"]
    two, one = (
        Extractor(backbone, FeatureRequest(layer, specs, draws, "none", "inversion", "sample", dtype="float32"))
        for draws in (2, 1)
    )
    shape = (backbone.in_channels, backbone.sample_size, backbone.sample_size)
    eps = torch.randn(5, 2, *shape, generator=torch.Generator().manual_seed(2))
    found = two(images, IDS, cond, posterior_noise=eps)
    parts = [one(images, IDS, cond, posterior_noise=eps[:, i : i + 1]) for i in range(2)]
    for spec in specs:
        expected = (parts[0][layer, spec] + parts[1][layer, spec]) / 2
        torch.testing.assert_close(found[layer, spec], expected, atol=1e-5, rtol=1e-5)
    # One seeded draw starts all levels, of trajectories of any length.
    seeded = torch.stack([sample_noise(shape, 0, name, "inversion", 0, "posterior") for name in IDS])[:, None]
    given, drawn = one(images, ["x"] * 5, cond, posterior_noise=seeded), one(images, IDS, cond)
    assert all(torch.equal(given[key], drawn[key]) for key in drawn)


def work(backbone, request, images, cond=None, uncond=None, whole=False):
    """The plan of a request, after it was run and its FLOPs were counted; and what it gave."""
    reader = Extractor(backbone, request, batch_size=4, whole=whole)
    null = None if request.guidance == 1 else backbone.condition(uncond, len(images))
    # Before counting: the dry run on the meta device would be counted too.
    plan = reader.plan(*images.shape[-2:], backbone.condition(cond, len(images)), null)
    given = None if request.noise == "generation" else images
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        found = reader(given, IDS, cond, uncond=None if request.guidance == 1 else uncond)
    assert counter.get_total_flops() == plan.flops * len(images)
    count = plan.forwards
    assert f"forwards  {count * len(images)} ({count} an image)" in plan.text(len(images))
    assert all(str(leg) in plan.text() for leg in plan.legs)
    return plan, found


def test_an_inversion_executes_what_is_planned_and_the_least(backbone, images, cond):
    request = FeatureRequest(backbone.blocks()[:2], ["inversion 3/6", "inversion 1/6"], noise="inversion")
    plan, found = work(backbone, request, images, cond)
    # Whole calls up to the last level that is wanted, and that one to the deepest layer.
    assert plan.flops == plan.encode_flops + 3 * plan.network_flops + plan.forward_flops
    assert plan.forwards == 4
    with pytest.raises(DiffrepError, match="there are 0 ends; extract with whole=True"):
        found.final  # noqa: B018


@CONDITIONAL
def test_a_guided_generation_executes_what_is_planned(kind, backbone, images, guided, uncond):
    request = FeatureRequest(backbone.blocks()[0], "generation 2/3", draws=2, noise="generation", guidance=2.0)
    plan, found = work(backbone, request, images, guided, uncond)
    assert plan.forwards == 12
    assert plan.flops == 6 * (plan.network_flops + plan.guide_flops)
    assert found.final.shape[:2] == (5, 2)
    if kind == "unet2d-condition":
        assert plan.guide_flops < plan.network_flops, "the negative prompt is shorter"


@pytest.mark.parametrize(
    ("levels", "whole", "forwards"),
    [
        (["inversion 3/6", "hf.inversion 5/6", "inversion 0/2"], False, 4 + 1 + 1),
        (["inversion 1/6"], True, 5),
        (["inversion 5/6"], True, 6),
        (["hf.inversion 5/6"], True, 6),
        (["generation 2/3"], False, 3),
    ],
)
def test_executed_flops_are_the_planned(unet, levels, whole, forwards):
    request = FeatureRequest("mid_block", levels, noise=levels[0].split()[0].removeprefix("hf."))
    plan, found = work(unet, request, torch.rand(5, 1, 16, 16), whole=whole)
    assert plan.forwards == forwards
    assert len(found.ends) == sum(leg.full == leg.trajectory.updates for leg in plan.legs)
    if whole or request.noise == "generation":
        assert found.final.shape == (5, 1, 1, 16, 16)


# An untrained network's noise prediction is divided by a signal of 0.006 at the far end, hence the first bound.
@pytest.mark.parametrize(
    ("prediction", "bound"),
    [("epsilon", 15), ("v_prediction", 0.08), ("flow", 0.03), ("edm", 0.1)],
)
def test_generation_from_an_inversions_end_gives_the_image_back(prediction, bound, tmp_path):
    backbone = tiny_backbone("edm" if prediction == "edm" else "unet2d", tmp_path)
    if prediction != "edm":
        powers = backbone.schedule.alphas_cumprod
        backbone.schedule = {
            "epsilon": DiscreteSchedule(powers),
            "v_prediction": DiscreteSchedule(powers, "v_prediction"),
            "flow": FlowSchedule(data_time=1, scale=1000.0),
        }[prediction]
    side, layer = backbone.image_size, backbone.blocks()[0]
    images = torch.rand(1, backbone.image_channels, side, side, generator=torch.Generator().manual_seed(0))
    errors = []
    for count in (10, 40):
        there = FeatureRequest(layer, f"inversion 0/{count}", pool="mean", noise="inversion")
        back = FeatureRequest(layer, f"generation 0/{count}", pool="mean", noise="generation")
        noise = backbone.extract(images, there, whole=True).final
        final = backbone.extract(None, back, noise=noise).final[:, 0]
        errors.append((final - (2 * images - 1)).abs().mean().item())
    assert errors[1] < errors[0] / 2, "first order: a quarter, about"
    assert errors[1] < bound


def test_no_more_than_one_levels_features_are_held(unet):
    specs = [f"inversion {k}/6" for k in range(6)]
    found, (path,) = read_levels(unet.schedule, specs, "inversion")
    leg = Leg.of(path, LevelTable(found), 1, False, False)
    held, seen = [], []
    for step in walk(unet, leg, torch.zeros(1, 1, 16, 16), ["mid_block"], {}):
        held.append(weakref.ref(step.features["mid_block"]))
        seen.append(step.level.key)
        step.features.clear()
        assert not any(reference() is not None for reference in held)
    assert seen == specs


def test_a_pass_that_gives_features_and_the_output(kind, backbone, cond):
    x = torch.randn(2, backbone.in_channels, backbone.sample_size, backbone.sample_size)
    layers = backbone.blocks()[:2]
    features, output = backbone.capture_with_output(x, 300, layers, cond)
    assert torch.equal(output, backbone.denoise(x, 300, cond))
    for name, feature in backbone.capture(x, 300, layers, cond).items():
        assert torch.equal(features[name], feature)
    if kind == "dit":
        tokens, _ = backbone.capture_with_output(x, 300, layers, cond, tokens=True)
        assert tokens[layers[0]].shape == (2, 16, 16)


# Stores


# Bad input


@pytest.mark.parametrize(
    ("changes", "arguments", "message"),
    [
        ({"levels": (300,)}, {}, "level '300' does not go with noise='inversion'"),
        ({"levels": ("inversion 1/4", "clean")}, {}, "level 'clean' does not go with noise='inversion'"),
        ({"noise": "gaussian"}, {}, "lies on a trajectory; only requests with noise='inversion'"),
        ({"noise": "generation"}, {}, "'inversion 1/4' does not go with noise='generation'"),
        ({"guidance": 2.0}, {"cond": None}, "guidance=2 needs cond"),
        ({}, {"noise": torch.zeros(2, 1, 1, 16, 16)}, "noise was given and the request says noise='inversion'"),
        ({}, {"posterior_noise": torch.zeros(2, 1, 1, 16, 16)}, "posterior_noise was given and would not be used"),
        ({}, {"uncond": {}}, "uncond was given and would not be used; it needs a guidance other than 1"),
        ({"levels": (5,), "noise": "gaussian"}, {"whole": True}, "whole=True runs a trajectory to its end"),
    ],
)
def test_inversions_that_are_refused(unet, changes, arguments, message):
    request = replace(FeatureRequest("mid_block", "inversion 1/4", noise="inversion"), **changes)
    if request.noise == "generation":
        arguments = {"ids": ["a"], **arguments}
    with pytest.raises(ConfigError, match=message):
        unet.extract(None if request.noise == "generation" else torch.rand(2, 1, 16, 16), request, **arguments)


@pytest.mark.parametrize(
    ("images", "arguments", "message"),
    [
        (torch.rand(2, 1, 16, 16), {"ids": ["a", "b"]}, "makes its own images; give None for images"),
        (None, {}, "makes an image for each id; give ids, or noise to start from"),
        (None, {"ids": []}, "makes an image for each id"),
        (None, {"noise": torch.zeros(2, 1, 16, 16)}, r"floats \(B, draws, C, h, w\) = \(B, 1, 1, h, w\)"),
        (None, {"noise": torch.zeros(2, 3, 1, 16, 16)}, "noise must be floats"),
        (None, {"noise": torch.zeros(2, 1, 1, 16, 16), "ids": ["a"]}, "1 ids for noise of 2 images"),
        (None, {"noise": torch.zeros(2, 1, 1, 13, 13)}, "cannot run on images of 13x13 pixels"),
        (None, {"ids": ["a"], "posterior_noise": torch.zeros(1, 1, 1, 16, 16)}, "would not be used"),
    ],
)
def test_generations_that_are_refused(unet, images, arguments, message):
    request = FeatureRequest("mid_block", "generation 1/4", noise="generation")
    with pytest.raises(ConfigError, match=message):
        unet.extract(images, request, **arguments)


def test_images_are_needed_unless_they_are_made(unet):
    with pytest.raises(ConfigError, match="images is None, which goes with noise='generation'"):
        unet.extract(None, FeatureRequest("mid_block", 5), ids=["a"])


def test_guidance_needs_a_condition_and_a_null_condition(unet, tmp_path):
    request = FeatureRequest("mid_block", "generation 1/4", noise="generation", guidance=2.0)
    with pytest.raises(ConfigError, match="guidance=2 needs cond: without it both calls"):
        unet.extract(None, request, ids=["a"])
    text = tiny_backbone("unet2d-condition", tmp_path)
    with pytest.raises(ConfigError, match="guidance=2 calls the network without a condition too: .*no text encoder"):
        text.extract(None, request, ids=["a"], cond=torch.zeros(5, 12))
    for guidance in (-1, float("inf"), float("nan"), "high"):
        with pytest.raises(ValidationError, match="guidance"):
            FeatureRequest("mid_block", "generation 1/4", noise="generation", guidance=guidance)
    inverted = FeatureRequest("mid_block", "inversion 1/4", noise="inversion", guidance=2.0)
    with pytest.raises(ConfigError, match="guidance=2 is for noise='generation', and noise is 'inversion'"):
        make_plan(unet, inverted, 16, 16)


def test_ends_of_several_trajectories_are_told_apart(unet):
    request = FeatureRequest("mid_block", ["generation 1/2", "generation 1/3"], noise="generation")
    found = unet.extract(None, request, ids=["a"])
    assert list(found.ends) == ["generation of 2 steps", "generation of 3 steps"]
    assert not torch.equal(*found.ends.values())
    with pytest.raises(DiffrepError, match="there are 2 ends; take ends"):
        found.final  # noqa: B018


class Net(torch.nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.body = torch.nn.Conv2d(3, 8, 3, padding=1)
        self.out = torch.nn.Conv2d(8, channels, 3, padding=1)

    def forward(self, x, time):
        return self.out(torch.tanh(self.body(x) + time.view(-1, 1, 1, 1)))


def test_a_network_that_predicts_something_else():
    backbone = Backbone.from_module(Net(5), FlowSchedule(), in_channels=3, sample_size=8)
    request = FeatureRequest("body", "inversion 1/2", noise="inversion")
    with pytest.raises(ConfigError, match=r"output for \(1, 3, 8, 8\) is \(1, 5, 8, 8\)"):
        backbone.extract(torch.rand(1, 3, 8, 8), request)
    alone = replace(request, levels=("inversion 0/2",))
    assert len(backbone.extract(torch.rand(1, 3, 8, 8), alone)) == 1, "no state follows from the only call"


@pytest.mark.compile
def test_a_compiled_backbone_runs_whole_calls_as_they_are():
    backbone = Backbone.from_module(Net(3), FlowSchedule(), in_channels=3, sample_size=8)
    request = FeatureRequest("body", ["inversion 0/3", "inversion 2/3"], noise="inversion", dtype="float32")
    images = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    plain = backbone.extract(images, request)
    backbone.compiler = "eager"
    compiled = backbone.extract(images, request)
    for key, feature in plain.items():
        torch.testing.assert_close(compiled[key], feature, atol=1e-5, rtol=1e-5)


def test_states_that_run_away_are_told(unet_folder):
    backbone = load_backbone(unet_folder, device="cpu")
    backbone.network.conv_out.weight.mul_(1e30)
    request = FeatureRequest("mid_block", "inversion 2/4", pool="mean", noise="inversion")
    with pytest.raises(DiffrepError, match="mid_block@inversion 2/4 are not finite"):
        backbone.extract(torch.rand(1, 1, 16, 16), request)
    early = replace(request, levels=("inversion 0/4",))
    with pytest.raises(DiffrepError, match="the inversion of 4 steps ends in NaN or infinity"):
        backbone.extract(torch.rand(1, 1, 16, 16), early, whole=True)
