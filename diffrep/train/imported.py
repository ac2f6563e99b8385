"""Latents that other programs have prepared, as a store to train from."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from diffrep.errors import ConfigError, DataError
from diffrep.store import NUMERICS, FeatureStore, StoreWriter

Kind = Literal["std", "logvar"]
IMPORTED = "imported"  # what such a store has for the name of its network
# diffusers' bounds of a log-variance.
BOUNDS = (-30.0, 20.0)


def import_moments(moments: torch.Tensor, kind: Kind = "std", scale: float = 1.0, shift: float = 0.0) -> torch.Tensor:
    """Returns the moments of (z - shift) scale, which a network is trained on, for those of an autoencoder's z.

    Args:
        moments: (N, 2C, h, w): C channels of means, then C of what `kind` says.
        kind: "std" or "logvar": what stands beside the means.
        scale: Factor of the latents, such as 0.18215 for Stable Diffusion's.
        shift: What is taken away before.

    Returns:
        (N, 2C, h, w) fp32: means, then standard deviations.

    Raises:
        ConfigError: The kind is another, channels are odd, or a standard deviation is negative.
    """
    if kind not in ("std", "logvar"):
        raise ConfigError(f"kind is 'std' or 'logvar', what stands beside the means; got {kind!r}")
    if moments.ndim != 4 or moments.shape[1] % 2:
        raise ConfigError(f"moments are (N, 2C, h, w), means and as many channels again; got {tuple(moments.shape)}")
    mean, spread = moments.float().chunk(2, dim=1)
    if kind == "std" and spread.numel() and spread.min() < 0:
        raise ConfigError(f"a standard deviation is {spread.min():.3g}; are these log-variances? Give kind='logvar'")
    std = spread if kind == "std" else (spread.clamp(*BOUNDS) / 2).exp()
    return torch.cat([(mean - shift) * scale, std * scale], dim=1)


def import_repa(
    folder: str | Path,
    out: str | Path,
    kind: Kind = "std",
    scale: float = 0.18215,
    shift: float = 0.0,
    split: str = "train",
    unit_size: int = 1000,
) -> FeatureStore:
    """Turns the latents that REPA's preprocessing writes into a store with the layer "moments".

    Like an extraction it goes on where it was stopped. Samples are called as the images are that REPA puts beside the
    latents: of `00000/img-latents-00000007.npy` the id is `00000/img00000007.png`. So targets that are extracted from
    that folder of images go with the store.

    Args:
        folder: `.npy` files (2C, h, w) at any depth, and `dataset.json` with {"labels": [[path, class], ...]}.
        out: Folder of the store.
        kind: What the files hold beside means, see `import_moments`.
        scale: Likewise; REPA's files hold the autoencoder's own z.
        shift: Likewise.
        split: Name of the store's only split.
        unit_size: Samples of a unit.

    Raises:
        DataError: There are no such files, one cannot be read or has another shape, or has no label.
        ConfigError: The moments are not what `kind` says.
        StoreError: `out` holds another store.
    """
    root = Path(folder).expanduser()
    files = sorted(root.rglob("*.npy"), key=lambda file: file.as_posix())
    if not files:
        raise DataError(f"no .npy files in {root}")
    names = [file.relative_to(root).as_posix() for file in files]
    ids = [name.replace("img-latents-", "img").removesuffix(".npy") + ".png" for name in names]
    labels = _labels(root / "dataset.json", names)
    shape = import_moments(_load(files[0])[None], kind).shape[1:]
    listed = repr([(name, file.stat().st_size) for name, file in zip(names, files, strict=True)])
    codec = {"kind": IMPORTED, "scale": scale, "shift": shift, "given": kind}
    meta: dict[str, Any] = {
        "numerics": NUMERICS,
        "backbone": {"name": root.name, "network": IMPORTED, "codec": codec},
        "request": {"dtype": "float32", "posterior": "moments"},
        "layers": {"moments": {"shape": list(shape), "cost": 0.0}},
        "levels": [["clean", "clean", 0.0, 1.0, 0.0]],
        "data": {"fingerprint": hashlib.sha256(listed.encode()).hexdigest()[:16], "path": root.name},
        "splits": {split: [0, len(files)]},
        "classes": None,
        "unit_size": unit_size,
        "versions": {},
    }
    writer = StoreWriter(out, meta)
    for unit in writer.missing():
        read = [_load(files[row]) for row in unit.rows]
        odd = [names[row] for row, one in zip(unit.rows, read, strict=True) if one.shape != shape]
        if odd:
            raise DataError(f"{root / odd[0]} has another shape than {names[0]}, which is {tuple(shape)}")
        moments = import_moments(torch.stack(read), kind, scale, shift)
        mine = None if labels is None else [labels[row] for row in unit.rows]
        writer.write(unit, {"moments@clean": moments}, [ids[row] for row in unit.rows], list(unit.rows), mine, [])
    writer.finish()
    return FeatureStore(out)


def _load(file: Path) -> torch.Tensor:
    try:
        return torch.from_numpy(np.load(file, allow_pickle=False)).float()
    except (OSError, ValueError, EOFError, TypeError) as error:
        raise DataError(f"cannot read {file}: {error}") from error


def _labels(file: Path, names: list[str]) -> list[int] | None:
    """Returns the class of each file, or None where the list has none."""
    if not file.is_file():
        raise DataError(f"{file} is missing, the list of labels that REPA's preprocessing writes")
    try:
        listed = json.loads(file.read_text())["labels"]
        found = None if listed is None else {str(name).replace("\\", "/"): int(label) for name, label in listed}
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{file} is no list of labels: {error!r}") from error
    without = [] if found is None else [name for name in names if name not in found]
    if without:
        raise DataError(f"{file} has no label of {len(without)} files, first {without[0]}")
    return None if found is None else [found[name] for name in names]
