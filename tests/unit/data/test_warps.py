import numpy as np
import pytest
import torch
from PIL import Image

from diffrep.data.images import ImageSet, Transform
from diffrep.data.warps import AffineWarp, Ranges, ThinPlateWarp, random_warp, warped_pairs
from diffrep.errors import ConfigError, DataError, UnknownNameError

SIZE = (72, 96)


def blob(size, at, sigma=2.0):
    x, y = np.meshgrid(np.arange(size[1]), np.arange(size[0]))
    return torch.from_numpy(np.exp(-((x - at[0]) ** 2 + (y - at[1]) ** 2) / 2 / sigma**2))[None]


def centre(image):
    x, y = np.meshgrid(np.arange(image.shape[-1]), np.arange(image.shape[-2]))
    weights = image[0].numpy()
    return np.array([(weights * x).sum(), (weights * y).sum()]) / weights.sum()


def warps(kind, count=6, ranges=None):
    rng = np.random.default_rng(3)
    return [random_warp(SIZE, kind, rng, *([ranges] if ranges else [])) for _ in range(count)]


@pytest.mark.parametrize("kind", ["affine", "tps"])
def test_a_rendered_image_shows_what_points_says(kind):
    """The source shows its own coordinates, which bilinear sampling keeps, so each target pixel tells its origin."""
    x, y = np.meshgrid(np.arange(SIZE[1], dtype=np.float64), np.arange(SIZE[0], dtype=np.float64))
    source = torch.from_numpy(np.stack([x, y, np.ones_like(x)]))
    for warp in warps(kind):
        target = warp.image(source).numpy()
        whole = target[2] > 1 - 1e-12  # not mixed with the black outside
        assert whole.mean() > 0.3
        shown, pixels = target[:2, whole].T, np.stack([x[whole], y[whole]], axis=1)
        assert np.abs(warp.points(shown) - pixels).max() < 1e-6


@pytest.mark.parametrize(("kind", "tolerance"), [("affine", 0.02), ("tps", 0.4)])
def test_a_rendered_blob_lands_where_points_says(kind, tolerance):
    """A plate bends the blob, which moves its centre of mass a little: less the smaller it is, see below."""
    for warp in warps(kind):
        for at in ([48, 36], [40, 45], [60, 30]):
            there = warp.points(np.array(at))
            assert np.abs(centre(warp.image(blob(SIZE, at))) - there).max() < tolerance


def test_the_bias_of_a_bent_blob_is_of_second_order():
    warp, at = warps("tps")[1], [40, 45]
    large, small = (np.abs(centre(warp.image(blob(SIZE, at, s))) - warp.points(at)).max() for s in (6.0, 3.0))
    assert small < large / 2.5


@pytest.mark.parametrize("kind", ["affine", "tps"])
def test_both_directions_are_inverse(kind):
    x, y = np.meshgrid(np.linspace(0, SIZE[1] - 1, 15), np.linspace(0, SIZE[0] - 1, 15))
    places = np.stack([x, y], -1)
    for warp in warps(kind):
        there = warp.points(places)
        assert there.shape == places.shape
        assert np.abs(there - places).max() > 1, "it does move them"
        assert np.abs(warp.sources(there) - places).max() < 1e-8
        back = warp.sources(places)
        assert np.abs(warp.points(back) - places).max() < 1e-6


def test_a_plate_passes_through_its_knots_and_leaves_an_affine_map_alone():
    rng = np.random.default_rng(0)
    knots = rng.uniform(0, 70, (9, 2))
    shifts = rng.uniform(-2, 2, (9, 2))
    plate = ThinPlateWarp(SIZE, knots, shifts)
    np.testing.assert_allclose(plate.sources(knots), knots + shifts, atol=1e-9)
    np.testing.assert_allclose(plate.points(knots + shifts), knots, atol=1e-6)
    matrix, offset = np.array([[1.1, 0.2], [-0.1, 0.9]]), np.array([3.0, -2.0])
    flat = ThinPlateWarp(SIZE, knots, knots @ matrix.T + offset - knots)
    affine = AffineWarp(SIZE, matrix, offset)
    np.testing.assert_allclose(flat.sources(knots + 5), affine.points(knots + 5), atol=1e-8)
    assert flat.least_stretch() == pytest.approx(np.linalg.det(matrix))


def test_slopes_are_the_derivative():
    plate = warps("tps")[0]
    at = np.array([[20.0, 30.0], [0.0, 0.0], [95.0, 71.0]])
    step = 1e-4
    for axis, shift in enumerate(np.eye(2) * step):
        numeric = (plate.sources(at + shift) - plate.sources(at - shift)) / (2 * step)
        np.testing.assert_allclose(plate.slopes(at)[..., axis], numeric, atol=1e-5)


def test_violent_plates_are_flattened_until_they_do_not_fold():
    wild = Ranges(bend=0.6)
    for warp in warps("tps", ranges=wild):
        assert warp.least_stretch() >= 0.2
        places = np.random.default_rng(1).uniform(0, 70, (50, 2))
        assert np.abs(warp.sources(warp.points(places)) - places).max() < 1e-8


@pytest.mark.parametrize("kind", ["affine", "tps"])
def test_ranges_of_zero_are_the_identity(kind):
    still = Ranges(rotation=0, scale=(1, 1), shear=0, shift=0, bend=0)
    image = torch.rand(3, *SIZE, generator=torch.Generator().manual_seed(0))
    warp = random_warp(SIZE, kind, np.random.default_rng(0), still)
    torch.testing.assert_close(warp.image(image), image, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", ["affine", "tps"])
def test_pairs_of_any_sizes(kind):
    generator = torch.Generator().manual_seed(0)
    images = [torch.rand(c, h, w, generator=generator) for c, h, w in ((3, 40, 60), (1, 64, 64), (3, 9, 8))]
    pairs = list(warped_pairs(images, seed=1, kind=kind, points=6))
    assert [pair.id for pair in pairs] == ["0", "1", "2"]
    for image, pair in zip(images, pairs, strict=True):
        height, width = image.shape[-2:]
        assert pair.source is image
        assert pair.target.shape == image.shape
        assert (pair.source_points == pair.source_points.round()).all()
        assert len(np.unique(pair.source_points, axis=0)) == len(pair.source_points) > 10
        for points in (pair.source_points, pair.target_points):
            assert points.min() >= 0
            assert (points <= (width - 1, height - 1)).all()
        np.testing.assert_array_equal(pair.warp.points(pair.source_points), pair.target_points)


def test_a_warp_belongs_to_seed_kind_and_id(tmp_path):
    for name in ("a.png", "b.png"):
        Image.effect_noise((32, 32), 60).save(tmp_path / name)
    from diffrep.data.folder import read_folder

    readers, _ = read_folder(tmp_path)
    images = ImageSet(readers, Transform(1))
    first, second = warped_pairs(images, 5)
    (alone,) = warped_pairs(images.subset([1]), 5)
    assert alone.id == second.id == "b.png"
    assert torch.equal(alone.target, second.target)
    assert not np.array_equal(first.warp.matrix, second.warp.matrix)
    assert not np.array_equal(next(iter(warped_pairs(images, 6))).warp.matrix, first.warp.matrix)


def test_points_outside_are_left_out():
    far = Ranges(shift=0.5)
    pairs = list(warped_pairs([torch.rand(1, 64, 64)] * 4, 2, points=10, ranges=far))
    assert min(len(pair.source_points) for pair in pairs) < 100
    with pytest.raises(DataError, match="0: the warp takes all points out of the image; use smaller ranges"):
        list(warped_pairs([torch.rand(1, 64, 64)] * 4, 0, points=2, ranges=Ranges(shift=4)))


def test_bad_input():
    rng = np.random.default_rng(0)
    with pytest.raises(UnknownNameError, match="unknown kind of warp 'afine'; did you mean 'affine'"):
        random_warp(SIZE, "afine", rng)
    with pytest.raises(ConfigError, match=r"an image of \(7, 40\) pixels is too small to warp; each side needs 8"):
        random_warp((7, 40), "affine", rng)
    with pytest.raises(ConfigError, match="scale is the least and the most magnification"):
        Ranges(scale=(1.2, 0.8))
    with pytest.raises(ConfigError, match="ranges are not negative"):
        Ranges(bend=-0.1)
    with pytest.raises(ConfigError, match="points=0; at least one along each side"):
        list(warped_pairs([torch.rand(1, 16, 16)], points=0))
    with pytest.raises(ConfigError, match=r"the warp is of \(72, 96\) pixels, and the image has \(96, 72\)"):
        warps("affine")[0].image(torch.rand(1, 96, 72))
    line = np.stack([np.arange(5.0), np.arange(5.0)], 1)
    with pytest.raises(DataError, match="the knots of a thin-plate warp lie on a line"):
        ThinPlateWarp(SIZE, line, line * 0)
    knots = np.array([[0.0, 0], [90, 0], [0, 70], [90, 70], [40, 30], [50, 30]])
    crossed = np.array([[0.0, 0], [0, 0], [0, 0], [0, 0], [20, 0], [-20, 0]])
    with pytest.raises(DataError, match="folds over; use smaller shifts"):
        ThinPlateWarp(SIZE, knots, crossed)
    with pytest.raises(DataError, match="has no place near its canvas"):
        warps("tps")[0].points(np.array([[1e9, 1e9]]))
