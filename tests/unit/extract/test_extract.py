import hashlib

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from diffrep import FeatureRequest
from diffrep.errors import ConfigError, DiffrepError, LayerError, UnknownNameError
from diffrep.extract import Extractor, extract, make_plan
from diffrep.noise import mix, sample_noise


@pytest.fixture(scope="module")
def images(backbone):
    size = backbone.image_size
    generator = torch.Generator().manual_seed(1)
    return torch.rand(7, backbone.image_channels, size, size, generator=generator)


IDS = [f"image{i}" for i in range(7)]


def test_a_feature_is_what_its_definition_says(backbone, images, cond):
    """One feature worked out by hand: encode, seed the noise from the sample, mix, hook, pool, average."""
    name = backbone.blocks()[1]
    request = FeatureRequest(name, 300, draws=2, pool=2, seed=5, dtype="float32")
    found = backbone.extract(images, request, ids=IDS, cond=cond)[name, 300]
    with torch.no_grad():
        clean = backbone.codec.encode(images).mean
    level = backbone.schedule.level(300)
    total = 0
    for draw in range(2):
        noise = torch.stack([sample_noise(clean.shape[1:], 5, i, "t=300", draw) for i in IDS])
        x = mix(clean, noise, torch.full((7,), level.signal), torch.full((7,), level.noise))
        feature = backbone.capture(x, 300, [name], cond=cond)[name]
        total = total + torch.nn.functional.adaptive_avg_pool2d(feature, 2)
    torch.testing.assert_close(found, total / 2, atol=1e-5, rtol=1e-5)


def test_batch_size_and_order_change_nothing(backbone, images, cond):
    request = FeatureRequest("blocks", [1, 100, "clean"], draws=3, pool="mean", dtype="float32")
    whole = extract(backbone, images, request, ids=IDS, cond=cond, batch_size=32)
    order = [3, 0, 6, 2, 5, 1, 4]
    shuffled = extract(backbone, images[order], request, ids=[IDS[i] for i in order], cond=cond, batch_size=7)
    one = extract(backbone, images[2:3], request, ids=IDS[2:3], cond=cond, batch_size=1)
    for key, feature in whole.items():
        size = feature.abs().max()
        assert (shuffled[key] - feature[order]).abs().max() <= 1e-5 * size
        assert (one[key] - feature[2:3]).abs().max() <= 1e-5 * size


def test_executed_flops_are_the_planned_and_the_least(backbone, images, cond):
    name = backbone.blocks()[1]
    request = FeatureRequest([backbone.blocks()[0], name], [1, 100, "clean"], draws=3)
    extractor = Extractor(backbone, request, batch_size=4)
    # Before counting: the dry run on the meta device would be counted too.
    plan = extractor.plan(*images.shape[-2:], backbone.condition(cond, len(images)))
    assert plan.draws == {"t=1": 3, "t=100": 3, "clean": 1}, "draws of a clean level are all equal: one is enough"
    # The counter does not know the fused attention of the CPU.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        extractor(images, cond=cond)
    assert counter.get_total_flops() == plan.flops * len(images)
    assert plan.forwards == 7
    assert f"{7 * 7:,}" in plan.text(7)


def test_pooling(backbone, images, cond):
    name = backbone.blocks()[0]
    requests = {pool: FeatureRequest(name, 5, pool=pool, dtype="float32") for pool in ("none", "mean", 1, 2, 100)}
    found = {pool: backbone.extract(images, r, ids=IDS, cond=cond)[name, 5] for pool, r in requests.items()}
    torch.testing.assert_close(found["mean"], found["none"].mean((2, 3)), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found[1].flatten(1), found["mean"], atol=1e-5, rtol=1e-4)
    assert found[2].shape[-2:] == (2, 2)
    assert torch.equal(found[100], found["none"]), "a grid finer than the map is the map"
    for pool, request in requests.items():
        assert make_plan(backbone, request, *images.shape[-2:]).shapes[name] == tuple(found[pool].shape[1:])


def test_tokens(backbone, images, kind):
    if kind != "dit":
        pytest.skip("only transformers give tokens")
    name = backbone.blocks()[0]
    tokens = backbone.extract(images, FeatureRequest(name, 5, tokens=True, dtype="float32"), ids=IDS)[name, 5]
    maps = backbone.extract(images, FeatureRequest(name, 5, dtype="float32"), ids=IDS)[name, 5]
    assert torch.equal(tokens.transpose(1, 2).reshape(maps.shape), maps)
    mean = backbone.extract(images, FeatureRequest(name, 5, tokens=True, pool="mean", dtype="float32"), ids=IDS)[
        name, 5
    ]
    torch.testing.assert_close(mean, tokens.mean(1), atol=1e-6, rtol=1e-5)
    with pytest.raises(ConfigError, match="makes a grid of a map"):
        backbone.extract(images, FeatureRequest(name, 5, tokens=True, pool=2))


def test_no_noise_shows_the_clean_image_at_the_levels_time(backbone, images, cond):
    name = backbone.blocks()[0]
    found = backbone.extract(images, FeatureRequest(name, 300, noise="none", dtype="float32"), ids=IDS, cond=cond)
    with torch.no_grad():
        clean = backbone.codec.encode(images).mean
    expected = backbone.capture(clean, 300, [name], cond=cond)[name]
    torch.testing.assert_close(found[name, 300], expected, atol=1e-5, rtol=1e-5)


def test_posterior_draws(backbone, images, cond):
    name = backbone.blocks()[0]
    mode, sample = (
        backbone.extract(images, FeatureRequest(name, "clean", posterior=p, dtype="float32"), ids=IDS, cond=cond)[
            name, "clean"
        ]
        for p in ("mode", "sample")
    )
    assert torch.equal(mode, sample) != backbone.codec.random


def test_given_noise_replaces_the_seeded(backbone, images, cond):
    name = backbone.blocks()[0]
    request = FeatureRequest(name, 300, draws=2, dtype="float32")
    shape = (backbone.in_channels, backbone.sample_size, backbone.sample_size)
    noise = torch.stack([torch.stack([sample_noise(shape, 0, i, "t=300", d) for d in range(2)]) for i in IDS])
    given = backbone.extract(images, request, ids=["other"] * 7, cond=cond, noise=noise)
    seeded = backbone.extract(images, request, ids=IDS, cond=cond)
    assert torch.equal(given[name, 300], seeded[name, 300])
    with pytest.raises(ConfigError, match="noise must be"):
        backbone.extract(images, request, cond=cond, noise=noise[:, :1])


def test_one_condition_for_each_image(kind, backbone, images):
    if kind == "unet2d":
        pytest.skip("unconditional")
    generator = torch.Generator().manual_seed(0)
    many = torch.randn(7, 5, 12, generator=generator) if kind == "unet2d-condition" else torch.arange(7)
    name = backbone.blocks()[-1]
    request = FeatureRequest(name, [1, 300], dtype="float32")
    together = extract(backbone, images, request, ids=IDS, cond=many, batch_size=5)
    alone = extract(backbone, images[4:5], request, ids=IDS[4:5], cond=many[4:5])
    torch.testing.assert_close(together[name, 300][4:5], alone[name, 300], atol=1e-5, rtol=1e-5)


def test_conditions_must_be_one_or_one_for_each_image(kind, backbone, images):
    if kind == "unet2d":
        pytest.skip("unconditional")
    four = torch.randn(4, 5, 12) if kind == "unet2d-condition" else torch.arange(4)
    with pytest.raises(ConfigError, match="cond holds 4 rows for a batch of 2"):
        # Two images at two levels are four rows of one forward: the labels would land on the wrong ones.
        backbone.extract(images[:2], FeatureRequest("blocks", [1, 300]), cond=four)


def test_noise_that_would_not_be_used_is_refused(backbone, images, cond):
    shape = (7, 1, backbone.in_channels, backbone.sample_size, backbone.sample_size)
    with pytest.raises(ConfigError, match="posterior_noise was given and would not be used"):
        backbone.extract(images, FeatureRequest("blocks", 5), cond=cond, posterior_noise=torch.zeros(shape))
    with pytest.raises(ConfigError, match="noise='none'"):
        backbone.extract(images, FeatureRequest("blocks", 5, noise="none"), cond=cond, noise=torch.zeros(shape))


def test_a_size_the_network_cannot_take(unet):
    with pytest.raises(ConfigError, match="cannot run on images of 13x13 pixels.*native size is 16x16"):
        unet.extract(torch.rand(1, 1, 13, 13), FeatureRequest("blocks", 5))


def test_a_layer_without_a_map(unet):
    with pytest.raises(LayerError, match="one vector for each sample"):
        unet.extract(torch.rand(1, 1, 16, 16), FeatureRequest("time_embedding", 5, tokens=True, pool="mean"))


def test_ids_default_to_the_pixels_digest(unet):
    images = torch.rand(2, 1, 16, 16)
    found = unet.extract(images, FeatureRequest("mid_block", 5))
    assert found.ids == [hashlib.sha256(image.numpy().tobytes()).hexdigest() for image in images]


def test_lookup_of_features(unet):
    found = unet.extract(
        torch.rand(1, 1, 16, 16), FeatureRequest(["mid_block", "up_blocks.0:input"], [5, "sigma=0.7"])
    )
    assert found["mid_block", 5] is found["mid_block", "t=5"] is found["mid_block", 5.0]
    assert found["mid_block", "sigma=0.7"].dtype == torch.float16
    assert len(found) == 4
    assert "mid_block @ t=5: (1, 16, 8, 8)" in repr(found)
    with pytest.raises(UnknownNameError, match="did you mean 'mid_block'"):
        found["midblock", 5]
    with pytest.raises(UnknownNameError, match="unknown level '6'"):
        found["mid_block", 6]


def test_wrong_arguments(unet):
    images, request = torch.rand(2, 1, 16, 16), FeatureRequest("mid_block", 5)
    with pytest.raises(ConfigError, match=r"images must be floats \(B, 1, H, W\)"):
        unet.extract(torch.rand(2, 3, 16, 16), request)
    with pytest.raises(ConfigError, match="images must be floats"):
        unet.extract((images * 255).byte(), request)
    with pytest.raises(ConfigError, match=r"must lie in \[0, 1\]"):
        unet.extract(images * 2 - 1, request)
    with pytest.raises(ConfigError, match="1 ids for 2 images"):
        unet.extract(images, request, ids=["a"])
    with pytest.raises(ConfigError, match="integer timesteps 0 to 999"):
        unet.extract(images, FeatureRequest("mid_block", 1000))
    with pytest.raises(LayerError, match="no layer 'middle'"):
        unet.extract(images, FeatureRequest("middle", 5))


def test_features_that_are_not_finite_name_layer_level_and_image(unet_folder):
    from diffrep import load_backbone

    backbone = load_backbone(unet_folder, device="cpu")
    backbone.network.mid_block.resnets[1].conv2.weight.mul_(1e9)
    request = FeatureRequest("mid_block", 5)
    with pytest.raises(DiffrepError, match=r"mid_block@t=5 are not finite for 2 images, first 'a'.*float16"):
        backbone.extract(torch.rand(2, 1, 16, 16), request, ids=["a", "b"])


def test_an_extractor_plans_once_a_size(unet):
    extractor = Extractor(unet, FeatureRequest("mid_block", 5))
    assert extractor.plan(16, 16) is extractor.plan(16, 16)
    assert extractor.plan(16, 24).shapes["mid_block"] == (16, 8, 12)
