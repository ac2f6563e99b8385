"""Where weights come from: names that ship with the package, paths, and the hub."""

from __future__ import annotations

import json
import re
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from diffrep.errors import CheckpointError, ConfigError, UnknownNameError

BUNDLED: dict[str, str] = {
    "fashion-unet": "U-Net, 32x32, one channel, trained on the 60,000 training images of Fashion-MNIST",
    "cifar-unet": "U-Net, 32x32, colour, trained on the 50,000 training images of CIFAR-10",
    "sit-mini": "SiT with REPA, 32x32, one channel, trained on Fashion-MNIST: the 60,000 training images, labelled",
}
# Only safetensors and JSON are fetched from the hub; half-precision and EMA duplicates of the same weights are not.
# Root files are named one by one: a pipeline's root often holds whole single-file checkpoints too.
HUB_CONFIGS = ["config.json", "scheduler_config.json", "model_index.json"]
HUB_CONFIGS += [f"{part}/*.json" for part in ("unet", "transformer", "vae", "scheduler")]
HUB_WEIGHTS = ["diffusion_pytorch_model*.safetensors"]
HUB_WEIGHTS += [f"{part}/diffusion_pytorch_model*.safetensors" for part in ("unet", "transformer", "vae")]
HUB_TEXT = ["model_index.json", "scheduler/*", "tokenizer*/*", "text_encoder*/*.json", "text_encoder*/*.safetensors"]
HUB_DUPLICATES = ["*.fp16.*", "*.bf16.*", "*.non_ema.*"]


def list_backbones() -> dict[str, str]:
    """Returns the names that `load_backbone` knows, with a line on each.

    The bundled ones come with weights; of the registered ones the configs ship, which is all `diffrep layers` needs.
    """
    return BUNDLED | {name: entry["about"] for name, entry in registered().items()}


@cache
def registered() -> dict[str, dict[str, Any]]:
    """Returns the entries of `registered/`, by name."""
    folder = resources.files("diffrep.backbones") / "registered"
    entries = [json.loads(file.read_text()) for file in folder.iterdir() if file.name.endswith(".json")]
    return {entry["name"]: entry for entry in sorted(entries, key=lambda entry: entry["name"].lower())}


def weights_of(entry: dict[str, Any]) -> str:
    """Returns the hub id of a registered backbone.

    Raises:
        ConfigError: Its weights are no hub repository; the message says where they are and how to load them.
    """
    if "hub" in entry:
        return entry["hub"]
    loading = f"load_backbone(FILE, family={entry['family']!r}, config={entry['config']!r})"
    if "diffrep convert" in entry["weights"]:
        loading = "load_backbone(FOLDER) of the folder it writes"
    raise ConfigError(
        f"{entry['name']!r} ships as a config, enough for device='meta'; for its weights get {entry['weights']}, and "
        f"{loading}"
    )


def find(source: str | Path, revision: str | None, with_weights: bool) -> Path:
    """Returns the path that a source stands for; a hub id is fetched.

    Raises:
        UnknownNameError: It is neither a path nor a known name.
        CheckpointError: It is a file's name and there is no such file, or the hub did not give it.
    """
    path = Path(source).expanduser()
    if path.exists():
        return path
    name = str(source)
    if name in BUNDLED:
        return Path(str(resources.files("diffrep.backbones") / "bundled" / name))
    if path.suffix in (".pt", ".pth", ".pkl", ".safetensors"):
        raise CheckpointError(f"no such file: {path}")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise UnknownNameError(
            "backbone", name, list_backbones(), "No such path either; a hub id is written owner/name"
        )
    return snapshot(name, revision, HUB_CONFIGS + (HUB_WEIGHTS if with_weights else []))


def snapshot(name: str, revision: str | None, patterns: list[str]) -> Path:
    """Fetches chosen files of a hub repository and returns their folder.

    Raises:
        CheckpointError: The hub did not give it.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(name, revision=revision, allow_patterns=patterns, ignore_patterns=HUB_DUPLICATES)
        )
    except Exception as error:  # network, permission and not-found errors of several libraries
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{name!r} is no local path, and the hub did not give it: {reason}") from error
