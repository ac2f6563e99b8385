"""diffrep: read representations out of frozen diffusion models."""

from diffrep._version import __version__

__all__ = ["__version__"]
