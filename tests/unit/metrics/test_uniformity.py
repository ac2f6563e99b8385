import pytest
import torch

from diffrep.errors import DataError
from diffrep.metrics import alignment, uniformity


@pytest.fixture(scope="module")
def draws():
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(50, 3, 2, generator=generator)
    return first, first + 0.3 * torch.randn(50, 3, 2, generator=generator)


def test_alignment_is_the_definition(draws):
    a, b = (x.flatten(1).double() / x.flatten(1).double().norm(dim=1, keepdim=True) for x in draws)
    assert alignment(*draws) == pytest.approx((2 - 2 * (a * b).sum(1)).mean().item(), abs=1e-12)
    distances = torch.tensor([torch.dist(p, q) for p, q in zip(a, b, strict=True)], dtype=torch.float64)
    assert alignment(*draws, alpha=1) == pytest.approx(distances.mean().item(), abs=1e-12)
    assert alignment(draws[0], 7 * draws[0]) == pytest.approx(0, abs=1e-12)
    assert alignment(draws[0], -draws[0]) == pytest.approx(4)


@pytest.mark.parametrize("chunk", [1, 7, 50, 1024])
@pytest.mark.parametrize("t", [0.5, 2])
def test_uniformity_is_the_definition_whatever_the_chunk(draws, chunk, t):
    x = torch.nn.functional.normalize(draws[0].flatten(1).double(), dim=1)
    expected = torch.pdist(x).square().mul(-t).exp().mean().log().item()
    assert uniformity(draws[0], t, chunk) == pytest.approx(expected, abs=1e-12)


def test_uniformity_is_lowest_when_features_spread():
    poles = torch.tensor([[1.0, 0], [-1, 0]])
    assert uniformity(poles) == pytest.approx(-8)
    assert uniformity(torch.ones(5, 4)) == pytest.approx(0)


def test_bad_input():
    with pytest.raises(DataError, match="the same samples twice"):
        alignment(torch.ones(3, 2), torch.ones(4, 2))
    with pytest.raises(DataError, match="pairs of samples; given: 1"):
        uniformity(torch.ones(1, 2))
    with pytest.raises(DataError, match="NaN or infinity"):
        uniformity(torch.full((3, 2), torch.nan))
