import copy

import pytest
import torch
from torch.nn import functional as F

from diffrep import FeatureRequest
from diffrep.errors import ConfigError, LayerError
from diffrep.heads import load_head, save_head
from diffrep.heads.attention import AttentionPool
from diffrep.heads.difformer import DifFormer
from diffrep.heads.feedback import FeedbackNetwork, default_pairs, noised_inputs
from diffrep.heads.linear import LinearHead
from diffrep.testing import tiny_backbone

UNETS = {"unet2d": "up_blocks.0", "unet2d-condition": "up_blocks.0", "adm": "output_blocks.1"}


@pytest.fixture(scope="module", params=UNETS)
def case(request, tmp_path_factory):
    """A tiny U-Net, the layer that is read, a condition, and a noised input."""
    backbone = tiny_backbone(request.param, tmp_path_factory.mktemp(request.param))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, backbone.in_channels, backbone.sample_size, backbone.sample_size, generator=generator)
    cond = torch.randn(1, 5, 12, generator=generator) if request.param == "unet2d-condition" else None
    return backbone, UNETS[request.param], cond, x


def shapes_of(backbone, layers):
    size = backbone.sample_size
    return backbone.shapes(backbone.addresses(layers), size, size)


def make(backbone, read, levels=("t=90",), **options):
    torch.manual_seed(0)
    read = [read] if isinstance(read, str) else read
    head = DifFormer(shapes_of(backbone, read), levels, 3, pool=4, width=8, heads=2, depth=1)
    return FeedbackNetwork(backbone, head, read, **options)


def hooks(network):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in network.modules())


def test_pairs_are_mirrored(case):
    backbone, *_ = case
    if hasattr(backbone.network, "up_blocks"):
        assert default_pairs(backbone) == [("up_blocks.0", "down_blocks.1"), ("up_blocks.1", "down_blocks.0")]
    else:  # 4 input blocks, two output blocks a level
        assert default_pairs(backbone) == [
            ("output_blocks.1", "input_blocks.2"),
            ("output_blocks.3", "input_blocks.0"),
        ]


def test_without_feedback_the_second_pass_is_the_first(case):
    backbone, read, cond, x = case
    network = make(backbone, read).eval()
    for layer in network.feedback:
        layer[1].weight.data.zero_()
    found = network.maps(x, 90, cond)[read]
    torch.testing.assert_close(found, backbone.capture(x, 90, [read], cond)[read])


def test_feedback_reaches_the_skip_connections(case):
    """Written out with plain hooks, which change a target's output and whatever else holds it."""
    backbone, read, cond, x = case
    network = make(backbone, read).eval()
    (source, target), layer = network.pairs[0], network.feedback[0]
    alone = make(backbone, read, pairs=[(source, target)]).eval()
    alone.feedback[0].load_state_dict(layer.state_dict())
    wanted = layer(backbone.capture(x, 90, [source], cond)[source])

    def add(_, __, output):
        if isinstance(output, torch.Tensor):
            return output + F.interpolate(wanted, output.shape[-2:], mode="bilinear")
        hidden, residuals = output
        total = hidden + F.interpolate(wanted, hidden.shape[-2:], mode="bilinear")
        assert residuals[-1] is hidden
        return total, (*residuals[:-1], total)

    handle = backbone.network.get_submodule(target).register_forward_hook(add)
    try:
        expected = backbone.capture(x, 90, [read], cond)[read]
    finally:
        handle.remove()
    torch.testing.assert_close(alone.maps(x, 90, cond)[read], expected)


def test_training_lowers_the_loss_and_leaves_the_backbone_as_it_was(case):
    backbone, read, cond, x = case
    before = copy.deepcopy(backbone.network.state_dict())
    network, labels = make(backbone, read).train(), torch.tensor([0, 1, 2, 0, 1, 2])
    optimizer = torch.optim.Adam(network.parameters(), 1e-2)
    losses = []
    for _ in range(24):
        loss = F.cross_entropy(network({"t=90": (x, 90)}, cond), labels)
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in network.feedback.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    after = backbone.network.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert not backbone.network.training
    assert all(parameter.grad is None for parameter in backbone.network.parameters())
    assert network.feedback[0][1].num_batches_tracked == 24
    assert hooks(backbone.network) == 0


def test_only_feedback_and_head_are_saved(case):
    backbone, read, *_ = case
    keys = make(backbone, read).state_dict()
    assert {key.split(".")[0] for key in keys} == {"feedback", "head"}
    assert {key.split(".")[1] for key in keys if key.startswith("feedback")} == {"0", "1"}
    assert "feedback.0.0.weight" in keys
    assert "feedback.0.0.bias" not in keys


def test_the_trained_part_is_saved_and_attached(case, tmp_path):
    backbone, read, cond, x = case
    network = make(backbone, read)
    network({"t=90": (x, 90)}, cond)  # statistics of batch norm that are not the first ones
    network.eval()
    folder = save_head(network.trained, tmp_path / "head", {"accuracy": 0.5})
    assert "head.attach(backbone)" in (folder / "README.md").read_text()
    head = load_head(folder)
    assert head.state_dict().keys() == network.state_dict().keys()
    again = head.attach(backbone)
    assert not again.training
    torch.testing.assert_close(again({"t=90": (x, 90)}, cond), network({"t=90": (x, 90)}, cond))
    assert again.feedback[0][0].weight is head.feedback[0][0].weight
    with pytest.raises(ConfigError, match="without the network"):
        head(x)


def test_a_trained_part_fits_its_own_network(tmp_path):
    backbones = [tiny_backbone(kind, tmp_path / kind) for kind in ("unet2d", "adm")]
    head = make(backbones[0], "up_blocks.0").trained
    with pytest.raises(LayerError, match="up_blocks"):
        head.attach(backbones[1])
    head.feedback[0][0] = torch.nn.Conv2d(3, 5, 1, bias=False)
    with pytest.raises(ConfigError, match="takes 3 to 5 channels"):
        head.attach(backbones[0])


def test_noised_inputs_are_those_of_an_extraction(unet):
    images = torch.rand(2, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    request = FeatureRequest(layers=["mid_block"], levels=[5, 50], seed=3, dtype="float32")
    features = unet.extract(images, request)
    for level, (x, time) in noised_inputs(unet, images, [5, 50], seed=3).items():
        torch.testing.assert_close(unet.capture(x, time, ["mid_block"])["mid_block"], features["mid_block", level])
    clean = noised_inputs(unet, images, [5, 50], noise="none")
    torch.testing.assert_close(clean["t=5"][0], clean["t=50"][0])


def test_several_layers_and_levels(case):
    backbone, read, cond, x = case
    layers = [read, default_pairs(backbone)[1][0]]
    network = make(backbone, layers, levels=("t=90", "t=400")).eval()
    inputs = {"t=90": (x, 90), "t=400": (2 * x, torch.full((6,), 400))}
    scores = network(inputs, cond)
    maps = {level: network.maps(*given, cond) for level, given in inputs.items()}
    torch.testing.assert_close(scores, network.head({(la, le): maps[le][la] for la in layers for le in maps}))
    dim = sum(tensor.numel() for found in maps.values() for tensor in found.values()) // 6
    flat = FeedbackNetwork(backbone, LinearHead(dim, 3, norm="none"), layers).eval()
    flat.feedback.load_state_dict(network.feedback.state_dict())
    values = torch.cat([maps[le][la].flatten(1) for la in layers for le in maps], 1)
    torch.testing.assert_close(flat(inputs, cond), flat.head(values))


def test_a_head_of_one_map(case):
    backbone, read, cond, x = case
    (shape,) = shapes_of(backbone, [read]).values()
    network = FeedbackNetwork(backbone, AttentionPool(shape[0], shape[1:], 3, 8, 1, 2), [read])
    assert network({"t=90": (x, 90)}, cond).shape == (6, 3)


def test_hooks_are_gone_after_an_error(case):
    backbone, read, cond, x = case
    network = make(backbone, read)

    def fail(*_):
        raise ValueError("broken")

    handle = backbone.network.conv_out.register_forward_hook(fail) if hasattr(backbone.network, "conv_out") else None
    late = backbone.network.get_submodule(read).register_forward_pre_hook(fail)
    try:
        with pytest.raises(ValueError, match="broken"):
            network.maps(x, 90, cond)
    finally:
        late.remove()
        if handle is not None:
            handle.remove()
    assert hooks(backbone.network) == 0


def test_the_input_of_a_layer_may_be_read(case):
    backbone, read, cond, x = case
    network = make(backbone, f"{read}:input")
    maps = network.maps(x, 90, cond)
    assert maps[f"{read}:input"].requires_grad


def test_feedback_that_comes_too_late_is_refused(case):
    backbone, read, cond, x = case
    source, target = default_pairs(backbone)[1][0], read
    network = make(backbone, default_pairs(backbone)[0][1], pairs=[(source, target)])
    with pytest.raises(LayerError, match=f"feedback into {target} comes after all that the head reads"):
        network.maps(x, 90, cond)
    assert hooks(backbone.network) == 0


def test_a_transformer_needs_pairs_and_takes_them(tmp_path):
    backbone = tiny_backbone("sit", tmp_path)
    with pytest.raises(ConfigError, match="DiT is none that is known; give pairs="):
        make(backbone, "blocks.1")
    network = make(backbone, "blocks.1", pairs=[("blocks.2", "blocks.0")])
    x = torch.randn(2, 4, 8, 8)
    found = network.maps(x, 0.5)["blocks.1"]
    assert found.shape == (2, 16, 4, 4)
    found.sum().backward()
    assert network.feedback[0][0].weight.grad.abs().sum() > 0
    for parameter in network.feedback.parameters():
        parameter.data.zero_()
    torch.testing.assert_close(
        network.eval().maps(x, 0.5)["blocks.1"], backbone.capture(x, 0.5, ["blocks.1"])["blocks.1"]
    )


def test_errors(unet):
    with pytest.raises(LayerError, match="up_blocks.7"):
        make(unet, "up_blocks.0", pairs=[("up_blocks.7", "down_blocks.0")])
    with pytest.raises(LayerError, match="a target is named twice"):
        make(unet, "up_blocks.0", pairs=[("up_blocks.0", "down_blocks.0"), ("up_blocks.1", "down_blocks.0")])
    with pytest.raises(LayerError, match="'blocks' stands for 5 layers; name one"):
        make(unet, "up_blocks.0", pairs=[("blocks", "down_blocks.0")])
    with pytest.raises(LayerError, match="'time_embedding' is none"):
        make(unet, "up_blocks.0", pairs=[("up_blocks.0", "time_embedding")])
    with pytest.raises(ConfigError, match="no pairs"):
        make(unet, "up_blocks.0", pairs=[])
