"""From what a user names - a registered backbone, a folder, a file, a hub id - to a loaded `Backbone`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from diffrep.backbones import folders
from diffrep.backbones.attention import choose_attention, count_attention
from diffrep.backbones.backbone import Backbone
from diffrep.backbones.codec import Codec
from diffrep.backbones.compiled import compile_mode
from diffrep.backbones.conditioning import Conditioner, PromptEmbeddings
from diffrep.backbones.official import DiTBackbone
from diffrep.backbones.opening import APART, Parts, fill, from_entry, from_path
from diffrep.backbones.prepare import open_prepare
from diffrep.backbones.reference import open_reference
from diffrep.backbones.sources import HUB_TEXT, find, registered, snapshot, weights_of
from diffrep.backbones.text import OUTPUTS, PromptEncoder
from diffrep.errors import BackendUnavailable, ConfigError, UnknownNameError
from diffrep.noise import Schedule
from diffrep.taps import to_meta


def load_backbone(
    source: str | Path,
    family: str | None = None,
    config: Mapping[str, Any] | str | Path | None = None,
    codec: str | Path | Codec | None = None,
    conditioner: Conditioner | None = None,
    schedule: str | Path | Schedule | None = None,
    revision: str | None = None,
    init_seed: int | None = None,
    weights: str | Path | None = None,
    device: str = "auto",
    dtype: str | torch.dtype = "auto",
    attention: str = "auto",
    channels_last: bool | None = None,
    compile: bool | str = False,
) -> Backbone:
    """Loads a frozen backbone.

    Args:
        source: A bundled or registered name (`list_backbones`); a diffusers folder (one model, a pipeline, or
            `unet/ vae/ scheduler/` side by side); a folder that `diffrep convert` wrote; a file of weights, with its
            `family` and `config`; or a hub id.
        family: For a file of weights: "dit", "sit", "repa", "adm", "edm", or a diffusers class ("unet2d",
            "unet2d-condition", "transformer2d", "pixart", "sd3", "flux", "sana", "diffusers-dit"). For a folder of
            `DiTTransformer2DModel`, "diffusers-dit" keeps that class's own numbers in place of the official DiT's.
            What a backbone is compared with: "timm", "latents", "pixels", see `diffrep.backbones.reference`.
            What one is trained on: "prepare", see `diffrep.backbones.prepare`.
        config: For a file of weights: a variant's name ("XL/2", "256-uncond") or the constructor's arguments, as a
            dict or a JSON file. For "timm", "pixels" and "prepare" see there.
        codec: Folder or hub id of an autoencoder, or a `Codec`; None takes the `vae/` beside the network, else the
            identity.
        conditioner: What turns `cond` into the network's condition; None takes the one that fits its config.
        schedule: Folder of a diffusers scheduler, or a `Schedule`; None takes the `scheduler/` beside the network, or
            for official checkpoints the schedule of their paper.
        revision: Hub revision.
        init_seed: Give the network random weights from this seed in place of the trained ones: the untrained baseline.
        weights: A file with other weights for the network, under the same keys, such as CleanDIFT's state dict for a
            Stable Diffusion folder; everything else is the source's.
        device: "auto" takes CUDA where there is one; "meta" builds the network without reading any weights.
        dtype: "auto" is bfloat16 on CUDA and float32 elsewhere.
        attention: "auto" and "sdpa" leave the choice to torch; "flash" and "xformers" insist on that kernel.
        channels_last: Memory layout of convolutional networks; None takes channels-last on CUDA.
        compile: False; True, to compile the function that returns the features, once for each set of layers;
            "regional", to compile the repeated blocks only, once for all layers, which takes a fraction of the time;
            "cudagraphs", to record that function as CUDA graphs, for small networks and batches of a fixed size.

    Raises:
        UnknownNameError: `source` is neither a path nor a known name.
        CheckpointError: Weights are missing, truncated or do not fit.
        ConfigError: The folder lacks a scheduler, or the class is not supported.
        BackendUnavailable: The device, the attention kernel or CUDA graphs cannot be used here.
    """
    device = _device(device)
    dtype = _dtype(dtype, device)
    kernel = choose_attention(attention, device, dtype)
    mode = compile_mode(compile, device)
    name = _name(source)
    if family in APART:
        if any(given is not None for given in (weights, codec, conditioner, schedule)) or compile:
            raise ConfigError(
                f"family {family!r} takes no weights, codec, conditioner, schedule or compile; leave them out"
            )
        if family == "prepare":
            return open_prepare(source, config, revision, init_seed, device, dtype)
        return open_reference(source, family, config, revision, init_seed, device, dtype)
    entry = None if Path(source).expanduser().exists() else registered().get(name)
    if entry is not None and (family is not None or config is not None):
        raise ConfigError(f"{name!r} is a registered backbone, which has its own family and config; leave them out")
    if entry is not None and device.type == "meta":
        parts, place = from_entry(entry, dtype), None
    else:
        source = weights_of(entry) if entry else source
        place = find(source, revision, with_weights=device.type != "meta")
        parts = from_path(place, source, family, config, device, dtype)
    if weights is not None:
        if init_seed is not None:
            raise ConfigError("weights and init_seed both say what the network's weights are; give one")
        fill(parts, Path(weights).expanduser())
    if init_seed is not None:
        parts.network = _untrained(parts.network, init_seed, device, dtype)
    if isinstance(codec, (str, Path)):
        if not Path(codec).expanduser().exists() and "/" not in str(codec):
            raise ConfigError(f"no codec at {str(codec)!r}; give the folder of an autoencoder, or a hub id owner/name")
        codec = folders.load_codec(find(codec, None, with_weights=device.type != "meta"), device, dtype)
    elif codec is None and parts.codec is None and place is not None and folders.beside(place, "vae"):
        codec = folders.load_codec(folders.beside(place, "vae"), device, dtype)
    if not isinstance(schedule, Schedule):
        schedule = _schedule(schedule, parts, place, source)
    if conditioner is None:
        conditioner = parts.adapter.conditioner_of(parts.network)
        if isinstance(conditioner, PromptEmbeddings):
            conditioner = _with_encoder(conditioner, parts, place, source, revision, dtype)
    backbone = parts.adapter(name, parts.network, schedule, codec or parts.codec, conditioner)
    backbone.compiler = "inductor" if mode else None
    backbone.compile_mode = mode or "graph"
    if mode == "regional" and not backbone.regions:
        raise ConfigError(
            f"compile=regional would change nothing: no block of {type(backbone.network).__name__} occurs twice in "
            f"{name!r}; use compile=true"
        )
    backbone.attention = kernel
    if kernel is not None:
        _check_counts(backbone, attention)
    if backbone.convolutional and (channels_last or (channels_last is None and device.type == "cuda")):
        backbone.network.to(memory_format=torch.channels_last)
    return backbone


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


def _schedule(given: str | Path | None, parts: Parts, place: Path | None, source: Any) -> Schedule:
    scale = getattr(parts.adapter, "flow_scale", 1.0)
    if given is not None:
        return folders.load_schedule(Path(given), scale)
    beside = folders.beside(place, "scheduler") if place is not None and place.is_dir() else None
    if beside is None and place is not None and (place / "scheduler_config.json").is_file():
        beside = place  # unconditional pipelines keep it at the root
    if beside is not None:
        return folders.load_schedule(beside, scale)
    if parts.schedule is not None:
        return parts.schedule
    if parts.adapter is DiTBackbone:
        return DiTBackbone.schedule_of({})
    raise ConfigError(f"{source} has no scheduler/ beside the network; give schedule, a folder or a Schedule")


def _with_encoder(
    conditioner: PromptEmbeddings, parts: Parts, place: Path | None, source: Any, revision: Any, dtype: torch.dtype
) -> PromptEmbeddings:
    """Adds the pipeline's text encoders, which are loaded when the first prompt comes."""
    if parts.pipeline is None or not parts.pipeline.startswith(tuple(OUTPUTS)):
        return conditioner
    local = Path(source).expanduser().exists()

    def folder() -> Path:
        return place if local else snapshot(str(source), revision, HUB_TEXT)

    return replace(conditioner, encoder=PromptEncoder(parts.pipeline, folder, dtype))


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
