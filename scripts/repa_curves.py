"""Draws what was measured of training runs over their steps and over their time, and prints a table.

    python scripts/repa_curves.py [--layer blocks.3] [--out curves.svg] NAME=RUN [NAME=RUN ...]

RUN is a folder of `diffrep train` with `watch.jsonl` and `log.jsonl`. Runs of one NAME are seeds of one method: the
line is their mean, the band reaches from the least to the greatest. Time is training alone, without measurements. The
table says when each method first reaches the final probe accuracy of the first one.
"""

import argparse
import html
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from diffrep.report.axes import Axis, log_axis, spread
from diffrep.report.colours import KINDS

TITLES = {"probe": "linear probe, test accuracy", "cknna": "CKNNA with the encoder", "frechet": "Fréchet distance"}
WIDTH, HEIGHT, LEFT, TOP, BOTTOM, RIGHT = 560, 250, 56, 34, 44, 96  # of one drawing, and its margins
STYLE = (
    "text{font:12px sans-serif;fill:#5c6b7a} .title{font-size:13px;fill:#1d2733} .rule{stroke:#e1e6eb} "
    ".chance{stroke:#a9b4bf;stroke-dasharray:4 4}"
)


@dataclass
class Method:
    """Runs of one name, at the steps that all of them have.

    Attributes:
        name: Of the method.
        steps: (S,).
        minutes: Training time at each, averaged over runs (S,).
        values: By metric, (runs, S).
    """

    name: str
    steps: np.ndarray
    minutes: np.ndarray
    values: dict[str, np.ndarray]

    def mean(self, metric: str) -> np.ndarray:
        """Returns the mean over runs (S,)."""
        return self.values[metric].mean(0)

    def reaches(self, goal: float) -> int | None:
        """Returns the place of the first step whose probe accuracy is at least `goal`, or None."""
        there = np.flatnonzero(self.mean("probe") >= goal)
        return int(there[0]) if len(there) else None


def lines_of(file: Path) -> list[dict]:
    """Returns the lines of a JSONL file."""
    if not file.is_file():
        raise SystemExit(f"{file} is missing; give folders of 'diffrep train' whose config has a watch section")
    return [json.loads(line) for line in file.read_text().splitlines()]


def read(name: str, runs: list[Path], layer: str) -> Method:
    """Reads the runs of a method."""
    found = []
    for run in runs:
        watched = {line["step"]: line for line in lines_of(run / "watch.jsonl")}
        log = lines_of(run / "log.jsonl")
        found.append((watched, [0, *(line["step"] for line in log)], [0.0, *(line["seconds"] for line in log)]))
    steps = sorted(set.intersection(*(set(watched) for watched, _, _ in found)))
    if not steps:
        raise SystemExit(f"the runs of {name} have no step in common")
    keys = {"probe": f"probe/{layer}", "cknna": f"cknna/{layer}", "frechet": "frechet", "chance": "cknna/chance"}
    values = {
        metric: np.array([[watched[step][key] for step in steps] for watched, _, _ in found], dtype=float)
        for metric, key in keys.items()
        if all(key in watched[step] for watched, _, _ in found for step in steps)
    }
    minutes = np.mean([np.interp(steps, logged, seconds) for _, logged, seconds in found], axis=0) / 60
    return Method(name, np.array(steps), minutes, values)


def first_layer(run: Path) -> str:
    """Returns the first layer that a run was probed at."""
    names = [key.removeprefix("probe/") for key in lines_of(run / "watch.jsonl")[-1] if key.startswith("probe/")]
    if not names:
        raise SystemExit(f"{run} has no linear probe; give --layer")
    return names[0]


def drawing(methods: list[Method], metric: str, across: str, corner: tuple[int, int]) -> str:
    """Returns one set of axes with a line for each method as SVG."""
    shown = [method for method in methods if metric in method.values]
    x0, y0 = corner
    left, right, top, bottom = x0 + LEFT, x0 + WIDTH - RIGHT, y0 + TOP, y0 + HEIGHT - BOTTOM
    along = Axis(0, max(getattr(method, across)[-1] for method in shown), left, right)
    chance = np.nanmean(shown[0].mean("chance")) if metric == "cknna" else None
    values = np.concatenate([method.values[metric].ravel() for method in shown] + [[chance]] * (chance is not None))
    values = values[np.isfinite(values)]
    if metric == "frechet":
        up = log_axis(values, bottom, top)
    else:
        room = 0.06 * max(np.ptp(values), 0.01)
        up = Axis(values.min() - room, values.max() + room, bottom, top)
    parts = [f'<text class="title" x="{left}" y="{y0 + 18}">{TITLES[metric]}</text>']
    for tick in up.ticks(5):
        parts.append(f'<line class="rule" x1="{left}" x2="{right}" y1="{up.at(tick)}" y2="{up.at(tick)}"/>')
        parts.append(f'<text x="{left - 6}" y="{up.at(tick) + 4}" text-anchor="end">{tick:.4g}</text>')
    for tick in along.ticks(6):
        parts.append(f'<text x="{along.at(tick)}" y="{bottom + 18}" text-anchor="middle">{tick:,g}</text>')
    unit = "steps" if across == "steps" else "minutes of training"
    parts.append(f'<text x="{(left + right) / 2}" y="{bottom + 36}" text-anchor="middle">{unit}</text>')
    if chance is not None:
        level = up.at(chance)
        parts.append(f'<line class="chance" x1="{left}" x2="{right}" y1="{level}" y2="{level}"/>')
        parts.append(f'<text x="{right}" y="{level - 4}" text-anchor="end">shuffled</text>')
    ends = [up.at(method.mean(metric)[-1]) for method in shown]
    places = dict(zip((method.name for method in shown), spread(ends, 15, top, bottom), strict=True))
    for index, method in enumerate(methods):
        if metric not in method.values:
            continue
        colour = KINDS[index % len(KINDS)].split(";")[0].removeprefix("--day:")
        at = [along.at(value) for value in getattr(method, across)]
        parts += line(method, metric, at, up.at, colour)
        place = f'x="{at[-1] + 8}" y="{places[method.name] + 4}" style="fill:{colour}"'
        parts.append(f"<text {place}>{html.escape(method.name)}</text>")
    return "\n".join(parts)


def line(method: Method, metric: str, at: list[float], up: Callable[[float], float], colour: str) -> list[str]:
    """Returns a method's line and, where it has several runs, its band."""
    values, parts = method.values[metric], []
    if len(values) > 1:
        rim = [*zip(at, values.max(0), strict=True), *reversed([*zip(at, values.min(0), strict=True)])]
        parts.append(f'<polygon points="{points(rim, up)}" fill="{colour}" opacity="0.15"/>')
    mean = [*zip(at, values.mean(0), strict=True)]
    parts.append(f'<polyline points="{points(mean, up)}" fill="none" stroke="{colour}" stroke-width="2"/>')
    return parts


def points(pairs: list[tuple[float, float]], up: Callable[[float], float]) -> str:
    """Returns positions along and values up as the points of an SVG shape; a value that is not defined is left out."""
    return " ".join(f"{x},{up(float(value))}" for x, value in pairs if np.isfinite(value))


def picture(methods: list[Method]) -> str:
    """Returns the SVG: a row for each metric, steps to the left and time to the right."""
    metrics = [metric for metric in TITLES if any(metric in method.values for method in methods)]
    width, height = 2 * WIDTH, len(metrics) * HEIGHT
    body = [
        drawing(methods, metric, across, (column * WIDTH, row * HEIGHT))
        for row, metric in enumerate(metrics)
        for column, across in enumerate(("steps", "minutes"))
    ]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">\n'
        f'<style>{STYLE}</style>\n<rect width="{width}" height="{height}" fill="#fff"/>\n'
        + "\n".join(body)
        + "\n</svg>\n"
    )


def table(methods: list[Method]) -> str:
    """Returns the final values, and when each method reaches the first one's final probe accuracy, as Markdown."""
    first = methods[0]
    goal = first.mean("probe")[-1] if "probe" in first.values else None
    head = ["", "runs", "steps", "minutes", "probe", "CKNNA", "Fréchet"]
    head += [] if goal is None else [f"probe {goal:.3f} at step", "share of steps", "after minutes", "share of time"]
    rows = []
    for method in methods:
        runs = len(next(iter(method.values.values())))
        row = [method.name, str(runs), f"{method.steps[-1]:,}", f"{method.minutes[-1]:.1f}"]
        row += [final(method, metric) for metric in TITLES]
        if goal is not None:
            place = method.reaches(goal) if "probe" in method.values else None
            reached = ["not reached", "", "", ""]
            if place is not None:
                step, minutes = method.steps[place], method.minutes[place]
                shares = (step / first.steps[-1], minutes / first.minutes[-1])
                reached = [f"{step:,}", f"{shares[0]:.2f}", f"{minutes:.1f}", f"{shares[1]:.2f}"]
            row += reached
        rows.append(row)
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, rule, *rows))


def final(method: Method, metric: str) -> str:
    """Returns the last mean of a metric, with each run's value where there are several."""
    if metric not in method.values:
        return "–"
    last = method.values[metric][:, -1]
    form = ".3f" if metric != "frechet" else ".4g"
    each = f" ({', '.join(format(value, form) for value in last)})" if len(last) > 1 else ""
    return f"{last.mean():{form}}{each}"


def main() -> None:
    """Reads the arguments, writes the picture, prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="NAME=RUN")
    parser.add_argument("--layer", help="layer of probe and CKNNA; that of the first run if left out")
    parser.add_argument("--out", type=Path, default=Path("curves.svg"))
    given = parser.parse_args()
    groups: dict[str, list[Path]] = {}
    for pair in given.runs:
        name, sign, run = pair.partition("=")
        if not sign:
            parser.error(f"write NAME=RUN, got {pair!r}")
        groups.setdefault(name, []).append(Path(run))
    layer = given.layer or first_layer(next(iter(groups.values()))[0])
    methods = [read(name, runs, layer) for name, runs in groups.items()]
    given.out.write_text(picture(methods))
    print(table(methods))
    print(f"\nProbe and CKNNA of {layer}.", end="")
    if "chance" in methods[0].values:
        print(f" CKNNA of shuffled rows: {methods[0].mean('chance').mean():.3f}.", end="")
    print(f" Curves: {given.out}")


if __name__ == "__main__":
    main()
