"""Kernel and neighbour metrics against the numbers of platonic-rep (Huh et al., 2024)."""

import json

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from diffrep.metrics import cka, cknna, cycle_knn, hsic, lcs_knn, mutual_knn, prepare, svcca

CASES = [f"{pair}.{dtype}.l2normalised" for pair in ("AB", "AC", "BC", "AA") for dtype in ("float32", "float64")]
CASES += ["AB.float32.raw", "AB.float64.raw"]


@pytest.fixture(scope="module")
def expected(golden):
    return json.loads((golden / "repa" / "alignment_metrics.json").read_text())


@pytest.fixture(scope="module")
def features(golden):
    with np.load(golden / "repa" / "alignment_features.npz") as file:
        return {name: torch.from_numpy(file[name]) for name in file}


@pytest.mark.parametrize("case", CASES)
def test_metrics(features, expected, case):
    pair, dtype, scale = case.split(".")
    a, b = (features[name].to(getattr(torch, dtype)) for name in pair)
    if scale == "l2normalised":
        a, b = F.normalize(a, dim=1), F.normalize(b, dim=1)
    found = {
        "cknna@n-1": cknna(a, b, len(a) - 1),
        "lcs_knn@10": lcs_knn(a, b, 10),
        "cka": cka(a, b),
        "unbiased_cka": cka(a, b, unbiased=True),
        "cka_rbf_sigma1": cka(a, b, "rbf"),
        "unbiased_cka_rbf_sigma1": cka(a, b, "rbf", unbiased=True),
        "hsic_unbiased_KL": hsic(a, b, unbiased=True),
        "hsic_biased_KL": hsic(a, b),
    }
    for k in (5, 10, 20):
        found |= {f"mutual_knn@{k}": mutual_knn(a, b, k), f"cycle_knn@{k}": cycle_knn(a, b, k)}
        found[f"cknna@{k}"] = cknna(a, b, k)
    # Their means of hits are fp32 in both cases.
    tolerance = 1e-7 if dtype == "float64" else 5e-6
    theirs = {name: expected[case][name] for name in found}
    assert found == pytest.approx(theirs, rel=tolerance, abs=tolerance)


def test_clamp_of_outliers(features, expected):
    outliers = expected["remove_outliers"]
    rows, theirs = features["A"], outliers["A q=0.95 exact=False"]
    bound = theirs["max_abs"]
    assert rows.clamp(-bound, bound).sum().item() == pytest.approx(theirs["sum"], rel=1e-5)
    torch.testing.assert_close(
        prepare(rows), F.normalize(rows.double().clamp(-bound, bound), dim=1), atol=1e-7, rtol=0
    )
    score = mutual_knn(prepare(rows), prepare(features["B"]), 10)
    assert score == pytest.approx(outliers["AB mutual_knn@10 after clamp exact=False + l2"], abs=1e-7)


def test_svcca_is_exact_where_the_published_code_is_random(features, expected):
    a, b = (F.normalize(features[name], dim=1) for name in "AB")
    assert svcca(a, b) == pytest.approx(0.7101, abs=5e-5)
    assert svcca(a, a) == pytest.approx(1, abs=1e-12)
    seeds = expected["AB.float32.l2normalised"]["svcca10_5seeds"]
    assert min(seeds) < svcca(a, b) < max(seeds)
