"""REPA's loss, projector and gradients, on the module that is trained, against the published code's numbers."""

import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from diffrep import load_backbone
from diffrep.backbones.fresh import trainable
from diffrep.config import AlignConfig
from diffrep.train.alignment import AlignmentTerm
from diffrep.train.module import AlignedModel

TOLERANCE = {"atol": 2e-5, "rtol": 0}
CASES = [f"{path}.{density}" for path in ("linear", "cosine") for density in ("uniform", "lognormal")]
LAYER, WIDTH, TARGET = "blocks.1", 64, 48


@pytest.fixture(scope="module")
def numbers(golden):
    folder = golden / "repa"
    return load_file(folder / "losses.safetensors") | load_file(folder / "projection.safetensors")


@pytest.fixture(scope="module")
def scalars(golden):
    return json.loads((golden / "repa" / "projection.json").read_text())


def term(name="repa"):
    return AlignmentTerm(name, AlignConfig(preset="repa", stored="z", width=WIDTH), [LAYER], TARGET)


@pytest.fixture
def model(golden):
    """The published network and projector in the module that a run trains."""
    folder = golden / "dit"
    config = json.loads((folder / "repa_sit_tiny.json").read_text())["config"]
    file = folder / "repa_sit_tiny.safetensors"
    backbone = load_backbone(file, family="repa", config=config, device="cpu")
    projectors = term().projectors({LAYER: WIDTH})
    (projector,) = projectors.values()
    prefix = "projectors.0."
    state = {name.removeprefix(prefix): w.float() for name, w in load_file(file).items() if name.startswith(prefix)}
    projector.load_state_dict(state)
    return AlignedModel(trainable(backbone.network), backbone, {"repa": projectors}, {"repa": [LAYER]})


def as_map(tokens):
    return tokens.transpose(1, 2).unflatten(2, (4, 4))


def losses(model, noised, time, velocity, numbers, target="target_z"):
    """Denoising losses (B,) and projection loss."""
    output, projected = model(noised, time, {"labels": numbers["labels"]})
    found = term().losses(projected["repa"], {LAYER: as_map(numbers[target])})
    return (output - velocity).square().mean((1, 2, 3)), found


def losses_of(case, model, numbers, target="target_z"):
    noised, time, velocity = (numbers[f"{case}.{name}"] for name in ("xt", "time", "target"))
    return losses(model, noised, time.flatten(), velocity, numbers, target)


def test_projections(model, golden):
    io = load_file(golden / "dit" / "repa_sit_tiny_io.safetensors")
    projected = model(io["x"], io["t"], {"labels": io["y"]})[1]["repa"][LAYER]
    torch.testing.assert_close(projected, as_map(io["zs_0"]), **TOLERANCE)


@pytest.mark.parametrize("case", CASES)
def test_losses_and_gradients(model, case, numbers, scalars):
    denoising, found = losses_of(case, model, numbers)
    expected = scalars[case]
    torch.testing.assert_close(denoising, torch.tensor(expected["denoising"]), **TOLERANCE)
    assert found[LAYER].item() == pytest.approx(expected["proj"], abs=2e-5)
    total = denoising.mean() + term().total(found, 0)
    assert total.item() == pytest.approx(expected["total_0p5"], abs=2e-5)

    total.backward()
    norm = nn.utils.get_total_norm([weight.grad for weight in model.parameters() if weight.grad is not None])
    assert norm.item() == pytest.approx(expected["grad_norm"], abs=1e-4)
    weights = dict(model.network.named_parameters())
    (projector,) = model.projectors["repa"].values()
    weights |= {f"projectors.0.{name}": weight for name, weight in projector.named_parameters()}
    stored = {name.removeprefix(f"{case}.grad."): g for name, g in numbers.items() if name.startswith(f"{case}.grad.")}
    assert len(stored) == (7 if case.endswith("uniform") else 0)
    for name, gradient in stored.items():
        rows = slice(None, None, 3) if name.endswith("qkv.weight") else slice(None)  # a third of the rows is kept
        torch.testing.assert_close(weights[name].grad[rows], gradient, atol=1e-4, rtol=0)


def test_two_encoders(model, numbers, scalars):
    with torch.no_grad():
        each = [losses_of("linear.uniform", model, numbers, name)[1][LAYER] for name in ("target_z", "target_z2")]
    assert (sum(each) / 2).item() == pytest.approx(scalars["linear.uniform.two_encoders"]["proj"], abs=2e-5)


def test_three_steps_of_training(model, numbers, scalars):
    optimizer = torch.optim.AdamW([w for w in model.parameters() if w.requires_grad], lr=1e-4, weight_decay=0)
    model.train()  # as in a run; labels are not dropped
    clean = numbers["images"]
    for expected, eps, time in zip(scalars["train3"], numbers["train3.noise"], numbers["train3.time"], strict=True):
        share = time.view(-1, 1, 1, 1)
        denoising, found = losses(model, (1 - share) * clean + share * eps, time, eps - clean, numbers)
        total = denoising.mean() + term().total(found, 0)
        optimizer.zero_grad()
        total.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        assert denoising.mean().item() == pytest.approx(expected["loss"], abs=2e-5)
        assert found[LAYER].item() == pytest.approx(expected["proj_loss"], abs=2e-5)
        assert total.item() == pytest.approx(expected["total"], abs=2e-5)
        assert norm.item() == pytest.approx(expected["grad_norm_before_clip"], abs=1e-4)
