"""The palette. Ramps run from light to dark, so that they hold in grey print and for every kind of colour vision."""

from __future__ import annotations

from collections.abc import Sequence

ACCENT = "#c8432b"
INK = "#1d2733"
GREY = "#c9d1d9"
SCORES = ((241, 246, 251), (111, 168, 211), (10, 58, 104))
ERRORS = ((255, 255, 255), (238, 160, 137), (176, 46, 24))
DEPTH = ((68, 45, 122), (43, 103, 163), (30, 148, 140), (120, 168, 60), (193, 154, 32))
KINDS = ("#2b67a3", "#1e948c", "#8a5fa8", "#a17f12", "#5c6b7a", "#442d7a")


def ramp(stops: Sequence[tuple[int, int, int]], share: float) -> str:
    """Returns the colour at a share (0 to 1) of the way through the stops."""
    return "#" + "".join(f"{round(value):02x}" for value in _mix(stops, share))


def is_dark(stops: Sequence[tuple[int, int, int]], share: float) -> bool:
    """Whether text on that colour must be light (Rec. 709 luma)."""
    red, green, blue = _mix(stops, share)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue < 140


def _mix(stops: Sequence[tuple[int, int, int]], share: float) -> list[float]:
    place = min(max(share, 0.0), 1.0) * (len(stops) - 1)
    first = min(int(place), len(stops) - 2)
    part = place - first
    return [a + (b - a) * part for a, b in zip(stops[first], stops[first + 1], strict=True)]
