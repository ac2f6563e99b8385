"""The end of a search: the cells that are left are probed on all samples, and what the race was is told."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from diffrep.config import ProbeConfig, write_results
from diffrep.extract.plan import scaled
from diffrep.probe.race import Cell, Work
from diffrep.probe.reading import Reading, readings
from diffrep.probe.run import Probe
from diffrep.probe.rung import JointStore
from diffrep.report import write_report
from diffrep.store import FeatureStore

if TYPE_CHECKING:
    from diffrep.probe.search import Search


class LastStage(Probe):
    """The usual probe, on the cells that are left, with the story of the race among its metrics.

    Args:
        search: The search.
        joint: Features of all samples at these cells.
        alive: The cells.
        told: The rungs, as they stand in the metrics.
        spent: Work of the last extraction.
        ranking: The label-free ranking; empty for none.
        grid: The first rung's store, which has all layers and levels.
    """

    def __init__(
        self,
        search: Search,
        joint: JointStore,
        alive: list[Cell],
        told: list[dict[str, Any]],
        spent: Work,
        ranking: list[dict[str, Any]],
        grid: FeatureStore,
    ):
        super().__init__(joint, search.probe)
        self.search, self.told, self.spent, self.ranking, self.grid = search, told, spent, ranking, grid
        self.readings = single(joint, search.probe, alive)
        # Roles are drawn among all samples, as for the rungs, even where some turned out to be unreadable.
        everyone = search.rows[-1]
        self.tasks = [search.task_of(joint, search.task(seed), everyone) for seed in self.seeds]

    def conclude(self) -> dict[str, Any]:
        """Judges and scores, and writes the run folder."""
        self.sweep()
        for head in self.config.heads:
            self.score(head)
        metrics = self.finish()
        if metrics:  # in the main process, once more, under the name of the search
            config = self.search.config
            write_results(self.out, config, config.seed, metrics)
            write_report(self.out)
        return metrics

    def metrics(self, notes: list[str]) -> dict[str, Any]:
        """Returns the probe's metrics over the whole grid's layers and levels, and `search`."""
        metrics = super().metrics(notes)
        head = self.search.config.head
        chosen = next(result.score for result in self.results if result.score.head == head)
        winner = {"layer": chosen.layer, "level": chosen.level, "val": chosen.val}
        best: dict[Cell, float] = {}
        for cell in metrics["cells"]:
            if cell["head"] == head:
                name = (cell["layer"], cell["level"])
                best[name] = max(best.get(name, -1.0), cell["val"])
        cells = [row(cell) | {"val": val, "kept": same(row(cell), winner)} for cell, val in best.items()]
        count = len(self.task.train) + len(self.task.val)
        last = {"samples": count, "flops": self.spent.flops, "forwards": self.spent.forwards, "cells": cells}
        found = self.search.found(self.ranking, [*self.told, last], winner)
        return metrics | self.search.grid(self.grid) | {"search": found, "notes": [*notes, *_notes(found)]}


def single(joint: JointStore, config: ProbeConfig, cells: list[Cell]) -> list[Reading]:
    """Returns the readings of the cells; layers and levels span more than the cells where levels lost other layers."""
    wanted = set(cells)
    return [one for one in readings(joint, config) if (one.layer, one.level) in wanted]


def row(cell: Cell) -> dict[str, Any]:
    """Returns a cell as JSON values."""
    return {"layer": cell[0], "level": cell[1]}


def same(one: dict[str, Any], other: dict[str, Any] | None) -> bool:
    """Tells whether two rows are of the same cell."""
    return other is not None and (one["layer"], one["level"]) == (other["layer"], other["level"])


def cost_note(found: dict[str, Any]) -> str:
    """Returns what a search cost, in words."""
    cost = found["cost"]
    ranking = f", {scaled(cost['ranking_flops'])}FLOPs of it for the label-free ranking" if found["ranking"] else ""
    return (
        f"The search spent {scaled(cost['flops'])}FLOPs{ranking}: {cost['share']:.0%} of the "
        f"{scaled(cost['full_flops'])}FLOPs that the full grid takes."
    )


def _notes(found: dict[str, Any]) -> list[str]:
    pick = found["pick"]
    if pick is None:
        return [cost_note(found)]
    same = "also the winner" if pick["winner"] else "not the winner"
    agrees = "" if found["spearman"] is None else f" (Spearman {found['spearman']:.2f} with the first rung's scores)"
    told = f"The label-free ranking{agrees} would have picked {pick['layer']}@{pick['level']}, {same}."
    return [cost_note(found), told]


def shortlist(metrics: dict[str, Any], count: int = 5) -> str:
    """Returns the first places of the label-free ranking as a text table."""
    best = sorted(metrics["search"]["ranking"], key=lambda one: -one["score"])[:count]
    rows = [("cell", "alignment", "uniformity", "score")]
    rows += [
        (f"{one['layer']}@{one['level']}", *(f"{one[key]:.3f}" for key in ("alignment", "uniformity", "score")))
        for one in best
    ]
    width = max(len(row[0]) for row in rows)
    return "\n".join("  ".join((row[0].ljust(width), *(text.rjust(10) for text in row[1:]))) for row in rows)
