"""Schemas of sampling, and of what is looked at while a model is trained."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, PositiveInt, model_validator

from diffrep.config.align import EncoderConfig
from diffrep.config.schema import BackboneConfig, DataConfig, LevelSpec, NotNegative, PathText, Section, listed


class SamplerConfig(Section):
    """How images are made from noise.

    Attributes:
        method: "auto" is "heun" for EDM, "ddpm" for discrete schedules, "euler" for flows. "euler" and "heun" follow
            the probability flow, "sde" is Euler-Maruyama along REPA's reverse SDE (flows), "ddpm" and "ddim" are those
            of diffusers (discrete schedules).
        steps: Steps.
        guidance: Scale of classifier-free guidance; 1 is none.
        interval: Guidance is used where the share of the way to noise lies between these (Kynkaanniemi et al., 2024).
        guided_channels: Channels that are guided; None is all. The published DiT and SiT guide the first 3.
        last: Of "sde": share of the way to noise at which the last step, without noise, begins.
        eta: Of "ddim": share of fresh noise.
        churn: Of EDM's "heun": S_churn; 0 is deterministic.
        clip: Of "ddpm" and "ddim": hold the clean sample in [-1, 1] at each step, for networks of pixels; None is what
            the model's scheduler says, and where it has none, pixels are held and latents are not.
    """

    method: Literal["auto", "euler", "heun", "sde", "ddpm", "ddim"] = "auto"
    steps: PositiveInt = 50
    guidance: NotNegative = 1.0
    interval: tuple[Annotated[float, Field(ge=0, le=1)], Annotated[float, Field(ge=0, le=1)]] = (0.0, 1.0)
    guided_channels: PositiveInt | None = None
    last: Annotated[float, Field(gt=0, lt=1)] = 0.04
    eta: Annotated[float, Field(ge=0, le=1)] = 0.0
    churn: NotNegative = 0.0
    clip: bool | None = None

    @model_validator(mode="after")
    def _ordered(self) -> SamplerConfig:
        if self.interval[0] > self.interval[1]:
            raise ValueError(f"interval {list(self.interval)} runs backwards; give the end with less noise first")
        return self


class SampleConfig(Section):
    """Arguments of `diffrep sample`.

    Attributes:
        backbone: The model.
        out: Folder: `images/*.png`, `samples.npz` (`arr_0`, uint8 (N, H, W, C), as the ADM evaluator reads it, and
            `arr_1`, the labels where there are any), `grid.png`, results.json.
        sampler: How.
        count: Images.
        labels: "balanced" (each class in turn), "random", "none" (no class), or class numbers that take turns; None is
            "balanced" for networks with classes.
        classes: Number of classes that "balanced" and "random" take, from 0 on; None is all that the network has.
        seed: Seeds initial noise, the sampler's noise and random labels, together with the image's number.
        batch_size: Images at a time.
        png: Write the PNG files.
        npz: Write the array.
        grid: Images of `grid.png`; 0 for none.
    """

    backbone: BackboneConfig
    out: PathText
    sampler: SamplerConfig = SamplerConfig()
    count: PositiveInt = 64
    labels: (
        Literal["balanced", "random", "none"]
        | Annotated[tuple[int, ...], BeforeValidator(listed), Field(min_length=1)]
        | None
    ) = None
    classes: PositiveInt | None = None
    seed: int = 0
    batch_size: PositiveInt = 64
    png: bool = True
    npz: bool = True
    grid: Annotated[int, Field(ge=0)] = 64


class WatchConfig(Section):
    """What is measured of the averaged weights while a model is trained; written to `watch.jsonl`.

    Attributes:
        every: Steps between two measurements; the last step is measured too, and step 0 where `start` is set.
        start: Measure the untrained network too.
        data: Labelled images with a split to learn from and one to score on; None takes the run's store or its data.
        train_split: Split that the probe is fitted on.
        test_split: Split that everything is scored on.
        limit: Images of each of the two.
        layers: Layers that are read; None is the aligned ones, or all blocks.
        level: Noise level they are read at; None is sigma = 0.1 or the level nearest to it.
        probe: Linear probe: features averaged over positions, "no class" for the network, standardised, and a linear
            map of them.
        encoder: Encoder that features are compared with (CKNNA, CKA, mutual kNN) and that the Frechet distance is
            taken in; None takes the first target encoder of the alignment terms, or none.
        stored: Name of targets in the run's store that features are compared with; None takes the first of the
            alignment terms. An `encoder` beside it, which must be the one that made them, is for the Frechet distance.
        neighbours: k of CKNNA and mutual kNN.
        samples: Images made for the Frechet distance; 0 for none.
        sampler: How they are made.
        grid: Images of `samples/step-*.png`; 0 for none.
        codec: Autoencoder that decodes samples of latents, and encodes images of `data`; None takes the model's own.
    """

    every: PositiveInt = 1000
    start: bool = True
    data: DataConfig | None = None
    train_split: str = "train"
    test_split: str = "test"
    limit: PositiveInt = 2000
    layers: Annotated[tuple[str, ...], BeforeValidator(listed), Field(min_length=1)] | None = None
    level: LevelSpec | None = None
    probe: bool = True
    encoder: EncoderConfig | None = None
    stored: str | None = None
    neighbours: Annotated[int, Field(ge=2)] = 10
    samples: Annotated[int, Field(ge=0)] = 0
    sampler: SamplerConfig = SamplerConfig()
    grid: Annotated[int, Field(ge=0)] = 0
    codec: PathText | None = None
