"""What `diffrep extract --dry-run` tells of costs."""

import json

import pytest

from diffrep.cli import main


def call(capsys, *words, check=0):
    capsys.readouterr()
    status = main(["extract", *map(str, words)])
    captured = capsys.readouterr()
    assert status == check, captured.out + captured.err
    return captured


@pytest.fixture
def sit(tmp_path):
    """A request of a registered network whose weights and images are not here."""
    words = ["backbone=SiT-XL/2", f"data={tmp_path}/absent", "request.layers=repa.8", "request.levels=0.5"]
    return [*words, f"out={tmp_path}/store", "--dry-run"]


def test_costs_of_images_that_are_not_here(capsys, sit, tmp_path):
    out = call(capsys, *sit, "--images", "400,000,000", "--cards", "a100,H100").out
    for line in (
        "units     400,000 of 1,000 samples",
        "images    400,000,000",
        "FLOPs     136 E (341 G an image, 80% of it encoding)",
        "bytes     236 TB of features (590 kB an image)",
        "work      109 EFLOPs to encode, 27.1 EFLOPs of the network",
        "layer     blocks.7: 590 kB an image, 236 TB in all",
        "unit      590 MB for 1,000 samples; a process holds about two in memory",
        "A100      346 GPU-hours at 35% of 312 TFLOP/s in bfloat16",
        "H100      109 GPU-hours at 35% of 989.4 TFLOP/s in bfloat16",
    ):
        assert line in out.splitlines()
    assert "warning   the features, 236 TB, do not fit into the" in out
    assert out.splitlines()[-1].startswith("time      not measured")
    assert not list(tmp_path.iterdir()), "a dry run writes nothing"


def test_the_same_as_json(capsys, sit):
    words = ["--images", 1000, "--utilisation", 0.7, "--json", "request.levels=[0.25,0.5]", "latents=runs/latents"]
    found = json.loads(call(capsys, *sit, *words).out)
    assert found["units"] == 1 and found["forwards"] == 2000
    assert found["bytes"]["layers"] == {"blocks.7": {"t=0.25": 589_824_000, "t=0.5": 589_824_000}}
    assert found["bytes"]["total"] == 2 * 589_824_000 and found["bytes"]["latents"] == 1000 * 4 * 4 * 32 * 32
    assert found["flops"]["encoder"] == 0, "latents are read"
    hours = found["flops"]["network"] / (0.7 * 989.4e12) / 3600
    assert found["gpu"]["hours"]["H100"] == pytest.approx(hours)
    assert found["time"].startswith("not measured")


def test_a_streamed_set_is_told_by_its_shards(capsys, unet_folder, tmp_path):
    words = [f"backbone={unet_folder}", "backbone.device=meta", "request.layers=mid_block", "request.levels=5"]
    words += [f"out={tmp_path}/store", "--dry-run", "data=s3://bucket/train-{000..399}.tar"]
    assert "say how many there are with --images" in call(capsys, *words, check=2).err
    out = call(capsys, *words, "--images", 800_000_000).out
    assert "units     400, one for each shard" in out.splitlines()
    assert "unit      4.1 GB for a shard; a process holds about two in memory" in out.splitlines()
    assert "cut the shards" in out
    folder = call(capsys, *words[:-1], "data=s3://bucket/train", "--images", 800_000_000).out
    assert "units     one for each shard" in folder.splitlines() and "cut the shards" not in folder


def test_weights_that_are_here_are_measured_without_images(capsys, unet_folder, tmp_path):
    words = [f"backbone={unet_folder}", f"data={tmp_path}/absent", "request.layers=blocks", "request.levels=5"]
    out = call(capsys, *words, f"out={tmp_path}/store", "--dry-run", "--images", 100).out
    assert "from one batch" in out.splitlines()[-1]
    assert "warning" not in out


def test_only_what_is_missing_needs_room(capsys, unet_folder, image_folder, tmp_path):
    words = [f"backbone={unet_folder}", f"data={image_folder}", "request.layers=blocks", "request.levels=5"]
    words += ["unit_size=5", f"out={tmp_path}/store"]
    found = [json.loads(call(capsys, *words, "--dry-run", "--json").out)]
    call(capsys, *words)
    found.append(json.loads(call(capsys, *words, "--dry-run", "--json").out))
    assert [one["done"] for one in found] == [0, 36]
    assert found[0]["images"] == 36 and found[0]["bytes"] == {**found[1]["bytes"], "free": found[0]["bytes"]["free"]}


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--cards", "A1000", "--dry-run", "--images", "5"], "unknown card 'A1000'; did you mean 'A100'"),
        (["--images", "5"], "--images: only --dry-run takes this"),
        (["--cards", "A100", "--json"], "--cards, --json: only --dry-run takes this"),
        (["--dry-run", "--images", "5", "request.noise=generation"], "noise=generation makes its own images"),
    ],
)
def test_mistakes(capsys, sit, words, text):
    assert text in call(capsys, *sit[:-1], *words, check=2).err


@pytest.mark.parametrize("words", [["--images", "none"], ["--images", "0"], ["--utilisation", "1.5"]])
def test_numbers_out_of_range(sit, words):
    with pytest.raises(SystemExit):
        main(["extract", *sit, *words])
