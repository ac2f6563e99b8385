"""What a module's output means: which tensor of a tuple, and which tokens of it, are the image stream."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from diffrep.errors import LayerError

# Classes of diffusers whose forward returns a tuple -> index of the image stream. Everything else that returns a
# tuple is refused: taking the first member would be the text stream in MM-DiT blocks. Mid blocks, the other up
# blocks, BasicTransformerBlock and SanaTransformerBlock return a tensor.
TUPLE_INDEX = {
    "DownBlock2D": 0,  # (hidden after the downsampler, residuals)
    "AttnDownBlock2D": 0,
    "CrossAttnDownBlock2D": 0,
    "SimpleCrossAttnDownBlock2D": 0,
    "ResnetDownsampleBlock2D": 0,
    "SkipDownBlock2D": 0,  # (hidden, residuals, skip image)
    "AttnSkipDownBlock2D": 0,
    "SkipUpBlock2D": 0,  # (hidden, skip image)
    "AttnSkipUpBlock2D": 0,
    "KDownBlock2D": 0,
    "KCrossAttnDownBlock2D": 0,
    "JointTransformerBlock": 1,  # (text, image)
    "FluxTransformerBlock": 1,
    "FluxSingleTransformerBlock": 1,
    "Attention": 0,  # (image, text) of joint attention, the other way round than its block
    "FluxAttention": 0,
}

# Blocks that take text and image apart, and inside work on one sequence, the text first.
JOINED = "FluxSingleTransformerBlock"


def kinds(module: object) -> list[str]:
    """Returns the names of diffusers' classes among a module's class and its bases.

    Bases, since sharding (FSDP2) puts a subclass in the class's place. Diffusers', since many have an "Attention".
    """
    return [kind.__name__ for kind in type(module).__mro__ if kind.__module__.startswith("diffusers.")]


def image_reader(module: nn.Module, address: str) -> Callable[[Any], torch.Tensor]:
    """Returns what picks the image stream out of a module's output.

    The class is looked at here and not in the reader, which `torch.compile` has to follow.

    Args:
        module: The module.
        address: Its name in messages.

    Returns:
        A function of the output, which raises LayerError where that is not a tensor and the class is not known.
    """
    index = next((TUPLE_INDEX[kind] for kind in kinds(module) if kind in TUPLE_INDEX), None)
    kind = type(module).__name__

    def read(output: Any) -> torch.Tensor:
        if isinstance(output, torch.Tensor):
            return output
        if isinstance(output, tuple) and (index is not None or len(output) == 1):
            picked = output[index or 0]
        else:
            picked = getattr(output, "sample", None)
        if not isinstance(picked, torch.Tensor):
            raise LayerError(_unknown(address, kind, output))
        return picked

    return read


def input_stream(args: tuple[Any, ...], kwargs: dict[str, Any], address: str) -> torch.Tensor:
    """Picks the tensor a module is called with: `hidden_states` if given by name, else the first positional tensor.

    Raises:
        LayerError: The call holds no tensor.
    """
    if isinstance(kwargs.get("hidden_states"), torch.Tensor):
        return kwargs["hidden_states"]
    for value in (*args, *kwargs.values()):
        if isinstance(value, torch.Tensor):
            return value
    raise LayerError(f"layer {address!r}: the module is called without a tensor, so it has no input to read")


class Joined:
    """One block that joins text and image into a sequence [text, image], watched to know where the image begins.

    Attributes:
        text: Text tokens of the current pass.
        total: Text and image tokens of the current pass.
    """

    def __init__(self) -> None:
        self.text = 0
        self.total = -1

    def hook(self, block: nn.Module) -> Callable[[], Any]:
        """Returns what hooks the block and returns the hook's handle."""
        return partial(block.register_forward_pre_hook, self._measure, with_kwargs=True)

    def trim(self, tensor: torch.Tensor) -> torch.Tensor:
        """Returns the image tokens (B, N, ...) of a tensor (B, text + N, ...); others, as embeddings, as they are."""
        return tensor[:, self.text :] if tensor.ndim > 2 and tensor.shape[1] == self.total else tensor

    def _measure(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        image = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        text = kwargs["encoder_hidden_states"] if "encoder_hidden_states" in kwargs else args[1]
        self.text = text.shape[1]
        self.total = text.shape[1] + image.shape[1]


def joined_block(path: str, network: nn.Module) -> str | None:
    """Returns the path of the block around a module that joins text and image, or None."""
    parts = path.split(".")
    for length in range(len(parts) - 1, 0, -1):
        around = ".".join(parts[:length])
        if JOINED in kinds(network.get_submodule(around)):
            return around
    return None


def _unknown(address: str, kind: str, output: Any) -> str:
    members = [type(member).__name__ for member in output] if isinstance(output, tuple) else []
    given = f"a tuple of {', '.join(members)}" if members else type(output).__name__
    advice = "read ':adaln' of its block" if "AdaLayerNorm" in kind else "tap a module inside it that returns a tensor"
    return f"layer {address!r}: {kind} returns {given} and diffrep does not know which is the image stream; {advice}"
