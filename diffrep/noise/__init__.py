"""Noise levels, schedules, the forward process, trajectories, and noise that is a function of the sample.

One coordinate for all schedules: sigma = noise / signal of the mixture x_t = signal * x_0 + noise * eps
(log-SNR = -2 ln sigma). A schedule maps it to and from the time that its network takes.
"""

from diffrep.noise.draws import image_digest, mix, sample_noise
from diffrep.noise.level import Level, LevelTable
from diffrep.noise.prediction import solve
from diffrep.noise.schedule import DiscreteSchedule, FlowSchedule, Schedule, SigmaSchedule
from diffrep.noise.trajectory import Trajectory, read_levels

__all__ = [
    "DiscreteSchedule",
    "FlowSchedule",
    "Level",
    "LevelTable",
    "Schedule",
    "SigmaSchedule",
    "Trajectory",
    "image_digest",
    "mix",
    "read_levels",
    "sample_noise",
    "solve",
]
