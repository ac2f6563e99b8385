import numpy as np
import pytest
import scipy.linalg
import torch

from diffrep.errors import DataError
from diffrep.metrics import FeatureStatistics, frechet_distance


def rows(count, width, seed=0):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def statistics(features, batch=7):
    found = FeatureStatistics(features.shape[1])
    for part in features.split(batch):
        found.add(part)
    return found


def exact(mean, spread, count=50):
    """Statistics whose mean and standard deviations are these to the last digit."""
    white = torch.linalg.qr(rows(count, len(spread)) - rows(count, len(spread)).mean(0)).Q * (count - 1) ** 0.5
    return statistics(white * torch.tensor(spread) + torch.tensor(mean), batch=count)


def test_streaming_is_numpys_mean_and_covariance():
    x = 1e4 + rows(50, 6)
    merged = statistics(x[:20])
    merged.merge(statistics(x[20:]))
    merged.merge(FeatureStatistics(6))
    merged.add(x[:0])
    for found in (statistics(x), statistics(x, 1), merged, FeatureStatistics.from_state_dict(merged.state_dict())):
        assert found.count == 50
        np.testing.assert_allclose(found.mean, x.mean(0), rtol=1e-14)
        np.testing.assert_allclose(found.covariance, np.cov(x.T), atol=1e-10)


def test_a_state_is_a_copy():
    found = statistics(rows(9, 3))
    state = found.state_dict()
    before = {name: value.clone() for name, value in state.items()}
    found.add(rows(4, 3, 1))
    FeatureStatistics.from_state_dict(state).add(rows(4, 3, 2))
    assert all(torch.equal(state[name], value) for name, value in before.items())


def test_gaussians_with_known_distance():
    a, b = exact([0.0, 1, 2], [1.0, 2, 3]), exact([3.0, 1, -2], [2.0, 2, 0.5])
    assert frechet_distance(a, b) == pytest.approx(9 + 16 + 1 + 2.5**2, rel=1e-12)
    assert frechet_distance(b, a) == pytest.approx(frechet_distance(a, b), rel=1e-12)


def test_against_scipys_matrix_root():
    a, b = statistics(rows(300, 24) @ rows(24, 24, 1)), statistics(rows(200, 24, 2) @ rows(24, 24, 3) + 0.3)
    root = scipy.linalg.sqrtm(a.covariance.numpy() @ b.covariance.numpy()).real
    shift = (a.mean - b.mean).square().sum().item()
    expected = shift + (a.covariance.trace() + b.covariance.trace()).item() - 2 * np.trace(root)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)


def test_fewer_samples_than_features():
    """Where the root of the product of both covariances loses half of the digits."""
    x = rows(20, 64)
    a = statistics(x)
    assert frechet_distance(a, statistics(x)) < 1e-11
    assert frechet_distance(a, statistics(x + 0.5)) == pytest.approx(64 * 0.25, rel=1e-12)
    y, rotation = rows(15, 64, 2), torch.linalg.qr(rows(64, 64, 1)).Q
    turned = frechet_distance(statistics(x @ rotation), statistics(y @ rotation))
    assert turned == pytest.approx(frechet_distance(a, statistics(y)), rel=1e-12)
    # Two lines at a right angle have nothing in common; on one line the spreads are subtracted.
    line = torch.linspace(-1, 1, 9, dtype=torch.float64)[:, None]
    along, across = statistics(line * torch.eye(4)[0]), statistics(2 * line * torch.eye(4)[1])
    variance = line.var().item()
    assert frechet_distance(along, across) == pytest.approx(5 * variance, rel=1e-12)
    assert frechet_distance(along, statistics(2 * line * torch.eye(4)[0])) == pytest.approx(variance, rel=1e-12)
    assert frechet_distance(along, statistics(torch.zeros(5, 4))) == pytest.approx(variance, rel=1e-12)


def test_errors():
    good = statistics(rows(5, 3))
    with pytest.raises(DataError, match="two samples or more; given: 1"):
        frechet_distance(statistics(rows(1, 3)), good)
    with pytest.raises(DataError, match="width 3 and 4 are of two encoders"):
        frechet_distance(good, statistics(rows(5, 4)))
    with pytest.raises(DataError, match=r"features \(B, 3\); given: \(2, 4\)"):
        good.add(rows(2, 4))
    with pytest.raises(DataError, match="width 4 do not go with those of width 3"):
        good.merge(statistics(rows(5, 4)))
    with pytest.raises(DataError, match="NaN or infinity"):
        good.add(torch.full((2, 3), torch.inf))
    assert good.count == 5
