"""`diffrep vtab`: prepared task folders in, the accuracy of each task of VTAB-1k and its means out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from diffrep import dist
from diffrep.backbones import Backbone
from diffrep.config import ExtractConfig, ProbeConfig, to_plain, write_results
from diffrep.config.vtab import VtabConfig
from diffrep.data import vtab_means
from diffrep.data.vtab import TASKS
from diffrep.errors import ConfigError, DataError, DiffrepError, UnknownNameError
from diffrep.extract.job import ExtractJob, open_backbone
from diffrep.probe.baselines import TITLES
from diffrep.probe.run import run_probe
from diffrep.probe.task import LabelledImages, make_task
from diffrep.store.layout import changes, read_json, write_json, write_whole

SETTINGS, TABLE = "config.json", "table.md"
# Keys that may differ between a run and its resume: they do not decide what a task's number is.
FREE_KEYS = ("out", "tasks", "batch_size", "workers", "data.path", "backbone.device", "probe.device")
EXTRACT_KEYS = ("backbone", "request", "cond", "batch_size", "unit_size", "workers")
GROUPS = {"all": "All 19 tasks"}


def run_vtab(config: VtabConfig, backbone: Backbone | None = None) -> dict[str, Any]:
    """Extracts and probes each task, or goes on with the run in `config.out`: finished tasks are not repeated.

    For every task, heads, readings and settings are chosen on val200 by fits on train800; the chosen ones are fitted
    on both and scored once on the whole test split, as VTAB-1k is defined (Zhai et al., 2019). A task's accuracy is
    that of the head that did best on val200; baselines stand beside it. Writes `config.yaml`, `results.json` and
    `table.md`, anew after each task, and in `<task>/` the store `features` and the run folder `probe` with its
    `report.html`.

    Args:
        config: What to extract and fit.
        backbone: A loaded backbone in place of `config.backbone`, which then only names it.

    Returns:
        The metrics that stand in results.json, of all finished tasks of the folder, also those that `config.tasks`
        does not name; a mean is None while one of its tasks is missing. Empty for other processes than the main one.

    Raises:
        ConfigError: The parts of the config do not go together, or the folder holds a run with other settings or of
            other weights.
        DataError: Task folders are missing or cannot be read, or the labels do not allow a probe.
    """
    state = dist.state()
    todo = unfinished(config)
    if todo:
        backbone = backbone or open_backbone(config.backbone)
    jobs = check_vtab(config, todo, backbone)
    state.wait_for_everyone()
    if state.is_main_process and backbone is not None:
        write_json(Path(config.out) / SETTINGS, _settings(config, backbone))
    for number, (name, job) in enumerate(jobs.items(), 1):
        if state.is_main_process:
            print(f"{number}/{len(jobs)} {name}, {len(job.images):,} images")
        with _naming(name):
            job.run()
            metrics = run_probe(_probe_config(config, name))
        if state.is_main_process:
            write_json(_done(config, name), {key: metrics[key] for key in ("scores", "samples")})
            _write(config)
    return _write(config) if state.is_main_process else {}


def unfinished(config: VtabConfig) -> list[str]:
    """Returns the tasks that are wanted and not finished, in VTAB's order.

    Raises:
        UnknownNameError: A wanted task is none of VTAB's.
        DataError: Folders of such tasks are missing.
    """
    for name in config.tasks or ():
        if name not in TASKS:
            raise UnknownNameError("VTAB task", name, TASKS)
    wanted = [name for name in TASKS if config.tasks is None or name in config.tasks]
    todo = [name for name in wanted if not _done(config, name).exists()]
    root = Path(config.data.path).expanduser()
    missing = [name for name in todo if not (root / name).is_dir()]
    if missing:
        raise DataError(
            f"{len(missing)} of {len(wanted)} task folders are not in {str(root)!r}: {', '.join(missing)}; prepare "
            "them, or name those to run in tasks=[...] (a mean needs all of its tasks)"
        )
    return todo


def check_vtab(config: VtabConfig, todo: list[str], backbone: Backbone | None) -> dict[str, ExtractJob]:
    """Opens the data of tasks and tells what cannot work before any work is done.

    Args:
        config: What to extract and fit.
        todo: Names of the tasks.
        backbone: Their backbone; None where there are no tasks. One on the meta device does for all checks but that
            of the weights.

    Returns:
        The extraction of each task.

    Raises:
        ConfigError: The request does not suit the backbone, or the folder holds a run with other settings or of other
            weights.
        DataError: A list or an image is missing, or the labels do not allow a probe.
    """
    _compare(config, backbone)
    jobs = {}
    for name in todo:
        with _naming(name):
            jobs[name] = job = ExtractJob(_extract_config(config, name), backbone)
            make_task(LabelledImages(job.images, job.config.data.path), _probe_config(config, name))
    for job in list(jobs.values())[:1]:  # the images of all have one size
        job.plan()
    return jobs


def table(metrics: dict[str, Any]) -> str:
    """Returns the scores as Markdown: a row for each task, linked to its report, then means; then every head."""
    lines = [
        f"# {metrics['title']}",
        "",
        "Top-1 accuracy on the whole test splits. Head, layer, level and setting were chosen on val200 by fits on "
        "train800, and fitted again on both.",
        "",
        *_header("task", "group", "accuracy", "95 % interval", "head", "features"),
    ]
    for one in metrics["tasks"]:
        link = f"[{one['task']}]({one['report']})"
        error = "" if one["error"] is None else f" ± {one['error']:.3f}"
        interval = " – ".join(map(_score, one["interval"]))
        where = f"`{one['layer']}` at {one['level']}" + ("" if one["pool"] is None else f", pooled to {one['pool']}")
        lines.append(_row(link, one["group"], f"{one['test']:.3f}{error}", interval, one["name"], where))
    for group, mean in metrics["means"].items():
        there = f"{mean['tasks'] - len(mean['missing'])} of {mean['tasks']} tasks"
        lines.append(_row(f"**{GROUPS.get(group, group)}**", there, f"**{_score(mean['mean'])}**", "", "", ""))
    heads = metrics["heads"]
    if len(heads) > 1:
        lines += ["", "## Every head by itself", "", *_header("task", *heads)]
        for one in metrics["tasks"]:
            lines.append(_row(one["task"], *(_score(head["tests"].get(one["task"])) for head in heads.values())))
        for group in metrics["means"]:
            means = (_score(head["means"][group]["mean"]) for head in heads.values())
            lines.append(_row(f"**{GROUPS.get(group, group)}**", *means))
    return "\n".join([*lines, *(f"\n{note}" for note in metrics["notes"])]) + "\n"


def _extract_config(config: VtabConfig, name: str) -> ExtractConfig:
    data = config.data.model_copy(update={"path": str(Path(config.data.path).expanduser() / name), "kind": "vtab"})
    shared = {key: getattr(config, key) for key in EXTRACT_KEYS}
    return ExtractConfig(data=data, out=str(Path(config.out) / name / "features"), **shared)


def _probe_config(config: VtabConfig, name: str) -> ProbeConfig:
    folder = Path(config.out) / name
    given = config.probe.model_dump() | {"store": str(folder / "features"), "out": str(folder / "probe")}
    return ProbeConfig(**given)


def _done(config: VtabConfig, name: str) -> Path:
    """Returns the file of a task's scores, which is written last, when its report is there."""
    return Path(config.out) / name / "done.json"


@contextmanager
def _naming(task: str) -> Iterator[None]:
    """Puts the task's name in front of an error's message: the files of all tasks have the same names."""
    try:
        yield
    except DiffrepError as error:
        error.args = (f"{task}: {error}",)
        raise


def _compare(config: VtabConfig, backbone: Backbone | None) -> None:
    """Refuses a folder of another run, whose tasks would stand in one table with these."""
    stored, settings = Path(config.out) / SETTINGS, _settings(config, backbone)
    before = read_json(stored) if stored.exists() else settings
    differ = changes({key: before.get(key) for key in settings}, settings)
    if differ:
        raise ConfigError(
            f"{config.out} holds a run with other settings ({'; '.join(differ)}); use another out, "
            "or the same settings"
        )


def _settings(config: VtabConfig, backbone: Backbone | None) -> dict[str, Any]:
    """Returns what decides the numbers, by key with one dot; without the weights where there are none to read."""
    there = backbone is not None and backbone.device.type != "meta"
    settings: dict[str, Any] = {"weights": backbone.weights_hash} if there else {}
    for key, value in to_plain(config).items():
        settings |= {f"{key}.{name}": one for name, one in value.items()} if isinstance(value, dict) else {key: value}
    return {key: value for key, value in settings.items() if key not in FREE_KEYS}


def _write(config: VtabConfig) -> dict[str, Any]:
    out = Path(config.out)
    done = {name: read_json(_done(config, name)) for name in TASKS if _done(config, name).exists()}
    metrics = _metrics(config, done)
    write_results(out, config, config.probe.seed, metrics)
    write_whole(out / TABLE, table(metrics).encode())
    return metrics


def _metrics(config: VtabConfig, done: dict[str, dict[str, Any]]) -> dict[str, Any]:
    rows = []
    heads: dict[str, dict[str, Any]] = {}
    for name, found in done.items():
        for score in found["scores"]:
            heads.setdefault(score["name"], {"tests": {}})["tests"][name] = score["test"]
        # The test score must not choose, and a baseline is no reading of the network.
        judged = [score for score in found["scores"] if not score["name"].endswith(tuple(TITLES.values()))]
        best = max(judged, key=lambda score: score["val"])
        task, samples = TASKS[name], found["samples"]
        rows.append(
            {
                "task": name,
                "group": task.group,
                "classes": task.classes,
                **{key: best[key] for key in ("name", "layer", "level", "pool", "val", "test", "interval", "error")},
                "samples": {key: samples[key] for key in ("train", "val", "test")},
                "report": f"{name}/probe/report.html",
            }
        )
    for head in heads.values():
        head["means"] = vtab_means(head["tests"])
    notes = []
    if config.data.limit is not None:
        notes.append(f"data.limit is {config.data.limit}: these are not the scores of VTAB-1k.")
    return {
        "title": f"VTAB-1k of {config.backbone.source}",
        "metric": "accuracy",
        "tasks": rows,
        "means": vtab_means({row["task"]: row["test"] for row in rows}),
        "heads": heads,
        "notes": notes,
    }


def _header(*names: str) -> list[str]:
    return [_row(*names), "|" + " --- |" * len(names)]


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _score(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
