"""The figures of the report: each is laid out from the numbers it claims to show."""

import numpy as np
import pytest

from diffrep.report.confusion import confusion
from diffrep.report.curves import level_curves
from diffrep.report.headline import headline
from diffrep.report.heat import grids, heat_maps
from diffrep.report.lowdata import low_data
from diffrep.report.pareto import best_and_cheapest, frontier, pareto, savings
from diffrep.report.search import race

TIMES = (1, 5, 10, 20, 50, 100, 200, 400)
SIGMAS = (0.01, 0.04, 0.07, 0.13, 0.3, 0.6, 1.4, 4.5)
LAYERS = 7


def test_cards_say_the_best_the_cheapest_and_the_baseline(sample_metrics):
    metrics = sample_metrics()
    main = grids(metrics)[0]
    cards = {card["title"]: card for card in headline(metrics, main)}
    best = max(metrics["scores"], key=lambda score: score["val"])
    assert list(cards)[0] == "Best head"
    assert cards["Best head"]["value"] == f"{best['test']:.3f}"
    assert cards["Best head"]["note"].startswith("DifFormer")
    cells = [cell for cell in metrics["cells"] if cell["head"] == "logistic"]
    top, cheap = best_and_cheapest(cells, "flops")
    assert cards["Best layer and level"]["value"] == f"{top['val']:.3f}"
    assert cards["Best layer and level"]["where"][:2] == [top["layer"], top["level"]]
    assert cheap is not top
    assert cards["Cheapest within one point"]["where"][:2] == [cheap["layer"], cheap["level"]]
    assert cards["With 1 per class"]["value"] == "0.260"
    assert cards["Linear on raw pixels"]["value"] == f"{metrics['scores'][-1]['test']:.3f}"
    assert headline({"scores": []}, None) == []


def test_a_single_score_without_cells_is_one_card(sample_metrics):
    metrics = sample_metrics()
    metrics |= {"scores": metrics["scores"][:1], "cells": [], "low_data": []}
    assert [card["title"] for card in headline(metrics, None)] == ["Best head"]


def test_the_heat_map_frames_the_chosen_cell(sample_metrics):
    metrics = sample_metrics()
    found = grids(metrics)
    assert [grid.head for grid in found] == ["logistic", "sgd", "knn"]
    for grid, tab in zip(found, heat_maps(metrics), strict=True):
        (laid,) = tab["maps"]
        framed = [
            (row["name"], level["key"])
            for row in laid["rows"]
            for cell, level in zip(row["cells"], laid["levels"], strict=True)
            if cell and cell["chosen"]
        ]
        chosen = next(score for score in metrics["scores"] if score["head"] == grid.head)
        assert framed == [(chosen["layer"], chosen["level"])]
        assert len(laid["rows"]) == LAYERS + 1
        assert laid["rows"][-1]["name"] == "all layers"
        numbers = [float(cell["text"]) for row in laid["rows"] for cell in row["cells"]]
        assert len(numbers) == 64
        assert (min(numbers), max(numbers)) == (round(tab["low"], 3), round(tab["high"], 3))


def test_curves_stand_at_log_sigma_and_the_best_has_its_interval(sample_metrics):
    metrics = sample_metrics()
    curves = level_curves(metrics, grids(metrics)[0])
    for drawing in curves["drawings"]:
        best = drawing["lines"][-1]
        assert best["best"]
        assert best["band"].count(",") == 2 * len(TIMES)
        x = [point["x"] for point in best["points"]]
        steps = np.log(SIGMAS)
        wanted = x[0] + (steps - steps[0]) / (steps[-1] - steps[0]) * (x[-1] - x[0])
        np.testing.assert_allclose(x, wanted, atol=0.11)
        left, right, top, bottom = drawing["box"]
        assert all(top <= point["y"] <= bottom for line in drawing["lines"] for point in line["points"])
        assert all(left < point["x"] < right for line in drawing["lines"] for point in line["points"])
    assert curves["intervals"]
    assert [tick["under"] for tick in curves["drawings"][0]["x"]] == [f"{sigma:.2g}" for sigma in SIGMAS]


def test_curves_of_a_clean_level_and_of_unknown_sigmas(sample_metrics):
    metrics = sample_metrics()
    metrics["levels"][0]["sigma"] = 0.0
    x = [point["x"] for point in level_curves(metrics, grids(metrics)[0])["drawings"][0]["lines"][-1]["points"]]
    assert x == sorted(x)
    for level in metrics["levels"]:
        level["sigma"] = None
    curves = level_curves(metrics, grids(metrics)[0])
    x = [point["x"] for point in curves["drawings"][0]["lines"][-1]["points"]]
    assert not curves["sigma"]
    np.testing.assert_allclose(np.diff(x), np.diff(x)[0], atol=0.11)


def test_only_ten_lines_are_coloured_and_names_do_not_touch(sample_metrics):
    layers = [f"down_blocks.{i // 3}.resnets.{i % 3}.conv2" for i in range(14)]
    metrics = sample_metrics(layers=layers)
    curves = level_curves(metrics, grids(metrics)[0])
    assert (curves["coloured"], curves["grey"]) == (10, 5)
    for drawing in curves["drawings"]:
        places = sorted(line["label_at"] for line in drawing["lines"] if line["coloured"])
        assert len(places) == len(drawing["legend"]) == 10
        assert min(np.diff(places)) >= 16 - 0.1


def test_the_cheapest_within_one_point():
    cells = [
        {"layer": name, "level": "t=1", "val": val, "flops": cost, "bytes": size, "forwards": 1, "dim": 4}
        for name, val, cost, size in (
            ("a", 0.70, 100, 8), ("b", 0.792, 200, 4), ("c", 0.79, 150, 8), ("d", 0.80, 400, 8), ("e", 0.789, 10, 8)
        )
    ]  # fmt: skip
    best, cheap = best_and_cheapest(cells, "flops")
    assert (best["layer"], cheap["layer"]) == ("d", "c"), "0.79 is one point below 0.80, and 0.789 is more"
    assert savings(best, cheap) == "saves 62 % of the FLOPs"
    assert [cell["layer"] for cell in frontier(cells, "flops")] == ["e", "c", "b", "d"]
    assert best_and_cheapest(cells, "bytes")[1]["layer"] == "b"
    assert savings(cells[1], cells[0]) == "saves 50 % of the FLOPs but takes 100 % more bytes"
    assert savings(best, best) == ""


def test_pareto_draws_or_counts_every_cell(sample_metrics):
    metrics = sample_metrics()
    cells = [cell for cell in metrics["cells"] if cell["head"] == "logistic"]
    plots = pareto(metrics, "logistic")
    assert [plot["key"] for plot in plots] == ["flops", "bytes"]
    for plot in plots:
        for drawing in plot["drawings"]:
            assert len(drawing["points"]) + len(drawing["edge"]) + drawing["below"] == len(cells)
            left, right, top, bottom = drawing["box"]
            assert all(top <= p["y"] <= bottom and left <= p["x"] <= right for p in drawing["points"])


def test_pareto_without_costs_and_with_one_cost(sample_metrics):
    metrics = sample_metrics()
    for cell in metrics["cells"]:
        cell |= {"flops": None, "bytes": 64}
    assert [plot["key"] for plot in pareto(metrics, "logistic")] == ["forwards"]
    for cell in metrics["cells"]:
        cell["forwards"] = None
    assert pareto(metrics, "logistic") == []


def test_few_labels_end_in_the_score_with_all_samples(sample_metrics):
    metrics = sample_metrics()
    found = low_data(metrics)
    assert found["columns"] == [("1 per class", 10), ("5 per class", 50), ("1 %", 100), ("10 %", 1000), ("all", 10000)]
    linear = next(score for score in metrics["scores"] if score["name"] == "linear")
    assert found["rows"][0]["cells"]["all"]["mean"] == linear["test"]
    assert [point["x"] for point in found["drawings"][0]["lines"][0]["points"]] == sorted(
        point["x"] for point in found["drawings"][0]["lines"][0]["points"]
    )
    assert low_data(metrics | {"low_data": []}) is None


def test_confusion_counts():
    labels, predicted = np.array([0, 0, 0, 1, 1, 2]), np.array([0, 1, 1, 1, 0, 2])
    found = confusion(labels, predicted, ["cat", "dog", "bird", "never"])
    assert [[cell["count"] for cell in row["cells"]] for row in found["matrix"]] == [
        [1, 2, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]
    ]  # fmt: skip
    assert found["pairs"][0] == {"true": "cat", "predicted": "dog", "count": 2, "total": 3, "share": "67 %"}
    assert [bar["name"] for bar in found["bars"]] == ["bird", "dog", "cat"], "best first, without the absent class"


def test_many_classes_show_the_worst_only():
    labels = np.arange(500) % 100
    predicted = np.where(labels == 7, 8, labels)
    found = confusion(labels, predicted, [f"class {i}" for i in range(100)])
    assert found["matrix"] is None
    assert len(found["bars"]) == 12
    assert found["bars"][-1]["name"] == "class 7"
    assert found["all_bars"] == 100


def test_agreement_is_spearmans():
    cells = [{"layer": str(i), "level": "t", "val": v, "kept": True} for i, v in enumerate((0.1, 0.2, 0.3, 0.4))]
    ranking = [{"layer": str(i), "level": "t", "score": s, "alignment": 0, "uniformity": 0} for i, s in
               enumerate((1.0, 3.0, 2.0, 40.0))]  # fmt: skip
    metrics = {"search": {"rungs": [{"samples": 9, "cells": cells}], "ranking": ranking}}
    assert race(metrics)["agreement"] == pytest.approx(0.8)  # 1 - 6 * 2 / (4 * 15)
