"""The launch files in configs/accelerate, read by accelerate itself."""

from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_multi_gpu_env, prepare_simple_launcher_cmd_env

from diffrep.backbones.dit import Block, DiT

FOLDER = Path(__file__).parents[3] / "configs" / "accelerate"
# File: kind, machines, processes on all of them, CPU.
EXPECTED = {
    "single": (DistributedType.NO, 1, 1, False),
    "cpu": (DistributedType.NO, 1, 1, True),
    "ddp": (DistributedType.MULTI_GPU, 1, 8, False),
    "fsdp2": (DistributedType.FSDP, 1, 8, False),
    "multi_node": (DistributedType.MULTI_GPU, 2, 16, False),
}


def launched(name, *options):
    """Parses a launch as accelerate does, up to the start of the processes."""
    words = ["--config_file", str(FOLDER / f"{name}.yaml"), *options, "-m", "diffrep", "train", "C.yaml", "data=PATH"]
    arguments, _, _ = _validate_launch_command(launch_command_parser().parse_args(words))
    return arguments


def test_every_file_is_expected():
    assert sorted(file.stem for file in FOLDER.glob("*.yaml")) == sorted(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_accelerate_reads_the_file(name):
    file = FOLDER / f"{name}.yaml"
    config = load_config_from_file(str(file))
    found = (config.distributed_type, config.num_machines, config.num_processes, config.use_cpu)
    assert found == EXPECTED[name]
    assert config.mixed_precision is None and not config.dynamo_config, "those are keys of the run's config"
    assert f"accelerate launch --config_file configs/accelerate/{name}.yaml" in file.read_text()


@pytest.mark.parametrize(("name", "cpu"), [("single", "False"), ("cpu", "True")])
def test_one_process(name, cpu):
    command, environment = prepare_simple_launcher_cmd_env(launched(name))
    assert command[1:] == ["-m", "diffrep", "train", "C.yaml", "data=PATH"]
    assert environment["ACCELERATE_USE_CPU"] == cpu


def test_several_machines():
    arguments = launched("multi_node", "--main_process_ip", "10.0.0.1", "--machine_rank", "1")
    prepare_multi_gpu_env(arguments)
    found = (arguments.nnodes, arguments.nproc_per_node, arguments.node_rank, arguments.rdzv_endpoint)
    assert found == ("2", "8", 1, "10.0.0.1:29500")


@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_another_number_of_gpus(name):
    arguments = launched(name, "--num_processes", "2")
    prepare_multi_gpu_env(arguments)
    assert (arguments.nproc_per_node, arguments.module, arguments.training_script) == ("2", True, "diffrep")


def test_fsdp_shards_the_blocks(monkeypatch):
    for name, value in prepare_multi_gpu_env(launched("fsdp2")).items():
        monkeypatch.setenv(name, value)
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2 and plugin.reshard_after_forward is True
    assert plugin.state_dict_type.name == "SHARDED_STATE_DICT" and not plugin.cpu_ram_efficient_loading
    plugin.set_auto_wrap_policy(DiT(input_size=4, hidden_size=8, num_heads=2, depth=1, num_classes=2))
    assert plugin.auto_wrap_policy.keywords["transformer_layer_cls"] == {Block}
