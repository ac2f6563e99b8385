"""Files of weights that nobody vouches for: each gives its tensors, or is refused with CheckpointError."""

import importlib.util
import io
import pickle
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch

from diffrep.backbones import folders
from diffrep.backbones.checkpoint import read_state, read_tensors
from diffrep.backbones.edm_pickle import read_edm_pickle
from diffrep.errors import CheckpointError, ConfigError


@pytest.fixture(scope="module")
def fuzz():
    spec = importlib.util.spec_from_file_location("fuzz_checkpoints", Path(__file__).with_name("fuzz_checkpoints.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class View:
    """Pickled as a tensor that says how it lies over a storage of four numbers."""

    def __init__(self, size, stride):
        self.view = size, stride

    def __reduce__(self):
        storage = torch.storage.TypedStorage(
            wrap_storage=torch.ones(4).untyped_storage(), dtype=torch.float32, _internal=True
        )
        return torch._utils._rebuild_tensor_v2, (storage, 0, *self.view, False, OrderedDict())


def packed(content, **options):
    file = io.BytesIO()
    torch.save(content, file, **options)
    return file.getvalue()


def change_archive(content, change=bytes, compression=zipfile.ZIP_STORED):
    new = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(new, "w", compression) as archive:
        for name in old.namelist():
            archive.writestr(name, change(old.read(name)))
    return new.getvalue()


def test_mutated_files_give_their_tensors_or_checkpoint_error(fuzz):
    found = fuzz.fuzz(0, 500)
    assert found.total() == 500
    for kind in fuzz.originals():
        assert found[kind, "refused"] > 10, "mutations do damage"
        assert found[kind, "as it was"] + found[kind, "as changed"] > 5, "and not always too much"


def test_a_damaged_archive_is_told_from_one_without_checksums(tmp_path):
    file, content = tmp_path / "net.pt", packed({"a": torch.arange(9.0)})
    place = content.index(torch.arange(9.0).numpy().tobytes())
    file.write_bytes(content[:place] + b"\1" + content[place + 1 :])
    with pytest.raises(CheckpointError, match=r"is damaged: .*data/0 does not fit its checksum; fetch the file again"):
        read_state(file)
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"a": torch.arange(9.0)}, file)
    finally:
        torch.serialization.set_crc32_options(True)
    assert torch.equal(read_state(file)["a"], torch.arange(9.0))


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("view", [View((9,), (1,)), View((1 << 40,), (0,)), View((1 << 20, 1 << 20), (0, 0))])
def test_views_of_more_than_there_is(tmp_path, view, zipped):
    file = tmp_path / "net.pt"
    file.write_bytes(packed({"a": view}, _use_new_zipfile_serialization=zipped))
    for shapes_only in (False, True):
        with pytest.raises(CheckpointError, match="cannot read the weights|bytes, more than 16 times its own"):
            read_state(file, shapes_only)
    (tmp_path / "net.pkl").write_bytes(pickle.dumps({"ema": view}, 4))
    with pytest.raises(CheckpointError, match="out of bounds|bytes over 16"):
        read_edm_pickle(tmp_path / "net.pkl")


def test_an_archive_that_unpacks_to_gigabytes(tmp_path):
    file = tmp_path / "net.pt"
    file.write_bytes(change_archive(packed({"a": torch.zeros(1 << 18)}), compression=zipfile.ZIP_DEFLATED))
    for shapes_only in (False, True):
        with pytest.raises(CheckpointError, match=r"would unpack to 1,04\d,\d+ bytes, more than 16 times"):
            read_tensors(file, shapes_only)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({0: torch.zeros(1)}, "holds no state dict; it holds a key of type int"),
        ({"model": {("a", 1): torch.zeros(1)}}, "it holds a key of type tuple"),
        ({"module.a": torch.zeros(1), "a": torch.ones(1)}, "same weights under several names: module.a, a; save one"),
        ({"a": torch.zeros(1), "b": torch.zeros(1, device="meta")}, "b is no dense tensor"),
        ({"a": torch.eye(3).to_sparse()}, "a is no dense tensor"),
        ({"a": torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)}, "a is no dense tensor"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_state_dicts_that_are_none(tmp_path, content, message):
    torch.save(content, tmp_path / "net.pt")
    with pytest.raises(CheckpointError, match=message):
        read_state(tmp_path / "net.pt")


def call(name, argument):
    """Returns the opcodes that call a function of the published files with one argument."""
    return f"c{name.replace(':', chr(10))}\n".encode() + argument + b"\x85R"


MODULE = "torch.nn.modules.container:ModuleDict"
EMPTY = b"}X\x0b\0\0\0_parameters}sX\x08\0\0\0_buffers}s"


@pytest.mark.parametrize(
    ("stream", "message"),
    [
        # Each number says how much memory the unpickler of C would take.
        (b"}r\xff\xff\xff\xff.", "a published EDM file holds a dict with the key|key"),
        (b"}p99999999999999\n.", "key"),
        (b"\x8e" + struct.pack("<Q", 1 << 62) + b".", "cannot read the pickle"),
        (b"(" * 10_000 + b"t" * 10_000 + b".", "holds a tuple"),
        (
            call("torch_utils.persistence:_reconstruct_persistent_obj", b"}X\4\0\0\0type]sX\x0a\0\0\0class_name]s")
            + b".",
            "whose type is a list, not text",
        ),
    ],
)
def test_pickles_that_are_meant_to_fill_memory(tmp_path, stream, message):
    file = tmp_path / "net.pkl"
    file.write_bytes(b"\x80\4" + stream)
    with pytest.raises((CheckpointError, ConfigError), match=message):
        read_edm_pickle(file)


def chain(length, twice):
    """Returns the opcodes of modules that lie in each other, each once or under two names."""
    start = f"c{MODULE.replace(':', chr(10))}\n".encode() + b")R"
    stream = start + EMPTY + b"X\x08\0\0\0_modules}sb"
    for _ in range(length):
        names = b"X\1\0\0\0a" + b"h\1s" + (b"X\1\0\0\0b" + b"h\1s" if twice else b"")
        stream = stream + b"q\x010" + start + EMPTY + b"X\x08\0\0\0_modules}" + names + b"sb"
    return b"\x80\2}X\3\0\0\0ema" + stream + b"s."


@pytest.mark.parametrize(
    ("length", "twice", "message"),
    [(40, True, "is a module that is at another place too"), (3000, False, "lie in each other without end")],
)
def test_modules_without_end(tmp_path, length, twice, message):
    (tmp_path / "net.pkl").write_bytes(chain(length, twice))
    with pytest.raises(CheckpointError, match=message):
        read_edm_pickle(tmp_path / "net.pkl")


@pytest.mark.parametrize("text", ["[]", "3", "[" * 100_000, "9" * 5000, "\ud800"])
def test_configs_that_are_none(tmp_path, text):
    (tmp_path / "config.json").write_text(text, "utf-8", "surrogatepass")
    with pytest.raises(CheckpointError, match="must hold a JSON object|cannot read"):
        folders.read_json(tmp_path / "config.json")


@pytest.mark.parametrize("name", ["logging", "DDPMScheduler", "__doc__", None, ["UNet2DModel"]])
def test_configs_that_name_no_network(name):
    with pytest.raises(ConfigError, match="has no network of class"):
        folders.network_class({"_class_name": name}, "config.json")
    if name != "DDPMScheduler":
        with pytest.raises(ConfigError, match="has no scheduler"):
            folders.schedule_from({"_class_name": name}, 1.0, "config.json")
