"""Two networks on one page: side by side, on one scale, each told from the other."""

import re

import numpy as np
import pytest

from diffrep.report import picture_file
from diffrep.report.headline import headline
from diffrep.report.heat import grids, heat_maps
from diffrep.report.markdown import markdown

BLOCKS = ["blocks.0", "blocks.1", "blocks.2"]


@pytest.fixture
def metrics(sample_metrics):
    """A U-Net, and a transformer whose scores lie above or below the U-Net's."""
    unet, other = sample_metrics(), sample_metrics(layers=BLOCKS, seed=1)
    heads = {"linear", "linear, SGD", "kNN"}
    joined = [
        score | {"network": network, "name": f"{score['name']} on {network}"}
        for network, found in (("net-a", unet), ("net-b", other))
        for score in found["scores"]
        if score["name"] in heads
    ]
    beside = {"network": "net-b", **{key: other[key] for key in ("layers", "levels", "costs", "cells")}}
    for cell in other["cells"]:
        cell["val"] -= 0.3
    free = [score for score in unet["scores"] if score["name"] not in heads]
    return unet | {"network": "net-a", "scores": joined + free, "beside": [beside]}


def test_maps_share_their_colours_and_frame_their_own_choice(metrics):
    tabs = heat_maps(metrics)
    assert [tab["head"] for tab in tabs] == ["linear", "linear, SGD", "kNN"]
    for tab, head in zip(tabs, ("logistic", "sgd", "knn"), strict=True):
        assert [laid["network"] for laid in tab["maps"]] == ["net-a", "net-b"]
        texts = []
        for laid in tab["maps"]:
            (score,) = [s for s in metrics["scores"] if (s["head"], s.get("network")) == (head, laid["network"])]
            framed = [
                (row["name"], level["key"])
                for row in laid["rows"]
                for cell, level in zip(row["cells"], laid["levels"], strict=True)
                if cell["chosen"]
            ]
            assert framed == [(score["layer"], score["level"])]
            texts += [(float(cell["text"]), cell["paint"]) for row in laid["rows"] for cell in row["cells"]]
        assert (min(texts)[0], max(texts)[0]) == (round(tab["low"], 3), round(tab["high"], 3))
        assert (min(texts)[1], max(texts)[1]) == (tab["legend"][0], tab["legend"][-1])


def test_a_card_for_each_network(metrics):
    cards = [card for card in headline(metrics, grids(metrics)[0]) if card["title"] == "Best layer and level"]
    assert [card["where"][0] for card in cards] == ["net-a", "net-b"]
    assert cards[1]["where"][1] in [*BLOCKS, "all layers"]


def test_the_page_shows_both(metrics, tmp_path, write_run, page_of):
    folder = write_run(tmp_path, metrics)
    random = np.random.default_rng(2)
    for network, layer in ((None, "mid_block"), ("net-b", "blocks.1")):
        maps = {f"{layer}@t=1": random.integers(0, 255, (2, 8, 8, 3), np.uint8)}
        images = random.integers(0, 255, (2, 32, 32), np.uint8)
        np.savez(folder / picture_file(network), images=images, layers=[layer], levels=["t=1"], **maps)
    page = page_of(folder)
    assert "7 layers of net-a and 3 of net-b at 8 noise levels of frozen networks" in page
    assert page.count('<table class="heat small">') == 2 * 3
    assert "linear on net-b" in page
    assert "Linear on net-a, validation score" in page
    pictures = page.split("What the maps look like")[1]
    assert re.findall(r"<h4>(.*?)</h4>", pictures) == ["net-a", "net-b"] * 2, "the same image in both, then the next"
    tables = markdown(folder)
    assert "| layer of `net-a` |" in tables
    assert "| layer of `net-b` |" in tables
