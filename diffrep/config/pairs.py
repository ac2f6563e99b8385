"""Schema of a set of image pairs with key points that correspond."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, PositiveInt, model_validator

from diffrep.config.schema import PathText, Positive, Section, listed

PairsKind = Literal["auto", "spair", "pf-pascal", "pf-willow", "cub", "ap-10k", "hpatches", "cats", "json"]
# Keys that only some kinds of data have.
KEYS_OF_KINDS = {
    "split": ("spair", "pf-pascal", "cub", "ap-10k"),
    "subset": ("ap-10k",),
    "crop_scale": ("cats",),
    "grid": ("hpatches",),
}


class PairsConfig(Section):
    """A set of pairs; a bare string is the `path`.

    The keys act in this order: `split` and `subset`, `categories`, `images`, `sample`, `limit`.

    Attributes:
        path: Folder of the set as it was published and unpacked, or a `.json` of pairs.
        kind: How to read `path`; "auto" looks at it.
        split: Split to read, "train", "val" or "test"; None takes "test". Only for sets that have splits. CUB also has
            "all"; AP-10K also takes a name such as "test-split2".
        subset: Which pairs of AP-10K: of one species, of two species of a family, or of two families.
        categories: Categories to keep; None keeps all.
        images: First n of the images that occur in these pairs, by id; a negative number for the last ones; two
            numbers for the positions from the first up to the second, not included. Pairs with another image are left
            out, so `images=16` and `images=-8` of 24 photos share none.
        sample: Pairs of each category, drawn without replacement; None takes all.
        limit: First n pairs.
        crop_scale: Side of a cat's head crop, in longer sides of the box of its nine points.
        grid: Points along each side of an HPatches reference image.
        seed: Seeds `sample`.
    """

    main_field: ClassVar[str] = "path"

    path: PathText
    kind: PairsKind = "auto"
    split: str | None = None
    subset: Literal["intra-species", "cross-species", "cross-family"] = "intra-species"
    categories: Annotated[Annotated[tuple[str, ...], Field(min_length=1)] | None, BeforeValidator(listed)] = None
    images: int | tuple[int, int] | None = None
    sample: PositiveInt | None = None
    limit: PositiveInt | None = None
    crop_scale: Positive = 1.8
    grid: PositiveInt = 10
    seed: int = 0

    @model_validator(mode="after")
    def _keys_fit(self) -> PairsConfig:
        if self.kind != "auto":
            misplaced = self.misplaced(self.kind)
            if misplaced:
                raise ValueError(misplaced)
        if self.images == 0 or isinstance(self.images, tuple) and not 0 <= self.images[0] < self.images[1]:
            raise ValueError(
                f"images is {self.images}; it is a number other than 0, or two rising positions from 0 on, as [8, 16]"
            )
        return self

    def misplaced(self, kind: str) -> str:
        """Returns what is wrong with keys that this kind of data has not, or an empty text."""
        given: dict[str, Any] = {name: getattr(self, name) for name in KEYS_OF_KINDS}
        wrong = [
            f"'{name}' is for {', '.join(kinds)}, and this is {kind}"
            for name, kinds in KEYS_OF_KINDS.items()
            if kind not in kinds and given[name] != type(self).model_fields[name].default
        ]
        return "; ".join(wrong)
