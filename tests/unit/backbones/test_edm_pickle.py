"""The reader of EDM's published pickles: it reads them, and it runs nothing of theirs."""

import importlib
import io
import os
import pickle
import sys
from collections import OrderedDict

import numpy as np
import pytest
import torch
from torch import nn

from diffrep.backbones.edm import edm_arguments
from diffrep.backbones.edm_pickle import read_edm_pickle
from diffrep.errors import CheckpointError, UnknownNameError

PERSISTENCE = """
def _reconstruct_persistent_obj(meta):
    exec(meta["module_src"], {})

class Persistent:
    def __init__(self, class_name, module_src, state):
        self.meta = dict(type="class", version=6, module_src=module_src, class_name=class_name, state=state)

    def __reduce__(self):
        return _reconstruct_persistent_obj, (self.meta,), None
"""
EASY_DICT = """
class EasyDict(dict):
    pass
"""
CONFIG = {
    "model_type": "SongUNet",
    "img_resolution": 16,
    "img_channels": 3,
    "label_dim": 4,
    "use_fp16": False,
    "model_channels": 8,
    "channel_mult": [1, 2],
    "num_blocks": 1,
    "attn_resolutions": [8],
    "embedding_type": "fourier",
    "encoder_type": "residual",
    "resample_filter": [1, 3, 3, 1],
}


def build(config):
    factory, arguments, _ = edm_arguments(config)
    return factory(**arguments).requires_grad_(False).eval()


@pytest.fixture
def modules(tmp_path, monkeypatch):
    """Modules of the names that published files refer to; `forget` makes them unknown again."""
    names = {"torch_utils.persistence": PERSISTENCE, "dnnlib.util": EASY_DICT}
    for name, source in names.items():
        package, module = name.split(".")
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").touch()
        (tmp_path / package / f"{module}.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    found = {name: importlib.import_module(name) for name in names}

    def forget():
        monkeypatch.undo()
        for name in ("torch_utils.persistence", "torch_utils", "dnnlib.util", "dnnlib"):
            sys.modules.pop(name, None)

    yield found, forget
    forget()


def published(network, class_name, modules, marker, config=CONFIG, args=()):
    """The objects of a published file, made of our network's tensors."""
    persistent, easy_dict = modules["torch_utils.persistence"].Persistent, modules["dnnlib.util"].EasyDict
    source = f"open({str(marker)!r}, 'w').write('ran')"

    def convert(module):
        if isinstance(module, nn.ModuleDict):
            plain = nn.ModuleDict()  # torch's own classes are pickled by reference
            plain._modules = OrderedDict((name, convert(child)) for name, child in module.items())
            return plain
        state = {
            "training": False,
            "_parameters": module._parameters | {"absent": None},
            "_buffers": module._buffers | {"scratch": torch.zeros(1), "resampled": None},
            "_non_persistent_buffers_set": {"scratch"},
            "_modules": OrderedDict((name, convert(child)) for name, child in module._modules.items() if child),
            "_init_args": (),
            "_init_kwargs": {},
            "skip_scale": np.sqrt(0.5),
        }
        return persistent(type(module).__name__, source, state)

    state = {
        "_parameters": OrderedDict(),
        "_buffers": OrderedDict(),
        "_modules": OrderedDict(model=convert(network)),
        "_init_args": args,
        "_init_kwargs": config,
        "sigma_max": float("inf"),
    }
    return {
        "ema": persistent(class_name, source, state),
        "augment_pipe": persistent("AugmentPipe", source, {"p": 0.12, "taps": np.arange(3.0)}),
        "dataset_kwargs": easy_dict(class_name="training.dataset.ImageFolderDataset", resolution=16),
    }


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_reads_a_published_file_without_running_it(modules, tmp_path, protocol):
    found, forget = modules
    network, marker, file = build(CONFIG), tmp_path / "ran", tmp_path / "net.pkl"
    file.write_bytes(pickle.dumps(published(network, "EDMPrecond", found, marker), protocol=protocol))
    forget()
    state, config = read_edm_pickle(file)
    assert not marker.exists()
    assert "torch_utils" not in sys.modules
    assert config == CONFIG | {"precond": "edm"}
    own = network.state_dict()
    assert set(state) == {f"model.{key}" for key in own}
    assert all(torch.equal(state[f"model.{key}"], value) for key, value in own.items())
    again = build(config)
    again.load_state_dict({key.removeprefix("model."): value for key, value in state.items()}, strict=True)
    x, noise_labels = torch.randn(1, 3, 16, 16), torch.zeros(1)
    assert torch.equal(again(x, noise_labels), network(x, noise_labels))


def test_the_file_would_run_code_in_a_plain_pickle_load(modules, tmp_path):
    found, _ = modules
    marker = tmp_path / "ran"
    pickle.loads(pickle.dumps(published(build(CONFIG), "EDMPrecond", found, marker)))
    assert marker.exists()


def test_wrapper_and_positional_arguments_become_the_config(modules, tmp_path):
    found, forget = modules
    config = {key: value for key, value in CONFIG.items() if not key.startswith("img_")}
    objects = published(build(CONFIG), "VEPrecond", found, tmp_path / "ran", config, args=(16, 3))
    file = tmp_path / "net.pkl"
    file.write_bytes(pickle.dumps(objects))
    forget()
    config = read_edm_pickle(file)[1]
    assert config == CONFIG | {"precond": "ve"}
    assert edm_arguments(config)[2] == "ve"


class Attack:
    """Pickled as a call of a function with one argument."""

    def __init__(self, function, argument):
        self.call = function, (argument,)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("function", [os.system, eval, exec, importlib.import_module, torch.load])
def test_refuses_any_other_callable(tmp_path, function):
    marker, file = tmp_path / "ran", tmp_path / "net.pkl"
    file.write_bytes(pickle.dumps({"ema": Attack(function, f"open({str(marker)!r}, 'w')")}))
    with pytest.raises(
        CheckpointError, match=rf"it names \S*{function.__name__}, which no published EDM network needs"
    ):
        read_edm_pickle(file)
    assert not marker.exists()


def test_refuses_os_system(tmp_path):
    marker, file = tmp_path / "ran", tmp_path / "net.pkl"
    file.write_bytes(pickle.dumps({"ema": Attack(os.system, f"touch {marker}")}))
    with pytest.raises(CheckpointError, match=rf"{os.system.__module__}\.system"):
        read_edm_pickle(file)
    assert not marker.exists()


def test_refuses_code_inside_the_bytes_of_a_tensor(tmp_path):
    marker, file = tmp_path / "ran", tmp_path / "net.pkl"
    inner = io.BytesIO()
    torch.save(Attack(os.system, f"touch {marker}"), inner, _use_new_zipfile_serialization=False)
    hidden = Attack(torch.storage._load_from_bytes, inner.getvalue())
    file.write_bytes(pickle.dumps({"ema": hidden}))
    with pytest.raises(CheckpointError, match="cannot read the pickle"):
        read_edm_pickle(file)
    assert not marker.exists()


def test_refuses_a_view_past_the_end_of_its_storage(tmp_path):
    file = tmp_path / "net.pkl"

    class Long:
        def __reduce__(self):
            storage = torch.zeros(4).untyped_storage()
            typed = torch.storage.TypedStorage(wrap_storage=storage, dtype=torch.float32, _internal=True)
            return torch._utils._rebuild_tensor_v2, (typed, 0, (9,), (1,), False, OrderedDict())

    file.write_bytes(pickle.dumps({"ema": Long()}))
    with pytest.raises(CheckpointError, match="out of bounds"):
        read_edm_pickle(file)


def test_files_that_are_something_else(tmp_path):
    with pytest.raises(CheckpointError, match="no such file"):
        read_edm_pickle(tmp_path / "nothing.pkl")
    file = tmp_path / "net.pkl"
    file.write_bytes(b"not a pickle")
    with pytest.raises(CheckpointError, match="cannot read the pickle"):
        read_edm_pickle(file)
    file.write_bytes(pickle.dumps([1, 2]))
    with pytest.raises(CheckpointError, match="holds a list"):
        read_edm_pickle(file)
    file.write_bytes(pickle.dumps({"ema": torch.zeros(2)}))
    with pytest.raises(CheckpointError, match="it is a Tensor, not a module"):
        read_edm_pickle(file)
    with pytest.raises(UnknownNameError, match="did you mean 'ema'"):
        read_edm_pickle(file, key="emas")


def test_a_class_that_is_no_wrapper(modules, tmp_path):
    found, forget = modules
    file = tmp_path / "net.pkl"
    file.write_bytes(pickle.dumps(published(build(CONFIG), "AnotherPrecond", found, tmp_path / "ran")))
    forget()
    with pytest.raises(CheckpointError, match="its class is 'AnotherPrecond'; known are EDMPrecond"):
        read_edm_pickle(file)
