import pytest
import torch

from diffrep.correspond.soft import soft_argmax
from diffrep.errors import ConfigError, UnknownNameError


def random_maps(count=4, height=5, width=8, seed=0, dtype=torch.float32):
    return 2 * torch.rand(count, height, width, generator=torch.Generator().manual_seed(seed), dtype=dtype) - 1


def by_hand(similarity, beta, inside=None, outside="zero", kernel=None):
    """One map, one cell at a time."""
    height, width = similarity.shape
    peak = int(similarity.flatten().argmax())
    y0, x0 = divmod(peak, width)
    total, weights = torch.zeros(2, dtype=torch.float64), 0.0
    for y in range(height):
        for x in range(width):
            value = similarity[y, x].double()
            if inside is not None and max(abs(x - x0), abs(y - y0)) > inside:
                if outside == "exclude":
                    continue
                value = 0 * value
            if kernel is not None:
                value = value * torch.exp(torch.tensor(-((x - x0) ** 2 + (y - y0) ** 2) / (2 * kernel**2)))
            weight = torch.exp(value / beta)
            total += weight * torch.tensor([x, y])
            weights += weight
    return total / weights


@pytest.mark.parametrize(
    ("options", "reference"),
    [
        ({}, {}),
        ({"window": 3}, {"inside": 1}),
        ({"window": 5, "outside": "exclude"}, {"inside": 2, "outside": "exclude"}),
        ({"window": 21}, {"inside": 10}),
        ({"window": 1, "outside": "exclude"}, {"inside": 0, "outside": "exclude"}),
        ({"kernel": 1.5}, {"kernel": 1.5}),
    ],
)
@pytest.mark.parametrize("beta", [0.02, 0.3])
def test_it_is_the_mean_cell_of_the_softmax(options, reference, beta):
    maps = random_maps()
    found = soft_argmax(maps, beta, **options)
    expected = torch.stack([by_hand(one, beta, **reference) for one in maps])
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, atol=2e-4, rtol=0)


def test_a_peak_is_found_where_it_is():
    maps = torch.zeros(3, 6, 9)
    cells = [(8, 0), (0, 5), (4, 3)]
    for one, (x, y) in zip(maps, cells, strict=True):
        one[y, x] = 1
    torch.testing.assert_close(soft_argmax(maps, 0.01), torch.tensor(cells).float(), atol=1e-4, rtol=0)


def test_what_lies_outside_counts_as_published_or_not_at_all():
    """Where all is negative a zero outside outweighs the peak."""
    maps = torch.full((1, 5, 5), -0.9)
    maps[0, 0, 0] = -0.1
    zero, excluded = (soft_argmax(maps, window=3, outside=outside) for outside in ("zero", "exclude"))
    torch.testing.assert_close(excluded, torch.zeros(1, 2), atol=1e-6, rtol=0)
    assert (zero > 2).all()


@pytest.mark.parametrize("options", [{}, {"window": 3}, {"window": 3, "outside": "exclude"}, {"kernel": 2.0}])
def test_gradients(options):
    maps = random_maps(2, 3, 4, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: soft_argmax(x, 0.3, **options), maps)
    assert soft_argmax(maps).dtype == torch.float64
    assert soft_argmax(maps.half()).dtype == torch.float32


def test_no_queries_give_no_points():
    assert soft_argmax(torch.zeros(0, 3, 4), window=3).shape == (0, 2)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"window": 4}, ConfigError, "odd number of cells.* got 4"),
        ({"window": -5}, ConfigError, "odd number of cells"),
        ({"kernel": 0.0}, ConfigError, "kernel must be above 0"),
        ({"window": 3, "kernel": 2.0}, ConfigError, "window=3 and kernel=2.0 cannot both be given"),
        ({"beta": 0.0}, ConfigError, "beta must be above 0"),
        ({"outside": "zeros"}, UnknownNameError, "did you mean 'zero'"),
    ],
)
def test_wrong_arguments(options, error, message):
    with pytest.raises(error, match=message):
        soft_argmax(random_maps(), **options)
    for wrong in (torch.zeros(4, 5), torch.zeros(1, 2, 3).long(), torch.zeros(2, 0, 3)):
        with pytest.raises(ConfigError, match="similarity must be floats"):
            soft_argmax(wrong)
