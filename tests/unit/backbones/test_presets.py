"""The published recipes in configs/extract name layers and levels that their networks have."""

from pathlib import Path

import pytest

from diffrep import ExtractConfig, load_backbone, load_config

CONFIGS = Path(__file__).parents[3] / "configs" / "extract"
# Preset -> network that stands in for the user's path, what the layers expand to, native times.
PRESETS = {
    "dift-sd21": ("sd21", ["up_blocks.1"], [261]),
    "hyperfeatures-sd15": ("sd15", [f"up_blocks.{i}.resnets.{j}.conv2" for i in range(4) for j in range(3)], [-1]),
    "cleandift": ("sd21", ["up_blocks.0", "up_blocks.1", "up_blocks.2"], [261]),
    "gd-adm256": ("adm-256", ["output_blocks.4"], [90]),
    "ddae-edm": ("edm-cifar10", ["dec.16x16_block1"], [0.0599473]),
    "dit-xl2": ("DiT-XL/2", ["blocks.13"], [121]),
    "repa-sit-xl2": (None, ["blocks.7"], [0.1, 0.3, 0.5]),
    "revelio-sd15": ("sd15", ["mid_block", "up_blocks.0", "up_blocks.1", "up_blocks.2"], [25]),
}


@pytest.mark.parametrize("name", PRESETS)
def test_preset(name, tmp_path):
    network, layers, times = PRESETS[name]
    config = load_config(ExtractConfig, [CONFIGS / f"{name}.yaml"], ["data=X", "out=Y"])
    if network is None:  # a file, of which nothing is read on the meta device
        file = tmp_path / config.backbone.source
        file.touch()
        backbone = load_backbone(file, family=config.backbone.family, config=config.backbone.config, device="meta")
    else:
        backbone = load_backbone(network, device="meta")
    assert list(backbone.addresses(config.request.layers)) == layers
    found = [backbone.schedule.level(spec).time for spec in config.request.levels]
    assert found == pytest.approx(times, rel=1e-5)
