import copy
import json
import weakref

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from diffrep import FeatureRequest
from diffrep.errors import CheckpointError, ConfigError, UnknownNameError
from diffrep.heads import load_head, save_head
from diffrep.heads.aggregation import AggregationHead, AggregationNetwork

LAYERS = {"up_blocks.0": 6, "up_blocks.1": 16, "mid": 5}
SIZES = {"up_blocks.0": (4, 6), "up_blocks.1": (2, 3), "mid": (1, 1)}
LEVELS = ["t=90", "clean"]
SMALL = {"projection_dim": 16, "num_norm_groups": 2}


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def maps(batch=3, layers=LAYERS, sizes=SIZES, levels=LEVELS):
    pairs = [(layer, level) for layer in layers for level in levels]
    return {pair: noise(batch, layers[pair[0]], *sizes[pair[0]], seed=i) for i, pair in enumerate(pairs)}


def build(kind=AggregationNetwork, seed=0, layers=LAYERS, levels=LEVELS, **options):
    """A network whose norms and mixing weights are not what they are at first."""
    torch.manual_seed(seed)
    network = kind(layers, levels, **{**SMALL, **options})
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "norm" in name or "mixing" in name:
                parameter.add_(0.5 * torch.randn_like(parameter))
    return network


def concatenated(features, size, layers=LAYERS, levels=LEVELS):
    """What the published network reads."""
    resized = [
        F.interpolate(features[layer, level], size, mode="bilinear", align_corners=False)
        for level in levels
        for layer in layers
    ]
    return torch.cat(resized, dim=1)


def published(network, concat, groups=2, temperature=1.0):
    """The published forward pass, in plain functions of the state dict's tensors."""
    state = dict(network.named_parameters())
    shares = (state["mixing_weights"] / temperature).softmax(0)
    total, start = 0, 0
    for number, share in enumerate(shares):
        index = number % len(network.layers)
        channels = list(network.layers.values())[index]
        x, start = concat[:, start : start + channels], start + channels

        def norm(x, name, index=index):
            at = f"bottleneck_layers.{index}.0.{name}"
            x = F.conv2d(x, state[f"{at}.weight"], padding=state[f"{at}.weight"].shape[-1] // 2)
            return F.group_norm(x, groups, state[f"{at}.norm.weight"], state[f"{at}.norm.bias"])

        inner = F.relu(norm(F.relu(norm(x, "conv1")), "conv2"))
        beside = norm(x, "shortcut") if f"bottleneck_layers.{index}.0.shortcut.weight" in state else x
        total = total + share * F.relu(norm(inner, "conv3") + beside)
    return total


@pytest.mark.parametrize("size", [None, (4, 6), (9, 7), (3, 2), (2, 9)])
def test_streaming_concatenated_and_published_forms_are_one(size):
    """Layers smaller and larger than the result, and one whose shortcut is the identity."""
    network, features = build(size=size), maps()
    concat = concatenated(features, size or (4, 6))
    expected = published(network, concat)
    assert expected.shape == (3, 16, *(size or (4, 6)))
    torch.testing.assert_close(network(concat), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(network(features), expected, atol=1e-5, rtol=0)
    assert "bottleneck_layers.1.0.shortcut.weight" not in network.state_dict()
    # In double precision: a map of one cell is constant, the norms take it away, and its gradients are nearly zero.
    network.double()
    expected = published(network, concat.double())
    weights = list(network.parameters())
    wanted, found = (torch.autograd.grad(one.square().sum(), weights) for one in (expected, network(features)))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_keys_and_first_weights():
    network = AggregationNetwork({"a": 640, "b": 384}, ["t=1", "t=2"])
    conv = ("weight", "norm.weight", "norm.bias")
    blocks = [("conv1", "conv2", "conv3", "shortcut"), ("conv1", "conv2", "conv3")]
    expected = {f"bottleneck_layers.{i}.0.{c}.{k}" for i, names in enumerate(blocks) for c in names for k in conv}
    assert network.state_dict().keys() == {"mixing_weights"} | expected
    assert torch.equal(network.mixing_weights, torch.ones(4))
    # Kaiming with fan-out: the published initialisation.
    weight = network.bottleneck_layers[0][0].conv2.weight
    assert weight.shape == (96, 96, 3, 3)
    assert weight.detach().std() == pytest.approx((2 / (96 * 9)) ** 0.5, rel=0.02)


def test_mixing_is_level_after_level_and_has_a_temperature():
    network = build(temperature=0.5)
    with torch.no_grad():
        network.mixing_weights.copy_(torch.arange(6.0))
    shares = network.shares()
    assert shares.shape == (2, 3)
    torch.testing.assert_close(shares, (2 * torch.arange(6.0)).softmax(0).view(2, 3))
    found = network.mixing()
    assert found == json.loads(json.dumps(found))
    assert (found["layers"], found["levels"]) == (list(LAYERS), LEVELS)
    torch.testing.assert_close(torch.tensor(found["shares"]), shares.T)
    features = maps()
    torch.testing.assert_close(
        network(features), published(network, concatenated(features, (4, 6)), temperature=0.5), atol=1e-5, rtol=0
    )


def test_no_more_than_one_level_is_held():
    levels = [f"t={t}" for t in range(5)]
    network, features = build(levels=levels), maps(levels=levels)
    alive, pointers = [], []

    def handed_over():
        for level in reversed(levels):
            pointers.append([one for one in alive if one() is not None])
            read = {layer: features[layer, level].clone() for layer in LAYERS}
            alive.extend(weakref.ref(one) for one in read.values())
            yield level, read
            del read

    with torch.no_grad():
        found = network.stream(handed_over())
    assert len(alive) == 15
    assert pointers == [[]] * 5, "maps of a level were alive when the next was made"
    torch.testing.assert_close(found, network(features), atol=1e-6, rtol=1e-5)


def test_the_sum_stays_in_place_without_gradients():
    network, features = build(), maps()
    parts = [{layer: features[layer, level] for layer in LAYERS} for level in LEVELS]
    with torch.no_grad():
        first = network.accumulate(None, LEVELS[0], parts[0])
        again = network.accumulate(first, LEVELS[1], parts[1])
    assert again is first
    total = network.accumulate(network.accumulate(None, LEVELS[0], parts[0]), LEVELS[1], parts[1])
    torch.testing.assert_close(total, first)
    assert total.requires_grad


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_checkpointing_changes_no_gradient(dropout):
    plain, features = build(dropout=dropout), maps()
    saved = {"plain": 0, "checkpoint": 0}
    gradients = {}
    for name in saved:
        network = build(dropout=dropout, checkpoint=name == "checkpoint")
        network.load_state_dict(plain.state_dict())
        network.double()  # the sums are taken in another order

        def count(tensor, name=name):
            saved[name] += tensor.numel()
            return tensor

        torch.manual_seed(1)
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            loss = network(features).square().sum()
        loss.backward()
        gradients[name] = {key: value.grad for key, value in network.named_parameters()}
    for key, gradient in gradients["plain"].items():
        assert gradient.abs().sum() > 0, key
        torch.testing.assert_close(gradients["checkpoint"][key], gradient, atol=1e-12, rtol=1e-10)
    assert saved["checkpoint"] < saved["plain"] / 3


def test_dropout_acts_in_training_only():
    network, features = build(dropout=0.5), maps()
    assert not torch.equal(network(features), network(features))
    network.eval()
    same = build()
    same.load_state_dict(network.state_dict())
    assert torch.equal(network(features), same(features))


def test_halves_are_read_in_the_type_of_the_weights():
    network, features = build(), maps()
    for dtype in (torch.float16, torch.bfloat16):
        rounded = {pair: one.to(dtype) for pair, one in features.items()}
        found = network(rounded)
        assert found.dtype == torch.float32
        assert torch.equal(found, network({pair: one.float() for pair, one in rounded.items()}))
    assert copy.deepcopy(network).double()(features).dtype == torch.float64
    with torch.autocast("cpu", torch.bfloat16):
        rough = network(features)
    assert rough.dtype == torch.float32, "levels are summed up in the type of the weights"
    torch.testing.assert_close(rough, network(features), atol=0.1, rtol=0)


def test_logit_scale_is_a_constant_or_learned():
    constant, learned = build(), build(learn_scale=True)
    for network in (constant, learned):
        assert network.logit_scale.item() == pytest.approx(2.659260, abs=1e-6)
    assert "logit_scale" not in constant.state_dict()
    assert learned.state_dict().keys() - constant.state_dict().keys() == {"logit_scale"}
    assert learned.logit_scale.requires_grad and not constant.logit_scale.requires_grad
    assert constant.double().logit_scale.dtype == torch.float64, "it moves with the network"


def test_a_live_backbone_hands_over_one_level_at_a_time(unet):
    layers, levels = ["mid_block", "up_blocks.0"], ["t=5", "clean"]
    images = torch.rand(2, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    ids = ["a", "b"]

    def extract(asked):
        return unet.extract(images, FeatureRequest(layers, asked, dtype="float32"), ids=ids)

    whole = extract(levels)
    network = build(layers={layer: whole[layer, "clean"].shape[1] for layer in layers}, levels=levels).eval()
    with torch.no_grad():
        streamed = network.stream(
            (level, {layer: extract([level])[layer, level] for layer in layers}) for level in levels
        )
        torch.testing.assert_close(streamed, network(whole), atol=1e-5, rtol=0)
    sides = [whole[layer, "clean"].shape[-2:] for layer in layers]
    assert streamed.shape == (2, 16, max(h for h, _ in sides), max(w for _, w in sides))


@pytest.mark.parametrize("kind", [AggregationNetwork, AggregationHead])
def test_a_saved_network_comes_back(kind, tmp_path):
    options = {"classes": 4} if kind is AggregationHead else {"learn_scale": True}
    head = build(kind, temperature=2.0, size=[5, 3], dropout=0.1, **options).eval()
    loaded = load_head(save_head(head, tmp_path / "head", {"accuracy": 0.5}))
    assert type(loaded) is kind and not loaded.training
    assert list((loaded.network if kind is AggregationHead else loaded).layers) == list(LAYERS)
    assert torch.equal(loaded(maps()), head(maps()))


# The classification head ------------------------------------------------------------------------------------------


def test_class_scores_are_a_linear_map_of_the_mean_descriptor():
    head, features = build(AggregationHead, classes=4), maps()
    scores = head(features)
    assert scores.shape == (3, 4)
    torch.testing.assert_close(scores, head.fc(head.network(features).mean((2, 3))))
    scores.square().sum().backward()
    for name, parameter in head.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
    assert not torch.equal(build(AggregationHead, classes=4, dropout=0.5)(features), scores)


def test_a_batch_changes_nothing():
    head, features = build(AggregationHead, classes=4).eval(), maps()
    alone = head({pair: one[1:2] for pair, one in features.items()})
    torch.testing.assert_close(alone[0], head(features)[1], atol=1e-6, rtol=1e-5)


# Published weights ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["state dict", "hyperfeatures", "geoaware", "safetensors"])
def test_published_weights_are_read_in_every_form(form, tmp_path):
    trained = build(seed=5, learn_scale=form == "geoaware")
    state = {key: value.detach() for key, value in trained.state_dict().items()}
    network = build(seed=6, learn_scale=form == "geoaware")
    if form == "state dict":
        network.load_weights(state)
    elif form == "safetensors":
        save_file(state, tmp_path / "weights.safetensors")
        network.load_weights(tmp_path / "weights.safetensors")
    else:
        if form == "hyperfeatures":
            held = {"step": 5000, "config": {"lr": 1e-3, "dims": [6, 16]}, "aggregation_network": state}
        else:
            held = {**state, "self_logit_scale": torch.tensor(2.3)}
        torch.save(held, tmp_path / "weights.pt")
        network.load_weights(str(tmp_path / "weights.pt"))
    for key, value in network.state_dict().items():
        assert torch.equal(value, state[key]), key
    assert torch.equal(network(maps()), trained(maps()))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            {"layers": {"a": 6, "b": 16}},
            r"for 2 layers of 6, 16 channels, the network reads 3: up_blocks.0 \(6\), up_",
        ),
        ({"layers": {**LAYERS, "mid": 7}}, "layers of other channels: mid has 5, there 7; name the layers"),
        ({"layers": {"a": 16, "b": 6, "c": 5}}, "up_blocks.0 has 6, there 16; up_blocks.1 has 16, there 6"),
        ({"levels": ["clean"]}, "mix 3 maps, the network 6: 3 layers at 2 levels; name the levels"),
        ({"projection_dim": 32, "num_norm_groups": 4}, r"of another shape: .*conv2.weight \(8, 8, 3, 3\) in the file"),
        ({"learn_scale": True}, "hold a learned logit_scale; build with learn_scale=True"),
    ],
)
def test_weights_for_other_layers_are_refused(other, message):
    network = build()
    before = copy.deepcopy(network.state_dict())
    with pytest.raises(CheckpointError, match=message):
        network.load_weights(build(**other).state_dict())
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


def test_files_that_hold_no_such_weights(tmp_path):
    network = build()
    state = network.state_dict()
    del state["bottleneck_layers.1.0.conv3.norm.bias"]
    with pytest.raises(CheckpointError, match="1 keys missing: bottleneck_layers.1.0.conv3.norm.bias"):
        network.load_weights(state)
    with pytest.raises(CheckpointError, match="1 keys unexpected: extra"):
        network.load_weights({**network.state_dict(), "extra": torch.zeros(1)})
    torch.save({"step": 3}, tmp_path / "weights.pt")
    with pytest.raises(CheckpointError, match="weights.pt holds no weights of an aggregation network"):
        network.load_weights(tmp_path / "weights.pt")
    with pytest.raises(CheckpointError, match="no such file"):
        network.load_weights(tmp_path / "missing.pt")


# Bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layers": {}}, "needs layers and levels, each once"),
        ({"levels": []}, "needs layers and levels, each once"),
        ({"levels": ["clean", "clean"]}, "each once; got .* at .*'clean', 'clean'"),
        ({"layers": {"mid": 0}}, r"must have channels; got mid \(0\)"),
        ({"projection_dim": 18}, "multiple of 4 .* got 18 and 2"),
        ({"num_norm_groups": 3}, "divide projection_dim / 4; got 16 and 3"),
        ({"temperature": 0.0}, "temperature must be above 0"),
        ({"dropout": 1.0}, r"dropout in \[0, 1\); got 1.0 and 1.0"),
        ({"size": (4,)}, r"size must be \(h, w\)"),
        ({"size": (4, 0)}, r"each at least 1; got \(4, 0\)"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ConfigError, match=message):
        AggregationNetwork(**{"layers": LAYERS, "levels": LEVELS, **SMALL, **arguments})


def test_wrong_maps():
    network, features = build(), maps()
    with pytest.raises(UnknownNameError, match="map 'mid@clean'"):
        network({pair: one for pair, one in features.items() if pair != ("mid", "clean")})
    with pytest.raises(ConfigError, match=r"mid@clean is \(3, 4, 1, 1\), the network reads \(B, 5, h, w\)"):
        network({**features, ("mid", "clean"): torch.zeros(3, 4, 1, 1)})
    with pytest.raises(ConfigError, match=r"mid@clean is \(3, 5\)"):
        network({**features, ("mid", "clean"): torch.zeros(3, 5)})
    with pytest.raises(ConfigError, match=r"of clean are of batches of \[2, 3\]"):
        network({**features, ("mid", "clean"): torch.zeros(2, 5, 1, 1)})
    with pytest.raises(ConfigError, match=r"\(B, 54, h, w\), 2 levels of up_blocks.0 \(6\), .*; got \(3, 27, 4, 6\)"):
        network(torch.zeros(3, 27, 4, 6))


def test_levels_that_are_missing_unknown_or_twice():
    network, features = build(), maps()
    parts = {level: {layer: features[layer, level] for layer in LAYERS} for level in LEVELS}
    with pytest.raises(ConfigError, match=r"reads the levels t=90, clean, each once; got \['clean'\]"):
        network.stream([("clean", parts["clean"])])
    with pytest.raises(ConfigError, match="each once; got"):
        network.stream([*parts.items(), ("clean", parts["clean"])])
    with pytest.raises(UnknownNameError, match="level 't=91'; did you mean 't=90'"):
        network.stream([("t=91", parts["clean"])])
    with pytest.raises(UnknownNameError, match="map 'mid@clean'"):
        network.accumulate(None, "clean", {layer: parts["clean"][layer] for layer in list(LAYERS)[:2]})
