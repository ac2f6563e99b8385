import numpy as np
import pytest
import torch
from torch.nn import functional as F

from diffrep.errors import ConfigError, DataError
from diffrep.metrics import (
    chance,
    cka,
    cknna,
    cycle_knn,
    edit_distance_knn,
    hsic,
    kernels,
    lcs_knn,
    mutual_knn,
    neighbours,
    prepare,
    svcca,
)

METRICS = [mutual_knn, cycle_knn, lcs_knn, edit_distance_knn, cka, cknna, svcca]


def rows(count, width, seed):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture(scope="module")
def related():
    shared = rows(60, 6, 0)
    return shared @ rows(6, 20, 1), shared @ rows(6, 12, 2) + 0.5 * rows(60, 12, 3)


def listed(x, k):
    products = (x @ x.T).numpy().copy()
    np.fill_diagonal(products, -np.inf)
    return np.argsort(-products, axis=1)[:, :k].tolist()


def levenshtein(a, b):
    if not a or not b:
        return len(a) + len(b)
    substituted = levenshtein(a[1:], b[1:]) + (a[0] != b[0])
    return min(levenshtein(a[1:], b) + 1, levenshtein(a, b[1:]) + 1, substituted)


def common(a, b):
    if not a or not b:
        return 0
    return common(a[1:], b[1:]) + 1 if a[0] == b[0] else max(common(a[1:], b), common(a, b[1:]))


def test_lists_of_neighbours_against_plain_loops(related):
    in_a, in_b = (listed(x, 5) for x in related)
    both = list(zip(in_a, in_b, strict=True))
    assert mutual_knn(*related, 5) == pytest.approx(np.mean([len({*a} & {*b}) / 5 for a, b in both]))
    assert lcs_knn(*related, 5) == pytest.approx(np.mean([common(a, b) for a, b in both]))
    assert edit_distance_knn(*related, 5) == pytest.approx(1 - np.mean([levenshtein(a, b) for a, b in both]) / 5)
    cycles = [any(i in in_a[j] for j in there) for i, there in enumerate(in_b)]
    assert cycle_knn(*related, 5) == pytest.approx(np.mean(cycles))
    assert 0 < mutual_knn(*related, 5) < 1


def masked_hsic(k, l):  # noqa: E741
    n, k, l = len(k), k - np.diag(np.diag(k)), l - np.diag(np.diag(l))  # noqa: E741
    first, second = (k * l.T).sum(), k.sum() * l.sum() / ((n - 1) * (n - 2))
    return (first + second - 2 * (k @ l).sum() / (n - 2)) / (n * (n - 3))


def test_estimators_against_whole_matrices(related):
    k, l = (x.numpy() @ x.numpy().T for x in related)  # noqa: E741
    n = len(k)
    centring = np.eye(n) - 1 / n
    assert hsic(*related) == pytest.approx(np.trace(k @ centring @ l @ centring))
    assert hsic(*related, unbiased=True) == pytest.approx(masked_hsic(k, l))
    masks = [np.zeros((n, n)) for _ in related]
    for mask, x in zip(masks, related, strict=True):
        np.put_along_axis(mask, np.array(listed(x, 7)), 1, axis=1)
    own = [masked_hsic(mask * kernel, mask * kernel) for mask, kernel in zip(masks, (k, l), strict=True)]
    mask = masks[0] * masks[1]
    expected = masked_hsic(mask * k, mask * l) / (np.sqrt(own[0] * own[1]) + 1e-6)
    assert cknna(*related, 7) == pytest.approx(expected)
    assert cknna(*related, n - 1) == pytest.approx(cka(*related, unbiased=True))


@pytest.mark.parametrize("metric", METRICS)
def test_parts_precision_and_rotations_change_nothing(metric, related, monkeypatch):
    a, b = (F.normalize(x, dim=1) for x in related)
    options = {"directions": 4} if metric is svcca else {}
    whole = metric(a, b, **options)
    rotation = torch.linalg.qr(rows(20, 20, 5)).Q
    if metric is not svcca:  # which standardises columns
        assert metric(a @ rotation, b, **options) == pytest.approx(whole, abs=1e-12)
    for module in (neighbours, kernels):
        monkeypatch.setattr(module, "PART", 7 * len(a))
    assert metric(a, b, **options) == pytest.approx(whole, abs=1e-12)
    assert metric(a.float(), b.float(), **options) == pytest.approx(whole, abs=1e-5)


@pytest.mark.parametrize("metric", [mutual_knn, cknna])
def test_chance_is_what_unrelated_features_reach(metric):
    shared = rows(400, 8, 0)
    a, b = shared @ rows(8, 16, 1), shared @ rows(8, 16, 2)
    level = chance(metric, a, b, seed=3, k=10)
    assert level == pytest.approx(10 / 400, abs=0.02)
    assert level == chance(metric, a, b, seed=3, k=10) != chance(metric, a, b, seed=4, k=10)
    assert metric(a, b, 10) > 5 * level


def test_biased_cka_of_unrelated_features_grows_with_their_width():
    a, b = rows(50, 400, 0), rows(50, 400, 1)
    assert cka(a, b) > 0.8
    assert abs(cka(a, b, unbiased=True)) < 0.05


def test_eps_hides_features_that_differ_little():
    a = F.normalize(rows(1, 16, 0) + 1e-3 * rows(80, 16, 1), dim=1)
    assert cka(a, a, unbiased=True) < 0.1
    assert cka(a, a, unbiased=True, eps=0) == pytest.approx(1)
    with pytest.raises(DataError, match="the same for all samples"):
        cka(torch.ones(8, 3), a[:8], eps=0)


def test_prepare(monkeypatch):
    x = rows(30, 8, 0)
    x[0, 0] = 20
    clamped = prepare(x)
    torch.testing.assert_close(clamped.norm(dim=1), torch.ones(30, dtype=torch.float64))
    assert clamped[0, 0].abs() < 0.9 < prepare(x, q=1)[0, 0].abs()
    monkeypatch.setattr(neighbours, "PART", 24)
    assert torch.equal(prepare(x), clamped)
    assert not prepare(torch.zeros(3, 4)).any()
    with pytest.raises(DataError, match="q is a quantile"):
        prepare(x, q=95)


def test_svcca_finds_what_is_linear_and_leaves_constant_columns_out():
    a = rows(50, 6, 0)
    b = torch.cat([a @ rows(6, 6, 1), torch.full((50, 2), 3.1, dtype=torch.float64)], 1)
    assert svcca(a, b, 6) == pytest.approx(1)
    with pytest.raises(DataError, match="b spans 6 directions over 50 samples; svcca takes 1 to that; given: 7"):
        svcca(rows(50, 9, 2), b, 7)
    with pytest.raises(DataError, match="a spans 0 directions"):
        svcca(torch.ones(50, 3), b)


@pytest.mark.parametrize("metric", METRICS)
def test_wrong_features(metric):
    good = rows(20, 12, 0)
    with pytest.raises(DataError, match="of the same samples in the same order; given: 20 and 19"):
        metric(good, good[:19])
    broken = good.clone()
    broken[3, 2] = torch.nan
    with pytest.raises(DataError, match="the features of 1 of 20 samples hold NaN"):
        metric(broken, good)
    with pytest.raises(DataError, match="average maps first"):
        metric(good.view(20, 3, 2, 2), good)


def test_wrong_numbers():
    x = rows(20, 4, 0)
    for k in (0, 20):
        with pytest.raises(DataError, match=f"a sample among 20 has 19 neighbours; k is from 1 to that; given: {k}"):
            mutual_knn(x, x, k)
    with pytest.raises(DataError, match="fewer than 2 neighbours is not defined; given: k = 1"):
        cknna(x, x, 1)
    with pytest.raises(DataError, match="needs 4 samples or more; given: 3"):
        hsic(x[:3], x[:3], unbiased=True)
    with pytest.raises(ConfigError, match="unknown kernel 'ip'"):
        cka(x, x, "ip")
    with pytest.raises(ConfigError, match="sigma is the width of a kernel"):
        cka(x, x, "rbf", sigma=0)


@pytest.mark.gpu
@pytest.mark.parametrize("metric", METRICS)
def test_gpu_gives_the_cpus_numbers(metric, related):
    options = {"directions": 4} if metric is svcca else {}
    assert metric(*(x.cuda() for x in related), **options) == pytest.approx(metric(*related, **options), abs=1e-10)
