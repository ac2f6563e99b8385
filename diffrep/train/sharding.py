"""Weights that are spread over processes (FSDP2 under Accelerate): what cannot be trained so, and whole tensors."""

from __future__ import annotations

import os

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from diffrep.config import TrainConfig
from diffrep.errors import ConfigError


def check_sharding(accelerator: Accelerator, config: TrainConfig) -> None:
    """Sets up FSDP where it is asked for, or raises where the run cannot be trained so.

    Raises:
        ConfigError: The settings, the run's or FSDP's, or the machine do not allow it.
    """
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() not in ("true", "1"):
        return
    if not accelerator.is_fsdp2:
        # Accelerate itself says nothing here and gives each process the whole network.
        first = accelerator.distributed_type == DistributedType.FSDP
        reason = "fsdp_version must be 2" if first else "it needs GPUs and a launcher"
        raise ConfigError(f"FSDP is asked for, and {reason}; see configs/accelerate/fsdp2.yaml, or leave it out")
    plugin = accelerator.state.fsdp_plugin
    taught = [name for name, term in config.align.items() if term.target == "ema"]
    refused = {
        "distill, whose student has weights of no dimension": config.distill is not None,
        f"align.{', align.'.join(taught)}, which the averaged weights teach": bool(taught),
        "mixed_precision=fp16, in place of which bf16 can be used": config.mixed_precision == "fp16",
        "compile": config.compile,
        "fsdp_state_dict_type other than SHARDED_STATE_DICT": plugin.state_dict_type.name != "SHARDED_STATE_DICT",
    }
    found = [what for what, holds in refused.items() if holds]
    if found:
        raise ConfigError(
            f"FSDP cannot go with: {'; '.join(found)}. Change that, or train with configs/accelerate/ddp.yaml"
        )
    # Accelerate's policy would round the inputs, times too, to bf16. The run's autocast is all that is wanted.
    plugin.mixed_precision_policy = None


def check_units(accelerator: Accelerator, network: nn.Module) -> None:
    """Raises where the network has none of the modules that FSDP is to gather one by one.

    Raises:
        ConfigError: It has not.
    """
    if not accelerator.is_fsdp2:
        return
    wanted = accelerator.state.fsdp_plugin.transformer_cls_names_to_wrap or []
    there = sorted({type(module).__name__ for module in network.modules()})
    missing = [name for name in wanted if name not in there]
    if missing:
        raise ConfigError(
            f"fsdp_transformer_layer_cls_to_wrap is {', '.join(wanted)}, and the network has no {', '.join(missing)}; "
            f"its modules are {', '.join(there)}"
        )


def local(tensor: torch.Tensor) -> torch.Tensor:
    """Returns what of a tensor lies on this process, in the same memory: all of one that is not spread."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: torch.Tensor, form: torch.Tensor | None = None) -> torch.Tensor:
    """Returns all of a tensor, on every process; all must call it.

    Args:
        tensor: A spread one, or this process's share of one that is spread as `form` is.
        form: What says how a share is spread.
    """
    if isinstance(form, DTensor):
        spread = {"shape": form.shape, "stride": form.stride(), "run_check": False}
        tensor = DTensor.from_local(tensor, form.device_mesh, form.placements, **spread)
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def share(tensor: torch.Tensor, form: torch.Tensor) -> torch.Tensor:
    """Returns this process's share of a tensor that every process has; all must call it.

    Args:
        tensor: All of it.
        form: What says how it is to be spread.
    """
    if not isinstance(form, DTensor):
        return tensor
    return distribute_tensor(tensor.to(form.device), form.device_mesh, form.placements).to_local()
