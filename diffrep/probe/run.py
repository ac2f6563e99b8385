"""`diffrep probe`: a store in, a run folder with results, heads and report out."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from diffrep import dist
from diffrep.config import ProbeConfig, TrainedConfig, write_results
from diffrep.errors import ConfigError, DiffrepError, StoreError
from diffrep.heads import save_head
from diffrep.probe.baselines import TITLES, pixels, untrained
from diffrep.probe.gallery import gallery, open_store_images, save_arrays, thumbnails
from diffrep.probe.lowdata import check_low_data, low_data
from diffrep.probe.measure import Measure
from diffrep.probe.reading import Reading, readings
from diffrep.probe.scores import Result, cost_of, map_of, summarise, write_trials
from diffrep.probe.sweep import Judged, Read, Scored, choose, score, sweep
from diffrep.probe.task import Task, make_task
from diffrep.probe.trained import train_head
from diffrep.probe.trained_net import MAPPED
from diffrep.report import write_report
from diffrep.store import FeatureStore

NAMES = {
    "logistic": "linear",
    "sgd": "linear, SGD",
    "ridge": "ridge",
    "knn": "kNN",
    "ncm": "nearest class mean",
}
# Trained heads that stand under their kind; others keep the name they were given.
TRAINED_NAMES = {
    "attention": "attention pool",
    "diffssl-attention": "attention (diffssl)",
    "difformer": "DifFormer",
    "aggregation": "aggregation network",
    "conv": "convolutional",
    "mlp": "MLP",
    "linear": "linear, trained",
    "matryoshka": "Matryoshka",
}


def run_probe(config: ProbeConfig) -> dict[str, Any]:
    """Judges every head on every reading of a store; writes `results.json`, `report.html`, `trials.csv` and the heads.

    For each head and each way to combine features, one reading and setting are chosen on validation samples, fitted
    again on training and validation samples, and scored once on the test samples. A trained head is scored once too,
    with the weights of the epoch that was best on the validation samples; it is not fitted on these.

    Returns:
        The metrics that stand in results.json.

    Raises:
        StoreError: The store is missing or not finished, or two stores have other samples.
        DataError: The labels do not allow a probe.
        ConfigError: The config asks for what the store does not hold.
    """
    probe = Probe(FeatureStore(config.store), config)
    probe.sweep()
    for head in config.heads:
        for kind in config.combine:
            probe.score(head, kind)
    for name in config.baselines:
        probe.baseline(name)
    for name in config.trained:
        probe.train(name)
    return probe.finish()


class Probe:
    """One probe, step by step; `run_probe` is its usual order, and the demo adds baselines and a second network.

    Args:
        store: The features.
        config: What to fit.
        title: Title of the report; None names backbone and data.
        network: Name of the network in the tables of a report that shows several.
    """

    def __init__(self, store: FeatureStore, config: ProbeConfig, title: str | None = None, network: str | None = None):
        dist.state()
        self.store, self.config, self.network = store, config, network
        self.out = config.folder
        self.title = title or f"{store.meta['backbone']['name']} on {store.meta['data']['path']}"
        self.seeds = [config.seed + number for number in range(config.seeds)]
        self.tasks = [make_task(store, config, seed) for seed in self.seeds]
        self.readings = readings(store, config)
        # What cannot work is told before any work is done.
        check_low_data(self.task, config)
        for name, head in config.trained.items():
            if _title(name, head.kind or name) in NAMES.values():
                raise ConfigError(f"trained.{name} has the name of a head that needs no epochs; give it another")
        self.stores = {name: self._store_of(name, head) for name, head in config.trained.items()}
        self.sweeps: list[list[Judged]] = []
        self.chosen: dict[tuple[str, str], Judged] = {}
        self.results: list[Result] = []
        self.heads: dict[str, tuple[nn.Module, dict[str, Any]]] = {}
        self.low: list[dict[str, Any]] = []
        self.others: list[Probe] = []

    @property
    def task(self) -> Task:
        """The samples' roles with the first seed."""
        return self.tasks[0]

    def read(self, reading: Reading) -> torch.Tensor:
        """Returns the features of a reading of the store, (N, D)."""
        return reading.read(self.store)

    def sweep(self) -> None:
        """Judges every head on every reading, with every seed."""
        self.sweeps = [
            sweep(self.read, self.readings, task, self.config, seed)
            for task, seed in zip(self.tasks, self.seeds, strict=True)
        ]

    def score(self, head: str, kind: str = "single") -> Judged | None:
        """Chooses and scores one head among the readings of one kind; returns what the first seed chose.

        Returns None where no reading is of this kind, as with one layer only.
        """
        among = [[one for one in judged if one.reading.combine == kind] for judged in self.sweeps]
        if not among[0]:
            return None
        name = NAMES[head] + {"single": "", "layers": ", all layers", "levels": ", all levels", "all": ", all"}[kind]
        self.chosen[head, kind] = chosen = self.add(name, head, among)
        wanted = self.config.low_data
        if wanted and head in self.config.low_data_heads and kind == "single" and dist.state().is_main_process:
            self.low += low_data(self.read(chosen.reading), chosen, self.task, self.config, self.config.seed)
        return chosen

    def add(self, name: str, head: str, among: list[list[Judged]], read: Read | None = None) -> Judged:
        """Chooses among judged readings of each seed, scores the choice and keeps the result.

        Args:
            name: For tables.
            head: Which head.
            among: Judged readings of each seed.
            read: Gives the features of a reading; None reads the store.

        Returns:
            What the first seed chose.
        """
        elsewhere, read, runs = read is not None, read or self.read, []
        for judged, task, seed in zip(among, self.tasks, self.seeds, strict=True):
            chosen = choose(read, judged, head, task, self.config, seed)
            # Others than the main process only need to know what was chosen.
            runs.append((chosen, self._scored(read, chosen, task, seed)))
        first, scored = runs[0]
        if scored is not None:
            setting = dict(first.setting)
            if len({(one.reading, str(one.setting)) for one, _ in runs}) > 1:
                setting["choices"] = [{"reading": str(one.reading), **one.setting} for one, _ in runs]
            kept = [(one.val, run.scores) for one, run in runs]
            # A baseline's head belongs to no features that anyone will extract.
            module = None if elsewhere else scored.head
            network = None if elsewhere else self.network
            self._keep(name, head, first.reading, kept, first.dim, setting, module, network=network)
        return first

    def baseline(self, name: str) -> Judged:
        """Judges, chooses and scores the logistic regression on "pixels" or on the "untrained" network's features."""
        if name == "pixels":
            features = pixels(self.store, self.config)
            return self._elsewhere(TITLES[name], lambda _: features, [Reading("pixels", "")])
        known = self.store.levels
        quietest = min(known, key=lambda key: known[key].sigma)
        levels = [key for key in known if key in (quietest, self.best_linear().level)]
        blank = untrained(self.store, self.config, levels, self.out)
        single = self.config.model_copy(update={"combine": ("single",)})
        title = f"on the untrained {self.network}" if self.network else TITLES[name]
        return self._elsewhere(title, lambda one: one.read(blank), readings(blank, single))

    def best_linear(self) -> Reading:
        """Returns the single reading that was chosen for the logistic regression, or else for the best head."""
        single = [one for (_, kind), one in self.chosen.items() if kind == "single"]
        if not single:  # nothing was scored yet: the best on validation
            single = [one for one in self.sweeps[0] if one.reading.combine == "single"] or self.sweeps[0]
        return max([one for one in single if one.head == "logistic"] or single, key=lambda one: one.val).reading

    def train(self, name: str, store: FeatureStore | None = None) -> None:
        """Trains the head `config.trained[name]` with every seed, on the training samples, and scores its best epoch.

        The layer and level that its config leaves open are those that the first seed chose for the linear head.

        Args:
            name: Which.
            store: Where its features are, of the same samples; None takes the store that the config names.
        """
        config, store = self.config.trained[name], store or self.stores[name]
        pairs = self._pairs(name, config, store)
        kind = config.kind or name
        # Features that were handed over may be others next time, and then the head is another too.
        folder = self.out / "trained" / (name if store is self.stores[name] else f"{name}-{store.name}")
        trained = [
            train_head(kind, store, pairs, task, config, folder / f"seed-{seed}", seed, self.measure.name)
            for task, seed in zip(self.tasks, self.seeds, strict=True)
        ]
        if dist.state().is_main_process:
            layers, levels = list(dict.fromkeys(p[0] for p in pairs)), list(dict.fromkeys(p[1] for p in pairs))
            reading = Reading(" + ".join(layers), " + ".join(levels), tuple(pairs), config.pool)
            runs = [(one.val, one.scores) for one in trained]
            setting, head = trained[0].setting, trained[0].head
            self._keep(_title(name, kind), kind, reading, runs, None, setting, head, store, self.network)

    def join(self, other: Probe) -> None:
        """Takes in what a probe of another network found on the same samples; the run folder then shows both.

        Raises:
            ConfigError: The networks have no names, or the same one.
            StoreError: The other one has other test samples.
        """
        names = [one.network for one in (self, *self.others, other)]
        if None in names or len(set(names)) < len(names):
            raise ConfigError(f"results are told apart by their networks, got {names}; give each Probe its own name")
        mine, theirs = ([probe.store.ids[row] for row in probe.task.test] for probe in (self, other))
        if mine != theirs:
            raise StoreError(
                f"{self.store.path} and {other.store.path} have other test samples; extract both from the same data"
            )
        self.others.append(other)
        self.results += other.results
        self.heads |= other.heads

    @property
    def measure(self) -> Measure:
        """The number that is chosen by and reported."""
        return Measure(self.config.metric, self.task)

    def metrics(self, notes: list[str]) -> dict[str, Any]:
        """Returns everything that was measured, as JSON values: what the report is drawn from."""
        store, task = self.store, self.task
        best = max(self.results, key=lambda result: result.score.val)
        return {
            "title": self.title,
            "metric": self.measure.name,
            "names": store.classes,
            "samples": {
                "train": len(task.train),
                "val": len(task.val),
                "test": len(task.test),
                "classes": task.classes,
                "seeds": len(self.seeds),
            },
            **map_of(self.sweeps, store),
            "scores": [result.score.plain() for result in self.results],
            "network": self.network,
            "beside": [{"network": one.network, **map_of(one.sweeps, one.store)} for one in self.others],
            "low_data": self.low,
            "gallery": gallery(best, task),
            "notes": notes,
        }

    def finish(self, notes: list[str] | None = None, **more: Any) -> dict[str, Any]:
        """Writes the run folder and returns the metrics; only the main process writes.

        Args:
            notes: Sentences for the report.
            more: Other metrics, which have their own sections of the report.
        """
        if not dist.state().is_main_process:
            return {}
        metrics = self.metrics(notes or []) | more
        pictures: dict[str, Any] = {}
        rows = list(dict.fromkeys(row for group in metrics["gallery"] for row in group["rows"]))
        if rows:
            try:
                images = open_store_images(self.store, self.config)
                shown = thumbnails(images, [self.store.ids[self.task.test[row]] for row in rows])
                pictures = {"thumbnails": shown, "thumbnail_rows": rows}
            except DiffrepError as error:
                first = str(error).splitlines()[0]
                metrics["notes"].append(f"The report shows no test images, because they were not found again: {first}")
        write_results(self.out, self.config, self.config.seed, metrics)
        save_arrays(self.out, self.store.ids, self.results, self.task, pictures)
        write_trials(self.out / "trials.csv", self.seeds, self.sweeps)
        for other in self.others:
            write_trials(self.out / f"trials-{other.network}.csv", other.seeds, other.sweeps)
        for name, (head, about) in self.heads.items():
            save_head(head, self.out / "heads" / name.replace(", ", "-").replace(" ", "-"), about)
        write_report(self.out)
        return metrics

    def _elsewhere(self, name: str, read: Read, among: list[Reading]) -> Judged:
        config = self.config.model_copy(update={"heads": ("logistic",)})
        judged = [sweep(read, among, task, config, seed) for task, seed in zip(self.tasks, self.seeds, strict=True)]
        return self.add(f"{NAMES['logistic']} {name}", "logistic", judged, read)

    def _scored(self, read: Read, chosen: Judged, task: Task, seed: int) -> Scored | None:
        if not dist.state().is_main_process:
            return None
        return score(read(chosen.reading), chosen, task, self.config, seed)

    def _keep(
        self,
        name: str,
        head: str,
        reading: Reading,
        runs: list[tuple[float, torch.Tensor]],
        dim: int | None,
        setting: dict[str, Any],
        module: nn.Module | None,
        store: FeatureStore | None = None,
        network: str | None = None,
    ) -> None:
        store = store or self.store
        cost = cost_of(reading.pairs, store)
        metric, seed = self.config.metric, self.config.seed
        name = f"{name} on {network}" if network else name
        result = summarise(name, head, reading, runs, self.task, metric, seed, dim, cost, setting, network)
        self.results.append(result)
        if module is not None:
            self.heads[name] = (module, _about(result, reading, store, self.measure.name))

    def _store_of(self, name: str, config: TrainedConfig) -> FeatureStore:
        """Opens the store a trained head reads and checks that it can serve."""
        store = self.store if config.store is None else FeatureStore(config.store)
        if store.ids != self.store.ids:
            both = set(store.ids) & set(self.store.ids)
            raise StoreError(
                f"trained.{name}: {store.path} holds {len(store.ids):,} samples and {self.store.path} "
                f"{len(self.store.ids):,}, {len(both):,} of them in both; extract both from the same data"
            )
        layers, levels = config.layers or store.layers, config.levels or list(store.levels)
        for layer in layers:
            for level in levels:
                store.key(layer, level)
        if config.store and len(layers) * len(levels) > 1 and (config.kind or name) not in MAPPED:
            raise ConfigError(
                f"trained.{name} reads one layer and level and {store.path} holds several; name layers and levels"
            )
        return store

    def _pairs(self, name: str, config: TrainedConfig, store: FeatureStore) -> list[tuple[str, str]]:
        layers, levels = config.layers, config.levels
        if (config.kind or name) in MAPPED:
            layers, levels = layers or store.layers, levels or list(store.levels)
        elif layers is None or levels is None:
            if config.store is None and "single" in self.config.combine:
                best = self.best_linear()
                layers, levels = layers or (best.layer,), levels or (best.level,)
            else:
                layers, levels = layers or tuple(store.layers), levels or tuple(store.levels)
        return list(dict.fromkeys(store.key(layer, level) for layer in layers for level in levels))


def table(metrics: dict[str, Any]) -> str:
    """Returns the scores as a text table."""
    rows = [("head", "features", "level", "val", "test", "95 % interval")]
    for one in sorted(metrics["scores"], key=lambda one: -one["test"]):
        low, high = one["interval"]
        test = f"{one['test']:.3f}" + (f" ± {one['error']:.3f}" if one["error"] is not None else "")
        pool = "" if one["pool"] is None else f" {one['pool']}x{one['pool']}"
        rows.append(
            (
                one["name"],
                one["layer"] + pool,
                one["level"] or "-",
                f"{one['val']:.3f}",
                test,
                f"{low:.3f} - {high:.3f}",
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _title(name: str, kind: str) -> str:
    """Returns a trained head's name in tables."""
    return TRAINED_NAMES[kind] if name == kind else name


def _about(result: Result, reading: Reading, store: FeatureStore, metric: str) -> dict[str, Any]:
    """Returns the facts that stand beside a saved head."""
    request = store.meta["request"]
    facts = {
        "backbone": store.meta["backbone"]["name"],
        "layers": list(dict.fromkeys(layer for layer, _ in reading.pairs)),
        "levels": list(dict.fromkeys(level for _, level in reading.pairs)),
        **{
            key: request[key]
            for key in ("draws", "pool", "noise", "posterior", "tokens", "seed", "dtype")
            if key in request
        },
        "image_size": store.meta.get("transform", {}).get("size"),
        "cond": store.meta["backbone"].get("cond", {}).get("given"),
        "read_pool": reading.pool,
        "dataset": store.meta["data"]["path"],
        metric: result.score.test,
    }
    return facts | ({"class_names": store.classes} if store.classes else {})
