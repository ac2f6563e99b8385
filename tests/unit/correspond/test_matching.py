import numpy as np
import pytest
import torch
from torch.nn.functional import grid_sample, interpolate, normalize
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from diffrep.config.protocol import get_protocol
from diffrep.correspond import matching
from diffrep.correspond.grid import axis_of, squared_norms
from diffrep.correspond.matching import mutual_nearest_neighbours, prepare
from diffrep.correspond.predict import Question, predict, predict_all
from diffrep.correspond.soft import soft_argmax
from diffrep.data.frame import Frame, frame_of
from diffrep.errors import ConfigError, DataError


def drawn(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def points_in(seed, size, count=7):
    """Whole pixels of an image of (H, W), (K, 2) as x, y."""
    return np.random.default_rng(seed).integers(0, size[::-1], (count, 2)).astype(np.float64)


def side(features, original, protocol, canvas=None, fit="resize", mask=None):
    return prepare(features, frame_of(original, canvas, fit), get_protocol(protocol), mask)


def upsampled(features, size):
    return interpolate(features.double()[None], size, mode="bilinear")[0]


def by_loop(source, target, cells):
    """The usual way: maps at full size (C, H, W), one point (x, y) at a time. Returns (K, H, W)."""
    alike = [torch.einsum("c,chw->hw", normalize(source[:, y, x], dim=0), normalize(target, dim=0)) for x, y in cells]
    return torch.stack(alike).numpy()


def peaks(alike):
    """The first of the most similar pixels, (K, 2) as x, y."""
    flat = alike.reshape(len(alike), -1).argmax(1)
    return np.stack([flat % alike.shape[2], flat // alike.shape[2]], axis=1)


def assert_peaks(found, alike):
    """Each is the loop's most similar pixel; where several are equally similar to the loop, it is one of them."""
    for (x, y), one, (best_x, best_y) in zip(found.astype(int), alike, peaks(alike), strict=True):
        tied = (one > one.max() - 1e-9).sum() > 1
        assert one[y, x] > one.max() - 1e-9 if tied else (x, y) == (best_x, best_y)


@pytest.mark.parametrize("seed", range(8))
def test_pixels_of_the_image_are_those_of_the_loop(seed):
    random = np.random.default_rng(seed)
    sizes = [tuple(random.integers(40, 130, 2).tolist()) for _ in range(2)]
    maps = [drawn(seed + 10 * n, 12, *random.integers(1 + n, 14, 2).tolist()) for n in range(2)]
    if seed % 2:
        maps = [one.half() for one in maps]
    points = points_in(seed, sizes[0], 9)
    alike = by_loop(upsampled(maps[0], sizes[0]), upsampled(maps[1], sizes[1]), points.astype(int))
    canvas = [None, (64, 48)][seed // 4]  # a resized canvas of any size covers the same image
    found = predict(*(side(one, size, "dift", canvas) for one, size in zip(maps, sizes, strict=True)), points)
    assert_peaks(found, alike)


def test_a_square_frame_with_rounded_points():
    sizes, load = [(91, 57), (50, 120)], 37
    maps = [drawn(1, 8, 9, 11), drawn(2, 8, 7, 10)]
    points = points_in(3, sizes[0]) + 0.25
    cells = np.rint((points * load / (57, 91)).clip(0, load - 1)).astype(int)
    alike = by_loop(*(upsampled(one, (load, load)) for one in maps), cells)
    rules = {"base": "hyperfeatures", "size": load}
    found = predict(*(side(one, size, rules, (256, 256)) for one, size in zip(maps, sizes, strict=True)), points)
    assert_peaks(np.rint(found * load / (120, 50)), alike)
    np.testing.assert_allclose(found, np.rint(found * load / (120, 50)) * (120 / load, 50 / load), atol=1e-9)


def test_padding_is_no_candidate_for_pixels_of_the_image():
    size, canvas = (20, 30), (30, 30)  # five rows of padding above and below, at scale 1
    maps = [drawn(4, 6, 5, 5), drawn(5, 6, 6, 6)]
    points = points_in(6, size, 20)
    full = [upsampled(one, canvas)[:, 5:25] for one in maps]
    whole = peaks(by_loop(full[0], upsampled(maps[1], canvas), points.astype(int)))
    assert not ((whole[:, 1] >= 5) & (whole[:, 1] < 25)).all()
    found = predict(*(side(one, size, "dift", canvas, "pad") for one in maps), points)
    assert_peaks(found, by_loop(*full, points.astype(int)))


def test_cells_of_a_padded_frame():
    rules = {"base": "geoaware", "size": 120, "grid": 10}
    size, target_size = (60, 90), (80, 40)
    maps = [drawn(7, 6, 10, 10), drawn(8, 6, 5, 5)]
    points = points_in(9, size, 12)
    framed = points * (120 / 90) + (0, 20)
    cells = np.floor(framed / 12).astype(int)
    expected = peaks(by_loop(maps[0].double(), upsampled(maps[1], (10, 10)), cells))
    expected = (expected * 12 + 6 - (30, 0)) / 1.5
    sides = [side(maps[0], size, rules, (120, 120), "pad"), side(maps[1], target_size, rules, (240, 240), "pad")]
    np.testing.assert_allclose(predict(*sides, points), expected, atol=1e-9)


def test_norms_follow_from_neighbours_even_where_they_cancel():
    features, size = drawn(10, 5, 4, 6), (23, 41)
    features[:, :, 3] = -0.999 * features[:, :, 2]
    rows, columns = (axis_of((np.arange(n) + 0.5) * m / n - 0.5, m) for n, m in zip(size, (4, 6), strict=True))
    expected = upsampled(features, size).square().sum(0)
    assert expected.min() < 0.01 * expected.median()
    torch.testing.assert_close(squared_norms(features, rows, columns), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", ["cosine", "l2"])
def test_similarities(kind):
    target = side(drawn(11, 6, 5, 7), (33, 26), {"name": "mine", "similarity": kind})
    queries, full = drawn(12, 4, 6), upsampled(drawn(11, 6, 5, 7), (33, 26)).float()
    if kind == "cosine":
        expected = torch.einsum("kc,chw->khw", normalize(queries), normalize(full, dim=0))
    else:
        expected = -torch.cdist(queries, full.flatten(1).T).view(4, 33, 26)
    torch.testing.assert_close(target.similarity(queries), expected, atol=2e-6, rtol=1e-5)
    peaks = expected.flatten(1).argmax(1)
    torch.testing.assert_close(target.match(queries), torch.stack([peaks % 26, peaks // 26], 1).float())


@pytest.mark.parametrize("how", [{}, {"window": 5}, {"kernel": 1.5}, {"window": 3, "outside": "exclude"}])
def test_soft_matches(how):
    rules = {"name": "mine", "match": "soft", "grid": 12, "centre": 0.5, "temperature": 0.05, **how}
    size = (60, 36)
    source, target = (side(drawn(seed, 8, 12, 12), size, rules) for seed in (13, 14))
    points = points_in(15, size)
    cells = np.floor(points / (3, 5)).astype(int)
    units = [normalize(drawn(seed, 8, 12, 12), dim=0) for seed in (13, 14)]
    alike = torch.einsum("ck,chw->khw", units[0][:, cells[:, 1], cells[:, 0]], units[1])
    expected = soft_argmax(alike, 0.05, how.get("window"), how.get("kernel"), how.get("outside", "zero"))
    np.testing.assert_allclose(predict(source, target, points), (expected.numpy() + 0.5) * (3, 5), atol=1e-3)


def test_queries():
    size, features = (40, 60), drawn(16, 3, 4, 6)
    points = np.array([[0.0, 0.0], [16.0, 26.0], [25.0, 5.0], [59.9, 39.9], [70.0, -3.0]])
    rules = {"name": "mine", "grid": 10}

    def read(**more):
        return side(features, size, {**rules, **more}).lookup(points)

    cells = upsampled(features, (10, 10)).float()
    x, y = np.array([0, 2, 4, 9, 9]), np.array([0, 6, 1, 9, 0])  # cells of 6 x 4 pixels
    torch.testing.assert_close(read(query="floor"), cells[:, y, x].T)
    x, y = np.array([0, 3, 4, 9, 9]), np.array([0, 6, 1, 9, 0])  # 16 / 6 -> 3, and 6.5 -> 6
    torch.testing.assert_close(read(query="round"), cells[:, y, x].T)

    at = torch.from_numpy(points.clip(0, (60, 40)) / (60, 40) * 2 - 1).float()[None, None]
    expected = grid_sample(features[None], at, align_corners=False, padding_mode="border")[0, :, 0].T
    torch.testing.assert_close(read(query="bilinear", centre=0.5, grid=None), expected)
    units = normalize(cells, dim=0)[None]
    expected = grid_sample(units, at, align_corners=True, padding_mode="border")[0, :, 0].T
    torch.testing.assert_close(read(query="aligned"), expected)


def test_round_goes_to_the_even_pixel_and_floor_survives_the_frame():
    ramp = torch.arange(8.0).expand(1, 8, 8)
    sampled = side(ramp, (8, 8), {"name": "mine", "query": "round"}).lookup(np.array([[2.5, 0], [3.5, 0], [4.4, 0]]))
    assert sampled[:, 0].tolist() == [2, 4, 4]
    ramp = torch.arange(60.0).expand(1, 60, 60)
    frame = Frame((100, 100), (840, 840), (8.4, 8.4))
    at = prepare(ramp, frame, get_protocol("geoaware")).lookup(np.array([[20.0 * n / 12, 0] for n in range(60)]))
    torch.testing.assert_close(at[:, 0], torch.arange(60.0), rtol=0, atol=1e-4)


def test_the_first_of_equal_pixels_wins():
    flat = torch.ones(3, 4, 4)
    assert predict(*[side(flat, (9, 9), "dift")] * 2, np.array([[5.0, 5.0]])).tolist() == [[0, 0]]
    # The outer half cell of an upsampled map is constant: its first pixel counts.
    corner = torch.zeros(2, 2, 2)
    corner[0], corner[1] = 1, 1
    corner[:, 1, 1] = torch.tensor([1.0, 0.0])
    source = side(torch.tensor([1.0, 0.0])[:, None, None], (8, 8), "dift")
    assert predict(source, side(corner, (8, 8), "dift"), np.array([[0.0, 0.0]])).tolist() == [[6, 6]]


def test_a_map_of_zeros_is_like_nothing():
    target = side(torch.zeros(3, 4, 4), (9, 7), "dift")
    assert target.similarity(torch.ones(2, 3)).abs().max() == 0
    assert target.match(torch.ones(2, 3)).tolist() == [[0, 0], [0, 0]]


class Largest(TorchDispatchMode):
    """Notes the size of the largest tensor that any operation made."""

    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for one in tree_leaves(made):
            if isinstance(one, torch.Tensor):
                self.numbers = max(self.numbers, one.numel())
        return made


def test_no_map_is_held_at_full_size_and_blocks_bound_the_queries(monkeypatch):
    size, channels = (300, 400), 128
    maps = [drawn(seed, channels, 6, 8) for seed in (17, 18)]
    points = points_in(19, size, 40)
    together = predict(*(side(one, size, "dift") for one in maps), points)
    monkeypatch.setattr(matching, "LARGEST", 3 * 300 * 400)
    with Largest() as largest:
        found = predict(*(side(one, size, "dift") for one in maps), points)
    assert largest.numbers == 3 * 300 * 400 < channels * 300 * 400
    np.testing.assert_array_equal(found, together)


def test_many_pairs_are_answered_as_each_alone():
    sizes = [(40, 30), (33, 47), (25, 25)]
    sides = [side(drawn(seed, 6, 5, 4), size, "dift") for seed, size in enumerate(sizes)]
    questions = [
        Question(sides[a], sides[b], points_in(a + b, sizes[a], count))
        for a, b, count in [(0, 1, 3), (2, 1, 5), (1, 0, 2), (0, 2, 0), (2, 0, 4)]
    ]
    answers = predict_all(iter(questions))
    assert [len(one) for one in answers] == [3, 5, 2, 0, 4]
    for question, answer in zip(questions, answers, strict=True):
        np.testing.assert_array_equal(answer, predict(question.source, question.target, question.points))


@pytest.mark.gpu
def test_cuda_answers_as_the_cpu():
    size = (120, 90)
    maps = [drawn(seed, 64, 12, 9) for seed in (20, 21)]
    points = points_in(22, size, 30)
    for rules in ("dift", "geoaware-soft", "probe3d"):
        on_cpu, on_gpu = (predict(*(side(one.to(to), size, rules) for one in maps), points) for to in ("cpu", "cuda"))
        np.testing.assert_allclose(on_gpu, on_cpu, atol=1e-2)


def test_bad_input():
    one = side(drawn(1, 6, 5, 5), (20, 20), "dift")
    points = np.zeros((2, 2))
    with pytest.raises(DataError, match=r"floats \(C, h, w\), got torch.float32 \(1, 6, 5, 5\)"):
        side(drawn(1, 1, 6, 5, 5), (20, 20), "dift")
    with pytest.raises(DataError, match="torch.int64"):
        side(torch.ones(6, 5, 5, dtype=torch.int64), (20, 20), "dift")
    with pytest.raises(DataError, match="NaN or inf"):
        side(torch.full((6, 5, 5), 70000.0).half(), (20, 20), "dift")
    with pytest.raises(DataError, match=r"mask has the shape \(5, 5\), the image \(20, 20\)"):
        side(drawn(1, 6, 5, 5), (20, 20), "dift", mask=np.ones((5, 5), bool))
    with pytest.raises(ConfigError, match="meet a map of 8 channels"):
        predict(one, side(drawn(1, 8, 5, 5), (20, 20), "dift"), points)
    with pytest.raises(ConfigError, match="prepared for 'dift', the target for 'ldm'"):
        predict(one, side(drawn(1, 6, 5, 5), (20, 20), "ldm"), points)
    for bad in (np.zeros((2, 3)), np.zeros(2), np.full((1, 2), np.nan)):
        with pytest.raises(ConfigError, match=r"finite \(K, 2\) are needed"):
            predict(one, one, bad)


@pytest.mark.parametrize("metric", ["cosine", "l2"])
def test_mutual_nearest_neighbours(metric):
    first, second = drawn(23, 31, 5), drawn(24, 27, 5)
    alike = {"cosine": normalize(first) @ normalize(second).T, "l2": -torch.cdist(first, second)}[metric]
    expected = [[a, alike[a].argmax().item()] for a in range(31) if alike[:, alike[a].argmax()].argmax() == a]
    assert 0 < len(expected) < 27
    for rows in (4096, 7, 1):
        assert mutual_nearest_neighbours(first, second, metric, rows).tolist() == expected


def test_equal_descriptors_pair_with_the_first():
    first, second = torch.eye(3)[[0, 1, 0]], torch.eye(3)[[1, 0, 1, 0]]
    for rows in (4096, 1):
        assert mutual_nearest_neighbours(first, second, rows=rows).tolist() == [[0, 1], [1, 0]]
    with pytest.raises(ConfigError, match="unknown metric 'dot'"):
        mutual_nearest_neighbours(first, second, "dot")
    with pytest.raises(ConfigError, match="neither of them empty"):
        mutual_nearest_neighbours(first, second[:0])
    with pytest.raises(ConfigError, match="same C"):
        mutual_nearest_neighbours(first, second[:, :2])
