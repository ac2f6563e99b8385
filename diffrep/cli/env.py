"""Print versions, devices and threads, for bug reports."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the verb's arguments: none."""


def run(arguments: argparse.Namespace) -> None:
    """Prints one fact a line."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    import torch

    print(f"python       {platform.python_version()} on {platform.platform()}")
    for name in (
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
    ):
        try:
            print(f"{name:<12} {version(name)}")
        except PackageNotFoundError:
            print(f"{name:<12} not installed")
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    print(f"CUDA         {', '.join(devices) or 'no device'}")
    print(f"threads      {torch.get_num_threads()}")
