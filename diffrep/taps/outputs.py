"""What a module's output means: which tensor of a tuple is the image stream."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from diffrep.errors import LayerError

# Classes of diffusers whose forward returns a tuple -> index of the image stream. Everything else that returns a
# tuple is refused: taking the first member would be the text stream in MM-DiT blocks.
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
}


def image_stream(module: nn.Module, output: Any, address: str) -> torch.Tensor:
    """Picks the image stream out of a module's output.

    Raises:
        LayerError: The output is not a tensor and the class is not known.
    """
    if isinstance(output, torch.Tensor):
        return output
    kind = type(module).__name__
    if isinstance(output, tuple) and kind in TUPLE_INDEX:
        return output[TUPLE_INDEX[kind]]
    if hasattr(output, "sample") and isinstance(output.sample, torch.Tensor):
        return output.sample
    if isinstance(output, tuple) and len(output) == 1 and isinstance(output[0], torch.Tensor):
        return output[0]
    raise LayerError(
        f"layer {address!r}: {kind} returns {_describe(output)} and diffrep does not know which is the image stream; "
        "tap a module inside it that returns a tensor"
    )


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


def _describe(output: Any) -> str:
    if isinstance(output, tuple):
        return "a tuple of " + ", ".join(type(member).__name__ for member in output)
    return type(output).__name__
