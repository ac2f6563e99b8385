"""Schemas of `diffrep correspond`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PositiveInt, model_validator

from diffrep.config.pairs import PairsConfig
from diffrep.config.protocol import Protocol, get_protocol
from diffrep.config.schema import (
    BackboneConfig,
    DataConfig,
    FeatureRequest,
    NotNegative,
    PathText,
    Positive,
    Section,
    listed,
)

Alphas = Annotated[tuple[Annotated[float, Field(gt=0, le=1)], ...], BeforeValidator(listed), Field(min_length=1)]


def _protocols(value: Any) -> Any:
    several = value if isinstance(value, (list, tuple)) else [value]
    return tuple(get_protocol(one) for one in several)


class DescriptorConfig(Section):
    """What describes each place of an image.

    Attributes:
        backbone: The frozen network, or what it is compared with (families "timm", "latents" and "pixels").
        request: Layers, levels, noise. Maps are kept whole: `pool` stays "none".
        cond: As in `ExtractConfig`; "{category}" in a prompt is not filled in.
        size: Side of the square that images are brought to; None is the backbone's native size.
        fit: "resize" does not keep the aspect ratio; "pad" does, and centres the image on zeros.
        join: Put all layers and levels side by side, each of unit length at every place, and judge them as one; else
            each (layer, level) is judged by itself.
        aggregation: Folder of an aggregation network that `diffrep correspond train` wrote; it reads its layers and
            levels, which the request must hold.
        batch_size: Rows of one forward: images x levels x draws share it.
    """

    backbone: BackboneConfig
    request: FeatureRequest
    cond: int | PathText | None = None
    size: PositiveInt | None = None
    fit: Literal["resize", "pad"] = "resize"
    join: bool = False
    aggregation: PathText | None = None
    batch_size: PositiveInt = 64

    @model_validator(mode="after")
    def _maps(self) -> DescriptorConfig:
        if self.request.pool != "none" or self.request.tokens:
            raise ValueError("points are matched on whole maps: leave request.pool and request.tokens out")
        if self.request.noise == "generation":
            raise ValueError("request.noise=generation makes images of its own; pairs are of given images")
        if self.join and self.aggregation is not None:
            raise ValueError("join and aggregation are two ways to make one descriptor; take one of them")
        return self


class CorrespondConfig(DescriptorConfig):
    """Arguments of `diffrep correspond evaluate`.

    Attributes:
        pairs: The pairs of images with their key points.
        beside: Other descriptors that are judged on the same pairs, by the name they get in tables; what one leaves
            out is as for the first.
        protocols: Names, or values of `diffrep.config.protocol.Protocol`; all are scored.
        alphas: Thresholds, as shares of what the protocol measures by; the first is the one in tables.
        out: Run folder.
        name: Name of the first descriptor in tables; None is the backbone's.
        unit_size: Images of one unit of extraction, the grain of resuming.
        workers: Processes that decode images.
        pictures: Pairs drawn in the report.
        seed: Of the bootstrap intervals and of the choice of pictures.
    """

    pairs: PairsConfig
    beside: dict[str, dict[str, Any]] = {}
    protocols: Annotated[tuple[Protocol, ...], BeforeValidator(_protocols), Field(min_length=1)] = (
        get_protocol("dift"),
    )
    alphas: Alphas = (0.1, 0.05, 0.01)
    out: PathText
    name: str | None = None
    unit_size: PositiveInt = 100
    workers: Annotated[int, Field(ge=0)] = 0
    pictures: Annotated[int, Field(ge=0)] = 6
    seed: int = 0

    @model_validator(mode="after")
    def _beside_is_complete(self) -> CorrespondConfig:
        self.descriptors  # noqa: B018 - raises where one cannot be read
        return self

    @property
    def descriptors(self) -> dict[str, DescriptorConfig]:
        """All descriptors by name, the first one first."""
        own = {name: getattr(self, name) for name in DescriptorConfig.model_fields}
        first = self.name or self.backbone.source.rstrip("/").rpartition("/")[2]
        if first in self.beside:
            raise ValueError(f"beside.{first} has the name of the first descriptor; give one of them another name")
        shared = {name: own[name] for name in ("size", "fit", "batch_size", "cond", "request")}
        others = {name: DescriptorConfig(**shared | given) for name, given in self.beside.items()}
        return {first: DescriptorConfig(**own), **others}


class AggregateConfig(DescriptorConfig):
    """Arguments of `diffrep correspond train`: an aggregation network on frozen features; defaults as published.

    Attributes:
        pairs: The pairs that are trained on.
        val_pairs: The pairs that the epoch is chosen on, by PCK.
        out: Run folder.
        width: Channels of the descriptor.
        groups: Groups of the norms; divides `width` / 4.
        dropout: Of the input.
        learn_scale: Learn the inverse temperature of the similarities, else it stays at 1 / 0.07.
        loss: "clip", cross-entropy of each key point against all cells of the other image, in both directions
            (Hyperfeatures); "sparse", against the pair's other key points, plus the end-point error of "dense"
            (GeoAware-SC); "dense" alone.
        dense_weight: Weight of the end-point error in "sparse".
        flip: Train on mirrored pairs too.
        live: Read the backbone at each step in place of a store; for pairs too many to store their features.
        augment: Show other views of the images at each step, with their points: seeded affine warps, mirrored pairs,
            brightness and contrast, and noise of their own. For few pairs; the backbone is then read live.
        epochs: Passes over the pairs.
        patience: Stop after this many epochs without a better validation PCK; None never stops early.
        batch_size: Rows of one forward of the backbone.
        pairs_per_step: Pairs of one step, over all processes.
        lr: Learning rate of AdamW.
        weight_decay: Of AdamW.
        schedule: "constant" or "cosine".
        protocol: Of the validation PCK, at `alpha`.
        alpha: See `protocol`.
        checkpoint: Recompute activations level by level in the backward pass: memory for one level, more time.
        loggers: "csv" and "tensorboard" (extra `trackers`), into the run folder.
        unit_size: Images of one unit of extraction.
        workers: Processes that decode images.
        seed: Of weights, order and flips.
    """

    pairs: PairsConfig
    val_pairs: PairsConfig
    out: PathText
    width: PositiveInt = 384
    groups: PositiveInt = 32
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    learn_scale: bool = False
    loss: Literal["clip", "sparse", "dense"] = "clip"
    dense_weight: NotNegative = 1.0
    flip: bool = False
    live: bool = False
    augment: bool = False
    epochs: PositiveInt = 1
    patience: PositiveInt | None = None
    pairs_per_step: PositiveInt = 1
    lr: Positive = 1e-3
    weight_decay: NotNegative = 0.0
    schedule: Literal["constant", "cosine"] = "constant"
    protocol: Annotated[Protocol, BeforeValidator(get_protocol)] = get_protocol("dift")
    alpha: Annotated[float, Field(gt=0, le=1)] = 0.1
    checkpoint: bool = False
    loggers: Annotated[tuple[Literal["csv", "tensorboard"], ...], BeforeValidator(listed)] = ("csv",)
    unit_size: PositiveInt = 100
    workers: Annotated[int, Field(ge=0)] = 0
    seed: int = 0

    @model_validator(mode="after")
    def _no_other_descriptor(self) -> AggregateConfig:
        if self.join or self.aggregation is not None:
            raise ValueError("an aggregation network is what is trained here: leave join and aggregation out")
        if self.augment and self.flip:
            raise ValueError("augment mirrors pairs already: leave flip out")
        if (self.width // 4) % self.groups or self.width % 4:
            raise ValueError(f"groups {self.groups} does not divide a quarter of width {self.width}")
        return self


class WarpConfig(DescriptorConfig):
    """Arguments of `diffrep correspond warp`: images are matched with seeded warps of themselves.

    Attributes:
        data: The images; `data.size` is the side of what the backbone sees.
        kinds: "affine" (rotation, scale, shear, shift) and "tps" (thin-plate splines).
        points: Points along each side of a regular grid of pixels.
        patch: Side of the pixel patches that stand beside the backbone; None leaves them out.
        out: Run folder.
        pictures: Pairs drawn in the report.
        seed: Of the warps.
    """

    data: DataConfig
    kinds: Annotated[tuple[Literal["affine", "tps"], ...], BeforeValidator(listed), Field(min_length=1)] = (
        "affine",
        "tps",
    )
    points: PositiveInt = 8
    patch: PositiveInt | None = 7
    out: PathText
    pictures: Annotated[int, Field(ge=0)] = 4
    seed: int = 0

    @model_validator(mode="after")
    def _size_is_the_datas(self) -> WarpConfig:
        if self.size is not None or self.fit != "resize":
            raise ValueError("write data.size and data.fit in place of size and fit")
        if self.patch is not None and self.patch % 2 == 0:
            raise ValueError(f"patch={self.patch} has no middle pixel; take an odd side")
        return self


class MatchConfig(DescriptorConfig):
    """Arguments of `diffrep correspond match`, besides the two images.

    Attributes:
        out: Folder of the picture and the page.
        points: Points of the first image, "x,y" in its pixels; empty draws a regular grid of them.
        mutual: Draw only matches that are each other's nearest neighbours.
        lines: Most matches that are drawn.
    """

    out: PathText
    points: tuple[tuple[float, float], ...] = ()
    mutual: bool = True
    lines: PositiveInt = 40
