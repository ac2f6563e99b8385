"""EDM (Karras et al., 2022): its networks, its four preconditionings, and the published variants."""

from __future__ import annotations

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from diffrep.backbones.edm_unet import DhariwalUNet, SongUNet
from diffrep.errors import ConfigError, UnknownNameError, suggest

__all__ = ["PRECONDITIONINGS", "DhariwalUNet", "Preconditioning", "SongUNet", "edm_arguments"]

SIGMA_DATA = 0.5


class Preconditioning(ABC):
    """How a network F becomes a denoiser, D(x; sigma) = c_skip x + c_out F(c_in x; c_noise): EDM's table 1.

    Every coefficient takes sigma (B,) and gives (B,), in fp32 and in the order of operations of NVlabs/edm: near
    sigma = 0 that rounds by more than a per cent, and the published weights were trained with it.

    Attributes:
        sigma_min: Lowest noise level that the network was trained for.
        sigma_max: Highest one.
        outputs_per_channel: Channels of F for each channel of x; those past the first C are not used.
    """

    sigma_min: float = 0.0
    sigma_max: float = math.inf
    outputs_per_channel: int = 1

    @abstractmethod
    def c_in(self, sigma: Tensor) -> Tensor:
        """Returns the factor on the network's input."""

    @abstractmethod
    def c_noise(self, sigma: Tensor) -> Tensor:
        """Returns the noise label that the network is given."""

    @abstractmethod
    def c_out(self, sigma: Tensor) -> Tensor:
        """Returns the factor on the network's output."""

    def c_skip(self, sigma: Tensor) -> Tensor:
        """Returns the factor on x in the denoised image."""
        return torch.ones_like(sigma, dtype=torch.float32)

    def round_sigma(self, sigma: Tensor) -> Tensor:
        """Returns the nearest noise level that the network knows."""
        return sigma.float()

    def denoised(
        self, network: nn.Module, x: Tensor, sigma: Tensor, class_labels: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        """Estimates the clean image.

        Args:
            network: F, `SongUNet` or `DhariwalUNet`; it runs in the dtype of its weights.
            x: Noised images (B, C, H, W), clean + sigma * noise, clean in [-1, 1].
            sigma: Noise levels (B,).
            class_labels: One-hot (B, label_dim) or None.
            **kwargs: Further arguments of the network.

        Returns:
            D(x; sigma), (B, C, H, W) in fp32.
        """
        x, sigma = x.float(), sigma.float()
        scaled = (_per_image(self.c_in(sigma)) * x).to(next(network.parameters()).dtype)
        raw = network(scaled, self.c_noise(sigma), class_labels, **kwargs).float()
        if self.outputs_per_channel > 1:
            raw = raw[:, : x.shape[1]]
        return _per_image(self.c_skip(sigma)) * x + _per_image(self.c_out(sigma)) * raw


class EDMPreconditioning(Preconditioning):
    """EDM's own: unit variance of input and target at every level, for data of standard deviation 0.5."""

    def c_in(self, sigma: Tensor) -> Tensor:
        """Returns 1 / sqrt(sigma_data^2 + sigma^2)."""
        return 1 / (SIGMA_DATA**2 + sigma.float() ** 2).sqrt()

    def c_noise(self, sigma: Tensor) -> Tensor:
        """Returns ln(sigma) / 4."""
        return sigma.float().log() / 4

    def c_out(self, sigma: Tensor) -> Tensor:
        """Returns sigma * sigma_data / sqrt(sigma_data^2 + sigma^2)."""
        sigma = sigma.float()
        return sigma * SIGMA_DATA / (sigma**2 + SIGMA_DATA**2).sqrt()

    def c_skip(self, sigma: Tensor) -> Tensor:
        """Returns sigma_data^2 / (sigma_data^2 + sigma^2)."""
        return SIGMA_DATA**2 / (sigma.float() ** 2 + SIGMA_DATA**2)


class VPPreconditioning(Preconditioning):
    """Variance-preserving SDE (Song et al., 2021): F predicts the noise at t in (0, 1], told as 999 t."""

    beta_d, beta_min, steps, epsilon_t = 19.9, 0.1, 1000, 1e-5

    def __init__(self):
        self.sigma_min, self.sigma_max = self._sigma(self.epsilon_t), self._sigma(1.0)

    def c_in(self, sigma: Tensor) -> Tensor:
        """Returns 1 / sqrt(1 + sigma^2)."""
        return 1 / (sigma.float() ** 2 + 1).sqrt()

    def c_noise(self, sigma: Tensor) -> Tensor:
        """Returns 999 t(sigma), t = (sqrt(beta_min^2 + 2 beta_d ln(1 + sigma^2)) - beta_min) / beta_d."""
        power = (1 + sigma.float() ** 2).log()
        t = ((self.beta_min**2 + 2 * self.beta_d * power).sqrt() - self.beta_min) / self.beta_d
        return (self.steps - 1) * t

    def c_out(self, sigma: Tensor) -> Tensor:
        """Returns -sigma."""
        return -sigma.float()

    def _sigma(self, t: float) -> float:
        t = torch.tensor(t, device="cpu")
        return float(((0.5 * self.beta_d * t**2 + self.beta_min * t).exp() - 1).sqrt())


class VEPreconditioning(Preconditioning):
    """Variance-exploding SDE (Song et al., 2021): F predicts minus the noise, told ln(sigma / 2)."""

    sigma_min = 0.02
    sigma_max = 100.0

    def c_in(self, sigma: Tensor) -> Tensor:
        """Returns 1."""
        return torch.ones_like(sigma, dtype=torch.float32)

    def c_noise(self, sigma: Tensor) -> Tensor:
        """Returns ln(sigma / 2)."""
        return (0.5 * sigma.float()).log()

    def c_out(self, sigma: Tensor) -> Tensor:
        """Returns sigma."""
        return sigma.float()


class IDDPMPreconditioning(Preconditioning):
    """Improved DDPM (Nichol and Dhariwal, 2021): 1000 steps of a cosine schedule; half the outputs are a variance.

    Attributes:
        levels: u_0 > ... > u_1000 = 0, (1001,), with u_(j-1)^2 + 1 = (u_j^2 + 1) / max(a_(j-1) / a_j, 0.001) and
            a_j = sin^2(pi / 2 * j / 1000 / 1.008).
    """

    outputs_per_channel = 2
    steps, ratio_min, offset = 1000, 0.001, 0.008

    def __init__(self):
        # On the CPU whatever the default device: the first user may be a dry run on the meta device.
        steps = torch.arange(self.steps + 1, device="cpu")
        alpha_bar = (0.5 * math.pi * steps / self.steps / (self.offset + 1)).sin() ** 2
        ratios = (alpha_bar[:-1] / alpha_bar[1:]).clip(min=self.ratio_min)
        levels = torch.zeros(self.steps + 1, device="cpu")
        for j in range(self.steps, 0, -1):
            levels[j - 1] = ((levels[j] ** 2 + 1) / ratios[j - 1] - 1).sqrt()
        self.levels = levels
        self.sigma_min, self.sigma_max = float(levels[-2]), float(levels[0])

    def c_in(self, sigma: Tensor) -> Tensor:
        """Returns 1 / sqrt(1 + sigma^2)."""
        return 1 / (sigma.float() ** 2 + 1).sqrt()

    def c_noise(self, sigma: Tensor) -> Tensor:
        """Returns 999 - j for the nearest level u_j: the DDPM timestep, -1 for u_1000."""
        return (self.steps - 1 - self._nearest(sigma)).float()

    def c_out(self, sigma: Tensor) -> Tensor:
        """Returns -sigma."""
        return -sigma.float()

    def round_sigma(self, sigma: Tensor) -> Tensor:
        """Returns the nearest u_j."""
        return self.levels.to(sigma.device)[self._nearest(sigma)]

    def _nearest(self, sigma: Tensor) -> Tensor:
        return (sigma.float()[..., None] - self.levels.to(sigma.device)).abs().argmin(-1)


PRECONDITIONINGS: dict[str, Preconditioning] = {
    "edm": EDMPreconditioning(),
    "vp": VPPreconditioning(),
    "ve": VEPreconditioning(),
    "iddpm": IDDPMPreconditioning(),
}

NETWORKS: dict[str, type[nn.Module]] = {"SongUNet": SongUNet, "DhariwalUNet": DhariwalUNet}
_WRAPPER_KEYS = (
    "precond",
    "model_type",
    "img_resolution",
    "img_channels",
    "use_fp16",  # the dtype is chosen at loading
    "sigma_min",  # both bound the published samplers, not the network
    "sigma_max",
    "sigma_data",
)

_DDPMPP = {
    "model_type": "SongUNet",
    "embedding_type": "positional",
    "encoder_type": "standard",
    "channel_mult_noise": 1,
    "resample_filter": [1, 1],
}
_NCSNPP = {
    "model_type": "SongUNet",
    "embedding_type": "fourier",
    "encoder_type": "residual",
    "channel_mult_noise": 2,
    "resample_filter": [1, 3, 3, 1],
}
_SONG = {"img_channels": 3, "augment_dim": 9, "model_channels": 128, "num_blocks": 4, "attn_resolutions": [16]}
_CIFAR = {**_SONG, "img_resolution": 32, "channel_mult": [2, 2, 2], "dropout": 0.13}
_FACES = {**_SONG, "img_resolution": 64, "channel_mult": [1, 2, 2, 2], "label_dim": 0}
VARIANTS: dict[str, dict[str, Any]] = {
    "cifar10-32x32-uncond-vp": {**_CIFAR, **_DDPMPP, "label_dim": 0},
    "cifar10-32x32-cond-vp": {**_CIFAR, **_DDPMPP, "label_dim": 10},
    "cifar10-32x32-uncond-ve": {**_CIFAR, **_NCSNPP, "label_dim": 0},
    "cifar10-32x32-cond-ve": {**_CIFAR, **_NCSNPP, "label_dim": 10},
    "ffhq-64x64-uncond-vp": {**_FACES, **_DDPMPP, "dropout": 0.05},
    "ffhq-64x64-uncond-ve": {**_FACES, **_NCSNPP, "dropout": 0.05},
    "afhqv2-64x64-uncond-vp": {**_FACES, **_DDPMPP, "dropout": 0.25},
    "afhqv2-64x64-uncond-ve": {**_FACES, **_NCSNPP, "dropout": 0.25},
    "imagenet-64x64-cond-adm": {
        "model_type": "DhariwalUNet",
        "img_resolution": 64,
        "img_channels": 3,
        "label_dim": 1000,
        "augment_dim": 0,
        "model_channels": 192,
        "channel_mult": [1, 2, 3, 4],
        "dropout": 0.10,
    },
}


def edm_arguments(config: str | Mapping[str, Any]) -> tuple[type[nn.Module], dict[str, Any], str]:
    """Reads what network a config means.

    Args:
        config: Name of a published variant, or a flat mapping: `precond` (default "edm"), `model_type`,
            `img_resolution`, `img_channels`, and arguments of the network's class. `model_type` defaults to the
            published wrapper's network: SongUNet for "vp" and "ve", DhariwalUNet for "edm" and "iddpm".

    Returns:
        The network's class, its arguments, and a key of `PRECONDITIONINGS`.

    Raises:
        UnknownNameError: There is no such variant, preconditioning or network.
        ConfigError: Keys are unknown or missing, or sigma_data is not 0.5.
    """
    if isinstance(config, str):
        if config not in VARIANTS:
            raise UnknownNameError("EDM variant", config, VARIANTS, "A dict of the network's arguments serves too.")
        config = VARIANTS[config]
    precond = config.get("precond", "edm")
    if precond not in PRECONDITIONINGS:
        raise UnknownNameError("precond", str(precond), PRECONDITIONINGS)
    model_type = config.get("model_type", "SongUNet" if precond in ("vp", "ve") else "DhariwalUNet")
    if model_type not in NETWORKS:
        raise UnknownNameError("model_type", str(model_type), NETWORKS)
    network = NETWORKS[model_type]
    own = set(inspect.signature(network).parameters) - {"img_resolution", "in_channels", "out_channels"}
    known = [*_WRAPPER_KEYS, *sorted(own)]
    problems = [f"unknown key {key!r}; {suggest(str(key), known)}" for key in config if key not in known]
    problems += [f"{key} is missing" for key in ("img_resolution", "img_channels") if key not in config]
    if config.get("sigma_data", SIGMA_DATA) != SIGMA_DATA:
        problems.append(f"sigma_data is {config['sigma_data']}, and only {SIGMA_DATA} is supported")
    if problems:
        raise ConfigError(f"config of {model_type} with precond {precond!r}: " + "\n  ".join(["", *problems]).strip())
    channels = config["img_channels"]
    arguments = {
        "img_resolution": config["img_resolution"],
        "in_channels": channels,
        "out_channels": channels * PRECONDITIONINGS[precond].outputs_per_channel,
    }
    return network, arguments | {key: config[key] for key in config if key in own}, precond


def _per_image(coefficient: Tensor) -> Tensor:
    return coefficient.reshape(-1, 1, 1, 1)
