"""The code of the model cards that a probe writes gives the scores of the heads, as a reader of the card runs it."""

import re

import pytest
import torch
from safetensors.torch import load_file

from diffrep import FeatureStore
from diffrep.config import ExtractConfig, ProbeConfig
from diffrep.data import open_images
from diffrep.extract.job import run_extract
from diffrep.heads import load_head
from diffrep.probe import Reading, make_task, run_probe

# Features are float16, and a batch of another size may round a value to its neighbour.
ATOL, RTOL = 5e-3, 5e-3
LAYERS = ("down_blocks.0", "mid_block")
SMALL = {"epochs": 1, "width": 8, "depth": 1, "heads": 2, "batch_size": 16, "hidden": 8, "nesting": [4, 8]}
# By the name of the folder: what it reads, pooled to how many cells a side.
TRAINED = {
    "pooled-map": {"kind": "attention", "pool": 2},
    "stored-map": {"kind": "diffssl-attention"},
    "conv-map": {"kind": "conv", "pool": 3},
    "pooled-tokens": {"kind": "difformer", "pool": 2},
    "flat-pair": {"kind": "mlp", "pool": 2, "layers": LAYERS, "levels": [90]},
    "nested": {"kind": "matryoshka", "pool": 1},
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A store of maps of the bundled network, and the probe of it."""
    folder = tmp_path_factory.mktemp("cards")
    config = ExtractConfig.model_validate(
        {
            "backbone": {"source": "fashion-unet", "device": "cpu"},
            "data": {"path": "fashion-demo", "size": 32, "fit": "pad", "limit": {"train": 60, "test": 30}},
            "out": str(folder / "store"),
            # Without noise, which depends on the sample's id, and the card's images have none.
            "request": {"layers": LAYERS, "levels": [90, 300], "noise": "none"},
        }
    )
    run_extract(config)
    probe = ProbeConfig.model_validate(
        {
            "store": str(folder / "store"),
            "heads": ["logistic", "sgd", "ridge"],
            "combine": ["single", "layers", "levels", "all"],
            "pools": [2],
            "strengths": [0.1],
            "ridges": [0.1],
            "sgd": {"epochs": 2, "lrs": [0.1]},
            "finalists": 1,
            "max_iter": 10,
            "missing": "any",
            "trained": {
                name: SMALL | {"levels": [90, 300][: 1 + (name == "pooled-tokens")]} | one
                for name, one in TRAINED.items()
            },
            "device": "cpu",
        }
    )
    run_probe(probe)
    images = open_images(config.data, 1)
    store = FeatureStore(folder / "store")
    rows = make_task(store, probe).test
    return store, rows, torch.stack([images[int(row)] for row in rows]), folder / "store" / "probe" / "heads"


def code_of(folder, images):
    """Returns the code of a card, its images replaced by others."""
    code = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL).group(1)
    lines = ["images = given" if line.startswith("images =") else line for line in code.splitlines()]
    assert "images = given" in lines
    names = {"given": images}
    exec("\n".join(lines), names)
    return names


COMBINED = ["", "-all-layers", "-all-levels", "-all"]
FITTED = [head + kind for head in ("linear", "linear-SGD", "ridge") for kind in COMBINED]


def test_every_head_has_a_card(run):
    *_, heads = run
    assert {folder.name for folder in heads.iterdir()} == {*FITTED, *TRAINED}


@pytest.mark.parametrize("name", FITTED)
def test_the_card_of_a_fitted_head(run, name):
    store, rows, images, heads = run
    names = code_of(heads / name, images)
    head = load_head(heads / name)
    about = head.about
    assert about["read_pool"] == 2
    pairs = tuple((layer, level) for layer in about["layers"] for level in about["levels"])
    count = 4 if name.endswith("all") else 2 if "all" in name else 1
    assert len(pairs) == count
    with torch.no_grad():
        expected = head(Reading("", "", pairs, about["read_pool"]).read(store)[rows])
    torch.testing.assert_close(names["scores"], expected, atol=ATOL, rtol=RTOL)


@pytest.mark.parametrize("name", TRAINED)
def test_the_card_of_a_trained_head(run, name):
    _, _, images, heads = run
    names = code_of(heads / name, images)
    stored = load_file(heads.parent / "trained" / name / "seed-0" / "finished.safetensors")["scores"]
    assert load_head(heads / name).about["read_pool"] == TRAINED[name].get("pool")
    torch.testing.assert_close(names["scores"], stored, atol=ATOL, rtol=RTOL)
