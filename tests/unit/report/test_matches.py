"""The section on correspondence: tables by average, bars by category, drawn pairs."""

import re

import jinja2
import numpy as np
import pytest

from diffrep.report import formats
from diffrep.report.matches import matches
from diffrep.report.page import FILTERS

ALPHAS = (0.1, 0.05)


def score(name, value, **more):
    cells = {str(alpha): [value * share, value * share - 0.03, value * share + 0.02]
             for alpha, share in zip(ALPHAS, (1, 0.5), strict=True)}  # fmt: skip
    points = {alpha: [cell + 0.01 for cell in row] for alpha, row in cells.items()}
    return {"name": name, "per_image": cells, "per_point": points, "pairs": 1056, "points": 9504} | more


@pytest.fixture
def found():
    categories = {"cat": 0.5, "dog": 0.7, "<i>": 0.2}
    scores = [score("raw pixels", 0.2), score("up_blocks.1 @ t=20", 0.6, categories=categories), score("latents", 0.4)]
    pictures = [
        {"title": "cat 1 and cat 2", "of": "latents", "pck": 0.75},
        {"title": "cat 2 and cat 1", "of": "latents", "pck": None},
    ]
    return {"protocol": "dift", "alphas": list(ALPHAS), "scores": scores, "pictures": pictures}


@pytest.fixture
def file(tmp_path):
    random = np.random.default_rng(0)
    drawn = {name: random.integers(0, 255, (20, 42, 3), np.uint8) for name in ("match.0", "match.1", "pca.0")}
    np.savez(tmp_path / "matches.npz", **drawn)
    return tmp_path / "matches.npz"


def render(laid):
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("diffrep.report", "."), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update({name: getattr(formats, name) for name in FILTERS})
    return environment.get_template("matches.html.jinja").render(matches=laid)


def test_rows_are_ranked_and_on_one_axis(found, file):
    laid = matches({"correspondence": found}, file)
    assert [table["title"] for table in laid["tables"]] == ["per image", "per point"], "nothing was said per class"
    rows = laid["tables"][0]["rows"]
    assert [row["name"] for row in rows] == ["up_blocks.1 @ t=20", "latents", "raw pixels"]
    assert rows[0]["cells"][1] == {"value": 0.3, "low": pytest.approx(0.27), "high": pytest.approx(0.32)}
    marks = [row["marks"]["value"] for row in rows]
    assert marks[0] - marks[1] == pytest.approx(marks[1] - marks[2], abs=0.2)
    assert all(2 <= mark <= 118 for row in rows for mark in row["marks"].values())


def test_bars_are_those_of_the_best(found, file):
    laid = matches({"correspondence": found}, file)
    assert laid["of"] == "up_blocks.1 @ t=20"
    assert [(bar["name"], bar["text"]) for bar in laid["bars"]["bars"]] == [
        ("dog", "0.700"), ("cat", "0.500"), ("<i>", "0.200")
    ]  # fmt: skip
    assert laid["bars"]["measure"] == "PCK@0.1"
    found["scores"][1]["categories"] = {"cat": 0.6}
    assert matches({"correspondence": found}, file)["bars"] is None, "one category is no comparison"


def test_the_section_says_what_was_measured(found, file):
    found["scores"].append(score("latents", 0.7, protocol="geoaware"))
    laid = matches({"correspondence": found}, file)
    assert [row["protocol"] for row in laid["tables"][0]["rows"]] == ["dift"] * 3 + ["geoaware"]
    page = render(laid)
    said = " ".join(re.sub(r"<[^>]*>", " ", page).split())
    assert "by the protocols dift , geoaware ." in said
    assert "0.600 0.570 – 0.620" in said
    assert "1,056 pairs, 9,504 points" in said
    assert "cat 1 and cat 2 latents, PCK 0.750" in said
    assert "&lt;i&gt;" in page
    assert "<i>" not in page.replace("<i><b", "")
    assert page.count("<img") == 3
    assert page.count('class="best"') == 2
    assert not re.search(r"<script|https?:", page)
    assert page.count("<section>") == page.count("</section>") == 1


def test_numbers_survive_json_or_not(found, file):
    plain = matches({"correspondence": found}, file)["tables"][0]["rows"][0]["cells"]
    for one in found["scores"]:
        one["per_image"] = {float(alpha): cell for alpha, cell in one["per_image"].items()}
    assert matches({"correspondence": found}, file)["tables"][0]["rows"][0]["cells"] == plain


def test_parts_that_are_missing(found, file, tmp_path):
    assert matches({}, file) is None
    assert matches({"correspondence": {}}, file) is None
    laid = matches({"correspondence": found}, tmp_path / "nothing.npz")
    assert laid["pictures"] == []
    assert "Pairs" not in render(laid)
    laid = matches({"correspondence": {"pictures": found["pictures"]}}, file)
    assert (laid["tables"], laid["bars"], len(laid["pictures"])) == ([], None, 2)
    assert "PCK 0.750" in render(laid)
