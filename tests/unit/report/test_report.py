"""The report of a made-up run says what the results say, and needs no other file."""

import re
from html.parser import HTMLParser

import numpy as np
import pytest

from diffrep import write_report
from diffrep.config import write_results
from diffrep.errors import ConfigError
from diffrep.report import ARRAYS
from diffrep.report.pareto import pareto
from diffrep.report.search import race


def headings(page):
    return re.findall(r"<h2>(.*?)</h2>", page)


def test_sections_in_order(page):
    assert headings(page) == [
        "Heads",
        "By layer and noise level",
        "Over noise levels",
        "Score and cost",
        "With few labels",
        "Class by class",
        "Test images",
        "What the maps look like",
        "How it was made",
    ]


class Strict(HTMLParser):
    """Collects addresses and scripts, and fails on a tag that is closed out of turn."""

    VOID = {"meta", "img", "br", "input", "wbr"}

    def __init__(self):
        super().__init__()
        self.open, self.addresses, self.tags = [], [], set()

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.addresses += [value for name, value in attributes if name in ("src", "href", "xlink:href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.add(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"{tag} closed out of turn"


def test_needs_no_other_file_and_no_script(page):
    parser = Strict()
    parser.feed(page)
    assert parser.open == []
    assert {address.split(":")[0] for address in parser.addresses} == {"data"}
    assert not parser.tags & {"script", "link", "iframe", "object"}
    assert "url(" not in page
    assert "http" not in page
    assert "prefers-color-scheme: dark" in page


def text_of(page):
    return " ".join(re.sub(r"<(?!small|/small)[^>]*>", "", page.split("</style>")[1]).split())


def test_the_cheapest_layer_has_its_sentence(page, sample_metrics):
    plot = pareto(sample_metrics(), "logistic")[0]
    cheap, said = plot["cheap"], text_of(page)
    assert f"The cheapest in FLOPs within one point of it is {cheap['layer']} @ {cheap['level']}" in said
    assert f"{cheap['val']:.3f}: it {plot['saves']}." in said


def test_predictions_and_images_of_the_page(page):
    said = text_of(page)
    assert "cat taken for dog" in said
    assert page.count("<figure") == 30
    assert page.count('class="blank"') == 0
    assert page.count('class="wrong"') >= 10, "the ten most certain and wrong ones"


def test_images_without_thumbnails_are_named(tmp_path, sample_metrics, write_run, page_of):
    page = page_of(write_run(tmp_path, sample_metrics(), thumbnails=False))
    assert page.count('class="blank"') == 30
    assert "test/00000.png" in page


def test_search_maps_and_agreement(tmp_path, sample_metrics, write_run, sample_search, page_of):
    metrics = sample_metrics() | {"search": sample_search()}
    found = race(metrics)
    assert [drawn["text"] for drawn in found["rungs"]] == [
        "56 cells, 28 stay", "28 cells, 14 stay", "14 cells, 7 stay", "7 cells, the best framed"
    ]  # fmt: skip
    last = metrics["search"]["rungs"][-1]["cells"]
    assert found["winner"] == max(last, key=lambda cell: cell["val"])
    assert 0.5 < found["agreement"] <= 1
    ranks = race({**metrics, "search": {"ranking": metrics["search"]["ranking"]}})
    assert (ranks["rungs"], ranks["winner"], ranks["agreement"]) == ([], None, None)
    page = page_of(write_run(tmp_path, metrics))
    assert "The search" in headings(page)
    assert f"ends at {found['winner']['layer']} @ {found['winner']['level']}" in text_of(page)


def test_one_layer_at_one_level(tmp_path, sample_metrics, write_run, page_of):
    metrics = sample_metrics(layers=["mid_block"], pools=(1,))
    only = [cell for cell in metrics["cells"] if cell["layer"] == "mid_block" and cell["level"] == "t=20"]
    score = {**metrics["scores"][0], "layer": "mid_block", "level": "t=20", "error": None, "tests": [0.7]}
    metrics |= {"cells": only[:1], "levels": [metrics["levels"][3]], "scores": [score], "low_data": []}
    metrics |= {"gallery": [], "costs": None}
    page = page_of(write_run(tmp_path, metrics))
    assert headings(page) == ["Heads", "By layer and noise level", "Class by class", "How it was made"]
    assert "1 layer at 1 noise level of" in text_of(page)
    assert "seeds" not in text_of(page)


def test_several_labels_a_sample(tmp_path, sample_metrics, write_run, page_of):
    metrics = sample_metrics() | {"metric": "map", "gallery": []}
    for score in metrics["scores"]:
        score |= {"top5": None, "mean_per_class": None}
    folder = write_run(tmp_path, metrics)
    random = np.random.default_rng(0)
    np.savez(folder / ARRAYS, labels=random.integers(0, 2, (50, 10)), ids=np.array(["a"] * 50))
    page = page_of(folder)
    assert "Class by class" not in headings(page)
    assert "of 10 labels" in text_of(page)
    assert "mean average precision" in text_of(page)
    metrics["scores"][4]["per_class"] = [i / 10 for i in range(10)]
    write_results(folder, {}, 0, metrics)
    page = page_of(folder)
    assert "Label by label" in headings(page)
    assert page.index(">truck</span>") < page.index(">airplane</span>"), "best first"


def test_a_run_without_a_sweep(tmp_path, sample_metrics, page_of):
    metrics = {key: value for key, value in sample_metrics().items() if key in ("title", "metric", "samples", "names")}
    score = sample_metrics()["scores"][4] | {"bytes": None, "flops": None, "forwards": None, "dim": None, "pool": None}
    metrics |= {"layers": [], "levels": [], "cells": [], "scores": [score], "low_data": [], "gallery": [], "notes": []}
    write_results(tmp_path, {}, 0, metrics)
    assert headings(page_of(tmp_path)) == ["Heads", "How it was made"]


def test_results_of_another_kind(tmp_path, page_of):
    write_results(tmp_path, {}, 0, {"loss": 0.1})
    assert headings(page_of(tmp_path)) == ["How it was made"]
    with pytest.raises(ConfigError):
        write_report(tmp_path / "nothing")


def test_names_are_escaped(tmp_path, sample_metrics, write_run, page_of):
    metrics = sample_metrics(names=["<b>bold</b>", *"abcdefghi"])
    metrics["title"] = "<script>alert(1)</script>"
    page = page_of(write_run(tmp_path, metrics))
    assert "<script" not in page
    assert "<b>bold" not in page
    assert "&lt;b&gt;bold" in page
