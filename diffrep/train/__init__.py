"""Training of diffusion models; `run_train` is the whole of it."""

from diffrep.train.trainer import run_train

__all__ = ["run_train"]
