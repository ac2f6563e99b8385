import shutil

import numpy as np
import pytest
import torch

from diffrep import FeatureStore, load_backbone, open_images, run_extract, run_probe
from diffrep.config import DataConfig, ExtractConfig, FeatureRequest, ProbeConfig
from diffrep.errors import DiffrepError
from diffrep.probe.baselines import pixels, untrained

DATA = DataConfig(path="fashion-demo", size=32, fit="pad", limit={"train": 80, "test": 30})


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return run_extract(
        ExtractConfig(
            backbone="fashion-unet",
            data=DATA,
            request={"layers": ["down_blocks.1", "mid_block"], "levels": [1, 20, 100], "pool": 2},
            out=tmp_path_factory.mktemp("store"),
        )
    )


def config(store, **options):
    return ProbeConfig(store=store.path, finalists=1, neighbours=(3,), missing="allow", **options)


def test_the_probe_compares_with_pixels_and_the_untrained_network(store, tmp_path):
    wanted = config(store, out=tmp_path, baselines=("pixels", "untrained"))
    metrics = run_probe(wanted)
    scores = {score["name"]: score for score in metrics["scores"]}
    raw, blank = scores["linear on raw pixels"], scores["linear on the untrained network"]
    assert (raw["layer"], raw["dim"], raw["bytes"], raw["flops"]) == ("pixels", 1024, None, None)
    assert blank["layer"] in store.layers
    assert {cell["layer"] for cell in metrics["cells"]} == set(store.layers), "baselines are no cells of the map"
    assert len(list(tmp_path.glob("untrained-*/meta.json"))) == 1
    assert run_probe(wanted)["scores"] == metrics["scores"]
    assert len(list(tmp_path.glob("untrained-*/meta.json"))) == 1, "what was extracted is used again"


def test_pixels_are_the_samples_of_the_store(store):
    images = open_images(DATA, 1)
    given = pixels(store, config(store))
    assert given.shape == (110, 32 * 32)
    assert torch.equal(given[85], images[85].flatten())


def test_the_untrained_store_holds_a_network_with_random_weights(store, tmp_path):
    blank = untrained(store, config(store), ["t=20"], tmp_path)
    assert list(blank.levels) == ["t=20"]
    assert (blank.ids, blank.layers) == (store.ids, store.layers)
    assert not np.allclose(blank.numpy("mid_block", 20), store.numpy("mid_block", 20), atol=0.1)
    images, request = open_images(DATA, 1), FeatureRequest("mid_block", 20, pool=2)
    four = torch.stack([images[row] for row in range(4)])
    expected = load_backbone("fashion-unet", init_seed=0).extract(four, request, ids=store.ids[:4])
    torch.testing.assert_close(blank["mid_block", 20][:4], expected["mid_block", 20], atol=2e-3, rtol=2e-3)


def test_a_store_that_does_not_name_its_images_has_no_pixels(store, tmp_path):
    copy = shutil.copytree(store.path, tmp_path / "copy")
    (copy / "config.yaml").unlink()
    with pytest.raises(DiffrepError, match="config.yaml"):
        run_probe(config(FeatureStore(copy), baselines="pixels"))
