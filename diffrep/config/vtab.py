"""Schema of the VTAB-1k run."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Field, PositiveInt, model_validator

from diffrep.config.probe import ProbeConfig
from diffrep.config.schema import BackboneConfig, DataConfig, FeatureRequest, PathText, Section, listed

# Keys of a probe that the benchmark decides; a resolved config, which is written beside the results, has them too.
SETTLED = ("store", "out", "data", "train_split", "val_split", "test_split", "missing", "metric")


class VtabProbeConfig(ProbeConfig):
    """What is fitted on each task: a `ProbeConfig` whose roles of the splits, metric and folders VTAB settles.

    Settings are chosen on val200 by heads fitted on train800; the chosen ones are fitted again on both and scored once
    on the whole test split, by top-1 accuracy. A class without a training sample, such as some of SUN397's 397 in 800
    images, costs its test samples.
    """

    main_field: ClassVar[None] = None

    store: PathText | None = None
    train_split: str = "train800"
    val_split: str | None = "val200"
    missing: Literal["refuse", "allow", "any"] = "any"

    @model_validator(mode="after")
    def _settled(self) -> VtabProbeConfig:
        fields = type(self).model_fields
        given = [name for name in SETTLED if getattr(self, name) != fields[name].default]
        if given:
            raise ValueError(f"{', '.join(given)}: VTAB-1k settles splits and metric, and a task's folder is in out")
        return self


class VtabConfig(Section):
    """Arguments of `diffrep vtab`.

    Attributes:
        backbone: The frozen network.
        data: Folder of the prepared task folders, and how their images are brought to the backbone's input; `size` is
            required, for the images of most tasks differ in size.
        request: What to read.
        out: Run folder; each task has its store and its probe in `<out>/<task>`.
        tasks: Tasks by folder name; None takes all 19, which must then be there.
        probe: Heads and their settings.
        cond: As in `ExtractConfig`: a label, a prompt, or a `.safetensors` file.
        batch_size: Rows of one forward: images x levels x draws share it.
        unit_size: Samples of one unit of work, the grain of resuming within a task.
        workers: Processes that decode images; 0 decodes in the main process.
    """

    backbone: BackboneConfig
    data: DataConfig
    request: FeatureRequest
    out: PathText
    tasks: Annotated[Annotated[tuple[str, ...], Field(min_length=1)] | None, BeforeValidator(listed)] = None
    probe: VtabProbeConfig = VtabProbeConfig()
    cond: int | PathText | None = None
    batch_size: PositiveInt = 64
    unit_size: PositiveInt = 1000
    workers: Annotated[int, Field(ge=0)] = 0

    @model_validator(mode="after")
    def _data_are_task_folders(self) -> VtabConfig:
        if self.data.size is None:
            raise ValueError("data.size is required: the images of most tasks differ in size")
        if self.data.kind not in ("auto", "vtab") or self.data.splits is not None:
            raise ValueError("data names the folder of the task folders; kind and splits are those of VTAB-1k")
        if self.tasks is not None and len(set(self.tasks)) < len(self.tasks):
            raise ValueError(f"tasks names one twice: {list(self.tasks)}")
        return self
