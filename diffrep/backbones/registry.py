"""From what a user names - a bundled backbone, a folder, a file, a hub id - to a loaded `Backbone`."""

from __future__ import annotations

import json
import re
from importlib import resources
from pathlib import Path
from typing import Any

import diffusers
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from diffrep.backbones.backbone import Backbone
from diffrep.backbones.codec import Codec, IdentityCodec, VAECodec
from diffrep.backbones.conditioning import Conditioner
from diffrep.backbones.dit import DiffusersDiT
from diffrep.backbones.unet import UNet2D, UNet2DCondition
from diffrep.errors import BackendUnavailable, CheckpointError, ConfigError, UnknownNameError
from diffrep.noise import DiscreteSchedule, Schedule

FAMILIES: dict[str, type[Backbone]] = {"unet2d": UNet2D, "unet2d-condition": UNet2DCondition, "dit": DiffusersDiT}
BUNDLED: dict[str, str] = {
    "fashion-unet": "U-Net, 32x32, one channel, trained on the 60,000 training images of Fashion-MNIST",
}
# Only safetensors and JSON are fetched from the hub; half-precision and EMA duplicates of the same weights are not.
# Root files are named one by one: a pipeline's root often holds whole single-file checkpoints too.
HUB_CONFIGS = ["config.json", "scheduler_config.json", "model_index.json"]
HUB_CONFIGS += [f"{part}/*.json" for part in ("unet", "transformer", "vae", "scheduler")]
HUB_WEIGHTS = ["diffusion_pytorch_model*.safetensors"]
HUB_WEIGHTS += [f"{part}/diffusion_pytorch_model*.safetensors" for part in ("unet", "transformer", "vae")]
HUB_DUPLICATES = ["*.fp16.*", "*.bf16.*", "*.non_ema.*"]


def list_backbones() -> dict[str, str]:
    """Returns the names of the backbones that ship with the package, with a line on each."""
    return dict(BUNDLED)


def load_backbone(
    source: str | Path,
    family: str | None = None,
    config: dict[str, Any] | str | Path | None = None,
    codec: str | Path | Codec | None = None,
    conditioner: Conditioner | None = None,
    schedule: str | Path | Schedule | None = None,
    revision: str | None = None,
    init_seed: int | None = None,
    device: str = "auto",
    dtype: str | torch.dtype = "auto",
) -> Backbone:
    """Loads a frozen backbone.

    Args:
        source: Name of a bundled backbone; a diffusers folder (one model, a pipeline, or `unet/ vae/ scheduler/` side
            by side); a file of weights, with its `family` and `config`; or a hub id.
        family: For a file of weights, one of "unet2d", "unet2d-condition", "dit".
        config: For a file of weights, the constructor's arguments, as a dict or a JSON file.
        codec: Folder of an autoencoder, or a `Codec`; None takes the `vae/` beside the network, else the identity.
        conditioner: What turns `cond` into the network's condition; None takes the one that fits its config.
        schedule: Folder of a diffusers scheduler, or a `Schedule`; None takes the `scheduler/` beside the network.
        revision: Hub revision.
        init_seed: Give the network random weights from this seed in place of the trained ones: the untrained baseline.
        device: "auto" takes CUDA where there is one; "meta" builds the network without reading any weights.
        dtype: "auto" is bfloat16 on CUDA and float32 elsewhere.

    Raises:
        UnknownNameError: `source` is neither a path nor a known name.
        CheckpointError: Weights are missing, truncated or do not fit.
        ConfigError: The folder lacks a scheduler, or the class is not supported.
    """
    device = _device(device)
    dtype = _dtype(dtype, device)
    folder = _find(source, revision, with_weights=device.type != "meta")
    if folder.is_file():
        network, adapter = _from_file(folder, family, config, device, dtype)
    elif family is not None or config is not None:
        raise ConfigError(f"{source}: family and config belong to a file of weights; a folder names its own class")
    else:
        network, adapter = _from_folder(folder, device, dtype)
    if init_seed is not None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(init_seed)
            network = _cast(type(network).from_config(network.config), device, dtype)
    if not isinstance(codec, Codec):
        place = Path(codec) if codec is not None else _beside(folder, "vae")
        codec = VAECodec(_load(place, device, dtype)) if place else IdentityCodec(network.config.in_channels)
    if schedule is None or isinstance(schedule, (str, Path)):
        place = Path(schedule) if schedule is not None else _beside(folder, "scheduler")
        if place is None and (folder / "scheduler_config.json").is_file():
            place = folder  # unconditional pipelines keep it at the root
        if place is None:
            raise ConfigError(f"{source} has no scheduler/ beside the network; give schedule, a folder or a Schedule")
        schedule = _schedule(place)
    name = Path(source).resolve().name if Path(source).expanduser().exists() else str(source)
    return adapter(name, network, schedule, codec, conditioner or adapter.conditioner_of(network))


def _find(source: str | Path, revision: str | None, with_weights: bool) -> Path:
    path = Path(source).expanduser()
    if path.exists():
        return path
    name = str(source)
    if name in BUNDLED:
        return Path(str(resources.files("diffrep.backbones") / "bundled" / name))
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or path.suffix in (".pt", ".pth", ".safetensors"):
        raise UnknownNameError("backbone", name, BUNDLED, "No such path either; a hub id is written owner/name")
    from huggingface_hub import snapshot_download

    try:
        files = HUB_CONFIGS + (HUB_WEIGHTS if with_weights else [])
        return Path(snapshot_download(name, revision=revision, allow_patterns=files, ignore_patterns=HUB_DUPLICATES))
    except Exception as error:  # network, permission and not-found errors of several libraries
        raise CheckpointError(f"{name!r} is no local path, and the hub did not give it: {error}") from error


def _network_folder(folder: Path) -> Path:
    for place in (folder, folder / "unet", folder / "transformer"):
        if (place / "config.json").is_file():
            return place
    raise CheckpointError(f"{folder} holds no config.json, and neither do unet/ and transformer/ in it")


def _beside(source: Path, name: str) -> Path | None:
    """Finds `name/` in the given folder or next to the network inside a pipeline."""
    for place in (source / name, source.parent / name):
        if place.is_dir() and any(place.glob("*.json")):
            return place
    return None


def _from_folder(folder: Path, device: torch.device, dtype: torch.dtype) -> tuple[nn.Module, type[Backbone]]:
    place = _network_folder(folder)
    kind = _read_json(place / "config.json").get("_class_name")
    adapters = {adapter.diffusers_class: adapter for adapter in FAMILIES.values()}
    if kind not in adapters:
        raise ConfigError(f"{place}: network class {kind!r} is not supported; supported: {', '.join(adapters)}")
    return _load(place, device, dtype), adapters[kind]


def _load(place: Path, device: torch.device, dtype: torch.dtype) -> nn.Module:
    config = _read_json(place / "config.json")
    factory = getattr(diffusers, str(config.get("_class_name")), None)
    if factory is None:
        raise ConfigError(f"{place}: diffusers {diffusers.__version__} has no class {config.get('_class_name')!r}")
    if device.type == "meta":
        with torch.device("meta"):
            return _cast(factory.from_config(config), device, dtype)
    try:
        model, info = factory.from_pretrained(place, torch_dtype=dtype, output_loading_info=True)
    except (OSError, SafetensorError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"cannot load {config['_class_name']} from {place}: {error}") from error
    _check_keys(place, info["missing_keys"], info["unexpected_keys"])
    return _cast(model, device, dtype)


def _cast(network: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    # Past diffusers' own `to`, which warns of modules to keep in fp32 even when there are none.
    return nn.Module.to(network, device, dtype)


def _from_file(
    file: Path, family: str | None, config: Any, device: torch.device, dtype: torch.dtype
) -> tuple[nn.Module, type[Backbone]]:
    if family is None or config is None:
        raise ConfigError(f"{file} is a file of weights; give its family ({', '.join(FAMILIES)}) and config")
    if family not in FAMILIES:
        raise UnknownNameError("family", family, FAMILIES)
    adapter = FAMILIES[family]
    arguments = config if isinstance(config, dict) else _read_json(Path(config))
    with torch.device(device if device.type == "meta" else "cpu"):
        network = getattr(diffusers, adapter.diffusers_class).from_config(arguments)
    if device.type != "meta":
        state = read_weights(file)
        own = network.state_dict()
        resized = [
            f"{key} ({tuple(state[key].shape)} there, {tuple(own[key].shape)} here)"
            for key in own.keys() & state.keys()
            if state[key].shape != own[key].shape
        ]
        _check_keys(file, list(own.keys() - state.keys()), list(state.keys() - own.keys()), resized)
        network.load_state_dict(state)
    return _cast(network, device, dtype), adapter


def read_weights(file: Path) -> dict[str, torch.Tensor]:
    """Reads a state dict; pickles are read with `weights_only=True`, so no code in them runs.

    Raises:
        CheckpointError: The file is damaged or holds more than tensors.
    """
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # safetensors, zip and pickle errors have no common base
        raise CheckpointError(f"cannot read the weights in {file}: {error}") from error


def _check_keys(where: Path, missing: list[str], unexpected: list[str], resized: list[str] = ()) -> None:
    problems = [
        f"{len(keys)} {what}: {', '.join(sorted(keys)[:10])}{', ...' if len(keys) > 10 else ''}"
        for what, keys in (("missing", missing), ("unexpected", unexpected), ("of another shape", resized))
        if keys
    ]
    if problems:
        raise CheckpointError(f"the weights in {where} do not fit the network; keys {'; keys '.join(problems)}")


def _schedule(place: Path) -> DiscreteSchedule:
    file = place / "scheduler_config.json"
    if not file.is_file():
        raise ConfigError(f"no scheduler_config.json in {place}")
    config = _read_json(file)
    factory = getattr(diffusers, str(config.get("_class_name")), None)
    if factory is None:
        raise ConfigError(f"{file}: diffusers {diffusers.__version__} has no scheduler {config.get('_class_name')!r}")
    scheduler = factory.from_config(config)
    if not hasattr(scheduler, "alphas_cumprod"):
        raise ConfigError(f"{file}: {config['_class_name']} is no DDPM schedule (it has no alphas_cumprod)")
    return DiscreteSchedule.from_diffusers(scheduler)


def _read_json(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text())
    except FileNotFoundError:
        raise CheckpointError(f"no such file: {file}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"cannot read {file}: {error}") from error


def _device(name: str) -> torch.device:
    if name == "auto":
        # The current device, not the first: each process of a job has its own.
        return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"unknown device {name!r}; write auto, cpu, cuda, cuda:0, mps or meta") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise BackendUnavailable(f"device {name!r} was asked for and this torch sees no CUDA device; use device=cpu")
    return device


def _dtype(name: str | torch.dtype, device: torch.device) -> torch.dtype:
    if isinstance(name, torch.dtype):
        return name
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if name not in ("float32", "bfloat16", "float16"):
        raise UnknownNameError("dtype", name, ["auto", "float32", "bfloat16", "float16"])
    return getattr(torch, name)
