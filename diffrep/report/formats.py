"""Numbers as a reader wants them: three decimals of a score, G of FLOPs, kB of bytes."""

from __future__ import annotations

import re
from typing import Any

from markupsafe import Markup, escape

METRICS = {
    "accuracy": "top-1 accuracy",
    "mean_per_class": "mean accuracy per class",
    "map": "mean average precision",
}
HEADS = {
    "logistic": "linear",
    "sgd": "linear, SGD",
    "ridge": "ridge",
    "knn": "kNN",
    "ncm": "nearest class mean",
}
PREFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
LONGEST = 150  # characters of a head's setting in a table


def score(value: float | None) -> str:
    """Returns three decimals, or a dash for None."""
    return "–" if value is None else f"{value:.3f}"


def count(value: float) -> str:
    """Returns a whole number with separators."""
    return f"{round(value):,}"


def percent(share: float) -> str:
    """Returns a share as a whole percentage, one decimal below ten."""
    value = 100 * share
    return f"{value:.1f} %" if 0 < abs(value) < 9.95 and value != round(value) else f"{value:.0f} %"


def short(value: float, unit: str = "") -> str:
    """Returns two or three digits with a prefix and the unit: 1234 FLOPs are 1.2 kFLOPs."""
    factor, prefix = next(((f, p) for f, p in PREFIXES if value >= f), (1.0, ""))
    scaled = value / factor
    digits = f"{scaled:.0f}" if scaled >= 99.5 or scaled == round(scaled) else f"{scaled:.2g}"
    return f"{digits} {prefix}{unit}".strip()


def flops(value: float) -> str:
    """Returns FLOPs with a prefix."""
    return short(value, "FLOPs")


def size(value: float) -> str:
    """Returns bytes with a prefix, in powers of 1000."""
    return short(value, "B")


def forwards(value: float) -> str:
    """Returns a number of forward passes."""
    return f"{value:.2f}" if value < 9.95 else f"{value:.1f}"


def pooling(side: int) -> str:
    """Returns what maps were pooled to."""
    return f"pooled {side}×{side}"


def setting(values: dict[str, Any]) -> str:
    """Returns a head's setting in one line; what does not apply to it (None) is left out.

    What other seeds chose stands in `choices` and is told by `choices()`.
    """
    pairs = [(key, value) for key, value in values.items() if value is not None and key != "choices"]
    return ", ".join(f"{key} {_plain(value)}" for key, value in pairs)


def choices(values: dict[str, Any]) -> list[str]:
    """Returns what each seed chose, where they differ, such as "mid@t=50, penalty 0.1"."""
    return [
        f"{one['reading']}, {setting({key: value for key, value in one.items() if key != 'reading'})}"
        for one in values.get("choices") or []
    ]


def shortened(name: str, length: int) -> str:
    """Returns the name, or its end behind an ellipsis: the end of an address is what tells layers apart."""
    return name if len(name) <= length else "…" + name[1 - length :]


def clipped(text: str) -> str:
    """Returns the beginning of a long text."""
    return text if len(text) <= LONGEST else text[: LONGEST - 1].rstrip(" ,") + "…"


def breakable(name: str) -> Markup:
    """Returns a name that may be broken where a part of an address begins, and after the signs that join several."""
    return Markup(re.sub(r"(\.(?=[A-Za-z])|[@+](?=\S))", r"\1<wbr>", str(escape(name))))


def place(cell: dict[str, Any]) -> Markup:
    """Returns where a cell reads: layer, level and pooling."""
    level = Markup(" @ <code>{}</code>").format(cell["level"]) if cell["level"] else ""
    pool = "" if cell.get("pool") is None else f", {pooling(cell['pool'])}"
    return Markup("<code>{}</code>{}{}").format(breakable(cell["layer"]), level, pool)


def capital(text: str) -> str:
    """Returns the text with a large first letter; `capitalize` would make the others small."""
    return text[:1].upper() + text[1:]


def _plain(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    if isinstance(value, dict):
        return f"({setting(value)})"
    return ", ".join(map(_plain, value)) if isinstance(value, list | tuple) else str(value)
