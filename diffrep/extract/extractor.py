"""Runs a plan on batches of images."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch

from diffrep.backbones.codec import Posterior
from diffrep.backbones.conditioning import select_rows
from diffrep.config import FeatureRequest
from diffrep.errors import ConfigError, DiffrepError
from diffrep.extract.batch import check_batch
from diffrep.extract.features import Features
from diffrep.extract.memory import Batching
from diffrep.extract.plan import Leg, Plan, make_plan
from diffrep.extract.pooling import pooled
from diffrep.extract.trajectory import Guidance, walk
from diffrep.extract.transfer import Collected, sent
from diffrep.noise import Level, mix, sample_noise

if TYPE_CHECKING:
    from diffrep.backbones import Backbone
    from diffrep.backbones.conditioning import Cond, Condition


class Extractor:
    """Reads one request from many batches of images of one size.

    Args:
        backbone: The frozen network.
        request: What is wanted.
        batch_size: Rows of one forward; images, levels and draws share it.
        whole: Run trajectories to their end, whatever level is the last one wanted. Generations always are.
        pad: Fill every forward, of network and codec, up to `batch_size` rows, so that all have one shape.
        adaptive: Halve the rows of a forward when the device runs out of memory, with a warning, and go on.

    Raises:
        LayerError: A layer does not exist.
        ConfigError: A level is outside the schedule, or the backbone records CUDA graphs and `pad` is off.
    """

    def __init__(
        self,
        backbone: Backbone,
        request: FeatureRequest,
        batch_size: int = 64,
        whole: bool = False,
        pad: bool = False,
        adaptive: bool = False,
    ):
        if backbone.compile_mode == "cudagraphs" and not pad:
            raise ConfigError("compile=cudagraphs replays forwards of one shape, so it needs pad=true")
        self.backbone = backbone
        self.request = request
        self.whole = whole
        self.pad, self.adaptive = pad, adaptive
        self._forwards = Batching(batch_size, adaptive, pad, "forward")
        # An encoder needs more memory than the network; where it has to do with less, the network need not.
        self._encodings = Batching(batch_size, adaptive, pad, "encoding")
        self._plans: dict[tuple[Any, ...], Plan] = {}

    @property
    def batch_size(self) -> int:
        """Rows of one forward, as they are now."""
        return self._forwards.rows

    @batch_size.setter
    def batch_size(self, rows: int) -> None:
        self._forwards.rows = self._encodings.rows = rows

    def with_batch_size(self, rows: int) -> Extractor:
        """Returns an extractor of the same, with the plans of this one, that keeps to a number of rows."""
        twin = Extractor(self.backbone, self.request, rows, self.whole, self.pad)
        twin._plans = self._plans  # to plan takes longer than to run a small network
        return twin

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
        posterior: Posterior | None = None,
    ) -> Features:
        """Reads a batch; arguments as for `extract`, and `posterior` in place of images, as `encode` gives it."""
        ids, size = check_batch(self.backbone, self.request, images, ids, noise, posterior_noise, posterior)
        condition = self.backbone.condition(cond, len(ids))
        guidance = self._guidance(cond, uncond, len(ids))
        plan = self.plan(*size, condition, None if guidance is None else guidance.null)
        if images is not None:
            posterior = self.encode(images)
        elif posterior is not None:
            posterior = self._on_device(posterior)
        downscale = self.backbone.codec.downscale
        latent = tuple(side // downscale for side in size) if posterior is None else posterior.mean.shape[-2:]
        shape = (self.backbone.in_channels, *latent)
        given = {"noise": noise, "posterior": posterior_noise}
        batch = _Batch(self.request.seed, ids, shape, posterior, given, condition, guidance, self.backbone.device)
        found = Collected(plan, len(ids), self.backbone.device)
        parts = [self._read_leg(plan, leg, batch, found) for leg in plan.legs]
        if not plan.legs:
            self._read_levels(plan, batch, found)
        features = found.features()
        tensors = {
            (name, key): features[name][index] for name in plan.addresses for index, key in enumerate(plan.draws)
        }
        _check_finite(tensors, ids, self.request.dtype)
        ends = {
            leg.trajectory.name: self._end(leg, part, batch)
            for leg, part in zip(plan.legs, parts, strict=True)
            if part
        }
        return Features(tensors, ids, plan.levels, plan.aliases, ends)

    @torch.no_grad()
    def encode(self, images: torch.Tensor) -> Posterior:
        """Returns the codec's posterior of images (B, image_channels, H, W) in [0, 1], on the device in fp32.

        Its std is left out where the request takes the mode.

        Raises:
            OutOfMemory: The device has no memory for it.
        """
        parts: list[Posterior] = []

        def work(part: range) -> None:
            some = sent(images[part.start : part.stop], self.backbone.device)
            found = self.backbone.codec.encode(self._encodings.filled(some))
            std = None if found.std is None else found.std[: len(some)]
            parts.append(self._on_device(Posterior(found.mean[: len(some)], std)))

        self._encodings.run(max(1, len(images)), 1, work)
        std = None if parts[0].std is None else torch.cat([part.std for part in parts])
        return Posterior(torch.cat([part.mean for part in parts]), std)

    def _on_device(self, posterior: Posterior) -> Posterior:
        sampled = self.request.posterior == "sample" and posterior.std is not None
        parts = (posterior.mean, posterior.std if sampled else None)
        return Posterior(*(None if part is None else sent(part, self.backbone.device).float() for part in parts))

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

    # Levels one by one --------------------------------------------------------------------------------------------

    def _read_levels(self, plan: Plan, batch: _Batch, found: Collected) -> None:
        levels = list(plan.levels.levels.values())
        by_draws = sorted(range(len(levels)), key=lambda i: plan.draws[levels[i].key])
        for draws, group in groupby(by_draws, key=lambda i: plan.draws[levels[i].key]):
            group = list(group)
            cells = [(image, level) for image in range(len(batch.ids)) for level in group]

            def work(part: range, cells: list[tuple[int, int]] = cells, draws: int = draws) -> None:
                some = cells[part.start : part.stop]
                for name, mean in self._mean_over_draws(plan, batch, levels, some, draws).items():
                    image, level = (torch.tensor(index) for index in zip(*some, strict=True))
                    found.put(name, (level, image), mean)

            self._forwards.run(len(cells), draws, work)

    def _mean_over_draws(
        self, plan: Plan, batch: _Batch, levels: list[Level], cells: list[tuple[int, int]], draws: int
    ) -> dict[str, torch.Tensor]:
        """Returns the pooled features of (image, level) cells in fp32, averaged over their draws."""
        sums: dict[str, torch.Tensor] = {}
        for first in range(0, draws, self.batch_size):
            numbers = range(first, min(first + self.batch_size, draws))
            rows = [(image, levels[level], number) for image, level in cells for number in numbers]
            x, time = (self._forwards.filled(part) for part in self._inputs(batch, rows))
            mine, _ = batch.of([image for image, _, _ in rows], len(x))
            captured = self.backbone.capture(x, time, list(plan.addresses), mine, tokens=self.request.tokens)
            for name, feature in captured.items():
                part = pooled(feature[: len(rows)].float(), self.request.pool)
                if len(numbers) > 1:
                    part = part.view(len(cells), len(numbers), *part.shape[1:]).sum(1)
                sums[name] = sums[name] + part if name in sums else part
        return {name: total / draws for name, total in sums.items()} if draws > 1 else sums

    def _inputs(self, batch: _Batch, rows: list[tuple[int, Level, int]]) -> tuple[torch.Tensor, torch.Tensor]:
        device = self.backbone.device
        seeds = [(image, level.key, number) for image, level, number in rows]
        x = batch.clean(seeds)
        time = sent(torch.tensor([level.time for _, level, _ in rows]), device)
        if self.request.noise == "gaussian" and any(level.noise for _, level, _ in rows):
            signal = sent(torch.tensor([level.signal for _, level, _ in rows]), device)
            scale = sent(torch.tensor([level.noise for _, level, _ in rows]), device)
            x = mix(x, sent(batch.draw("noise", seeds), device), signal, scale)
        return x, time

    # Trajectories -------------------------------------------------------------------------------------------------

    def _read_leg(self, plan: Plan, leg: Leg, batch: _Batch, found: Collected) -> list[torch.Tensor]:
        """Reads one trajectory of each image; returns its ends (n, draws, C, h, w), some images after the other."""
        ends: list[torch.Tensor] = []

        def work(images: range) -> None:
            end = self._read_part(plan, leg, batch, images, found)
            if leg.full == leg.trajectory.updates:
                ends.append(found.outbox.send(end))

        self._forwards.run(len(batch.ids), leg.draws, work)
        return ends

    def _end(self, leg: Leg, ends: list[torch.Tensor], batch: _Batch) -> torch.Tensor:
        end = torch.cat(ends)
        if not torch.isfinite(end).all():
            raise DiffrepError(f"the {leg.trajectory.name} ends in NaN or infinity; try more steps, or float32")
        last = leg.trajectory.end or leg.trajectory.levels[-1]
        return end if batch.posterior is None else end / self.backbone.schedule.spread(last)

    def _read_part(self, plan: Plan, leg: Leg, batch: _Batch, images: range, found: Collected) -> torch.Tensor:
        """Does so for images whose rows fit into a batch, or for one, and returns their ends (n, draws, C, h, w).

        Features are averaged over draws in fp32.
        """
        places = {key: place for place, key in enumerate(plan.draws)}
        sums: dict[tuple[str, str], torch.Tensor] = {}
        ends = []
        for first in range(0, leg.draws, self.batch_size):
            numbers = range(first, min(first + self.batch_size, leg.draws))
            rows = [(image, number) for image in images for number in numbers]
            x = self._forwards.filled(self._start(leg, batch, rows))
            mine = batch.of([image for image, _ in rows], len(x))
            for step in walk(self.backbone, leg, x, plan.addresses, *mine, self.request.tokens):
                for name, feature in step.features.items():
                    part = pooled(feature[: len(rows)].float(), self.request.pool)
                    total = part.view(len(images), len(numbers), *part.shape[1:]).sum(1)
                    total = sums.pop((name, step.level.key), 0) + total
                    if numbers.stop < leg.draws:
                        sums[name, step.level.key] = total
                        continue
                    found.put(name, (places[step.level.key], slice(images.start, images.stop)), total / leg.draws)
                step.features.clear()
            ends.append(step.x[: len(rows)].view(len(images), len(numbers), *batch.shape))
        return torch.cat(ends, dim=1)

    def _start(self, leg: Leg, batch: _Batch, rows: list[tuple[int, int]]) -> torch.Tensor:
        # The levels of a trajectory share its start; so do trajectories of other numbers of steps.
        seeds = [(image, leg.trajectory.direction, number) for image, number in rows]
        if batch.posterior is not None:
            return batch.clean(seeds)
        noise = sent(batch.draw("noise", seeds), self.backbone.device)
        return self.backbone.schedule.spread(leg.trajectory.levels[0]) * noise


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
        OutOfMemory: The device has no memory for a batch of this size.
    """
    extractor = Extractor(backbone, request, batch_size, whole, pad=backbone.compile_mode == "cudagraphs")
    return extractor(images, ids, cond, noise, posterior_noise, uncond)


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
        device: Where the network is.
    """

    seed: int
    ids: list[str]
    shape: tuple[int, ...]
    posterior: Posterior | None
    given: dict[str, torch.Tensor | None]
    condition: Condition
    guidance: Guidance | None
    device: torch.device

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
        index = sent(torch.tensor([image for image, _, _ in seeds]), self.device)
        if std is None:
            return mean[index]
        return mean[index] + std[index] * sent(self.draw("posterior", seeds), self.device)

    def of(self, index: list[int], rows: int) -> tuple[Condition, Guidance | None]:
        """Returns condition and guidance of some samples, the last one repeated up to a number of rows."""
        index = index + index[-1:] * (rows - len(index))
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
