import numpy as np
import pytest
import torch
from torch.nn import functional as F

from diffrep.errors import DataError
from diffrep.metrics import cds, lds, rmsc


def pairs(feature_map):
    """Cosine and Manhattan distance of all pairs of positions of one map (C, h, w)."""
    height, width = feature_map.shape[1:]
    tokens = F.normalize(feature_map.double().flatten(1), dim=0).T.numpy()
    places = [(i, j) for i in range(height) for j in range(width)]
    found = [
        (tokens[m] @ tokens[n], abs(places[m][0] - places[n][0]) + abs(places[m][1] - places[n][1]))
        for m in range(len(places))
        for n in range(m)
    ]
    cosines, distances = (np.array(column) for column in zip(*found, strict=True))
    return cosines, distances


@pytest.mark.parametrize("grid", [(7, 9), (9, 7), (1, 12), (12, 2), (5, 5)])
def test_against_all_pairs(grid):
    maps = torch.randn(3, 5, *grid, generator=torch.Generator().manual_seed(0))
    maps = maps + F.avg_pool2d(maps, 3, 1, 1) * 4
    local, decay, contrast = [], [], []
    for one in maps:
        cosines, distances = pairs(one)
        local.append(cosines[distances == 1].mean() - cosines[distances >= 6].mean())
        means = [cosines[distances == d].mean() for d in range(1, 9)]
        decay.append(-np.polyfit(np.arange(1, 9), means, 1)[0])
        tokens = F.normalize(one.double().flatten(1), dim=0)
        contrast.append(np.sqrt((tokens.numpy() - tokens.numpy().mean(1, keepdims=True)).var(1).sum()))
    assert lds(maps) == pytest.approx(np.mean(local), abs=1e-12)
    assert cds(maps) == pytest.approx(np.mean(decay), abs=1e-12)
    assert rmsc(maps) == pytest.approx(np.mean(contrast), abs=1e-12)


def test_maps_with_known_values():
    flat = torch.ones(2, 4, 8, 8)
    assert [lds(flat), cds(flat), rmsc(flat)] == pytest.approx([0, 0, 0], abs=1e-12)
    halves = torch.zeros(1, 2, 1, 16)
    halves[:, 0, :, :8] = 1
    halves[:, 1, :, 8:] = 3  # lengths do not count
    assert rmsc(halves) == pytest.approx(0.5**0.5)
    # Of 16 - d pairs at distance d, d cross the border while d is at most 8.
    shares = [(16 - 2 * d) / (16 - d) for d in range(1, 9)]
    assert cds(halves) == pytest.approx(-np.polyfit(range(1, 9), shares, 1)[0])
    far = sum(16 - 2 * d for d in (6, 7)) / sum(16 - d for d in range(6, 16))
    assert lds(halves) == pytest.approx(shares[0] - far)


def test_errors():
    with pytest.raises(DataError, match=r"needs h \+ w >= 8; the grid is 3 x 4"):
        lds(torch.rand(1, 2, 3, 4))
    assert lds(torch.rand(1, 2, 4, 4)) != 0
    with pytest.raises(DataError, match=r"distance 8 are compared, which needs h \+ w >= 10; the grid is 4 x 5"):
        cds(torch.rand(1, 2, 4, 5))
    with pytest.raises(DataError, match=r"are \(B, C, h, w\), one or more; given: \(2, 8, 8\)"):
        rmsc(torch.rand(2, 8, 8))
    with pytest.raises(DataError, match="NaN or infinity"):
        rmsc(torch.full((1, 2, 3, 3), torch.nan))
