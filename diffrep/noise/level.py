"""Noise levels, and the levels of a request by any name."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

from diffrep.config import LevelSpec
from diffrep.errors import UnknownNameError

# A call of a network on a trajectory, such as "inversion 3/10"; see diffrep/noise/trajectory.py.
ON_TRAJECTORY = re.compile(r"(hf\.)?(inversion|generation)\s+(\d+)\s*/\s*(\d+)")


@dataclass(frozen=True)
class Level:
    """One noise level of one schedule.

    Attributes:
        key: Canonical name, which says the native time, "t=261", "sigma=0.7", "clean", "clean@-1", or the place on a
            trajectory, "inversion 3/10".
        time: What is passed to the network.
        signal: Coefficient of the clean sample.
        noise: Coefficient of the noise.
    """

    key: str
    time: int | float
    signal: float
    noise: float

    @property
    def sigma(self) -> float:
        """Noise over signal; infinite for pure noise."""
        return self.noise / self.signal if self.signal else math.inf


class LevelTable:
    """The levels of a request, looked up in any way a user may write them.

    Args:
        levels: Each spec as requested, with the level it stands for.
    """

    def __init__(self, levels: Iterable[tuple[LevelSpec, Level]]):
        self.levels: dict[str, Level] = {}
        self._keys: dict[str, str] = {}
        for spec, level in levels:
            self.levels.setdefault(level.key, level)
            for name in (level.key, level.key.removeprefix("t=").removeprefix("sigma="), str(spec).strip()):
                self._keys[name] = level.key

    def key(self, spec: LevelSpec) -> str:
        """Returns the canonical key.

        Raises:
            UnknownNameError: The request had no such level.
        """
        spec = int(spec) if isinstance(spec, float) and spec.is_integer() else spec
        try:
            return self._keys[str(spec).strip()]
        except KeyError:
            raise UnknownNameError("level", str(spec), self.levels) from None
