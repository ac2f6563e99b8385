"""Schemas of everything a user can set: frozen, no unknown keys, the same objects for Python, YAML and the command."""

from __future__ import annotations

from pathlib import PurePath
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PositiveInt, model_validator
from pydantic.dataclasses import dataclass

LevelSpec = int | float | str


def listed(value: Any) -> Any:
    """Takes one value for a list of one."""
    return (value,) if isinstance(value, (str, int, float)) else value


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, PurePath) else value


PathText = Annotated[str, BeforeValidator(_plain)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(gt=0, lt=1)]


class Section(BaseModel):
    """Base of all sections. A section with a `main_field` may be given as that field's bare value.

    So `data=/photos` on the command line sets `data.path` and keeps the other keys of `data` as they were.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    main_field: ClassVar[str | None] = None

    @model_validator(mode="before")
    @classmethod
    def _bare_value(cls, value: Any) -> Any:
        if cls.main_field and isinstance(value, (str, PurePath)):
            return {cls.main_field: str(value)}
        return value


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class FeatureRequest:
    """What is wanted from a backbone: every layer at every level, for each image.

    Attributes:
        layers: Layer addresses, or aliases such as "blocks" (every top-level block).
        levels: Noise levels: native times (261), "sigma=0.7", "logsnr=1.2", "step 4/18", "clean", "clean@-1"; with
            noise "inversion" or "generation" calls on a trajectory, "inversion 3/10" or "hf.inversion 3/10".
        draws: Noise draws per level; the features are their mean.
        pool: "none" keeps maps (C, H, W), "mean" gives (C,), an integer k a grid (C, k, k).
        noise: "gaussian" mixes seeded noise in; "none" shows the network the clean image at the level's time;
            "inversion" takes the image to noise by the network's own predictions, "generation" seeded noise to an
            image (DDIM, eta 0).
        posterior: "mode" or "sample" of the codec's posterior, where it has one.
        tokens: Keep a transformer's tokens as (N, C) in place of a map.
        seed: Seeds noise and posterior draws, together with sample id, level and draw.
        dtype: Element type of the features that come back; "float8_e4m3fn" keeps three bits behind the point of values
            below 448, enough for targets of alignment.
        guidance: Scale of classifier-free guidance along a generation; 1 for none. Features are those of the call with
            the condition.

    Raises:
        pydantic.ValidationError: For a value outside the ranges above.
    """

    layers: Annotated[tuple[str, ...], BeforeValidator(listed), Field(min_length=1)]
    levels: Annotated[tuple[LevelSpec, ...], BeforeValidator(listed), Field(min_length=1)]
    draws: PositiveInt = 1
    pool: Literal["none", "mean"] | PositiveInt = "none"
    noise: Literal["gaussian", "none", "inversion", "generation"] = "gaussian"
    posterior: Literal["mode", "sample"] = "mode"
    tokens: bool = False
    seed: int = 0
    dtype: Literal["float16", "bfloat16", "float32", "float8_e4m3fn"] = "float16"
    guidance: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0


class BackboneConfig(Section):
    """Arguments of `diffrep.load_backbone`, which explains them; a bare string is the `source`."""

    main_field: ClassVar[str] = "source"

    source: PathText
    family: str | None = None
    config: dict[str, Any] | str | None = None
    codec: PathText | None = None
    schedule: PathText | None = None
    revision: str | None = None
    init_seed: int | None = None
    weights: PathText | None = None
    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    attention: Literal["auto", "sdpa", "xformers", "flash"] = "auto"
    channels_last: bool | None = None
    compile: bool | Literal["regional", "cudagraphs"] = False


class DataConfig(Section):
    """A set of images; a bare string is the `path`.

    Attributes:
        path: Folder of images, `.npz` of arrays, `.csv` or `.tsv` of paths and labels, folder of parquet or hub id of
            an HF set, WebDataset shards (a folder, one `.tar` or "name-{000..011}.tar"), prepared VTAB-1k task folder,
            root of a torchvision set, or the name of a bundled set such as "fashion-demo".
        kind: How to read `path`; "auto" looks at it. Hub ids and torchvision sets must name theirs.
        name: Class of `torchvision.datasets` for kind "torchvision", such as "CIFAR10".
        splits: Splits to read, in this order; None takes all there are.
        limit: First n samples of each split, or a number for each split by name.
        size: Side of the square the images are brought to; None keeps them as they are.
        fit: "resize" (bicubic, aspect ratio not kept), "crop" (resize the short side, centre crop) or "pad" (zeros).
        image_key: Where the image is. HF: column, None takes the first that holds images. CSV: column, None takes
            "path" or the first. WebDataset: extension, None takes the sample's only image.
        label_key: Where the label is. HF: column, None takes "label" or the first class-label column. CSV: column,
            None takes "label". Several columns of 0 and 1, as "a,b,c" or a list, are a multi-label set. WebDataset:
            key in the sample's `.json`, None takes `.cls`.
        download: Let torchvision download the set when it is not there.
        stream: Read the shards of a WebDataset or the files of an HF parquet set one after another, as work reaches
            them, without listing their samples first; a unit of work is then a shard. Paths with a protocol, such as
            "s3://bucket/train-{000..999}.tar", are always read so.
    """

    main_field: ClassVar[str] = "path"

    path: PathText
    kind: Literal["auto", "folder", "torchvision", "hf", "npz", "csv", "webdataset", "vtab"] = "auto"
    name: str | None = None
    splits: Annotated[tuple[str, ...] | None, BeforeValidator(listed)] = None
    limit: PositiveInt | dict[str, PositiveInt] | None = None
    size: PositiveInt | None = None
    fit: Literal["resize", "crop", "pad"] = "resize"
    image_key: str | None = None
    label_key: str | tuple[str, ...] | None = None
    download: bool = False
    stream: bool = False

    @model_validator(mode="after")
    def _name_for_torchvision(self) -> DataConfig:
        if (self.kind == "torchvision") != (self.name is not None):
            raise ValueError("'name' (a class of torchvision.datasets) goes with kind: torchvision, and only with it")
        return self


class ExtractConfig(Section):
    """Arguments of `diffrep extract`.

    Attributes:
        backbone: The frozen network.
        data: The images.
        request: What to read.
        out: Folder of the feature store, or where fsspec puts one, such as "s3://bucket/features".
        latents: Store of the codec's latents of the same images, which then are not decoded and encoded again. It is
            made first when it is not there, and serves later requests too. None encodes the images.
        cond: A class label, a prompt, or a `.safetensors` file with the network's condition: prompt embeddings (T, C),
            or several tensors by name. None is "no class" or the empty prompt.
        batch_size: Rows of one forward: images x levels x draws share it. "auto" takes the largest that fits and still
            gains, and halves it when the device runs out of memory; features then differ in the last bits.
        pad: Fill every forward up to `batch_size` rows, so that all have one shape; compile=cudagraphs needs it.
        unit_size: Samples of one unit of work, the grain of resuming; of a streamed set a unit is a shard.
        workers: Processes that decode images (of a streamed set: threads); 0 decodes in the main process.
        prefetch: Batches that each of them reads ahead.
        lease: Seconds after which a unit that another process has begun, and makes no progress with, is taken over.
        monitor: File that the process's counters are written to every few seconds, in the text format of Prometheus;
            with several processes each has its own, FILE.RANK.
        on_error: "stop" at an unreadable image, or "skip" it and record it in `skipped.jsonl`.
    """

    backbone: BackboneConfig
    data: DataConfig
    request: FeatureRequest
    out: PathText
    latents: PathText | None = None
    cond: int | PathText | None = None
    batch_size: PositiveInt | Literal["auto"] = 64
    pad: bool = False
    unit_size: PositiveInt = 1000
    workers: Annotated[int, Field(ge=0)] = 0
    prefetch: PositiveInt = 2
    lease: Positive = 300.0
    monitor: PathText | None = None
    on_error: Literal["stop", "skip"] = "stop"
