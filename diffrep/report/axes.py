"""Axes of the drawings: values to positions, round ticks, labels that keep their distance."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

MANTISSAS = ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7), (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8))

CHARACTER = 6.3  # pixels of one at the size of the ticks


@dataclass(frozen=True)
class Axis:
    """A straight or logarithmic axis from `start` to `end` of the drawing.

    Attributes:
        low: Value at `start`.
        high: Value at `end`, above `low`.
        start: Position in the drawing.
        end: Position in the drawing; below `start` for an axis that grows upwards.
        log: Distances are ratios.
    """

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def at(self, value: float) -> float:
        """Returns the position of a value."""
        low, high, value = (math.log(v) if self.log else v for v in (self.low, self.high, value))
        return round(self.start + (value - low) / (high - low) * (self.end - self.start), 1)

    def ticks(self, wanted: int = 7) -> list[float]:
        """Returns round values inside the axis, about as many as wanted."""
        if self.log:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            for mantissas in MANTISSAS:
                ticks = [m * 10.0**d for d in decades for m in mantissas if self.low <= m * 10.0**d <= self.high]
                if len(ticks) >= 4:
                    return ticks
        step = _step((self.high - self.low) / wanted)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [round(n * step, 12) for n in range(first, last + 1)]


def score_axis(values: Iterable[float], start: float, end: float) -> Axis:
    """Returns an axis for scores, which lie between 0 and 1, with a little room around them."""
    values = list(values)
    low, high = min(values), max(values)
    room = max(0.06 * (high - low), 0.01)
    return Axis(max(low - room, 0.0), min(high + room, 1.0), start, end)


def log_axis(values: Iterable[float], start: float, end: float) -> Axis:
    """Returns a logarithmic axis for positive values, with a little room around them."""
    values = list(values)
    low, high = min(values), max(values)
    room = max((high / low) ** 0.06, 1.08)
    return Axis(low / room, high * room, start, end, log=True)


def score_ticks(axis: Axis) -> list[dict[str, object]]:
    """Returns positions and texts of a score axis."""
    ticks = axis.ticks()
    step = ticks[1] - ticks[0] if len(ticks) > 1 else 0.1
    digits = max(1, -math.floor(math.log10(step) + 1e-9))
    return [{"at": axis.at(tick), "text": f"{tick:.{digits}f}"} for tick in ticks]


def log_ticks(axis: Axis, text: Callable[[float], str]) -> list[dict[str, object]]:
    """Returns positions and texts of a logarithmic axis; a text that would touch the one before is left out."""
    ticks, end = [], -math.inf
    for tick in axis.ticks():
        at, words = axis.at(tick), text(tick)
        half = len(words) * CHARACTER / 2
        free = at - half > end + 8
        end = at + half if free else end
        ticks.append({"at": at, "text": words if free else ""})
    return ticks


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Moves labels apart so that neighbours are `gap` away, and keeps them between low and high while they fit."""
    order = sorted(range(len(wanted)), key=wanted.__getitem__)
    placed = [0.0] * len(wanted)
    below = low - gap
    for index in order:
        below = placed[index] = max(wanted[index], below + gap)
    above = max(high, low + gap * (len(wanted) - 1)) + gap
    for index in reversed(order):
        above = placed[index] = min(placed[index], above - gap)
    return [round(place, 1) for place in placed]


def _step(least: float) -> float:
    power = 10.0 ** math.floor(math.log10(least))
    return next(m * power for m in (1, 2, 5, 10) if m * power >= least * (1 - 1e-9))
