"""Files of weights: read without running code in them, and compared with the network they should fit."""

from __future__ import annotations

import argparse
import pickle
import re
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from diffrep.errors import CheckpointError

State = dict[str, torch.Tensor]
# Where training code puts the weights, best first: released numbers are those of the average.
HOLDERS = ("ema", "model", "state_dict")
# Times its own size that a file may unpack to. torch packs nothing; what unpacks to more was made to fill memory.
UNPACKED = 16


def read_tensors(file: Path, shapes_only: bool = False) -> dict[str, Any]:
    """Reads a file of tensors; pickles are read with `weights_only=True`, so no code in them runs.

    Besides tensors and plain values only `argparse.Namespace` is let in: the files of DiT, SiT and REPA hold one.

    Args:
        file: `.safetensors`, or a pickle of torch.
        shapes_only: Map the file and read no values of it; safetensors come on the meta device.

    Raises:
        CheckpointError: The file is missing, damaged, or holds more than that.
    """
    if not file.is_file():
        raise CheckpointError(f"no such file: {file}")
    try:
        if file.suffix == ".safetensors":
            return _shapes(file) if shapes_only else load_file(file)
        with file.open("rb") as content:
            archive = content.read(4) == b"PK\3\4"
        if archive:
            _check_archive(file, contents=not shapes_only)
        mapped = shapes_only and archive  # torch's first format cannot be mapped
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    except CheckpointError:
        raise
    except pickle.UnpicklingError as error:
        asked = re.search(r"GLOBAL ([\w.]+)", str(error))
        pickled = file.suffix == ".pkl"
        if asked is None and not pickled:
            raise CheckpointError(f"{file} holds neither safetensors nor a pickle of tensors") from error
        raise CheckpointError(
            f"{file} is a pickle that holds code or objects{f' ({asked[1]})' if asked else ''}, which diffrep does "
            f"not run; for a published EDM network use 'diffrep convert {file if pickled else 'NETWORK.pkl'} OUT', "
            "else save its state dict with the program that wrote it"
        ) from error
    except Exception as error:  # safetensors and zip errors have no common base
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise CheckpointError(f"cannot read the weights in {file}: {reason}") from error


def read_state(file: Path, shapes_only: bool = False) -> State:
    """Reads a state dict, bare or inside a training checkpoint {model, ema, opt, args}; the EMA is preferred.

    Args:
        file: As for `read_tensors`.
        shapes_only: Return tensors on the meta device.

    Raises:
        CheckpointError: The file cannot be read or holds no state dict.
    """
    found = read_tensors(file, shapes_only)
    for holder in HOLDERS:
        if isinstance(found, dict) and isinstance(found.get(holder), dict):
            found = found[holder]
            break
    held = type(found).__name__
    if isinstance(found, dict):
        held = ", ".join(
            key if isinstance(key, str) else f"a key of type {type(key).__name__}" for key in [*found][:10]
        )
    named = isinstance(found, dict) and all(isinstance(key, str) for key in found)
    if not named or not found or not all(isinstance(value, torch.Tensor) for value in found.values()):
        raise CheckpointError(f"{file} holds no state dict; it holds {held or 'nothing'}")
    _check_dense(file, found, shapes_only)
    state = {_bare(key): value.to("meta") if shapes_only else value for key, value in found.items()}
    if len(state) < len(found):
        names = Counter(map(_bare, found))
        double = ", ".join(key for key in found if _bare(key) == names.most_common(1)[0][0])
        raise CheckpointError(f"{file} holds the same weights under several names: {double}; save one of them")
    return state


def look_alike(keys: list[str]) -> str | None:
    """Returns what kind of network a state dict's keys look like, or None."""
    names = [_bare(key) for key in keys]
    signs = {
        "a Stable Diffusion single-file checkpoint (convert it with diffusers)": "model.diffusion_model.",
        "repa": "projectors.",
        "dit, sit or repa": "x_embedder.proj.weight",
        "a CompVis U-Net (convert it with diffusers)": "input_blocks.1.1.transformer_blocks.",
        "adm": "input_blocks.0.0.",
        "edm": "model.map_layer0.",
        "edm (without its wrapper)": "map_layer0.",
        "a U-Net of diffusers (unet2d or unet2d-condition)": "down_blocks.",
        "a transformer of diffusers (transformer2d, pixart, sd3, flux, sana or diffusers-dit)": "transformer_blocks.",
        "an autoencoder": "encoder.",
    }
    return next((kind for kind, sign in signs.items() if any(name.startswith(sign) for name in names)), None)


def check_state(where: Any, network: nn.Module, state: State, family: str) -> None:
    """Compares a state dict with a network.

    Raises:
        CheckpointError: Keys are missing, unexpected or of another shape: grouped, the first ten of each; and where
            the keys look like another family's, which.
    """
    own = network.state_dict()
    resized = [
        f"{key} {tuple(state[key].shape)} in the file, {tuple(own[key].shape)} in the network"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    check_keys(where, [key for key in own if key not in state], [k for k in state if k not in own], resized, family)


def check_keys(
    where: Any, missing: list[str], unexpected: list[str], resized: list[str] = (), family: str | None = None
) -> None:
    """Raises a CheckpointError that groups what does not fit; nothing when all fits."""
    groups = (("missing", missing), ("unexpected", unexpected), ("of another shape", resized))
    problems = [
        f"{len(keys)} keys {what}: {', '.join(sorted(keys)[:10])}{', ...' if len(keys) > 10 else ''}"
        for what, keys in groups
        if keys
    ]
    if not problems:
        return
    kind = look_alike(unexpected)
    hint = "; is this another variant than the config says?" if resized else ""
    if resized and all(key.startswith("final_layer.linear.") for key in resized):
        hint = "; REPA's last layer is half as wide as that of DiT and SiT: is the family right?"
    if family and kind and family not in re.findall(r"[\w-]+", kind):
        hint = f"; its keys look like {kind}, not {family}"
    raise CheckpointError(f"the weights in {where} do not fit the network: {'; '.join(problems)}{hint}")


def _check_archive(file: Path, contents: bool) -> None:
    """Refuses what torch reads all the same: an archive that unpacks to gigabytes, or one that is damaged."""
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        size = sum(member.file_size for member in members)
        if size > UNPACKED * file.stat().st_size:
            raise CheckpointError(
                f"{file} would unpack to {size:,} bytes, more than {UNPACKED} times its own; save it with torch.save"
            )
        damaged = [member.filename for member in members if not _fits(archive, member)] if contents else []
        # torch can be told to write no checksums: then none of them fits.
        if damaged and len(damaged) < len(members):
            raise CheckpointError(f"{file} is damaged: {damaged[0]} does not fit its checksum; fetch the file again")


def _fits(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> bool:
    with archive.open(member) as content:
        try:
            while content.read(1 << 20):
                pass
        except zipfile.BadZipFile:
            return False
    return True


def _check_dense(file: Path, state: State, shapes_only: bool) -> None:
    """Refuses tensors that a network's weights are never stored as, and views that say more than the file holds."""
    devices = ("cpu", "meta") if shapes_only else ("cpu",)
    for key, value in state.items():
        dense = value.layout is torch.strided and not value.is_nested and not value.is_quantized
        if not dense or value.device.type not in devices:
            raise CheckpointError(
                f"{file}: {key} is no dense tensor with numbers; save its state dict with dense ones"
            )
    # On the meta device there are shapes alone.
    size = sum(value.numel() * value.itemsize for value in state.values() if value.device.type != "meta")
    if size > UNPACKED * file.stat().st_size:
        raise CheckpointError(
            f"{file} holds tensors of {size:,} bytes, more than {UNPACKED} times its own; make them contiguous"
        )


def _bare(key: str) -> str:
    """Drops the prefixes of DataParallel and torch.compile."""
    return re.sub(r"^(module\.|_orig_mod\.)+", "", key)


def _shapes(file: Path) -> State:
    with safe_open(file, framework="pt") as content:
        shapes = {key: content.get_slice(key).get_shape() for key in content.keys()}  # noqa: SIM118 - no dict
    return {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
