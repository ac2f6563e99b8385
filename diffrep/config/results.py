"""The two files of every run folder: config.yaml (resolved) and results.json."""

from __future__ import annotations

import json
import shlex
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from diffrep.config.loader import digest, to_plain, to_yaml
from diffrep.errors import ConfigError

PACKAGES = ("diffrep", "torch", "diffusers", "accelerate", "lightning", "numpy")


def write_results(folder: Path, config: Any, seed: int, metrics: dict[str, Any]) -> Path:
    """Writes config.yaml and results.json.

    Args:
        folder: Run folder; created when missing.
        config: The run's config, or plain values.
        seed: The run's seed.
        metrics: What was measured, as JSON values.

    Returns:
        The path of results.json.
    """
    folder.mkdir(parents=True, exist_ok=True)
    plain = config if isinstance(config, dict) else to_plain(config)
    (folder / "config.yaml").write_text(to_yaml(plain))
    results = {
        "command": _command(),
        "config_hash": digest(plain),
        "versions": {name: version(name) for name in PACKAGES},
        "seed": seed,
        "metrics": metrics,
    }
    path = folder / "results.json"
    path.write_text(json.dumps(results, indent=1) + "\n")
    return path


def _command() -> str:
    # `python -m diffrep`, which `--nproc` starts too, has the module's path in its place.
    name = Path(sys.argv[0]).name
    return shlex.join(["diffrep" if name == "__main__.py" else name, *sys.argv[1:]])


def read_results(folder: Path) -> dict[str, Any]:
    """Reads results.json of a run folder.

    Raises:
        ConfigError: There is none, or it cannot be read.
    """
    path = folder / "results.json"
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise ConfigError(
            f"no results.json in {str(folder)!r}; 'diffrep probe' and 'diffrep demo' write one"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from error
