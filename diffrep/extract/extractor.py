"""Runs a plan on batches of images."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F

from diffrep.backbones.conditioning import select_rows
from diffrep.config import FeatureRequest, LevelSpec
from diffrep.errors import ConfigError, DiffrepError
from diffrep.extract.features import Features
from diffrep.extract.plan import Plan, make_plan
from diffrep.noise import Level, image_digest, mix, sample_noise

if TYPE_CHECKING:
    from diffrep.backbones import Backbone, Posterior
    from diffrep.backbones.conditioning import Cond, Condition


class Extractor:
    """Reads one request from many batches of images of one size.

    Args:
        backbone: The frozen network.
        request: What is wanted.
        batch_size: Rows of one forward; images, levels and draws share it.

    Raises:
        LayerError: A layer does not exist.
        ConfigError: A level is outside the schedule.
    """

    def __init__(self, backbone: Backbone, request: FeatureRequest, batch_size: int = 64):
        self.backbone = backbone
        self.request = request
        self.batch_size = batch_size
        self._plans: dict[tuple[Any, ...], Plan] = {}

    def plan(self, height: int, width: int, condition: Condition | None = None) -> Plan:
        """Returns the plan for images of (height, width) pixels; see `make_plan`."""
        key = (height, width, *(tuple(row.shape[1:]) for row in (condition or {}).values()))
        if key not in self._plans:
            self._plans[key] = make_plan(self.backbone, self.request, height, width, condition)
        return self._plans[key]

    @torch.no_grad()
    def __call__(
        self,
        images: torch.Tensor,
        ids: list[str] | None = None,
        cond: Cond = None,
        noise: torch.Tensor | None = None,
        posterior_noise: torch.Tensor | None = None,
    ) -> Features:
        """Reads a batch; arguments as for `extract`."""
        self._check(images, ids, noise, posterior_noise)
        condition = self.backbone.condition(cond, len(images))
        plan = self.plan(*images.shape[-2:], condition)
        ids = ids or [image_digest(image) for image in images]
        posterior = self._encode(images)
        draw = _Draws(self.request, ids, noise, posterior_noise)
        levels = list(plan.levels.levels.values())
        dtype = getattr(torch, self.request.dtype)
        features = {
            name: torch.empty((len(levels), len(images), *shape), dtype=dtype) for name, shape in plan.shapes.items()
        }
        by_draws = sorted(range(len(levels)), key=lambda i: plan.draws[levels[i].key])
        for draws, group in groupby(by_draws, key=lambda i: plan.draws[levels[i].key]):
            group = list(group)
            cells = [(image, level) for image in range(len(images)) for level in group]
            share = max(1, self.batch_size // draws)
            for start in range(0, len(cells), share):
                part = cells[start : start + share]
                means = self._mean_over_draws(plan, posterior, levels, part, draws, draw, condition)
                image, level = (torch.tensor(index) for index in zip(*part, strict=True))
                for name, mean in means.items():
                    features[name][level, image] = mean.to(dtype).cpu()
        tensors = {
            (name, level.key): features[name][index] for name in plan.addresses for index, level in enumerate(levels)
        }
        _check_finite(tensors, ids, self.request.dtype)
        return Features(tensors, ids, plan.levels, plan.aliases)

    def _encode(self, images: torch.Tensor) -> Posterior:
        parts = [self.backbone.codec.encode(part.to(self.backbone.device)) for part in images.split(self.batch_size)]
        mean = torch.cat([part.mean.float() for part in parts])
        sampled = self.request.posterior == "sample" and parts[0].std is not None
        std = torch.cat([part.std.float() for part in parts]) if sampled else None
        return type(parts[0])(mean, std)

    def _mean_over_draws(
        self,
        plan: Plan,
        posterior: Posterior,
        levels: list[Level],
        cells: list[tuple[int, int]],
        draws: int,
        draw: _Draws,
        condition: Condition,
    ) -> dict[str, torch.Tensor]:
        """Returns the pooled features of (image, level) cells in fp32, averaged over their draws."""
        sums: dict[str, torch.Tensor] = {}
        for first in range(0, draws, self.batch_size):
            numbers = range(first, min(first + self.batch_size, draws))
            rows = [(image, levels[level], number) for image, level in cells for number in numbers]
            x, time = self._inputs(posterior, rows, draw)
            mine = select_rows(condition, [image for image, _, _ in rows])
            found = self.backbone.capture(x, time, list(plan.addresses), mine, tokens=self.request.tokens)
            for name, feature in found.items():
                pooled = _pool(feature.float(), self.request.pool)
                if len(numbers) > 1:
                    pooled = pooled.view(len(cells), len(numbers), *pooled.shape[1:]).sum(1)
                sums[name] = sums[name] + pooled if name in sums else pooled
        return {name: total / draws for name, total in sums.items()} if draws > 1 else sums

    def _inputs(
        self, posterior: Posterior, rows: list[tuple[int, Level, int]], draw: _Draws
    ) -> tuple[torch.Tensor, torch.Tensor]:
        device = posterior.mean.device
        shape = posterior.mean.shape[1:]
        index = torch.tensor([image for image, _, _ in rows], device=device)
        x = posterior.mean[index]
        if posterior.std is not None:
            x = x + posterior.std[index] * draw.stack("posterior", rows, shape).to(device)
        time = torch.tensor([level.time for _, level, _ in rows], device=device)
        if self.request.noise == "gaussian" and any(level.noise for _, level, _ in rows):
            signal = torch.tensor([level.signal for _, level, _ in rows], device=device)
            scale = torch.tensor([level.noise for _, level, _ in rows], device=device)
            x = mix(x, draw.stack("noise", rows, shape).to(device), signal, scale)
        return x, time

    def _has_noise(self, spec: LevelSpec) -> bool:
        return self.backbone.schedule.level(spec).noise > 0

    def _check(
        self,
        images: torch.Tensor,
        ids: list[str] | None,
        noise: torch.Tensor | None,
        posterior_noise: torch.Tensor | None,
    ) -> None:
        channels = self.backbone.image_channels
        if images.ndim != 4 or images.shape[1] != channels or not images.is_floating_point():
            raise ConfigError(
                f"images must be floats (B, {channels}, H, W) in [0, 1], got {images.dtype} {tuple(images.shape)}"
            )
        if len(images) and not (images.min() >= 0 and images.max() <= 1):
            raise ConfigError(f"images must lie in [0, 1], got {images.min():.3g} to {images.max():.3g}")
        if ids is not None and len(ids) != len(images):
            raise ConfigError(f"{len(ids)} ids for {len(images)} images")
        if noise is not None and self.request.noise == "none":
            raise ConfigError("noise was given and the request says noise='none'")
        if noise is not None and not any(map(self._has_noise, self.request.levels)):
            raise ConfigError("noise was given and every level of the request is clean")
        if posterior_noise is not None and not (self.request.posterior == "sample" and self.backbone.codec.random):
            raise ConfigError("posterior_noise was given and would not be used; it needs posterior='sample' and a VAE")
        if noise is None and posterior_noise is None:
            return
        size = self.backbone.codec.latent_size(*images.shape[-2:])
        expected = (len(images), self.request.draws, self.backbone.in_channels, *size)
        for name, given in (("noise", noise), ("posterior_noise", posterior_noise)):
            if given is not None and tuple(given.shape) != expected:
                raise ConfigError(f"{name} must be (B, draws, C, h, w) = {expected}, got {tuple(given.shape)}")


def extract(
    backbone: Backbone,
    images: torch.Tensor,
    request: FeatureRequest,
    ids: list[str] | None = None,
    cond: Cond = None,
    noise: torch.Tensor | None = None,
    posterior_noise: torch.Tensor | None = None,
    batch_size: int = 64,
) -> Features:
    """Reads everything a request names from a batch of images.

    Each image is encoded once; each (level, draw) is one forward of the truncated network; draws are averaged in fp32.

    Args:
        backbone: The frozen network.
        images: (B, image_channels, H, W) in [0, 1].
        request: What is wanted.
        ids: A stable id for each image, which seeds its noise; None uses the SHA-256 of its pixels.
        cond: Condition, for the whole batch or one for each image: labels, prompts, embeddings, or a dict of tensors.
        noise: (B, draws, C, h, w) in place of the seeded noise; the same for all levels.
        posterior_noise: (B, draws, C, h, w) in place of the seeded posterior draws.
        batch_size: Rows of one forward.

    Raises:
        ConfigError: An argument has the wrong shape or range.
        LayerError: A layer does not exist or did not run.
        DiffrepError: A feature is not finite.
    """
    return Extractor(backbone, request, batch_size)(images, ids, cond, noise, posterior_noise)


class _Draws:
    """Noise for rows of a batch: given by the caller, or a function of the sample."""

    def __init__(
        self,
        request: FeatureRequest,
        ids: list[str],
        noise: torch.Tensor | None,
        posterior_noise: torch.Tensor | None,
    ):
        self.seed = request.seed
        self.ids = ids
        self.given = {"noise": noise, "posterior": posterior_noise}

    def stack(self, purpose: str, rows: list[tuple[int, Level, int]], shape: torch.Size) -> torch.Tensor:
        given = self.given[purpose]
        if given is not None:
            return torch.stack([given[image, number] for image, _, number in rows]).float()
        return torch.stack(
            [
                sample_noise(shape, self.seed, self.ids[image], level.key, number, purpose)
                for image, level, number in rows
            ]
        )


def _pool(feature: torch.Tensor, pool: str | int) -> torch.Tensor:
    if pool == "none":
        return feature
    if feature.ndim == 3:
        return feature.mean(1)
    if pool == "mean":
        return feature.mean((2, 3))
    grid = (min(pool, feature.shape[2]), min(pool, feature.shape[3]))
    return F.adaptive_avg_pool2d(feature, grid)


def _check_finite(tensors: dict[tuple[str, str], torch.Tensor], ids: list[str], dtype: str) -> None:
    for (layer, level), tensor in tensors.items():
        finite = torch.isfinite(tensor).flatten(1).all(1)
        if not finite.all():
            bad = [ids[i] for i in (~finite).nonzero().flatten().tolist()]
            raise DiffrepError(
                f"features of {layer}@{level} are not finite for {len(bad)} images, first {bad[0]!r}: the network "
                f"gave NaN or infinity, or values beyond {dtype}; try dtype float32 for request and backbone"
            )
