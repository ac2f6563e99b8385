"""Checkpoints from one layout to another: `diffrep convert`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import diffusers
import torch
from safetensors.torch import save_file
from torch import nn

from diffrep.backbones import folders
from diffrep.backbones.checkpoint import check_state
from diffrep.backbones.dit_keys import config_for_diffusers, to_diffusers
from diffrep.backbones.edm_pickle import read_edm_pickle
from diffrep.backbones.official import DiTBackbone, EDMBackbone, OfficialBackbone
from diffrep.backbones.opening import CONVERTED, OFFICIAL, from_path, read_config
from diffrep.backbones.sources import find, registered, weights_of
from diffrep.errors import CheckpointError, ConfigError

CPU = torch.device("cpu")


def convert(
    source: str | Path,
    out: str | Path,
    family: str | None = None,
    config: Mapping[str, Any] | str | None = None,
    to: Literal["official", "diffusers"] = "official",
) -> Path:
    """Writes a checkpoint as safetensors and JSON, in a folder that `load_backbone` opens.

    Args:
        source: A published EDM pickle (`.pkl`), whose code is not run; an official checkpoint with its `family` and
            `config`; a folder of diffusers' `DiTTransformer2DModel`; or a folder that this function wrote.
        out: Folder to write; it must not exist or be empty.
        family: As for `load_backbone`.
        config: As for `load_backbone`.
        to: "official" keeps the published keys; "diffusers" writes a DiT as a `DiTTransformer2DModel`. A folder's
            `scheduler/` and `vae/` go with it.

    Raises:
        CheckpointError: The source cannot be read or has no such form.
        ConfigError: `out` holds something, or `source` does not say what it is.
    """
    source, out = Path(source), Path(out)
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise ConfigError(f"{out} is {'a file' if out.is_file() else 'not empty'}; name a new folder")
    if source.suffix == ".pkl":
        if family not in (None, "edm"):
            raise ConfigError(f"{source}: pickles are read for family 'edm' only, got {family!r}")
        adapter: type[OfficialBackbone] = EDMBackbone
        state, found = read_edm_pickle(source)
        network, state = adapter.build(found, state), adapter.tidy(state)
        check_state(source, network, state, "edm")
        network.load_state_dict(state)
        given: Any = found
    else:
        network, adapter, given = _open(source, family, config)
    if to == "diffusers":
        if adapter is not DiTBackbone:
            raise ConfigError(f"only DiT has a form in diffusers; {source} is family {_family(adapter)!r}")
        save_diffusers_dit(network, out)
    else:
        save_official(network, _family(adapter), given, out)
    if source.is_dir():
        for part in ("scheduler", "vae"):
            place = folders.beside(source, part)
            if place is not None:
                shutil.copytree(place, out / part, dirs_exist_ok=True)
    return out


def save_official(network: nn.Module, family: str, config: Mapping[str, Any] | str, folder: Path) -> None:
    """Writes `model.safetensors` with the network's own keys and `config.json`, which names family and config."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {key: value.contiguous() for key, value in network.state_dict().items()}
    save_file(state, folder / "model.safetensors")
    content = {CONVERTED: family, "config": config if isinstance(config, str) else dict(config)}
    (folder / "config.json").write_text(json.dumps(content, indent=2) + "\n")


def save_diffusers_dit(network: nn.Module, folder: Path) -> None:
    """Writes an official DiT as a folder of `DiTTransformer2DModel` with its scheduler.

    Stock diffusers then gives numbers that are close to the official ones and not equal: see `DiffusersDiT`.
    """
    with torch.device("meta"):
        model = diffusers.DiTTransformer2DModel(**config_for_diffusers(network.arguments))
    model.to_empty(device="cpu")
    missing, unexpected = model.load_state_dict(to_diffusers(network.state_dict()), strict=False)
    if missing or unexpected:
        raise CheckpointError(f"diffusers' DiT has other keys: missing {missing[:3]}, unexpected {unexpected[:3]}")
    folders.cast(model, CPU, next(network.parameters()).dtype).save_pretrained(folder / "transformer")
    diffusers.DDPMScheduler(beta_schedule="linear", beta_start=1e-4, beta_end=0.02).save_pretrained(
        folder / "scheduler"
    )


def _family(adapter: type[OfficialBackbone]) -> str:
    return next(name for name, kind in OFFICIAL.items() if kind is adapter)


def _open(
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
    parts = from_path(place, source, family, config, torch.device("cpu"), torch.float32)
    if not issubclass(parts.adapter, OfficialBackbone):
        raise ConfigError(f"{source} is a diffusers model already; official checkpoints and DiT can be converted")
    if place.is_dir() and CONVERTED in (own := folders.read_json(folders.network_folder(place) / "config.json")):
        return parts.network, parts.adapter, own["config"]
    config = {} if config is None else read_config(config)
    if issubclass(parts.adapter, DiTBackbone):
        # Sizes that were read off the weights are written down; what is no argument, such as path_type, stays.
        given = {} if isinstance(config, str) else {key: config[key] for key in config if key != "variant"}
        config = given | parts.network.arguments
    return parts.network, parts.adapter, config
