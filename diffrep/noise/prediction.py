"""What a network predicts, solved for the clean sample and the noise."""

from __future__ import annotations

import torch

from diffrep.errors import ConfigError
from diffrep.noise.level import Level
from diffrep.noise.schedule import Schedule


def solve(
    schedule: Schedule, x: torch.Tensor, output: torch.Tensor, level: Level
) -> tuple[torch.Tensor, torch.Tensor]:
    """Solves a prediction for x_0 and eps, where x = signal * x_0 + noise * eps.

    "epsilon" is eps; "sample" and EDM's "denoised" are x_0; "v_prediction" is signal * eps - noise * x_0 (Salimans and
    Ho, 2022); "score" is the gradient of the log density of x, -eps / noise; "velocity" is the derivative of x by a
    flow's time, in units of its full length and in the direction in which it runs: to the noise in REPA, SD3 and FLUX,
    to the data in SiT (Ma et al., 2024).

    Args:
        schedule: Says what is predicted.
        x: What the network was given, (B, C, h, w).
        output: Its raw output, (B, C, h, w), or (B, 2C, h, w) where learned variances follow the prediction.
        level: Time and coefficients at which it was called.

    Returns:
        x_0 and eps, (B, C, h, w) in fp32, or fp64 where x is.

    Raises:
        ConfigError: The output has another shape, or does not determine both at this level.
    """
    channels, signal, noise = x.shape[1], level.signal, level.noise
    if output.shape[1] not in (channels, 2 * channels) or output.shape[2:] != x.shape[2:]:
        raise ConfigError(
            f"the network's output for {tuple(x.shape)} is {tuple(output.shape)}, so it predicts neither image nor "
            f"noise; a trajectory needs {channels} channels of that size, or {2 * channels} with variances"
        )
    wide = torch.promote_types(x.dtype, torch.float32)  # a sampler keeps its state in fp64
    x, output = x.to(wide), output[:, :channels].to(wide)
    kind = schedule.prediction
    if kind == "epsilon" and signal:
        return (x - noise * output) / signal, output
    if kind == "score" and signal and noise:
        return (x + noise**2 * output) / signal, -noise * output
    if kind in ("sample", "denoised") and noise:
        return output, (x - signal * output) / noise
    if kind == "v_prediction":
        power = signal**2 + noise**2
        return (signal * x - noise * output) / power, (noise * x + signal * output) / power
    if kind == "velocity":
        signal_slope, noise_slope = schedule.slopes(level)
        determinant = signal * noise_slope - noise * signal_slope
        clean = (noise_slope * x - noise * output) / determinant
        return clean, (signal * output - signal_slope * x) / determinant
    raise ConfigError(
        f"a prediction of {kind!r} does not tell image from noise at level {level.key!r}, where their coefficients "
        f"are {signal:g} and {noise:g}; known are 'epsilon' above signal 0, 'sample' and 'denoised' above noise 0, "
        "'score' above both, 'v_prediction' and 'velocity'"
    )
