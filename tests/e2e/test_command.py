"""The command as a user types it."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from diffrep import FeatureRequest, FeatureStore, dist, load_backbone
from diffrep.cli import main
from diffrep.config import DataConfig
from diffrep.demo import BACKBONE, _extract


def run(*words, check):
    """Runs the command in a process of its own, as a shell does."""
    command = [sys.executable, "-m", "diffrep", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == check, done.stdout + done.stderr
    return done


def call(capsys, *words, check):
    """Runs the command in this process, which saves the imports, and returns (stdout, stderr)."""
    capsys.readouterr()
    status = main([str(word) for word in words])
    captured = capsys.readouterr()
    assert status == check, captured.out + captured.err
    return captured


@pytest.fixture(scope="module")
def words(unet_folder, image_folder):
    return [
        f"backbone={unet_folder}",
        f"data={image_folder}",
        "request.layers=blocks",
        "request.levels=[5,300]",
        "request.dtype=float32",
        "request.draws=2",
        "request.pool=2",
        "unit_size=5",
        "batch_size=7",
    ]


@pytest.fixture(scope="module")
def store(words, tmp_path_factory):
    out = tmp_path_factory.mktemp("reference") / "store"
    assert main(["extract", *words, f"out={out}"]) == 0
    return out


def assert_equal(a, b):
    a, b = FeatureStore(a), FeatureStore(b)
    assert a.ids == b.ids
    for layer in a.layers:
        for level in a.levels:
            expected = b[layer, level]
            assert (a[layer, level] - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_help():
    run("--help", check=0)
    assert "--dry-run" in run("extract", "--help", check=0).stdout


def test_layers_needs_no_weights(capsys, unet_folder, tmp_path):
    folder = tmp_path / "net"
    shutil.copytree(unet_folder, folder)
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    table = call(capsys, "layers", folder, "--depth", 1, check=0).out
    summary, *lines = table.splitlines()
    assert summary.startswith("net: UNet2DModel, 0.0 M parameters, input 1x16x16")
    names = [line.split()[0] for line in lines]
    assert names[:4] == ["name", "conv_in", "down_blocks.0", "down_blocks.1"]


def test_dry_run_writes_nothing(capsys, words, tmp_path):
    text = call(capsys, "extract", *words, f"out={tmp_path / 'store'}", "--dry-run", check=0).out
    for word in ("units", "FLOPs", "bytes", "time", "forwards  144 (4 an image)"):
        assert word in text
    assert (
        text.splitlines()[:-1]
        == call(
            capsys, "extract", *words, f"out={tmp_path / 'store'}", "--dry-run", "--nproc", 2, check=0
        ).out.splitlines()[:-1]
    )
    assert not (tmp_path / "store").exists()


@pytest.mark.mp
def test_two_processes_give_the_same_store(words, store, tmp_path):
    out = tmp_path / "store"
    # A launcher that starts one process and says nothing would pass the comparison.
    assert "in 2 processes" in run("extract", *words, f"out={out}", "--nproc", 2, check=0).stderr
    assert_equal(out, store)


def test_other_batches_give_the_same_store(capsys, words, store, tmp_path):
    for batch in (1, 32):
        call(capsys, "extract", *words, f"batch_size={batch}", f"out={tmp_path / str(batch)}", check=0)
        assert_equal(tmp_path / str(batch), store)


def test_a_killed_job_goes_on(capsys, words, store, tmp_path):
    out = tmp_path / "store"
    # One image a forward and 40 draws make the job slow enough to be hit between units.
    slow = [word for word in words if "draws" not in word and "batch_size" not in word]
    slow += ["request.draws=40", "batch_size=8", f"out={out}"]
    process = subprocess.Popen([sys.executable, "-m", "diffrep", "extract", *slow], stderr=subprocess.DEVNULL)
    deadline = time.time() + 120
    while not list(out.rglob("0000001.json")) and time.time() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = {file.name: file.stat().st_mtime_ns for file in out.rglob("0*.json")}
    assert done, "the job was killed before its first unit"
    assert not (out / "index.json").exists(), "the job ended before it was killed"
    refused = call(capsys, "probe", f"store={out}", check=2)
    assert "not finished" in refused.err
    call(capsys, "extract", *slow, check=0)
    kept = {file.name: file.stat().st_mtime_ns for file in out.rglob("0*.json")}
    assert all(kept[name] == stamp for name, stamp in done.items()), "finished units must not be written again"
    whole = tmp_path / "whole"
    call(capsys, "extract", *slow[:-1], f"out={whole}", check=0)
    assert_equal(out, whole)


def test_another_request_is_refused(capsys, words, store):
    done = call(capsys, "extract", *words, "request.seed=3", f"out={store}", check=2)
    assert "request.seed: 0 there, 3 now" in done.err
    assert "Traceback" not in done.err


def test_an_unreadable_image_stops_or_is_skipped(capsys, words, image_folder, tmp_path):
    photos = tmp_path / "photos"
    shutil.copytree(image_folder, photos)
    (photos / "train" / "class1" / "3.png").write_bytes(b"junk")
    changed = [word if not word.startswith("data=") else f"data={photos}" for word in words]
    stopped = call(capsys, "extract", *changed, f"out={tmp_path / 'a'}", check=2)
    assert "train/class1/3.png" in stopped.err
    assert "Traceback" not in stopped.err
    assert list((tmp_path / "a").rglob("0000000.json")), "finished units stay"
    shutil.copy(photos / "train" / "class1" / "2.png", photos / "train" / "class1" / "3.png")
    refused = call(capsys, "extract", *changed, f"out={tmp_path / 'a'}", check=2)
    assert "data.fingerprint" in refused.err, "the file changed, so the store would mix two data sets"

    (photos / "train" / "class1" / "3.png").write_bytes(b"junk")
    call(capsys, "extract", *changed, "on_error=skip", "workers=1", f"out={tmp_path / 'b'}", check=0)
    skipped = json.loads((tmp_path / "b" / "skipped.jsonl").read_text())
    assert skipped["id"] == "train/class1/3.png"
    assert "cannot read the image" in skipped["reason"]
    assert len(FeatureStore(tmp_path / "b")) == 35


def test_images_of_several_sizes_need_a_size(capsys, words, image_folder, tmp_path):
    photos = tmp_path / "photos"
    shutil.copytree(image_folder, photos)
    large = Image.new("L", (24, 16))
    for index in range(6):
        large.save(photos / "test" / "class2" / f"{index}.png")
    changed = [word if not word.startswith("data=") else f"data={photos}" for word in words]
    for pool in ("none", "2"):
        done = call(capsys, "extract", *changed, f"request.pool={pool}", f"out={tmp_path / pool}", check=2)
        assert "the images differ in size" in done.err
    call(capsys, "extract", *changed, "request.pool=none", "data.size=16", f"out={tmp_path / 'one'}", check=0)


def test_probe_report_and_python_agree(capsys, store, tmp_path):
    out = tmp_path / "run"
    done = call(capsys, "probe", f"store={store}", "neighbours=[3]", f"out={out}", check=0)
    assert "linear" in done.out
    assert str(out / "report.html") in done.out
    (out / "report.html").unlink()
    call(capsys, "report", out, check=0)
    assert (out / "report.html").exists()
    written = json.loads((out / "results.json").read_text())
    from diffrep import ProbeConfig, run_probe

    metrics = run_probe(ProbeConfig(store=store, neighbours=(3,), out=tmp_path / "again"))
    assert metrics["scores"] == written["metrics"]["scores"]


def test_all_config_errors_at_once(capsys, words, tmp_path):
    file = tmp_path / "wrong.yaml"
    file.write_text(
        "backbone: fashion-unet\ndata: {path: x, siez: 3}\nrequest: {layers: blocks, levels: [1]}\nout: y\n"
    )
    done = call(capsys, "extract", file, "batch_size=many", "unit_size=0", check=2)
    for text in ("3 errors", "data.siez: unknown key; did you mean 'size'", "batch_size: Input should be", "(got 0)"):
        assert text in done.err
    assert "Traceback" not in done.err


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (["request.layers=[middle]"], "no layer 'middle'"),
        (["request.levels=[1000]"], "integer timesteps 0 to 999"),
        (["backbone=fashion-nut"], "did you mean 'fashion-unet'"),
        (["data=/no/such/place"], "no data at"),
        (["data.splits=[val]"], "unknown split 'val'"),
        (["extract.yml"], "no config file"),
        (["nonsense"], "cannot read the word"),
    ],
)
def test_one_clear_line_for_each_mistake(capsys, words, tmp_path, changes, text):
    done = call(capsys, "extract", *words, f"out={tmp_path / 'store'}", *changes, check=2)
    assert text in done.err
    assert "Traceback" not in done.err


def test_a_mistake_is_told_once_before_processes_start(capsys, words, tmp_path):
    done = call(capsys, "extract", *words, f"out={tmp_path / 's'}", "request.layers=[mid]", "--nproc", 2, check=2)
    assert "no layer 'mid'" in done.err and "torch.distributed" not in done.err


def test_a_plan_without_weights_and_without_text_encoders(capsys, image_folder, tmp_path):
    words = ["configs/extract/revelio-sd15.yaml", f"data={image_folder}", f"out={tmp_path}", "backbone.device=meta"]
    done = call(capsys, "extract", *words, "--dry-run", check=0)
    assert "4: mid_block, up_blocks.0, up_blocks.1, up_blocks.2" in done.out
    assert "not measured" in done.out


def test_words_behind_an_option(capsys, words, tmp_path):
    done = call(capsys, "extract", "--dry-run", *words, f"out={tmp_path}", "--nproc", 1, "data.limit=2", check=0)
    assert "images    " in done.out
    with pytest.raises(SystemExit):
        main(["extract", "--dry-runs"])


@pytest.mark.mp
def test_two_processes_train_the_same_network(unet_folder, image_folder, tmp_path, two_processes, monkeypatch, capsys):
    from safetensors.torch import load_file

    from diffrep.config import to_yaml
    from diffrep.testing import TINY

    file = tmp_path / "train.yaml"
    arguments = {key: list(v) if isinstance(v, tuple) else v for key, v in TINY["unet2d"][1].items()}
    file.write_text(to_yaml({"model": {"args": arguments}}))
    words = ["train", file, f"data={image_folder}", "data.splits=train", "steps=4", "batch_size=4", "warmup=0"]
    words.append("mixed_precision=no")
    call(capsys, *words, f"out={tmp_path / 'one'}", check=0)
    monkeypatch.setattr(dist, "launch", two_processes.launch)
    assert "in 2 processes" in call(capsys, *words, f"out={tmp_path / 'two'}", "--nproc", 2, check=0).err
    one, two = (load_file(tmp_path / n / "model" / "diffusion_pytorch_model.safetensors") for n in ("one", "two"))
    for name in one:
        torch.testing.assert_close(one[name], two[name], atol=1e-4, rtol=1e-3)


def test_the_python_example_of_the_readme(tmp_path, monkeypatch, capsys):
    root = Path(__file__).parents[2]
    code = (root / "README.md").read_text().split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(root / "configs")
    exec(compile(code, "README.md", "exec"), {})
    assert "(8, 72, 4, 4)" in capsys.readouterr().out.replace("torch.Size([8, 72, 4, 4])", "(8, 72, 4, 4)")


def test_ls_env_validate_and_version(capsys, words):
    assert "fashion-unet" in call(capsys, "ls", check=0).out
    assert "torch" in call(capsys, "env", check=0).out
    assert "draws: 2" in call(capsys, "validate", "extract", *words, "out=x", check=0).out
    assert run("--version", check=0).stdout.startswith("diffrep ")


@pytest.mark.slow
def test_demo_in_small(capsys, tmp_path, monkeypatch):
    out = tmp_path / "demo"
    monkeypatch.setattr("diffrep.demo.LEVELS", (5, 200))
    assert "report:" in call(capsys, "demo", "--limit", 100, "--out", out, check=0).out
    metrics = json.loads((out / "results.json").read_text())["metrics"]
    names = [score["name"] for score in metrics["scores"]]
    both = [f"{head} on {network}" for network in ("fashion-unet", "sit-mini") for head in ("linear", "kNN")]
    more = ["linear on raw pixels", "linear on the untrained fashion-unet", "attention pool on fashion-unet"]
    assert names == both + more
    assert len(metrics["cells"]) == 9 * 2 * 2, "linear and kNN"
    (beside,) = metrics["beside"]
    assert len(beside["cells"]) == 6 * 2 * 2
    for one, same in zip(metrics["levels"], beside["levels"], strict=True):
        assert abs(one["sigma"] / same["sigma"] - 1) < 0.01, "the same noise in both networks"
    assert (out / "report.html").read_text().count("<h4>sit-mini</h4>") == 2 + 4, "maps of two heads, four pictures"


def test_the_demo_with_other_images_takes_another_store(tmp_path):
    """In the folder of an earlier run: a store of its own, no refusal; the same images take the same store again."""
    backbone, request = load_backbone(BACKBONE, device="cpu"), FeatureRequest("mid_block", 5, pool=4)
    limits = {"train": 8, "test": 2}, {"train": 8, "test": 3}
    few, more = (DataConfig(path="fashion-demo", size=32, fit="pad", limit=limit) for limit in limits)
    first, second, again = (_extract(data, backbone, request, tmp_path, "maps") for data in (few, more, few))
    assert (len(first), len(second)) == (10, 11)
    assert first.path == again.path != second.path
    assert sorted(tmp_path.iterdir()) == sorted([first.path, second.path])
