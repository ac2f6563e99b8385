import json

import numpy as np
import pytest
import torch

from diffrep.config import AdapterConfig
from diffrep.errors import CheckpointError
from diffrep.noise import DiscreteSchedule, FlowSchedule, SigmaSchedule
from diffrep.train.adapters import TimeAdapters, TimeAxis, load_adapters, positions, save_adapters

SMALL = AdapterConfig(width=16, depth=1, blocks=2)


def test_adapters_are_the_identity_at_first():
    adapters = TimeAdapters({"a.b": 6, "c": 4}, TimeAxis(0, 999), SMALL)
    features = {"a.b": torch.randn(2, 6, 3, 5), "c": torch.randn(2, 7, 4)}
    found = adapters(features, torch.tensor([[1, 500, 999], [2, 3, 4]]))
    assert found["a.b"].shape == (2, 3, 15, 6)
    for name, feature in features.items():
        assert all(torch.equal(found[name][:, time], positions(feature)) for time in range(3))


def test_adapters_treat_each_image_time_and_position_by_itself():
    adapters = TimeAdapters({"a": 6}, TimeAxis(0, 999), SMALL)
    generator = torch.Generator().manual_seed(5)
    for weight in adapters.parameters():  # much of what is zero at the start would hide mistakes
        weight.data += 0.2 * torch.randn(weight.shape, generator=generator)
    maps, times = torch.randn(2, 6, 3, 5), torch.tensor([[1, 500, 999], [2, 300, 400]])
    found = adapters({"a": maps}, times)["a"]
    assert found.shape == (2, 3, 15, 6)
    for image, time, place in np.ndindex(2, 3, 15):
        one = maps[image : image + 1, :, place // 5, place % 5][:, None]
        alone = adapters({"a": one}, times[image : image + 1, time : time + 1])["a"]
        torch.testing.assert_close(found[image, time, place], alone[0, 0, 0], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(found[0, 0], found[0, 2], atol=1e-2), "times have their say"


@pytest.mark.parametrize(
    ("schedule", "ends", "middle"),
    [
        (DiscreteSchedule.linear(), (0, 999), 499.5),
        (FlowSchedule(data_time=1), (0, 1), 0.5),
        (FlowSchedule(scale=1000.0), (0, 1000), 500),
        (SigmaSchedule(), (0.002, 80), 0.4),
    ],
)
def test_times_of_all_schedules_lie_on_one_axis(schedule, ends, middle):
    axis = TimeAxis.of(schedule)
    times = torch.tensor([float(ends[0]), middle, ends[1]])
    torch.testing.assert_close(axis.share(times), torch.tensor([0.0, 0.5, 1.0]), atol=1e-5, rtol=0)
    moved = axis.moved(middle, torch.tensor([-0.5, 0.0, 0.5, 2.0]))
    torch.testing.assert_close(moved, torch.tensor([*times.tolist(), ends[1]]), atol=1e-5, rtol=1e-5)


def test_damaged_adapters(tmp_path):
    adapters = TimeAdapters({"mid_block": 16}, TimeAxis(0, 999), SMALL)
    save_adapters(adapters, tmp_path, "clean@261", {})
    assert load_adapters(tmp_path).level == "clean@261"
    note = json.loads((tmp_path / "distill.json").read_text())
    (tmp_path / "distill.json").write_text(json.dumps(note | {"channels": {"mid_block": 8}}))
    with pytest.raises(CheckpointError, match="do not fit the network"):
        load_adapters(tmp_path)
    (tmp_path / "distill.json").write_text("{}")
    with pytest.raises(CheckpointError, match="does not describe adapters"):
        load_adapters(tmp_path)
    with pytest.raises(CheckpointError, match="no such file"):
        load_adapters(tmp_path / "none")
