"""Schemas of representation alignment: target encoders and alignment terms."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, PositiveInt, model_validator

from diffrep.config.schema import NotNegative, PathText, Positive, Section, listed


class EncoderConfig(Section):
    """A pretrained encoder whose features are targets; a bare string is the `source`.

    Attributes:
        source: A model of timm, a hub id, or a file of weights.
        model: For a file of weights: timm's name of the model, or its arguments with the name under "model".
        preset: How images are brought to it: "dinov2", "dinov3", "dinov1", "clip", "siglip", "mocov3", "mae", "jepa"
            or "cnn"; None takes the one that the model's name suggests.
        layer: Address of the layer whose features are taken; None is the preset's.
        size: Side the images are brought to; None is the preset's rule.
        pca: `.safetensors` file of a projection that `diffrep.fit_pca` wrote; targets then have its width.
    """

    main_field: ClassVar[str] = "source"

    source: PathText
    model: dict[str, Any] | str | None = None
    preset: Literal["dinov2", "dinov3", "dinov1", "clip", "siglip", "mocov3", "mae", "jepa", "cnn"] | None = None
    layer: str | None = None
    size: PositiveInt | None = None
    pca: PathText | None = None


class PrepareConfig(Section):
    """`config` of the family "prepare" of `diffrep.load_backbone`: what is made of each image for training.

    Attributes:
        moments: Mean and standard deviation of the autoencoder's posterior, in place of its mode.
        flip: Everything twice, of the image and of its mirror image.
        encoders: Target encoders, by names of your choice.
        channels: Of the images; None takes the autoencoder's, and 3 for pixels.
    """

    moments: bool = False
    flip: bool = False
    encoders: dict[str, EncoderConfig] = {}
    channels: Literal[1, 3] | None = None


# What a method sets; a user's own keys win. Figures are those of the published code.
PRESETS: dict[str, dict[str, Any]] = {
    # Yu et al., 2025
    "repa": {},
    # Singh et al., 2025
    "irepa": {"projector": "conv", "transform": "spatial", "alpha": 0.6, "weight": 1.0},
    # Jiang et al., 2025, with the cosine that its authors came to advise
    "sra": {"target": "ema", "projector_depth": 2, "weight": 0.5},
    # Wang and He, 2025
    "dispersive": {"target": "none", "projector": "none", "distance": "dispersive", "weight": 0.5, "temperature": 0.5},
    # Tian et al., 2025
    "u-repa": {"resize": "student"},
    # Wang et al., 2025: REPA that ends
    "haste": {"stop": 250_000},
}


class AlignConfig(Section):
    """An alignment term: features of the network in training are drawn to a target; a bare string is the `preset`.

    Attributes:
        preset: A published method, which sets what is not given: "repa", "irepa", "sra", "dispersive", "u-repa",
            "haste".
        layers: Addresses of the student's layers, each aligned on its own. None is the published depth: 4 blocks of
            size B, 8 of L and XL, else 0.3 of the blocks; the middle block of a U-Net.
        target: "encoder", "ema" (the average of the network's own weights, at less noise) or "none".
        encoder: The target encoder, which runs in each step; with `stored` it is not run, and the run is refused where
            the stored targets were made by another one or with other preprocessing.
        stored: Name of targets in the store that the run is trained from.
        transform: Of the target: "none", or "spatial": (z - alpha mean) / (std + 1e-6) over positions.
        alpha: Share of the mean that "spatial" takes away.
        projector: Between student and target: "mlp", "conv" (3 x 3) or "none".
        width: Inner width of an MLP.
        projector_depth: Its linear layers.
        distance: "cosine" (minus the cosine over channels), "smooth_l1", "contrastive", "dispersive", or "manifold"
            (squared differences between the cosines of samples: U-REPA's second term, 3 times the weight of its first,
            which is preset "u-repa").
        beta: Where "smooth_l1" goes over from square to line.
        temperature: Of "contrastive" and "dispersive".
        weight: Coefficient of the term.
        decay: The coefficient over the steps up to `stop`: "none", "linear" or "cosine" to zero.
        stop: Step from which the term is off; None is never.
        resize: Grids that differ: "target" is brought to the student's grid, or "student" (after its projector) to the
            target's. Larger grids are bilinear, smaller ones averages of areas.
        ema_layers: For "ema": the layers of the target, one for each of `layers`; None is two thirds of the depth.
        max_gap: For "ema": the target sees a share of the way to noise that is less by up to this, drawn uniformly.
    """

    main_field: ClassVar[str] = "preset"

    preset: Literal["repa", "irepa", "sra", "dispersive", "u-repa", "haste"] | None = None
    layers: Annotated[tuple[str, ...], BeforeValidator(listed), Field(min_length=1)] | None = None
    target: Literal["encoder", "ema", "none"] = "encoder"
    encoder: EncoderConfig | None = None
    stored: str | None = None
    transform: Literal["none", "spatial"] = "none"
    alpha: float = 1.0
    projector: Literal["mlp", "conv", "none"] = "mlp"
    width: PositiveInt = 2048
    projector_depth: PositiveInt = 3
    distance: Literal["cosine", "smooth_l1", "contrastive", "dispersive", "manifold"] = "cosine"
    beta: Positive = 0.05
    temperature: Positive = 0.5
    weight: NotNegative = 0.5
    decay: Literal["none", "linear", "cosine"] = "none"
    stop: PositiveInt | None = None
    resize: Literal["target", "student"] = "target"
    ema_layers: Annotated[tuple[str, ...], BeforeValidator(listed), Field(min_length=1)] | None = None
    max_gap: Annotated[float, Field(ge=0, le=1)] = 0.2

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, value: Any) -> Any:
        given = {"preset": value} if isinstance(value, str) else value
        if isinstance(given, dict) and given.get("preset") in PRESETS:
            return PRESETS[given["preset"]] | given
        return given

    @model_validator(mode="after")
    def _one_target(self) -> AlignConfig:
        sources = [name for name in ("encoder", "stored") if getattr(self, name) is not None]
        if self.target == "encoder" and not sources:
            raise ValueError("target 'encoder' needs encoder, or stored (targets in the store); neither is given")
        if self.target != "encoder" and sources:
            raise ValueError(f"target {self.target!r} takes no {sources[0]}")
        if self.distance == "dispersive" and (self.target != "none" or self.projector != "none"):
            raise ValueError("distance 'dispersive' takes target: none and projector: none")
        if self.target == "none" and self.distance != "dispersive":
            raise ValueError("target 'none' goes with distance: dispersive, and only with it")
        if self.decay != "none" and self.stop is None:
            raise ValueError(f"decay {self.decay!r} needs stop, the step at which the coefficient is zero")
        if self.ema_layers is not None and self.target != "ema":
            raise ValueError("ema_layers goes with target: ema")
        return self
