import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import pytest

from diffrep import FeatureRequest, load_backbone
from diffrep.config import ExtractConfig
from diffrep.errors import UnknownNameError
from diffrep.extract import make_plan
from diffrep.extract.cards import CARDS, read_cards
from diffrep.extract.cost import Cost, written

ROOT = Path(__file__).parents[3]


def cost_of(backbone, images=1000, latents=None, **request):
    """Returns the cost of every block at two levels, in float16, of images of the native size."""
    request = FeatureRequest(**{"layers": "blocks", "levels": [5, 300], **request})
    parts = {"backbone": "x", "data": "x", "out": "runs/x", "unit_size": 100}
    config = ExtractConfig(request=request, latents=latents, **parts)
    side = backbone.image_size
    return Cost.of(config, backbone, make_plan(backbone, request, side, side), images)


@pytest.fixture(scope="module")
def cost(unet):
    return cost_of(unet)


@pytest.fixture(scope="module")
def sit():
    return load_backbone("SiT-XL/2", device="meta")


def test_bytes_are_those_of_the_features(unet, cost):
    import torch

    features = unet.extract(torch.rand(3, 1, 16, 16), FeatureRequest("blocks", [5, 300]))
    sizes = {key: feature.nbytes // 3 for key, feature in features.items()}
    assert cost.bytes == 1000 * sum(sizes.values())
    assert {(name, key): count // 1000 for name, count in cost.layer_bytes.items() for key in cost.plan.draws} == sizes
    assert cost.unit_bytes == 100 * sum(sizes.values()) and cost.units == 10
    assert replace(cost, images=1001).units == 11
    assert replace(cost, images=30).unit_bytes == 30 * sum(sizes.values())
    streamed = replace(cost, unit_size=None, shards=8)
    assert streamed.units == 8 and streamed.unit_bytes == 125 * sum(sizes.values())
    assert replace(cost, unit_size=None).unit_bytes is None


def test_hours_are_flops_over_what_a_card_reaches(cost):
    assert cost.flops == cost.plan.flops * 1000
    assert cost.hours("A100") == pytest.approx(cost.flops / (312e12 * 0.35) / 3600)
    assert replace(cost, utilisation=0.7).hours("A100") == pytest.approx(cost.hours("A100") / 2)
    single = replace(cost, dtype="float32")
    assert single.hours("A100") == pytest.approx(cost.hours("A100") * 312 / 19.5)
    heavy = replace(cost, weights=17 * 10**9, cards=("T4", "A100"))
    assert heavy.hours("T4") is None and heavy.hours("A100") is not None
    assert "T4        its 16 GB do not hold the 17 GB of weights in bfloat16" in heavy.lines()
    assert any(line.startswith("warning   T4 has no bfloat16") for line in heavy.lines())
    assert not any("no bfloat16" in line for line in replace(heavy, dtype="float16").lines())


def test_latents_take_the_encoder_away_and_need_room(sit):
    whole = cost_of(sit, layers="repa.8", levels=0.5)
    kept = cost_of(sit, layers="repa.8", levels=0.5, latents="runs/latents")
    assert whole.encoder_flops == 1000 * whole.plan.encode_flops > 2 * whole.network_flops
    assert kept.encoder_flops == 0 and kept.flops == whole.network_flops
    assert kept.latents == 4 * 4 * 32 * 32, "fp32, four channels"
    both = cost_of(sit, layers="repa.8", levels=0.5, latents="runs/latents", posterior="sample")
    assert both.latents == 2 * kept.latents, "mean and standard deviation"
    assert any(line.startswith("latents   16.4 MB in a store that is made once") for line in kept.lines())
    # Parameters of the published network and its autoencoder, encoder and decoder.
    assert whole.weights == pytest.approx(2 * (675e6 + 84e6), rel=0.01)


def test_what_does_not_fit_is_told_with_what_would(unet, cost):
    assert replace(cost, free=cost.bytes).warnings() == []
    (text,) = replace(cost, free=cost.bytes - 1, target="runs/x").warnings()
    assert "do not fit into the" in text and "free at runs/x" in text
    assert "4 of the 5 layers" in text and "1 of the 2 levels" in text
    for share in (0.99, 0.3, 0.1, 0.05):
        (text,) = replace(cost, free=int(cost.bytes * share)).warnings()
        changes = dict(word.split(".")[1].split("=") for word in text.split() if word.startswith("request."))
        assert "pool" in changes
        for key, value in changes.items():
            other = cost_of(unet, **{key: int(value) if value.isdecimal() else value})
            assert other.bytes <= cost.bytes * share, (key, value)
    pooled = cost_of(unet, pool="mean")
    (text,) = replace(pooled, free=pooled.bytes // 2 - 1).warnings()
    assert "pool" not in text and "float8" not in text
    (text,) = replace(pooled, free=1).warnings()
    assert "nothing in this request alone" in text


def test_only_what_is_missing_needs_room(cost):
    assert replace(cost, free=cost.bytes // 2, done=500).warnings() == []
    (text,) = replace(cost, free=cost.bytes // 2 - 1, done=500).warnings()
    assert "that are missing" in text


def test_the_advice_of_float16_before_float8(unet):
    cost = cost_of(unet)
    wide = replace(cost, plan=replace(cost.plan, dtype="float32"))
    (text,) = replace(wide, free=wide.bytes // 2).warnings()
    assert "request.dtype=float16 or" in text
    (text,) = replace(wide, free=wide.bytes // 4).warnings()
    assert "request.dtype=float8_e4m3fn or" in text


def test_units_that_are_too_large_or_too_many(cost):
    large = replace(cost, images=10**7, unit_size=10**6)
    (text,) = large.warnings()
    size = int(text.split("unit_size=")[1].split()[0])
    assert 0.9 * 256e6 < replace(large, unit_size=size).unit_bytes <= 256e6
    (text,) = replace(cost, images=10**9, unit_size=None, shards=10).warnings()
    assert "cut the shards" in text
    (text,) = replace(cost, images=10**9, unit_size=10).warnings()
    size = int(text.split("unit_size=")[1].split()[0])
    assert replace(cost, images=10**9, unit_size=size).warnings() == []


def test_cards_are_named_in_any_case():
    assert read_cards("h100, A100,h100") == ("H100", "A100")
    assert read_cards("all") == tuple(CARDS)
    with pytest.raises(UnknownNameError, match="unknown card 'H1000'; did you mean 'H100'"):
        read_cards("A100,H1000")
    for card in CARDS.values():
        assert card.single < card.half and card.memory >= 16


def test_everything_is_plain_in_json(cost):
    found = json.loads(json.dumps(cost.as_json()))
    assert found["bytes"]["total"] == sum(sum(levels.values()) for levels in found["bytes"]["layers"].values())
    assert found["flops"]["total"] == found["flops"]["encoder"] + found["flops"]["network"]
    assert set(found["gpu"]["hours"]) == {"L4", "A100", "H100"}


@pytest.mark.parametrize(
    ("hours", "text"), [(0.01234, "0.0123"), (4.567, "4.57"), (99.94, "99.9"), (123.4, "123"), (78912.3, "78,900")]
)
def test_hours_have_three_digits(hours, text):
    assert written(hours) == text


def test_the_tables_of_the_page_are_the_scripts():
    spec = importlib.util.spec_from_file_location("scale", ROOT / "scripts" / "scale.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    page = (ROOT / "docs" / "scale.md").read_text()
    lines = script.tables(["edm-cifar10"]).splitlines()
    assert all(line in page for line in lines), "python scripts/scale.py --write"
    for name in script.READ:
        assert page.count(f"| `{name}` |") == 4
