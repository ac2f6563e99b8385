import copy
import json
import re

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard

from diffrep import FeatureRequest, load_backbone
from diffrep.errors import CheckpointError, ConfigError, UnknownNameError
from diffrep.heads import (
    ConvHead,
    DifFormer,
    Head,
    LinearHead,
    MatryoshkaHead,
    MLPHead,
    load_head,
    save_head,
)


def run_snippet(folder):
    """Runs the code of a model card and returns what it leaves behind."""
    code = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL).group(1)
    names = {}
    exec(code, names)
    return names


@pytest.mark.parametrize("case", ["one map", "concatenated", "difformer", "matryoshka"])
def test_the_card_says_how_to_apply_the_head(case, unet_folder, tmp_path, capsys):
    layers, levels = ["mid_block", "up_blocks.0"], ["t=5", "clean"]
    about = {"backbone": str(unet_folder), "layers": layers, "levels": levels, "dataset": "moons", "accuracy": 0.8125}
    about["class_names"] = ["full", "new"]
    request = FeatureRequest(layers=layers, levels=levels, pool="none" if case == "difformer" else "mean")
    unet = load_backbone(unet_folder, device="cpu")
    features = unet.extract(torch.rand(1, 1, 16, 16), request)
    length = sum(value.shape[1] for value in features.values())
    if case == "one map":
        about |= {"layers": layers[:1], "levels": levels[1:]}
        head = ConvHead(features[layers[0], "clean"].shape[1], 2, width=4)
    elif case == "difformer":
        shapes = {layer: features[layer, "clean"].shape[1:] for layer in layers}
        head = DifFormer(shapes, levels, 2, width=8)
    else:
        about["pool"] = "mean"
        head = LinearHead(length, 2) if case == "concatenated" else MatryoshkaHead(length, 2)
    folder = save_head(head, tmp_path / "head", about)
    found = run_snippet(folder)
    assert found["scores"].shape == (2, 2)
    assert re.search(r"\['(full|new)', '(full|new)'\]", capsys.readouterr().out)
    card = ModelCard.load(folder / "README.md")
    assert card.data.library_name == "diffrep" and card.data.metrics == ["accuracy"]
    assert type(head).__name__ in card.data.tags
    assert card.data.eval_results[0].metric_value == 0.8125
    assert "| accuracy | 0.8125 |" in card.text and "| levels | " in card.text


def test_a_card_without_facts_still_loads_the_head(tmp_path):
    folder = save_head(LinearHead(3, 2), tmp_path / "head", {})
    assert f"head = load_head('{folder}')" in (folder / "README.md").read_text()
    assert "load_head('me/head')" in LinearHead(3, 2).generate_model_card("me/head").text


def test_saving_again_replaces_the_head(tmp_path):
    save_head(LinearHead(3, 2), tmp_path, {"accuracy": 0.5})
    (tmp_path / "notes.txt").write_text("mine")
    save_head(ConvHead(3, 2, width=4), tmp_path, {"accuracy": 0.625})
    assert isinstance(load_head(tmp_path), ConvHead)
    assert "0.625" in (tmp_path / "README.md").read_text() and (tmp_path / "notes.txt").read_text() == "mine"
    assert {p.name for p in tmp_path.iterdir()} == {
        "model.safetensors",
        "config.json",
        "about.json",
        "README.md",
        "notes.txt",
    }


def test_heads_are_not_written_over_other_things(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    for place in (tmp_path, tmp_path / "config.json"):
        with pytest.raises(ConfigError, match="holds no whole head"):
            save_head(LinearHead(3, 2), place, {})
    assert [p.name for p in tmp_path.iterdir()] == ["config.json"]
    with pytest.raises(ConfigError, match="plain JSON"):
        save_head(LinearHead(3, 2), tmp_path / "new", {"accuracy": torch.tensor(1.0)})
    with pytest.raises(ConfigError, match="LinearHead cannot be saved: dim must be plain JSON"):
        save_head(LinearHead(np.int64(3), 2), tmp_path / "new", {})
    assert not (tmp_path / "new").exists()


def test_a_save_that_fails_leaves_no_half_head(tmp_path):
    save_head(LinearHead(3, 2), tmp_path, {})
    with pytest.raises(ConfigError, match="must be plain JSON"):
        save_head(LinearHead(np.int64(4), 2), tmp_path, {})
    assert load_head(tmp_path).dim == 3
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors").mkdir()  # so that the weights cannot be written
    with pytest.raises(Exception, match="directory"):
        save_head(LinearHead(3, 2), tmp_path, {})
    with pytest.raises(CheckpointError, match="holds no whole head"):
        load_head(tmp_path)


def test_a_copied_head_saves_its_own_arguments(tmp_path):
    copied = copy.deepcopy(MLPHead(3, 2, hidden=(5,)))
    save_head(copied, tmp_path, {})
    torch.testing.assert_close(load_head(tmp_path)(torch.ones(1, 3)), copied(torch.ones(1, 3)))


class Centroids(Head):
    """A head of a user's own."""

    def __init__(self, dim: int, classes: int):
        super().__init__()
        self.means = torch.nn.Parameter(torch.arange(classes * dim, dtype=torch.float32).view(classes, dim))

    def forward(self, x):
        return -torch.cdist(x, self.means)


def test_a_head_of_ones_own_is_found(tmp_path):
    head = Centroids(3, 2)
    save_head(head, tmp_path, {})
    loaded = load_head(tmp_path)
    assert type(loaded) is Centroids and torch.equal(loaded.means, head.means)
    assert loaded.about["class"] == f"{__name__}.Centroids"


def test_loading_says_what_is_wrong(tmp_path):
    with pytest.raises(CheckpointError, match="no head at .*nowhere: it is no folder"):
        load_head(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="holds no whole head: about.json is missing"):
        load_head(tmp_path)
    save_head(MLPHead(3, 2, [4]), tmp_path, {})
    with pytest.raises(CheckpointError, match="holds a MLPHead, not a LinearHead; open it with load_head"):
        LinearHead.from_pretrained(tmp_path)
    about = json.loads((tmp_path / "about.json").read_text())
    (tmp_path / "about.json").write_text(json.dumps({**about, "class": "MLPHaed"}))
    with pytest.raises(UnknownNameError, match="unknown head 'MLPHaed'; did you mean 'MLPHead'"):
        load_head(tmp_path)
    (tmp_path / "about.json").write_text("[]")
    with pytest.raises(CheckpointError, match="does not say which head"):
        load_head(tmp_path)
    (tmp_path / "about.json").write_text(json.dumps(about))
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "hidden": [4, 5]}))
    with pytest.raises(CheckpointError, match="do not fit its config.json"):
        load_head(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    weights = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(weights[:-4])
    with pytest.raises(CheckpointError, match="do not fit"):
        load_head(tmp_path)
