"""Rules by which key points are matched and scored: the same features give other numbers under other rules."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, PositiveInt, model_validator

from diffrep.config.loader import validate
from diffrep.config.schema import Positive, Section
from diffrep.errors import UnknownNameError, suggest

# What each published evaluation does otherwise than DIFT's eval_spair.py, whose rules are the fields' defaults.
PUBLISHED: dict[str, dict[str, Any]] = {
    # Tang et al., 2023; also CleanDIFT (Stracke et al., 2025).
    "dift": {},
    # Diffusion Hyperfeatures (Luo et al., 2023), train_hyperfeatures.py: both maps at the load resolution (512 in the
    # repository, 224 in the paper's tables).
    "hyperfeatures": {"size": 512, "query": "round", "average": "point"},
    # GeoAware-SC (Zhang et al., 2024), pck_train.py: 60 x 60 cells of 14 pixels, scored at their centres.
    "geoaware": {"size": 840, "fit": "pad", "grid": 60, "centre": 0.5, "compare": "<"},
    "geoaware-soft": {
        "size": 840,
        "fit": "pad",
        "grid": 60,
        "match": "soft",
        "window": 15,
        "centre": 0.5,
        "compare": "<",
    },
    # A Tale of Two Features (Zhang et al., 2023), pck_spair_pascal.py.
    "sd-dino": {"size": 840, "fit": "pad", "grid": 60, "centre": 0.5, "compare": "<", "average": "point"},
    # Probe3D (El Banani et al., 2024), evaluate_spair_correspondence.py: 800 pixels at stride 16.
    "probe3d": {
        "size": 800,
        "fit": "corner",
        "grid": 50,
        "query": "aligned",
        "compare": "<",
        "average": "class",
    },
    # Unsupervised semantic correspondence using Stable Diffusion (Hedlin et al., 2023). It has attention maps in place
    # of features; the frame and the scores are its own.
    "ldm": {
        "size": 512,
        "query": "bilinear",
        "centre": 0.5,
        "measure": "frame",
        "threshold": "source_box",
    },
}


class Protocol(Section):
    """How points are looked up, matched, given coordinates, judged and averaged.

    The defaults are DIFT's. `base: geoaware` starts from a published protocol, and every key beside it changes one
    rule; the name then says so, unless one is given. A published name is kept for the published rules.

    Cells are those of the grid, or the pixels of the frame where there is no grid.

    Attributes:
        name: Printed beside every number.
        size: Side in pixels of the square frame in which points are matched; None is the image itself.
        fit: How an image lies in that frame: "resize" does not keep its aspect ratio, "pad" does and centres it,
            "corner" does and puts it at the top left.
        grid: The frame is cut into grid x grid cells; None takes its pixels.
        query: The descriptor of a source point: "floor" and "round" (half to even) take that of a cell, "bilinear"
            interpolates the map at the point, "aligned" interpolates unit descriptors of cells whose outer centres are
            the frame's edges (`grid_sample` with align_corners).
        similarity: "cosine", or "l2" (the distance, negated).
        match: "argmax", or "soft": a mean under a softmax.
        window: Side in cells, odd, of the window around the peak that `soft` is confined to.
        kernel: Standard deviation in cells of the Gaussian around the peak that `soft` weights similarities with.
        outside: Similarities outside the window become 0 ("zero", as published), or are left out ("exclude").
        temperature: Similarities are divided by it before the softmax.
        centre: Where in a cell an annotated point lies, as a share of its side: 0 for coordinates that number pixels
            from 0, 0.5 for coordinates that measure from the image's corner. Predictions are put there.
        measure: Distances and thresholds are taken in pixels of the "original" image, or of the "frame".
        compare: A point is right where distance "<=" alpha * threshold, or "<".
        threshold: The longer side of the "target_box", of the "source_box", of the target "image", or of the box
            around the pair's target "points".
        average: Which mean is the protocol's own number: over images (pairs), over points, or over classes of their
            means over points. All are reported.
        pose: "mutual" or "nn" also matches from the mirrored source, and keeps that where it is nearer to the target:
            mean distance of mutual nearest neighbours over all cells, or of nearest neighbours of the source's mask.
    """

    main_field: ClassVar[str] = "base"

    name: Annotated[str, Field(min_length=1)] = "custom"
    size: PositiveInt | None = None
    fit: Literal["resize", "pad", "corner"] = "resize"
    grid: PositiveInt | None = None
    query: Literal["floor", "round", "bilinear", "aligned"] = "floor"
    similarity: Literal["cosine", "l2"] = "cosine"
    match: Literal["argmax", "soft"] = "argmax"
    window: PositiveInt | None = None
    kernel: Positive | None = None
    outside: Literal["zero", "exclude"] = "zero"
    temperature: Positive = 0.02
    centre: Annotated[float, Field(ge=0, le=1)] = 0.0
    measure: Literal["original", "frame"] = "original"
    compare: Literal["<=", "<"] = "<="
    threshold: Literal["target_box", "source_box", "image", "points"] = "target_box"
    average: Literal["image", "point", "class"] = "image"
    pose: Literal["none", "nn", "mutual"] = "none"

    @model_validator(mode="before")
    @classmethod
    def _from_published(cls, value: Any) -> Any:
        if isinstance(value, str):
            value = {"base": value}
        if not isinstance(value, Mapping):
            return value
        given = dict(value)
        base = given.pop("base", None)
        if base is None and list(given) == ["name"]:
            base = given.pop("name")
        if base is not None:
            if base not in PUBLISHED:
                raise ValueError(f"unknown protocol {base!r}; {suggest(str(base), list(PUBLISHED))}")
            given = {**PUBLISHED[base], "name": _variant(base, given), **given}
        name = given.get("name")
        if name in PUBLISHED:
            if changed := _changed(name, given):
                raise ValueError(
                    f"{_words(changed)} is not what {name!r} does; for a variant give base: {name}, and a name of its "
                    "own or none"
                )
            given = {**PUBLISHED[name], **given}
        return given

    @model_validator(mode="after")
    def _rules_agree(self) -> Protocol:
        if self.size is None and self.fit != "resize":
            raise ValueError(f"fit={self.fit} needs a size, the side of the square frame")
        if self.match == "argmax" and (self.window or self.kernel):
            raise ValueError("window and kernel belong to match=soft")
        if self.window and self.kernel:
            raise ValueError(f"window={self.window} and kernel={self.kernel} exclude each other; leave one out")
        if self.window and self.window % 2 == 0:
            raise ValueError(f"window={self.window} has no middle; take an odd number of cells")
        return self

    def text(self) -> str:
        """Returns the rules in one line."""
        frame = "original image" if self.size is None else f"{self.size} px frame ({self.fit})"
        cells = "pixels" if self.grid is None else f"{self.grid}x{self.grid} cells"
        match = self.match if self.match == "argmax" else f"soft argmax (temperature {self.temperature:g})"
        if self.window:
            match += f" in {self.window}x{self.window} cells"
        if self.kernel:
            match += f" under a Gaussian of {self.kernel:g} cells"
        if self.pose != "none":
            match += f" of the better of source and mirrored source ({self.pose})"
        where = "" if self.measure == "original" else " in the frame"
        return (
            f"{frame}, {cells}; {self.query} query, {self.similarity}, {match}, placed at {self.centre:g} of a cell; "
            f"distance{where} {self.compare} alpha x {self.threshold}; own number: mean over {PLURAL[self.average]}"
        )


PLURAL = {"image": "images", "point": "points", "class": "classes"}


def get_protocol(protocol: str | Mapping[str, Any] | Protocol) -> Protocol:
    """Returns a protocol.

    Args:
        protocol: A published name, the keys of a `Protocol`, or a protocol.

    Raises:
        UnknownNameError: No such protocol was published.
        ConfigError: Keys or values are wrong.
    """
    if isinstance(protocol, Protocol):
        return protocol
    if isinstance(protocol, str) and protocol not in PUBLISHED:
        hint = "Or give the rules themselves: {'base': 'dift', 'threshold': 'image'}."
        raise UnknownNameError("protocol", protocol, PUBLISHED, hint)
    return validate(Protocol, protocol, "the protocol")


def _changed(base: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the known keys whose values are not those of a published protocol."""
    fields, rules = Protocol.model_fields, PUBLISHED[base]
    return {
        key: value
        for key, value in given.items()
        if key in fields and key != "name" and value != rules.get(key, fields[key].default)
    }


def _variant(base: str, given: Mapping[str, Any]) -> str:
    changed = _changed(base, given)
    return f"{base} with {_words(changed)}" if changed else base


def _words(changed: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={value}" for key, value in changed.items())
