"""Files of weights that do not fit, or are something else: what is said of them."""

import os
import pickle
import re

import pytest
import torch
from diffusers import DiTTransformer2DModel
from safetensors.torch import save_file

from diffrep.errors import CheckpointError


@pytest.mark.parametrize(
    ("weights", "family", "kind"),
    [
        ("repa", "sit", "repa"),
        ("repa", "dit", "repa"),
        *[(weights, family, weights) for family in ("dit", "sit", "repa") for weights in ("adm", "edm")],
        *[("dit", family, "dit, sit or repa") for family in ("adm", "edm")],
        ("edm", "adm", "edm"),
        ("adm", "edm", "adm"),
    ],
)
def test_the_wrong_family(load, files, weights, family, kind):
    with pytest.raises(CheckpointError, match=f"its keys look like {kind}[^,]*, not {family}$"):
        load(files[weights], family)


def test_weights_of_diffusers_are_recognised(load, files, tmp_path):
    file = tmp_path / "net.safetensors"
    config = {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "sample_size": 8}
    save_file(DiTTransformer2DModel(**config).state_dict(), file)
    with pytest.raises(CheckpointError, match=r"look like a transformer of diffusers \(.*diffusers-dit\), not dit"):
        load(file, "dit")


def test_missing_and_unexpected_keys_are_grouped(load, states, tmp_path):
    file, state = tmp_path / "net.safetensors", dict(states["dit"])
    for key in [key for key in state if key.startswith("blocks.2.")]:
        state["extra." + key] = state.pop(key)
    save_file(state, file)
    with pytest.raises(CheckpointError) as caught:
        load(file, "dit")
    message = str(caught.value)
    missing = sorted(key for key in states["dit"] if key.startswith("blocks.2."))
    assert len(missing) == 10
    assert f"10 keys missing: {', '.join(missing)};" in message
    assert "10 keys unexpected: extra.blocks.2.adaLN_modulation.1.bias" in message
    assert "look like" not in message


def test_only_the_first_ten_keys_are_named(configs, load, files):
    with pytest.raises(CheckpointError) as caught:
        load(files["dit"], "dit", configs["dit"] | {"depth": 5})
    named = re.search(r"20 keys missing: (.*), \.\.\.", str(caught.value))[1]
    assert len(named.split(", ")) == 10


def test_another_variant(configs, load, files):
    shape = r"of another shape: .*blocks.0.attn.proj.bias \(16,\) in the file, \(8,\) in the network"
    with pytest.raises(CheckpointError, match=f"{shape}.*; is this another variant than the config says"):
        load(files["dit"], "dit", configs["dit"] | {"hidden_size": 8, "depth": 1})
    with pytest.raises(CheckpointError, match=r"\(96,\) in the file, \(2304,\) in the network.*another variant"):
        load(files["dit"], "dit", "S/2")


@pytest.mark.parametrize(
    ("content", "held"),
    [
        ({}, "nothing"),
        ([torch.zeros(1)], "list"),
        (torch.zeros(2), "Tensor"),
        ({"opt": {"state": {}}, "epoch": 3}, "opt, epoch"),
        ({"model": {"weights": {"a": torch.zeros(1)}}}, "weights"),
        ({"ema": {}}, "nothing"),
    ],
)
def test_a_state_dict_inside_nothing(load, tmp_path, content, held):
    file = tmp_path / "net.pt"
    torch.save(content, file)
    with pytest.raises(CheckpointError, match=f"net.pt holds no state dict; it holds {held}$"):
        load(file, "dit")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("page.pt", b"<html>not found</html>", "holds neither safetensors nor a pickle of tensors"),
        ("pointer.pt", b"version https://git-lfs.github.com/spec/v1\n", "neither safetensors nor a pickle"),
        ("empty.pt", b"", "cannot read the weights in .*empty.pt: EOFError"),
        ("empty.safetensors", b"", "cannot read the weights in .*empty.safetensors: "),
        ("page.safetensors", b"<html>not found</html>", "cannot read the weights"),
    ],
)
def test_files_that_are_something_else(load, tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        load(tmp_path / name, "dit")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_truncated_files(load, states, tmp_path, suffix):
    whole, part = tmp_path / f"whole{suffix}", tmp_path / f"part{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(states["dit"], whole)
    part.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    with pytest.raises(CheckpointError, match=f"cannot read the weights in .*part{suffix}"):
        load(part, "dit")


@pytest.mark.parametrize("name", ["no.pt", "no.pth", "no.pkl", "no.safetensors", "folder/no.pt"])
def test_a_file_that_is_not_there(load, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=f"^no such file: {name}$"):
        load(name, "dit")


class Attack:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("wrap", [lambda code: code, lambda code: {"ema": code}, lambda code: {"args": code}])
def test_code_in_a_pickle_is_not_run(load, tmp_path, wrap):
    file, marker = tmp_path / "net.pt", tmp_path / "ran"
    torch.save(wrap(Attack(marker)), file)
    with pytest.raises(CheckpointError, match=r"holds code or objects \(posix.system\).*'diffrep convert"):
        load(file, "dit")
    assert not marker.exists()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("protocol", [2, 4])
def test_a_published_pickle_names_the_converter(load, tmp_path, protocol):
    file, marker = tmp_path / "edm.pkl", tmp_path / "ran"
    file.write_bytes(pickle.dumps({"ema": Attack(marker)}, protocol=protocol))
    with pytest.raises(CheckpointError, match=f"use 'diffrep convert {file} OUT'"):
        load(file, "edm")
    assert not marker.exists()
