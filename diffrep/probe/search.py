"""`diffrep search`: which layer and level suit a data set, without extracting all of them from all of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.utils import gather_object

from diffrep import dist
from diffrep.backbones import Backbone
from diffrep.config import DataConfig, ExtractConfig, FeatureRequest, ProbeConfig, to_plain, write_results
from diffrep.config.search import SearchConfig
from diffrep.data import open_images
from diffrep.errors import ConfigError, DataError
from diffrep.extract.job import ExtractJob, open_backbone
from diffrep.extract.plan import scaled
from diffrep.metrics.uniformity import alignment, uniformity
from diffrep.probe.laststage import LastStage, cost_note, row, same, single
from diffrep.probe.race import Cell, Work, groups, ladder, members, most_work, survivors, work
from diffrep.probe.reading import pooled
from diffrep.probe.rung import JointStore, extract_together
from diffrep.probe.sweep import sweep
from diffrep.probe.task import LabelledImages, Task, make_task
from diffrep.report import write_report
from diffrep.report.search import agreement
from diffrep.store import FeatureStore
from diffrep.store.layout import changes, read_json, write_json
from diffrep.store.writer import flatten

# Keys that may differ between a search and its resume: they change neither a feature nor who stays in the race.
# Whether images and weights are the same is told by the stores.
FREE_KEYS = (
    *("out", "batch_size", "workers", "backbone.source", "data.path"),
    *("backbone.device", "backbone.attention", "backbone.channels_last", "backbone.compile"),
    *("probe.device", "probe.heads", "probe.finalists", "probe.folds", "probe.seeds", "probe.missing"),
)
FREE_SECTIONS = ("probe.low_data",)
CLAIM, OUTCOME = "search.json", "outcome.json"


def run_search(config: SearchConfig, backbone: Backbone | None = None) -> dict[str, Any]:
    """Races the cells of the grid, or goes on with the race in `config.out`, and probes those that are left.

    Every rung extracts only what is new: samples that were in no rung yet, at the cells that are still in the race.
    After the last one the cells that are left are extracted from all samples and probed as `diffrep probe` does:
    chosen on validation samples, scored once on test samples, which were in no rung. Writes `config.yaml`,
    `results.json`, `report.html`, `arrays.npz`, `trials.csv`, the heads and, in `rungs/`, the features.

    Args:
        config: Grid, rungs and heads.
        backbone: A loaded backbone in place of `config.backbone`, which then only names it.

    Returns:
        The metrics that stand in results.json; their `search` tells the rungs and the label-free ranking. Empty in
        processes other than the main one.

    Raises:
        ConfigError: The parts of the config do not go together, or the folder holds another search.
        DataError: The labels do not allow it, or an image cannot be read.
        StoreError: The folder holds features of other images or another network.
        DiffrepError: Features are NaN or infinite.
    """
    return Search(config, backbone).run()


class Search:
    """One search, ready to be printed or run.

    Args:
        config: Grid, rungs and heads.
        backbone: A loaded backbone in place of `config.backbone`.

    Raises:
        ConfigError: The parts of the config do not go together.
        DataError: The labels do not allow it.
    """

    def __init__(self, config: SearchConfig, backbone: Backbone | None = None):
        dist.state()
        self.config, self.out, judged = config, Path(config.out), config.probe
        self.backbone = backbone or open_backbone(config.backbone)
        self.blind = config.ranking == "only"
        others = () if self.blind else (judged.val_split, judged.test_split)
        splits = tuple(dict.fromkeys(name for name in (judged.train_split, *others) if name is not None))
        data = _with_splits(config.data, splits, unread={judged.val_split, judged.test_split}.difference(splits))
        self.images = open_images(data, self.backbone.image_channels)
        self.extract = ExtractConfig(
            **{name: getattr(config, name) for name in ExtractConfig.model_fields} | {"data": data}
        )
        self.plan = ExtractJob(self.extract, self.backbone, self.images).plan()
        schedule = self.backbone.schedule
        self.specs = {schedule.level(spec).key: spec for spec in reversed(config.request.levels)}
        self.cells: list[Cell] = [(layer, level) for layer in self.plan.addresses for level in self.plan.levels.levels]
        heads = tuple(dict.fromkeys((config.head, *judged.heads)))
        given = judged.model_dump() | {"store": str(self.out / "rungs"), "out": config.out, "seed": config.seed}
        self.probe = ProbeConfig(**given | {"data": data, "heads": heads})
        self.noised = [cell for cell in self.cells if self._is_random(cell[1])]
        if config.ranking != "none" and not self.noised:
            raise ConfigError(
                "no level of the request has noise, so there are no two noise draws to rank cells by; use ranking=none"
            )
        self.rungs = [] if self.blind else ladder(config, len(self.cells), len(self.images) - self._tested())
        self.rows = self._rows()

    def text(self) -> str:
        """Returns what the search would do, in lines; which cells stay is not known, so costs are upper bounds."""
        layers, levels, rank = len(self.plan.addresses), len(self.plan.draws), self._ranking_work()
        lines = [f"grid      {layers} layers x {levels} levels, {len(self.cells)} cells"]
        total, seen = Work(), 0
        for number, rows in enumerate(self.rows):
            cells = self.rungs[number].cells if number < len(self.rungs) else self.config.keep
            cells, last = (len(self.cells), False) if self.blind else (cells, number == len(self.rungs))
            new = most_work(self.plan, cells) * (len(rows) - seen)
            seen, total = len(rows), total + new
            name = "all      " if last else f"rung {number + 1:<4}"
            lines.append(f"{name} {len(rows):,} samples, {cells} cells{self._costs(new)}")
        if self.config.ranking != "none":
            lines.append(f"ranking   {len(self.rows[0]):,} samples, {len(self.noised)} cells again{self._costs(rank)}")
        lines.append(f"total     {self._costs(total + rank)[2:]}")
        lines.append(f"full grid {self._amount(self.full_work())}")
        return "\n".join(lines)

    def full_work(self) -> Work:
        """Returns what the full grid would cost: every cell of every sample."""
        return work(self.plan, self.cells) * len(self.images)

    def run(self) -> dict[str, Any]:
        """Runs what is missing of the search and returns the metrics."""
        self._claim()
        parts: list[list[FeatureStore]] = []
        told: list[dict[str, Any]] = []
        alive, seen = self.cells, np.empty(0, dtype=np.int64)
        ranking: list[dict[str, Any]] = []
        for number, rows in enumerate(self.rows):
            new = np.setdiff1d(rows, seen)
            stores, repeated = self._extract(number, new, alive)
            parts.append(stores)
            if number == 0 and self.config.ranking != "none":
                ranking = self._rank(stores[0], repeated)
            if self.blind:
                return self._finish_blind(stores[0], ranking)
            spent = work(self.plan, alive) * len(new)
            seen = rows
            if number == len(self.rungs):
                break
            joint = JointStore(parts, self.images, alive, self.out / "rungs")
            cells = self._outcome(number, joint, alive)
            told.append({"samples": len(rows), "flops": spent.flops, "forwards": spent.forwards, "cells": cells})
            alive = [(cell["layer"], cell["level"]) for cell in cells if cell["kept"]]
            self._say(number, cells)
        joint = JointStore(parts, self.images, alive, self.out / "rungs")
        return LastStage(self, joint, alive, told, spent, ranking, parts[0][0]).conclude()

    def task_of(self, joint: JointStore, task: Task, rows: np.ndarray) -> Task:
        """Returns the roles that samples of a joint store have among all samples; those outside `rows` have none."""
        train, val, test = (joint.positions(np.intersect1d(part, rows)) for part in (task.train, task.val, task.test))
        return replace(task, labels=task.labels[joint.places], train=train, val=val, test=test)

    def task(self, seed: int) -> Task:
        """Returns the roles of all samples under a seed."""
        return make_task(self.labelled, self.probe, seed)

    def _tested(self) -> int:
        """Reads the labels and returns the number of test samples."""
        if not self.images.labelled:
            raise DataError(
                f"{self.config.data.path} has no labels, and a search judges cells by them; ranking=only ranks "
                "the cells without labels"
            )
        self.labelled = LabelledImages(self.images, self.config.data.path)
        return len(self.task(self.config.seed).test)

    def _rows(self) -> list[np.ndarray]:
        """Returns the samples of each rung, and of the last stage: positions among the images, ascending."""
        if self.blind:
            count = self.config.rungs[0] if self.config.rungs else self.config.first
            if count > len(self.images):
                raise ConfigError(
                    f"a ranking on {count:,} samples is asked for and there are {len(self.images):,}; take a smaller "
                    "first=..."
                )
            return [np.sort(np.random.default_rng(self.config.seed).permutation(len(self.images))[:count])]
        task = self.task(self.config.seed)
        rows = [members(task, rung.samples, self.config.seed) for rung in self.rungs]
        fitted = len(rows[0][0])
        if self.config.head == "knn" and max(self.probe.neighbours) > fitted:
            raise ConfigError(
                f"kNN with k={max(self.probe.neighbours)} needs as many samples to fit on, and the first rung has "
                f"{fitted}; take a larger first, or smaller probe.neighbours"
            )
        return [np.union1d(train, val) for train, val in rows] + [np.arange(len(self.images))]

    def _is_random(self, level: str) -> bool:
        request = self.config.request
        noised = self.plan.levels.levels[level].noise > 0 and request.noise == "gaussian"
        return noised or (request.posterior == "sample" and self.backbone.codec.random)

    def _ranking_work(self) -> Work:
        if self.config.ranking == "none":
            return Work()
        return work(self.plan, self.noised, encode=False) * len(self.rows[0])

    def _costs(self, of: Work) -> str:
        return f", at most {self._amount(of)}, {of.flops / self.full_work().flops:.1%} of the full grid"

    def _amount(self, of: Work) -> str:
        return f"{of.forwards:,} forwards, {scaled(of.flops)}FLOPs"

    def _claim(self) -> None:
        """Takes the run folder, or refuses it where another search is at home."""
        file = self.out / "rungs" / CLAIM
        plain = {
            key: value
            for key, value in flatten(to_plain(self.config)).items()
            if key not in FREE_KEYS and not key.startswith(FREE_SECTIONS)
        }
        state = dist.state()
        with state.main_process_first():
            if file.exists():
                differ = changes(read_json(file), plain)
                if differ:
                    raise ConfigError(
                        f"{self.out} holds a search with other settings; use another out, or the same settings. It "
                        "differs in\n  " + "\n  ".join(differ)
                    )
            elif state.is_main_process:
                write_json(file, plain)

    def _request(self, layers: tuple[str, ...], levels: tuple[str, ...], seed: int) -> FeatureRequest:
        specs = tuple(self.specs[level] for level in levels)
        return replace(self.config.request, layers=layers, levels=specs, seed=seed)

    def _extract(
        self, number: int, rows: np.ndarray, alive: list[Cell]
    ) -> tuple[list[FeatureStore], FeatureStore | None]:
        """Extracts the new samples of a rung; those of the first also under the second noise seed."""
        seed, folder = self.config.request.seed, self.out / "rungs" / str(number + 1)
        requests = {str(index): self._request(*group, seed) for index, group in enumerate(groups(alive))}
        twice = number == 0 and self.config.ranking != "none"
        if twice:
            requests["again"] = self._request(*groups(self.noised)[0], seed + 1)
        stores = extract_together(self.extract, self.backbone, self.images.subset(rows), requests, folder)
        return (stores[:-1], stores[-1]) if twice else (stores, None)

    def _outcome(self, number: int, joint: JointStore, alive: list[Cell]) -> list[dict[str, Any]]:
        """Judges the cells that are left; an outcome that was written is kept, whatever a machine would make of it."""
        file, state = self.out / "rungs" / str(number + 1) / OUTCOME, dist.state()
        if not file.exists():
            task = self.task_of(joint, self.task(self.config.seed), self.rows[number])
            config = self.probe.model_copy(update={"heads": (self.config.head,)})
            among = single(joint, self.probe, alive)
            judged = sweep(lambda one: one.read(joint), among, task, config, self.config.seed)
            best: dict[Cell, float] = {}
            for one in judged:  # a cell is as good as its best pooling
                cell = (one.reading.layer, one.reading.level)
                best[cell] = max(best.get(cell, -1.0), one.val)
            kept = survivors(alive, [best[cell] for cell in alive], self.rungs[number].kept)
            if state.is_main_process:
                write_json(file, [row(cell) | {"val": best[cell], "kept": cell in kept} for cell in alive])
            state.wait_for_everyone()
        return read_json(file)

    def _say(self, number: int, cells: list[dict[str, Any]]) -> None:
        if dist.state().is_main_process:
            best = max(cells, key=lambda cell: cell["val"])
            rung, of = self.rungs[number], f"rung {number + 1} of {len(self.rungs)}"
            print(
                f"{of}: {rung.samples:,} samples, {rung.cells} cells, {rung.kept} stay; "
                f"best so far {best['layer']}@{best['level']} {best['val']:.3f}",
                flush=True,
            )

    def _rank(self, grid: FeatureStore, repeated: FeatureStore) -> list[dict[str, Any]]:
        """Ranks all cells by alignment and uniformity over two noise draws; processes share the cells.

        The score is -(alignment + uniformity), the sum that Wang and Isola (2020) minimise, with equal weights. At a
        level without noise both draws are the same, so alignment is 0.
        """
        state, rows = dist.state(), []
        for index in range(state.process_index, len(self.cells), state.num_processes):
            cell = self.cells[index]
            one = pooled(grid.tensor(*cell), None)
            other = pooled(repeated.tensor(*cell), None) if cell in self.noised else one
            aligned, uniform = alignment(one, other), uniformity(one)
            found = {"alignment": aligned, "uniformity": uniform, "score": -(aligned + uniform)}
            rows.append((index, row(cell) | found))
        gathered = gather_object(rows) if state.num_processes > 1 else rows
        return [one for _, one in sorted(gathered, key=lambda pair: pair[0])]

    def found(
        self, ranking: list[dict[str, Any]], told: list[dict[str, Any]], winner: dict[str, Any] | None
    ) -> dict[str, Any]:
        """Returns what the search adds to the metrics: rungs, ranking, and costs beside the full grid's."""
        race, rank, full = sum(rung["flops"] for rung in told), self._ranking_work().flops, self.full_work()
        first = work(self.plan, self.cells).flops * len(self.rows[0])
        spent = rank + (first if self.blind else race)
        values = {(cell["layer"], cell["level"]): cell["val"] for rung in told for cell in rung["cells"]}
        pick = max(ranking, key=lambda one: one["score"]) if ranking else None
        if pick and told:
            pick = pick | {"val": values[pick["layer"], pick["level"]], "winner": same(pick, winner)}
        return {
            "rungs": told,
            "winner": winner,
            "ranking": ranking,
            "pick": pick,
            "spearman": agreement(ranking, told[0]["cells"]) if ranking and told else None,
            "cost": {
                "flops": spent,
                "ranking_flops": rank,
                "full_flops": full.flops,
                "full_forwards": full.forwards,
                "share": spent / full.flops,
            },
        }

    def _finish_blind(self, grid: FeatureStore, ranking: list[dict[str, Any]]) -> dict[str, Any]:
        if not dist.state().is_main_process:
            return {}
        found = self.found(ranking, [], None)
        metrics = {
            "title": f"{self.backbone.name} on {grid.meta['data']['path']}, ranked without labels",
            **self.grid(grid),
            "search": found,
            "notes": [
                f"Cells were ranked without labels, on {len(self.rows[0]):,} samples; no accuracy was measured.",
                cost_note(found),
            ],
        }
        write_results(self.out, self.config, self.config.seed, metrics)
        write_report(self.out)
        return metrics

    @staticmethod
    def grid(store: FeatureStore) -> dict[str, Any]:
        """Returns layers, levels and costs of the grid as the report wants them."""
        return {
            "layers": [{"name": name, **about} for name, about in store.meta["layers"].items()],
            "levels": [{"key": key, "time": level.time, "sigma": level.sigma} for key, level in store.levels.items()],
            "costs": store.meta["costs"],
        }


def _with_splits(data: DataConfig, splits: tuple[str, ...], unread: set[str | None]) -> DataConfig:
    """Returns the data with the splits that a search reads; a limit of a split that it does not read is left out.

    Raises:
        ConfigError: The data name other splits.
    """
    if data.splits is not None and set(data.splits) != set(splits):
        raise ConfigError(
            f"data.splits is {list(data.splits)}, and this search reads {list(splits)}: probe.train_split, and unless "
            "ranking=only probe.val_split and probe.test_split, name what is read; set those, and leave data.splits "
            "out (data.splits=null)"
        )
    limit = data.limit
    if isinstance(limit, dict):
        limit = {name: count for name, count in limit.items() if name not in unread} or None
    return data.model_copy(update={"splits": splits, "limit": limit})
