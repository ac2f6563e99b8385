"""What each layer and noise level counts in an aggregation network, one map a network."""

from __future__ import annotations

from typing import Any

from diffrep.report.colours import SCORES, paint, words
from diffrep.report.formats import percent


def mixing(metrics: dict[str, Any]) -> list[dict[str, Any]]:
    """Lays out the mixing weights of each aggregation network of a run.

    Args:
        metrics: With `mixing`, a list of {"name", "layers", "levels", "shares"}: shares is one row a layer, and they
            sum to 1.

    Returns:
        A map a network: rows of coloured cells, what each layer and each level counts in all, a legend, and the cell
        that counts most. Empty when there is no network.
    """
    return [_map(one) for one in metrics.get("mixing") or []]


def _map(network: dict[str, Any]) -> dict[str, Any]:
    layers, levels, shares = network["layers"], network["levels"], network["shares"]
    every = [share for row in shares for share in row]
    high = max(every)
    most = every.index(high)
    return {
        "name": network.get("name", ""),
        "levels": levels,
        "rows": [
            {
                "name": layer,
                "cells": [_cell(layer, level, share, high) for level, share in zip(levels, row, strict=True)],
                "all": percent(sum(row)),
            }
            for layer, row in zip(layers, shares, strict=True)
        ],
        "by_level": [percent(sum(column)) for column in zip(*shares, strict=True)],
        "even": percent(1 / len(every)),
        "high": percent(high),
        "legend": [paint(SCORES, step / 8) for step in range(9)],
        "most": {"layer": layers[most // len(levels)], "level": levels[most % len(levels)], "share": percent(high)},
    }


def _cell(layer: str, level: str, share: float, high: float) -> dict[str, str]:
    # Colours begin at 0, so that weights that are nearly even look even.
    return {
        "text": percent(share),
        "title": f"{layer} @ {level}: {100 * share:.2f} %",
        "paint": paint(SCORES, share / high),
        "words": words(SCORES, share / high),
    }
