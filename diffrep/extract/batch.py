"""What a caller hands over for one batch, checked before any work is done."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from diffrep.config import FeatureRequest
from diffrep.errors import ConfigError
from diffrep.noise import image_digest

if TYPE_CHECKING:
    from diffrep.backbones import Backbone, Posterior


def check_batch(
    backbone: Backbone,
    request: FeatureRequest,
    images: torch.Tensor | None,
    ids: list[str] | None,
    noise: torch.Tensor | None,
    posterior_noise: torch.Tensor | None,
    posterior: Posterior | None = None,
) -> tuple[list[str], tuple[int, int]]:
    """Checks images, ids and noise against each other and the request; arguments as for `Extractor`.

    Returns:
        The id of each image, and (height, width) of the images in pixels.

    Raises:
        ConfigError: Something has the wrong shape or range, is missing, or would not be used.
    """
    generated = request.noise == "generation"
    if posterior_noise is not None and not (request.posterior == "sample" and backbone.codec.random and not generated):
        raise ConfigError(
            "posterior_noise was given and would not be used; it needs posterior='sample', a VAE and images"
        )
    if generated:
        return _check_generation(backbone, request, images, posterior, ids, noise)
    if posterior is not None:
        count, size = _check_posterior(backbone, request, images, posterior, ids)
    elif images is None:
        raise ConfigError(f"images is None, which goes with noise='generation', and noise is {request.noise!r}")
    else:
        _check_images(backbone, images)
        count, size = len(images), tuple(images.shape[-2:])
    if ids is not None and len(ids) != count:
        raise ConfigError(f"{len(ids)} ids for {count} images")
    if noise is not None and request.noise != "gaussian":
        raise ConfigError(f"noise was given and the request says noise={request.noise!r}")
    if noise is not None and not any(backbone.schedule.level(spec).noise for spec in request.levels):
        raise ConfigError("noise was given and every level of the request is clean")
    for name, given in (("noise", noise), ("posterior_noise", posterior_noise)):
        if given is not None:
            expected = (count, request.draws, backbone.in_channels, *backbone.codec.latent_size(*size))
            if tuple(given.shape) != expected:
                raise ConfigError(f"{name} must be (B, draws, C, h, w) = {expected}, got {tuple(given.shape)}")
    return ids or [image_digest(image) for image in images], size


def _check_images(backbone: Backbone, images: torch.Tensor) -> None:
    channels = backbone.image_channels
    if images.ndim != 4 or images.shape[1] != channels or not images.is_floating_point():
        raise ConfigError(
            f"images must be floats (B, {channels}, H, W) in [0, 1], got {images.dtype} {tuple(images.shape)}"
        )
    if len(images) and not (images.min() >= 0 and images.max() <= 1):
        raise ConfigError(f"images must lie in [0, 1], got {images.min():.3g} to {images.max():.3g}")


def _check_posterior(
    backbone: Backbone,
    request: FeatureRequest,
    images: torch.Tensor | None,
    posterior: Posterior,
    ids: list[str] | None,
) -> tuple[int, tuple[int, int]]:
    if images is not None:
        raise ConfigError("images and their posterior were given; give one of them")
    if ids is None:
        raise ConfigError("a posterior needs ids: without the images there are no pixels to take them from")
    mean, std = posterior.mean, posterior.std
    if mean.ndim != 4 or mean.shape[1] != backbone.in_channels or (std is not None and std.shape != mean.shape):
        shapes = f"{tuple(mean.shape)} and {None if std is None else tuple(std.shape)}"
        raise ConfigError(f"a posterior's mean and std are (B, {backbone.in_channels}, h, w), got {shapes}")
    if std is None and request.posterior == "sample" and backbone.codec.random:
        raise ConfigError("posterior='sample' needs the std of the posterior, and its mean alone was given")
    height, width = (side * backbone.codec.downscale for side in mean.shape[-2:])
    return len(mean), (height, width)


def _check_generation(
    backbone: Backbone,
    request: FeatureRequest,
    images: torch.Tensor | None,
    posterior: Posterior | None,
    ids: list[str] | None,
    noise: torch.Tensor | None,
) -> tuple[list[str], tuple[int, int]]:
    if images is not None or posterior is not None:
        raise ConfigError("noise='generation' makes its own images; give None for images, and ids or noise")
    if not ids and noise is None:
        raise ConfigError("noise='generation' makes an image for each id; give ids, or noise to start from")
    if noise is None:
        return ids, (backbone.image_size, backbone.image_size)
    expected = (request.draws, backbone.in_channels)
    if noise.ndim != 5 or tuple(noise.shape[1:3]) != expected or not noise.is_floating_point() or not len(noise):
        raise ConfigError(
            f"noise must be floats (B, draws, C, h, w) = (B, {expected[0]}, {expected[1]}, h, w), got {noise.dtype} "
            f"{tuple(noise.shape)}"
        )
    if ids is not None and len(ids) != len(noise):
        raise ConfigError(f"{len(ids)} ids for noise of {len(noise)} images")
    height, width = (side * backbone.codec.downscale for side in noise.shape[-2:])
    return ids or [image_digest(one) for one in noise], (height, width)
