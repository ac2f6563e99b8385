"""From a config to the network that is trained, and to what it learns to predict."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from torch import nn

from diffrep.backbones import Backbone
from diffrep.backbones.conditioning import PromptEmbeddings
from diffrep.backbones.fresh import new_network, template_of, trainable, with_network
from diffrep.config import DDPMConfig, EDMConfig, FlowConfig, ModelConfig, ObjectiveConfig
from diffrep.errors import ConfigError
from diffrep.extract.job import open_backbone
from diffrep.noise import DiscreteSchedule, FlowSchedule, Schedule, SigmaSchedule
from diffrep.taps import to_meta

# What each kind of network is trained with, first what it is trained with where nothing is given. Others have no form
# in the files that such a network is saved in.
TRAINED: dict[str, tuple[type[FlowConfig] | type[DDPMConfig] | type[EDMConfig], ...]] = {
    "sit": (FlowConfig,),
    "repa": (FlowConfig,),
    "dit": (DDPMConfig,),
    "adm": (DDPMConfig,),
    "edm": (EDMConfig,),
    "UNet2DModel": (DDPMConfig, FlowConfig),
}
# Native time of a flow's noise end in networks of diffusers.
DIFFUSERS_SCALE = 1000.0


def open_model(
    config: ModelConfig, objective: ObjectiveConfig | None, device: torch.device
) -> tuple[Backbone, nn.Module, ObjectiveConfig]:
    """Builds or loads the network to train.

    Args:
        config: Which.
        objective: What it is to predict; None is the usual of its kind, or what the checkpoint was trained with.
        device: Where a checkpoint is loaded.

    Returns:
        The model as a backbone whose network lies on the meta device, the network to train, and the objective.

    Raises:
        ConfigError: The network cannot be trained with the objective.
    """
    if config.source is None:
        network, adapter = new_network(config.kind, config.args)
        objective = objective or TRAINED[config.kind][0]()
        if type(objective) not in TRAINED[config.kind]:
            known = ", ".join(kind.model_fields["kind"].default for kind in TRAINED[config.kind])
            raise ConfigError(f"objective.kind={objective.kind!r} is not for model.kind={config.kind!r}; give {known}")
        schedule = _schedule(config, objective)
        return template_of(network, adapter, schedule, config.kind), network, objective
    frozen = open_backbone(config.source.model_copy(update={"device": str(device), "dtype": "float32"}))
    if isinstance(frozen.conditioner, PromptEmbeddings):
        raise ConfigError(f"{frozen.name} is conditioned on prompts, which diffusion training does not take")
    network = trainable(frozen.network)
    own = objective_of(frozen.schedule)
    if objective is not None and _form(objective) != _form(own):
        raise ConfigError(
            f"{frozen.name} was trained with {_form(own)}, and objective says {_form(objective)}; leave objective "
            "out, or give only what does not change what the network predicts"
        )
    return with_network(frozen, to_meta(network)), network, objective or own


def objective_of(schedule: Schedule) -> ObjectiveConfig:
    """Returns the objective that a network with a schedule was trained with, as far as the schedule tells."""
    if isinstance(schedule, FlowSchedule):
        return FlowConfig(path=schedule.path, prediction=schedule.prediction)
    if isinstance(schedule, SigmaSchedule):
        return EDMConfig()
    if isinstance(schedule, DiscreteSchedule):
        return DDPMConfig(
            prediction_type=schedule.prediction, num_train_timesteps=len(schedule.alphas_cumprod), **_betas(schedule)
        )
    raise ConfigError(f"a network with a {type(schedule).__name__} cannot be trained")


def _betas(schedule: DiscreteSchedule) -> dict[str, Any]:
    config = {} if schedule.sampler is None else schedule.sampler.config
    names = ("beta_start", "beta_end", "beta_schedule")
    if schedule == DiscreteSchedule.cosine():
        return {"beta_schedule": "squaredcos_cap_v2"}
    return {name: config[name] for name in names if name in config}


def _form(objective: ObjectiveConfig) -> dict[str, Any]:
    """Returns what of an objective decides what the network's output means."""
    names = ("kind", "path", "prediction", "prediction_type", "num_train_timesteps", "beta_schedule", "beta_start")
    names += ("beta_end", "sigma_data")
    return {name: getattr(objective, name) for name in names if hasattr(objective, name)}


def _schedule(config: ModelConfig, objective: ObjectiveConfig) -> Schedule:
    """Returns the noise schedule of a new network."""
    if isinstance(objective, EDMConfig):
        from diffrep.backbones.official import EDMBackbone

        return EDMBackbone.schedule_of(config.args)
    if isinstance(objective, DDPMConfig):
        given = objective.model_dump(exclude={"kind", "density", "vlb_weight"})
        # Samplers may hold pixels in [-1, 1], and not latents.
        pixels = config.kind == "UNet2DModel" and config.args.get("in_channels", 3) in (1, 3)
        schedule = DiscreteSchedule.from_diffusers(DDPMScheduler(**given, clip_sample=pixels))
        # Official networks come without a scheduler where their schedule is the published one.
        usual = config.kind != "UNet2DModel" and objective.prediction_type == "epsilon"
        alike = usual and torch.allclose(
            torch.tensor(schedule.alphas_cumprod), torch.tensor(DiscreteSchedule.linear().alphas_cumprod), atol=1e-6
        )
        return DiscreteSchedule.linear() if alike else schedule
    if config.kind == "UNet2DModel":
        if objective.path != "linear" or objective.prediction != "velocity":
            raise ConfigError(
                f"a flow of UNet2DModel is written as diffusers writes flows: path linear, prediction velocity; got "
                f"{objective.path} and {objective.prediction}"
            )
        return FlowSchedule(scale=DIFFUSERS_SCALE, sampler=FlowMatchEulerDiscreteScheduler())
    towards_data = 1 if config.kind == "sit" else 0
    return FlowSchedule(objective.path, data_time=towards_data, prediction=objective.prediction)
