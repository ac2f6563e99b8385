"""From a registered entry, a folder or a file of weights to a network and the class that reads it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from diffrep.backbones import folders
from diffrep.backbones.backbone import Backbone
from diffrep.backbones.checkpoint import check_state, read_state
from diffrep.backbones.codec import Codec, VAECodec
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
from diffrep.backbones.reference import REFERENCES
from diffrep.backbones.unet import UNet2D, UNet2DCondition
from diffrep.errors import ConfigError, UnknownNameError
from diffrep.noise import Schedule

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
# Families that are no diffusion networks and are opened on their own.
APART = (*REFERENCES, "prepare")
# What `diffrep convert` writes beside the weights of an official checkpoint.
CONVERTED = "diffrep_family"


@dataclass
class Parts:
    """What a source gives before codec, schedule and conditioner are settled.

    Attributes:
        network: The network, filled and cast.
        adapter: The class that reads it.
        schedule: Its schedule, for official checkpoints that of their paper.
        codec: Its codec, where an entry brings one.
        pipeline: The pipeline's class, where there are text encoders to go with it.
    """

    network: nn.Module
    adapter: type[Backbone]
    schedule: Schedule | None = None
    codec: Codec | None = None
    pipeline: str | None = None


def from_entry(entry: dict[str, Any], dtype: torch.dtype) -> Parts:
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
    return Parts(folders.cast(network, meta, dtype), adapter, schedule, codec)


def from_path(
    place: Path, source: Any, family: str | None, config: Any, device: torch.device, dtype: torch.dtype
) -> Parts:
    """Opens a folder or a file of weights; arguments as for `load_backbone`.

    Raises:
        ConfigError: The source does not say what it is, or is of another kind than `family`.
        CheckpointError: Weights are missing, damaged or do not fit.
    """
    if family is not None and family not in FAMILIES:
        raise UnknownNameError("family", family, [*FAMILIES, *APART])
    if place.is_file():
        if family is None or config is None:
            raise ConfigError(f"{place} is a file of weights; give its family ({', '.join(FAMILIES)}) and config")
        config = read_config(config)
        if family in OFFICIAL:
            return open_official(place, family, config, device, dtype)
        return _diffusers_file(place, family, config, device, dtype)
    home = folders.network_folder(place)
    own = folders.read_json(home / "config.json")
    if config is not None and not (CONVERTED in own and family is not None):
        raise ConfigError(f"{source}: config belongs to a file of weights; a folder names its own class")
    if CONVERTED in own:  # its own config, which is complete, wins over a given one
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
    return Parts(network, adapter, pipeline=_pipeline(place))


def fill(parts: Parts, file: Path) -> None:
    """Puts the weights of a file in the place of a network's own; on the meta device the shapes alone are compared.

    Raises:
        CheckpointError: The file cannot be read, or its keys or shapes are not the network's.
    """
    meta = next(parts.network.parameters()).device.type == "meta"
    state = read_state(file, shapes_only=meta)
    if issubclass(parts.adapter, OfficialBackbone):
        state = parts.adapter.tidy(state)
    check_state(file, parts.network, state, next(name for name, kind in FAMILIES.items() if kind is parts.adapter))
    if not meta:
        parts.network.load_state_dict(state)


def open_official(place: Path, family: str, config: Any, device: torch.device, dtype: torch.dtype) -> Parts:
    """Builds and fills a network of an official checkpoint; on the meta device the shapes alone are read."""
    adapter = OFFICIAL[family]
    state = adapter.tidy(read_state(place, shapes_only=device.type == "meta"))
    with torch.device("meta"):  # initial values would be drawn at length and overwritten
        network = adapter.build(config, state)
    check_state(place, network, state, family)
    network.load_state_dict(state, assign=True)
    return Parts(folders.cast(network, device, dtype), adapter, adapter.schedule_of(config))


def official_dit(network: nn.Module) -> nn.Module:
    """Returns the official DiT with the weights of a `DiTTransformer2DModel`."""
    arguments = arguments_from_diffusers(dict(network.config))
    with network.device:
        official = DiTBackbone.build(arguments, None)
    official.load_state_dict(from_diffusers(network.state_dict(), official.pos_embed))
    return official.to(network.dtype)


def _diffusers_file(file: Path, family: str, config: Any, device: torch.device, dtype: torch.dtype) -> Parts:
    adapter = DIFFUSERS[family]
    if isinstance(config, str):
        raise ConfigError(f"family {family!r} has no variants by name, got {config!r}; give the class's arguments")
    with torch.device(device if device.type == "meta" else "cpu"):
        network = folders.build(adapter.diffusers_class, config)
    if device.type != "meta":
        state = read_state(file)
        check_state(file, network, state, family)
        network.load_state_dict(state)
    return Parts(folders.cast(network, device, dtype), adapter)


def read_config(config: Any) -> Any:
    """Returns a variant's name, or the arguments, read from a JSON file where a file is named."""
    if not isinstance(config, Mapping) and str(config).endswith(".json"):
        config = folders.read_json(Path(config))
    return dict(config) if isinstance(config, Mapping) else str(config)


def _adapter(kind: str, where: Any) -> type[Backbone]:
    adapters = {adapter.diffusers_class: adapter for adapter in DIFFUSERS.values()}
    if kind not in adapters:
        raise ConfigError(f"{where}: network class {kind!r} is not supported; supported: {', '.join(adapters)}")
    return adapters[kind]


def _pipeline(place: Path) -> str | None:
    """Returns the pipeline's class, where there are text encoders to go with it."""
    index = place / "model_index.json"
    if not index.is_file():
        return None
    parts = folders.read_json(index)
    return parts.get("_class_name") if any(name.startswith("text_encoder") for name in parts) else None
