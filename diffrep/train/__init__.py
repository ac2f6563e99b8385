"""Training of diffusion models and of students of their features; `run_train` is the whole of it."""

from diffrep.train.adapters import load_adapters
from diffrep.train.trainer import run_train

__all__ = ["load_adapters", "run_train"]
