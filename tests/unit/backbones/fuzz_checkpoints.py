"""Damaged and forged files of weights: each gives its tensors, or CheckpointError and nothing else, and runs no code.

fuzz(seed, cases) returns how often each kind of file was read or refused, and raises AssertionError with the case that
went wrong. Old formats of torch hold addresses, so a case is not the same to the byte in every run: the file is kept.
"""

import argparse
import io
import json
import os
import pickle
import pickletools
import struct
import sys
import tempfile
import warnings
import zipfile
from collections import Counter, OrderedDict
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType
from unittest.mock import patch

import numpy as np
import torch
from safetensors.torch import save

from diffrep.backbones.checkpoint import read_state
from diffrep.backbones.edm_pickle import read_edm_pickle
from diffrep.errors import CheckpointError, UnknownNameError

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DTYPES |= {"I64": torch.int64, "U64": torch.uint64, "I32": torch.int32, "U32": torch.uint32, "I16": torch.int16}
DTYPES |= {"U16": torch.uint16, "U8": torch.uint8, "I8": torch.int8, "BOOL": torch.bool, "C64": torch.complex64}
DTYPES |= {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
CONFIG = {"model_type": "SongUNet", "img_resolution": 4, "img_channels": 3, "channel_mult": [1, 2]}


@cache
def weights():
    """Returns a state dict of several element types, with a scalar and an empty tensor."""
    ramp = torch.arange(60.0)
    found = {"blocks.0.weight": ramp.reshape(12, 5), "blocks.0.bias": ramp[:12].half(), "scale": torch.tensor(2.5)}
    return found | {"norm": ramp[:8].bfloat16(), "steps": torch.arange(3), "empty": torch.zeros(0, 4)}


@cache
def originals():
    """Returns the bytes of a file of each kind."""
    content = {"model": {}, "ema": OrderedDict(weights()), "epoch": 3, "args": argparse.Namespace(lr=0.1)}
    found = {".safetensors": save(dict(weights()))}
    for name, zipped in (("zip.pt", True), ("legacy.pt", False)):
        packed = io.BytesIO()
        torch.save(content, packed, _use_new_zipfile_serialization=zipped)
        found[name] = packed.getvalue()
    return found | {f"{protocol}.pkl": published(protocol) for protocol in (3, 4)}


def published(protocol):
    """Returns a pickle as NVlabs/edm publishes them: objects whose classes are text that their reader executes."""
    persistence, easy = ModuleType("torch_utils.persistence"), ModuleType("dnnlib.util")

    def rebuild(meta):
        raise AssertionError

    rebuild.__module__, rebuild.__qualname__, rebuild.__name__ = (
        persistence.__name__,
        *["_reconstruct_persistent_obj"] * 2,
    )
    persistence._reconstruct_persistent_obj = rebuild
    easy.EasyDict = type("EasyDict", (dict,), {"__module__": easy.__name__})

    class Persistent:
        def __init__(self, class_name, **state):
            self.meta = {"type": "class", "version": 6, "module_src": "1 / 0", "class_name": class_name}
            parts = {"_parameters": OrderedDict(), "_buffers": OrderedDict(), "_modules": OrderedDict()}
            self.meta["state"] = parts | {"_non_persistent_buffers_set": set()} | state

        def __reduce__(self):
            return rebuild, (self.meta,), None

    names = list(weights())
    inner = Persistent("Linear", _parameters=OrderedDict((name, weights()[name]) for name in names[:3]))
    outer = Persistent(
        "SongUNet",
        _modules=OrderedDict(inner=inner),
        _buffers=OrderedDict((name, weights()[name]) for name in names[3:]),
    )
    network = Persistent("EDMPrecond", _modules=OrderedDict(model=outer), _init_args=(), _init_kwargs=dict(CONFIG))
    modules = {"torch_utils.persistence": persistence, "dnnlib.util": easy}
    modules |= {name: ModuleType(name) for name in ("torch_utils", "dnnlib")}
    with patch.dict(sys.modules, modules):
        return pickle.dumps({"ema": network, "about": easy.EasyDict(scale=np.sqrt(0.5))}, protocol=protocol)


@cache
def truth(kind):
    """Returns what the file of a kind holds."""
    if not kind.endswith(".pkl"):
        return weights()
    return {f"model.{'inner.' * (i < 3)}{name}": value for i, (name, value) in enumerate(weights().items())}


def read(file):
    """Reads a file as its kind is read."""
    return read_edm_pickle(file)[0] if file.suffix == ".pkl" else read_state(file)


def fuzz(seed, cases):
    """Reads mutated files and returns how often each (kind, outcome) was.

    Raises:
        AssertionError: A file gave anything else than tensors or CheckpointError, other tensors than it holds, or ran
            code; or a whole file is not read as what it holds.
    """
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as folder:
        check_originals(Path(folder))
        return Counter(fuzz_case(seed, case, Path(folder)) for case in range(cases))


def check_originals(folder):
    """Checks that files without damage give the truth, and that the code put into pickles would run elsewhere."""
    for kind, content in originals().items():
        again = content if kind == ".safetensors" else repack(kind, content, lambda stream: stream)
        for written in (content, again):
            (folder / kind).write_bytes(written)
            assert_equal(read(folder / kind), truth(kind))
    marker, rng = folder / "ran", np.random.default_rng(0)
    for kind in range(len(attacks(marker))):
        with quiet():
            pickle.loads(put_code(pickle.dumps([1, {"a": 2}], 2), attacks(marker)[kind], rng))
        assert marker.exists()
        marker.unlink()


def fuzz_case(seed, case, folder):
    """Runs one case and returns (kind, outcome)."""
    rng = np.random.default_rng([seed, case])
    kind = list(originals())[case % len(originals())]
    file, marker = folder / kind, folder / "ran"
    content = originals()[kind]
    damage = [flip_data, mutate, [forge_header, put_code_into, put_code_into][rng.integers(3)]][rng.integers(3)]
    if kind == ".safetensors" and damage is put_code_into:
        damage = forge_header
    changed = damage(kind, content, rng, marker)
    file.write_bytes(changed)
    try:
        outcome = judge(file, kind, content, changed, damage)
        assert not marker.exists(), "code was run"
    except Exception as error:
        kept = Path(tempfile.gettempdir(), f"fuzz-{seed}-{case}-{kind}")
        kept.write_bytes(changed)
        raise AssertionError(f"{kept}, {damage.__name__} of {kind}: {type(error).__name__}: {error}") from error
    return kind, outcome


def judge(file, kind, content, changed, damage):
    """Reads a file and returns the outcome; raises where it is wrong."""
    with quiet():
        try:
            read_state(file, shapes_only=True)
        except CheckpointError as error:
            assert str(error)
        try:
            found = read(file)
        except (CheckpointError, UnknownNameError) as error:
            assert str(error)
            return "refused"
    if same(found, truth(kind)):
        return "as it was"
    check_tensors(found, len(changed))
    if kind == ".safetensors":
        assert_equal(found, plain_reader(changed))
    else:
        assert damage is not put_code_into, "what stands beside the code is another state dict"
        # The bytes of an archive have checksums, which a forger makes fit.
        assert kind != "zip.pt" or damage is forge_header, "other numbers than the file was written with"
        if damage is flip_data:
            assert {key: value.shape for key, value in found.items()} == {
                key: value.shape for key, value in truth(kind).items()
            }
    return "as changed"


def check_tensors(found, size):
    """Checks that tensors can be read to the last number and are no larger than their file."""
    for key, value in found.items():
        assert isinstance(key, str)
        assert value.device.type == "cpu"
        assert value.numel() * value.itemsize <= value.untyped_storage().nbytes() or value.numel() < 16 * size
        value.flatten().view(torch.uint8).sum()


def plain_reader(content):
    """Returns the tensors of a safetensors file, read as its format is written down."""
    (length,) = struct.unpack("<Q", content[:8])
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    header.pop("__metadata__", None)
    found = {}
    for name, entry in header.items():
        start, stop = entry["data_offsets"]
        packed = torch.empty(entry["shape"], dtype=DTYPES[entry["dtype"]])
        assert packed.nbytes == stop - start
        packed.flatten().view(torch.uint8).numpy()[:] = np.frombuffer(data[start:stop], np.uint8)
        found[name] = packed
    return found


def same(found, expected):
    """Tells whether two state dicts are equal to the bit."""
    try:
        assert_equal(found, expected)
    except AssertionError:
        return False
    return True


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key].dtype == value.dtype, key
        assert found[key].shape == value.shape, key
        one, other = (tensor.contiguous().flatten().view(torch.uint8) for tensor in (found[key], value))
        assert torch.equal(one, other), key


def flip_data(kind, content, rng, marker):
    """Changes a number of a tensor and nothing else."""
    values = weights()["blocks.0.weight"].numpy().tobytes()
    place = content.index(values) + int(rng.integers(len(values)))
    return content[:place] + bytes([content[place] ^ 1 << int(rng.integers(8))]) + content[place + 1 :]


def mutate(kind, content, rng, marker):
    """Flips bits, makes holes, cuts, repeats, and writes bytes that are often limits."""
    data = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 8])):
        place, length = int(rng.integers(len(data))), int(rng.choice([1, 2, 4, 8, 64]))
        act = rng.integers(6)
        if act == 0:
            data[place] ^= 1 << int(rng.integers(8))
        elif act == 1:
            data[place : place + length] = [b"\0", b"\xff", b"\x7f", b"9", b"["][rng.integers(5)] * length
        elif act == 2:
            del data[place : place + length]
        elif act == 3:
            data[place:place] = data[place : place + length]
        elif act == 4:
            data[place : place + 1] = pickletools.opcodes[rng.integers(len(pickletools.opcodes))].code.encode("latin1")
        else:
            del data[place + length * 64 :]
        if not data:
            break
    return bytes(data)


def forge_header(kind, content, rng, marker):
    """Changes what tells how the numbers lie, so that lengths and checksums fit again."""
    if kind == ".safetensors":
        (length,) = struct.unpack("<Q", content[:8])
        header = bytes(change_header(json.loads(content[8 : 8 + length]), rng))
        return struct.pack("<Q", len(header)) + header + content[8 + length :]
    return repack(kind, content, lambda stream: change_pickle(stream, rng))


def change_header(header, rng):
    """Returns a header with one value that lies, and the others as they were."""
    name = list(header)[rng.integers(len(header))]
    entry = header[name]
    key = list(entry)[rng.integers(len(entry))]
    numbers = [0, 1, -1, 3, 12, 60, 2**31, 2**62, 2**64, 0.5, None, "1", [], {}]
    if rng.random() < 0.2:
        header[["", "__metadata__", "\ud800", "scale"][rng.integers(4)]] = header.pop(name)
    elif key == "dtype":
        entry[key] = [*DTYPES, "F4", "X", None][rng.integers(len(DTYPES) + 3)]
    elif isinstance(entry[key], list) and entry[key]:
        entry[key][rng.integers(len(entry[key]))] = numbers[rng.integers(len(numbers))]
    else:
        entry[key] = [numbers[i] for i in rng.integers(len(numbers), size=3)]
    return json.dumps(header).encode()


def change_pickle(stream, rng):
    """Replaces one opcode of a pickle by another, or its argument by one as long."""
    places = [place for _, _, place in pickletools.genops(stream)]
    at, other = rng.integers(len(places) - 1, size=2)
    start, stop = places[at : at + 2]
    act = rng.integers(4)
    if act == 0:
        return stream[:start] + stream[stop:]
    if act == 1:
        return stream[:start] + stream[start:stop] * 2 + stream[stop:]
    if act == 2 or stop - start == 1:
        return stream[:start] + stream[places[other] : places[other + 1]] + stream[stop:]
    argument = bytearray(stream[start + 1 : stop])
    argument[rng.integers(len(argument))] = int(rng.choice([0, 1, 2, 12, 127, 128, 255]))
    return stream[: start + 1] + bytes(argument) + stream[stop:]


def put_code_into(kind, content, rng, marker):
    """Puts a call somewhere into a pickle that is whole otherwise."""
    attack = attacks(marker)[rng.integers(len(attacks(marker)))]
    return repack(kind, content, lambda stream: put_code(stream, attack, rng))


def attacks(marker):
    """Returns streams of opcodes, each of which leaves a file when a pickle is loaded without care, and one value."""
    name, touch = str(marker), f"touch {marker}"
    calls = [("os", "system", touch), ("posix", "system", touch), ("subprocess", "getoutput", touch)]
    calls += [("builtins", run, f"open({name!r}, 'w').close()") for run in ("exec", "eval")]
    found = []
    for module, function, argument in calls:
        text = b"X" + struct.pack("<I", len(argument)) + argument.encode()
        short = [b"\x8c" + bytes([len(part)]) + part.encode() for part in (module, function)]
        found.append(f"c{module}\n{function}\n".encode() + text + b"\x85R")  # GLOBAL, REDUCE
        found.append(short[0] + short[1] + b"\x93" + text + b"\x85R")  # STACK_GLOBAL, REDUCE
        found.append(b"(" + text + f"i{module}\n{function}\n".encode())  # INST
        found.append(b"(" + f"c{module}\n{function}\n".encode() + text + b"o")  # OBJ
    opened = b"cbuiltins\nopen\n(X" + struct.pack("<I", len(name)) + name.encode() + b"X\1\0\0\0wtR"
    inner = pickle.dumps(1, 2)
    inner = inner[:2] + found[0] + b"0" + inner[2:]
    load = b"c_pickle\nloads\nB" + struct.pack("<I", len(inner)) + inner + b"\x85R"  # a pickle inside a pickle
    return [*found, opened, load]


def put_code(stream, attack, rng):
    """Puts an attack between two opcodes, and drops its value."""
    places = [place for op, _, place in pickletools.genops(stream) if op.name not in ("PROTO", "FRAME")]
    place = places[rng.integers(len(places))]
    framed = stream[:2] + stream[11:] if stream[2:3] == b"\x95" else stream  # a frame tells its length
    place -= len(stream) - len(framed)
    return framed[:place] + attack + b"0" + framed[place:]


def repack(kind, content, change):
    """Changes the pickle in a file, with checksums that fit."""
    if kind.endswith(".pkl"):
        return change(content)
    if kind == "legacy.pt":
        # Three small pickles (a magic number, a version, sizes), that of the objects, and the numbers.
        stream, start = io.BytesIO(content), 0
        for _ in range(3):
            pickle.load(stream)
            start = stream.tell()
        stop = start + 1 + next(place for op, _, place in pickletools.genops(content[start:]) if op.name == "STOP")
        return content[:start] + change(content[start:stop]) + content[stop:]
    packed = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(packed, "w") as new:
        for name in old.namelist():
            data = old.read(name)
            new.writestr(name, change(data) if name.endswith("/data.pkl") else data)
    return packed.getvalue()


@contextmanager
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
