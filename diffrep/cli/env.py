"""Print versions, devices and threads, for bug reports; with --check, tell whether work can be done or goes on.

Examples:
  diffrep env
  diffrep env --check                        # are all packages of allowed releases, and does every device compute?
  diffrep env --check --monitor run.prom     # has the job with `monitor=run.prom` made progress of late?
"""

from __future__ import annotations

import argparse
from pathlib import Path

SHOWN = (
    "diffrep",
    "torch",
    "torchvision",
    "diffusers",
    "accelerate",
    "timm",
    "lightning",
    "safetensors",
    "transformers",
    "datasets",
    "xformers",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the verb's arguments."""
    parser.add_argument(
        "--check", action="store_true", help="exit with status 1 when something is wrong, and say what"
    )
    parser.add_argument("--monitor", metavar="FILE", help="check only the counters that a running extraction writes")
    parser.add_argument(
        "--max-age", type=float, default=300.0, metavar="S", help="seconds that they may be old (default 300)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Prints one fact a line, or what is wrong; returns 1 when a check fails."""
    if arguments.monitor:
        problems = stale(Path(arguments.monitor), arguments.max_age)
    elif arguments.check:
        problems = unfit_packages() + unfit_devices()
    else:
        show()
        return 0
    print("\n".join(problems) or "ok")
    return 1 if problems else 0


def show() -> None:
    """Prints versions, devices and threads."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    import torch

    print(f"python       {platform.python_version()} on {platform.platform()}")
    for name in SHOWN:
        try:
            print(f"{name:<12} {version(name)}")
        except PackageNotFoundError:
            print(f"{name:<12} not installed")
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    print(f"CUDA         {', '.join(devices) or 'no device'}")
    print(f"threads      {torch.get_num_threads()}")


def stale(file: Path, seconds: float) -> list[str]:
    """Tells what is wrong with a job's progress; torch is not imported, so that a container may ask every minute.

    Args:
        file: What the job was given as `monitor`; of several processes each has its own, FILE.RANK, and the newest
            counts, since what one leaves undone is taken over by the others.
        seconds: Seconds that it may be old.

    Returns:
        No line, or one.
    """
    import time

    files = [one for one in [file, *file.parent.glob(f"{file.name}.*")] if one == file or one.suffix[1:].isdigit()]
    ages = [time.time() - one.stat().st_mtime for one in files if one.exists()]
    if not ages:
        return [f"{file} is not there: no job has been given monitor={file}, or it has not begun"]
    if min(ages) > seconds:
        return [f"no progress for {min(ages):,.0f} s, and {seconds:,.0f} s are allowed: {file} is that old"]
    return []


def unfit_packages() -> list[str]:
    """Returns a line for each package that diffrep needs and that is missing or of a release it does not allow."""
    from importlib.metadata import PackageNotFoundError, requires, version

    from packaging.requirements import Requirement

    problems = []
    for needed in map(Requirement, requires("diffrep") or []):
        if needed.marker is None or needed.marker.evaluate({"extra": ""}):
            try:
                found = version(needed.name)
            except PackageNotFoundError:
                problems.append(f"{needed.name} is not installed; {needed.specifier} is needed")
                continue
            if not needed.specifier.contains(found, prereleases=True):
                problems.append(f"{needed.name} {found} is installed; {needed.specifier} is needed")
    return problems


def unfit_devices() -> list[str]:
    """Returns a line for each device that cannot multiply two matrices."""
    import torch

    problems = []
    for device in ["cpu", *(f"cuda:{number}" for number in range(torch.cuda.device_count()))]:
        try:
            ones = torch.ones(64, 64, device=device)
            if (ones @ ones).sum().item() != 64**3:
                problems.append(f"{device} computes wrongly: a product of ones is not what it must be")
        except RuntimeError as error:
            problems.append(f"{device} does not compute: {error}")
    return problems
