"""Training in several processes, with spread weights and in parts of a batch: the same numbers as in one go."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from diffrep import load_backbone, run_train
from diffrep.config import DataConfig, TrainConfig, to_yaml
from diffrep.errors import CheckpointError, ConfigError
from diffrep.train.sharding import share, whole

ARGS = {"input_size": 16, "patch_size": 4, "in_channels": 1, "hidden_size": 32, "depth": 3, "num_heads": 2}
# What `accelerate launch --config_file configs/accelerate/fsdp2.yaml` sets.
FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "Block",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}
# Accelerate turns FSDP on for GPUs only. Torch can shard on CPUs too, and all else is as on GPUs.
ON_CPU = f"""
import os, sys
os.environ.update({FSDP})
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

start = AcceleratorState.__init__

def sharded(self, *args, fsdp_plugin=None, **options):
    begun = self.initialized
    start(self, *args, fsdp_plugin=fsdp_plugin, **options)
    if not begun and fsdp_plugin is not None:
        if self.mixed_precision != "no":
            fsdp_plugin.set_mixed_precision(self.mixed_precision)
        self.fsdp_plugin = fsdp_plugin
        self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP

AcceleratorState.__init__ = sharded
from diffrep.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture
def repa(encoder):
    """An alignment term with a tiny encoder; its projector's layers of 17 channels do not halve."""
    return {"preset": "repa", "encoder": encoder, "width": 17}


def config(image_folder, out, **changes):
    given = {
        "model": {"kind": "repa", "args": ARGS | {"num_classes": 3}},
        "data": DataConfig(path=image_folder, splits="train"),
        "out": out,
        "steps": 4,
        "batch_size": 8,
        "warmup": 0,
        "decay": "none",
        "ema": 0.9,
        "checkpoint_every": 2,
        "log_every": 1,
        "flip": True,
        "mixed_precision": "no",
    }
    return TrainConfig(**given | changes)


def write(settings, folder):
    file = folder / "train.yaml"
    file.write_text(to_yaml(settings))
    return file


def log(run, name="log.jsonl"):
    return [json.loads(line) for line in (run / name).read_text().splitlines()]


def same_losses(a, b, keys=("loss", "denoise", "grad_norm", "align/enc/blocks.0"), rel=1e-5):
    assert len(log(a)) == len(log(b)) > 0
    for one, two in zip(log(a), log(b), strict=True):
        for key in keys:
            assert one[key] == pytest.approx(two[key], rel=rel), (key, one["step"])


def back_to(run, step):
    """Leaves a run as if it had been killed after a step."""
    for folder in (run / "checkpoints").iterdir():
        if int(folder.name.removeprefix("step-")) > step:
            shutil.rmtree(folder)
    shutil.rmtree(run / "model")


def test_a_step_in_parts_is_a_step(image_folder, tmp_path, repa):
    align = {"enc": repa, "own": {"preset": "sra", "layers": "blocks.0", "width": 16}}
    for parts in (1, 2, 4):
        run_train(config(image_folder, tmp_path / str(parts), align=align, accumulate=parts, label_dropout=0.3))
    keys = ("loss", "denoise", "grad_norm", "align/enc/blocks.0", "align/own/blocks.0")
    for parts in ("2", "4"):
        same_losses(tmp_path / "1", tmp_path / parts, keys)


# Another number of processes -----------------------------------------------------------------------------------------


@pytest.mark.mp
@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_processes(image_folder, tmp_path, two_processes, repa):
    settings = config(image_folder, "unused", align={"enc": repa}, steps=6)
    file, (one, two, less, more) = write(settings, tmp_path), (tmp_path / name for name in ("1", "2", "21", "12"))
    run_train(settings.model_copy(update={"out": str(one)}))
    done = two_processes.run("train", file, f"out={two}")
    assert done.codes == [0, 0], done.err
    for whole_run, cut in ((two, less), (one, more)):
        shutil.copytree(whole_run, cut)
        back_to(cut, 4)
    run_train(settings.model_copy(update={"out": str(less)}))
    done = two_processes.run("train", file, f"out={more}")
    assert done.codes == [0, 0], done.err
    assert "resumed" in done.out[0] and "at step 4" in done.out[0]
    for run in (two, less, more):
        same_losses(one, run)


# Spread weights ------------------------------------------------------------------------------------------------------


@pytest.mark.mp
@pytest.mark.slow
def test_spread_weights_train_as_whole_ones(image_folder, tmp_path, two_processes, repa):
    """FSDP2: losses, measurements of the average, resume to the bit, and a model that opens."""
    watch = {"every": 2, "limit": 12, "test_split": "test", "layers": "blocks.1", "neighbours": 3}
    changes = {"align": {"enc": repa}, "accumulate": 2, "checkpointing": True, "watch": watch}
    settings = config(image_folder, "unused", **changes)
    file, (one, two, cut) = write(settings, tmp_path), (tmp_path / name for name in ("one", "two", "cut"))
    run_train(settings.model_copy(update={"out": str(one)}))
    done = two_processes.run("train", file, f"out={two}", source=ON_CPU)
    assert done.codes == [0, 0], done.err
    assert (two / "checkpoints" / "step-0000004" / "pytorch_model_fsdp_0").is_dir(), "the weights were not spread"
    same_losses(one, two)
    measured = [[line["cka/blocks.1"] for line in log(run, "watch.jsonl")] for run in (one, two)]
    assert measured[1] == pytest.approx(measured[0], rel=1e-5)
    assert abs(measured[0][-1] - measured[0][0]) > 5e-5, "the average has hardly moved: these would be equal anyway"
    state, wanted = (load_file(run / "model" / "model.safetensors") for run in (two, one))
    assert state.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(state[name], wanted[name], atol=1e-4, rtol=1e-3)
    projectors = [load_file(run / "model" / "projectors.safetensors") for run in (one, two)]
    assert {name: weight.shape for name, weight in projectors[0].items()} == {
        name: weight.shape for name, weight in projectors[1].items()
    }
    x = torch.randn(2, 1, 16, 16)
    assert load_backbone(two / "model", device="cpu").denoise(x, 0.5).isfinite().all()

    shutil.copytree(two, cut)
    back_to(cut, 2)
    done = two_processes.run("train", file, f"out={cut}", source=ON_CPU)
    assert done.codes == [0, 0], done.err
    assert "resumed" in done.out[0] and "at step 2" in done.out[0]
    same_losses(two, cut, rel=0)
    again = load_file(cut / "model" / "model.safetensors")
    assert all(torch.equal(state[name], again[name]) for name in state)

    with pytest.raises(CheckpointError, match="step-0000004 was written with FSDP; go on with it as it was written"):
        run_train(settings.model_copy(update={"out": str(two), "steps": 6}))


@pytest.mark.mp
def test_spread_weights_leave_autocast_and_times_alone(image_folder, tmp_path, two_processes, repa):
    """Accelerate's own policy would round times and residual streams to bf16."""
    settings = config(image_folder, "unused", align={"enc": repa}, mixed_precision="bf16", checkpoint_every=4)
    file, (one, two) = write(settings, tmp_path), (tmp_path / name for name in ("one", "two"))
    run_train(settings.model_copy(update={"out": str(one)}))
    done = two_processes.run("train", file, f"out={two}", source=ON_CPU)
    assert done.codes == [0, 0], done.err
    same_losses(one, two, ("loss", "denoise"), rel=8e-5)  # with it 1.7e-4
    same_losses(one, two, ("grad_norm",), rel=5e-4)  # with it 1.1e-3


@pytest.mark.mp
def test_what_cannot_be_spread(image_folder, tmp_path, two_processes, monkeypatch):
    align = {"own": {"preset": "sra", "layers": "blocks.0", "width": 16}}
    file = write(config(image_folder, "unused", align=align, compile=True), tmp_path)
    done = two_processes.run("train", file, f"out={tmp_path / 'never'}", source=ON_CPU)
    assert 2 in done.codes and not (tmp_path / "never").exists()
    assert "FSDP cannot go with: align.own, which the averaged weights teach; compile." in "".join(done.err)
    other = ON_CPU.replace("'Block'", "'Blok'")
    file = write(config(image_folder, "unused"), tmp_path)
    done = two_processes.run("train", file, f"out={tmp_path / 'never'}", source=other)
    assert 2 in done.codes and not (tmp_path / "never").exists()
    assert "the network has no Blok; its modules are AlignedModel, Attention, Block," in "".join(done.err)
    for name, value in FSDP.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="FSDP is asked for, and it needs GPUs and a launcher"):
        run_train(config(image_folder, tmp_path / "never"))


def test_a_tensor_that_is_not_spread_stays_as_it_is():
    tensor = torch.randn(3, 2)
    assert whole(tensor) is tensor and whole(tensor, tensor) is tensor and share(tensor, tensor) is tensor


@pytest.mark.gpu
@pytest.mark.mp
def test_spread_weights_on_a_gpu(image_folder, tmp_path, repa):
    """Accelerate's own way into FSDP2, in bf16 and in one process: what of it one GPU can show."""
    settings = config(image_folder, "unused", align={"enc": repa}, mixed_precision="bf16")
    file, (plain, spread) = write(settings, tmp_path), (tmp_path / name for name in ("plain", "spread"))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "1", "-m", "diffrep"]
    for out, steps, environment in ((plain, 4, {}), (spread, 2, FSDP), (spread, 4, FSDP)):
        words = ["train", str(file), f"out={out}", f"steps={steps}"]
        done = subprocess.run([*command, *words], env=os.environ | environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert (spread / "checkpoints" / "step-0000004" / "pytorch_model_fsdp_0").is_dir()
    same_losses(plain, spread, rel=1e-3)
    assert load_backbone(spread / "model", device="cpu").denoise(torch.randn(1, 1, 16, 16), 0.5).isfinite().all()
