"""From what a user names - a registered backbone, a folder, a file, a hub id - to a loaded `Backbone`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from diffrep.backbones import folders
from diffrep.backbones.attention import choose_attention, count_attention
from diffrep.backbones.backbone import Backbone
from diffrep.backbones.checkpoint import check_state, read_state
from diffrep.backbones.codec import Codec, IdentityCodec, VAECodec
from diffrep.backbones.conditioning import Conditioner, PromptEmbeddings
from diffrep.backbones.dit_keys import arguments_from_diffusers, from_diffusers
from diffrep.backbones.mmdit import SD3, DiffusersDiT, DiffusersTransformer, Flux, PixArt, Sana, Transformer2D
from diffrep.backbones.official import (
    ADMBackbone,
    DiTBackbone,
    EDMBackbone,
    OfficialBackbone,
    REPABackbone,
    SiTBackbone,
)
from diffrep.backbones.sources import HUB_TEXT, find, registered, snapshot, weights_of
from diffrep.backbones.text import OUTPUTS, PromptEncoder
from diffrep.backbones.unet import UNet2D, UNet2DCondition
from diffrep.errors import BackendUnavailable, ConfigError, UnknownNameError
from diffrep.noise import Schedule
from diffrep.taps import to_meta

OFFICIAL: dict[str, type[OfficialBackbone]] = {
    "dit": DiTBackbone,
    "sit": SiTBackbone,
    "repa": REPABackbone,
    "adm": ADMBackbone,
    "edm": EDMBackbone,
}
DIFFUSERS: dict[str, type[UNet2D] | type[DiffusersTransformer]] = {
    "unet2d": UNet2D,
    "unet2d-condition": UNet2DCondition,
    "transformer2d": Transformer2D,
    "pixart": PixArt,
    "sd3": SD3,
    "flux": Flux,
    "sana": Sana,
    "diffusers-dit": DiffusersDiT,
}
FAMILIES = {**OFFICIAL, **DIFFUSERS}
# What `diffrep convert` writes beside the weights of an official checkpoint.
CONVERTED = "diffrep_family"


@dataclass
class _Parts:
    """What a source gives before codec, schedule and conditioner are settled."""

    network: nn.Module
    adapter: type[Backbone]
    schedule: Schedule | None = None
    codec: Codec | None = None
    pipeline: str | None = None
    text_folder: Any = field(default=None)


def load_backbone(
    source: str | Path,
    family: str | None = None,
    config: Mapping[str, Any] | str | Path | None = None,
    codec: str | Path | Codec | None = None,
    conditioner: Conditioner | None = None,
    schedule: str | Path | Schedule | None = None,
    revision: str | None = None,
    init_seed: int | None = None,
    device: str = "auto",
    dtype: str | torch.dtype = "auto",
    attention: str = "auto",
    channels_last: bool | None = None,
    compile: bool = False,
) -> Backbone:
    """Loads a frozen backbone.

    Args:
        source: A bundled or registered name (`list_backbones`); a diffusers folder (one model, a pipeline, or
            `unet/ vae/ scheduler/` side by side); a folder that `diffrep convert` wrote; a file of weights, with its
            `family` and `config`; or a hub id.
        family: For a file of weights: "dit", "sit", "repa", "adm", "edm", or a diffusers class ("unet2d",
            "unet2d-condition", "transformer2d", "pixart", "sd3", "flux", "sana", "diffusers-dit"). For a folder of
            `DiTTransformer2DModel`, "diffusers-dit" keeps that class's own numbers in place of the official DiT's.
        config: For a file of weights: a variant's name ("XL/2", "256-uncond") or the constructor's arguments, as a
            dict or a JSON file.
        codec: Folder or hub id of an autoencoder, or a `Codec`; None takes the `vae/` beside the network, else the
            identity.
        conditioner: What turns `cond` into the network's condition; None takes the one that fits its config.
        schedule: Folder of a diffusers scheduler, or a `Schedule`; None takes the `scheduler/` beside the network, or
            for official checkpoints the schedule of their paper.
        revision: Hub revision.
        init_seed: Give the network random weights from this seed in place of the trained ones: the untrained baseline.
        device: "auto" takes CUDA where there is one; "meta" builds the network without reading any weights.
        dtype: "auto" is bfloat16 on CUDA and float32 elsewhere.
        attention: "auto" and "sdpa" leave the choice to torch; "flash" and "xformers" insist on that kernel.
        channels_last: Memory layout of convolutional networks; None takes channels-last on CUDA.
        compile: Compile the function that returns the features, once for each set of layers.

    Raises:
        UnknownNameError: `source` is neither a path nor a known name.
        CheckpointError: Weights are missing, truncated or do not fit.
        ConfigError: The folder lacks a scheduler, or the class is not supported.
        BackendUnavailable: The device or the attention kernel cannot be used here.
    """
    device = _device(device)
    dtype = _dtype(dtype, device)
    kernel = choose_attention(attention, device, dtype)
    entry = registered().get(str(source))
    if entry is not None and device.type == "meta":
        parts, place = _from_entry(entry, dtype), None
    else:
        place = find(weights_of(entry) if entry else source, revision, with_weights=device.type != "meta")
        parts = _from_path(place, source, family, config, device, dtype)
    if init_seed is not None:
        parts.network = _untrained(parts.network, init_seed, device, dtype)
    if isinstance(codec, (str, Path)):
        codec = folders.load_codec(find(codec, None, with_weights=device.type != "meta"), device, dtype)
    elif codec is None and parts.codec is None and place is not None and folders.beside(place, "vae"):
        codec = folders.load_codec(folders.beside(place, "vae"), device, dtype)
    codec = codec or parts.codec or IdentityCodec(_channels(parts))
    if not isinstance(schedule, Schedule):
        schedule = _schedule(schedule, parts, place, source)
    if conditioner is None:
        conditioner = parts.adapter.conditioner_of(parts.network)
        if isinstance(conditioner, PromptEmbeddings):
            conditioner = _with_encoder(conditioner, parts, place, source, revision, dtype)
    backbone = parts.adapter(_name(source), parts.network, schedule, codec, conditioner)
    backbone.compiler = "inductor" if compile else None
    backbone.attention = kernel
    if kernel is not None:
        _check_counts(backbone, attention)
    if backbone.convolutional and (channels_last or (channels_last is None and device.type == "cuda")):
        backbone.network.to(memory_format=torch.channels_last)
    return backbone


def _from_entry(entry: dict[str, Any], dtype: torch.dtype) -> _Parts:
    """Builds a registered backbone on the meta device, from the configs that ship."""
    meta = torch.device("meta")
    with meta:
        if "family" in entry:
            adapter = OFFICIAL[entry["family"]]
            network, schedule = adapter.build(entry["config"], None), adapter.schedule_of(entry["config"])
        else:
            kind = entry["network"]["_class_name"]
            adapter = _adapter(kind, entry["name"])
            network = folders.build(kind, entry["network"])
            scale = getattr(adapter, "flow_scale", 1.0)
            schedule = None
    if schedule is None:  # outside the block: the schedule holds numbers
        schedule = folders.schedule_from(entry["scheduler"], scale, entry["name"])
    codec = None
    if "vae" in entry:
        with meta:
            vae = folders.build(entry["vae"]["_class_name"], entry["vae"])
        codec = VAECodec(folders.cast(vae, meta, dtype))
    return _Parts(folders.cast(network, meta, dtype), adapter, schedule, codec)


def _from_path(
    place: Path, source: Any, family: str | None, config: Any, device: torch.device, dtype: torch.dtype
) -> _Parts:
    if family is not None and family not in FAMILIES:
        raise UnknownNameError("family", family, FAMILIES)
    if place.is_file():
        if family is None or config is None:
            raise ConfigError(f"{place} is a file of weights; give its family ({', '.join(FAMILIES)}) and config")
        config = _config(config)
        if family in OFFICIAL:
            return open_official(place, family, config, device, dtype)
        return _diffusers_file(place, family, config, device, dtype)
    if config is not None:
        raise ConfigError(f"{source}: config belongs to a file of weights; a folder names its own class")
    home = folders.network_folder(place)
    own = folders.read_json(home / "config.json")
    if CONVERTED in own:
        if family not in (None, own[CONVERTED]):
            raise ConfigError(f"{source} holds a network of family {own[CONVERTED]!r}, not {family!r}; leave it out")
        return open_official(home / "model.safetensors", own[CONVERTED], own["config"], device, dtype)
    kind = folders.network_class(own, home)
    adapter = _adapter(kind, home)
    if kind == DiffusersDiT.diffusers_class and family != "diffusers-dit":
        adapter, family = DiTBackbone, None if family == "dit" else family
    if family is not None and FAMILIES[family] is not adapter:
        raise ConfigError(f"{source} holds a {kind}, which is not family {family!r}; leave family out for folders")
    network = folders.load_model(home, device, dtype, kind)
    if adapter is DiTBackbone:
        network = official_dit(network)
    return _Parts(network, adapter, pipeline=_pipeline(place))


def open_official(place: Path, family: str, config: Any, device: torch.device, dtype: torch.dtype) -> _Parts:
    """Builds and fills a network of an official checkpoint."""
    adapter = OFFICIAL[family]
    reading = device.type != "meta"
    state = adapter.tidy(read_state(place)) if reading else None
    with torch.device("cpu" if reading else "meta"):
        network = adapter.build(config, state)
    if reading:
        check_state(place, network, state, family)
        network.load_state_dict(state)
    return _Parts(folders.cast(network, device, dtype), adapter, adapter.schedule_of(config))


def open_backbone_network(
    source: Path, family: str | None, config: Any
) -> tuple[nn.Module, type[OfficialBackbone], Mapping[str, Any] | str]:
    """Opens an official checkpoint, or a DiT folder of diffusers, on the CPU in fp32.

    Returns:
        The network, its adapter, and the config that builds it again without a look at the weights.

    Raises:
        ConfigError: The source is of another kind.
    """
    entry = registered().get(str(source))
    place = find(weights_of(entry) if entry else source, None, with_weights=True)
    parts = _from_path(place, source, family, config, torch.device("cpu"), torch.float32)
    if not issubclass(parts.adapter, OfficialBackbone):
        raise ConfigError(f"{source} is a diffusers model already; official checkpoints and DiT can be converted")
    if place.is_dir() and CONVERTED in (own := folders.read_json(folders.network_folder(place) / "config.json")):
        return parts.network, parts.adapter, own["config"]
    config = {} if config is None else _config(config)
    if issubclass(parts.adapter, DiTBackbone):
        # Sizes that were read off the weights are written down; what is no argument, such as path_type, stays.
        given = {} if isinstance(config, str) else {key: config[key] for key in config if key != "variant"}
        config = given | parts.network.arguments
    return parts.network, parts.adapter, config


def official_dit(network: nn.Module) -> nn.Module:
    """Returns the official DiT with the weights of a `DiTTransformer2DModel`."""
    arguments = arguments_from_diffusers(dict(network.config))
    with network.device:
        official = DiTBackbone.build(arguments, None)
    official.load_state_dict(from_diffusers(network.state_dict(), official.pos_embed))
    return official.to(network.dtype)


def _diffusers_file(file: Path, family: str, config: Any, device: torch.device, dtype: torch.dtype) -> _Parts:
    adapter = DIFFUSERS[family]
    if isinstance(config, str):
        raise ConfigError(f"family {family!r} has no variants by name, got {config!r}; give the class's arguments")
    with torch.device(device if device.type == "meta" else "cpu"):
        network = folders.build(adapter.diffusers_class, config)
    if device.type != "meta":
        state = read_state(file)
        check_state(file, network, state, family)
        network.load_state_dict(state)
    return _Parts(folders.cast(network, device, dtype), adapter)


def _config(config: Any) -> Any:
    """Returns a variant's name, or the arguments, read from a JSON file where a file is named."""
    named = config
    if not isinstance(config, Mapping) and str(config).endswith(".json"):
        config = folders.read_json(Path(config))
        if not isinstance(config, Mapping):
            raise ConfigError(f"{named} must hold the constructor's arguments, a JSON object, got {config!r}")
    return dict(config) if isinstance(config, Mapping) else str(config)


def _adapter(kind: str, where: Any) -> type[Backbone]:
    adapters = {adapter.diffusers_class: adapter for adapter in DIFFUSERS.values()}
    if kind not in adapters:
        raise ConfigError(f"{where}: network class {kind!r} is not supported; supported: {', '.join(adapters)}")
    return adapters[kind]


def _untrained(network: nn.Module, seed: int, device: torch.device, dtype: torch.dtype) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        official = hasattr(network, "arguments")
        with torch.device("meta" if device.type == "meta" else "cpu"):
            fresh = type(network)(**network.arguments) if official else type(network).from_config(network.config)
        for name in ("arguments", "precond"):
            if hasattr(network, name):
                setattr(fresh, name, getattr(network, name))
    return folders.cast(fresh, device, dtype)


def _channels(parts: _Parts) -> int:
    # The adapter says how many, and needs a codec to exist; its property reads the network only.
    blank = object.__new__(parts.adapter)
    blank.network = parts.network
    return blank.in_channels


def _schedule(given: str | Path | None, parts: _Parts, place: Path | None, source: Any) -> Schedule:
    scale = getattr(parts.adapter, "flow_scale", 1.0)
    if given is not None:
        return folders.load_schedule(Path(given), scale)
    if parts.schedule is not None:
        return parts.schedule
    beside = folders.beside(place, "scheduler")
    if beside is None and (place / "scheduler_config.json").is_file():
        beside = place  # unconditional pipelines keep it at the root
    if beside is not None:
        return folders.load_schedule(beside, scale)
    if parts.adapter is DiTBackbone:
        return DiTBackbone.schedule_of({})
    raise ConfigError(f"{source} has no scheduler/ beside the network; give schedule, a folder or a Schedule")


def _with_encoder(
    conditioner: PromptEmbeddings, parts: _Parts, place: Path | None, source: Any, revision: Any, dtype: torch.dtype
) -> PromptEmbeddings:
    """Adds the pipeline's text encoders, which are loaded when the first prompt comes."""
    if parts.pipeline is None or not parts.pipeline.startswith(tuple(OUTPUTS)):
        return conditioner
    local = Path(source).expanduser().exists()

    def folder() -> Path:
        return place if local else snapshot(str(source), revision, HUB_TEXT)

    return replace(conditioner, encoder=PromptEncoder(parts.pipeline, folder, dtype))


def _pipeline(place: Path) -> str | None:
    """Returns the pipeline's class, where there are text encoders to go with it."""
    index = place / "model_index.json"
    if not index.is_file():
        return None
    parts = folders.read_json(index)
    return parts.get("_class_name") if any(name.startswith("text_encoder") for name in parts) else None


def _check_counts(backbone: Backbone, attention: str) -> None:
    size = backbone.sample_size
    example = backbone._example(size, size)
    calls = count_attention(to_meta(backbone.network), lambda network: backbone.call(network, *example))
    if not calls:
        raise BackendUnavailable(
            f"attention={attention} would change nothing: {type(backbone.network).__name__} ran no softmax attention"
        )


def _name(source: Any) -> str:
    return Path(source).resolve().name if Path(source).expanduser().exists() else str(source)


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
