"""Runs a plan on batches of images."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch

from diffrep.backbones.conditioning import select_rows
from diffrep.config import FeatureRequest
from diffrep.errors import ConfigError, DiffrepError
from diffrep.extract.batch import check_batch
from diffrep.extract.features import Features
from diffrep.extract.plan import Leg, Plan, make_plan
from diffrep.extract.pooling import pooled
from diffrep.extract.trajectory import Guidance, walk
from diffrep.noise import Level, mix, sample_noise

if TYPE_CHECKING:
    from diffrep.backbones import Backbone, Posterior
    from diffrep.backbones.conditioning import Cond, Condition


class Extractor:
    """Reads one request from many batches of images of one size.

    Args:
        backbone: The frozen network.
        request: What is wanted.
        batch_size: Rows of one forward; images, levels and draws share it.
        whole: Run trajectories to their end, whatever level is the last one wanted. Generations always are.

    Raises:
        LayerError: A layer does not exist.
        ConfigError: A level is outside the schedule.
    """

    def __init__(self, backbone: Backbone, request: FeatureRequest, batch_size: int = 64, whole: bool = False):
        self.backbone = backbone
        self.request = request
        self.batch_size = batch_size
        self.whole = whole
        self._plans: dict[tuple[Any, ...], Plan] = {}

    def plan(
        self, height: int, width: int, condition: Condition | None = None, uncond: Condition | None = None
    ) -> Plan:
        """Returns the plan for images of (height, width) pixels; see `make_plan`."""
        shapes = [tuple(tuple(row.shape[1:]) for row in (rows or {}).values()) for rows in (condition, uncond)]
        key = (height, width, *shapes)
        if key not in self._plans:
            self._plans[key] = make_plan(self.backbone, self.request, height, width, condition, uncond, self.whole)
        return self._plans[key]

    @torch.no_grad()
    def __call__(
        self,
        images: torch.Tensor | None,
        ids: list[str] | None = None,
        cond: Cond = None,
        noise: torch.Tensor | None = None,
        posterior_noise: torch.Tensor | None = None,
        uncond: Cond = None,
    ) -> Features:
        """Reads a batch; arguments as for `extract`."""
        ids, size = check_batch(self.backbone, self.request, images, ids, noise, posterior_noise)
        condition = self.backbone.condition(cond, len(ids))
        guidance = self._guidance(cond, uncond, len(ids))
        plan = self.plan(*size, condition, None if guidance is None else guidance.null)
        if images is None:
            posterior, latent = None, tuple(side // self.backbone.codec.downscale for side in size)
        else:
            posterior = self._encode(images)
            latent = tuple(posterior.mean.shape[-2:])
        shape = (self.backbone.in_channels, *latent)
        given = {"noise": noise, "posterior": posterior_noise}
        batch = _Batch(self.request.seed, ids, shape, posterior, given, condition, guidance)
        features = {
            name: torch.empty((len(plan.draws), len(ids), *one), dtype=getattr(torch, self.request.dtype))
            for name, one in plan.shapes.items()
        }
        ends = {}
        if plan.legs:
            ends = {leg.trajectory.name: self._read_leg(plan, leg, batch, features) for leg in plan.legs}
        else:
            self._read_levels(plan, batch, features)
        tensors = {
            (name, key): features[name][index] for name in plan.addresses for index, key in enumerate(plan.draws)
        }
        _check_finite(tensors, ids, self.request.dtype)
        ends = {name: end for name, end in ends.items() if end is not None}
        return Features(tensors, ids, plan.levels, plan.aliases, ends)

    def _guidance(self, cond: Cond, uncond: Cond, count: int) -> Guidance | None:
        scale = self.request.guidance
        if scale == 1:
            if uncond is not None:
                raise ConfigError("uncond was given and would not be used; it needs a guidance other than 1")
            return None
        if cond is None and uncond is None:
            raise ConfigError(f"guidance={scale:g} needs cond: without it both calls of a step would be the same")
        try:
            return Guidance(scale, self.backbone.condition(uncond, count))
        except ConfigError as error:
            raise ConfigError(f"guidance={scale:g} calls the network without a condition too: {error}") from error

    def _encode(self, images: torch.Tensor) -> Posterior:
        parts = [self.backbone.codec.encode(part.to(self.backbone.device)) for part in images.split(self.batch_size)]
        mean = torch.cat([part.mean.float() for part in parts])
        sampled = self.request.posterior == "sample" and parts[0].std is not None
        std = torch.cat([part.std.float() for part in parts]) if sampled else None
        return type(parts[0])(mean, std)

    # Levels one by one --------------------------------------------------------------------------------------------

    def _read_levels(self, plan: Plan, batch: _Batch, features: dict[str, torch.Tensor]) -> None:
        levels = list(plan.levels.levels.values())
        by_draws = sorted(range(len(levels)), key=lambda i: plan.draws[levels[i].key])
        for draws, group in groupby(by_draws, key=lambda i: plan.draws[levels[i].key]):
            group = list(group)
            cells = [(image, level) for image in range(len(batch.ids)) for level in group]
            share = max(1, self.batch_size // draws)
            for start in range(0, len(cells), share):
                part = cells[start : start + share]
                means = self._mean_over_draws(plan, batch, levels, part, draws)
                image, level = (torch.tensor(index) for index in zip(*part, strict=True))
                for name, mean in means.items():
                    features[name][level, image] = mean.to(features[name].dtype).cpu()

    def _mean_over_draws(
        self, plan: Plan, batch: _Batch, levels: list[Level], cells: list[tuple[int, int]], draws: int
    ) -> dict[str, torch.Tensor]:
        """Returns the pooled features of (image, level) cells in fp32, averaged over their draws."""
        sums: dict[str, torch.Tensor] = {}
        for first in range(0, draws, self.batch_size):
            numbers = range(first, min(first + self.batch_size, draws))
            rows = [(image, levels[level], number) for image, level in cells for number in numbers]
            x, time = self._inputs(batch, rows)
            mine = select_rows(batch.condition, [image for image, _, _ in rows])
            found = self.backbone.capture(x, time, list(plan.addresses), mine, tokens=self.request.tokens)
            for name, feature in found.items():
                part = pooled(feature.float(), self.request.pool)
                if len(numbers) > 1:
                    part = part.view(len(cells), len(numbers), *part.shape[1:]).sum(1)
                sums[name] = sums[name] + part if name in sums else part
        return {name: total / draws for name, total in sums.items()} if draws > 1 else sums

    def _inputs(self, batch: _Batch, rows: list[tuple[int, Level, int]]) -> tuple[torch.Tensor, torch.Tensor]:
        device = self.backbone.device
        seeds = [(image, level.key, number) for image, level, number in rows]
        x = batch.clean(seeds)
        time = torch.tensor([level.time for _, level, _ in rows], device=device)
        if self.request.noise == "gaussian" and any(level.noise for _, level, _ in rows):
            signal = torch.tensor([level.signal for _, level, _ in rows], device=device)
            scale = torch.tensor([level.noise for _, level, _ in rows], device=device)
            x = mix(x, batch.draw("noise", seeds).to(device), signal, scale)
        return x, time

    # Trajectories -------------------------------------------------------------------------------------------------

    def _read_leg(self, plan: Plan, leg: Leg, batch: _Batch, features: dict[str, torch.Tensor]) -> torch.Tensor | None:
        """Reads one trajectory of each image; returns its end (B, draws, C, h, w), where it is run so far."""
        share = max(1, self.batch_size // leg.draws)
        images = range(len(batch.ids))
        parts = [images[start : start + share] for start in range(0, len(images), share)]
        ends = [self._read_part(plan, leg, batch, part, features) for part in parts]
        if leg.full < leg.trajectory.updates or not ends:
            return None
        end = torch.cat(ends)
        if not torch.isfinite(end).all():
            raise DiffrepError(f"the {leg.trajectory.name} ends in NaN or infinity; try more steps, or float32")
        last = leg.trajectory.end or leg.trajectory.levels[-1]
        return end if batch.posterior is None else end / self.backbone.schedule.spread(last)

    def _read_part(
        self, plan: Plan, leg: Leg, batch: _Batch, images: range, features: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        """Does so for images whose rows fit into a batch, or for one; averages over draws in fp32."""
        places = {key: place for place, key in enumerate(plan.draws)}
        sums: dict[tuple[str, str], torch.Tensor] = {}
        ends = []
        for first in range(0, leg.draws, self.batch_size):
            numbers = range(first, min(first + self.batch_size, leg.draws))
            rows = [(image, number) for image in images for number in numbers]
            mine = batch.of([image for image, _ in rows])
            x = self._start(leg, batch, rows)
            for step in walk(self.backbone, leg, x, plan.addresses, *mine, self.request.tokens):
                for name, feature in step.features.items():
                    part = pooled(feature.float(), self.request.pool)
                    total = part.view(len(images), len(numbers), *part.shape[1:]).sum(1)
                    total = sums.pop((name, step.level.key), 0) + total
                    if numbers.stop < leg.draws:
                        sums[name, step.level.key] = total
                        continue
                    target = features[name][places[step.level.key]]
                    target[images.start : images.stop] = (total / leg.draws).to(target.dtype).cpu()
                step.features.clear()
            ends.append(step.x.view(len(images), len(numbers), *batch.shape).cpu())
        return torch.cat(ends, dim=1)

    def _start(self, leg: Leg, batch: _Batch, rows: list[tuple[int, int]]) -> torch.Tensor:
        # The levels of a trajectory share its start; so do trajectories of other numbers of steps.
        seeds = [(image, leg.trajectory.direction, number) for image, number in rows]
        if batch.posterior is not None:
            return batch.clean(seeds)
        return self.backbone.schedule.spread(leg.trajectory.levels[0]) * batch.draw("noise", seeds)


def extract(
    backbone: Backbone,
    images: torch.Tensor | None,
    request: FeatureRequest,
    ids: list[str] | None = None,
    cond: Cond = None,
    noise: torch.Tensor | None = None,
    posterior_noise: torch.Tensor | None = None,
    batch_size: int = 64,
    uncond: Cond = None,
    whole: bool = False,
) -> Features:
    """Reads everything a request names from a batch of images.

    Each image is encoded once; each (level, draw) is one forward of the truncated network; draws are averaged in fp32.
    Along a trajectory each draw is one run, of whole calls up to the last level wanted. A generation makes its images
    itself, as many as there are ids, at the network's native size, or from the noise that is given.

    Args:
        backbone: The frozen network.
        images: (B, image_channels, H, W) in [0, 1]; None for a generation.
        request: What is wanted.
        ids: A stable id for each image, which seeds its noise; None uses the SHA-256 of its pixels, or of its noise.
        cond: Condition, for the whole batch or one for each image: labels, prompts, embeddings, or a dict of tensors.
        noise: (B, draws, C, h, w) in place of the seeded noise; the same for all levels. A generation starts from it.
        posterior_noise: (B, draws, C, h, w) in place of the seeded posterior draws.
        batch_size: Rows of one forward.
        uncond: Condition of guidance's other call, such as a negative prompt; None is the network's null condition.
        whole: Run an inversion on to its end, for `Features.final`; a generation always is.

    Raises:
        ConfigError: An argument has the wrong shape or range.
        LayerError: A layer does not exist or did not run.
        DiffrepError: A feature is not finite.
    """
    return Extractor(backbone, request, batch_size, whole)(images, ids, cond, noise, posterior_noise, uncond)


# What noise is drawn for: an image's place in its batch, the key of its level or the direction of its trajectory, and
# the number of the draw.
Seed = tuple[int, str, int]


@dataclass(frozen=True)
class _Batch:
    """A batch: what is known of its clean samples, and its noise, given by the caller or a function of the sample.

    Attributes:
        seed: The request's.
        ids: Of the samples.
        shape: (C, h, w) of the network's input.
        posterior: Of the encoded images; None for a generation.
        given: Noise by purpose, (B, draws, C, h, w), or None.
        condition: One row for all or one for each sample.
        guidance: Likewise.
    """

    seed: int
    ids: list[str]
    shape: tuple[int, ...]
    posterior: Posterior | None
    given: dict[str, torch.Tensor | None]
    condition: Condition
    guidance: Guidance | None

    def draw(self, purpose: str, seeds: list[Seed]) -> torch.Tensor:
        given = self.given[purpose]
        if given is not None:
            return torch.stack([given[image, number] for image, _, number in seeds]).float()
        return torch.stack(
            [
                sample_noise(self.shape, self.seed, self.ids[image], key, number, purpose)
                for image, key, number in seeds
            ]
        )

    def clean(self, seeds: list[Seed]) -> torch.Tensor:
        mean, std = self.posterior.mean, self.posterior.std
        index = torch.tensor([image for image, _, _ in seeds], device=mean.device)
        return mean[index] if std is None else mean[index] + std[index] * self.draw("posterior", seeds).to(mean.device)

    def of(self, index: list[int]) -> tuple[Condition, Guidance | None]:
        guidance = self.guidance
        if guidance is not None:
            guidance = Guidance(guidance.scale, select_rows(guidance.null, index))
        return select_rows(self.condition, index), guidance


def _check_finite(tensors: dict[tuple[str, str], torch.Tensor], ids: list[str], dtype: str) -> None:
    for (layer, level), tensor in tensors.items():
        # torch casts to eight bits with saturation: what was larger, or infinite, is now the largest value.
        narrow = tensor.dtype == torch.float8_e4m3fn
        finite = (tensor.float().abs() < torch.finfo(tensor.dtype).max) if narrow else torch.isfinite(tensor)
        finite = finite.flatten(1).all(1)
        if not finite.all():
            bad = [ids[i] for i in (~finite).nonzero().flatten().tolist()]
            raise DiffrepError(
                f"features of {layer}@{level} are not finite for {len(bad)} images, first {bad[0]!r}: the network "
                f"gave NaN or infinity, or values beyond {dtype}; try dtype float32 for request and backbone"
            )
