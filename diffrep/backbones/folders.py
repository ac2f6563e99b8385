"""Diffusers folders: finding the parts of a pipeline and loading them."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import diffusers
import torch
from safetensors import SafetensorError
from torch import nn

from diffrep.backbones.checkpoint import check_keys, read_state
from diffrep.backbones.codec import Codec, TAESDCodec, VAECodec
from diffrep.backbones.taesd import find_taesd, taesd_from
from diffrep.errors import CheckpointError, ConfigError, suggest
from diffrep.noise import DiscreteSchedule, FlowSchedule, Schedule


def network_folder(folder: Path) -> Path:
    """Returns the folder that holds the network's config: the given one, or `unet/` or `transformer/` in it.

    Raises:
        CheckpointError: None of them does.
    """
    for place in (folder, folder / "unet", folder / "transformer"):
        if (place / "config.json").is_file():
            return place
    raise CheckpointError(f"{folder} holds no config.json, and neither do unet/ and transformer/ in it")


def beside(source: Path, name: str) -> Path | None:
    """Finds `name/` in the given folder or next to the network inside a pipeline."""
    for place in (source / name, source.parent / name):
        if place.is_dir() and any(place.glob("*.json")):
            return place
    return None


def network_class(config: dict[str, Any], where: Any) -> str:
    """Returns the class of a network's config; older configs name a common one for DiT and PixArt."""
    kind = str(config.get("_class_name"))
    if kind == "Transformer2DModel":
        kind = {"ada_norm_zero": "DiTTransformer2DModel", "ada_norm_single": "PixArtTransformer2DModel"}.get(
            config.get("norm_type"), kind
        )
    found = getattr(diffusers, kind, None)
    if not inspect.isclass(found) or not issubclass(found, nn.Module):
        raise ConfigError(f"{where}: diffusers {diffusers.__version__} has no network of class {kind!r}")
    return kind


def build(kind: str, config: dict[str, Any]) -> nn.Module:
    """Builds a diffusers model from its config.

    Raises:
        ConfigError: The constructor has no such argument; all are listed, with the closest names.
    """
    factory = getattr(diffusers, kind)
    given = {key: value for key, value in config.items() if not key.startswith("_")}
    known = list(inspect.signature(factory).parameters)
    problems = [f"unknown argument {key!r}; {suggest(key, known)}" for key in given if key not in known]
    if problems:
        raise ConfigError(f"config of {kind}: {'; '.join(problems)}")
    return factory.from_config({**given, "_class_name": kind})


def load_model(place: Path, device: torch.device, dtype: torch.dtype, kind: str | None = None) -> nn.Module:
    """Loads a model of diffusers from its folder; on the meta device no weights are read.

    Raises:
        CheckpointError: Weights are missing, damaged or do not fit.
    """
    config = read_json(place / "config.json")
    kind = kind or network_class(config, place)
    factory = getattr(diffusers, kind)
    if device.type == "meta":
        with torch.device("meta"):
            return cast(factory.from_config(config), device, dtype)
    try:
        model, info = factory.from_pretrained(place, torch_dtype=dtype, output_loading_info=True)
    except (OSError, SafetensorError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"cannot load {kind} from {place}: {error}") from error
    check_keys(place, info["missing_keys"], info["unexpected_keys"])
    return cast(model, device, dtype)


def load_codec(place: Path, device: torch.device, dtype: torch.dtype) -> Codec:
    """Loads an autoencoder: a diffusers folder (or a pipeline with `vae/`), or a TAESD's pair of files.

    Args:
        place: The folder, or the encoder's file of a TAESD.
        device: Where it goes; on the meta device no weights of diffusers' classes are read.
        dtype: Element type of its weights.

    Raises:
        CheckpointError: The folder holds neither, or its weights do not fit.
        ConfigError: The folder holds several TAESDs.
    """
    pair = find_taesd(place)
    if pair is not None:
        network = taesd_from(*(read_state(file) for file in pair))
        return TAESDCodec(cast(network, device, dtype))
    if not (place / "config.json").is_file() and (place / "vae" / "config.json").is_file():
        place = place / "vae"
    if not (place / "config.json").is_file():
        raise CheckpointError(f"{place} holds no autoencoder: no config.json, and no *_encoder.pth with its decoder")
    return VAECodec(load_model(place, device, dtype))


def load_schedule(place: Path, flow_scale: float) -> Schedule:
    """Reads `scheduler_config.json` of a folder; see `schedule_from`."""
    file = place / "scheduler_config.json"
    if not file.is_file() and (place / "scheduler" / "scheduler_config.json").is_file():
        file = place / "scheduler" / "scheduler_config.json"
    return schedule_from(read_json(file), flow_scale, file)


def schedule_from(config: dict[str, Any], flow_scale: float, where: Any) -> Schedule:
    """Returns the noise schedule of a diffusers scheduler's config.

    Args:
        config: The scheduler's config.
        flow_scale: Native time of a flow's noise end in the network that it goes with.
        where: Where it was read, for messages.

    Raises:
        ConfigError: The class is unknown or no schedule of this kind.
    """
    kind = str(config.get("_class_name"))
    factory = getattr(diffusers, kind, None)
    if not inspect.isclass(factory) or not issubclass(factory, diffusers.SchedulerMixin):
        raise ConfigError(f"{where}: diffusers {diffusers.__version__} has no scheduler {kind!r}")
    scheduler = factory.from_config(config)
    if "FlowMatch" in kind or config.get("use_flow_sigmas") or config.get("prediction_type") == "flow_prediction":
        return FlowSchedule("linear", data_time=0, scale=flow_scale, sampler=scheduler)
    if not hasattr(scheduler, "alphas_cumprod"):
        raise ConfigError(f"{where}: {kind} is neither a DDPM schedule (no alphas_cumprod) nor a flow")
    return DiscreteSchedule.from_diffusers(scheduler)


def cast(network: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Moves a network, past diffusers' own `to`, which warns of modules to keep in fp32 even when there are none."""
    return nn.Module.to(network, device, dtype)


def read_json(file: Path) -> dict[str, Any]:
    """Reads a JSON file.

    Raises:
        CheckpointError: It is missing or holds no JSON object.
    """
    try:
        found = json.loads(file.read_text())
    except FileNotFoundError:
        raise CheckpointError(f"no such file: {file}") from None
    except (ValueError, RecursionError) as error:  # of JSON, UTF-8, or a number of thousands of digits
        raise CheckpointError(f"cannot read {file}: {error}") from error
    if not isinstance(found, dict):
        raise CheckpointError(
            f"{file} must hold a JSON object, such as the constructor's arguments, got {str(found)[:50]}"
        )
    return found
