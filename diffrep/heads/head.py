"""What all heads share: they save and load themselves, with the facts of what they were trained on."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, ClassVar

import torch
from huggingface_hub import ModelCard, PyTorchModelHubMixin, hf_hub_download
from safetensors import SafetensorError
from safetensors.torch import load_model, save_model
from torch import nn
from torch.nn import functional as F

from diffrep._version import __version__
from diffrep.errors import CheckpointError, ConfigError, UnknownNameError
from diffrep.heads.hub import model_card

WEIGHTS, CONFIG, ABOUT, CARD = "model.safetensors", "config.json", "about.json", "README.md"


class Head(nn.Module, PyTorchModelHubMixin):
    """A module that reads features, with `save_pretrained`, `from_pretrained` and `push_to_hub`.

    A subclass takes plain JSON values as constructor arguments: they are its config.json. `from_pretrained` gives the
    head in eval mode and is strict about its weights.

    Attributes:
        about: Facts of how the head came about, plain JSON; `save_head` explains them.
        reads_mapping: Whether `forward` takes a mapping of maps by (layer, level) in place of one tensor.
        applied: How the model card calls the head.
        gives: What the card calls the result.
        live: Whether the head is put on a network and takes images, as the trained part of DifFeed does.
    """

    reads_mapping: ClassVar[bool] = False
    applied: ClassVar[str] = "head({features})"
    gives: ClassVar[str] = "scores"
    live: ClassVar[bool] = False

    def __init__(self):
        super().__init__()
        self.about: dict[str, Any] = {}

    def generate_model_card(self, source: str = "path/to/this/folder", **_: Any) -> ModelCard:
        """Returns the model card; `source` is where the card says that the head lies."""
        return model_card(self, source)

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Uploads weights, config, facts and card; `options` are those of `PyTorchModelHubMixin.push_to_hub`."""
        card = {"source": repo_id, **(options.pop("model_card_kwargs", None) or {})}
        return super().push_to_hub(repo_id, model_card_kwargs=card, **options)

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> str | None:
        """Writes weights, config, facts and, where there is none yet, a card; see `save_head`.

        Args:
            save_directory: Folder.
            options: Those of `PyTorchModelHubMixin.save_pretrained`.

        Raises:
            ConfigError: A constructor argument is no plain JSON value.
        """
        lost = [name for name in self._hub_mixin_init_parameters if name not in ("self", *self.arguments)]
        if lost:
            raise ConfigError(f"{class_name(type(self))} cannot be saved: {', '.join(lost)} must be plain JSON values")
        # about.json goes first and comes back last: a folder with it is whole.
        (Path(save_directory) / ABOUT).unlink(missing_ok=True)
        return super().save_pretrained(save_directory, **options)

    @property
    def arguments(self) -> dict[str, Any]:
        """The constructor arguments, as they stand in config.json; those that are no plain JSON values are missing."""
        return self._hub_mixin_config or {}

    def _save_pretrained(self, save_directory: Path) -> None:
        save_model(self, str(save_directory / WEIGHTS))
        # Here and not by the mixin, which sorts keys: the order of a DifFormer's layers is the order of its tokens.
        (save_directory / CONFIG).write_text(json.dumps(self.arguments, indent=2) + "\n")
        about = {**self.about, "class": class_name(type(self)), "diffrep": __version__}
        partial = save_directory / f".{ABOUT}.partial"
        partial.write_text(json.dumps(about, indent=2) + "\n")
        os.replace(partial, save_directory / ABOUT)

    @classmethod
    def _from_pretrained(cls, *, model_id: str, map_location: str = "cpu", **options: Any) -> Head:
        hub = {name: options.pop(name) for name in ("revision", "cache_dir", "force_download", "local_files_only")}
        hub["token"] = options.pop("token")
        about = _read_about(model_id, **hub)
        if about["class"] != class_name(cls):
            raise CheckpointError(
                f"{model_id} holds a {about['class']}, not a {class_name(cls)}; open it with load_head"
            )
        weights = _find(model_id, WEIGHTS, **hub)
        head = cls(**options)
        try:
            load_model(head, weights, strict=True, device=str(map_location))
        except (RuntimeError, SafetensorError) as error:
            raise CheckpointError(f"the weights in {weights} do not fit its config.json: {error}") from error
        head.about = about
        return head.eval()


def save_head(head: Head, folder: str | Path, about: dict[str, Any]) -> Path:
    """Writes model.safetensors, config.json, about.json and README.md, a model card.

    Args:
        head: The head.
        folder: New or empty folder, or one that holds a head, which is replaced.
        about: Plain JSON facts, all optional: `backbone` (source), what it was asked for in the words of
            `FeatureRequest` (`layers`, `levels`, `pool`, `draws`, `noise`, ...), `read_pool` (the side that maps are
            then averaged to, see `pool_features`), `cond`, `image_size`, `class_names`, `dataset`, `accuracy`, and
            others of your own. A head that reads one tensor made of several (layer, level) takes them flattened and
            concatenated, level after level within layer after layer.

    Returns:
        The folder.

    Raises:
        ConfigError: `about` is not JSON, or the folder holds other things.
    """
    folder = Path(folder)
    if folder.exists() and not (folder / ABOUT).is_file() and (folder.is_file() or any(folder.iterdir())):
        raise ConfigError(f"{folder} is not empty and holds no whole head; give another folder or remove it")
    try:
        about = json.loads(json.dumps(about))
    except TypeError as error:
        raise ConfigError(f"about must hold plain JSON values: {error}") from error
    head.about = {**about, "class": class_name(type(head)), "diffrep": __version__}
    head.save_pretrained(folder)
    model_card(head, str(folder)).save(folder / CARD)
    return folder


def load_head(source: str | Path, revision: str | None = None, device: str = "cpu") -> Head:
    """Opens a saved head of any class, in eval mode, its facts in `head.about`.

    Args:
        source: Folder that `save_head`, `save_pretrained` or `push_to_hub` wrote, or a hub id.
        revision: Branch, tag or commit of a hub id.
        device: Where the weights go.

    Raises:
        CheckpointError: There is no whole head, or its weights do not fit.
        UnknownNameError: Its class is not known here.
    """
    name = _read_about(source, revision=revision)["class"]
    return head_class(name).from_pretrained(str(source), revision=revision, map_location=device)


def pool_features(features: torch.Tensor, side: int) -> torch.Tensor:
    """Averages maps (B, C, h, w) to at most `side` cells a side, and tokens (B, N, C) to their mean when it is 1.

    What is pooled comes back in fp32; everything else, vectors among it, as it is.
    """
    if features.ndim == 4:
        return F.adaptive_avg_pool2d(features.float(), [min(side, length) for length in features.shape[-2:]])
    return features.float().mean(1) if features.ndim == 3 and side == 1 else features


def head_class(name: str) -> type[Head]:
    """Returns the class that a head's about.json names.

    Raises:
        UnknownNameError: It is not known here.
    """
    known = {class_name(kind): kind for kind in _subclasses(Head)}
    if name not in known:
        raise UnknownNameError("head", name, known, "A class of your own must be imported before its head is loaded.")
    return known[name]


def class_name(kind: type[Head]) -> str:
    """Returns the class's name, with its module when it is not one of diffrep's, so that none passes for another."""
    return kind.__name__ if kind.__module__.startswith("diffrep.") else f"{kind.__module__}.{kind.__qualname__}"


def flatten(features: torch.Tensor, dim: int) -> torch.Tensor:
    """Returns features (B, ...) as (B, dim) in fp32.

    Raises:
        ConfigError: They have another length.
    """
    flat = features.flatten(1).float()
    if flat.shape[1] != dim:
        raise ConfigError(
            f"features {tuple(features.shape[1:])} flatten to {flat.shape[1]} values, the head reads {dim}; "
            "give those that it was made for"
        )
    return flat


def _subclasses(kind: type[Head]) -> list[type[Head]]:
    return [found for child in kind.__subclasses__() for found in (child, *_subclasses(child))]


def _read_about(source: str | Path, **hub: Any) -> dict[str, Any]:
    file = _find(source, ABOUT, **hub)
    try:
        about = json.loads(file.read_text())
        about["class"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file} does not say which head this is; save it again with save_head") from error
    return about


def _find(source: str | Path, name: str, **hub: Any) -> Path:
    """Returns a file of a head's folder or hub repository."""
    folder = Path(source)
    if folder.is_dir():
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder} holds no whole head: {name} is missing; save it with save_head")
        return folder / name
    try:
        return Path(hf_hub_download(str(source), name, **hub))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"no head at {source}: it is no folder here, and the hub says: {error}") from error
