"""Points of a layer: where the tensor an address means passes by, and how it is cut out there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from diffrep.errors import LayerError
from diffrep.taps.outputs import kinds

POINTS = ("output", "input", "q", "k", "v", "adaln", "attention")

# Blocks of diffusers that modulate the input of this attention by the timestep. BasicTransformerBlock, which does so
# only under some of its norms, and modules named as in the official DiT are told apart in `_modulated_child`.
MODULATED_CHILD = {
    "JointTransformerBlock": "attn",
    "FluxTransformerBlock": "attn",
    "FluxSingleTransformerBlock": "attn",
    "SanaTransformerBlock": "attn1",
}


@dataclass(frozen=True)
class Site:
    """One end of the call of one module.

    Attributes:
        module: Dotted path.
        at: "input" or "output" of the module.
    """

    module: str
    at: Literal["input", "output"] = "output"


@dataclass(frozen=True)
class Reading:
    """How an address is read.

    Attributes:
        site: Where its tensor passes by.
        pick: Cuts the tensor out of the one that passes by; None takes it whole.
    """

    site: Site
    pick: Callable[[torch.Tensor], torch.Tensor] | None = None


def resolve(path: str, point: str, network: nn.Module) -> Reading:
    """Finds where and how a point of a module is read.

    - "output", "input": what the module returns, what it is called with.
    - "q", "k", "v": queries, keys, values (B, N, C) of an attention module as its projections give them, before any
      norm or rotary embedding; heads lie one after the other in C. Of joint attention, the image's. Of
      cross-attention, "k" and "v" are those of the text.
    - "adaln": the input (B, N, C) of a block after its adaptive layer norm, which is what its self-attention takes.
    - "attention": the weights of an attention module, see `diffrep.taps.attention`.

    Raises:
        LayerError: The module does not have the point.
    """
    module = network.get_submodule(path)
    if point in ("output", "input"):
        return Reading(Site(path, point))
    if point == "adaln":
        return Reading(Site(f"{path}.{_modulated(path, module)}", "input"))
    if not _is_attention(module):
        raise LayerError(
            f"layer '{path}:{point}': {type(module).__name__} is no attention module (no child to_q or qkv); "
            f"{_inside(path, module, _is_attention, 'attention module')}"
        )
    if point == "attention":
        return Reading(Site(path, "output"))
    return _projection(path, point, module)


def _projection(path: str, point: str, module: nn.Module) -> Reading:
    index = "qkv".index(point)
    if _has(module, "qkv"):
        return Reading(Site(f"{path}.qkv"), _part_of_qkv(path, point, module))
    if getattr(module, "fused_projections", False):
        # diffusers' `fuse_qkv_projections` keeps to_q, to_k and to_v, but calls them no more.
        if _has(module, "to_qkv"):
            return Reading(Site(f"{path}.to_qkv"), _chunk(3, index))
        if point != "q":
            return Reading(Site(f"{path}.to_kv"), _chunk(2, index - 1))
    if not _has(module, f"to_{point}"):
        raise LayerError(
            f"layer '{path}:{point}': this {type(module).__name__} has no to_{point}, because it attends to the "
            f"condition only; tap what projects the condition, such as '{path}.add_{point}_proj'"
        )
    return Reading(Site(f"{path}.to_{point}"))


def _part_of_qkv(path: str, point: str, module: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    index = "qkv".index(point)
    split = getattr(module, "split_qkv", None)
    if split is not None:
        return lambda tensor: split(tensor)[index]
    if not hasattr(module.qkv, "out_features"):
        raise LayerError(
            f"layer '{path}:{point}': the fused projection is a {type(module.qkv).__name__}, whose channel order is "
            f"not known; give {type(module).__name__} a method split_qkv(output) that returns q, k, v as (B, N, C)"
        )
    return _chunk(3, index)


def _chunk(parts: int, index: int) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda tensor: tensor.chunk(parts, dim=-1)[index]


def _modulated(path: str, module: nn.Module) -> str:
    child = _modulated_child(module)
    if child is None:
        raise LayerError(
            f"layer '{path}:adaln': {type(module).__name__} has no adaptive norm before its attention; "
            f"{_inside(path, module, _modulated_child, 'block with one')}"
        )
    return child


def _modulated_child(module: nn.Module) -> str | None:
    names = kinds(module)
    if "BasicTransformerBlock" in names:
        return "attn1" if module.norm_type.startswith("ada_norm") else None
    for name in names:
        if name in MODULATED_CHILD:
            return MODULATED_CHILD[name]
    return "attn" if _has(module, "adaLN_modulation") and _has(module, "attn") else None


def _is_attention(module: nn.Module) -> bool:
    return _has(module, "to_q") or _has(module, "qkv")


def _has(module: nn.Module, child: str) -> bool:
    return isinstance(getattr(module, child, None), nn.Module)


def _inside(path: str, module: nn.Module, wanted: Callable[[nn.Module], object], what: str, first: int = 3) -> str:
    names = [f"{path}.{name}" for name, inner in module.named_modules() if name and wanted(inner)]
    if not names:
        return f"{path} holds no {what}"
    return f"{path} holds {', '.join(names[:first])}" + (f", ... ({len(names)} in all)" if len(names) > first else "")
