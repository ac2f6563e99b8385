import numpy as np
import pytest

from diffrep import write_report
from diffrep.config import write_results
from diffrep.errors import ConfigError
from diffrep.report import PICTURES, pca_rgb

METRICS = {
    "title": "net on <photos>",
    "samples": {"train": 8, "val": 2, "test": 4, "classes": 2},
    "layers": [{"name": "mid", "shape": [4, 2, 2], "cost": 0.4}, {"name": "up", "shape": [4, 2, 2], "cost": 0.9}],
    "levels": [{"key": "t=5", "time": 5, "sigma": 0.1}, {"key": "t=50", "time": 50, "sigma": 0.3}],
    "cells": [
        {"layer": layer, "level": level, "linear": linear, "penalty": 0.1, "knn": 0.5, "neighbours": 10, "dim": 16}
        for layer, level, linear in (
            ("mid", "t=5", 0.6),
            ("mid", "t=50", 0.9),
            ("up", "t=5", 0.7),
            ("up", "t=50", 0.8),
        )
    ],
    "scores": [
        {
            "name": "linear",
            "head": "linear",
            "layer": "mid",
            "level": "t=50",
            "val": 0.9,
            "test": 0.875,
            "interval": [0.8, 0.95],
            "setting": {"penalty": 0.1},
        },
    ],
    "notes": ["a note"],
}


def test_the_page_shows_the_winner_and_needs_no_other_file(tmp_path):
    write_results(tmp_path, {"store": "x"}, 0, METRICS)
    colours = np.zeros((2, 3, 3, 3), np.uint8)
    np.savez(
        tmp_path / PICTURES,
        images=np.zeros((2, 8, 8), np.uint8),
        layers=["mid"],
        levels=["t=5"],
        **{"mid@t=5": colours},
    )
    page = write_report(tmp_path).read_text()
    assert "net on &lt;photos&gt;" in page, "text must be escaped"
    assert page.count("data:image/png;base64,") == 4
    assert "0.875" in page
    assert 'src="http' not in page
    assert page.count('class="dark best"') + page.count('class="best"') == 2, "one winner in each heat map"


def test_one_level_and_equal_values_are_drawn_too(tmp_path):
    cells = [{**cell, "linear": 0.5} for cell in METRICS["cells"][::2]]
    write_results(tmp_path, {}, 0, {**METRICS, "levels": METRICS["levels"][:1], "cells": cells})
    assert "t=5" in write_report(tmp_path).read_text()


def test_no_results(tmp_path):
    with pytest.raises(ConfigError, match="no results.json"):
        write_report(tmp_path)
    (tmp_path / "results.json").write_text("{")
    with pytest.raises(ConfigError, match="cannot read"):
        write_report(tmp_path)


def test_pca_finds_the_direction_of_most_variance():
    maps = np.zeros((2, 5, 4, 4))
    maps[:, 3] = np.linspace(0, 1, 32).reshape(2, 4, 4)
    colours = pca_rgb(maps)
    assert colours.shape == (2, 4, 4, 3)
    red = colours[..., 0].astype(int).ravel()
    assert (np.diff(red) >= 0).all()
    assert red[0] == 0
    assert red[-1] == 255
    assert (colours[..., 1:] == 127).all(), "components without variance are grey"
    assert pca_rgb(maps[:, :2]).shape == (2, 4, 4, 3)
