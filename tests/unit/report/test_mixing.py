import jinja2
import pytest

from diffrep.report import formats
from diffrep.report.colours import SCORES, paint
from diffrep.report.mixing import mixing
from diffrep.report.page import FILTERS

NETWORK = {
    "name": "aggregation network",
    "layers": ["up_blocks.1", "mid_block"],
    "levels": ["t=5", "t=50", "clean"],
    "shares": [[0.1, 0.45, 0.05], [0.15, 0.0, 0.25]],
}


def test_the_map_shows_every_share():
    (laid,) = mixing({"mixing": [NETWORK]})
    assert laid["levels"] == NETWORK["levels"]
    assert [row["name"] for row in laid["rows"]] == NETWORK["layers"]
    assert [[cell["text"] for cell in row["cells"]] for row in laid["rows"]] == [
        ["10 %", "45 %", "5 %"],
        ["15 %", "0 %", "25 %"],
    ]
    assert [row["all"] for row in laid["rows"]] == ["60 %", "40 %"]
    assert laid["by_level"] == ["25 %", "45 %", "30 %"]
    assert laid["most"] == {"layer": "up_blocks.1", "level": "t=50", "share": "45 %"}
    assert laid["rows"][0]["cells"][1]["paint"] == paint(SCORES, 1)
    assert laid["rows"][1]["cells"][1]["paint"] == paint(SCORES, 0)
    assert laid["even"] == "17 %"


def test_even_shares_have_one_colour():
    (laid,) = mixing({"mixing": [{**NETWORK, "shares": [[1 / 6] * 3] * 2}]})
    assert len({cell["paint"] for row in laid["rows"] for cell in row["cells"]}) == 1


@pytest.mark.parametrize("metrics", [{}, {"mixing": []}])
def test_without_a_network_there_is_no_map(metrics):
    assert mixing(metrics) == []


def test_the_section_is_drawn():
    environment = jinja2.Environment(loader=jinja2.PackageLoader("diffrep.report", "."), autoescape=True)
    environment.filters.update({name: getattr(formats, name) for name in FILTERS})
    template = environment.get_template("mixing.html.jinja")
    laid = mixing({"mixing": [NETWORK, {**NETWORK, "name": "<second>"}]})
    page = template.render(mixing=laid)
    assert page.count('<td class="fill') == 12
    assert 'title="up_blocks.1 @ t=50: 45.00 %"' in page
    assert "&lt;second&gt;" in page and "<second>" not in page
    assert page.count("checked") == 1
    assert "Before training every cell has 17 %" in page
