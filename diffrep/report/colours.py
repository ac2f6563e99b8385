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
EVEN = 0.196  # relative luminance on which white and the dark of style.css.jinja are read equally well
GREY = "--day:#c9d1d9;--night:#46525f"


def paint(ramp: Ramp, share: float) -> str:
    """Returns the pair of colours at a share (0 to 1) of the way through the stops."""
    return f"--day:{_hex(_mix(ramp.day, share))};--night:{_hex(_mix(ramp.night, share))}"


def words(ramp: Ramp, share: float) -> str:
    """Returns the classes of text on that colour: "dark" where it must be light by day, "lit" dark by night."""
    day, night = (_luminance(_mix(stops, share)) for stops in (ramp.day, ramp.night))
    return " ".join(["dark"] * (day < EVEN) + ["lit"] * (night >= EVEN))


def _luminance(colour: Sequence[float]) -> float:
    """Returns the relative luminance of an sRGB colour (WCAG 2)."""
    parts = [part / 255 for part in colour]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def _hex(colour: Sequence[float]) -> str:
    return "#" + "".join(f"{round(value):02x}" for value in colour)


def _mix(stops: Stops, share: float) -> list[float]:
    place = min(max(share, 0.0), 1.0) * (len(stops) - 1)
    first = min(int(place), len(stops) - 2)
    part = place - first
    return [a + (b - a) * part for a, b in zip(stops[first], stops[first + 1], strict=True)]
