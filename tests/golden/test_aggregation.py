"""Diffusion Hyperfeatures' aggregation network, its loss and its gradients, number for number."""

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from diffrep.correspond.losses import cell_index, contrastive_loss
from diffrep.heads.aggregation import AggregationNetwork

ATOL = 1e-5
IDS = [(i, j) for i in range(4) for j in range(3)]
CHANNELS = dict(zip((f"up_blocks.{i}.resnets.{j}.conv2" for i, j in IDS), [32] * 6 + [24] * 3 + [16] * 3, strict=True))
SAVED = {"onestep": [0], "inv10": [9, 6, 0]}


@pytest.fixture(scope="module")
def golden_numbers(golden):
    return load_file(golden / "correspondence" / "aggregation.safetensors")


@pytest.fixture(scope="module")
def features(golden, golden_numbers):
    """Native maps of each run by (layer, level); the first level of `inv10` is the clean image, as `onestep`."""
    onestep = load_file(golden / "correspondence" / "hyperfeatures_onestep.safetensors")

    def stored(run, save, i, j):
        if run == "onestep" or save == 9:
            one = onestep[f"onestep.resnet.{i}.{j}.save0"]
            return one if run == "onestep" else one[:1]
        return golden_numbers[f"inv10.resnet.{i}.{j}.save{save}"]

    return {
        run: {
            (name, f"save {save}"): stored(run, save, i, j)
            for save in saves
            for (i, j), name in zip(IDS, CHANNELS, strict=True)
        }
        for run, saves in SAVED.items()
    }


def network_of(golden_numbers, run):
    network = AggregationNetwork(CHANNELS, [f"save {k}" for k in SAVED[run]], projection_dim=32, num_norm_groups=8)
    start = f"{run}.state."
    network.load_weights(
        {key.removeprefix(start): one for key, one in golden_numbers.items() if key.startswith(start)}
    )
    return network


def concatenated(maps):
    return torch.cat([F.interpolate(one, (16, 16), mode="bilinear", align_corners=False) for one in maps.values()], 1)


@pytest.mark.parametrize("run", SAVED)
@pytest.mark.parametrize("form", ["streaming", "concatenated"])
def test_descriptors(golden_numbers, features, run, form):
    network = network_of(golden_numbers, run)
    with torch.no_grad():
        found = network(features[run] if form == "streaming" else concatenated(features[run]))
    torch.testing.assert_close(found, golden_numbers[f"{run}.out"], atol=ATOL, rtol=0)


@pytest.mark.parametrize("checkpoint", [False, True])
def test_loss_and_gradients(golden_numbers, features, checkpoint):
    network = network_of(golden_numbers, "onestep")
    network.checkpoint = checkpoint
    points = [golden_numbers[f"{side}_points_yx"].flip(1) for side in ("source", "target")]
    for side, one in zip(("source", "target"), points, strict=True):
        assert torch.equal(cell_index(one, (16, 16)), golden_numbers[f"{side}_idx"])
    found = network(features["onestep"])
    loss = contrastive_loss(found[:1], found[1:], points[:1], points[1:], network.logit_scale)
    assert loss.item() == pytest.approx(golden_numbers["onestep.loss"].item(), abs=ATOL)
    loss.sum().backward()
    first = network.bottleneck_layers[0][0].conv1.weight
    for parameter, name in ((network.mixing_weights, "mixing_weights"), (first, "conv1_l0")):
        torch.testing.assert_close(parameter.grad, golden_numbers[f"onestep.grad.{name}"], atol=ATOL, rtol=0)
