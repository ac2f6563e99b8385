"""Alignment terms: projectors, distances, transforms, coefficients, default layers."""

import math

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from diffrep.backbones.fresh import new_network, template_of
from diffrep.config import AlignConfig
from diffrep.errors import ConfigError
from diffrep.noise import DiscreteSchedule, FlowSchedule
from diffrep.testing import TINY, tiny_backbone
from diffrep.train.alignment import AlignmentTerm, default_ema_layers, default_layers
from diffrep.train.distances import contrastive, cosine, dispersive, manifold, resized, smooth_l1, standardised

LAYERS = ["blocks.1", "blocks.3:input"]


def term(layers=LAYERS, channels=5, **settings):
    stored = {"stored": "lite0"} if isinstance(channels, int) else {}
    return AlignmentTerm("mine", AlignConfig(**stored, **settings), layers, channels)


def maps(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# Projectors ----------------------------------------------------------------------------------------------------------


def test_an_mlp_is_applied_to_each_position():
    projectors = term(width=7).projectors({"blocks.1": 4, "blocks.3:input": 6})
    assert [*projectors] == ["blocks/1", "blocks/3:input"]
    first, second = projectors.values()
    assert [*first.state_dict()] == [f"{number}.{part}" for number in (0, 2, 4) for part in ("weight", "bias")]
    assert [tuple(first[number].weight.shape) for number in (0, 2, 4)] == [(7, 4), (7, 7), (5, 7)]
    assert second(maps(2, 6, 3, 5)).shape == (2, 5, 3, 5)
    for number in (0, 2, 4):  # Xavier's bound, which is not that of torch's own init
        bound = math.sqrt(6 / sum(first[number].weight.shape))
        assert 0.7 * bound < first[number].weight.abs().max() <= bound and not first[number].bias.any()

    x = maps(2, 4, 3, 5)
    hidden = F.silu(F.linear(x[1, :, 2, 4], first[0].weight))
    at = F.linear(F.silu(F.linear(hidden, first[2].weight)), first[4].weight)
    torch.testing.assert_close(first(x)[1, :, 2, 4], at)


@pytest.mark.parametrize(("depth", "keys"), [(1, {"0"}), (2, {"0", "2"})])
def test_depth_of_an_mlp(depth, keys):
    (projector,) = term(LAYERS[:1], projector_depth=depth).projectors({"blocks.1": 4}).values()
    assert {name.split(".")[0] for name in projector.state_dict()} == keys
    assert projector(maps(1, 4, 2, 2)).shape == (1, 5, 2, 2)


def test_a_convolution_and_no_projector():
    (conv,) = term(LAYERS[:1], preset="irepa").projectors({"blocks.1": 4}).values()
    assert conv.kernel_size == (3, 3) and conv(maps(1, 4, 3, 3)).shape == (1, 5, 3, 3)
    x = maps(1, 5, 3, 3)
    (none,) = term(LAYERS[:1], projector="none").projectors({"blocks.1": 5}).values()
    assert torch.equal(none(x), x)
    with pytest.raises(ConfigError, match="align.mine: layer 'blocks.1' has 4 channels and its target 5; .* use mlp"):
        term(LAYERS[:1], projector="none").projectors({"blocks.1": 4})
    (none,) = term(LAYERS[:1], projector="none", distance="manifold").projectors({"blocks.1": 4}).values()
    assert none(x[:, :4]).shape[1] == 4, "samples are compared with one another, in whatever width"


def test_targets_of_other_widths_and_none():
    taught = term(channels=[3, 8], target="ema").projectors({"blocks.1": 4, "blocks.3:input": 4})
    assert [projector(maps(1, 4, 2, 2)).shape[1] for projector in taught.values()] == [3, 8]
    spread = term(channels=None, preset="dispersive").projectors({"blocks.1": 4, "blocks.3:input": 6})
    assert not [*spread.parameters()]
    with pytest.raises(ConfigError, match="align.mine: 2 layers with target 'ema' and 1 targets"):
        term(channels=[3], target="ema")


# Distances -----------------------------------------------------------------------------------------------------------


def test_cosine_and_smooth_l1_by_their_formulas():
    found, wanted = maps(2, 3, 4, 5), maps(2, 3, 4, 5, seed=1)
    a, b = found.double(), wanted.double()
    expected = -((a * b).sum(1) / (a.square().sum(1) * b.square().sum(1)).sqrt()).mean()
    assert cosine(found, wanted).item() == pytest.approx(expected.item(), abs=1e-7)
    gap = (a - b).abs()
    expected = torch.where(gap < 0.7, gap**2 / 1.4, gap - 0.35).mean()
    assert smooth_l1(found, wanted, 0.7).item() == pytest.approx(expected.item(), abs=1e-6)


def test_contrastive_by_its_formula():
    found, wanted = maps(4, 6, 2, 2), maps(4, 6, 3, 3, seed=1)
    a, b = found.mean((2, 3)), wanted.mean((2, 3))
    likeness = [[(a[i] @ b[j] / a[i].norm() / b[j].norm()).item() for j in range(4)] for i in range(4)]
    each = [-row[i] / 0.2 + math.log(sum(math.exp(one / 0.2) for one in row)) for i, row in enumerate(likeness)]
    assert contrastive(found, wanted, 0.2).item() == pytest.approx(sum(each) / 4, abs=1e-5)


@pytest.mark.parametrize("shift", [0, 30])
def test_dispersive_by_its_formula(shift):
    found = maps(5, 3, 2, 2) + shift
    z = found.flatten(1).double()
    total = sum(math.exp(-(z[i] - z[j]).square().sum().item() / (12 * 0.5)) for i in range(5) for j in range(5))
    assert dispersive(found, 0.5).item() == pytest.approx(math.log(total / 25), abs=1e-5)


def test_dispersive_at_its_ends():
    alone = maps(1, 3, 2, 2).requires_grad_()
    dispersive(alone, 0.5).backward()
    assert not alone.grad.any()
    same = maps(1, 3, 2, 2).repeat(4, 1, 1, 1).requires_grad_()
    loss = dispersive(same, 0.5)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-6) and same.grad.isfinite().all()
    assert dispersive(1000 * maps(4, 3, 2, 2), 0.5).item() == pytest.approx(-math.log(4))


def test_manifold_by_its_formula():
    found, wanted = maps(4, 3, 2, 3), maps(4, 7, 2, 3, seed=1)
    pairs = [(i, j) for i in range(4) for j in range(4)]
    alike = [
        torch.stack([torch.cosine_similarity(x[i].double(), x[j].double(), dim=0).mean() for i, j in pairs])
        for x in (found, wanted)
    ]
    assert manifold(found, wanted).item() == pytest.approx((alike[0] - alike[1]).square().mean().item(), abs=1e-6)
    turned = torch.linalg.qr(maps(7, 7, seed=2)).Q
    assert manifold(torch.einsum("cd,bdhw->bchw", 3 * turned, wanted), wanted).item() < 1e-10
    assert manifold(found[:1], wanted[:1]).item() == pytest.approx(0, abs=1e-10)
    loss = manifold(found.requires_grad_(), wanted.requires_grad_())
    loss.backward()
    assert found.grad.any() and wanted.grad is None


@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_gradients_of_distances_between_samples(temperature):
    found, wanted = maps(4, 3, 2, 2).double().requires_grad_(), maps(4, 3, 2, 2, seed=1).double()
    assert torch.autograd.gradcheck(lambda x: dispersive(x, temperature), found)
    assert torch.autograd.gradcheck(lambda x: contrastive(x, wanted, temperature), found)
    assert torch.autograd.gradcheck(lambda x: manifold(x, wanted), found)


# Transform and grids -------------------------------------------------------------------------------------------------


def test_spatial_normalisation():
    target = 3 * maps(2, 4, 3, 5) + 7
    tokens = target.flatten(2)
    for alpha in (0.6, 1.0):
        expected = (tokens - alpha * tokens.mean(2, keepdim=True)) / (tokens.var(2, keepdim=True).sqrt() + 1e-6)
        torch.testing.assert_close(standardised(target, alpha).flatten(2), expected)
    assert standardised(torch.ones(1, 1, 2, 2), 1.0).abs().max() == 0
    with pytest.raises(ConfigError, match="compares positions, and the targets have only one"):
        standardised(maps(2, 4, 1, 1), 1.0)


def test_resizing():
    x = maps(1, 2, 4, 6)
    assert torch.equal(resized(x, (4, 6)), x)
    torch.testing.assert_close(resized(x, (2, 3)), x.unflatten(2, (2, 2)).unflatten(4, (3, 2)).mean((3, 5)))
    larger = resized(x, (8, 12))
    torch.testing.assert_close(larger[..., 1, 0], 0.75 * x[..., 0, 0] + 0.25 * x[..., 1, 0])  # not its corners
    mixed = resized(x, (8, 3))
    torch.testing.assert_close(mixed, resized(resized(x, (4, 3)), (8, 3)))


@pytest.mark.parametrize("resize", ["target", "student"])
def test_which_of_two_grids_is_changed(resize):
    found, wanted = maps(2, 5, 2, 2), maps(2, 5, 4, 4, seed=1)
    loss = term(LAYERS[:1], resize=resize).losses({LAYERS[0]: found}, {LAYERS[0]: wanted})[LAYERS[0]]
    pair = (found, resized(wanted, (2, 2))) if resize == "target" else (resized(found, (4, 4)), wanted)
    assert torch.equal(loss, cosine(*pair))


def test_the_transform_comes_before_resizing():
    found, wanted = maps(2, 5, 2, 2), maps(2, 5, 4, 4, seed=1)
    loss = term(LAYERS[:1], preset="irepa").losses({LAYERS[0]: found}, {LAYERS[0]: wanted})[LAYERS[0]]
    assert torch.equal(loss, cosine(found, resized(standardised(wanted, 0.6), (2, 2))))


def test_contrastive_needs_the_mean():
    with pytest.raises(ConfigError, match="align.mine: .*takes them away; give a smaller alpha"):
        term(distance="contrastive", transform="spatial", alpha=1.0)


def test_names_of_terms():
    for name in ("a.b", "", "keys", "training", "mine_flip"):
        with pytest.raises(ConfigError, match=f"align: '{name}' cannot be a name here"):
            AlignmentTerm(name, AlignConfig(preset="dispersive"), LAYERS)


# The term ------------------------------------------------------------------------------------------------------------


def test_losses_are_in_fp32_under_autocast():
    found, wanted = maps(4, 5, 3, 3).bfloat16(), maps(4, 5, 3, 3, seed=1).bfloat16()
    for distance in ("cosine", "smooth_l1", "contrastive", "manifold"):
        one = term(LAYERS[:1], distance=distance)
        with torch.autocast("cpu", torch.bfloat16):
            loss = one.losses({LAYERS[0]: found}, {LAYERS[0]: wanted})[LAYERS[0]]
        exact = one.losses({LAYERS[0]: found.double().float()}, {LAYERS[0]: wanted.float()})[LAYERS[0]]
        assert loss.dtype == torch.float32 and torch.equal(loss, exact)
    spread = term(LAYERS[:1], None, preset="dispersive")
    with torch.autocast("cpu", torch.bfloat16):
        loss = spread.losses({LAYERS[0]: found})[LAYERS[0]]
    assert torch.equal(loss, dispersive(found.float(), 0.5))


def test_total_is_the_weighted_mean_over_layers():
    found = {layer: maps(2, 5, 3, 3, seed=seed) for seed, layer in enumerate(LAYERS)}
    wanted = {layer: maps(2, 5, 3, 3, seed=9) for layer in LAYERS}
    one = term(weight=0.25)
    losses = one.losses(found, wanted)
    assert [*losses] == LAYERS
    assert one.total(losses, 0).item() == pytest.approx(0.25 * sum(loss.item() for loss in losses.values()) / 2)


@pytest.mark.parametrize(
    ("decay", "expected"),
    [("none", [0.8, 0.8, 0.8, 0.8]), ("linear", [0.8, 0.6, 0.4, 0.2]), ("cosine", [0.8, 0.682843, 0.4, 0.117157])],
)
def test_coefficients(decay, expected):
    one = term(weight=0.8, decay=decay, stop=4)
    assert [one.weight(step) for step in range(6)] == pytest.approx([*expected, 0, 0], abs=1e-6)
    assert [one.active(step) for step in range(6)] == [True] * 4 + [False] * 2
    assert term().weight(10**9) == 0.5 and term().active(10**9)


def test_a_term_that_is_off_leaves_zero_gradients():
    one = term(width=7, stop=1)
    projectors = one.projectors(dict.fromkeys(LAYERS, 4))
    projected = {layer: project(maps(2, 4, 3, 3)) for layer, project in zip(LAYERS, projectors.values(), strict=True)}
    zero = one.idle(projected)
    zero.backward()
    assert zero.item() == 0
    assert all(not weight.grad.any() for weight in projectors.parameters())


# Many processes ------------------------------------------------------------------------------------------------------

# Takes this rank's share of a batch through terms with each distance, and writes the mean losses and the gradients.
RANKS = """
import sys
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from diffrep import dist
from diffrep.config import AlignConfig
from diffrep.train.alignment import AlignmentTerm

state = dist.state()
rank, world = state.process_index, state.num_processes
assert world == int(sys.argv[2])
configs = {
    "cosine": AlignConfig(stored="z", width=6, stop=1),
    "smooth_l1": AlignConfig(stored="z", projector="conv", distance="smooth_l1", stop=1),
    "contrastive": AlignConfig(stored="z", width=6, distance="contrastive", stop=1),
    "dispersive": AlignConfig(preset="dispersive", stop=1),
    "manifold": AlignConfig(stored="z", projector="none", distance="manifold", stop=1),
}
terms = [AlignmentTerm(name, one, ["a.b"], 5 if one.target == "encoder" else None) for name, one in configs.items()]

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.trunks = nn.ModuleDict({term.name: nn.Conv2d(3, 4, 3) for term in terms})
        self.projectors = nn.ModuleDict({term.name: term.projectors({"a.b": 4}) for term in terms})

    def forward(self, x):
        return {name: {"a.b": self.projectors[name]["a/b"](trunk(x).sin())} for name, trunk in self.trunks.items()}

torch.manual_seed(0)
model = own = Model()
images, wanted = torch.randn(8, 3, 6, 6).chunk(world)[rank], torch.randn(8, 5, 2, 2).chunk(world)[rank]
if world > 1:
    model = DistributedDataParallel(own)
projected = model(images)
losses = {term.name: term.losses(projected[term.name], {"a.b": wanted})["a.b"] for term in terms}
sum(term.total({"a.b": losses[term.name]}, 0) for term in terms).backward()
found = {name: weight.grad.clone() for name, weight in own.named_parameters()}
if world > 1:
    for loss in losses.values():
        torch.distributed.all_reduce(loss.detach_())
found |= {name: loss.detach() / world for name, loss in losses.items()}
# DDP complains in a step that follows on one which left weights out.
for _ in range(2):
    own.zero_grad()
    projected = model(images)
    assert not any(term.active(1) for term in terms)
    sum(term.idle(projected[term.name]) for term in terms).backward()
assert all(not weight.grad.any() for weight in own.parameters())
if rank == 0:
    save_file(found, sys.argv[1])
del model, own
dist.teardown()
"""


@pytest.mark.mp
def test_two_processes_have_the_gradients_of_one(two_processes, tmp_path):
    found = []
    for ranks in (1, 2):
        done = two_processes.run(tmp_path / f"{ranks}", ranks, source=RANKS, ranks=ranks)
        assert done.codes == [0] * ranks, done.err
        found.append(load_file(tmp_path / f"{ranks}"))
    one, two = found
    assert {"cosine", "smooth_l1", "contrastive", "dispersive", "manifold", "trunks.dispersive.weight"} < {*one}
    for name, value in one.items():
        difference = (two[name] - value).norm() / value.norm()
        assert difference < 1e-5, f"{name}: {difference}"


# Default layers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("depth", "student", "teacher"), [(1, 0, 0), (4, 0, 2), (6, 1, 3), (12, 3, 7), (24, 7, 15), (28, 7, 19)]
)
def test_published_depths(depth, student, teacher):
    config = {"depth": depth, "hidden_size": 8, "num_heads": 2, "input_size": 4, "num_classes": 2}
    backbone = template_of(*new_network("sit", config), FlowSchedule(), "sit")
    assert default_layers(backbone) == [f"blocks.{student}"]
    assert default_ema_layers(backbone, ["blocks.0"]) == [f"blocks.{teacher}"]


@pytest.mark.parametrize(("kind", "layer"), [("unet2d", "mid_block"), ("adm", "middle_block"), ("edm", "enc.")])
def test_the_middle_of_a_unet(kind, layer, tmp_path):
    backbone = tiny_backbone(kind, tmp_path)
    (found,) = default_layers(backbone)
    encoder = [name for name in backbone.blocks() if name.startswith("enc.")]
    assert found == (encoder[-1] if kind == "edm" else layer)
    assert [*backbone.addresses([found])] == [found]
    assert default_ema_layers(backbone) == [found] and default_ema_layers(backbone, ["x"]) == ["x"]


def test_a_unet_without_a_middle():
    network, adapter = new_network("UNet2DModel", TINY["unet2d"][1] | {"mid_block_type": None})
    backbone = template_of(network, adapter, DiscreteSchedule.linear(), "unet")
    with pytest.raises(ConfigError, match="UNet2DModel has no middle block to align; name .* down_blocks.0, down_"):
        default_layers(backbone)
