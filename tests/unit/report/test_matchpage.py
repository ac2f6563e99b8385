"""The page's numbers give the similarities of the maps they were made of."""

import base64
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from diffrep.errors import DataError
from diffrep.report.matchpage import gram, pack, write_match_page

SHAPES = ((24, 9, 13), (24, 12, 7))


def smooth_maps(shapes=SHAPES, seed=0):
    """Maps with a common mean and neighbouring cells alike, as a network's are."""
    generator = torch.Generator().manual_seed(seed)
    mean = 2 * torch.randn(shapes[0][0], 1, 1, generator=generator)
    coarse = [torch.randn(1, c, -(-h // 3), -(-w // 3), generator=generator) for c, h, w in shapes]
    sizes = [shape[1:] for shape in shapes]
    grown = [F.interpolate(one, size=size, mode="bicubic")[0] for one, size in zip(coarse, sizes, strict=True)]
    return tuple((one * torch.linspace(1, 0.1, len(one))[:, None, None] + mean).numpy() for one in grown)


def images(*sizes):
    random = np.random.default_rng(0)
    return tuple(random.integers(0, 255, (high, wide, 3), np.uint8) for wide, high in sizes)


def read(file):
    page = file.read_text()
    text = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S).group(1)
    return page, json.loads(text)


def decoded(side, data, kind):
    raw = np.frombuffer(base64.b64decode(side[kind]), {"values": np.int8, "gram": "<f4"}[kind]).copy()
    wide, high = side["cells"]
    if kind == "gram":
        return raw.reshape(5, high, wide)
    planes = raw.reshape(-1, high, wide) * np.array(data["scales"], np.float32)[:, None, None]
    found = np.zeros((data["channels"][-1] + 1, high, wide), np.float32)
    np.add.at(found, data["channels"], planes)
    return found


def test_similarities_of_the_page_are_those_of_enlarged_maps(tmp_path):
    """The query and norm rule of the page's script, against both maps enlarged to the images and normalised."""
    maps, sizes = smooth_maps(), ((52, 36), (28, 48))
    error = write_match_page(tmp_path / "page.html", images(*sizes), maps)
    _, data = read(tmp_path / "page.html")
    enlarged, exact = [], []
    for side, one, (wide, high) in zip(data["sides"], maps, sizes, strict=True):
        grams = torch.from_numpy(decoded(side, data, "gram"))
        values = torch.from_numpy(decoded(side, data, "values")) * grams[0].sqrt()
        both = [torch.from_numpy(one), values]
        both = [F.interpolate(each[None], size=(high, wide), mode="bilinear")[0] for each in both]
        exact.append(F.normalize(both[0], dim=0).flatten(1))
        enlarged.append((both[1] / both[0].norm(dim=0)).flatten(1))
    difference = (exact[0].T @ exact[1] - enlarged[0].T @ enlarged[1]).abs().max()
    assert error < 0.002
    assert difference < 2 * error + 1e-5


def test_norms_follow_from_the_neighbours():
    """The square of an interpolated norm by the page's formula, against the interpolated map's own."""
    one = smooth_maps()[0]
    _, height, width = one.shape
    wide, high = 40, 31
    own, right, below, across, other = gram(one)
    place = [((np.arange(size) + 0.5) / size * cells - 0.5).clip(0, cells - 1)
             for size, cells in ((high, height), (wide, width))]  # fmt: skip
    (top, left), (fy, fx) = (p.astype(int) for p in place), (p % 1 for p in place)
    low, end = np.minimum(top + 1, height - 1), np.minimum(left + 1, width - 1)
    a, b = np.outer(1 - fy, 1 - fx), np.outer(1 - fy, fx)
    c, d = np.outer(fy, 1 - fx), np.outer(fy, fx)
    at = [np.ix_(*pair) for pair in ((top, left), (top, end), (low, left), (low, end))]
    square = a * a * own[at[0]] + b * b * own[at[1]] + c * c * own[at[2]] + d * d * own[at[3]]
    square += 2 * (a * b * right[at[0]] + c * d * right[at[2]] + a * c * below[at[0]] + b * d * below[at[1]])
    square += 2 * (a * d * across[at[0]] + b * c * other[at[0]])
    expected = F.interpolate(torch.from_numpy(one)[None], size=(high, wide), mode="bilinear")[0].norm(dim=0)
    np.testing.assert_allclose(np.sqrt(square), expected, rtol=1e-4)


def test_the_stated_error_is_that_of_the_cells():
    maps = smooth_maps()
    for room in (10**6, 2500):
        packed = pack(list(maps), room)
        units = [F.normalize(torch.from_numpy(one).flatten(1), dim=0) for one in maps]
        read = []
        for planes in packed.values:
            assert planes.dtype == np.int8
            found = np.zeros((packed.kept, planes.shape[1]))
            np.add.at(found, packed.channels, planes * np.array(packed.scales)[:, None])
            read.append(torch.from_numpy(found).float())
        error = (units[0].T @ units[1] - read[0].T @ read[1]).abs().max().item()
        assert packed.error == pytest.approx(error, abs=1e-5)
        assert sum(planes.size for planes in packed.values) <= room
    assert packed.kept == 2500 // (9 * 13 + 12 * 7)
    assert packed.error > 0.002, "little room costs accuracy, and it is said"


def test_more_channels_than_cells_and_cells_of_zeros(tmp_path):
    maps = [np.random.default_rng(n).normal(size=(200, 3, 4)).astype(np.float32) for n in range(2)]
    maps[1][:, 0, 0] = 0
    packed = pack(maps)
    assert packed.kept <= 24
    assert packed.error < 0.003
    assert write_match_page(tmp_path / "page.html", images((8, 8), (8, 8)), tuple(maps)) == packed.error


def test_large_maps_and_photos_stay_below_five_megabytes(tmp_path):
    random = np.random.default_rng(0)
    maps = tuple(random.normal(size=(40, side, side + 3)).astype(np.float16) for side in (200, 128))
    error = write_match_page(tmp_path / "page.html", images((900, 700), (300, 1200)), maps)
    page, data = read(tmp_path / "page.html")
    assert (tmp_path / "page.html").stat().st_size < 5e6
    assert "averaged over blocks of 2×2 cells" in page
    assert [side["cells"] for side in data["sides"]] == [[101, 100], [65, 64]]
    assert [side["shown"] for side in data["sides"]] == [[640, 498], [160, 640]]
    assert [side["size"] for side in data["sides"]] == [[900, 700], [300, 1200]]
    assert f"off by at most {error:.2g}" in " ".join(page.split())


class Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.addresses, self.tags = [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.addresses += [value for name, value in attributes if name in ("src", "href")]


def test_needs_no_other_file(tmp_path):
    write_match_page(tmp_path / "page.html", images((8, 8), (8, 8)), smooth_maps(), names=("</script>", "<!--"))
    page, data = read(tmp_path / "page.html")
    parser = Tags()
    parser.feed(page)
    assert parser.addresses == []
    assert not {"link", "iframe", "object", "base"} & set(parser.tags)
    assert not re.search(r"https?:|url\(|@import|fetch\(|XMLHttp", page)
    assert "default-src 'none'" in page
    assert [side["name"] for side in data["sides"]] == ["</script>", "<!--"]
    assert parser.tags.count("script") == 2


def test_images_and_maps_that_do_not_fit(tmp_path):
    file, maps, pair = tmp_path / "page.html", smooth_maps(), images((8, 8), (8, 8))
    with pytest.raises(DataError, match=r"uint8 \(H, W, 3\), given: uint8 \(8, 8\)"):
        write_match_page(file, (pair[0][..., 0], pair[1]), maps)
    with pytest.raises(DataError, match="uint8"):
        write_match_page(file, (pair[0] / 255, pair[1]), maps)
    with pytest.raises(DataError, match=r"same C, given: \[\(24, 9, 13\), \(9, 12, 7\)\]"):
        write_match_page(file, pair, (maps[0], maps[1][:9]))
    with pytest.raises(DataError, match="finite"):
        write_match_page(file, pair, (maps[0], np.full_like(maps[1], np.nan)))
    assert not file.exists()
