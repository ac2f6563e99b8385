"""Target encoders: a pretrained network of timm with the preprocessing that its features were published with."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from diffrep.backbones.checkpoint import read_tensors
from diffrep.backbones.fingerprint import hash_of_weights
from diffrep.backbones.reference import NormalizedCodec, TimmBackbone, open_reference
from diffrep.config import EncoderConfig
from diffrep.errors import CheckpointError, ConfigError

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
# Side of an image that one token stands for: a latent of an 8x autoencoder, two by two.
PIXELS_PER_TOKEN = 16


@dataclass(frozen=True)
class Preset:
    """How images are brought to an encoder, and what is read of it.

    Attributes:
        normalize_first: Normalise, then resize; else the other way round.
        per_token: Resize so that a token stands for 16 x 16 pixels: 14/16 of the side for patches of 14 pixels, the
            image as it is for patches of 16. Else never resize.
        layer: "norm" (the final norm), "block" (the last block, before it) or "stage" (the deepest stage whose stride
            is at most 16).
        values: Mean and standard deviation of the channels; None takes those of the model's config.
    """

    normalize_first: bool
    per_token: bool
    layer: str
    values: tuple[tuple[float, ...], tuple[float, ...]] | None


# As in the code of REPA (Yu et al., 2025), which has no SigLIP, DINOv3 and convolutional networks: SigLIP and DINOv3
# follow the two whose successors they are, and the last are shown images as their configs in timm say.
PRESETS: dict[str, Preset] = {
    "dinov2": Preset(True, True, "norm", IMAGENET),
    "dinov3": Preset(True, True, "norm", None),
    "dinov1": Preset(True, False, "norm", IMAGENET),
    "clip": Preset(False, True, "block", CLIP),
    "siglip": Preset(False, True, "norm", HALF),
    "mocov3": Preset(True, False, "norm", IMAGENET),
    "mae": Preset(True, False, "block", IMAGENET),
    "jepa": Preset(True, True, "norm", IMAGENET),
    "cnn": Preset(False, False, "stage", None),
}
# What in a transformer's name tells of a preset; the first that is there counts.
SIGNS = {sign: sign for sign in ("dinov2", "dinov3", "siglip", "clip", "jepa", "mae")} | {
    "moco": "mocov3",
    "dino": "dinov1",
}


class TargetEncoder:
    """A frozen encoder that turns images into feature maps, as targets of alignment.

    It runs in its own element type, whatever autocast is on around it. Bicubic resizing is without antialiasing, and
    a transformer's position table is resampled to the grid of each input, as in REPA.

    Args:
        backbone: The encoder; see `diffrep.backbones.reference`.
        preset: How images are brought to it; a key of `PRESETS`.
        layer: Address of the layer that is read; None is the preset's.
        size: Side that square images are brought to; None is the preset's rule.
        pca: File of a projection (`diffrep.fit_pca`), which the features are brought to.

    Attributes:
        channels: Width D of the features.
        layer: The address that is read.

    Raises:
        ConfigError: The network has no such final norm or stage, or gives no maps of channels.
        LayerError: The layer does not exist.
        CheckpointError: The projection cannot be read, or belongs to features of another width.
    """

    def __init__(
        self,
        backbone: TimmBackbone,
        preset: str,
        layer: str | None = None,
        size: int | None = None,
        pca: str | Path | None = None,
    ):
        self.backbone, self.preset, self.size = backbone, preset, size
        rule, own = PRESETS[preset], backbone.codec
        network = backbone.network
        if getattr(network, "output_fmt", "NCHW") != "NCHW":
            raise ConfigError(f"{backbone.name} puts channels last in its maps, which is not supported for targets")
        self.normalize = own if rule.values is None else NormalizedCodec(*rule.values)
        self.patch = backbone.patch_size or 1
        addresses = backbone.addresses([layer or _layer_of(network, rule.layer, backbone.name)])
        self.layer = next(iter(addresses))
        # A cnn rounds up, so any side will do to see its width; a transformer takes multiples of its patch.
        side = self.patch * max(1, backbone.sample_size // self.patch)
        self.channels = backbone.shapes(addresses, side, side)[self.layer][0]
        self.projection = None if pca is None else _read_projection(Path(pca), self.channels)
        if self.projection is not None:
            self.channels = len(self.projection[1])

    @property
    def network(self) -> nn.Module:
        """The network of timm."""
        return self.backbone.network

    @property
    def multiple(self) -> int:
        """What the sides of images must be multiples of."""
        if self.size is not None or self.patch == 1:
            return 1
        return PIXELS_PER_TOKEN if PRESETS[self.preset].per_token else self.patch

    def input_size(self, height: int, width: int) -> tuple[int, int]:
        """Returns the (height, width) that images of such sides, in pixels, are brought to.

        Raises:
            ConfigError: The encoder's patches do not cover that; the message has the sides that work.
        """
        name = f"encoder {self.backbone.name} (preset {self.preset!r})"
        if self.size is not None:
            if height != width:
                raise ConfigError(f"size={self.size} is for square images, got {height}x{width}; use data.fit=crop")
            if self.size % self.patch:
                raise ConfigError(f"{name}: size={self.size} is no multiple of its patch, {self.patch} pixels")
            return self.size, self.size
        if height % self.multiple or width % self.multiple:
            below = self.multiple * max(1, min(height, width) // self.multiple)
            raise ConfigError(
                f"{name} forms no grid of images of {height}x{width} pixels; sides that work are multiples of "
                f"{self.multiple}, such as {below} and {below + self.multiple}. Set data.size to one, or the "
                f"encoder's size to a multiple of {self.patch}"
            )
        if PRESETS[self.preset].per_token and self.patch != 1:
            return height // PIXELS_PER_TOKEN * self.patch, width // PIXELS_PER_TOKEN * self.patch
        return height, width

    @torch.no_grad()
    def prepare(self, images: torch.Tensor) -> torch.Tensor:
        """Brings images (B, 1 or 3, H, W) in [0, 1] to the network's input (B, 3, h, w), fp32; gray ones repeat.

        Raises:
            ConfigError: They have another shape or type, or no grid can be formed of them.
        """
        if images.ndim != 4 or images.shape[1] not in (1, 3) or not images.is_floating_point():
            raise ConfigError(
                f"images must be floats (B, 1 or 3, H, W) in [0, 1], got {images.dtype} {tuple(images.shape)}"
            )
        size = self.input_size(*images.shape[-2:])
        x = images.to(self.backbone.device, torch.float32).expand(-1, 3, -1, -1)
        if PRESETS[self.preset].normalize_first:
            return _resized(self.normalize.encode(x).mean, size)
        return self.normalize.encode(_resized(x, size)).mean

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Returns the features (B, D, h, w) of images (B, 1 or 3, H, W) in [0, 1], fp32, on the encoder's device.

        Raises:
            ConfigError: As from `prepare`.
        """
        device = self.backbone.device.type
        with nullcontext() if device == "meta" else torch.autocast(device, enabled=False):
            feature = self.backbone.capture(self.prepare(images), 0.0, [self.layer])[self.layer].float()
            if self.projection is None:
                return feature
            mean, components = (part.to(feature.device) for part in self.projection)
            return F.conv2d(feature - mean.view(-1, 1, 1), components[:, :, None, None])

    def with_network(self, network: nn.Module) -> TargetEncoder:
        """Returns this encoder around another copy of its network, such as one on the meta device."""
        twin = copy.copy(self)
        twin.backbone = copy.copy(self.backbone)
        twin.backbone.network = network
        return twin

    def describe(self) -> dict[str, Any]:
        """Returns plain values that tell two encoders, and two ways of showing images to one, apart."""
        rule, arguments = PRESETS[self.preset], dict(self.network.arguments)
        arguments.pop("model")
        projection = None
        if self.projection is not None:
            values = b"".join(part.numpy().tobytes() for part in self.projection)
            projection = hashlib.sha256(values).hexdigest()[:16]
        return {
            "model": self.network.pretrained_cfg["architecture"],
            "arguments": arguments,
            "weights": hash_of_weights(self.network),
            "preset": self.preset,
            "order": "normalize, resize" if rule.normalize_first else "resize, normalize",
            "size": self.size or (f"{self.patch}/{PIXELS_PER_TOKEN}" if rule.per_token else "native"),
            "mean": list(self.normalize.mean),
            "std": list(self.normalize.std),
            "layer": self.layer,
            "pca": projection,
        }


def open_encoder(
    config: EncoderConfig, device: torch.device, dtype: torch.dtype = torch.float32, init_seed: int | None = None
) -> TargetEncoder:
    """Opens a target encoder.

    Args:
        config: Model, preprocessing and layer.
        device: Where it goes; on the meta device no weights are read.
        dtype: Element type of its weights.
        init_seed: Random weights from this seed in place of the trained ones.

    Raises:
        ConfigError: Its name suggests no preset, or see `TargetEncoder`.
        UnknownNameError: timm has no such model.
        CheckpointError: Weights are missing or do not fit.
        LayerError: The layer does not exist.
    """
    model = _with_any_size(config.model or config.source)
    backbone = open_reference(config.source, "timm", model, None, init_seed, device, dtype)
    preset = config.preset or _guess(backbone.network, f"{config.source} {model['model']}")
    return TargetEncoder(backbone, preset, config.layer, config.size, config.pca)


def _with_any_size(model: Mapping[str, Any] | str) -> dict[str, Any]:
    """Returns the arguments of a model, with the one that lets a transformer take inputs of any size."""
    import timm

    given = dict(model) if isinstance(model, Mapping) else {"model": model}
    if "model" not in given:
        raise ConfigError("model of an encoder needs timm's name of it under 'model'")
    name = str(given["model"]).rpartition("/")[2].split(".")[0]
    transformers = ("timm.models.vision_transformer", "timm.models.eva")
    if timm.is_model(name) and timm.model_entrypoint(name).__module__ in transformers:
        return {"dynamic_img_size": True} | given
    return given


def _guess(network: nn.Module, name: str) -> str:
    if not hasattr(network, "patch_embed"):
        return "cnn"
    tag = network.pretrained_cfg.get("tag") or ""
    told = f"{name} {network.pretrained_cfg.get('architecture')} {tag}".lower()
    found = next((preset for sign, preset in SIGNS.items() if sign in told), None)
    if found is None:
        raise ConfigError(
            f"the name of {name.split()[-1]!r} does not tell how images are brought to it; give the encoder's preset, "
            f"one of {', '.join(PRESETS)}"
        )
    return found


def _layer_of(network: nn.Module, kind: str, name: str) -> str:
    """Returns the address of the layer that a preset reads."""
    if kind == "stage":
        stages = [stage for stage in getattr(network, "feature_info", ()) if stage["reduction"] <= PIXELS_PER_TOKEN]
        if stages:
            return stages[-1]["module"]
        raise ConfigError(f"{name} lists no stage of stride {PIXELS_PER_TOKEN} or less; give the encoder's layer")
    if kind == "block" and hasattr(network, "blocks"):
        return f"blocks.{len(network.blocks) - 1}"
    if kind == "norm" and not isinstance(getattr(network, "norm", nn.Identity()), nn.Identity):
        return "norm"
    what = "blocks" if kind == "block" else "final norm of its tokens (some have it behind the pooling)"
    raise ConfigError(f"{name} has no {what}; give the encoder's layer, or another preset")


def _resized(x: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    return x if tuple(x.shape[-2:]) == size else F.interpolate(x, size, mode="bicubic")


def _read_projection(file: Path, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Reads mean (D,) and components (K, D) of a projection."""
    found = read_tensors(file)
    if not isinstance(found, dict) or set(found) != {"mean", "components"}:
        held = ", ".join(map(str, found)) if isinstance(found, dict) else type(found).__name__
        raise CheckpointError(f"{file} holds {held}, no projection; diffrep.fit_pca writes one")
    mean, components = found["mean"].float(), found["components"].float()
    if tuple(mean.shape) != (width,) or components.ndim != 2 or components.shape[1] != width:
        raise CheckpointError(
            f"the projection in {file} is of features of {mean.numel()} channels, and the encoder gives {width}"
        )
    return mean, components
