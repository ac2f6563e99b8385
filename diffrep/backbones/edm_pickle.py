"""Reader of the pickles that NVlabs/edm publishes (Karras et al., 2022), which runs no code of theirs.

Such a file holds whole objects. Each class of theirs is stored as the text of its source module, which their own
reader executes; here an object is a record of its state, the source text is dropped, and any callable that is not on
the list below is refused. The weights of a record are then walked as `nn.Module.state_dict` would.
"""

from __future__ import annotations

import io
import pickle
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffrep.errors import CheckpointError, UnknownNameError

WRAPPERS = {"EDMPrecond": "edm", "VPPrecond": "vp", "VEPrecond": "ve", "iDDPMPrecond": "iddpm"}
_POSITIONAL = ("img_resolution", "img_channels", "label_dim", "use_fp16")  # the same in all four wrappers


def read_edm_pickle(path: str | Path, key: str = "ema") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Reads a network out of a published pickle, such as `edm-cifar10-32x32-uncond-vp.pkl`.

    Args:
        path: The file: a pickled dict of objects.
        key: Which of them is the network.

    Returns:
        The published state dict, on the CPU, contiguous, its keys starting with `model.` (iDDPM also has its table of
        noise levels, `u`), and the config that `edm_arguments` takes.

    Raises:
        CheckpointError: The file is missing or damaged, names a class or function that such files do not need, or
            holds no EDM network.
        UnknownNameError: There is no such key.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            content = _Unpickler(file).load()
    except FileNotFoundError:
        raise CheckpointError(f"no such file: {path}") from None
    except Exception as error:  # a damaged pickle can raise almost anything
        raise CheckpointError(f"cannot read the pickle {path}: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds {_kind(content)}; a published EDM file holds a dict with the key {key!r}")
    if key not in content:
        raise UnknownNameError(f"key in {path}", key, [name for name in content if isinstance(name, str)])
    try:
        return _state(content[key], path.stat().st_size), _config(content[key])
    except _MalformedError as error:
        raise CheckpointError(f"{path}, {key!r}: {error}") from error
    except RecursionError:
        raise CheckpointError(f"{path}, {key!r}: its modules lie in each other without end") from None


class _MalformedError(Exception):
    """The objects in the file are not what a published file holds."""


class _Record:
    """What is left of an object: what it was made from and the state it was given."""

    def __new__(cls, *args: Any, **kwargs: Any) -> _Record:
        record = super().__new__(cls)
        record.__dict__.update(class_name=None, args=args, kwargs=kwargs, state=None)
        return record

    def __setstate__(self, state: Any) -> None:
        self.__dict__["state"] = state


def _persistent(meta: dict[str, Any]) -> _Record:
    for key in ("type", "class_name"):
        if not isinstance(meta[key], str):
            raise _MalformedError(f"a persistent object whose {key} is {_kind(meta[key])}, not text")
    if meta["type"] != "class":
        raise _MalformedError(f"a persistent object of type {meta['type']!r}; only 'class' is known")
    record = _Record()
    record.__dict__.update(class_name=meta["class_name"], state=meta["state"])
    return record


def _storage(data: bytes) -> torch.TypedStorage:
    # torch's own function of this name loads with weights_only=False, which would run any code in the bytes.
    storage = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    if not isinstance(storage, torch.TypedStorage):
        raise _MalformedError(f"{_kind(storage)} in place of the numbers of a tensor")
    return storage


def _tensor(
    storage: torch.TypedStorage, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any
) -> Tensor:
    if not isinstance(storage, torch.TypedStorage):
        raise _MalformedError(f"a tensor over {_kind(storage)}")
    flat = torch.empty(0, dtype=storage.dtype).set_(storage._untyped_storage)
    tensor = flat.as_strided(size, stride, offset)  # raises where the view leaves the storage
    held = storage._untyped_storage.nbytes()
    if tensor.nbytes > held:
        raise _MalformedError(f"a tensor of {tensor.nbytes:,} bytes over {held:,}")
    return tensor


def _parameter(data: Tensor, *_: Any) -> Tensor:
    return data


def _scalar(dtype: _Record, data: bytes) -> float | int | bool:
    code = dtype.args[0]
    if not isinstance(code, str) or code[:1] not in ("f", "i", "u", "b"):
        raise _MalformedError(f"a numpy scalar of dtype {code!r}; only numbers are read")
    return np.frombuffer(data, np.dtype(code).newbyteorder(dtype.state[1])).item()


_ALLOWED = {
    ("builtins", "set"): set,
    ("collections", "OrderedDict"): OrderedDict,
    ("dnnlib.util", "EasyDict"): dict,
    ("torch_utils.persistence", "_reconstruct_persistent_obj"): _persistent,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _parameter,
    ("torch.storage", "_load_from_bytes"): _storage,
    ("numpy", "dtype"): _Record,
    ("numpy", "ndarray"): _Record,
    ("numpy.core.multiarray", "scalar"): _scalar,
    ("numpy.core.multiarray", "_reconstruct"): _Record,
    ("numpy.core.numeric", "_frombuffer"): _Record,
    ("numpy._core.multiarray", "scalar"): _scalar,
    ("numpy._core.multiarray", "_reconstruct"): _Record,
    ("numpy._core.numeric", "_frombuffer"): _Record,
}


class _Unpickler(pickle._Unpickler):
    """Hands out the stand-ins above and nothing else; no module is imported.

    It is the one in Python: that in C takes as much memory as a number in the file says.
    """

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _ALLOWED:
            return _ALLOWED[module, name]
        if module.startswith("torch.nn.modules."):
            return _Record
        raise _MalformedError(
            f"it names {module}.{name}, which no published EDM network needs; it was not run. If you trust the file, "
            "save its state dict as safetensors with the program that wrote it"
        )

    def persistent_load(self, pid: Any) -> Any:
        raise _MalformedError("it holds references to data outside the pickle; was it written by torch.save?")


def _state(network: Any, limit: int) -> dict[str, Tensor]:
    """Returns the state dict; of tensors that share their numbers there may be no more bytes than the file has."""
    found, size = {}, 0
    for key, tensor in _tensors(network, "", set()):
        size += tensor.nbytes
        if size > limit:
            raise _MalformedError(f"its tensors take more than the {limit:,} bytes of the file")
        found[key] = tensor.contiguous()
    return found


def _tensors(module: Any, prefix: str, seen: set[int]) -> Iterator[tuple[str, Tensor]]:
    state = module.state if isinstance(module, _Record) else None
    parts = ("_parameters", "_buffers", "_modules")
    if not isinstance(state, dict) or not all(isinstance(state.get(p), dict) for p in parts):
        raise _MalformedError(f"{prefix.rstrip('.') or 'it'} is {_kind(module)}, not a module of a network")
    if id(module) in seen:  # a few of them, each twice in the next, would make millions
        raise _MalformedError(f"{prefix.rstrip('.')} is a module that is at another place too")
    seen.add(id(module))
    hidden = state.get("_non_persistent_buffers_set", ())
    buffers = {name: buffer for name, buffer in state["_buffers"].items() if name not in hidden}
    for name, tensor in (state["_parameters"] | buffers).items():
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            raise _MalformedError(f"{prefix}{name} is {_kind(tensor)}, not a tensor")
        yield f"{prefix}{name}", tensor
    for name, child in state["_modules"].items():
        if child is not None:
            yield from _tensors(child, f"{prefix}{name}.", seen)


def _config(network: _Record) -> dict[str, Any]:
    if network.class_name not in WRAPPERS:
        raise _MalformedError(f"its class is {network.class_name!r}; known are {', '.join(WRAPPERS)}")
    given, named = network.state.get("_init_args"), network.state.get("_init_kwargs")
    if not isinstance(given, tuple) or len(given) > len(_POSITIONAL) or not isinstance(named, dict):
        raise _MalformedError(f"the arguments of its class, {_kind(given)} and {_kind(named)}, cannot be read")
    arguments = dict(zip(_POSITIONAL, given, strict=False)) | named
    return {"precond": WRAPPERS[network.class_name]} | {name: _plain(name, a) for name, a in arguments.items()}


def _plain(name: str, value: Any, inside: bool = False) -> Any:
    if isinstance(value, (list, tuple)) and not inside:
        return [_plain(name, member, inside=True) for member in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise _MalformedError(f"its argument {name!r} is {_kind(value)}; only numbers, text and lists of them are read")


def _kind(value: Any) -> str:
    if isinstance(value, _Record):
        return f"an object of class {value.class_name}" if value.class_name else "an object without a known class"
    return f"a {type(value).__name__}"
