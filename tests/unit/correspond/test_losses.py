import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from diffrep.correspond.losses import (
    LOGIT_SCALE,
    Couple,
    cell_index,
    contrastive_loss,
    end_point_loss,
    flipped_pairs,
    mirrored_points,
    sparse_contrastive_loss,
    weighted_mean,
)
from diffrep.correspond.soft import soft_argmax
from diffrep.errors import ConfigError, DataError


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def example(count=5, channels=7, source=(4, 6), target=(5, 3), seed=0):
    """Two maps of different sizes and points on them, some outside."""
    maps = [noise(channels, *size, seed=seed + number) for number, size in enumerate((source, target))]
    generator = np.random.default_rng(seed)
    points = [generator.uniform(-0.7, 1.0, (count, 2)) * (w + 1, h + 1) for h, w in (source, target)]
    return *maps, *points


def every_cosine(one, other):
    one, other = (F.normalize(cells.flatten(1).T, dim=1) for cells in (one, other))
    return one @ other.T


def test_the_contrastive_loss_is_that_of_the_whole_matrix():
    source, target, start, end = example()
    found, wanted = cell_index(start, (4, 6)), cell_index(end, (5, 3))
    logits = math.exp(LOGIT_SCALE) * every_cosine(source, target)
    forth = F.cross_entropy(logits[found], wanted)
    back = F.cross_entropy(logits.T[wanted], found)
    loss = contrastive_loss([source], [target], [start], [end])
    torch.testing.assert_close(loss, torch.stack([(forth + back) / 2]))
    assert contrastive_loss([source], [target], [start], [end], logit_scale=0.0) != loss


def test_the_sparse_loss_is_that_of_the_points_alone():
    source, target, start, end = example()
    cosines = every_cosine(source, target)[cell_index(start, (4, 6))][:, cell_index(end, (5, 3))] / 0.07
    own = torch.arange(5)
    expected = (F.cross_entropy(cosines, own) + F.cross_entropy(cosines.T, own)) / 2
    torch.testing.assert_close(sparse_contrastive_loss([source], [target], [start], [end])[0], expected)


@pytest.mark.parametrize("window", [None, 3])
def test_the_end_point_loss_is_the_mean_distance(window):
    source, target, _, end = example()
    start = np.array([[0.3, 1.0], [4.6, 2.0], [5.0, 3.4], [-2.0, 0.0], [1.5, 1.5]])
    rows = every_cosine(source, target)[cell_index(start, (4, 6))].view(5, 5, 3)
    # What the cell's own descriptor finds lies as far from the target point as the cell's centre from the point; the
    # fourth point lies outside and is taken to the edge.
    moved = np.array([[-0.3, 0.0], [0.4, 0.0], [0.0, -0.4], [0.5, 0.0], [0.5, 0.5]])
    expected = (soft_argmax(rows, 0.1, window) - torch.from_numpy(end + moved).float()).norm(dim=1).mean()
    loss = end_point_loss([source], [target], [start], [end], beta=0.1, window=window)
    torch.testing.assert_close(loss[0], expected)


def test_the_end_point_loss_of_a_perfect_match_is_zero():
    one_hot = torch.eye(20).view(20, 4, 5)
    start = np.array([[0, 0], [4, 3], [2, 1]])
    # The same map, mirrored: every cell's descriptor lies where the mirrored cell was.
    end = np.stack([4 - start[:, 0], start[:, 1]], axis=1)
    loss = end_point_loss([one_hot], [one_hot.flip(-1)], [start], [end], beta=0.01)
    assert loss.item() < 1e-4
    assert end_point_loss([one_hot], [one_hot], [start], [end]) > 1


def test_noise_on_the_labels_is_seeded():
    source, target, start, end = example()
    batch = [source] * 2, [target] * 2, [start] * 2, [end] * 2

    def loss(noise, seed):
        return end_point_loss(*batch, noise=noise, generator=torch.Generator().manual_seed(seed))

    plain = end_point_loss(*batch)
    assert torch.equal(loss(0.5, 3), loss(0.5, 3))
    assert not torch.equal(loss(0.5, 3), loss(0.5, 4))
    mixed = loss([0.0, 0.5], 3)
    assert mixed[0] == plain[0] and mixed[1] != plain[1]
    with pytest.raises(ConfigError, match="noise needs a generator"):
        end_point_loss(*batch, noise=0.1)
    for wrong in (-1.0, math.nan, [0.1]):
        with pytest.raises(ConfigError, match="a number from 0, or one for each of 2 pairs"):
            loss(wrong, 0)


@pytest.mark.parametrize("loss", [contrastive_loss, sparse_contrastive_loss, end_point_loss])
def test_pairs_of_a_batch_do_not_touch_each_other(loss):
    """Different numbers of points, and maps of different sizes."""
    pairs = [example(5), example(2, source=(3, 3), seed=7), example(1, target=(2, 9), seed=8)]
    together = loss(*map(list, zip(*pairs, strict=True)))
    assert together.shape == (3,)
    for one, value in zip(pairs, together, strict=True):
        torch.testing.assert_close(loss(*([part] for part in one))[0], value)
    stacked = noise(2, 4, 3, 5)
    points = [np.array([[1.0, 2.0]]), np.array([[4.0, 0.0], [0.0, 0.0]])]
    torch.testing.assert_close(
        loss(stacked, stacked, points, points), loss(list(stacked), list(stacked), points, points)
    )


@pytest.mark.parametrize("loss", [contrastive_loss, sparse_contrastive_loss, end_point_loss])
def test_maps_learn_to_match(loss):
    source, target, start, end = example(3)
    end = np.clip(end, 0, (2, 4))
    source, target = (nn.Parameter(one) for one in (source, target))
    scale = nn.Parameter(torch.tensor(LOGIT_SCALE))
    options = {"beta": 0.2} if loss is end_point_loss else {"logit_scale": scale}
    weights = [source, target] + [scale] * (loss is not end_point_loss)
    optimizer = torch.optim.Adam(weights, 0.1)
    values = []
    for _ in range(40):
        value = loss([source], [target], [start], [end], **options).sum()
        optimizer.zero_grad()
        value.backward()
        assert all(weight.grad.abs().sum() > 0 for weight in weights)
        optimizer.step()
        values.append(value.item())
    assert values[-1] < 0.3 * values[0]


def test_points_are_rounded_to_even_and_brought_inside():
    points = np.array([[0.5, 0], [1.5, 0], [2.5, 0], [-3, 0], [99, 0], [0, 1.49], [0, 1.51], [2, 7]])
    expected = [0, 2, 2, 0, 5, 6, 12, 3 * 6 + 2]
    assert cell_index(points, (4, 6)).tolist() == expected
    assert cell_index(torch.from_numpy(points).float(), (4, 6)).tolist() == expected
    # As numpy does it on a square map, in the published order y, x.
    yx = np.random.default_rng(0).uniform(-2, 18, (200, 2)).round(1)
    numpy = np.round(np.clip(yx, 0, 15))
    assert cell_index(yx[:, ::-1].copy(), (16, 16)).tolist() == (16 * numpy[:, 0] + numpy[:, 1]).tolist()


def test_the_weighted_mean():
    losses = torch.tensor([1.0, 2.0, 4.0], requires_grad=True)
    mean = weighted_mean(losses, [1, 1, 0.25])
    assert mean.item() == pytest.approx(4 / 2.25)
    mean.backward()
    assert losses.grad[2] == pytest.approx(0.25 / 2.25)


@pytest.mark.parametrize("loss", [contrastive_loss, sparse_contrastive_loss, end_point_loss])
def test_what_does_not_go_together_is_told(loss):
    source, target, start, end = example()
    for error, message, batch in (
        (
            ConfigError,
            "1 source maps, 1 target maps, 1 and 2 sets of points",
            ([source], [target], [start], [end] * 2),
        ),
        (ConfigError, "0 source maps", ([], [], [], [])),
        (ConfigError, r"pair 0: maps must be \(C, h, w\) of the same C", ([source[:3]], [target], [start], [end])),
        (ConfigError, r"pair 0: maps must be \(C, h, w\)", ([source[None]], [target], [start], [end])),
        (ConfigError, r"pair 0: points must be \(K, 2\).*\(4, 2\)", ([source], [target], [start], [end[:4]])),
        (DataError, "pair 0 has no points", ([source], [target], [start[:0]], [end[:0]])),
        (
            DataError,
            "pair 1 has points that are not finite",
            ([source] * 2, [target] * 2, [start, start * np.inf], [end] * 2),
        ),
    ):
        with pytest.raises(error, match=message):
            loss(*batch)


# Mirror images ----------------------------------------------------------------------------------------------------


def test_mirrored_points_lie_on_the_same_content():
    image = noise(3, 4, 7)
    points = torch.tensor([[0.0, 0.0], [6.0, 3.0], [2.0, 1.0]], dtype=torch.float64)
    moved = mirrored_points(points, 7)
    there, here = (one.flatten(1) for one in (image.flip(-1), image))
    assert torch.equal(there[:, cell_index(moved, (4, 7))], here[:, cell_index(points, (4, 7))])


def test_a_pair_brings_its_mirror_images():
    maps = [noise(3, 4, 7, seed=seed) for seed in range(4)]
    points = [torch.from_numpy(np.random.default_rng(seed).uniform(0, 3, (4, 2))) for seed in range(2)]
    pair = Couple(*maps[:2], *points, weight=2.0)
    partners = [2, 1, 0, -1]
    first, double, itself = flipped_pairs(pair, *maps[2:], partners)
    assert first is pair
    assert double.source is maps[2] and double.target is maps[3]
    for one, other in ((double.source_points, points[0]), (double.target_points, points[1])):
        assert torch.equal(one, torch.stack([6 - other[:, 0], other[:, 1]], dim=1))
    # The left eye of the image is found where its mirror image has what was the right eye.
    assert itself.source is maps[2] and itself.target is maps[0]
    assert torch.equal(itself.target_points, points[0][:3])
    assert torch.equal(itself.source_points, mirrored_points(points[0], 7)[[2, 1, 0]])
    assert [one.weight for one in (first, double, itself)] == [2.0, 2.0, 0.5]
    assert flipped_pairs(pair, *maps[2:], partners, double=0, itself=0) == [pair]
    assert len(flipped_pairs(pair, *maps[2:])) == 2, "without a known symmetry only both are mirrored"
    assert len(flipped_pairs(pair, *maps[2:], [-1] * 4)) == 2
    with pytest.raises(ConfigError, match="3 partners for 4 points"):
        flipped_pairs(pair, *maps[2:], [0, 1, 2])
    with pytest.raises(ConfigError, match=r"mirrored target map is \(3, 4, 6\)"):
        flipped_pairs(pair, maps[2], maps[3][..., :6])


def test_a_symmetric_image_is_its_own_mirror():
    """An image that equals its mirror has each key where its partner's mirror image is: the added pair is perfect."""
    half = torch.eye(10).view(10, 2, 5)
    left = torch.cat([half, half.flip(-1)], dim=-1)
    points = torch.tensor([[1.0, 0.0], [8.0, 0.0]], dtype=torch.float64)
    pair = Couple(left, left, points, points)
    itself = flipped_pairs(pair, left, left, np.array([1, 0]))[-1]
    assert torch.equal(itself.source_points, points)
