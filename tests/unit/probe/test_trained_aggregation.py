"""The aggregation network as a trained head of a probe."""

import numpy as np
import pytest
import torch

from diffrep import FeatureStore
from diffrep.config import ProbeConfig, TrainedConfig
from diffrep.errors import ConfigError
from diffrep.heads import load_head, save_head
from diffrep.metrics import accuracy
from diffrep.probe import make_task
from diffrep.probe.trained import train_head
from diffrep.probe.trained_net import build_head, scores_of

PAIRS = [(layer, level) for layer in ("mid", "up") for level in ("t=5", "t=50")]
OPTIONS = {"width": 16, "dropout": 0.0, "batch_size": 16, "epochs": 15, "lr": 1e-2, "weight_decay": 0.01}


def test_it_learns_from_several_layers_and_levels(write_store, tmp_path):
    path = write_store(tmp_path / "store")
    store = FeatureStore(path)
    task = make_task(store, ProbeConfig(store=path))
    config = TrainedConfig(**OPTIONS)
    trained = train_head("aggregation", store, PAIRS, task, config, tmp_path / "run", 0, "accuracy")
    assert accuracy(trained.scores.argmax(1), task.labels[task.test]) > 0.75, "chance is 0.33"
    network = trained.head.network
    assert (list(network.layers), network.levels) == (["mid", "up"], ["t=5", "t=50"])
    # The level that tells the classes apart comes to count more than the other; at first all count alike.
    noisy, clear = network.shares().sum(1).tolist()
    assert clear > noisy
    again = load_head(save_head(trained.head, tmp_path / "head", {}))
    with torch.no_grad():
        features = {pair: store[pair][task.test] for pair in PAIRS}
        torch.testing.assert_close(scores_of("aggregation", again, features)[-1], trained.scores)


@pytest.mark.parametrize(("width", "groups"), [(384, 24), (128, 8), (16, 1), (4, 1), (56, 2)])
def test_its_group_norms_have_several_channels_a_group(width, groups):
    config = TrainedConfig(**{**OPTIONS, "width": width})
    head = build_head("aggregation", {("mid", "clean"): (5, 4, 3)}, 7, config)
    block = head.network.bottleneck_layers[0][0]
    assert block.conv1.norm.num_groups == groups
    assert head.fc.weight.shape == (7, width)
    assert head({("mid", "clean"): torch.zeros(2, 5, 4, 3)}).shape == (2, 7)


def test_what_it_cannot_do(write_store, tmp_path):
    with pytest.raises(ValueError, match="trained.aggregation: width 18 must be a multiple of 4"):
        ProbeConfig(store="x", trained={"aggregation": {"width": 18}})
    path = write_store(tmp_path / "store", shape=(6,))
    store = FeatureStore(path)
    task = make_task(store, ProbeConfig(store=path))
    assert np.array_equal(np.unique(task.test), np.arange(60, 90))
    for options, message in (({}, "'aggregation' reads maps"), ({"norm": "batch"}, "it takes none")):
        with pytest.raises(ConfigError, match=message):
            train_head(
                "aggregation", store, PAIRS, task, TrainedConfig(**OPTIONS, **options), tmp_path / "run", 0, "accuracy"
            )
