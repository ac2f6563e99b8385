"""The published recipes in configs/extract name layers and levels that their networks have."""

from pathlib import Path

import pytest
import torch

from diffrep import ExtractConfig, load_backbone, load_config
from diffrep.backbones.opening import OFFICIAL
from diffrep.extract import make_plan

CONFIGS = Path(__file__).parents[3] / "configs" / "extract"
# Preset -> network that stands in for the user's path, what the layers expand to, native times, shape of the first.
BRANCHES = [f"up_blocks.{i}.resnets.{j}.conv2" for i in range(4) for j in range(3)]
PRESETS = {
    "dift-sd21": ("sd21", ["up_blocks.1"], [261], (1280, 48, 48)),
    "hyperfeatures-sd15": (
        "sd15",
        [f"up_blocks.{i}.resnets.{j}.conv2" for i in range(4) for j in range(3)],
        [-1],
        (1280, 8, 8),
    ),
    "cleandift": ("sd21", ["up_blocks.0", "up_blocks.1", "up_blocks.2"], [261], (1280, 24, 24)),
    "gd-adm256": ("adm-256", ["output_blocks.4"], [90], (1024, 2, 2)),
    "ddae-edm": ("edm-cifar10", ["dec.16x16_block1"], [0.0599473], (256,)),
    "dit-xl2": ("DiT-XL/2", ["blocks.13"], [121], (1152,)),
    "repa-sit-xl2": (None, ["blocks.7"], [0.1, 0.3, 0.5], (1152,)),
    "revelio-sd15": ("sd15", ["mid_block", "up_blocks.0", "up_blocks.1", "up_blocks.2"], [25], (1280,)),
}


@pytest.mark.parametrize("name", PRESETS)
def test_preset(name, tmp_path):
    network, layers, times, shape = PRESETS[name]
    config = load_config(ExtractConfig, [CONFIGS / f"{name}.yaml"], ["data=X", "out=Y"])
    if network is None:  # weights of the published size, which on the meta device are not read
        family, variant = config.backbone.family, config.backbone.config
        with torch.device("meta"):
            state = OFFICIAL[family].build(variant, None).state_dict()
        file = tmp_path / config.backbone.source
        torch.save(state, file)
        backbone = load_backbone(file, family=family, config=variant, device="meta")
    else:
        backbone = load_backbone(network, device="meta")
    assert list(backbone.addresses(config.request.layers)) == layers
    found = [backbone.schedule.level(spec).time for spec in config.request.levels]
    assert found == pytest.approx(times, rel=1e-5)
    size = config.data.size // (1 if network else 8)  # without a codec, a latent network takes latents
    plan = make_plan(backbone, config.request, size, size)
    assert plan.shapes[layers[0]] == shape
    assert plan.forwards == len(times) * config.request.draws
