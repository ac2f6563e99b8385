"""Numbers, colours and axes of the report."""

import re

import numpy as np
import pytest

from diffrep.report import pca_rgb
from diffrep.report.axes import Axis, log_axis, score_axis, score_ticks, spread
from diffrep.report.colours import SCORES, paint, words
from diffrep.report.confusion import bars, wilson
from diffrep.report.formats import breakable, choices, clipped, percent, setting, short


def test_text_on_the_scale_keeps_its_contrast():
    def luminance(colour):
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    def contrast(one, other):
        low, high = sorted((luminance(one), luminance(other)))
        return (high + 0.05) / (low + 0.05)

    for step in range(101):
        day, night = re.findall("#[0-9a-f]{6}", paint(SCORES, step / 100))
        kinds = words(SCORES, step / 100)
        assert contrast(day, "#ffffff" if "dark" in kinds else "#0d1720") > 4
        assert contrast(night, "#0d1720" if "lit" in kinds else "#ffffff") > 4


def test_wilson_interval():
    # Worked by hand: 8 of 10.
    low, high = wilson(8, 10)
    assert low == pytest.approx(0.4902, abs=1e-4)
    assert high == pytest.approx(0.9433, abs=1e-4)
    assert wilson(0, 5)[0] == 0.0
    assert wilson(5, 5)[1] == 1.0
    assert bars([{"name": "a", "value": 0.5, "interval": None}], "recall")["bars"][0]["span"] is None


def test_numbers_for_readers():
    assert [short(v, "B") for v in (12, 999, 1234, 1e6, 2.34e9, 123e9)] == [
        "12 B", "999 B", "1.2 kB", "1 MB", "2.3 GB", "123 GB"
    ]  # fmt: skip
    assert [percent(v) for v in (0.0, 0.004, 0.05, 0.5, 1.0)] == ["0 %", "0.4 %", "5 %", "50 %", "100 %"]
    assert setting({"penalty": 0.01, "norm": None, "lrs": [0.1, 2], "head": {"kind": "mlp"}, "choices": ["x"]}) == (
        "penalty 0.01, lrs 0.1, 2, head (kind mlp)"
    )
    assert choices({"choices": [{"reading": "mid@t=50 pooled to 2 x 2", "penalty": 0.1, "norm": None}]}) == [
        "mid@t=50 pooled to 2 x 2, penalty 0.1"
    ]
    assert choices({"k": 5}) == []
    assert len(clipped("word " * 90)) <= 150
    assert breakable("down_blocks.0.resnets.1<") == "down_blocks.0.<wbr>resnets.1&lt;"


def test_axes():
    axis = Axis(0.0, 1.0, 100, 0)
    assert (axis.at(0), axis.at(0.5), axis.at(1)) == (100, 50, 0)
    assert axis.ticks() == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    axis = log_axis([10, 1000], 0, 100)
    assert axis.at(100) == pytest.approx(50)
    assert 100 in [round(tick) for tick in axis.ticks()]
    axis = score_axis([0.5, 0.5], 100, 0)
    assert len(score_ticks(axis)) >= 2, "equal scores still have an axis"
    placed = spread([10, 11, 12, 300], 16, 0, 100)
    assert min(np.diff(placed)) >= 16
    assert max(placed) <= 100


def test_pca_colours():
    random = np.random.default_rng(0)
    maps = random.normal(size=(3, 6, 4, 4)) * np.array([9, 4, 2, 0.1, 0.1, 0.1])[None, :, None, None]
    colours = pca_rgb(maps)
    assert colours.shape == (3, 4, 4, 3)
    assert colours.dtype == np.uint8
    red = colours[..., 0].astype(float).ravel()
    assert abs(np.corrcoef(red, maps[:, 0].ravel())[0, 1]) > 0.98, "red is the direction of most variance"
    flat = pca_rgb(np.ones((2, 2, 3, 3)))
    assert np.unique(flat).tolist() == [127], "a constant map is mid-grey, and a third component is not there"
