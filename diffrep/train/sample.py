"""Images from a diffusion model: PNG files, the array that evaluators read, and a grid to look at."""

from __future__ import annotations

import io
import json
import math
import shutil
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import tqdm
from PIL import Image
from torchvision.utils import make_grid

from diffrep import dist
from diffrep.backbones import Backbone
from diffrep.backbones.codec import Codec
from diffrep.backbones.conditioning import ClassLabels, Cond, OneHotLabels
from diffrep.backbones.fingerprint import hash_of_weights
from diffrep.config import SampleConfig, SamplerConfig, read_results, to_plain, write_results
from diffrep.errors import ConfigError, StoreError
from diffrep.extract.job import open_backbone
from diffrep.noise import sample_noise
from diffrep.store.layout import changes, open_whole, read_json, write_json, write_whole
from diffrep.train.order import step_rng
from diffrep.train.sampler import clips, evaluations, generate, levels_of, method_of, null_condition

# What the images of a folder were made with, by key.
REQUEST = "request.json"
DECODED = 16  # images that an autoencoder, which takes far more memory for each than the network, decodes at a time


def run_sample(config: SampleConfig, backbone: Backbone | None = None) -> dict[str, Any]:
    """Makes images, or goes on with those of `config.out`.

    Image i depends on the request and on i alone: not on the batch size, nor on the number of processes, which share
    the images, nor on where a run was stopped. So `count` may grow.

    Args:
        config: What to make.
        backbone: A loaded model in place of `config.backbone`, which then only names it.

    Returns:
        What results.json keeps under `metrics`.

    Raises:
        ConfigError: Model, sampler and labels do not go together, or the folder holds images of another request.
        StoreError: A file cannot be read or written.
    """
    state = dist.state()  # first: it gives each process its own GPU, where device "auto" then loads the network
    backbone = backbone or open_backbone(config.backbone)
    images = Path(config.out) / "images"
    labels = Labels(config, backbone)
    _check(config, backbone, labels)
    request = _request(config, backbone, labels)
    facts = _facts(config, backbone, labels)
    _claim(config, request)
    if _finished(config):
        return facts
    state.wait_for_everyone()

    mine = range(state.process_index, config.count, state.num_processes)
    missing = [number for number in mine if not image_file(images, number).exists()]
    with tqdm(total=len(missing), desc=dist.label("sample"), unit="image") as bar:
        for start in range(0, len(missing), config.batch_size):
            numbers = missing[start : start + config.batch_size]
            made = make_images(backbone, config.sampler, numbers, labels(numbers), config.seed)
            for number, image in zip(numbers, made, strict=True):
                write_whole(image_file(images, number), _png(image))
            bar.update(len(numbers))
    state.wait_for_everyone()
    if state.is_main_process:
        if not _finished(config):  # as it is when another run of the same request was quicker
            _write_whole_set(config, labels, facts)
        if not config.png:
            shutil.rmtree(images, ignore_errors=True)  # and when one is still writing there
    state.wait_for_everyone()
    return facts


def make_images(
    backbone: Backbone, sampler: SamplerConfig, numbers: Sequence[int], cond: Cond, seed: int
) -> torch.Tensor:
    """Makes images by their numbers; each depends on the seed and its own number alone.

    Args:
        backbone: The model.
        sampler: How.
        numbers: Of the images.
        cond: Condition of all of them or one for each; None is "no class".
        seed: Seeds the initial noise and the sampler's.

    Returns:
        (B, C, H, W) uint8 on the CPU.
    """
    shape = (backbone.in_channels, backbone.sample_size, backbone.sample_size)

    def draw(stage: str, index: int) -> torch.Tensor:
        return torch.stack([sample_noise(shape, seed, str(number), stage, index) for number in numbers])

    latents = generate(backbone, sampler, draw("start", 0), cond, lambda step: draw("step", step))
    with torch.no_grad():
        pixels = [backbone.codec.decode(part).float() for part in latents.split(DECODED)]
    return (torch.cat(pixels) * 255).round().clamp(0, 255).to(torch.uint8).cpu()


class Labels:
    """The class of each image.

    Args:
        config: Has the policy; None is "balanced" for networks with classes, else "none".
        backbone: Has the classes.

    Raises:
        ConfigError: The network has no such classes.
    """

    def __init__(self, config: SampleConfig, backbone: Backbone):
        known = count_classes(backbone)
        self.seed = config.seed
        self.policy = config.labels or ("balanced" if known else "none")
        self.classes = config.classes or known
        if not known and self.policy != "none":
            raise ConfigError(f"{backbone.name} takes no class labels, got labels={config.labels}; leave labels out")
        if config.classes and self.policy not in ("balanced", "random"):
            raise ConfigError(
                f"classes={config.classes} is the number of classes that 'balanced' and 'random' take, and labels "
                f"here are {self.policy}; leave classes out"
            )
        if self.classes > known:
            raise ConfigError(f"classes={config.classes}: {backbone.name} has {known}, from 0 to {known - 1}")
        listed = list(self.policy) if not isinstance(self.policy, str) else None
        if listed or self.policy == "none":
            backbone.condition(listed, len(listed or [0]))  # knows whether there are such classes, or "no class"

    def __call__(self, numbers: Sequence[int]) -> list[int] | None:
        """Returns the labels of images by their numbers; None is "no class" for all."""
        if self.policy == "none":
            return None
        if self.policy == "balanced":
            return [number % self.classes for number in numbers]
        if self.policy == "random":
            return [int(step_rng(self.seed, "label", number).integers(self.classes)) for number in numbers]
        return [self.policy[number % len(self.policy)] for number in numbers]


def count_classes(backbone: Backbone) -> int:
    """Returns the number of classes that a network can be given, 0 when it takes none."""
    conditioner = backbone.conditioner
    if isinstance(conditioner, ClassLabels):
        return conditioner.rows - (conditioner.null is not None)
    return conditioner.classes if isinstance(conditioner, OneHotLabels) else 0


def makes_images(codec: Codec) -> bool:
    """Tells whether a codec turns what a network makes into images."""
    return codec.image_channels in (1, 3) and type(codec).decode is not Codec.decode


def image_file(folder: Path, number: int) -> Path:
    """Returns the path of an image."""
    return folder / f"{number:06d}.png"


def write_grid(path: Path, images: torch.Tensor) -> None:
    """Writes images (B, C, H, W) uint8, side by side in a square, as one PNG."""
    grid = make_grid(images, nrow=math.ceil(math.sqrt(len(images))))
    write_whole(path, _png(grid))


def _check(config: SampleConfig, backbone: Backbone, labels: Labels) -> None:
    if not (config.png or config.npz or config.grid):
        raise ConfigError("png, npz and grid are all off, so nothing would be left; switch one on")
    if not makes_images(backbone.codec):
        raise ConfigError(
            f"{backbone.name} makes latents of {backbone.in_channels} channels and was opened without an autoencoder "
            "that turns them to images; give backbone.codec, a folder or hub id"
        )
    levels_of(backbone.schedule, config.sampler)
    if config.sampler.guidance != 1:
        null_condition(backbone)
        if labels.policy == "none":
            raise ConfigError(
                f"sampler.guidance={config.sampler.guidance:g} leads from 'no class' to a class, and labels=none; "
                "give labels, or guidance=1"
            )


def _request(config: SampleConfig, backbone: Backbone, labels: Labels) -> dict[str, Any]:
    """Returns all that decides the images, as JSON values by key."""
    sampler = to_plain(config.sampler) | {"method": method_of(backbone.schedule, config.sampler)}
    model = {key: value for key, value in backbone.describe().items() if key != "name"}
    request = {f"sampler.{key}": value for key, value in sampler.items()}
    request |= {f"backbone.{key}": value for key, value in model.items()}
    request |= {"labels": labels.policy, "classes": labels.classes, "seed": config.seed}
    return json.loads(json.dumps(request))


def _facts(config: SampleConfig, backbone: Backbone, labels: Labels) -> dict[str, Any]:
    """Returns what has to stand beside every figure that is measured on the images."""
    sampler, schedule = config.sampler, backbone.schedule
    method, levels = method_of(schedule, sampler), levels_of(schedule, sampler)
    calls, guided = evaluations(schedule, sampler)
    autoencoder = backbone.codec.module()
    facts = {
        "count": config.count,
        "sampler": method,
        "steps": len(levels),
        "nfe": calls,
        "guided_calls": guided,
        "guidance": sampler.guidance,
        "interval": list(sampler.interval),
        "guided_channels": sampler.guided_channels,
        "labels": labels.policy if isinstance(labels.policy, str) else list(labels.policy),
        "classes": labels.classes,
        "model": backbone.name,
        "weights": backbone.weights_hash,
        "codec": backbone.codec.describe(),
        # One encoder may have several decoders.
        "codec_weights": None if autoencoder is None else hash_of_weights(autoencoder),
        "dtype": str(backbone.dtype).removeprefix("torch."),
        "image": [backbone.image_channels, backbone.image_size, backbone.image_size],
    }
    own = {"sde": ["last"], "ddim": ["eta"], "heun": ["churn"]}.get(method, [])
    facts |= {key: getattr(sampler, key) for key in own}
    if method in ("ddpm", "ddim"):
        x = torch.zeros(1, backbone.in_channels, backbone.sample_size, backbone.sample_size)
        learned = backbone.denoise(x, levels[-1].time, labels([0])).shape[1] == 2 * backbone.in_channels
        variance = "learned" if learned else "posterior"
        facts |= {
            "clipped": clips(backbone, sampler),
            "variance": variance if method == "ddpm" else f"eta {sampler.eta:g}",
        }
        if learned and method == "ddim":
            facts["variance"] += ", learned one not used"
    return facts


def _claim(config: SampleConfig, request: dict[str, Any]) -> None:
    """Takes the folder on all processes, or refuses one that holds other images.

    Raises:
        ConfigError: It does.
    """
    state, out = dist.state(), Path(config.out)
    if (out / REQUEST).exists():
        differ = changes(read_json(out / REQUEST), request)
        if differ:
            raise ConfigError(
                f"{out} holds images of another request ({'; '.join(differ)}); give another out, or the same settings"
            )
    there = sorted(file.stem for file in (out / "images").glob("*.png"))
    if not (out / REQUEST).exists():
        if there:
            raise ConfigError(f"{out / 'images'} holds images that were not made here; give another out")
        if (out / "results.json").exists():
            raise ConfigError(f"{out} holds the results of another command; give another out")
    more = [name for name in there if name.isdecimal() and int(name) >= config.count]
    if more:
        raise ConfigError(
            f"{out / 'images'} holds more than count={config.count} images, up to number {max(more)}; give another "
            "out, or no less than there are"
        )
    state.wait_for_everyone()  # all have looked before one writes
    if state.is_main_process:
        write_json(out / REQUEST, request)
    state.wait_for_everyone()


def _finished(config: SampleConfig) -> bool:
    """Returns whether a run that keeps no PNG files has left everything else."""
    out = Path(config.out)
    wanted = ["results.json", *(["samples.npz"] if config.npz else []), *(["grid.png"] if config.grid else [])]
    if config.png or not all((out / name).exists() for name in wanted):
        return False
    return read_results(out)["metrics"]["count"] == config.count


def _write_whole_set(config: SampleConfig, labels: Labels, facts: dict[str, Any]) -> None:
    """Writes what is made of the PNG files, and results.json."""
    out, images = Path(config.out), Path(config.out) / "images"
    if config.npz:
        _write_npz(out / "samples.npz", images, config.count, labels(range(config.count)))
    if config.grid:
        shown = [_read(images, number) for number in range(min(config.grid, config.count))]
        write_grid(out / "grid.png", torch.from_numpy(np.stack(shown)).movedim(-1, 1))
    write_results(out, config, config.seed, facts)


def _png(image: torch.Tensor) -> bytes:
    """Encodes (1 or 3, H, W) uint8."""
    buffer = io.BytesIO()
    Image.fromarray(image.movedim(0, -1).squeeze(-1).numpy()).save(buffer, format="PNG")
    return buffer.getvalue()


def _read(folder: Path, number: int) -> np.ndarray:
    """Returns an image as (H, W, C) uint8."""
    try:
        with Image.open(image_file(folder, number)) as image:
            pixels = np.asarray(image)
    except OSError as error:
        raise StoreError(
            f"cannot read {image_file(folder, number)}: {error}; delete it and run again to make it anew"
        ) from error
    return pixels if pixels.ndim == 3 else pixels[..., None]


def _write_npz(path: Path, folder: Path, count: int, labels: list[int] | None) -> None:
    """Writes `arr_0` (N, H, W, C) uint8 and, where there are labels, `arr_1` (N,) int64, one image at a time.

    The names are those of guided-diffusion, whose evaluator reads `arr_0`.
    """
    with open_whole(path) as file, zipfile.ZipFile(file, "w") as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as member:
            shape = (count, *_read(folder, 0).shape)
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(member, header)
            for number in range(count):
                member.write(_read(folder, number).tobytes())
        if labels is not None:
            with archive.open("arr_1.npy", "w") as member:
                np.lib.format.write_array(member, np.asarray(labels, dtype=np.int64))
