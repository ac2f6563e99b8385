"""Backbones of official checkpoints: DiT, SiT, REPA, guided-diffusion (ADM) and EDM."""

from __future__ import annotations

import inspect
import math
import re
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from diffrep.backbones.adm import ADMUNet, adm_arguments, adm_noise_schedule
from diffrep.backbones.aliases import pick
from diffrep.backbones.backbone import Backbone
from diffrep.backbones.conditioning import ClassLabels, Condition, Conditioner, OneHotLabels, Unconditional
from diffrep.backbones.dit import DiT
from diffrep.backbones.dit_keys import modern_keys
from diffrep.backbones.edm import PRECONDITIONINGS, edm_arguments
from diffrep.errors import ConfigError, UnknownNameError, suggest
from diffrep.noise import DiscreteSchedule, FlowSchedule, Schedule, SigmaSchedule

State = dict[str, torch.Tensor]
Config = str | Mapping[str, Any]


class OfficialBackbone(Backbone):
    """A network whose checkpoint is a bare state dict; a config says what to build and how it was trained."""

    @classmethod
    @abstractmethod
    def build(cls, config: Config, state: State | None) -> nn.Module:
        """Builds the network; sizes that the config leaves open are read off the weights, where there are any.

        Raises:
            ConfigError: The config is no variant's name and not the constructor's arguments.
        """

    @classmethod
    @abstractmethod
    def schedule_of(cls, config: Config) -> Schedule:
        """Returns the noise schedule that the published weights were trained with."""

    @classmethod
    def tidy(cls, state: State) -> State:
        """Brings older key layouts up to date."""
        return state

    @staticmethod
    @abstractmethod
    def conditioner_of(network: nn.Module) -> Conditioner:
        """Returns the conditioner that fits the network."""


SIZES = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}
# Arguments of the published constructors that change no number of a frozen network.
INERT = ("path_type", "fused_attn", "use_cfg", "decoder_hidden_size", "prediction")


class DiTBackbone(OfficialBackbone):
    """DiT (Peebles and Xie, 2023): labels 0 to 999, the last row of the table is "no class"; integer timesteps."""

    family = "dit"

    @classmethod
    def build(cls, config: Config, state: State | None) -> DiT:
        """Builds from a variant's name, such as "XL/2", or the arguments of `DiT`."""
        return _remember(DiT, dit_arguments(config, cls.family, state))

    @classmethod
    def schedule_of(cls, config: Config) -> Schedule:
        """Returns DDPM's linear betas."""
        return DiscreteSchedule.linear()

    @staticmethod
    def conditioner_of(network: nn.Module) -> Conditioner:
        """Returns labels, with the null row where the table has one."""
        rows = network.y_embedder.embedding_table.num_embeddings
        return ClassLabels(rows, null=rows - 1 if rows > network.num_classes else None)

    @property
    def in_channels(self) -> int:
        """Channels of the network's input."""
        return self.network.in_channels

    @property
    def sample_size(self) -> int:
        """Native side of the network's input."""
        return self.network.input_size

    def blocks(self) -> list[str]:
        """Returns the transformer blocks."""
        return [f"blocks.{i}" for i in range(len(self.network.blocks))]

    @property
    def patch_size(self) -> int:
        """Input cells per token, along one side."""
        return self.network.patch_size

    def alias(self, family: str, rest: str) -> str | None:
        """Knows repa.K."""
        return pick(self.blocks(), rest, first=1) if family == "repa" else None

    def call(self, network: nn.Module, x: torch.Tensor, time: torch.Tensor, cond: Condition) -> torch.Tensor:
        """Calls the network."""
        return network(x, time, cond["labels"])


class SiTBackbone(DiTBackbone):
    """SiT (Ma et al., 2024): a flow whose time is 1 at the data; the output's variance half is dropped."""

    family = "sit"

    @classmethod
    def schedule_of(cls, config: Config) -> Schedule:
        """Returns the interpolant: linear, or what the config's `path_type` says."""
        return FlowSchedule(_path(config), data_time=1, prediction=_prediction(config))


class REPABackbone(DiTBackbone):
    """REPA's SiT (Yu et al., 2025): a flow whose time is 0 at the data; `projectors.I` when the file has them."""

    family = "repa"

    @classmethod
    def schedule_of(cls, config: Config) -> Schedule:
        """Returns the interpolant: linear, or what the config's `path_type` says."""
        return FlowSchedule(_path(config), data_time=0, prediction=_prediction(config))

    @classmethod
    def tidy(cls, state: State) -> State:
        """Renames `decoder_blocks`, which the first checkpoints have."""
        return modern_keys(state)

    def call(self, network: nn.Module, x: torch.Tensor, time: torch.Tensor, cond: Condition) -> torch.Tensor:
        """Calls the network; the projectors run last, so that reading a block does not pay for them."""
        if not hasattr(network, "projectors"):
            return super().call(network, x, time, cond)
        return network(x, time, cond["labels"], project=True)[0]


class ADMBackbone(OfficialBackbone):
    """guided-diffusion (Dhariwal and Nichol, 2021)."""

    convolutional = True

    @classmethod
    def build(cls, config: Config, state: State | None) -> ADMUNet:
        """Builds from a variant's name, such as "256-uncond", or either published vocabulary of arguments."""
        return _remember(ADMUNet, adm_arguments(config))

    @classmethod
    def schedule_of(cls, config: Config) -> Schedule:
        """Returns linear betas, or the cosine schedule where the config says so."""
        kind = adm_noise_schedule(config)
        return DiscreteSchedule.cosine() if kind == "cosine" else DiscreteSchedule.linear()

    @staticmethod
    def conditioner_of(network: nn.Module) -> Conditioner:
        """Returns labels, which must be given, or nothing."""
        return Unconditional() if network.num_classes is None else ClassLabels(network.num_classes, null=None)

    @property
    def in_channels(self) -> int:
        """Channels of the network's input."""
        return self.network.in_channels

    @property
    def sample_size(self) -> int:
        """Native side of the network's input."""
        return self.network.image_size

    def blocks(self) -> list[str]:
        """Returns input blocks, the middle block and output blocks."""
        ins = [f"input_blocks.{i}" for i in range(len(self.network.input_blocks))]
        outs = [f"output_blocks.{i}" for i in range(len(self.network.output_blocks))]
        return [*ins, "middle_block", *outs]

    def alias(self, family: str, rest: str) -> str | None:
        """Knows dift.I and gd.B."""
        if family == "gd":
            return pick(self.blocks(), rest, first=1)
        outputs = [name for name in self.blocks() if name.startswith("output_blocks")]
        return pick(outputs, rest) if family == "dift" else None

    def call(self, network: nn.Module, x: torch.Tensor, time: torch.Tensor, cond: Condition) -> torch.Tensor:
        """Calls the network."""
        return network(x, time, cond.get("labels"))


class EDMBackbone(OfficialBackbone):
    """EDM (Karras et al., 2022): x and sigma as the preconditioned network takes them; `denoise` gives D(x; sigma)."""

    convolutional = True

    @classmethod
    def build(cls, config: Config, state: State | None) -> nn.Module:
        """Builds from a variant's name or the arguments of the published wrapper."""
        kind, arguments, precond = edm_arguments(config)
        network = _remember(kind, arguments)
        network.precond = precond
        return network

    @classmethod
    def schedule_of(cls, config: Config) -> Schedule:
        """Returns the levels of the preconditioning."""
        precond = edm_arguments(config)[2]
        if precond == "edm":  # the published bounds are 0 and infinity; these are its sampler's
            return SigmaSchedule("edm", 0.002, 80.0)
        scaling = PRECONDITIONINGS[precond]
        table = tuple(scaling.levels.tolist())[:-1] if precond == "iddpm" else ()
        return SigmaSchedule(precond, scaling.sigma_min, scaling.sigma_max, table)

    @classmethod
    def tidy(cls, state: State) -> State:
        """Drops the wrapper's prefix, and the table of levels that iDDPM's wrapper keeps."""
        return {key.removeprefix("model."): value for key, value in state.items() if key != "u"}

    @staticmethod
    def conditioner_of(network: nn.Module) -> Conditioner:
        """Returns one-hot labels or nothing."""
        return OneHotLabels(network.label_dim) if network.label_dim else Unconditional()

    @property
    def in_channels(self) -> int:
        """Channels of the network's input."""
        return self.network.in_channels

    @property
    def sample_size(self) -> int:
        """Native side of the network's input."""
        return self.network.img_resolution

    @property
    def input_dtype(self) -> torch.dtype:
        """fp32: the preconditioning scales before it casts."""
        return torch.float32

    def blocks(self) -> list[str]:
        """Returns the members of encoder and decoder."""
        return [f"{half}.{name}" for half in ("enc", "dec") for name in getattr(self.network, half)]

    def alias(self, family: str, rest: str) -> str | None:
        """Knows ddae.I: the decoder's `block`s, counted from 1."""
        decoder = [f"dec.{name}" for name in self.network.dec if "_block" in name]
        return pick(decoder, rest, first=1) if family == "ddae" else None

    def call(self, network: nn.Module, x: torch.Tensor, time: torch.Tensor, cond: Condition) -> torch.Tensor:
        """Denoises."""
        return PRECONDITIONINGS[network.precond].denoised(network, x, time, cond.get("labels"))


def dit_arguments(config: Config, family: str, state: State | None = None) -> dict[str, Any]:
    """Returns the arguments of `DiT`.

    Args:
        config: "S/2" to "XL/8", or a mapping with the published constructors' arguments, optionally with `variant`.
        family: "dit", "sit" or "repa".
        state: Weights, which say what the config leaves open: input size, classes, REPA's projections. Not whether
            variances are learned: that is what tells REPA's files from those of DiT and SiT.

    Returns:
        All arguments, the defaults too.

    Raises:
        UnknownNameError: There is no such variant.
        ConfigError: Keys are unknown.
    """
    given = {"variant": config} if isinstance(config, str) else dict(config)
    defaults = {name: parameter.default for name, parameter in inspect.signature(DiT).parameters.items()}
    known = [*defaults, *INERT, "variant"]
    problems = [f"unknown key {key!r}; {suggest(key, known)}" for key in given if key not in known]
    if problems:
        raise ConfigError("config of DiT: " + "; ".join(problems))
    arguments: dict[str, Any] = {"learn_sigma": family != "repa", "drop_sigma": family == "sit"}
    if "variant" in given:
        arguments |= _variant(given["variant"])
    arguments |= _seen_in(state, family, arguments | given) if state else {}
    return defaults | arguments | {key: value for key, value in given.items() if key in defaults}


def _variant(name: str) -> dict[str, Any]:
    match = re.fullmatch(r"(?:DiT-|SiT-)?(S|B|L|XL)/([248])", name)
    if match is None:
        raise UnknownNameError("DiT variant", name, [f"{size}/{patch}" for size in SIZES for patch in (2, 4, 8)])
    depth, width, heads = SIZES[match[1]]
    aligned = 4 if match[1] in ("S", "B") else 8
    sizes = {"patch_size": int(match[2]), "hidden_size": width, "depth": depth, "num_heads": heads}
    return sizes | {"encoder_depth": aligned}


def _seen_in(state: State, family: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Reads sizes off the weights; what cannot be read is left to the comparison of shapes."""
    seen: dict[str, Any] = {}
    patch, channels = arguments.get("patch_size", 2), arguments.get("in_channels")
    if "x_embedder.proj.weight" in state:
        channels = seen["in_channels"] = channels or state["x_embedder.proj.weight"].shape[1]
    if "pos_embed" in state:
        seen["input_size"] = math.isqrt(state["pos_embed"].shape[1]) * patch
    if "y_embedder.embedding_table.weight" in state:
        rows = state["y_embedder.embedding_table.weight"].shape[0]
        dropped = arguments.get("class_dropout_prob", 0.1) > 0
        seen["num_classes"] = rows - dropped
    seen["qk_norm"] = any(".q_norm." in key for key in state)
    outs = sorted(key for key in state if re.fullmatch(r"projectors\.\d+\.4\.weight", key))
    if outs and family == "repa":  # elsewhere they are keys that do not belong
        seen["z_dims"] = tuple(state[key].shape[0] for key in outs)
        seen["projector_dim"] = state[outs[0]].shape[1]
    return seen


def _path(config: Config) -> str:
    path = "linear" if isinstance(config, str) else str(config.get("path_type", "linear")).lower()
    # REPA's constructor is called with path_type="edm", its default, whatever path is trained; GVP is SiT's name.
    path = {"edm": "linear", "gvp": "cosine"}.get(path, path)
    if path not in ("linear", "cosine", "vp"):
        raise UnknownNameError("path_type", path, ["linear", "cosine", "vp", "gvp"])
    return path


def _prediction(config: Config) -> str:
    given = "v" if isinstance(config, str) else str(config.get("prediction", "v"))
    # REPA writes its only one "v".
    name = "velocity" if given == "v" else given
    if name not in ("velocity", "epsilon", "sample", "score"):
        raise UnknownNameError("prediction", name, ["velocity", "epsilon", "sample", "score"])
    return name


def _remember(kind: type[nn.Module], arguments: dict[str, Any]) -> nn.Module:
    try:
        network = kind(**arguments)
    except (TypeError, ValueError, ZeroDivisionError, RuntimeError) as error:
        raise ConfigError(f"{kind.__name__} cannot be built from {arguments}: {error}") from error
    network.arguments = arguments  # for a second build, and for the config beside converted weights
    return network
