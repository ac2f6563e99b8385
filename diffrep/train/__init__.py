"""Training of diffusion models; `train` is the whole of it."""

from diffrep.train.trainer import train

__all__ = ["train"]
