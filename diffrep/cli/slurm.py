"""Submit a verb to a SLURM cluster, from where it comes back by itself when it is preempted or out of time.

An extraction is an array of independent tasks, each with a process for every GPU of its machine; they take units
through claims, so any number of them may run, end or be added at any time. The other verbs are one job of one machine
or several, with a process for every GPU, and go on from their last checkpoint. The config is resolved and kept in the
folder first: what is queued does not change when files do. Plain batch scripts are in scripts/slurm.

Examples:
  diffrep slurm extract configs/extract/folder.yaml data=PATH out=runs/photos --array 16 --gpus-per-node 4 --time 720
  diffrep slurm probe configs/probe/trained.yaml store=runs/features --partition gpu --sbatch account=NAME --dry-run
  diffrep slurm train configs/train/repa.yaml data=PATH out=runs/repa --nodes 4 --gpus-per-node 8 --time 1440
  diffrep slurm correspond evaluate configs/correspond/spair.yaml pairs=SPair-71k backbone=SOURCE out=runs/spair
  diffrep slurm extract configs/extract/folder.yaml data=PATH out=runs/photos --array 2 --cluster local --wait
"""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from diffrep.cli.validate import SCHEMAS
from diffrep.cli.words import add_config, read_config
from diffrep.errors import ConfigError

if TYPE_CHECKING:
    from diffrep.cluster import Allocation
    from diffrep.config.schema import Section

WORK = ("extract", "probe", "search", "vtab", "feedback", "correspond", "train", "sample")
ACTIONS = ("evaluate", "train")  # of correspond, those that several processes share
NO_OPTION = "{given!r} is no option of sbatch; write NAME=VALUE, or NAME alone, without dashes"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the verb's arguments."""
    parser.add_argument("work", choices=WORK, metavar="VERB", help=", ".join(WORK))
    add_config(parser)
    add = parser.add_argument
    add("--array", type=_count, default=1, metavar="K", help="extract: independent tasks (default: 1)")
    add("--at-once", type=_count, metavar="M", help="tasks of the array that may run at a time (default: all)")
    add("--nodes", type=_count, default=1, metavar="N", help="machines, of each task (default: 1)")
    add("--gpus-per-node", type=_number, default=1, metavar="G", help="GPUs of each machine (default: 1; 0 for none)")
    add("--nproc", type=_count, metavar="N", help="processes on each machine (default: one for each GPU)")
    add("--cpus", type=_count, metavar="C", help="CPU cores of each process (default: the cluster's)")
    add("--mem", type=float, metavar="GB", help="memory of each machine (default: the cluster's)")
    add("--partition", metavar="P", help="where to queue (default: the cluster's)")
    add("--time", type=_count, default=60, metavar="MIN", help="minutes until it must queue again (default: 60)")
    add("--grace", type=_count, default=120, metavar="S", help="seconds to end what was begun (default: 120)")
    add("--timeouts", type=_number, default=10, metavar="N", help="times that it may queue again (default: 10)")
    add("--name", help="of the job (default: diffrep-VERB)")
    add("--setup", action="append", default=[], metavar="LINE", help="line of shell before the work; may be repeated")
    add("--sbatch", action="append", default=[], metavar="NAME=VALUE", help="any other option; may be repeated")
    add("--folder", type=Path, default=Path("runs/slurm"), help="for scripts and logs (default: runs/slurm)")
    add("--cluster", choices=("slurm", "local", "debug"), default="slurm", help="local and debug: on this machine")
    add("--dry-run", action="store_true", help="print what would be submitted, and stop")
    add("--wait", action="store_true", help="wait, tell how the tasks ended, and fail when one did")


def run(arguments: argparse.Namespace) -> int:
    """Submits, or prints what would be."""
    work, words = _split(arguments)
    apart = work == ["extract"]
    if not apart and arguments.array > 1:
        raise ConfigError(f"{' '.join(work)} is one job and no array; give it --nodes, and leave --array out")
    config = _checked(work, words)
    from diffrep.cluster import Task, submit, wait, watching

    allocation = _allocation(arguments, work[0])
    processes = allocation.processes if apart else 1
    if arguments.dry_run:
        each = f"{allocation.nodes} x {allocation.processes} processes: "
        count = f"{arguments.array} tasks of " if arguments.array > 1 else ""
        print(f"{allocation.text(apart)}\n{count}{each}{shlex.join(['diffrep', *work, *words])}")
        return 0
    kept = (*work, str(_keep(config, "-".join(work), arguments.folder)))
    tasks = [Task(kept, processes, apart, index, arguments.array) for index in range(arguments.array)]
    jobs = submit(tasks, allocation, arguments.folder, arguments.cluster)
    print(watching(jobs, arguments.folder, arguments.cluster), flush=True)
    if arguments.wait or arguments.cluster == "debug":  # which does nothing until it is waited for
        return 0 if wait(jobs, arguments.cluster) else 1
    return 0


def _split(arguments: argparse.Namespace) -> tuple[list[str], list[str]]:
    """Returns the verb, with its action, and the words of its config."""
    if arguments.work != "correspond":
        return [arguments.work], arguments.words
    action = arguments.words[0] if arguments.words else None
    if action not in ACTIONS:
        raise ConfigError(f"correspond needs one of the actions {', '.join(ACTIONS)} behind it, got {action!r}")
    return [arguments.work, action], arguments.words[1:]


def _checked(work: list[str], words: list[str]) -> Section:
    """Returns the config when the work can be expected to start."""
    from diffrep import config

    read = read_config(getattr(config, SCHEMAS["-".join(work)]), words)
    if work == ["extract"]:  # the others may wait for what another job makes
        from diffrep.cli.extract import on_meta
        from diffrep.extract.job import ExtractJob

        ExtractJob(on_meta(read)).plan()
    return read


def _allocation(arguments: argparse.Namespace, verb: str) -> Allocation:
    from diffrep.cluster import Allocation

    options = {}
    for given in arguments.sbatch:
        name, equals, value = given.partition("=")
        if not name or name.startswith("-"):
            raise ConfigError(NO_OPTION.format(given=given))
        options[name] = value if equals else True
    return Allocation(
        name=arguments.name or f"diffrep-{verb}",
        minutes=arguments.time,
        nodes=arguments.nodes,
        gpus=arguments.gpus_per_node,
        processes=arguments.nproc or max(1, arguments.gpus_per_node),
        array=arguments.array,
        at_once=arguments.at_once,
        cores=arguments.cpus,
        memory=arguments.mem,
        partition=arguments.partition,
        grace=arguments.grace,
        timeouts=arguments.timeouts,
        setup=tuple(arguments.setup),
        options=options,
    )


def _keep(config: Section, name: str, folder: Path) -> Path:
    """Writes a resolved config into the folder and returns the file."""
    from diffrep.config import digest, to_plain, to_yaml

    file = folder / f"{name}-{digest(to_plain(config))}.yaml"
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text(to_yaml(config))
    return file


def _number(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be a whole number, got {text!r}")
    return int(text)


def _count(text: str) -> int:
    if _number(text) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text!r}")
    return int(text)
