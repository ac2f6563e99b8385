"""Samplers: from noise to the network's input space, for flows, discrete schedules and EDM, with guidance."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from diffusers import DDIMScheduler, DDPMParallelScheduler

from diffrep.backbones import Backbone
from diffrep.backbones.codec import IdentityCodec
from diffrep.backbones.conditioning import Cond, Condition, Unconditional
from diffrep.config import SamplerConfig
from diffrep.errors import ConfigError
from diffrep.noise import DiscreteSchedule, FlowSchedule, Level, Schedule, SigmaSchedule, solve

# Fresh unit noise (B, C, h, w) of a step, which is counted from 0 at the most noise.
StepNoise = Callable[[int], torch.Tensor]
# Both directions of time write a bound such as 0.7 with other last digits.
SLACK = 1e-9


@torch.no_grad()
def generate(
    backbone: Backbone,
    config: SamplerConfig,
    start: torch.Tensor,
    cond: Cond = None,
    step_noise: StepNoise | None = None,
) -> torch.Tensor:
    """Makes samples from noise.

    The state is kept in fp64, the network runs in its own dtype. "euler" and "heun" follow the probability flow: of
    flows by the time, else by sigma, which for "euler" is DDIM's path without noise. "heun" with an EDM schedule is
    Karras et al. (2022), algorithm 2, with S_min = 0, S_max infinite and S_noise = 1. "sde" is Euler-Maruyama along
    the reverse SDE of REPA (Yu et al., 2025) and SiT (Ma et al., 2024) with w(s) = 2 s, s the share of the way to
    noise; its last step adds no noise. On the vp path, whose velocity is infinite at the data, the last step of all of
    them gives the clean sample as the network sees it. "ddpm" (Ho et al., 2020) and "ddim" (Song et al., 2021) are
    those of diffusers on the schedule cut down to the steps; see `Respaced`.

    Guidance (Ho and Salimans, 2022) is u + w (c - u) of raw predictions, u those for "no class". Learned variances are
    never guided.

    Args:
        backbone: The network.
        config: Says how.
        start: Unit noise (B, C, h, w).
        cond: Condition of the whole batch or one for each row; None is "no class".
        step_noise: Gives the noise of a step, for methods that add any.

    Returns:
        Samples (B, C, h, w) fp32 in the network's input space, on its device.

    Raises:
        ConfigError: The method does not go with the schedule, the network has no "no class" to guide away from, or a
            method that adds noise is given none.
    """
    schedule = backbone.schedule
    method, levels = method_of(schedule, config), levels_of(schedule, config)
    if step_noise is None and adds_noise(schedule, config):
        raise ConfigError(f"sampler.method={method} adds noise at its steps; give step_noise, or a method without")
    network = _Guided(backbone, config, cond, len(start))
    x = start.to(network.device, torch.float64) * schedule.spread(levels[0])

    def fresh(step: int) -> torch.Tensor:
        return step_noise(step).to(x)

    if method in ("ddpm", "ddim"):
        x = _ancestral(network, config, levels, x, fresh)
    elif method == "sde":
        x = _reverse_sde(network, levels, x, fresh)
    else:
        x = _probability_flow(network, config, levels, x, fresh)
    return x.float()


def method_of(schedule: Schedule, config: SamplerConfig) -> str:
    """Returns the method, "auto" settled.

    Raises:
        ConfigError: The schedule has no such method.
    """
    flow, discrete = isinstance(schedule, FlowSchedule), isinstance(schedule, DiscreteSchedule)
    if config.method == "auto":
        return "euler" if flow else "ddpm" if discrete else "heun"
    kind = "a flow" if flow else "a discrete schedule" if discrete else "EDM's levels"
    fits = ("euler", "heun", *(["sde"] if flow else ["ddpm", "ddim"] if discrete else []))
    if config.method not in fits:
        raise ConfigError(
            f"sampler.method={config.method} does not go with {kind}, which this network was trained on; use "
            f"{', '.join(fits[:-1])} or {fits[-1]}"
        )
    return config.method


def levels_of(schedule: Schedule, config: SamplerConfig) -> list[Level]:
    """Returns the levels at which the steps begin, from the most noise on; a schedule may have fewer than asked for.

    Raises:
        ConfigError: The method does not go with the schedule, or the schedule cannot give so many steps.
    """
    method = method_of(schedule, config)
    if method == "sde":
        shares = np.linspace(schedule.span[1], config.last, config.steps)
        return [schedule.at(abs(schedule.data_time - share) * schedule.scale) for share in shares]
    times = schedule.steps(config.steps)
    if config.steps == 1 and not isinstance(schedule, FlowSchedule):
        times = [schedule.time_range[1]]  # their only step would be the one with the least noise
    levels = [schedule.at(time) for time in reversed(times)]
    if method in ("euler", "heun") and isinstance(schedule, DiscreteSchedule) and not levels[0].signal:
        raise ConfigError(
            f"sampler.method={method} needs some signal at each step and {levels[0].key} has none; use ddim"
        )
    return levels


def adds_noise(schedule: Schedule, config: SamplerConfig) -> bool:
    """Returns whether the method draws noise besides the initial one."""
    method = method_of(schedule, config)
    if method == "ddim":
        return config.eta > 0
    return method in ("ddpm", "sde") or (method == "heun" and _churn(schedule, config) > 0)


def share_of_noise(schedule: Schedule, level: Level) -> float:
    """Returns the share of the way from data to noise, in [0, 1].

    Of flows it is the time counted from the data, over the whole; of discrete schedules the timestep over the last
    one; of EDM sigma / (1 + sigma), the share at which a linear flow has that sigma.
    """
    if isinstance(schedule, FlowSchedule):
        return abs(level.time / schedule.scale - schedule.data_time)
    if isinstance(schedule, DiscreteSchedule):
        return level.time / schedule.time_range[1]
    return level.sigma / (1 + level.sigma)


def evaluations(schedule: Schedule, config: SamplerConfig) -> tuple[int, int]:
    """Returns how often the network is called for an image, and how many of these calls have a second one beside them.

    The first is what papers call NFE; guidance makes the second, inside its interval.
    """
    levels = levels_of(schedule, config)
    called = [_churned(schedule, config, level) for level in levels]
    if method_of(schedule, config) == "heun":
        called += levels[1:]
    return len(called), sum(_guides(schedule, config, level) for level in called)


def clips(backbone: Backbone, config: SamplerConfig) -> bool:
    """Returns whether "ddpm" and "ddim" hold the clean sample in [-1, 1] at each step.

    As the config or else the scheduler that came with the network says; without either pixels are held there, as
    guided-diffusion does, and latents are not.
    """
    if config.clip is not None:
        return config.clip
    sampler = getattr(backbone.schedule, "sampler", None)
    if sampler is not None:
        return bool(sampler.config.get("clip_sample", False))
    return isinstance(backbone.codec, IdentityCodec) and backbone.in_channels in (1, 3)


def null_condition(backbone: Backbone) -> Condition:
    """Returns the condition that guidance leads away from: "no class", or the empty prompt.

    Raises:
        ConfigError: The network has none.
    """
    if isinstance(backbone.conditioner, Unconditional):
        raise ConfigError(f"{backbone.name} is unconditional, so nothing can guide it; leave out sampler.guidance")
    try:
        return backbone.condition(None, 1)
    except ConfigError as error:
        raise ConfigError(
            f"{backbone.name} was not trained without a condition, so nothing can guide it; leave out "
            f"sampler.guidance ({error})"
        ) from error


class Respaced:
    """One step of DDPM or DDIM between two of a few timesteps, through the schedulers of diffusers.

    The schedule is cut down to the timesteps that are visited, as Nichol and Dhariwal (2021) do, so that each step
    leads to the next one's level exactly whatever their spacing. Of networks that learn their variance (twice as many
    outputs as inputs) DDPM takes it; DDIM has no use for it. Else DDPM's variance is that of the posterior.

    Args:
        schedule: The network's.
        levels: The steps, from the most noise on.
        clip: Hold the clean sample in [-1, 1].
    """

    def __init__(self, schedule: DiscreteSchedule, levels: list[Level], clip: bool):
        powers = torch.tensor([level.signal**2 for level in reversed(levels)], dtype=torch.float64)
        before = torch.cat([torch.ones(1, dtype=torch.float64), powers[:-1]])
        self.betas = 1 - powers / before
        self.variances = (1 - before) / (1 - powers) * self.betas
        arguments = {
            "num_train_timesteps": len(levels),
            "trained_betas": self.betas.tolist(),
            "prediction_type": schedule.prediction,
            "clip_sample": clip,
        }
        self.ddpm, self.ddim = DDPMParallelScheduler(**arguments), DDIMScheduler(**arguments)
        for scheduler in (self.ddpm, self.ddim):
            scheduler.set_timesteps(len(levels))
            scheduler.alphas_cumprod = powers  # its own come from fp32 betas, which lose digits near 1
        self.count = len(levels)

    def ddpm_step(self, step: int, x: torch.Tensor, output: torch.Tensor, noise: StepNoise) -> torch.Tensor:
        """Returns the next state (B, C, h, w) for the network's output (B, C or 2C, h, w)."""
        time, channels = self.count - 1 - step, x.shape[1]
        mean = self.ddpm.batch_step_no_noise(output[:, :channels], torch.tensor([time], device=x.device), x)
        if not time:
            return mean
        log_variance = self.variances[time].log()
        if output.shape[1] == 2 * channels:
            share = (output[:, channels:] + 1) / 2
            log_variance = share * self.betas[time].log() + (1 - share) * log_variance
        return mean + (log_variance / 2).exp() * noise(step)

    def ddim_step(
        self, step: int, x: torch.Tensor, output: torch.Tensor, eta: float, noise: StepNoise
    ) -> torch.Tensor:
        """Returns the next state; arguments as for `ddpm_step`, and the share of fresh noise."""
        added = {"eta": eta, "variance_noise": noise(step)} if eta else {}
        prediction = output[:, : x.shape[1]]
        # The noise is solved for again once the clean sample is clipped; else both would not add up to x.
        moved = self.ddim.step(prediction, self.count - 1 - step, x, use_clipped_model_output=True, **added)
        return moved.prev_sample


class _Guided:
    """Calls the network on a state in fp64, with classifier-free guidance where it applies."""

    def __init__(self, backbone: Backbone, config: SamplerConfig, cond: Cond, batch: int):
        self.backbone, self.schedule, self.config = backbone, backbone.schedule, config
        self.device = backbone.device
        self.cond = backbone.condition(cond, batch)
        self.both: Condition = {}
        if config.guidance != 1:
            null = null_condition(backbone)
            rows = {name: (self.cond[name], null[name]) for name in self.cond}
            self.both = {name: torch.cat([_rows(one, batch) for one in pair]) for name, pair in rows.items()}

    def __call__(self, x: torch.Tensor, level: Level) -> torch.Tensor:
        """Returns the raw output (B, C or 2C, h, w) fp64."""
        if not _guides(self.schedule, self.config, level):
            return self.backbone.denoise(x, level.time, self.cond).double()
        output = self.backbone.denoise(torch.cat([x, x]), level.time, self.both).double()
        given, null = output.chunk(2)
        channels = min(self.config.guided_channels or x.shape[1], x.shape[1])
        guided = null + self.config.guidance * (given - null)
        return torch.cat([guided[:, :channels], given[:, channels:]], dim=1)

    def solve(self, x: torch.Tensor, level: Level) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the clean sample and the noise that the network sees in x."""
        return solve(self.schedule, x, self(x, level), level)


def _probability_flow(
    network: _Guided, config: SamplerConfig, levels: list[Level], x: torch.Tensor, fresh: StepNoise
) -> torch.Tensor:
    schedule, heun = network.schedule, method_of(network.schedule, config) == "heun"
    for step, (level, target) in enumerate(_legs(schedule, levels)):
        raised = _churned(schedule, config, level)
        if raised is not level:
            x = x + math.sqrt(max(raised.noise**2 - level.noise**2, 0)) * fresh(step)
        clean, eps = network.solve(x, raised)
        slope = _slope(schedule, raised, clean, eps)
        last = step == len(levels) - 1
        ahead = clean if last and _ends_steep(schedule) else _move(schedule, x, slope, raised, target)
        if heun and not last:
            corrected = _slope(schedule, target, *network.solve(ahead, target))
            ahead = _move(schedule, x, (slope + corrected) / 2, raised, target)
        x = ahead
    return x


def _reverse_sde(network: _Guided, levels: list[Level], x: torch.Tensor, fresh: StepNoise) -> torch.Tensor:
    schedule = network.schedule
    for step, (level, target) in enumerate(_legs(schedule, levels)):
        clean, eps = network.solve(x, level)
        if step == len(levels) - 1 and _ends_steep(schedule):
            return clean
        diffusion = 2 * share_of_noise(schedule, level)
        score = -eps / level.noise
        drift = _slope(schedule, level, clean, eps) - diffusion / 2 * score
        x = _move(schedule, x, drift, level, target)
        if step < len(levels) - 1:
            span = share_of_noise(schedule, level) - share_of_noise(schedule, target)
            x = x + math.sqrt(diffusion * span) * fresh(step)
    return x


def _ancestral(
    network: _Guided, config: SamplerConfig, levels: list[Level], x: torch.Tensor, fresh: StepNoise
) -> torch.Tensor:
    schedule = network.schedule
    respaced = Respaced(schedule, levels, clips(network.backbone, config))
    for step, level in enumerate(levels):
        output = network(x, level)
        if method_of(schedule, config) == "ddpm":
            x = respaced.ddpm_step(step, x, output, fresh)
        else:
            x = respaced.ddim_step(step, x, output, config.eta, fresh)
    return x


def _legs(schedule: Schedule, levels: list[Level]) -> list[tuple[Level, Level]]:
    """Returns where each step begins and ends; the last one ends without noise."""
    clean = Level("clean", schedule.clean_time, 1.0, 0.0)
    return list(zip(levels, [*levels[1:], clean], strict=True))


def _slope(schedule: Schedule, level: Level, clean: torch.Tensor, eps: torch.Tensor) -> torch.Tensor:
    """Returns the derivative of the state: of x by the share of noise for flows, else of x / signal by sigma."""
    if not isinstance(schedule, FlowSchedule):
        return eps
    signal, noise = schedule.slopes(level)
    sign = 1 if schedule.data_time == 0 else -1
    return sign * (signal * clean + noise * eps)


def _move(schedule: Schedule, x: torch.Tensor, slope: torch.Tensor, level: Level, target: Level) -> torch.Tensor:
    """Returns the state after a straight step from one level to another."""
    if isinstance(schedule, FlowSchedule):
        return x + (share_of_noise(schedule, target) - share_of_noise(schedule, level)) * slope
    return target.signal * (x / level.signal + (target.sigma - level.sigma) * slope)


def _ends_steep(schedule: Schedule) -> bool:
    return isinstance(schedule, FlowSchedule) and schedule.path == "vp"


def _churn(schedule: Schedule, config: SamplerConfig) -> float:
    """Returns EDM's gamma, by which sigma is raised before a step."""
    return min(config.churn / config.steps, math.sqrt(2) - 1) if isinstance(schedule, SigmaSchedule) else 0.0


def _churned(schedule: Schedule, config: SamplerConfig, level: Level) -> Level:
    gamma = _churn(schedule, config) if method_of(schedule, config) == "heun" else 0.0
    return schedule.at(level.noise * (1 + gamma)) if gamma else level


def _guides(schedule: Schedule, config: SamplerConfig, level: Level) -> bool:
    low, high = config.interval
    return config.guidance != 1 and low - SLACK <= share_of_noise(schedule, level) <= high + SLACK


def _rows(rows: torch.Tensor, batch: int) -> torch.Tensor:
    return rows.expand(batch, *rows.shape[1:])
