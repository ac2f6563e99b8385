"""`diffrep convert` as a user types it."""

import argparse
import json
import os
import pickle
import sys
import types
from collections import OrderedDict

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from diffrep import load_backbone
from diffrep.backbones.edm import edm_arguments
from diffrep.cli import main
from diffrep.testing import save_tiny

EDM = {
    "model_type": "SongUNet",
    "img_resolution": 16,
    "img_channels": 3,
    "label_dim": 4,
    "model_channels": 16,
    "channel_mult": [1, 2],
    "num_blocks": 1,
    "attn_resolutions": [8],
}


def call(capsys, *words, check):
    """Runs the command in this process and returns (stdout, stderr)."""
    capsys.readouterr()
    status = main([str(word) for word in words])
    captured = capsys.readouterr()
    assert status == check, captured.out + captured.err
    return captured


def refused(capsys, *words):
    """Runs the command, which must refuse, and returns its one line."""
    done = call(capsys, "convert", *words, check=2)
    assert done.out == ""
    assert done.err.startswith("diffrep convert: error: ")
    assert done.err.count("\n") == 1, done.err
    assert "Traceback" not in done.err
    return done.err


def rebuild(meta):
    """Stands in for the function that published files name, which would execute the source text they carry."""
    exec(meta["module_src"], {})


class Persistent:
    """An object as NVlabs/edm pickles it: a class's source text and the object's state."""

    def __init__(self, name, source, state):
        self.meta = {"type": "class", "version": 6, "module_src": source, "class_name": name, "state": state}

    def __reduce__(self):
        return rebuild, (self.meta,)


def persistent(module, source):
    """A module, its children and its tensors, as published."""
    children = OrderedDict((name, persistent(child, source)) for name, child in module._modules.items())
    if isinstance(module, nn.ModuleDict):
        plain = nn.ModuleDict()  # torch's own classes are pickled by reference
        plain._modules = children
        return plain
    state = {"_parameters": module._parameters, "_buffers": module._buffers, "_modules": children}
    return Persistent(type(module).__name__, source, state | {"_init_args": (), "_init_kwargs": {}})


@pytest.fixture
def edm_pickle(tmp_path, monkeypatch):
    """A published file of a tiny network, which writes `ran` when it is loaded by `pickle.load`."""
    factory, arguments, _ = edm_arguments(EDM)
    torch.manual_seed(0)
    network = factory(**arguments)
    source = f"open({str(tmp_path / 'ran')!r}, 'w').close()"
    state = {"_parameters": {}, "_buffers": {}, "_modules": OrderedDict(model=persistent(network, source))}
    whole = Persistent("EDMPrecond", source, state | {"_init_args": (), "_init_kwargs": EDM})
    file = tmp_path / "edm.pkl"
    with monkeypatch.context() as patch:
        module = types.ModuleType("torch_utils.persistence")
        module._reconstruct_persistent_obj = rebuild
        patch.setattr(rebuild, "__module__", module.__name__)
        patch.setattr(rebuild, "__qualname__", "_reconstruct_persistent_obj")
        patch.setitem(sys.modules, "torch_utils", types.ModuleType("torch_utils"))
        patch.setitem(sys.modules, module.__name__, module)
        file.write_bytes(pickle.dumps({"ema": whole}))
    return file, network


@pytest.fixture
def dit(golden, tmp_path):
    """A training checkpoint of DiT, its config file and its weights."""
    config = tmp_path / "dit.json"
    config.write_text(json.dumps(json.loads((golden / "dit" / "dit_tiny.json").read_text())["config"]))
    state = {key: value.float() for key, value in load_file(golden / "dit" / "dit_tiny.safetensors").items()}
    file = tmp_path / "0400000.pt"
    running = {key: torch.zeros_like(value) for key, value in state.items()}
    torch.save({"model": running, "ema": state, "opt": {}, "args": argparse.Namespace(model="DiT-XL/2")}, file)
    return file, config, state


def assert_weights(file, state):
    found = load_file(file)
    assert found.keys() == state.keys()
    assert all(torch.equal(found[key], value) for key, value in state.items())


def test_an_edm_pickle_whose_code_does_not_run(capsys, edm_pickle, tmp_path):
    file, network = edm_pickle
    out = tmp_path / "models" / "edm"
    assert call(capsys, "convert", file, out, check=0).out == f"{out}\n"
    assert not (tmp_path / "ran").exists()
    assert {path.name for path in out.iterdir()} == {"config.json", "model.safetensors"}
    assert_weights(out / "model.safetensors", network.state_dict())
    net = load_backbone(out, device="cpu")
    x = torch.randn(1, 3, 16, 16)
    assert torch.isfinite(net.denoise(x, 0.7, cond=2)).all()
    assert "dec.16x16_block1" in call(capsys, "layers", out, check=0).out
    assert "family 'edm' only" in refused(capsys, file, tmp_path / "other", "--family", "dit")


def test_a_training_checkpoint_of_dit(capsys, dit, tmp_path):
    file, config, state = dit
    out = tmp_path / "out"
    call(capsys, "convert", file, out, "--family", "dit", "--config", config, check=0)
    assert_weights(out / "model.safetensors", state)
    assert "blocks.3" in call(capsys, "layers", out, "--depth", 1, check=0).out


def test_dit_to_diffusers_and_back(capsys, dit, tmp_path):
    file, config, state = dit
    theirs, ours = tmp_path / "diffusers", tmp_path / "official"
    words = ["--family", "dit", "--config", config, "--to", "diffusers"]
    assert call(capsys, "convert", file, theirs, *words, check=0) == (f"{theirs}\n", "")
    assert (theirs / "transformer" / "config.json").is_file()
    assert (theirs / "scheduler" / "scheduler_config.json").is_file()
    call(capsys, "convert", theirs, ours, check=0)
    assert_weights(ours / "model.safetensors", state)
    again = tmp_path / "again"
    call(capsys, "convert", ours, again, "--to", "diffusers", check=0)
    weights = "transformer/diffusion_pytorch_model.safetensors"
    assert_weights(again / weights, load_file(theirs / weights))


def test_places_that_cannot_be_written(capsys, dit, tmp_path):
    file, config, _ = dit
    words = ["--family", "dit", "--config", config]
    full = tmp_path / "full"
    full.mkdir()
    (full / "notes.txt").write_text("mine")
    assert "full is not empty; name a new folder" in refused(capsys, file, full, *words)
    assert [path.name for path in full.iterdir()] == ["notes.txt"]
    assert "notes.txt is a file; name a new folder" in refused(capsys, file, full / "notes.txt", *words)
    empty = tmp_path / "empty"
    empty.mkdir()
    call(capsys, "convert", file, empty, *words, check=0)


def test_sources_that_are_refused(capsys, dit, unet_folder, tmp_path):
    file, config, _ = dit
    edm = tmp_path / "edm.json"
    edm.write_text(json.dumps(EDM))
    out = tmp_path / "out"
    for words, message in (
        ([file, out], "is a file of weights; give its family (dit, sit"),
        ([file, out, "--family", "dt", "--config", config], "unknown family 'dt'; did you mean 'dit'"),
        ([file, out, "--family", "dit", "--config", "XL/3"], "unknown DiT variant 'XL/3'"),
        ([file, out, "--family", "dit", "--config", "no.json"], "no such file: no.json"),
        ([file, out, "--family", "edm", "--config", edm], "its keys look like dit, sit or repa, not edm"),
        ([file, out, "--family", "sit", "--config", config, "--to", "diffusers"], "only DiT has a form in diffusers"),
        ([unet_folder, out], "is a diffusers model already; official checkpoints and DiT can be converted"),
        ([tmp_path / "no.pt", out, "--family", "dit", "--config", "XL/2"], "no such file: "),
        ([tmp_path / "no.pkl", out], "no such file: "),
        ([tmp_path / "no", out], "unknown backbone"),
        (["SiT-XL/2", out], "ships as a config"),
    ):
        assert message in refused(capsys, *words), words
        assert not out.exists(), words


def test_networks_of_other_families_stay_official(capsys, tmp_path):
    for family in ("sit", "repa", "adm", "edm"):
        folder = save_tiny(family, tmp_path / family)
        out = tmp_path / f"{family}-again"
        call(capsys, "convert", folder, out, check=0)
        assert_weights(out / "model.safetensors", load_file(folder / "model.safetensors"))
        assert f"is family '{family}'" in refused(capsys, folder, tmp_path / "no", "--to", "diffusers")


class Attack:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def test_pickles_with_code(capsys, tmp_path):
    marker, out = tmp_path / "ran", tmp_path / "out"
    attack = {"ema": Attack(marker)}
    (tmp_path / "net.pkl").write_bytes(pickle.dumps(attack))
    torch.save(attack, tmp_path / "net.pt")
    assert "names posix.system, which no published EDM network needs" in refused(capsys, tmp_path / "net.pkl", out)
    words = ["--family", "dit", "--config", "XL/2"]
    assert "holds code or objects (posix.system)" in refused(capsys, tmp_path / "net.pt", out, *words)
    assert not marker.exists()
    assert not out.exists()


def test_damaged_files(capsys, dit, edm_pickle, tmp_path):
    file, config, state = dit
    pickled, _ = edm_pickle
    out = tmp_path / "out"
    words = ["--family", "dit", "--config", config]
    for source in (file, pickled):
        source.write_bytes(source.read_bytes()[: source.stat().st_size // 2])
    assert "cannot read the weights in" in refused(capsys, file, out, *words)
    assert "cannot read the pickle" in refused(capsys, pickled, out)
    del state["pos_embed"]
    short = tmp_path / "short.safetensors"
    save_file(state, short)
    assert "1 keys missing: pos_embed" in refused(capsys, short, out, *words)
    assert not out.exists()


def test_a_dit_folder_keeps_its_schedule_and_autoencoder(capsys, tmp_path):
    folder = save_tiny("dit", tmp_path / "dit")
    call(capsys, "convert", folder, tmp_path / "official", check=0)
    call(capsys, "convert", tmp_path / "official", tmp_path / "again", "--to", "diffusers", check=0)
    nets = [load_backbone(place, device="cpu") for place in (folder, tmp_path / "official", tmp_path / "again")]
    for net in nets[1:]:
        assert net.schedule == nets[0].schedule
        assert net.weights_hash == nets[0].weights_hash
    assert call(capsys, "layers", tmp_path / "official", "--depth", 1, check=0).out.count("blocks.") == 3
