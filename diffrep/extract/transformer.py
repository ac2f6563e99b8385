"""`DiffrepFeatures`: images in, a matrix of features out, as a step of a scikit-learn pipeline."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from pydantic import PositiveInt

from diffrep.backbones import Backbone, load_backbone
from diffrep.config import BackboneConfig, FeatureRequest, LevelSpec, validate
from diffrep.config.schema import PathText, Section
from diffrep.data import Transform
from diffrep.data.images import decode
from diffrep.errors import BackendUnavailable, ConfigError, DataError, DiffrepError
from diffrep.extract.extractor import Extractor
from diffrep.extract.features import Features
from diffrep.noise import image_digest

try:
    from sklearn.base import BaseEstimator, TransformerMixin
except ImportError as missing:
    raise BackendUnavailable("DiffrepFeatures needs scikit-learn: pip install 'diffrep[sklearn]'") from missing


class _Settings(Section):
    """What the estimator's parameters must be, so that all mistakes are told at once."""

    request: FeatureRequest
    cond: int | str | None
    size: PositiveInt | None
    fit: Literal["resize", "crop", "pad"]
    value_range: tuple[float, float]
    root: PathText | None
    ids: Literal["path", "content"]
    batch_size: PositiveInt
    device: str


class DiffrepFeatures(TransformerMixin, BaseEstimator):
    """Turns images into features (N, D) of a frozen backbone.

    Images are anything that can be gone through one by one: a uint8 array (N, H, W), (N, H, W, 1), (N, H, W, 3) or
    (N, H, W, 4), or a list of such arrays of one image; PIL images; paths; or float tensors (N, C, H, W), which must
    have the backbone's channels and, where `size` is set, that size. Everything else is converted between grey and
    RGB and brought to `size`.

    The noise of an image depends on `seed` and the image's id, and on nothing beside: not on the other images, their
    order, or the fold of a cross-validation. The id of a path is its POSIX form relative to `root`, which is what a
    feature store of the folder `root` uses; other images have the SHA-256 of their pixels as the network gets them,
    like `Backbone.extract` without ids. A pair (id, image) sets an id, such as "train:12" of a store of arrays. An
    index into `X` never is an id: it means another image in each fold. With the same ids and settings the features are
    those of a `FeatureStore`.

    There is nothing to fit: `fit` checks the parameters and notes the shapes. A row is the flattened features of
    (first layer, first level), (first layer, second level), and so on, as `combine: all` of `diffrep probe` has them.

    Args:
        backbone: Name, folder or hub id for `diffrep.load_backbone`, a `BackboneConfig`, or a loaded `Backbone`, which
            clones share. The last one that was loaded by name is kept for the next estimator that names it.
        layers: Layer addresses or aliases; see `FeatureRequest`, also for what follows.
        levels: Noise levels.
        pool: "mean", an integer k for k x k cells, or "none" for whole maps.
        draws: Noise draws per level.
        noise: "gaussian", "none" or "inversion".
        posterior: "mode" or "sample".
        tokens: Keep a transformer's tokens.
        seed: Seeds noise and posterior draws.
        dtype: Type the features are rounded to, for equality with a store of this dtype; they come back as float32.
        cond: A class label or a prompt for every image; None is "no class" or the empty prompt.
        size: Side of the square the images are brought to; None keeps them as they are.
        fit_mode: "resize", "crop" or "pad", the `fit` of `DataConfig`.
        value_range: Values of float tensors that mean black and white: (0, 1) as everywhere in diffrep and from
            torchvision's `ToTensor`, (-1, 1) for tensors that were made for a diffusion model.
        root: Folder that paths are relative to; None leaves them as they are.
        ids: "path", or "content" to treat paths like other images.
        batch_size: Images read at a time, and rows of one forward.
        device: Where a backbone that is named is loaded; "auto" takes a GPU when there is one.

    Attributes:
        shapes_: Shape of the features of one image by layer, in order; set by `fit`.
        levels_: Canonical keys of the levels; set by `fit`.

    Raises:
        ConfigError: From `fit` and `transform`, for wrong parameters and images of several sizes.
        DataError: An image cannot be read or is nothing of the above.
        LayerError: A layer does not exist.
    """

    def __init__(
        self,
        backbone: str | Path | BackboneConfig | Backbone,
        layers: str | Sequence[str],
        levels: LevelSpec | Sequence[LevelSpec],
        pool: str | int = "mean",
        draws: int = 1,
        noise: str = "gaussian",
        posterior: str = "mode",
        tokens: bool = False,
        seed: int = 0,
        dtype: str = "float32",
        cond: int | str | None = None,
        size: int | None = None,
        fit_mode: str = "resize",
        value_range: tuple[float, float] = (0.0, 1.0),
        root: str | Path | None = None,
        ids: str = "path",
        batch_size: int = 64,
        device: str = "auto",
    ):
        self.backbone = backbone
        self.layers = layers
        self.levels = levels
        self.pool = pool
        self.draws = draws
        self.noise = noise
        self.posterior = posterior
        self.tokens = tokens
        self.seed = seed
        self.dtype = dtype
        self.cond = cond
        self.size = size
        self.fit_mode = fit_mode
        self.value_range = value_range
        self.root = root
        self.ids = ids
        self.batch_size = batch_size
        self.device = device

    def fit(self, X: Any, y: Any = None) -> DiffrepFeatures:
        """Checks the parameters and notes the features' shapes for the size of the first image; `y` is not used."""
        reader = self._reader(X)
        self.shapes_, self.levels_ = reader.layout(reader.image(0))
        return self

    def transform(self, X: Any) -> np.ndarray:
        """Returns the features (N, D) float32 of images; works without `fit` too.

        Raises:
            ConfigError: Their features have other shapes than those noted by `fit`.
        """
        reader = self._reader(X)
        layout = reader.layout(reader.image(0))
        if hasattr(self, "shapes_") and layout != (self.shapes_, self.levels_):
            raise ConfigError(
                f"features of these images are {layout}, and fit saw {(self.shapes_, self.levels_)}: other "
                "parameters, or images of another size. Fit again, or set size"
            )
        return np.concatenate(list(reader.batches()))

    def get_feature_names_out(self, input_features: Any = None) -> np.ndarray:
        """Returns "layer@level[channel,row,column]" of each column; `input_features` is not used.

        Raises:
            sklearn.exceptions.NotFittedError: `fit` has not seen an image yet.
        """
        from sklearn.utils.validation import check_is_fitted

        check_is_fitted(self, "shapes_")
        return np.array(
            [
                f"{layer}@{level}[{','.join(map(str, place))}]"
                for layer, shape in self.shapes_.items()
                for level in self.levels_
                for place in product(*map(range, shape))
            ],
            dtype=object,
        )

    def _reader(self, X: Any) -> _Reader:
        given = {name: _plain(value) for name, value in self.get_params(deep=False).items()}
        wanted = FeatureRequest.__dataclass_fields__
        request = {name: given[name] for name in wanted if name in given}
        others = {name: given[name] for name in ("cond", "size", "value_range", "root", "ids", "batch_size", "device")}
        settings = validate(_Settings, {"request": request, "fit": given["fit_mode"], **others}, "DiffrepFeatures")
        return _Reader(X, settings, self._extractor_of(settings))

    def _extractor_of(self, settings: _Settings) -> Extractor:
        # Kept with its plan, which takes longer than a small batch; set_params may ask for another one.
        key = (self.backbone, settings.request, settings.batch_size, settings.device)
        if getattr(self, "_kept", (None,))[0] != key:
            backbone = _open(self.backbone, self.device)
            self._kept = key, Extractor(backbone, settings.request, settings.batch_size)
        return self._kept[1]

    def __getstate__(self) -> dict[str, Any]:
        # What a network named by a string is, every process can find out for itself.
        return {name: value for name, value in super().__getstate__().items() if name != "_kept"}

    def __sklearn_clone__(self) -> DiffrepFeatures:
        # The usual clone copies every parameter; a frozen network can be shared.
        parameters = self.get_params(deep=False)
        copy = type(self)(**{name: _copied(value) for name, value in parameters.items()})
        if hasattr(self, "_sklearn_output_config"):
            copy._sklearn_output_config = dict(self._sklearn_output_config)
        return copy

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "shapes_")

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.requires_fit, tags.no_validation = False, True
        tags.input_tags.two_d_array, tags.input_tags.three_d_array, tags.input_tags.string = False, True, True
        return tags


class _Reader:
    """Images on their way into an extractor, a batch at a time."""

    def __init__(self, images: Any, settings: _Settings, extractor: Extractor):
        self.settings, self.extractor, self.backbone = settings, extractor, extractor.backbone
        self.root = None if settings.root is None else Path(settings.root).expanduser()
        self.transform = Transform(self.backbone.image_channels, settings.size, settings.fit)
        table = hasattr(images, "iloc") and images.ndim == 2
        if table or isinstance(images, (str, bytes, dict, Path, Image.Image)) or not hasattr(images, "__len__"):
            raise DataError(
                f"X must be a sequence of images, got one {type(images).__name__}; give a list or an array"
            )
        self.images = images if isinstance(images, (np.ndarray, torch.Tensor)) else list(images)
        if not len(self.images):
            raise DataError("X holds no images; at least one is needed")

    def layout(self, first: torch.Tensor) -> tuple[dict[str, tuple[int, ...]], list[str]]:
        """Returns the features' shapes by layer and the keys of the levels, for images of the first one's size."""
        plan = self.extractor.plan(*first.shape[-2:], self.backbone.condition(self.settings.cond, 1))
        return {name: tuple(shape) for name, shape in plan.shapes.items()}, list(plan.levels.levels)

    def batches(self) -> Iterator[np.ndarray]:
        """Gives features (n, D) float32 of one batch after another."""
        for start in range(0, len(self.images), self.settings.batch_size):
            rows = range(start, min(start + self.settings.batch_size, len(self.images)))
            pictures = [self.image(row) for row in rows]
            sizes = sorted({tuple(picture.shape) for picture in pictures})
            if len(sizes) > 1:
                raise ConfigError(f"the images differ in size, such as {sizes[:2]}; set size")
            batch = torch.stack(pictures)
            yield _matrix(self.extractor(batch, ids=self._ids(rows, batch), cond=self.settings.cond))

    def image(self, row: int) -> torch.Tensor:
        """Reads one image as (C, H, W) in [0, 1]."""
        _, item = _split(self.images[row])
        try:
            return self._tensor(item) if isinstance(item, torch.Tensor) else self.transform(self._picture(item))
        except DiffrepError as error:
            name = repr(str(item)) if isinstance(item, (str, Path)) else f"image {row} of X"
            raise type(error)(f"{name}: {error}") from error

    def _ids(self, rows: range, batch: torch.Tensor) -> list[str]:
        names = []
        for row, picture in zip(rows, batch, strict=True):
            name, item = _split(self.images[row])
            if name is None and isinstance(item, (str, Path)) and self.settings.ids == "path":
                name = self._relative(Path(item))
            names.append(image_digest(picture) if name is None else name)
        return names

    def _relative(self, path: Path) -> str:
        if self.root is None or not path.is_absolute():
            return path.as_posix()
        if not path.is_relative_to(self.root):
            raise DataError(
                f"{str(path)!r} is not below root {str(self.root)!r}, so it has no relative path as its id"
            )
        return path.relative_to(self.root).as_posix()

    def _picture(self, item: Any) -> Image.Image:
        if isinstance(item, Image.Image):
            return item
        if isinstance(item, (str, Path)):
            return decode(Path(self.root or "") / Path(item).expanduser())
        if not isinstance(item, np.ndarray):
            raise DataError(f"no image, but {type(item).__name__}; give arrays, PIL images, paths or tensors")
        if item.dtype != np.uint8 or item.ndim not in (2, 3) or item.shape[2:] not in ((), (1,), (3,), (4,)):
            raise DataError(
                f"{item.dtype} {item.shape}; arrays must be uint8 (H, W), (H, W, 1), (H, W, 3) or (H, W, 4), and "
                "floats come as tensors"
            )
        return Image.fromarray(np.ascontiguousarray(item[:, :, 0] if item.shape[2:] == (1,) else item))

    def _tensor(self, item: torch.Tensor) -> torch.Tensor:
        size = self.settings.size
        if item.ndim != 3 or not item.is_floating_point():
            raise DataError(f"{item.dtype} {tuple(item.shape)}; tensors must be floats (C, H, W), and uint8 arrays")
        if size is not None and tuple(item.shape[1:]) != (size, size):
            raise ConfigError(f"tensors are not resized: {tuple(item.shape)} is not of size {size}")
        low, high = self.settings.value_range
        image = (item.detach().cpu().float() - low) / (high - low)
        if image.numel() and not (image.min() >= 0 and image.max() <= 1):  # NaN too
            raise ConfigError(
                f"values from {item.min():.3g} to {item.max():.3g} leave value_range {[low, high]}; set it"
            )
        return image


def _matrix(features: Features) -> np.ndarray:
    parts = [features[layer, level].float().flatten(1) for layer in features.layers for level in features.levels]
    return torch.cat(parts, dim=1).numpy()


def _split(item: Any) -> tuple[str | None, Any]:
    """Returns id and image of a pair, and None with anything else."""
    if isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], str):
        return item
    return None, item


def _plain(value: Any) -> Any:
    """Returns numpy's numbers and arrays, which grids of parameters are often made of, as Python's own."""
    if isinstance(value, (np.generic, np.ndarray)):
        return value.tolist()
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    return value


def _copied(value: Any) -> Any:
    from sklearn.base import clone

    return value if isinstance(value, (Backbone, BackboneConfig)) else clone(value, safe=False)


def _open(backbone: str | Path | BackboneConfig | Backbone, device: str) -> Backbone:
    if isinstance(backbone, Backbone):
        return backbone
    if isinstance(backbone, (str, Path)):
        return _load(BackboneConfig(source=backbone, device=device).model_dump_json())
    if isinstance(backbone, BackboneConfig):
        return _load(backbone.model_dump_json())
    raise ConfigError(f"backbone is a {type(backbone).__name__}; give a name, a BackboneConfig or a Backbone")


@lru_cache(maxsize=1)
def _load(config: str) -> Backbone:
    # Cross-validation makes a new estimator for every fold and setting, which would each load the network again.
    return load_backbone(**BackboneConfig.model_validate_json(config).model_dump())
