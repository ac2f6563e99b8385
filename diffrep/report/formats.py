"""Numbers as a reader wants them: three decimals of a score, G of FLOPs, kB of bytes."""

from __future__ import annotations

METRICS = {
    "accuracy": "top-1 accuracy",
    "mean_per_class": "mean accuracy per class",
    "map": "mean average precision",
}
HEADS = {
    "logistic": "logistic regression",
    "sgd": "linear, SGD",
    "ridge": "ridge",
    "knn": "nearest neighbours",
    "ncm": "nearest class mean",
}
PREFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def score(value: float | None) -> str:
    """Returns three decimals, or a dash for None."""
    return "–" if value is None else f"{value:.3f}"


def count(value: float) -> str:
    """Returns a whole number with separators."""
    return f"{round(value):,}"


def percent(share: float) -> str:
    """Returns a share as a whole percentage, one decimal below ten."""
    value = 100 * share
    return f"{value:.1f} %" if 0 < abs(value) < 9.95 else f"{value:.0f} %"


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


def setting(values: dict[str, object]) -> str:
    """Returns a head's setting in one line; what does not apply to it (None) is left out."""
    return ", ".join(f"{key} {_plain(value)}" for key, value in values.items() if value is not None)


def shortened(name: str, length: int) -> str:
    """Returns the name, or its end behind an ellipsis: the end of an address is what tells layers apart."""
    return name if len(name) <= length else "…" + name[1 - length :]


def _plain(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
