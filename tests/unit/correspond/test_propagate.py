"""Labels follow objects through a video, by the rule of DAVIS written out as a plain loop here."""

import gc

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from diffrep import FeatureRequest
from diffrep.correspond import propagate as module
from diffrep.correspond.masks import read_mask, region_similarity
from diffrep.correspond.propagate import (
    PROPAGATIONS,
    Propagation,
    frame_files,
    propagate,
    run_propagation,
    video_canvas,
)
from diffrep.errors import ConfigError, DataError

COLOURS = np.array([[40, 60, 80], [220, 60, 40], [60, 200, 90]])
SETTINGS = [
    Propagation(last=2, radius=2, top_k=4, temperature=0.1),
    Propagation(last=0, radius=3, top_k=50, temperature=0.05),
    Propagation(last=3, radius=2, shape="circle", top_k=3, temperature=0.2),
    Propagation(last=1, radius=0, top_k=5, temperature=0.1),
]


def video(frames=6, height=24, width=32, step=2, hidden=(), seed=0):
    """Two squares on a still background, one to the right and one upwards: (F, H, W, 3) uint8 and (F, H, W)."""
    random = np.random.default_rng(seed)
    texture = random.normal(0, 6, (height, width, 3))
    skins = random.normal(0, 6, (2, 8, 8, 3))
    images, masks = [], []
    for frame in range(frames):
        mask = np.zeros((height, width), np.uint8)
        image = COLOURS[0] + texture
        for label, (top, left) in ((1, (3, 2 + step * frame)), (2, (height - 9 - frame, 20))):
            if frame not in hidden:
                mask[top : top + 8, left : left + 8] = label
                part = image[top : top + 8, left : left + 8]
                part[:] = COLOURS[label] + skins[label - 1, : part.shape[0], : part.shape[1]]
        images.append(image.clip(0, 255).astype(np.uint8))
        masks.append(mask)
    return np.stack(images), np.stack(masks)


def features_of(images, cell=2):
    """Colours about their mean and a faint position, averaged over cells: (F, 5, h, w)."""
    colours = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255 - 0.4
    down, across = torch.meshgrid(*(torch.linspace(-0.1, 0.1, size) for size in colours.shape[2:]), indexing="ij")
    place = torch.stack([down, across]).expand(len(colours), -1, -1, -1)
    return F.avg_pool2d(torch.cat([colours, place], 1), cell)


def plain_loop(features, mask, labels, settings, scale):
    """The published rule, one cell at a time."""
    frames, channels, height, width = features.shape
    cells = F.normalize(features.double(), dim=1).numpy()
    small = np.asarray(Image.fromarray(mask).resize((width, height), Image.Resampling.NEAREST))
    shares = [np.stack([small == label for label in range(labels)]).astype(float)]
    found = [mask]
    for frame in range(1, frames):
        context = [0, *range(max(1, frame - settings.last), frame)]
        new = np.zeros((labels, height, width))
        for y in range(height):
            for x in range(width):
                near = [
                    (source, v, u)
                    for source in context
                    for v in range(height)
                    for u in range(width)
                    if settings.radius == 0
                    or (settings.shape == "square" and max(abs(v - y), abs(u - x)) <= settings.radius)
                    or (settings.shape == "circle" and (v - y) ** 2 + (u - x) ** 2 <= settings.radius**2)
                ]
                source, v, u = np.array(near).T
                weights = np.exp((cells[source, :, v, u] @ cells[frame, :, y, x]) / settings.temperature)
                weights[weights < np.sort(weights)[-settings.top_k :][0]] = 0
                stacked = np.stack(shares)
                order = np.searchsorted(context, source)
                new[:, y, x] = weights @ stacked[np.array(context)[order], :, v, u] / weights.sum()
        shares.append(new)
        large = F.interpolate(torch.from_numpy(new)[None], scale_factor=scale, mode="bilinear")[0].numpy()
        for one in large:
            if one.max() > 0:
                one -= one.min()
                one /= one.max()
        best = Image.fromarray(large.argmax(0).astype(np.uint8))
        found.append(np.asarray(best.resize(mask.shape[::-1], Image.Resampling.NEAREST)))
    return np.stack(shares), np.stack(found)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_equals_the_plain_loop(settings):
    images, masks = video(frames=5, height=24, width=28)
    features = features_of(images, cell=4) + 0.05 * torch.randn(5, 5, 6, 7, generator=torch.Generator().manual_seed(0))
    _, expected = plain_loop(features, masks[0], 3, settings, 4)
    found = np.stack(list(propagate(features, masks[0], settings)))
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, expected)


def test_shares_equal_the_plain_loop_in_tiles_of_any_size(monkeypatch):
    images, masks = video(frames=3, height=24, width=28)
    features, settings = features_of(images, cell=4), Propagation(last=2, radius=2, top_k=4, temperature=0.1)
    shares, _ = plain_loop(features, masks[0], 3, settings, 4)
    cells = F.normalize(features, dim=1)
    known = [torch.from_numpy(share).float() for share in shares]
    context = [(cells[0], known[0]), (cells[1], known[1])]
    for held in (2**24, 3000, 1):
        monkeypatch.setattr(module, "HELD", held)
        found = module.carry(cells[2], context, settings)
        assert torch.allclose(found, known[2], atol=1e-5)
        assert torch.allclose(found.sum(0), torch.ones(6, 7), atol=1e-5)


def test_equal_cells_share_their_labels():
    """Ties with the last of the best are all taken, as published: no order of cells decides."""
    mask = np.array([[1, 0, 0, 0]])
    found = module.carry(
        torch.ones(1, 1, 4), [(torch.ones(1, 1, 4), F.one_hot(torch.tensor(mask)).permute(2, 0, 1).float())],
        Propagation(radius=0, top_k=1),
    )  # fmt: skip
    assert torch.allclose(found[1], torch.full((1, 4), 0.25))


def test_published_size_rule():
    """The shares are enlarged to the network's input, and its labels brought to the frame by the nearest pixel."""
    images, masks = video(frames=3, height=26, width=33)
    features, settings = features_of(images[:, :24, :32], cell=4), SETTINGS[0]
    _, expected = plain_loop(features, masks[0], 3, settings, 4)
    found = list(propagate(features, masks[0], settings, canvas=(24, 32)))
    np.testing.assert_array_equal(np.stack(found), expected)


def test_objects_are_followed():
    images, masks = video(frames=8)
    found = list(propagate(features_of(images, 1), masks[0], Propagation(last=3, radius=4, top_k=5, temperature=0.02)))
    for label in (1, 2):
        scores = [region_similarity(a == label, b == label) for a, b in zip(masks, found, strict=True)]
        assert min(scores) > 0.85
    still = region_similarity(masks[0] == 1, masks[-1] == 1)
    assert still == 0, "the objects have left their places"


def test_the_first_frame_stays_in_the_context():
    """Objects that are hidden for longer than the frames that are looked back at are found again."""
    images, masks = video(frames=8, step=0, hidden=(2, 3, 4, 5))
    settings = Propagation(last=2, radius=6, top_k=3, temperature=0.02)
    found = list(propagate(features_of(images, 1), masks[0], settings))
    assert not (found[4] == 1).any()
    assert region_similarity(masks[6] == 1, found[6] == 1) > 0.9


def test_few_frames_are_held():
    shape, settings = (7, 5, 6), Propagation(last=2, radius=1, top_k=2)
    asked = []

    def frames():
        for number in range(12):
            asked.append(number)
            yield torch.randn(shape)

    for number, _ in enumerate(propagate(frames(), np.eye(5, 6, dtype=np.int64), settings)):
        assert asked == list(range(number + 1)), "a frame is asked for when its mask is"
        if number == 9:
            held = {t.data_ptr() for t in gc.get_objects() if type(t) is torch.Tensor and t.shape == shape}
    assert asked == list(range(12))
    assert 4 <= len(held) <= 5, "the first, two before, the current one, and what the caller gave"


def test_labels_keep_their_numbers():
    images, masks = video(frames=2)
    binary = np.where(masks[0] == 1, 255, 0).astype(np.uint8)
    found = list(propagate(features_of(images), binary, Propagation(radius=4, top_k=5)))
    assert np.unique(found[1]).tolist() == [0, 255]
    lost = np.zeros_like(binary)
    lost[:, :12], lost[0, 0] = 3, 9
    _, second = propagate(features_of(images), lost, Propagation(radius=4, top_k=5))
    assert np.unique(second).tolist() == [0, 3], "no cell's centre lies on the pixel with label 9"


@pytest.mark.parametrize("bad", [{"last": -1}, {"radius": -1}, {"top_k": 0}, {"temperature": 0}])
def test_settings_out_of_range(bad):
    with pytest.raises(ConfigError, match=next(iter(bad))):
        Propagation(**bad)


def test_unknown_neighbourhood():
    with pytest.raises(ConfigError, match="'square' or 'circle', given: 'disc'"):
        Propagation(shape="disc")


def test_bad_videos_and_masks():
    mask = np.eye(8, dtype=np.uint8)
    with pytest.raises(DataError, match="no frames"):
        list(propagate([], mask))
    with pytest.raises(DataError, match=r"\(3, 4, 5\); \(3, 4, 4\) as the first"):
        list(propagate([torch.ones(3, 4, 4), torch.ones(3, 4, 5)], mask))
    with pytest.raises(DataError, match=r"\(4, 4\); \(C, h, w\)"):
        list(propagate(torch.ones(2, 4, 4), mask))
    with pytest.raises(DataError, match="integers"):
        propagate([torch.ones(3, 4, 4)], mask.astype(float))
    with pytest.raises(DataError, match=r"integers \(H, W\), given: uint8 \(8, 8, 3\)"):
        propagate([torch.ones(3, 4, 4)], np.ones((8, 8, 3), np.uint8))
    with pytest.raises(DataError, match="label 7 alone"):
        propagate([torch.ones(3, 4, 4)], np.full((8, 8), 7))


def test_published_settings_and_sizes():
    sd, adm = PROPAGATIONS["dift-sd"], PROPAGATIONS["dift-adm"]
    assert (sd.last, sd.radius, sd.top_k, sd.temperature) == (28, 15, 15, 0.2)
    assert (adm.last, adm.radius, adm.top_k, adm.temperature) == (28, 15, 10, 0.1)
    assert video_canvas((480, 854), 480, 32) == (480, 832)
    assert video_canvas((1080, 1920), 480, 32) == (480, 832)
    assert video_canvas((854, 480), 480, 64) == (832, 448)
    assert video_canvas((37, 70), None, 8) == (32, 64)
    assert video_canvas((20, 20), None, 32) == (32, 32)


def save_video(folder, images, suffix="png", first=0):
    folder.mkdir()
    for number, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{number + first:05d}.{suffix}")
    return folder


def save_first(file, mask):
    image = Image.fromarray(mask)
    image.putpalette([0, 0, 0, 250, 10, 20, 30, 240, 50])
    image.save(file)
    return file


@pytest.fixture
def clip(tmp_path):
    images, masks = video(frames=4, height=32, width=40)
    return save_video(tmp_path / "frames", images), save_first(tmp_path / "first.png", masks[0]), masks


REQUEST = FeatureRequest("down_blocks.0.resnets.0", 20, draws=2)


def test_a_folder_of_frames(clip, unet, tmp_path):
    """The files hold what extraction and propagation by hand give, with the mask's own colours."""
    frames, first, masks = clip
    settings = Propagation(last=2, radius=3, top_k=3, temperature=0.1)
    written = run_propagation(unet, frames, first, REQUEST, tmp_path / "out", settings, multiple=8)
    assert [file.name for file in written] == [f"0000{n}.png" for n in range(4)]
    images = torch.stack([torch.from_numpy(np.array(Image.open(f).convert("L"))) for f in frame_files(frames)])
    ids = [f"frames/{file.name}" for file in frame_files(frames)]
    features = next(iter(unet.extract(images[:, None] / 255, REQUEST, ids=ids).values()))
    expected = list(propagate(features, masks[0], settings))
    for file, mask in zip(written, expected, strict=True):
        found, palette = read_mask(file)
        np.testing.assert_array_equal(found, mask)
        assert palette[:9] == [0, 0, 0, 250, 10, 20, 30, 240, 50]
    again = run_propagation(unet, frames, masks[0], REQUEST, tmp_path / "again", settings, multiple=8)
    np.testing.assert_array_equal(read_mask(again[-1])[0], expected[-1])
    assert read_mask(again[-1])[1][3:6] == [128, 0, 0], "an array has no colours, so they are those of PASCAL VOC"


def test_frames_are_resized_for_the_network(clip, unet, tmp_path):
    frames, first, masks = clip
    settings = Propagation(last=1, radius=2, top_k=3)
    written = run_propagation(unet, frames, first, REQUEST, tmp_path / "out", settings, size=24, multiple=8)
    assert read_mask(written[-1])[0].shape == masks[0].shape


def test_requests_and_folders_that_do_not_fit(clip, unet, tmp_path):
    frames, first, _ = clip
    for request in (
        FeatureRequest(["down_blocks.0", "mid_block"], 20),
        FeatureRequest("mid_block", (20, 30)),
        FeatureRequest("mid_block", 20, pool="mean"),
    ):
        with pytest.raises(ConfigError, match="one layer at one level"):
            run_propagation(unet, frames, first, request, tmp_path / "out")
    with pytest.raises(ConfigError, match="overwrite the frames"):
        run_propagation(unet, frames, first, REQUEST, frames)
    Image.new("L", (28, 24)).save(frames / "00002.png")
    with pytest.raises(DataError, match="24x28 pixels and the first mask 32x40"):
        run_propagation(unet, frames, first, REQUEST, tmp_path / "out", multiple=8)
    Image.new("L", (40, 32)).save(frames / "00002.png")
    (frames / "00003.png").write_bytes(b"no image")
    with pytest.raises(DataError, match="00003.png: cannot read"):
        run_propagation(unet, frames, first, REQUEST, tmp_path / "out", multiple=8)


def test_the_order_of_frames_is_never_a_guess(tmp_path):
    with pytest.raises(DataError, match="no frames"):
        frame_files(tmp_path)
    for name in ("frame_2.png", "frame_10.png", ".hidden.png", "notes.txt"):
        (tmp_path / name).touch()
    with pytest.raises(DataError, match="'frame_10.png' stands where 'frame_2.png' .* leading zeros"):
        frame_files(tmp_path)
    (tmp_path / "frame_2.png").rename(tmp_path / "frame_02.png")
    assert [file.name for file in frame_files(tmp_path)] == ["frame_02.png", "frame_10.png"]
    (tmp_path / "frame_10.jpg").touch()
    with pytest.raises(DataError, match="differ in their suffix"):
        frame_files(tmp_path)
