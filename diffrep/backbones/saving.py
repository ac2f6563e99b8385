"""From a backbone to a folder that `load_backbone` opens."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler
from diffusers.models.normalization import AdaLayerNorm
from torch import nn

from diffrep.backbones import folders
from diffrep.backbones.backbone import Backbone
from diffrep.backbones.codec import IdentityCodec, VAECodec
from diffrep.backbones.conditioning import PromptEmbeddings
from diffrep.backbones.convert import save_official
from diffrep.backbones.mmdit import DiffusersDiT, Transformer2D
from diffrep.backbones.official import ADMBackbone, DiTBackbone, EDMBackbone, OfficialBackbone
from diffrep.backbones.opening import DIFFUSERS, OFFICIAL
from diffrep.errors import ConfigError
from diffrep.noise import DiscreteSchedule

# Parts of a pipeline that turn prompts into embeddings.
TEXT = ("text_encoder*", "tokenizer*")


def options_of(backbone: Backbone) -> dict[str, str]:
    """Returns what `load_backbone` must be told besides the folder that `save_backbone` writes; mostly nothing.

    Raises:
        ConfigError: The backbone has no such form: it was made of a module, or its codec is of another program.
    """
    kinds = (*OFFICIAL.values(), *DIFFUSERS.values())
    if type(backbone) not in kinds:
        raise ConfigError(
            f"{backbone.name} is a {type(backbone).__name__}, which cannot be written as a folder that load_backbone "
            f"opens; that can be done with {', '.join(kind.__name__ for kind in kinds)}"
        )
    if not isinstance(backbone.codec, (IdentityCodec, VAECodec)):
        raise ConfigError(
            f"{backbone.name}: a {type(backbone.codec).__name__} cannot be written as a folder of diffusers; load the "
            "backbone with an autoencoder of diffusers as its codec"
        )
    return {"family": "diffusers-dit"} if isinstance(backbone, DiffusersDiT) else {}


def save_backbone(backbone: Backbone, network: nn.Module, folder: Path) -> None:
    """Writes a folder that `load_backbone`, with `options_of`, opens as a backbone like another one.

    Codec, noise schedule and text encoders are written beside the network.

    Args:
        backbone: The other one.
        network: A network like its own, with the weights to write.
        folder: Where to; what is there is replaced.

    Raises:
        ConfigError: As for `options_of`.
    """
    options_of(backbone)
    nn.Module.to(network, memory_format=torch.contiguous_format)  # convolutions on CUDA lie channels last
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(backbone, OfficialBackbone):
        family = next(name for name, kind in OFFICIAL.items() if type(backbone) is kind)
        save_official(network, family, _config_of(backbone), folder)
    else:
        with _as_published(backbone, network):
            network.save_pretrained(folder / _save_text(backbone, folder))
    if isinstance(backbone.codec, VAECodec):
        backbone.codec.vae.save_pretrained(folder / "vae")
    sampler = getattr(backbone.schedule, "sampler", None)
    if sampler is None and isinstance(backbone, ADMBackbone) and backbone.schedule == DiscreteSchedule.cosine():
        # The keys of UNetModel, which its arguments are, have no word for the schedule.
        sampler = DDPMScheduler(beta_schedule="squaredcos_cap_v2")
    if sampler is not None:
        sampler.save_pretrained(folder / "scheduler")


def _config_of(backbone: OfficialBackbone) -> dict[str, Any]:
    """Returns a config that builds the network again and means the same schedule."""
    arguments = dict(backbone.network.arguments)
    if isinstance(backbone, EDMBackbone):
        channels, _ = arguments.pop("in_channels"), arguments.pop("out_channels")
        kind = type(backbone.network).__name__
        return arguments | {"precond": backbone.network.precond, "model_type": kind, "img_channels": channels}
    if isinstance(backbone, DiTBackbone) and hasattr(backbone.schedule, "path"):
        # "velocity" is what their papers train, and goes without saying.
        other = {} if backbone.schedule.prediction == "velocity" else {"prediction": backbone.schedule.prediction}
        return arguments | {"path_type": backbone.schedule.path} | other
    return arguments


def _save_text(backbone: Backbone, folder: Path) -> str:
    """Copies the text encoders of a pipeline and returns the name of the network's place in it, or "" without any."""
    encoder = backbone.conditioner.encoder if isinstance(backbone.conditioner, PromptEmbeddings) else None
    if encoder is None:
        return ""
    place = encoder.folder()
    shutil.copyfile(place / "model_index.json", folder / "model_index.json")
    for part in (part for pattern in TEXT for part in place.glob(pattern)):
        shutil.copytree(part, folder / part.name, dirs_exist_ok=True)
    return next(name for name in ("unet", "transformer") if name in folders.read_json(place / "model_index.json"))


@contextmanager
def _as_published(backbone: Backbone, network: nn.Module) -> Iterator[None]:
    """Undoes for a while what `Transformer2D` rearranges in its networks; the rearrangement is its own inverse."""
    rearranged = isinstance(backbone, Transformer2D)
    norms = [module for module in network.modules() if rearranged and isinstance(module, AdaLayerNorm)]
    try:
        _swap_halves(norms)
        yield
    finally:
        _swap_halves(norms)


def _swap_halves(norms: list[AdaLayerNorm]) -> None:
    for norm in norms:
        for parameter in norm.linear.parameters():
            parameter.data = torch.cat(parameter.data.chunk(2)[::-1])
