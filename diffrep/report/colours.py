"""The palette, by day and by night.

By day ramps run from light to dark, so that they hold in grey print and for every kind of colour vision; by night they
run from the dark page to light. A colour stands in the page as a pair, "--day:#...;--night:#...", and style.css.jinja
takes the one that the reader's screen asks for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

Stops = Sequence[tuple[int, int, int]]


@dataclass(frozen=True)
class Ramp:
    """Stops of a colour scale, each (red, green, blue), on a white and on a dark page."""

    day: Stops
    night: Stops


SCORES = Ramp(
    ((238, 244, 250), (111, 168, 211), (10, 58, 104)),
    ((34, 45, 58), (41, 100, 152), (156, 211, 250)),
)
ERRORS = Ramp(
    ((255, 255, 255), (238, 160, 137), (176, 46, 24)),
    ((21, 27, 34), (126, 56, 44), (246, 138, 114)),
)
DEPTH = Ramp(
    ((84, 58, 146), (43, 103, 163), (20, 128, 122), (86, 130, 34), (158, 112, 8)),
    ((176, 152, 236), (108, 172, 236), (66, 196, 186), (150, 204, 92), (232, 196, 84)),
)
KINDS = (
    "--day:#c8432b;--night:#f4806a",
    "--day:#2b67a3;--night:#6fb0ea",
    "--day:#14807a;--night:#42c4ba",
    "--day:#8a5fa8;--night:#c29be0",
    "--day:#8a6a08;--night:#e0bd55",
    "--day:#5c6b7a;--night:#a3b1bf",
    "--day:#442d7a;--night:#a590e8",
)
ACCENT = KINDS[0]
INK = "--day:#1d2733;--night:#e4e9ee"
GREY = "--day:#c9d1d9;--night:#46525f"


def paint(ramp: Ramp, share: float) -> str:
    """Returns the pair of colours at a share (0 to 1) of the way through the stops."""
    return f"--day:{_hex(_mix(ramp.day, share))};--night:{_hex(_mix(ramp.night, share))}"


def words(ramp: Ramp, share: float) -> str:
    """Returns the classes of text on that colour: "dark" where it must be light by day, "lit" dark by night."""
    dark, lit = _luma(_mix(ramp.day, share)) < 140, _luma(_mix(ramp.night, share)) >= 140
    return " ".join(["dark"] * dark + ["lit"] * lit)


def _luma(colour: Sequence[float]) -> float:
    red, green, blue = colour
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue  # Rec. 709


def _hex(colour: Sequence[float]) -> str:
    return "#" + "".join(f"{round(value):02x}" for value in colour)


def _mix(stops: Stops, share: float) -> list[float]:
    place = min(max(share, 0.0), 1.0) * (len(stops) - 1)
    first = min(int(place), len(stops) - 2)
    part = place - first
    return [a + (b - a) * part for a, b in zip(stops[first], stops[first + 1], strict=True)]
