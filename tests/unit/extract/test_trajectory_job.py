"""Features along trajectories in a store."""

from pathlib import Path

import pytest
import torch

from diffrep import ExtractConfig, FeatureRequest, FeatureStore, load_backbone, load_config
from diffrep.errors import ConfigError
from diffrep.extract import make_plan
from diffrep.extract.job import ExtractJob
from diffrep.store.repair import repair

CONFIGS = Path(__file__).parents[3] / "configs" / "extract"


@pytest.fixture
def config(unet_folder, image_folder, tmp_path):
    return ExtractConfig(
        backbone={"source": str(unet_folder), "device": "cpu"},
        data=str(image_folder),
        request=FeatureRequest("mid_block", ["inversion 2/4", "inversion 0/4"], pool=2, noise="inversion"),
        out=str(tmp_path / "store"),
        batch_size=4,
        unit_size=5,
    )


def test_a_store_of_an_inversion_goes_on_where_it_stopped(config, unet, tmp_path):
    store = ExtractJob(config).run()
    assert list(store.levels) == ["inversion 2/4", "inversion 0/4"]
    assert [level.time for level in store.levels.values()] == [500, 0]
    assert store.meta["trajectories"] == {"inversion of 4 steps": [0, 250, 500, 750]}
    assert store.meta["costs"]["before"] == {"inversion 0/4": 0, "inversion 2/4": 2}
    assert "guidance" not in store.meta["request"]
    job = ExtractJob(config)
    plan = job.plan()
    assert plan.flops == 2 * plan.network_flops + plan.forward_flops
    images = torch.stack([job.images[row] for row in range(6)])
    ids = [job.images.id(row) for row in range(6)]
    live = unet.extract(images, config.request, ids=ids)
    rows = [store.ids.index(name) for name in ids]
    for spec in config.request.levels:
        torch.testing.assert_close(store["mid_block", spec][rows], live["mid_block", spec], atol=2e-3, rtol=2e-3)
    before = store["mid_block", "inversion 2/4"].clone()
    unit = sorted(Path(config.out, "units").rglob("*.json"))[1]
    unit.unlink()
    repair(config.out)
    again = ExtractJob(config).run()
    assert torch.equal(again["mid_block", "inversion 2/4"], before)
    assert FeatureStore(config.out).verify() == []


def test_a_job_tells_its_work_and_its_time(config):
    job = ExtractJob(config)
    path = "path      inversion of 4 steps; calls of the network: 2 to the end and 1 to the deepest layer"
    assert path in job.text()
    assert "inversion 2/4 (t 500, sigma" in job.text()
    assert "from one batch" in job.expected_time()


def test_a_store_describes_images_that_exist(config):
    request = FeatureRequest("mid_block", "generation 0/4", noise="generation")
    with pytest.raises(ConfigError, match="a store holds features of a data set's; use Backbone.extract"):
        ExtractJob(config.model_copy(update={"request": request}))


def test_the_published_recipe():
    config = load_config(ExtractConfig, [CONFIGS / "hyperfeatures-sd15-inversion.yaml"], ["data=X", "out=Y"])
    backbone = load_backbone("sd15", device="meta")
    plan = make_plan(backbone, config.request, config.data.size, config.data.size)
    assert list(plan.addresses) == [f"up_blocks.{i}.resnets.{j}.conv2" for i in range(4) for j in range(3)]
    assert [level.time for level in plan.levels.levels.values()] == [-1, *(960 - 20 * k for k in range(45, -1, -5))]
    assert (plan.legs[0].full, plan.legs[0].calls, plan.forwards) == (49, 50, 50)
    assert plan.bytes == 156_794_880
    assert plan.flops < plan.encode_flops + 50 * plan.network_flops
