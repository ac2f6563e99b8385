"""Schema of the search by successive halving."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, PositiveInt, ValidationInfo, field_validator, model_validator

from diffrep.config.probe import ProbeConfig
from diffrep.config.schema import ExtractConfig, PathText, listed

FIRST = 1000


class SearchProbeConfig(ProbeConfig):
    """How cells are judged: a `ProbeConfig` whose features, folder and seed are the search's own.

    The roles of the splits and the settings of the head serve every rung; the rest serves the last stage alone.
    """

    main_field: ClassVar[None] = None

    store: PathText | None = None
    seed: int | None = None

    @model_validator(mode="after")
    def _the_searchs_own(self) -> SearchProbeConfig:
        for key in ("store", "out", "data", "seed"):
            if getattr(self, key) is not None:
                raise ValueError(f"probe.{key} is the search's own; leave it out")
        for key in ("combine", "trained", "baselines"):
            if getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(
                    f"probe.{key} needs what a search does not extract; run 'diffrep extract' with the layers and "
                    "levels that the search found, and 'diffrep probe' on that store"
                )
        return self


class SearchConfig(ExtractConfig):
    """Arguments of `diffrep search`: those of `diffrep extract`, and how the race is run.

    `request` spans the grid of cells, every layer at every level; without layers it takes all top-level blocks. A unit
    of work is read at once, so that groups of cells share the encoding of its images: it is smaller than in
    `diffrep extract`.

    Attributes:
        rungs: Samples of every rung, rising; None takes `first` and its multiples.
        first: Samples of the first rung, training and validation samples together; test samples are in no rung. 1,000
            if it is not given, and always None beside `rungs`, which win over a `first` in a config file.
        factor: Each rung keeps one cell in so many, and the next has so many times the samples.
        keep: Cells that are left after the last rung, and probed on all samples.
        head: What cells are judged by in the rungs: "logistic", "ridge" or "knn".
        ranking: "beside" also ranks all cells without labels on the samples of the first rung, which reads them under
            a second noise seed; "only" does that and nothing else, and needs no labels; "none" does not.
        probe: Splits, metric and settings of the heads, and which heads are fitted on the cells that are left.
        seed: Seeds splits, the order in which samples join, the bootstrap, and heads that draw.
    """

    unit_size: PositiveInt = 100
    rungs: Annotated[Annotated[tuple[PositiveInt, ...], Field(min_length=1)] | None, BeforeValidator(listed)] = None
    first: Annotated[PositiveInt | None, Field(validate_default=True)] = None
    factor: Annotated[int, Field(ge=2)] = 2
    keep: PositiveInt = 3
    head: Literal["logistic", "ridge", "knn"] = "logistic"
    ranking: Literal["beside", "only", "none"] = "beside"
    probe: SearchProbeConfig = SearchProbeConfig()
    seed: int = 0

    @model_validator(mode="before")
    @classmethod
    def _all_blocks(cls, value: Any) -> Any:
        if isinstance(value, Mapping) and isinstance(value.get("request"), Mapping):
            return {**value, "request": {"layers": "blocks", **value["request"]}}
        return value

    @field_validator("first")
    @classmethod
    def _rungs_win(cls, value: int | None, info: ValidationInfo) -> int | None:
        return None if info.data.get("rungs") else value or FIRST

    @model_validator(mode="after")
    def _reads_by_position(self) -> SearchConfig:
        wrong = {"batch_size=auto": self.batch_size == "auto", "latents": self.latents, "pad": self.pad}
        for key in (key for key, given in (wrong | {"data.stream": self.data.stream}).items() if given):
            raise ValueError(f"{key} is set, which is for 'diffrep extract'; a search reads images by position")
        return self

    @model_validator(mode="after")
    def _rungs_rise(self) -> SearchConfig:
        if self.rungs and any(one >= other for one, other in zip(self.rungs, self.rungs[1:], strict=False)):
            raise ValueError(f"rungs must rise, as each one adds samples to the one before; given: {list(self.rungs)}")
        return self
