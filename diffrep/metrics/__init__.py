"""What a representation is worth."""

from diffrep.metrics.classification import accuracy, bootstrap_interval

__all__ = ["accuracy", "bootstrap_interval"]
